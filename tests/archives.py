"""What the archive tests share: small slides of discs in files, and detectors that worker processes can import."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

import slidescan as ss
from slidescan.testing import OracleDetector
from tests.discs import MPP, ORACLE, config, discs, tissue

Color = tuple[int, int, int]
DEADLY: Color = (255, 0, 255)
HANGING: Color = (0, 255, 0)


def write_slide(path: Path, seed: int, *, mpp: float | None = MPP, mark: Color | None = None) -> int:
    """Write a slide of discs, 900 × 700 px; return how many it has."""
    _, centers = discs(n=12, size_wh=(900, 700), seed=seed)
    pixels = tissue((900, 700), centers)
    if mark is not None:
        pixels[:40, :40] = mark
    path.parent.mkdir(parents=True, exist_ok=True)
    scale = {} if mpp is None else {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", compression="zlib", metadata=None, **scale)
    return len(centers)


def write_cohort(folder: Path) -> Path:
    """Write four slides that can be scanned, two of one name; one without scale, one broken, one that is not there."""
    folder = folder / "Doe^Jane  1970-01-01"  # two spaces
    write_slide(folder / "north/case.tiff", 1)
    write_slide(folder / "south/case.tiff", 2)
    write_slide(folder / "south/other.tiff", 3)
    write_slide(folder / "unscaled.tiff", 4, mpp=None)
    (folder / "broken.svs").write_bytes(b"II*\0 not a slide")
    rows = ["north/case.tiff,,north", "south/case.tiff,,south", "south/other.tiff,,south", "unscaled.tiff,0.5,"]
    rows += ["broken.svs,,", "lost.svs,,"]
    (folder / "unscaled-too.tiff").symlink_to(folder / "unscaled.tiff")
    rows.append("unscaled-too.tiff,,")
    table = folder / "slides.csv"
    table.write_text("slide_path,mpp,group\n" + "\n".join(rows) + "\n")
    return table


def differing(ours: dict[Any, Any], whole: dict[Any, Any]) -> dict[str, object]:
    """Return what differs between two trees of files, in few words: pytest would show the bytes of all."""
    found: dict[str, object] = {}
    for name in sorted(ours.keys() | whole.keys()):
        pair = [dict(enumerate(each)) if isinstance(each, list) else each for each in (ours.get(name), whole.get(name))]
        if all(isinstance(each, dict) for each in pair):
            found |= {f"{name}/{key}": differs for key, differs in differing(*pair).items()}
        elif pair[0] != pair[1]:
            found[str(name)] = tuple(f"{len(each)} bytes" if isinstance(each, bytes) else each for each in pair)
    return found


@dataclass(frozen=True)
class Troubled(OracleDetector):
    """Takes its process with it when it sees magenta, as the system does when memory is short; hangs over green."""

    def detect(self, tiles: np.ndarray, min_score: float) -> list[ss.Detections]:
        if (tiles == DEADLY).all(-1).sum() > 100:
            os.kill(os.getpid(), signal.SIGKILL)
            signal.pause()
        if (tiles == HANGING).all(-1).sum() > 100:
            threading.Event().wait()
        return super().detect(tiles, min_score)


@dataclass(frozen=True)
class Forgetful(OracleDetector):
    """Is short of memory once."""

    path: str = ""

    def detect(self, tiles: np.ndarray, min_score: float) -> list[ss.Detections]:
        try:
            Path(self.path).touch(exist_ok=False)
        except FileExistsError:
            return super().detect(tiles, min_score)
        raise MemoryError


@dataclass(frozen=True)
class Gated(OracleDetector):
    """Writes down each call, and waits for the gate to open; its digest does not depend on where they are."""

    scored: Path = field(default=Path(), repr=False)
    gate: Path = field(default=Path(), repr=False)

    def detect(self, tiles: np.ndarray, min_score: float) -> list[ss.Detections]:
        with self.scored.open("a") as file:
            file.write(f"{os.getpid()}\n")
        until = time.monotonic() + 60
        while not self.gate.exists() and time.monotonic() < until:
            time.sleep(0.005)
        return super().detect(tiles, min_score)


@dataclass(frozen=True)
class Fragile(OracleDetector):
    """Loses its device after some calls in one process, as a GPU does: all later ones fail, too."""

    calls: int = 0

    def detect(self, tiles: np.ndarray, min_score: float) -> list[ss.Detections]:
        _calls.append(self.calls)
        if len(_calls) > self.calls:
            raise RuntimeError("CUDA error: unspecified launch failure\nCUDA kernel errors might be told later")
        return super().detect(tiles, min_score)


_calls: list[int] = []  # of this process
FORGETFUL = Forgetful(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
TROUBLED = Troubled(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)

if __name__ == "__main__":
    ss.scan_archive(sys.argv[1], ORACLE, out=sys.argv[2], config=config(), workers=2)
