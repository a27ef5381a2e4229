"""Tiles of a whole slide for a viewer: level by level, each half of the next, down to level-0 px."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slidescan.geometry import Frame
from slidescan.slides import Slide

__all__ = ["TILE_PX", "Tiling", "as_jpeg"]

TILE_PX = 512  # edge of a tile: a screen is a dozen of them, and one is read in some ms
_MOST_READ_PX = 64_000_000  # stored px behind a tile: 192 MB of RGB at most, where a slide has no smaller level
_QUALITY = 90  # JPEG: nuclear texture survives, a tile takes about 80 kB


@dataclass(frozen=True, slots=True)
class Tiling:
    """Which tiles there are; level `most` is level 0 of the slide, each one below has half its resolution.

    Examples
    --------
    >>> Tiling(Frame((3000, 1000), 0.25), least=0).tiles_wh(11)
    (3, 1)
    """

    frame: Frame
    least: int
    """The coarsest level, below which a tile would read too much of a slide without small levels."""

    @property
    def most(self) -> int:
        """The finest level."""
        return max(0, math.ceil(math.log2(max(self.frame.size_wh))))

    def plane(self, level: int) -> Frame:
        """Return the plane of a level."""
        return self.frame.at(self.frame.mpp * 2 ** (self.most - level))

    def tiles_wh(self, level: int) -> tuple[int, int]:
        """Return how many tiles a level has across and down."""
        width, height = self.plane(level).size_wh
        return -(-width // TILE_PX), -(-height // TILE_PX)

    def read(self, slide: Slide, level: int, x: int, y: int) -> NDArray[np.uint8]:
        """Return a tile; at the right and lower edge it is smaller."""
        plane = self.plane(level)
        width, height = plane.size_wh
        left, top = x * TILE_PX, y * TILE_PX
        return slide.read(left, top, min(TILE_PX, width - left), min(TILE_PX, height - top), plane).rgb

    @classmethod
    def of(cls, slide: Slide) -> Tiling:
        """Return the tiling of a slide."""
        whole = cls(slide.frame, 0)
        least = whole.most
        while least > 0 and _read_px(slide, 2 ** (whole.most - least + 1)) <= _MOST_READ_PX:
            least -= 1
        return cls(slide.frame, least)


def _read_px(slide: Slide, shrink: int) -> float:
    """Return how many stored px are behind a tile that is so many times coarser than level 0."""
    stored = max(level.downsample for level in slide.levels if level.downsample <= max(1, shrink))
    width, height = (min(TILE_PX * shrink, side_px) / stored for side_px in slide.size_wh)
    return width * height


def as_jpeg(rgb: NDArray[np.uint8]) -> bytes:
    """Pack pixels; colours at full resolution, since a figure is a few px of another hue."""
    file = io.BytesIO()
    Image.fromarray(rgb).save(file, "JPEG", quality=_QUALITY, subsampling=0)
    return file.getvalue()
