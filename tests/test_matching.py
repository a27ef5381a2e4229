"""Detections against truths: matching, counts, thresholds, calibration, agreement of grids, attributes."""

from __future__ import annotations

import itertools

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from slidescan.detections import Detections
from slidescan.slides import memory_slide
from slidescan.testing import OracleDetector, disc_image
from slidescan.train import metrics
from slidescan.train.agreement import grid_shift_agreement
from slidescan.train.evaluate import balanced_accuracy, best_cut

POINTS = hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.just(2)), elements=st.floats(0, 20))


def boxes_at(xy: NDArray[np.float64], score: NDArray[np.float64]) -> Detections:
    """Small boxes centred at `xy`."""
    return Detections.build(np.concatenate((xy - 1, xy + 1), 1), score)


@given(found=POINTS, truth=POINTS, radius=st.floats(0.1, 15))
def test_matching_agrees_with_trying_everything(
    found: NDArray[np.float64], truth: NDArray[np.float64], radius: float
) -> None:
    """As many pairs as any assignment has, and among those the least total distance."""
    pairs = metrics.match(found, truth, radius)
    distance = np.linalg.norm(found[:, None] - truth, axis=-1)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert (distance[pairs[:, 0], pairs[:, 1]] <= radius).all()
    best = (0, 0.0)
    short, long = (distance, len(truth)) if len(found) <= len(truth) else (distance.T, len(found))
    for columns in itertools.permutations(range(long), len(short)):
        reached = [short[i, j] for i, j in enumerate(columns) if short[i, j] <= radius]
        best = min(best, (-len(reached), float(sum(reached))))
    assert len(pairs) == -best[0]
    assert distance[pairs[:, 0], pairs[:, 1]].sum() == pytest.approx(best[1], abs=1e-9)


def test_a_large_group_is_matched_as_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nuclei that touch are one group; only pairs within reach are looked at, and no pair is lost."""
    rng = np.random.default_rng(0)
    truth = np.stack(np.meshgrid(np.arange(20) * 8.0, np.arange(20) * 8.0), -1).reshape(-1, 2)
    found = (truth + rng.normal(0, 2, truth.shape))[rng.random(len(truth)) < 0.9]
    lengths = []
    for dense in (len(truth) * len(found), 0):
        monkeypatch.setattr(metrics, "_DENSE", dense)
        pairs = metrics.match(found, truth, 7.5)
        assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
        lengths.append((len(pairs), np.linalg.norm(found[pairs[:, 0]] - truth[pairs[:, 1]], axis=1).sum()))
    assert lengths[1] == pytest.approx(lengths[0])


@given(found=POINTS, truth=POINTS, data=st.data())
def test_counts_add_up(found: NDArray[np.float64], truth: NDArray[np.float64], data: st.DataObject) -> None:
    """Without a margin every truth is found or missed, every kept detection right or false; F1 follows."""
    score = data.draw(hnp.arrays(np.float64, len(found), elements=st.floats(0, 1)))
    at = metrics.score([metrics.Image(boxes_at(found, score), truth, 5.0, 20)], 0.5)
    kept = int((score.astype(np.float32) >= 0.5).sum())
    assert (at.found + at.missed, at.found + at.false) == (len(truth), kept)
    if at.found:
        assert at.f1 == pytest.approx(2 / (1 / at.precision + 1 / at.recall))


def test_a_border_counts_neither_way() -> None:
    """In the margin, misses and false detections vanish, and a pair across its line is no error."""
    truth = np.array([[2.0, 50.0], [50.0, 50.0], [9.5, 80.0]])
    found = boxes_at(np.array([[50.0, 51.0], [3.0, 10.0], [10.5, 80.0]]), np.ones(3))
    at = metrics.score([metrics.Image(found, truth, 5.0, 100, margin=10.0)], 0.5)
    assert (at.found, at.missed, at.false) == (1, 0, 0)


def test_only_its_own_class_finds_an_object() -> None:
    """A right place with a wrong class is a miss and a false detection; both classes said there, one is false."""
    truth, label = np.array([[10.0, 10.0], [50.0, 50.0]]), np.array([0, 1])
    said = Detections.build([[9, 9, 11, 11], [49, 49, 51, 51], [49, 49, 51, 51]], [0.9, 0.8, 0.7], [0, 0, 1])
    image = metrics.Image(said, truth, 5.0, 100, label=label)
    assert metrics.score([image], 0.5) == metrics.Scores(2, 0, 1)
    assert metrics.score([image], 0.75) == metrics.Scores(1, 1, 1)
    assert metrics.judge([image]).right.tolist() == [True, False, True]
    false, missed = metrics.mistakes([image], 0.75)
    assert [(m.x_px, m.score) for m in false] == [(50.0, pytest.approx(0.8))]
    assert [(m.x_px, m.score) for m in missed] == [(50.0, pytest.approx(0.7))]


def test_what_is_excused_may_be_right_and_is_never_false() -> None:
    """An object in an ignored region is found; what else is said there does not count."""
    found = boxes_at(np.array([[10.0, 10.0], [30.0, 30.0], [70.0, 70.0]]), np.array([0.9, 0.8, 0.7]))
    truth, excused = np.array([[10.0, 10.0]]), np.array([True, True, False])
    image = metrics.Image(found, truth, 5.0, 100, excused=excused)
    assert metrics.score([image], 0.5) == metrics.Scores(1, 0, 1)
    assert metrics.judge([image]).right.tolist() == [True, False]
    assert [m.x_px for m in metrics.mistakes([image], 0.5)[0]] == [70.0]


def test_average_precision_of_known_lists() -> None:
    """Right, wrong, right among three truths: 1/3·1 + 1/3·2/3; perfect is 1 and nothing is 0."""
    truth = np.array([[10.0, 10.0], [50.0, 50.0], [90.0, 90.0]])
    found = boxes_at(np.array([[10.0, 10.0], [30.0, 30.0], [50.0, 50.0]]), np.array([0.9, 0.8, 0.7]))
    assert metrics.average_precision([metrics.Image(found, truth, 5.0, 100)]) == pytest.approx(1 / 3 + 2 / 9)
    perfect = boxes_at(truth, np.ones(3))
    assert metrics.average_precision([metrics.Image(perfect, truth, 5.0, 100)]) == 1.0
    assert metrics.average_precision([metrics.Image(Detections.empty(), truth, 5.0, 100)]) == 0.0


def test_a_second_detection_of_one_truth_is_false() -> None:
    """Two boxes on one figure are one found and one false."""
    found = boxes_at(np.array([[10.0, 10.0], [11.0, 10.0]]), np.array([0.9, 0.8]))
    at = metrics.score([metrics.Image(found, np.array([[10.0, 10.0]]), 5.0, 100)], 0.5)
    assert (at.found, at.false) == (1, 1)


def test_threshold_and_calibration_are_recovered() -> None:
    """Scores too sure by a factor of two and shifted are set right, and the threshold parts right from wrong."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 1.5, (40, 100))
    right = rng.random((40, 100)) < 1 / (1 + np.exp(-logit))
    xy = np.stack((np.arange(100) * 10.0, np.zeros(100)), 1)
    sure = 1 / (1 + np.exp(-2 * (logit + 0.5)))
    images = [metrics.Image(boxes_at(xy, p), xy[hit], 1.0, 1000) for p, hit in zip(sure, right, strict=True)]
    assert metrics.fit_calibration(images) == pytest.approx((2.0, -0.5), abs=0.2)
    clear = metrics.Image(boxes_at(xy, np.where(right[0], 0.7, 0.4)), xy[right[0]], 1.0, 1000)
    assert 0.4 < metrics.best_threshold([clear]) <= 0.7


def test_a_grid_that_does_not_matter_agrees_wholly() -> None:
    """An oracle sees discs wherever the tiles lie; one that shakes its boxes by more than 2 px does not agree."""
    spots = [(x + 0.5, y + 0.5) for x in range(60, 760, 70) for y in range(60, 760, 70)]
    slide = memory_slide(disc_image((800, 800), spots, 5), 1.0)
    steady = grid_shift_agreement(slide, OracleDetector(), shifts=3)
    assert steady.compared > 100
    assert steady.share == 1.0
    shaken = grid_shift_agreement(slide, OracleDetector(jitter_px=6.0), shifts=3)
    assert shaken.share < 0.7
    assert shaken.moved_px > 2


def test_balanced_accuracy_of_a_known_table() -> None:
    """Two of three atypical and one of two typical ones are said right; the one nobody judged is left out."""
    xy = np.arange(6)[:, None] * np.array([10.0, 0.0])
    said = np.array([0.9, 0.8, 0.2, 0.1, 0.7, 0.9])[:, None]
    true = np.array([1, 1, 1, 0, 0, np.nan])[:, None]
    found = Detections.build(np.concatenate((xy - 1, xy + 1), 1), np.ones(6), attributes=said)
    nothing = metrics.Image(Detections.empty(), xy, 2.0, 100, attributes=true)
    images = [metrics.Image(found, xy, 2.0, 100, attributes=true), nothing]
    assert balanced_accuracy(images, 0.5, 0) == (round((2 / 3 + 1 / 2) / 2, 4), 5)
    assert balanced_accuracy([metrics.Image(found, xy[:0], 2.0, 100)], 0.5, 0) is None
    assert balanced_accuracy(images, 0.5, 0, best_cut(images, 0.5, 0)) == (round((2 / 3 + 1) / 2, 4), 5)
