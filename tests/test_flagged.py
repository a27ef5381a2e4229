"""Flagged regions."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull
from scipy.spatial.distance import cdist

from slidescan.detections import Detections
from slidescan.export.features import region_features
from slidescan.flagged import FlaggedRegion, flag_regions
from slidescan.geometry import Frame

FRAME = Frame((40_000, 40_000), 0.25)
SETTINGS = {"threshold": 0.5, "link_um": 100.0, "max_um": 1000.0, "margin_um": 15.0}


def table(centers: np.ndarray, scores: np.ndarray) -> Detections:
    return Detections.build(np.concatenate([centers - 25, centers + 25], 1), scores)


def flag(found: Detections, **changed: float) -> tuple[FlaggedRegion, ...]:
    return flag_regions(found, FRAME, ("mitotic figure",), **(SETTINGS | changed))


@given(st.integers(0, 2**32 - 1), st.integers(0, 60))
def test_every_found_detection_is_in_one_region(seed: int, n: int) -> None:
    """Counts add up, ranks run from 1 by falling evidence, and detections below the threshold do not count."""
    rng = np.random.default_rng(seed)
    found = table(rng.uniform(100, 8000, (n, 2)), rng.random(n))
    regions = flag(found)
    assert sum(r.n for r in regions) == int((found.score >= 0.5).sum())
    assert [r.rank for r in regions] == list(range(1, len(regions) + 1))
    assert all(a.evidence >= b.evidence for a, b in pairwise(regions))


def test_linked_detections_share_a_region_and_distant_ones_do_not() -> None:
    """400 px are 100 µm: 399 px apart is one region, 401 px apart are two."""
    pair = np.array([[1000.0, 1000.0], [1399.0, 1000.0]])
    assert [r.n for r in flag(table(pair, np.array([0.9, 0.9])))] == [2]
    pair[1, 0] = 1401.0
    assert [r.n for r in flag(table(pair, np.array([0.9, 0.9])))] == [1, 1]


def test_two_sure_figures_outrank_three_doubtful_ones() -> None:
    """The ranking follows evidence, not count."""
    sure = np.array([[1000.0, 1000], [1100, 1000]])
    doubtful = np.array([[9000.0, 1000], [9100, 1000], [9200, 1000]])
    regions = flag(table(np.concatenate([sure, doubtful]), np.array([0.95, 0.95, 0.55, 0.55, 0.55])))
    assert [r.n for r in regions] == [2, 3]


def test_a_region_has_the_name_of_the_class_with_most_evidence() -> None:
    """One sure figure outweighs two doubtful imposters, and a tie goes to no class by its place in the list."""
    classes = ("imposter", "figure")
    for scores, labels, name, told in (
        ((0.95, 0.52), (1, 0), "figure", "1: figure ×1 of 2"),
        ((0.95, 0.55, 0.55), (1, 0, 0), "figure", "1: figure ×1 of 3"),
        ((0.7, 0.6, 0.6), (1, 0, 0), "imposter", "1: imposter ×2 of 3"),
        ((0.7, 0.6), (1, 1), "figure", "1: figure ×2"),
    ):
        centers = np.full((len(scores), 2), 1000.0) + 100 * np.arange(len(scores))[:, None]
        boxes = np.concatenate([centers - 25, centers + 25], 1)
        found = Detections.build(boxes, np.array(scores), np.array(labels))
        (region,) = flag_regions(found, FRAME, classes, **SETTINGS)
        assert region.label == name
        assert [each.name for each in region_features([region], run_namespace="")] == [told]


def test_a_long_chain_is_cut() -> None:
    """No region of a chain of detections is wider than max_um between its outer centres."""
    chain = np.stack([np.arange(1000, 30_000, 300.0), np.full(97, 500.0)], 1)
    regions = flag(table(chain, np.full(97, 0.9)))
    assert sum(r.n for r in regions) == 97
    margin_px = 2 * (15 / 0.25 + 25)
    assert max(r.box_l0.width for r in regions) <= 4000 + margin_px


def test_area_is_in_mm2_and_outline_stays_on_the_slide() -> None:
    """A lone figure in the corner: 50 px box plus 60 px margin, clipped at the slide's corner."""
    region = flag(table(np.array([[25.0, 25.0]]), np.array([0.8])))[0]
    assert abs(region.area_mm2 - (110 * 0.25e-3) ** 2) < 1e-12
    assert region.polygon_l0.min() == 0


@given(st.integers(0, 2**32 - 1), st.integers(1, 300), st.floats(5, 2000), st.booleans())
def test_clusters_are_those_of_all_pairs(seed: int, n: int, width: float, on_a_grid: bool) -> None:
    """From sparse to so crowded that nobody lists all pairs; on a grid many are exactly 20 px apart."""
    rng = np.random.default_rng(seed)
    centers = 100 + (10 * rng.integers(0, 1 + width // 10, (n, 2)) if on_a_grid else rng.uniform(0, width, (n, 2)))
    found = table(centers.astype(float), np.full(n, 0.9))
    regions = flag(found, link_um=20 * FRAME.mpp, max_um=1e9)
    apart = cdist(found.centers, found.centers)
    _, cluster = connected_components(csr_array(apart <= 20), directed=False)
    assert sorted(r.n for r in regions) == sorted(np.bincount(cluster))


def test_links_are_transitive_whatever_the_order() -> None:
    """Shuffled detections give the same regions."""
    rng = np.random.default_rng(3)
    centers = rng.uniform(0, 4000, (80, 2))
    assert cdist(centers, centers).size
    scores = rng.uniform(0.5, 1, 80)
    order = rng.permutation(80)
    a, b = flag(table(centers, scores)), flag(table(centers[order], scores[order]))
    assert [(r.n, r.evidence, r.box_l0) for r in a] == [(r.n, r.evidence, r.box_l0) for r in b]


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 5.0, 15.0]), st.booleans())
def test_of_one_detection_the_outline_is_its_hull(seed: int, margin_um: float, whole: bool) -> None:
    """The corners of the box with its margin, in qhull's order."""
    rng = np.random.default_rng(seed)
    centers, sides = rng.uniform(0, 40_000, (8, 2)), rng.uniform(1, 120, (8, 2))
    xyxy = np.clip(np.concatenate([centers - sides, centers + sides], 1), 0, 40_000)
    found = Detections.build(xyxy.round() if whole else xyxy, np.full(8, 0.9))
    for region in flag(found, link_um=0.01, margin_um=margin_um):
        assert region.n == 1
        hull = ConvexHull(region.polygon_l0)
        assert hull.vertices.tolist() == [0, 1, 2, 3]
        assert region.area_mm2 == pytest.approx(hull.volume * FRAME.mm2_per_px, rel=1e-12)
    margin_px = margin_um / 0.25
    grown = np.clip(found.xyxy + margin_px * np.array([-1, -1, 1, 1]), 0, 40_000)
    outlines = sorted(
        tuple(region.polygon_l0[[0, 2]].ravel()) for region in flag(found, link_um=0.01, margin_um=margin_um)
    )
    assert outlines == sorted(map(tuple, grown.tolist()))
