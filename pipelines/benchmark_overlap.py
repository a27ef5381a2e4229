"""Whether a scan is as fast as the slower of reading and scoring: real reading, and a stand-in for a GPU that waits.

The stand-in lets go of the interpreter for as long as a GPU of a given rate would take. It does one batch after the
other, and where the next was handed to it meanwhile it begins that at once, as a GPU does with what is queued. What it
cannot show is what a real GPU adds: copies to it, and the launch of kernels.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from benchmark_read import assemble
from numpy.typing import NDArray

import slidescan as ss
from slidescan.detections import Detector

__all__ = ["bench_overlap"]

_FACTORS = (0.5, 1.0, 2.0)
_INSTANTLY = 1e6  # megapixels a second
_SETTINGS = {"tissue.enabled": False}  # the assembled slide has no glass
# The one GPU of this process, and what it was busy: every region has a detector of its own, a copy.
_gpu = threading.Lock()
_busy_s: list[float] = []
_free_at = 0.0  # when it will have done all it was handed


@dataclass
class Waiting:
    """A detector that finds nothing and takes `mp_s` megapixels of cores a second."""

    mp_s: float
    core_px: int = 1024 - 2 * 112  # what a tile owns, with the margin of the bundled detector
    name: str = "waiting"
    sha256: str = "0"
    classes: tuple[str, ...] = ("nothing",)
    attributes: tuple[str, ...] = ()
    mpp: float = 0.5
    input_px: int = 1024
    object_um: float = 25.0
    halo_um: float | None = 56.0
    max_per_tile: int = 100
    threshold: float = 0.5
    runs_on: str = "stand-in"
    color: Literal["raw", "srgb"] = "raw"

    def at(self, slide_mpp: float, *, allow_coarse: bool = False) -> Detector:
        """Return itself."""
        return self

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[ss.Detections]:
        """Wait until it has done what it had, and these."""
        global _free_at
        seconds = len(tiles) * self.core_px**2 / 1e6 / self.mp_s
        with _gpu:
            now = time.perf_counter()
            done_at = _free_at = max(_free_at, now) + seconds
            _busy_s.append(seconds)
        time.sleep(done_at - now)
        return [ss.Detections.empty()] * len(tiles)


def bench_overlap(smoke: bool) -> str:
    """Return a table: models of a half, one and two times the rate of reading."""
    lines = [f"overlap: {os.cpu_count()} cores, a stand-in for the GPU; medians"]
    lines += ["| model, times as fast as reading | scan, share of the slower | model busy |", "|---|---|---|"]
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slide.svs"
        assemble(path, 1200 if smoke else 24_000)

        def scan(mp_s: float) -> tuple[float, float, float]:
            """Return megapixels a second of the scan and of the model, and the share of the time it was busy."""
            _busy_s.clear()
            config = ss.ScanConfig.load({}, _SETTINGS)
            profile = ss.scan(ss.open_slide(path, mpp=0.5), Waiting(mp_s), config=config).provenance["profile"]
            mp, wall_s = profile["megapixels"], profile["wall_s"]
            return mp / wall_s, mp / sum(_busy_s), sum(_busy_s) / wall_s

        factors = _FACTORS[:1] if smoke else _FACTORS
        told: dict[float, list[tuple[float, float]]] = {factor: [] for factor in factors}
        for _ in range(1 if smoke else 5):
            reading = scan(_INSTANTLY)[0]  # in every round: other work on the machine slows both
            for factor in factors:
                rate, model, busy = scan(factor * reading)
                told[factor].append((rate / min(reading, model), busy))
        for factor, rounds in told.items():
            share, busy = (statistics.median(column) for column in zip(*rounds, strict=True))
            lines.append(f"| {factor:g} | {share:.2f} | {busy:.2f} |")
    return "\n".join(lines)
