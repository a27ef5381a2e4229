"""Whether the fast TIFF reader and OpenSlide see the same pixels in one file, by a few tiles.

A layout that both open and one misreads would otherwise show only in a worse result. Where they differ OpenSlide is
believed: more files have been through it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from slidescan.slides.openslide import OpenSlideSource
from slidescan.slides.source import Source

__all__ = ["difference"]

_TILES = 12  # of level 0, spread over the slide; 5 ms each
# Grey levels, mean over a tile. Measured 0 on every real slide here; another JPEG library rounds otherwise, and a wrong
# colour model, table or place is off by tens.
_MOST = 0.5


def difference(source: Source, path: Path) -> str | None:
    """Return in words how `source` differs from OpenSlide, None where it does not.

    Raises
    ------
    SlideError
        If OpenSlide cannot open the file.
    """
    other = OpenSlideSource(path)
    ours, theirs = source.facts.levels[0], other.facts.levels[0]
    if ours.size_wh != theirs.size_wh:
        return f"{ours.size_wh} px instead of {theirs.size_wh} px"
    (width, height), (tile_w, tile_h) = ours.size_wh, ours.tile_wh
    edge_w, edge_h = min(tile_w, width, 1024), min(tile_h, height, 1024)
    across = np.linspace(0, width - edge_w, _TILES).astype(int)
    down = np.linspace(0, height - edge_h, _TILES).astype(int)
    # Columns in steps of five (prime to the number of tiles): all over the slide, not along its diagonal.
    for i in range(_TILES):
        x, y = int(across[5 * i % _TILES]), int(down[i])
        pair = [np.empty((edge_h, edge_w, 3), np.uint8) for _ in range(2)]
        if source.read_level(0, x, y, pair[0]) or other.read_level(0, x, y, pair[1]):
            continue  # a tile that cannot be decoded says nothing of how the others are
        off = float(np.abs(pair[0].astype(np.int16) - pair[1]).mean())
        if off > _MOST:
            return f"by {off:.1f} grey levels at ({x}, {y})"
    return None
