"""The square that holds the most detections."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidescan.geometry import Frame
from slidescan.hotspot import mitotic_hotspot
from tests.test_flagged import FRAME, table


@given(st.integers(0, 2**32 - 1), st.integers(1, 60), st.sampled_from([0.001, 0.01, 0.05]))
def test_hotspot_is_exact(seed: int, n: int, area_mm2: float) -> None:
    """No square of the area holds more centres than the one given, and that one holds what it says."""
    rng = np.random.default_rng(seed)
    frame = Frame((1200, 1000), 0.25)
    centers = rng.integers(0, 1000, (n, 2)).astype(float)
    hotspot = mitotic_hotspot(table(centers, np.ones(n)), frame, threshold=0.5, area_mm2=area_mm2)
    side = np.sqrt(area_mm2) * 1000 / 0.25
    x, y = centers.T
    most = max(int(((x >= a) & (x <= a + side) & (y >= b) & (y <= b + side)).sum()) for a in x for b in y)
    box = hotspot.box_l0
    held = (x >= box.x0 - 1e-6) & (x <= box.x1 + 1e-6) & (y >= box.y0 - 1e-6) & (y <= box.y1 + 1e-6)
    assert (most, most) == (hotspot.count, int(held.sum()))
    assert box.clip(frame.bounds) == box


def test_the_hotspot_of_a_large_slide_takes_little_memory() -> None:
    """60 x 25 mm and a square of a high-power field, of which thousands lie side by side there: still the best one."""
    rng = np.random.default_rng(0)
    frame = Frame((240_000, 100_000), 0.25)
    crowd = rng.normal((200_000, 60_000), 300, (30, 2))
    centers = np.concatenate((rng.uniform((100, 100), (239_900, 99_900), (20_000, 2)), crowd))
    tracemalloc.start()
    hotspot = mitotic_hotspot(table(centers, np.ones(len(centers))), frame, threshold=0.5, area_mm2=0.237)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert hotspot.count >= 30
    assert abs((hotspot.box_l0.x0 + hotspot.box_l0.x1) / 2 - 200_000) < 2000
    assert peak < 400e6


def test_hotspot_of_nothing_is_none() -> None:
    """Without detections at the threshold there is no hotspot."""
    weak = table(np.array([[50.0, 50.0]]), np.array([0.2]))
    assert mitotic_hotspot(weak, FRAME, threshold=0.5, area_mm2=2.0) is None


@pytest.mark.parametrize("order", [1, -1])
def test_a_lattice_has_as_many_everywhere(order: int) -> None:
    """A square of 400 px holds 41 × 41 of points 10 px apart, edges included, wherever it is: none comes near more."""
    points = np.stack(np.meshgrid(np.arange(200), np.arange(150)), -1).reshape(-1, 2)[::order] * 10.0 + 50
    hotspot = mitotic_hotspot(table(points, np.ones(len(points))), FRAME, threshold=0.5, area_mm2=0.01)
    assert (hotspot.count, hotspot.box_l0.x0, hotspot.box_l0.y0) == (41 * 41, 50, 50)


def test_a_square_of_a_few_px() -> None:
    """On a slide of billions of them nothing but the points takes memory."""
    points = np.array([[10.0, 10], [90_000, 80_000], [90_001, 80_001]])
    hotspot = mitotic_hotspot(table(points, np.ones(3)), Frame((200_000, 100_000), 0.25), threshold=0.5, area_mm2=1e-6)
    assert hotspot.count == 2
