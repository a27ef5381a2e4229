"""Rectangles and physical scale: the only place where pixels, levels and µm are converted.

Invariants: a `Box` is half-open and its corners are pixel *edges*, so the box of the pixel in column 3 is [3, 4)
and a conversion between two resolutions is one multiplication with no half-pixel terms. The frame of a number is in
the name of the variable: ``_l0`` level-0 px, ``_m`` px of the plane the model reads, ``_um``, ``_mpp`` µm per px.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Box", "Frame"]


@dataclass(frozen=True, slots=True, order=True)
class Box:
    """A half-open axis-aligned rectangle, in px of the frame its variable's name says.

    Examples
    --------
    >>> Box(0, 0, 4, 2).grow(1)
    Box(x0=-1, y0=-1, x1=5, y1=3)
    """

    x0: float
    y0: float
    x1: float
    y1: float

    @property
    def width(self) -> float:
        """Extent in x, px."""
        return self.x1 - self.x0

    @property
    def height(self) -> float:
        """Extent in y, px."""
        return self.y1 - self.y0

    @property
    def area(self) -> float:
        """Area in px²; 0 for an empty box."""
        return max(0.0, self.width) * max(0.0, self.height)

    @property
    def is_empty(self) -> bool:
        """Whether the box holds no area."""
        return self.x1 <= self.x0 or self.y1 <= self.y0

    def grow(self, margin: float) -> Box:
        """Return the box with every side moved outwards by `margin` px."""
        return Box(self.x0 - margin, self.y0 - margin, self.x1 + margin, self.y1 + margin)

    def translate(self, dx: float, dy: float) -> Box:
        """Return the box moved by (`dx`, `dy`) px."""
        return Box(self.x0 + dx, self.y0 + dy, self.x1 + dx, self.y1 + dy)

    def scale(self, factor: float) -> Box:
        """Return the box in a frame with `factor` times as many px per unit length."""
        return Box(self.x0 * factor, self.y0 * factor, self.x1 * factor, self.y1 * factor)

    def clip(self, other: Box) -> Box:
        """Return the part inside `other`; empty (zero extent) where they do not meet."""
        x0, y0 = max(self.x0, other.x0), max(self.y0, other.y0)
        return Box(x0, y0, max(x0, min(self.x1, other.x1)), max(y0, min(self.y1, other.y1)))

    def intersects(self, other: Box) -> bool:
        """Return whether the two boxes share area."""
        return self.x0 < other.x1 and other.x0 < self.x1 and self.y0 < other.y1 and other.y0 < self.y1

    def round_out(self) -> tuple[int, int, int, int]:
        """Return the smallest whole-pixel box (x0, y0, x1, y1) that covers this one."""
        return math.floor(self.x0), math.floor(self.y0), math.ceil(self.x1), math.ceil(self.y1)


@dataclass(frozen=True, slots=True)
class Frame:
    """A pixel plane with its physical scale; owns every conversion and rounding rule.

    Parameters
    ----------
    size_wh : tuple of int
        Width and height in px.
    mpp : float
        µm per px, the same in x and y.

    Examples
    --------
    >>> level0 = Frame((4000, 2000), 0.25)
    >>> level0.at(0.5)
    Frame(size_wh=(2000, 1000), mpp=0.5)
    >>> level0.px(10.0)
    40.0
    """

    size_wh: tuple[int, int]
    mpp: float

    @property
    def bounds(self) -> Box:
        """The whole plane."""
        return Box(0, 0, *self.size_wh)

    @property
    def area_mm2(self) -> float:
        """Physical area of the plane in mm²."""
        return self.size_wh[0] * self.size_wh[1] * self.mm2_per_px

    @property
    def mm2_per_px(self) -> float:
        """Physical area of one px in mm²."""
        return self.mpp * self.mpp * 1e-6

    def px(self, um: float) -> float:
        """Convert a length in µm to px of this plane."""
        return um / self.mpp

    def um(self, px: float) -> float:
        """Convert a length in px of this plane to µm."""
        return px * self.mpp

    def factor_to(self, other: Frame) -> float:
        """Return px of `other` per px of this plane: multiply coordinates by it to change frames."""
        return self.mpp / other.mpp

    def at(self, mpp: float) -> Frame:
        """Return the same extent at another resolution; a partial last px counts whole."""
        # 1e-6 px: a size that is whole up to float round-off must not gain a pixel.
        width, height = (math.ceil(n * self.mpp / mpp - 1e-6) for n in self.size_wh)
        return Frame((max(1, width), max(1, height)), mpp)
