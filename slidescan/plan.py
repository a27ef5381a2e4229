"""Regions and tiles: which pixels are read together, scored together, and who owns what.

Everything is in px of the *plane* the model reads (``_m``). Tile cores are one uniform grid that partitions the
plane; a tile reads its core plus a halo on every side, beyond the slide's edge too (white there), so all tiles have
one size and the slide's edge is no special case. A region is a block of cores and the unit of reading, committing
and retrying.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError
from slidescan.geometry import Box, Frame

_STRIP_REGIONS = 2  # side by side, before the next row: their common tiles are still in memory (`slides.pool`)

__all__ = ["Grid", "Plan", "Region", "Tile", "plan", "touched_cores"]


@dataclass(frozen=True, slots=True)
class Tile:
    """One model input: the `core` it owns and the `read` window it sees, plane px."""

    column: int
    row: int
    core: Box
    read: Box

    def quarters(self, halo_px: int) -> tuple[Tile, ...]:
        """Return four tiles that share this one's core, or none where they would be no smaller.

        Each keeps the full halo; its window is a multiple of 32 px, the coarsest stride of
        DETR-type models.
        """
        middle_x, middle_y = (self.core.x0 + self.core.x1) // 2, (self.core.y0 + self.core.y1) // 2
        larger_core = max(self.core.x1 - middle_x, self.core.y1 - middle_y)
        edge = math.ceil((larger_core + 2 * halo_px) / 32) * 32
        if edge >= self.read.width or middle_x == self.core.x0 or middle_y == self.core.y0:
            return ()
        # A window starts a halo before its core, or ends where this tile's window ends: either way it sees a full halo
        # on both sides, so that quarters can be quartered again.
        spans_x = tuple(
            (x0, x1, min(x0 - halo_px, self.read.x1 - edge))
            for x0, x1 in ((self.core.x0, middle_x), (middle_x, self.core.x1))
        )
        spans_y = tuple(
            (y0, y1, min(y0 - halo_px, self.read.y1 - edge))
            for y0, y1 in ((self.core.y0, middle_y), (middle_y, self.core.y1))
        )
        return tuple(
            Tile(self.column, self.row, Box(x0, y0, x1, y1), Box(left, top, left + edge, top + edge))
            for y0, y1, top in spans_y
            for x0, x1, left in spans_x
        )


@dataclass(frozen=True, slots=True)
class Region:
    """A block of tiles that one task reads at once, scores and commits; `read` covers all its tiles, plane px."""

    row: int
    column: int
    tiles: tuple[Tile, ...]
    read: Box

    @property
    def name(self) -> str:
        """File name stem of the region's committed part."""
        return f"r{self.row:05d}_c{self.column:05d}"


@dataclass(frozen=True, slots=True)
class Grid:
    """A uniform grid of tile cores over a plane, shifted by `shift_px` (x, y)."""

    plane: Frame
    tile_px: int
    halo_px: int
    shift_px: tuple[int, int] = (0, 0)

    @property
    def core_px(self) -> int:
        """Edge of a core: the stride of the grid."""
        return self.tile_px - 2 * self.halo_px

    @property
    def origin(self) -> tuple[int, int]:
        """Plane px of the corner of the first core, at or before the plane's own corner."""
        return -(self.shift_px[0] % self.core_px), -(self.shift_px[1] % self.core_px)

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of cores needed to cover the plane."""
        (ox, oy), (width, height) = self.origin, self.plane.size_wh
        return math.ceil((height - oy) / self.core_px), math.ceil((width - ox) / self.core_px)

    def n_touched(self, parts: Iterable[Box]) -> int:
        """Return of how many tiles these are parts, or all, of the core."""
        (ox, oy), core = self.origin, self.core_px
        return len({((part.x0 - ox) // core, (part.y0 - oy) // core) for part in parts})

    def tile(self, row: int, column: int) -> Tile:
        """Return the tile at a place of the grid."""
        x, y = self.origin[0] + column * self.core_px, self.origin[1] + row * self.core_px
        core = Box(x, y, x + self.core_px, y + self.core_px)
        return Tile(column, row, core, core.grow(self.halo_px))


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """What a scan will do: the grid, which of its tiles hold tissue, and the regions they form."""

    grid: Grid
    has_tissue: NDArray[np.bool_]
    regions: tuple[Region, ...]

    @property
    def n_tiles(self) -> int:
        """Tiles to score."""
        return int(self.has_tissue.sum())

    @property
    def core_megapixels(self) -> float:
        """Megapixels of the model's plane that will be scored, halos not counted."""
        return self.n_tiles * self.grid.core_px**2 / 1e6


def plan(
    plane: Frame,
    tissue: NDArray[np.bool_] | None,
    *,
    tile_px: int,
    halo_px: int,
    region_px: int,
    shift_px: tuple[int, int] = (0, 0),
) -> Plan:
    """Lay the tile grid over a plane and group the tiles that hold tissue into regions.

    A tile is scored when any tissue px touches its core, so every tissue px is in the core of exactly one scored tile.

    Parameters
    ----------
    plane : Frame
        The plane the model reads.
    tissue : ndarray of bool, shape (H, W), or None
        Mask stretched over the whole plane; None scores every tile.
    tile_px, halo_px : int
        Edge of a tile and the margin on each side that it only sees, plane px.
    region_px : int
        Longest edge of a region's cores, plane px; rounded down to whole cores, at least one.
    shift_px : tuple of int
        Shift of the grid (x, y), plane px.

    Raises
    ------
    ConfigError
        If the halo leaves no core.

    Examples
    --------
    >>> p = plan(Frame((4000, 3000), 0.25), None, tile_px=1024, halo_px=62, region_px=2000)
    >>> p.n_tiles, len(p.regions), p.grid.core_px
    (20, 6, 900)
    """
    grid = Grid(plane, tile_px, halo_px, shift_px)
    if grid.core_px < 1:
        raise ConfigError(
            f"tiling.tile_px must exceed twice the halo ({2 * halo_px} px) so that a core is left, got {tile_px}"
        )
    rows, columns = grid.shape
    has_tissue = np.ones((rows, columns), bool) if tissue is None else touched_cores(grid, tissue)
    per_region = max(1, region_px // grid.core_px)
    regions = []
    for region_row, region_column in _in_strips(math.ceil(rows / per_region), math.ceil(columns / per_region)):
        top, left = region_row * per_region, region_column * per_region
        places = np.argwhere(has_tissue[top : top + per_region, left : left + per_region])
        if len(places):
            tiles = tuple(grid.tile(top + int(r), left + int(c)) for r, c in places)
            regions.append(Region(region_row, region_column, tiles, _cover(tiles)))
    return Plan(grid, has_tissue, tuple(regions))


def _in_strips(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """Yield all places row by row within strips of columns: a region comes soon after the one above it.

    >>> list(_in_strips(2, 5))[:6]
    [(0, 0), (0, 1), (1, 0), (1, 1), (0, 2), (0, 3)]
    """
    for left in range(0, columns, _STRIP_REGIONS):
        yield from product(range(rows), range(left, min(left + _STRIP_REGIONS, columns)))


def _cover(tiles: tuple[Tile, ...]) -> Box:
    """Return the smallest box over the read windows of all tiles."""
    reads = [t.read for t in tiles]
    return Box(min(b.x0 for b in reads), min(b.y0 for b in reads), max(b.x1 for b in reads), max(b.y1 for b in reads))


def touched_cores(grid: Grid, tissue: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return, for every core of the grid, whether a true px of a mask stretched over the plane touches it."""
    touched = tissue
    for axis in (0, 1):
        first = grid.origin[1 - axis] + grid.core_px * np.arange(grid.shape[axis])
        plane_px, mask_px = grid.plane.size_wh[1 - axis], tissue.shape[axis]
        edges = np.clip(np.stack((first, first + grid.core_px)), 0, plane_px) * (mask_px / plane_px)
        low, high = np.floor(edges[0]).astype(np.intp), np.minimum(np.ceil(edges[1]).astype(np.intp), mask_px)
        # Cores share the mask px on their common edge, so ranges overlap: every second one is a core.
        # A false row more than there is: the last range may end there.
        padded = np.pad(touched, [(0, int(axis == a)) for a in (0, 1)])
        touched = np.logical_or.reduceat(padded, np.stack((low, high), 1).ravel(), axis=axis)
        touched = np.compress([True, False] * len(low), touched, axis=axis)
        touched &= np.expand_dims(high > low, 1 - axis)
    return touched
