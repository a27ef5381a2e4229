"""Plane px from level px: which level, how much to average, and the margin that makes blocks agree.

Hides Pillow's filter. Invariants: corners are pixel edges, so plane px [a, b) is level px [a·ratio, b·ratio), nothing
is shifted by half a px; a block is read with the filter's reach around it, so a px has one value whatever block it is
read in, up to one grey level of rounding; at the slide's edge the filter sees the slide repeated, never white;
memory is bounded by the block asked for, however much finer the level is.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slidescan.geometry import Box
from slidescan.heap import pixels
from slidescan.slides.source import Level

__all__ = ["Block", "Reader", "resample"]

# Pixels (H, W, 3) and the boxes that failed, in px of what was read.
Block = tuple[NDArray[np.uint8], list[Box]]
# Reads level px: level, x0, y0, x1, y1.
Reader = Callable[[int, int, int, int, int], Block]

_FILTER = Image.Resampling.BICUBIC  # keeps nuclei sharp, and weighs the whole footprint when shrinking
_SUPPORT_PX = 2.0  # source px, times the ratio when shrinking: the reach of Pillow's bicubic kernel
_AVERAGE_FROM = 4.0  # ratio from which whole px are averaged first: a wide kernel costs its width, an average does not
_BLOCK_PX = 1 << 24  # px decoded at a time; 50 MB, and four times that inside OpenSlide
_MOST_THREADS = 4  # that read blocks to be averaged, which share the px above: in smaller ones more is decoded twice
_SAME = 1e-9  # relative; a level this close to the wanted scale is not too coarse


def resample(read: Reader, levels: Sequence[Level], scale: float, x0: int, y0: int, x1: int, y1: int) -> Block:
    """Return plane px [x0, x1) × [y0, y1), where a plane px spans `scale` level-0 px.

    The level is the coarsest that is not coarser than the plane, or level 0. Failed boxes are in plane px, grown by the
    filter's reach.
    """
    level = max(i for i, item in enumerate(levels) if i == 0 or item.downsample <= scale * (1 + _SAME))
    ratio = scale / levels[level].downsample
    average = int(ratio / 2) if ratio >= _AVERAGE_FROM else 1
    ratio /= average
    if (x1 - x0) * (y1 - y0) * ratio * ratio > _BLOCK_PX and max(x1 - x0, y1 - y0) > 1:
        return _halves(read, levels, scale, x0, y0, x1, y1)
    width, height = (-(-n // average) for n in levels[level].size_wh)
    margin = _SUPPORT_PX * max(ratio, 1.0) + 1
    left, top = (math.floor(a * ratio - margin) for a in (x0, y0))
    right, bottom = (math.ceil(b * ratio + margin) for b in (x1, y1))
    # Inside the level; one px at least, for the last plane px may begin where the writer dropped an odd px.
    inside = Box(min(max(0, left), width - 1), min(max(0, top), height - 1), min(right, width), min(bottom, height))
    rgb, failed = _averaged(read, levels[level], level, average, *inside.round_out())
    # Every px sees a full kernel, beyond the edge repeated, or its value would depend on the block it is read in.
    rows, columns = (int(inside.y0) - top, bottom - int(inside.y1)), (int(inside.x0) - left, right - int(inside.x1))
    if any(rows + columns):
        rgb = np.pad(rgb, (rows, columns, (0, 0)), mode="edge")
    # Rows, then columns: left alone, Pillow picks the cheaper order, and clips overshoot between the two.
    wide = Image.fromarray(rgb)
    tall = wide.resize((x1 - x0, wide.height), _FILTER, box=(x0 * ratio - left, 0, x1 * ratio - left, wide.height))
    image = tall.resize((x1 - x0, y1 - y0), _FILTER, box=(0, y0 * ratio - top, x1 - x0, y1 * ratio - top))
    reach = _SUPPORT_PX * max(1.0, 1 / ratio)
    return np.asarray(image), [hole.scale(1 / ratio).grow(reach) for hole in failed]


def _halves(read: Reader, levels: Sequence[Level], scale: float, x0: int, y0: int, x1: int, y1: int) -> Block:
    """Resample the block in two parts: what it is made of must never be in memory at once."""
    wide = x1 - x0 > y1 - y0
    if wide:
        middle = (x0 + x1) // 2
        parts = [resample(read, levels, scale, *box) for box in ((x0, y0, middle, y1), (middle, y0, x1, y1))]
    else:
        middle = (y0 + y1) // 2
        parts = [resample(read, levels, scale, *box) for box in ((x0, y0, x1, middle), (x0, middle, x1, y1))]
    return np.concatenate([rgb for rgb, _ in parts], axis=1 if wide else 0), parts[0][1] + parts[1][1]


def _averaged(read: Reader, stored: Level, level: int, factor: int, x0: int, y0: int, x1: int, y1: int) -> Block:
    """Read a level averaged `factor` × `factor`, streamed; x0 … y1 in averaged px."""
    if factor == 1:
        return read(level, x0, y0, x1, y1)
    (width, height), (tile_w, tile_h) = stored.size_wh, stored.tile_wh
    out = pixels(y1 - y0, x1 - x0)
    threads = min(os.cpu_count() or 1, _MOST_THREADS)
    most_px = _BLOCK_PX // threads
    edge = math.isqrt(most_px)
    # A strip is decoded whole, and a large one is kept by no pool.
    wide, tall = (width, max(tile_h, most_px // width)) if tile_w >= width > edge else (edge, edge)
    step_x, step_y = max(1, -(-wide // factor)), max(1, tall // factor)

    def average(corner: tuple[int, int]) -> list[Box]:
        top, left = corner
        bottom, right = min(top + step_y, y1), min(left + step_x, x1)
        rgb, holes = read(level, left * factor, top * factor, min(right * factor, width), min(bottom * factor, height))
        out[top - y0 : bottom - y0, left - x0 : right - x0] = np.asarray(Image.fromarray(rgb).reduce(factor))
        return [hole.scale(1 / factor) for hole in holes]

    with ThreadPoolExecutor(threads) as pool:
        failed = list(pool.map(average, product(range(y0, y1, step_y), range(x0, x1, step_x))))
    return out, [hole for holes in failed for hole in holes]
