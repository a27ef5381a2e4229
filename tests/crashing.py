"""A slide with a tile that kills whoever decodes it; run as a program, it scans that slide."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import slidescan as ss
from slidescan.geometry import Box
from slidescan.slides import Slide
from slidescan.slides.memory import MemorySource
from slidescan.slides.open import _Held
from slidescan.slides.resolution import override
from tests.discs import MPP, ORACLE, config, discs, tissue

Place = tuple[int, int]  # level-0 px


class Crashing(MemorySource):
    """Crashes like a decoder where a region holds the deadly px; the thumbnail is read in larger blocks."""

    deadly: Place

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        height, width = out.shape[:2]
        if width < 1200 and 0 <= self.deadly[0] - x < width and 0 <= self.deadly[1] - y < height:
            signal.raise_signal(signal.SIGSEGV)
        return super().read_level(level, x, y, out)


def crashing_slide(deadly: Place) -> tuple[Slide, np.ndarray]:
    """Return the slide of discs with that tile, and the centres of its discs."""
    slide, centers = discs()
    pixels = tissue(slide.size_wh, centers)
    source = Crashing([pixels], override(MPP), name="crashing")
    source.deadly = deadly
    return Slide(Path("crashing"), _Held(source)), centers


if __name__ == "__main__":
    x, y, workers = map(int, sys.argv[2:])
    ss.scan(crashing_slide((x, y))[0], ORACLE, out=sys.argv[1], config=config(), workers=workers)
