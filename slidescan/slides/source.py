"""What a file reader must offer (`Source`), the small types it speaks, and the limits it obeys before decoding.

A source knows levels and nothing else: physical scale, planes, resampling, colour, padding and pooling live once, in
`Slide`. Invariants: level px corners are pixel edges; level px = level-0 px / downsample; no reader decodes a block
that `check_levels` (or its TIFF twin in `ifd`) has not bounded, because a 1 MB file can unpack to gigabytes.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import SlideFormatError
from slidescan.geometry import Box
from slidescan.slides.resolution import Resolution

__all__ = ["Declined", "Facts", "Level", "Pixels", "Source", "check_levels", "composite", "downsample_of", "pyramid"]

MAX_TILE_PX = 1 << 26  # px; 64 MP, 200 MB decoded: 16 times the largest tile scanners write (2048² px)
MAX_SIDE_PX = 1 << 31  # px; coordinates fit 32 bits in every format read here
MAX_LEVEL0_PX = 1 << 40  # px; a thousand times the largest real slide
MAX_LEVELS = 64  # halving 2³¹ px gives 31 levels
MAX_UNTILED_PX = 256_000_000  # px; images stored without tiles are decoded in big pieces, so they must be small
MAX_BLOB_BYTES = 1 << 24  # bytes; 16 MB bounds an ICC profile and a metadata text (largest seen: 4 MB of OME-XML)

# By its name an image beside the slide, of the whole glass and of what is written on it.
ASIDE = re.compile(r"\b(label|macro|thumbnail|overview)\b", re.IGNORECASE)
WHITE = 255  # grey level of glass: what lies outside the slide or cannot be read


class Declined(SlideFormatError):
    """The layout is not known to this reader; another one may. Damage and unsafe sizes are never declined."""


@dataclass(frozen=True, slots=True)
class Level:
    """One resolution of the pyramid.

    Parameters
    ----------
    size_wh : tuple of int
        Width and height, level px.
    downsample : float
        Level-0 px per level px, the same in x and y.
    tile_wh : tuple of int
        Storage tile, level px: reads aligned to it decode nothing twice.
    """

    size_wh: tuple[int, int]
    downsample: float
    tile_wh: tuple[int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """What a read returned.

    Parameters
    ----------
    rgb : ndarray of uint8, shape (H, W, 3)
        White outside the slide and in `holes`.
    holes : tuple of Box
        Parts that could not be decoded, whole px of the plane that was read (not of the array), clipped to the request.
    """

    rgb: NDArray[np.uint8]
    holes: tuple[Box, ...] = ()


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything about a slide but its pixels; two openings of an unchanged file give equal facts."""

    backend: str
    vendor: str | None
    levels: tuple[Level, ...]
    resolution: Resolution
    bounds_l0: Box | None = None
    icc: bytes | None = None
    others: int = 0
    """Further images in the file that may be slides, too, and are not read."""


class Source(Protocol):
    """Reads level pixels; must be safe to call from many threads and release its handles when garbage-collected."""

    @property
    def facts(self) -> Facts:
        """What the file says about itself."""
        ...

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        """Fill `out` (H, W, 3) from (x, y) level px; return what failed, in level px.

        The block lies inside the level. Every px is written, white what failed. Only a file that is gone raises
        `SlideReadError`.
        """
        ...


def check_levels(name: str, levels: tuple[Level, ...]) -> None:
    """Refuse a pyramid whose sizes are unsafe to read or make no sense.

    Raises
    ------
    SlideFormatError
        If a side, the area, the tile or the number of levels is beyond the limits above.
    """
    if not 1 <= len(levels) <= MAX_LEVELS:
        raise SlideFormatError(f"{name}: expected 1 to {MAX_LEVELS} levels, found {len(levels)}; the file is damaged")
    for level in levels:
        width, height = level.size_wh
        if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX and width * height <= MAX_LEVEL0_PX):
            raise SlideFormatError(f"{name}: image size {width} × {height} px is not plausible; the file is damaged")
        tile_w, tile_h = level.tile_wh
        if tile_w <= 0 or tile_h <= 0 or tile_w * tile_h > MAX_TILE_PX:
            raise SlideFormatError(
                f"{name}: tiles must be at most {MAX_TILE_PX} px to be safe to decode, "
                f"found {tile_w} × {tile_h} px; rewrite the file with smaller tiles"
            )


def downsample_of(size0_wh: tuple[int, int], size_wh: tuple[int, int]) -> float:
    """Return how many level-0 px one px of a level spans.

    Writers halve and drop (or complete) the last odd px, so 4443 px become 2221: measured on real pyramids the true
    factor is 2, and the ratio 2.0005 is wrong by a px at the far edge. A power of two, then a whole number, is taken
    when it explains both sizes; otherwise the ratio of the longer side, whose rounding weighs least.

    Examples
    --------
    >>> downsample_of((4443, 3567), (2221, 1783))
    2.0
    >>> downsample_of((3000, 2000), (2000, 1333))
    1.5
    """
    ratio = max(size0_wh) / size_wh[int(size0_wh[1] > size0_wh[0])]
    if ratio >= 1:
        for whole in (2 ** round(math.log2(ratio)), round(ratio)):
            if all(n in (n0 // whole, -(-n0 // whole)) for n0, n in zip(size0_wh, size_wh, strict=True)):
                return float(whole)
    return ratio


def pyramid(sizes_wh: list[tuple[int, int]], tiles_wh: list[tuple[int, int]]) -> tuple[Level, ...]:
    """Return levels for sizes in px, largest first."""
    return tuple(
        Level(size, downsample_of(sizes_wh[0], size), tile) for size, tile in zip(sizes_wh, tiles_wh, strict=True)
    )


def composite(rgba: NDArray[np.uint8], background: tuple[int, int, int] = (WHITE, WHITE, WHITE)) -> NDArray[np.uint8]:
    """Lay straight (not premultiplied) RGBA (H, W, 4) over an opaque colour; transparent never turns black."""
    alpha = rgba[..., 3]
    if alpha.min(initial=255) == 255:
        return np.ascontiguousarray(rgba[..., :3])
    weight = alpha[..., None].astype(np.uint16)
    over = rgba[..., :3] * weight + np.asarray(background, np.uint16) * (255 - weight)
    return ((over + 127) // 255).astype(np.uint8)
