"""Regions and tiles."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidescan.errors import ConfigError
from slidescan.geometry import Box, Frame
from slidescan.plan import Grid, plan
from slidescan.region import batches, cut

layout = st.fixed_dictionaries(
    {
        "tile_px": st.integers(40, 90),
        "halo_px": st.integers(0, 19),
        "region_px": st.integers(1, 300),
        "shift_px": st.tuples(st.integers(-500, 500), st.integers(-500, 500)),
    }
)


@given(st.integers(1, 300), st.integers(1, 300), layout)
def test_cores_partition_the_plane(width: int, height: int, settings: dict[str, int]) -> None:
    """Every px of the plane lies in the core of exactly one tile, whatever the grid."""
    owners = np.zeros((height, width), int)
    for region in plan(Frame((width, height), 0.5), None, **settings).regions:
        for tile in region.tiles:
            x0, y0, x1, y1 = tile.core.clip(Box(0, 0, width, height)).round_out()
            owners[y0:y1, x0:x1] += 1
    assert (owners == 1).all()


@given(st.integers(0, 2**32 - 1), st.integers(30, 300), st.integers(30, 300), layout)
def test_every_tissue_pixel_is_scored(seed: int, width: int, height: int, settings: dict[str, int]) -> None:
    """A mask px with tissue is covered by scored cores, and a tile without any is not scored."""
    rng = np.random.default_rng(seed)
    mask = rng.random((11, 17)) < 0.05
    planned = plan(Frame((width, height), 0.5), mask, **settings)
    scored = np.zeros((height, width), bool)
    for region in planned.regions:
        for tile in region.tiles:
            x0, y0, x1, y1 = tile.core.clip(Box(0, 0, width, height)).round_out()
            scored[y0:y1, x0:x1] = True
            rows = slice(int(y0 * 11 / height), int(np.ceil(y1 * 11 / height)))
            columns = slice(int(x0 * 17 / width), int(np.ceil(x1 * 17 / width)))
            assert mask[rows, columns].any()
    y, x = np.mgrid[:height, :width]
    tissue_here = mask[(y * 11 // height), (x * 17 // width)]
    assert (scored | ~tissue_here).all()


@given(layout)
def test_region_read_covers_its_tiles(settings: dict[str, int]) -> None:
    """One read of a region holds the window of each of its tiles, all of one size."""
    for region in plan(Frame((400, 300), 0.5), None, **settings).regions:
        for tile in region.tiles:
            assert tile.read.clip(region.read) == tile.read
            assert (tile.read.width, tile.read.height) == (settings["tile_px"], settings["tile_px"])


@given(st.integers(64, 300), st.integers(0, 60))
def test_quarters_share_the_core_and_keep_the_halo(tile_px: int, halo_px: int) -> None:
    """A split tile's quarters partition its core, stay in its window, and see the full halo."""
    if tile_px <= 2 * halo_px:
        return
    tile = Grid(Frame((1000, 1000), 0.25), tile_px, halo_px).tile(1, 1)
    quarters = tile.quarters(halo_px)
    if quarters:
        assert sum(q.core.area for q in quarters) == tile.core.area
        for quarter in quarters:
            assert quarter.read.clip(tile.read) == quarter.read
            assert quarter.core.grow(halo_px).clip(quarter.read) == quarter.core.grow(halo_px)
            assert quarter.read.width % 32 == 0


@given(st.integers(256, 1200), st.integers(4, 60))
def test_quarters_of_quarters_keep_the_halo(tile_px: int, halo_px: int) -> None:
    """Split twice, every piece still sees the full halo and stays in the first tile's window."""
    tile = Grid(Frame((5000, 5000), 0.25), tile_px, halo_px).tile(1, 1)
    for quarter in tile.quarters(halo_px):
        for sixteenth in quarter.quarters(halo_px):
            wanted = sixteenth.core.grow(halo_px)
            assert wanted.clip(sixteenth.read) == wanted
            assert sixteenth.read.clip(tile.read) == sixteenth.read


def test_no_tissue_means_no_regions() -> None:
    """An empty mask plans nothing."""
    planned = plan(Frame((999, 999), 0.5), np.zeros((9, 9), bool), tile_px=64, halo_px=8, region_px=256)
    assert (planned.n_tiles, planned.regions) == (0, ())


def test_halo_that_leaves_no_core_is_refused() -> None:
    """A halo of half the tile or more is a setting error that says so."""
    with pytest.raises(ConfigError, match="must exceed twice the halo"):
        plan(Frame((999, 999), 0.5), None, tile_px=64, halo_px=32, region_px=256)


class TestBatches:
    """What goes to a detector at once, and how it is cut."""

    @given(
        size_wh=st.tuples(st.integers(1, 900), st.integers(1, 900)),
        size=st.integers(1, 9),
        by_row=st.booleans(),
        gaps=st.integers(0, 2**16),
    )
    def test_every_tile_in_order_and_its_own_pixels(
        self, size_wh: tuple[int, int], size: int, by_row: bool, gaps: int
    ) -> None:
        """Whatever tiles hold tissue: all of them come, once, and a window is what the region has there."""
        whole = plan(Frame(size_wh, 0.25), None, tile_px=128, halo_px=20, region_px=10_000)
        tiles = [tile for i, tile in enumerate(whole.regions[0].tiles) if not gaps >> i & 1]
        x0, y0, x1, y1 = whole.regions[0].read.round_out()
        rgb = np.random.default_rng(0).integers(0, 256, (y1 - y0, x1 - x0, 3), np.uint8)
        came = []
        for batch in batches(tiles, size, by_row=by_row):
            assert 1 <= len(batch) <= size
            assert not by_row or len({tile.row for tile in batch}) == 1
            windows = cut(rgb, batch, x0, y0)
            for tile, window in zip(batch, windows, strict=True):
                left, top, right, bottom = tile.read.translate(-x0, -y0).round_out()
                np.testing.assert_array_equal(window, rgb[top:bottom, left:right])
            came += batch
        assert came == tiles

    def test_a_row_is_not_copied_and_cannot_be_written_to(self) -> None:
        """Tiles overlap: what was written to one would be in its neighbour."""
        region = plan(Frame((400, 300), 0.25), None, tile_px=128, halo_px=20, region_px=10_000).regions[0]
        x0, y0, x1, y1 = region.read.round_out()
        rgb = np.zeros((y1 - y0, x1 - x0, 3), np.uint8)
        row, mixed = region.tiles[:3], (*region.tiles[:3], region.tiles[-1])
        assert np.shares_memory(cut(rgb, row, x0, y0), rgb)
        for tiles in (row, mixed):
            windows = cut(rgb, tiles, x0, y0)
            with pytest.raises(ValueError, match="read-only"):
                windows[0, 0, 0] = 1
