"""Slides that kill whoever decodes a tile of them, or their thumbnail; run as a program, it scans such a slide."""

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
    """Crashes like a decoder where a region, or the thumbnail, holds the deadly px."""

    deadly: Place
    whole: bool

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        height, width = out.shape[:2]
        # The thumbnail is read in larger blocks.
        if (width >= 1200) == self.whole and 0 <= self.deadly[0] - x < width and 0 <= self.deadly[1] - y < height:
            signal.raise_signal(signal.SIGSEGV)
        return super().read_level(level, x, y, out)


def crashing_slide(deadly: Place, *, whole: bool = False) -> tuple[Slide, np.ndarray]:
    """Return the slide of discs with that tile (or thumbnail, `whole`), and the centres of its discs."""
    slide, centers = discs()
    pixels = tissue(slide.size_wh, centers)
    source = Crashing([pixels], override(MPP), name="crashing")
    source.deadly, source.whole = deadly, whole
    return Slide(Path("crashing"), _Held(source)), centers


if __name__ == "__main__":
    x, y, workers, whole = map(int, sys.argv[2:])
    ss.scan(crashing_slide((x, y), whole=bool(whole))[0], ORACLE, out=sys.argv[1], config=config(), workers=workers)
