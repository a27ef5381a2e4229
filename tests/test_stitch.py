"""Ownership and seams: every object exactly once, whatever the grid and the order."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slidescan.detections import Detections, distinct, iou_pairs
from slidescan.geometry import Box, Frame
from slidescan.plan import plan
from slidescan.stitch import owned, stitch

SLACK = 4.0
JITTER = 1.5  # px of the centre between two tiles; less than the slack


def scattered(rng: np.random.Generator, n: int, size: int, apart: float) -> np.ndarray:
    """Return up to `n` centres at least `apart` px from each other."""
    points: list[np.ndarray] = []
    for candidate in rng.uniform(0, size, (4 * n, 2)):
        if len(points) < n and all(np.abs(candidate - p).max() >= apart for p in points):
            points.append(candidate)
    return np.array(points).reshape(-1, 2)


def seen_by_tiles(
    rng: np.random.Generator, centers: np.ndarray, size: int, *, tile_px: int, halo_px: int, region_px: int,
    shift_px: tuple[int, int], jitter: float,
) -> tuple[Detections, np.ndarray, np.ndarray]:  # fmt: skip
    """Let each tile report the objects in its window, cut at the window and jittered, and keep what it owns."""
    parts, tiles, cores = [], [], []
    bounds = Box(0, 0, size, size)
    for region in plan(Frame((size, size), 1.0), None, tile_px=tile_px, halo_px=halo_px, region_px=region_px,
                       shift_px=shift_px).regions:  # fmt: skip
        for tile in region.tiles:
            moved = centers + rng.uniform(-jitter, jitter, centers.shape)
            boxes = np.concatenate([moved - 6, moved + 6], 1)
            window = np.array([tile.read.x0, tile.read.y0] * 2), np.array([tile.read.x1, tile.read.y1] * 2)
            boxes = np.clip(boxes, *window)
            visible = (boxes[:, 2:] - boxes[:, :2]).min(1) > 1
            found = Detections.build(boxes[visible], 0.5 + 0.4 * np.arange(len(centers))[visible] / len(centers))
            mine = found[owned(found, tile.core, tile.read, bounds, slack=SLACK)]
            parts.append(mine)
            tiles += [len(cores)] * len(mine)
            cores.append((tile.core.x0, tile.core.y0, tile.core.x1, tile.core.y1))
    return Detections.concat(parts), np.array(tiles, int), np.array(cores, float)


grids = st.fixed_dictionaries(
    {
        "tile_px": st.integers(60, 260),
        "halo_px": st.integers(16, 25),
        "region_px": st.sampled_from([1, 200, 10_000]),
        "shift_px": st.tuples(st.integers(0, 300), st.integers(0, 300)),
    }
)


@settings(max_examples=150)
@given(st.integers(0, 2**32 - 1), st.integers(0, 40), grids)
def test_every_object_exactly_once(seed: int, n: int, grid: dict[str, int]) -> None:
    """With jitter below the slack each object survives once, on any grid."""
    rng = np.random.default_rng(seed)
    centers = scattered(rng, n, 400, apart=14.0)
    found, tile, cores = seen_by_tiles(rng, centers, 400, jitter=JITTER, **grid)
    merged = stitch(found, tile, cores, slack=SLACK, iou=0.3)
    assert len(merged) == len(centers)
    if len(centers):
        nearest = np.abs(merged.centers[:, None] - centers[None]).max(2)
        # An object on the slide's own edge is cut there only by a window, so its centre moves by jitter alone.
        assert (nearest.min(0) <= JITTER + 1e-9).all()


@settings(max_examples=60)
@given(st.integers(0, 2**32 - 1), grids, grids)
def test_without_jitter_the_grid_does_not_matter(seed: int, one: dict[str, int], other: dict[str, int]) -> None:
    """A detector whose boxes do not depend on the tile gives the same set on every grid, to the last bit."""
    rng = np.random.default_rng(seed)
    centers = np.round(scattered(rng, 25, 400, apart=13.0))
    a, b = (
        stitch(*seen_by_tiles(rng, centers, 400, jitter=0.0, **grid), slack=SLACK, iou=0.3) for grid in (one, other)
    )
    np.testing.assert_array_equal(a.xyxy, b.xyxy)
    np.testing.assert_array_equal(a.score, b.score)


@given(st.integers(0, 2**32 - 1))
def test_order_does_not_matter(seed: int) -> None:
    """Shuffled input gives the same table, row for row."""
    rng = np.random.default_rng(seed)
    centers = scattered(rng, 30, 400, apart=13.0)
    grid = {"tile_px": 100, "halo_px": 20, "region_px": 200, "shift_px": (7, 3)}
    found, tile, cores = seen_by_tiles(rng, centers, 400, jitter=JITTER, **grid)
    order = rng.permutation(len(found))
    a = stitch(found, tile, cores, slack=SLACK, iou=0.3)
    b = stitch(found[order], tile[order], cores, slack=SLACK, iou=0.3)
    np.testing.assert_array_equal(a.xyxy, b.xyxy)
    np.testing.assert_array_equal(a.score, b.score)


def test_order_does_not_matter_of_equal_rows() -> None:
    """Two tiles may say the very same, rounded as scores and boxes are; which of them it is matters to a third."""
    boxes = [[92, 40, 112, 60], [92, 40, 112, 60], [93, 40, 113, 60]]
    found = Detections.build(boxes, [0.9, 0.9, 0.8], attributes=[[0.1], [0.7], [0.3]])
    tile, cores = np.array([0, 1, 0]), np.array([[0, 0, 100, 100], [100, 0, 200, 100]], float)
    seen = set()
    for order in permutations(range(3)):
        merged = stitch(found[np.array(order)], tile[list(order)], cores, slack=SLACK, iou=0.3)
        seen.add((tuple(merged.score.tolist()), tuple(merged.attributes.ravel().tolist())))
    assert len(seen) == 1


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 0.8))
def test_equals_the_quadratic_rule(seed: int, iou: float) -> None:
    """The k-d tree finds exactly what comparing all pairs finds."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 200, (60, 2))
    found = Detections.build(np.concatenate([low, low + rng.uniform(4, 30, (60, 2))], 1), rng.integers(1, 9, 60) / 10)
    cores = np.array([[0, 0, 100, 240], [100, 0, 240, 240]], float)
    tile = (found.centers[:, 0] + rng.uniform(-SLACK, SLACK, 60) >= 100).astype(int)
    merged = stitch(found, tile, cores, slack=SLACK, iou=iou)

    order = sorted(range(60), key=lambda i: (-found.score[i], *found.xyxy[i]))
    kept: list[int] = []
    for i in order:

        def at_seam(k: int) -> bool:
            x, y = found.centers[k]
            x0, y0, x1, y1 = cores[tile[k]]
            return bool(min(x - x0, y - y0, x1 - x, y1 - y) < 3 * SLACK)

        beaten = any(
            tile[i] != tile[k] and at_seam(i) and at_seam(k)
            and np.abs(found.centers[i] - found.centers[k]).max() <= 2 * SLACK
            and iou_pairs(found.xyxy[[i]], found.xyxy[[k]])[0] > iou
            for k in kept
        )  # fmt: skip
        if not beaten:
            kept.append(i)
    np.testing.assert_array_equal(found[np.array(kept)].xyxy, merged.xyxy)


def test_neighbours_within_one_tile_are_left_alone() -> None:
    """Crowded objects that one tile saw are never suppressed, however much they overlap."""
    found = Detections.build([[90, 90, 110, 110], [92, 90, 112, 110]], [0.9, 0.8])
    merged = stitch(found, np.array([0, 0]), np.array([[0, 0, 200, 200.0]]), slack=SLACK, iou=0.1)
    assert len(merged) == 2


def test_box_cut_by_the_window_is_dropped_but_not_at_the_slides_edge() -> None:
    """A box that touches the read window inside the slide goes; one that touches the slide's own edge stays."""
    found = Detections.build([[0, 40, 20, 60], [108, 40, 128, 60]], [0.9, 0.9])
    kept = owned(found, Box(0, 0, 124, 124), Box(0, 0, 128, 128), Box(0, 0, 500, 500), slack=SLACK)
    assert kept.tolist() == [True, False]


@pytest.mark.parametrize("n", [0, 1])
def test_few_detections(n: int) -> None:
    """Nothing and one box pass through."""
    found = Detections.build(np.tile([0.0, 0, 5, 5], (n, 1)), np.full(n, 0.5))
    assert len(stitch(found, np.zeros(n, int), np.array([[0, 0, 10, 10.0]]), slack=SLACK, iou=0.3)) == n


@given(seed=st.integers(0, 10_000), n=st.integers(0, 30), iou=st.floats(0.05, 0.95))
def test_distinct_keeps_the_best_of_each_heap(seed: int, n: int, iou: float) -> None:
    """Nothing kept overlaps a better one of its label that was kept; whatever went, did."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, 30, (n, 2))
    order = np.sort(rng.uniform(0, 1, n))[::-1]
    said = Detections.build(np.concatenate((low, low + rng.uniform(5, 20, (n, 2))), 1), order, rng.integers(0, 2, n))
    kept = distinct(said, iou)
    rows = [int(np.flatnonzero((said.xyxy == box).all(1))[0]) for box in kept.xyxy]
    assert rows == sorted(rows)
    for i in range(n):
        above = [k for k in rows if k < i and said.label[k] == said.label[i]]
        hidden = any(iou_pairs(said.xyxy[[k]], said.xyxy[[i]])[0] > iou for k in above)
        assert hidden == (i not in rows)


def test_objects_of_two_classes_in_one_place_both_stay() -> None:
    """A tile that sees but one of them does not overrule the other, which sees both: no grid has a say in that."""
    cores = np.array([[0, 0, 100, 100], [100, 0, 200, 100]], float)
    boxes = [[88, 40, 108, 60], [92, 40, 112, 60], [88, 40, 108, 60]]
    found = Detections.build(boxes, [0.9, 0.8, 0.7], [0, 1, 0])
    kept = stitch(found, np.array([0, 1, 1]), cores, slack=4.0, iou=0.3)
    assert (kept.score.tolist(), kept.label.tolist()) == ([pytest.approx(0.9), pytest.approx(0.8)], [0, 1])
