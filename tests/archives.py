"""What the archive tests share: small slides of discs in files, and detectors that worker processes can import."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tifffile

import slidescan as ss
from slidescan.testing import OracleDetector
from tests.discs import MPP, ORACLE, config, discs, tissue


def write_slide(path: Path, seed: int, *, mpp: float | None = MPP, deadly: bool = False) -> int:
    """Write a slide of discs, 900 × 700 px; return how many it has."""
    _, centers = discs(n=12, size_wh=(900, 700), seed=seed)
    pixels = tissue((900, 700), centers)
    if deadly:
        pixels[:40, :40] = (255, 0, 255)
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", compression="zlib", metadata=None, **scale)
    return len(centers)


@dataclass(frozen=True)
class Deadly(OracleDetector):
    """Takes its process with it when it sees magenta, as the system does when memory is short."""

    def detect(self, tiles: np.ndarray, min_score: float) -> list[ss.Detections]:
        if (tiles == (255, 0, 255)).all(-1).sum() > 100:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        return super().detect(tiles, min_score)


DEADLY = Deadly(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)

if __name__ == "__main__":
    ss.scan_archive(sys.argv[1], ORACLE, out=sys.argv[2], config=config(), workers=2)
