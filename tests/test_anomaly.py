"""The anomaly map."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidescan.anomaly import AnomalyMap, Coverage, anomaly_map, coverage_map
from slidescan.detections import Detections
from slidescan.export.stored import read_map, write_map
from slidescan.geometry import Box, Frame
from slidescan.plan import Grid

SLIDE = Frame((3200, 2000), 0.25)
MAP = SLIDE.at(16.0)


def whole(frame: Frame) -> np.ndarray:
    return np.full(frame.size_wh[::-1], Coverage.ANALYSED, np.uint8)


@given(st.integers(0, 2**32 - 1), st.integers(0, 30))
def test_score_is_the_highest_box_over_each_pixel(seed: int, n: int) -> None:
    """Each map px holds the highest score of the boxes that touch it, large or small, and 0 where none does."""
    rng = np.random.default_rng(seed)
    low = rng.uniform(0, [3150, 1950], (n, 2))
    sides = rng.uniform(1, 200, (n, 2)) * rng.choice([1, 1, 1, 20], (n, 1))
    found = Detections.build(np.concatenate([low, low + sides], 1), rng.random(n))
    anomaly = anomaly_map(found, SLIDE, whole(MAP), MAP, threshold=0.5, density_sigma_um=50)
    expected = np.zeros(anomaly.score.shape, np.float32)
    for (x0, y0, x1, y1), score in zip(found.xyxy / 64, found.score, strict=True):
        rows = slice(int(y0), int(np.ceil(y1)))
        columns = slice(int(x0), int(np.ceil(x1)))
        expected[rows, columns] = np.maximum(expected[rows, columns], score)
    np.testing.assert_array_equal(expected, anomaly.score)


def test_density_has_its_unit() -> None:
    """Figures on a regular lattice have their true number per mm², at the slide's border too."""
    x, y = np.meshgrid(np.arange(50, 3200, 100), np.arange(50, 2000, 100))
    centers = np.stack([x.ravel(), y.ravel()], 1)
    found = Detections.build(np.concatenate([centers - 5, centers + 5], 1), np.ones(len(centers)))
    anomaly = anomaly_map(found, SLIDE, whole(MAP), MAP, threshold=0.5, density_sigma_um=100)
    per_mm2 = 1 / (0.025**2)
    assert np.abs(anomaly.density / per_mm2 - 1).max() < 0.1


def test_a_speck_on_glass_is_not_the_densest_place() -> None:
    """What is found far from tissue has next to no analysed area around it."""
    coverage = np.full(MAP.size_wh[::-1], Coverage.BACKGROUND, np.uint8)
    coverage[:, :12] = Coverage.ANALYSED
    y = np.arange(40, 2000, 80)
    centers = np.concatenate(
        [np.stack([np.full(len(y), x), y], 1) for x in (200, 400, 600)] + [np.array([[3000, 1000]])]
    )
    found = Detections.build(np.concatenate([centers - 5, centers + 5], 1), np.ones(len(centers)))
    density = anomaly_map(found, SLIDE, coverage, MAP, threshold=0.5, density_sigma_um=50).density
    assert np.nanmax(density[:, 12:]) < np.nanmax(density[:, :12])


def test_what_was_not_analysed_has_no_score() -> None:
    """Background, failed and outside px are NaN even under a box; 'nothing found' is 0."""
    coverage = whole(MAP)
    coverage[:5], coverage[5:8] = Coverage.BACKGROUND, Coverage.READ_FAILED
    found = Detections.build([[0, 0, 3200, 2000]], [0.9])
    anomaly = anomaly_map(found, SLIDE, coverage, MAP, threshold=0.5, density_sigma_um=100)
    assert np.isnan(anomaly.score[:8]).all()
    assert np.isnan(anomaly.density[:8]).all()
    assert (anomaly.score[8:] == np.float32(0.9)).all()
    total = coverage.size - 5 * coverage.shape[1]
    assert anomaly.analysed_fraction == pytest.approx((total - 3 * coverage.shape[1]) / total)


def test_coverage_knows_tiles_holes_and_saturation() -> None:
    """Scored cores are analysed, the rest background; holes and full tiles show where tissue was."""
    grid = Grid(SLIDE, 1024, 12)
    has_tissue = np.zeros(grid.shape, bool)
    has_tissue[0, 1] = True
    failed, full = [Box(990, 100, 1100, 200)], [Box(1500, 500, 1600, 600)]
    coverage = coverage_map(MAP, grid, has_tissue, failed, full)
    assert coverage[10, 10] == Coverage.BACKGROUND
    assert coverage[2, 15] == Coverage.BACKGROUND
    assert coverage[2, 16] == Coverage.READ_FAILED
    assert coverage[8, 24] == Coverage.SATURATED
    assert coverage[12, 20] == Coverage.ANALYSED
    assert coverage[12, 31] == Coverage.BACKGROUND


@pytest.mark.parametrize(("highest", "steps"), [(0, 10), (6553, 10), (6554, 1), (60_000, 1), (500_000, 0.1)])
def test_no_density_is_too_high_to_be_stored(highest: float, steps: float, tmp_path: Path) -> None:
    """Nuclei are 15,000 per mm²: stored in larger steps, which the file names."""
    score = np.zeros((20, 30), np.float32)
    density = np.full((20, 30), highest, np.float32)
    density[3, 4] = highest / 2
    frame = Frame((30, 20), 16.0)
    write_map(tmp_path / "map", AnomalyMap(frame, score, density, whole(frame)), frame)
    back = read_map(tmp_path / "map", frame)
    np.testing.assert_allclose(back.density, density, atol=0.501 / steps)
    assert f"(value - 1) / {steps:g}; 0 not evaluated" in (tmp_path / "map/zarr.json").read_text()


@given(st.integers(0, 2**32 - 1))
def test_encode_round_trip(seed: int) -> None:
    """Stored values come back to within half a step, and 'not evaluated' stays apart from 0."""
    rng = np.random.default_rng(seed)
    coverage = rng.integers(0, 5, (20, 30)).astype(np.uint8)
    score = np.where(coverage >= Coverage.ANALYSED, rng.random((20, 30)), np.nan).astype(np.float32)
    score[coverage == Coverage.READ_FAILED] = np.nan
    density = np.where(np.isnan(score), np.nan, rng.random((20, 30)) * 500).astype(np.float32)
    frame = Frame((30, 20), 16.0)
    back = AnomalyMap.decode(AnomalyMap(frame, score, density, coverage).encode(), frame)
    np.testing.assert_allclose(back.score, score, atol=5.1e-5)
    np.testing.assert_allclose(back.density, density, atol=0.0501)
    np.testing.assert_array_equal(coverage, back.coverage)


@given(st.integers(1, 700), st.integers(1, 700))
def test_pyramid_loses_no_peak(height: int, width: int) -> None:
    """One hot px is still there, at full value, on the smallest level, and each level has half the px rounded up."""
    planes = np.ones((3, height, width), np.uint16)
    planes[0, height // 2, width // 3] = 9999
    levels = AnomalyMap.pyramid(planes, smallest_px=64)
    for above, below in pairwise(levels):
        assert below.shape[1:] == tuple(-(-n // 2) for n in above.shape[1:])
    assert max(levels[-1].shape[1:]) <= 64
    assert levels[-1][0].max() == 9999


@pytest.mark.parametrize("um_per_px", [3.0, 16.0, 40.0])
@pytest.mark.parametrize("edge_px", [2000, 2003, 2040])
def test_the_area_of_tissue_is_that_of_its_mask(um_per_px: float, edge_px: int) -> None:
    """Whatever the map's px, also where the last of them reach beyond the slide."""
    frame = Frame((edge_px, edge_px), 0.5)
    y, x = np.mgrid[:250, :250] / 250 - 0.5
    for mask in (np.hypot(x, y) < 0.4, np.ones((250, 250), bool)):
        grid, at = Grid(frame, tile_px=512, halo_px=0), frame.at(um_per_px)
        seen = coverage_map(at, grid, np.ones((4, 4), bool), [], [], mask)
        anomaly = anomaly_map(Detections.empty(), frame, seen, at, threshold=0.5, density_sigma_um=200)
        assert anomaly.tissue_mm2 == pytest.approx(mask.mean() * frame.area_mm2, rel=um_per_px / 1000)


@pytest.mark.parametrize("size_wh", [(1400, 500), (500, 1400), (100, 100)])
def test_a_slide_narrower_than_half_a_px_has_tissue(size_wh: tuple[int, int]) -> None:
    """Its middle tells: what was looked at is not told as nothing."""
    frame = Frame(size_wh, 0.25)
    grid, at = Grid(frame, tile_px=512, halo_px=0), frame.at(256.0)
    every = np.ones(grid.shape, bool)
    assert (coverage_map(at, grid, every, [], [], np.ones((50, 50), bool)) == Coverage.ANALYSED).any()
    assert (coverage_map(at, grid, every, [], [], np.zeros((50, 50), bool)) == Coverage.BACKGROUND).all()
