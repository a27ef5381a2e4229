"""Curves, calibration error, bootstrap intervals, summaries."""

from __future__ import annotations

import json
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray

from slidescan.detections import Detections
from slidescan.train import metrics
from slidescan.train.intervals import Interval, intervals, summary
from slidescan.train.metrics import Image
from tests.scored import RADIUS_PX, SIZE_PX, boxes_at, patients, row


@st.composite
def scenes(draw: st.DrawFn, *, apart: bool = False, margin: bool = True) -> list[Image]:
    """A few images; detections at and around truths, many scores equal. `apart`: none reaches two truths."""
    images = []
    for _ in range(draw(st.integers(0, 4))):
        rng = np.random.default_rng(draw(st.integers(0, 10_000)))
        cells = np.stack(np.meshgrid(*[np.arange(10.0, SIZE_PX, 20)] * 2), -1).reshape(-1, 2)
        truth = rng.permutation(cells)[: draw(st.integers(0, 6))]
        if not apart:
            truth = truth / 4 + rng.uniform(0, 3, truth.shape)
        near = truth.repeat(2, 0) + rng.normal(0, 3, (2 * len(truth), 2))
        xy = rng.permutation(np.concatenate((near, rng.uniform(0, SIZE_PX, (4, 2)))))[: draw(st.integers(0, 12))]
        score = rng.integers(1, 9, len(xy)) / 8
        edge = draw(st.sampled_from([0.0, 8.0])) if margin else 0.0
        patient, scanner = draw(st.sampled_from(["", "a", "b", "c"])), draw(st.sampled_from(["", "x", "y"]))
        images.append(Image(boxes_at(xy, score), truth, RADIUS_PX, SIZE_PX, edge, patient, scanner, mpp=10.0))
    return images


def plain_counts(images: list[Image], threshold: float) -> tuple[int, int, int]:
    """Found, false and truths at a threshold, each truth given to the best scored detection: loops only."""
    found = false = truths = 0
    for image in images:

        def inside(p: NDArray[np.float64], image: Image = image) -> bool:
            return all(image.margin <= v <= image.size - image.margin for v in p)

        free = list(range(len(image.truth)))
        truths += sum(inside(t) for t in image.truth)
        order = sorted(range(len(image.found)), key=lambda i: (-image.found.score[i], i))
        for i in (i for i in order if image.found.score[i] >= threshold):
            centre = image.found.centers[i]
            reach = [(float(np.hypot(*(centre - image.truth[j]))), j) for j in free]
            if reach and min(reach)[0] <= image.radius:
                j = min(reach)[1]
                free.remove(j)
                found += inside(image.truth[j])
            else:
                false += inside(centre)
    return found, false, truths


def thresholds(images: list[Image]) -> list[float]:
    """All scores, falling."""
    return sorted({float(s) for image in images for s in image.found.score}, reverse=True)


# --- curves ----------------------------------------------------------------------------------------------------------


@given(images=scenes(apart=True, margin=False))
def test_the_curve_agrees_with_the_counts_at_every_threshold(images: list[Image]) -> None:
    """Where no detection reaches two truths, both ways of matching count the same."""
    curve = metrics.curve(images)
    assert (np.diff(curve.score) < 0).all()
    for threshold in (0.05, 0.3, *thresholds(images)):
        at = metrics.score(images, threshold)
        k = int((curve.score >= threshold).sum())
        if k:
            assert (curve.found[k - 1], curve.truths - curve.found[k - 1]) == (at.found, at.missed)
            assert curve.false[k - 1] == at.false
            assert curve.precision[k - 1] == at.precision
            assert curve.recall[k - 1] == at.recall
        else:
            assert at.found == at.false == 0


@given(images=scenes())
def test_average_precision_agrees_with_counting_anew_at_every_threshold(images: list[Image]) -> None:
    """Also where truths are crowded, scores are equal and borders count neither way."""
    counts = [plain_counts(images, t) for t in thresholds(images)]
    truths = plain_counts(images, 2.0)[2]
    precision = [found / max(1, found + false) for found, false, _ in counts]
    area, before = 0.0, 0
    for k, (found, _, _) in enumerate(counts):
        area += (found - before) * max(precision[k:])
        before = found
    if truths == 0:
        assert metrics.average_precision(images) == (0.0 if counts and counts[-1][1] else 1.0)
    else:
        assert metrics.average_precision(images) == pytest.approx(area / truths)


@given(images=scenes(), level=st.sampled_from([0.0, 0.5, 1.0, 3.125, 10.0, 1e6]))
def test_recall_at_agrees_with_trying_every_threshold(images: list[Image], level: float) -> None:
    """The best recall of the thresholds allowed, and none is reached above every score."""
    mm2 = sum(image.mm2 for image in images)
    best = 0.0
    for found, false, truths in (plain_counts(images, t) for t in [2.0, *thresholds(images)]):
        if false <= level * mm2 + 1e-9:
            best = max(best, found / truths if truths else 1.0)
    assert metrics.recall_at(images, level) == pytest.approx(best)


@given(images=scenes(), threshold=st.sampled_from([0.05, 0.25, 0.5, 1.0]))
def test_mistakes_are_those_that_were_counted(images: list[Image], threshold: float) -> None:
    """As many as the counts say, inside the borders, in order."""
    found, false, truths = plain_counts(images, threshold)
    wrong, missed = metrics.mistakes(images, threshold)
    assert (len(wrong), len(missed)) == (false, truths - found)
    assert [m.score for m in wrong] == sorted((m.score for m in wrong), reverse=True)
    assert [m.score for m in missed] == sorted(m.score for m in missed)
    for m in wrong + missed:
        assert images[m.image].counted(np.array([[m.x_px, m.y_px]])).all()


def test_a_missed_truth_carries_the_best_score_nearby() -> None:
    """Within the radius, and 0 if there is none."""
    truth = np.array([[10.0, 10.0], [50.0, 50.0]])
    found = boxes_at(np.array([[11.0, 10.0], [9.0, 10.0], [60.0, 60.0]]), np.array([0.25, 0.375, 0.5]))
    wrong, missed = metrics.mistakes([Image(found, truth, RADIUS_PX, SIZE_PX)], 0.5)
    assert [(m.x_px, m.y_px, m.score) for m in wrong] == [(60.0, 60.0, 0.5)]
    assert [(m.x_px, m.score) for m in missed] == [(50.0, 0.0), (10.0, 0.375)]


def test_the_area_is_that_within_the_margin() -> None:
    """1000 px less 100 px on either side, at 0.5 µm/px, is 0.4 mm; a margin that leaves nothing has no area."""
    image = Image(Detections.empty(), np.empty((0, 2)), 1.0, 1000, 100.0, mpp=0.5)
    assert image.mm2 == pytest.approx(0.16)
    assert replace(image, margin=600.0).mm2 == 0.0


# --- calibration -----------------------------------------------------------------------------------------------------


def test_scores_that_are_right_as_often_as_they_say_have_no_error() -> None:
    """Of eight at k/8, k are right."""
    score = np.arange(1, 8).repeat(8) / 8
    image = row(score, np.tile(np.arange(8), 7) / 8 < score)
    assert metrics.calibration_error([image]) == pytest.approx(0.0, abs=1e-12)
    mean, share, count = metrics.reliability([image])
    np.testing.assert_allclose(mean, np.arange(1, 8) / 8)
    np.testing.assert_allclose(share, mean)
    assert count.tolist() == [8] * 7


def test_the_calibration_error_of_a_known_list() -> None:
    """(3 · |0.75 - 2/3| + 2 · 0.25) / 5; what scores below 0.05 is left out unless asked for; 1 is in the last bin."""
    image = row(np.array([0.75, 0.75, 0.75, 0.25, 0.25, 0.03125]), np.array([1, 1, 0, 0, 0, 0], bool))
    assert metrics.calibration_error([image]) == pytest.approx(0.15)
    assert metrics.calibration_error([image], min_score=0.0) == pytest.approx((0.75 + 0.03125) / 6)
    assert metrics.calibration_error([image], 1) == pytest.approx(0.55 - 0.4)
    assert metrics.calibration_error([row(np.ones(2), np.array([True, False]))]) == 0.5
    assert metrics.calibration_error([]) == 0.0


@given(images=scenes(), bins=st.integers(1, 20))
def test_bins_hold_every_detection_that_counts(images: list[Image], bins: int) -> None:
    """None is lost between bins, and means lie where their bin is."""
    mean, share, count = metrics.reliability(images, bins)
    judged = metrics.judge(images)
    assert count.sum() == len(judged.score)
    assert (count > 0).all()
    assert (np.diff(mean) > 0).all()
    assert share @ count == pytest.approx(judged.right.sum())


# --- intervals -------------------------------------------------------------------------------------------------------


def test_an_interval_holds_its_value_and_widens_where_patients_disagree() -> None:
    """The same counts in all, spread evenly or by patient."""
    alike, unlike = (
        intervals(patients(shares), 0.5, rounds=300) for shares in ([0.5, 0.4, 0.6] * 4, [0.1, 0.5, 0.9] * 4)
    )
    assert alike["recall"].value == unlike["recall"].value == pytest.approx(0.5)
    for name in ("f1", "precision", "recall", "ap"):
        for one in (alike[name], unlike[name]):
            assert one.low is not None
            assert one.high is not None
            assert one.low <= one.value <= one.high
    widths = [sure["recall"].high - sure["recall"].low for sure in (alike, unlike)]  # type: ignore[operator]
    assert widths[1] > 2 * widths[0] > 0


def test_images_of_a_patient_stay_together() -> None:
    """Five copies of each image of a patient say no more than one; of nobody, they count as independent."""
    shares = [0.1, 0.5, 0.9] * 3
    once, copies = (intervals(patients(shares, n), 0.5, rounds=200)["recall"] for n in (1, 5))
    assert copies == once
    nobody = intervals([replace(image, patient="") for image in patients(shares, 5)], 0.5, rounds=200)["recall"]
    assert nobody.high - nobody.low < 0.7 * (once.high - once.low)  # type: ignore[operator]


@settings(max_examples=25)
@given(images=scenes(), seed=st.integers(0, 5))
def test_the_bootstrap_agrees_with_resampling_lists_of_images(images: list[Image], seed: int) -> None:
    """Patients drawn with the same generator, their images put in a list and measured from scratch."""
    rounds, threshold, level = 20, 0.5, 3.125
    groups: dict[object, list[Image]] = {}
    for i, image in enumerate(images):
        groups.setdefault(image.patient or i, []).append(image)
    sure = intervals(images, threshold, rounds=rounds, seed=seed, levels=(level,))
    assert sure == intervals(images, threshold, rounds=rounds, seed=seed, levels=(level,))
    assert sure["f1"].value == metrics.score(images, threshold).f1
    assert sure["ap"].value == metrics.average_precision(images)
    if sum(any(image.counted(image.truth).any() for image in group) for group in groups.values()) < 2:
        assert all(one.low is one.high is None for one in sure.values())
        return
    rows = []
    for times in np.random.default_rng(seed).multinomial(len(groups), [1 / len(groups)] * len(groups), rounds):
        drawn = [image for group, n in zip(groups.values(), times, strict=True) for image in group * int(n)]
        if not any(image.counted(image.truth).any() for image in drawn):
            continue  # of no object it cannot be said whether it was found
        at = metrics.score(drawn, threshold)
        rows.append((at.f1, at.precision, at.recall, metrics.average_precision(drawn), metrics.recall_at(drawn, level)))
    low, high = np.percentile(rows, (2.5, 97.5), axis=0)
    assert list(sure) == ["f1", "precision", "recall", "ap", "recall_at_3.125_per_mm2"]
    np.testing.assert_allclose([one.low for one in sure.values()], low, atol=1e-12)
    np.testing.assert_allclose([one.high for one in sure.values()], high, atol=1e-12)


def test_patients_without_objects_are_not_all_found() -> None:
    """Half of each patient's are; where nothing is, nothing can be found, and so no draw has a better recall."""
    half = patients([0.5, 0.5, 0.5])
    empty = [row(np.array([0.3]), np.array([False]), f"e{i}") for i in range(6)]
    assert intervals(half + empty, 0.6, rounds=200)["recall"] == Interval(0.5, 0.5, 0.5)
    assert intervals(half[:2] + empty, 0.6)["recall"] == Interval(0.5, None, None)


def test_another_seed_gives_another_interval_of_the_same_value() -> None:
    """And one patient gives none, however many images."""
    images = patients([0.1, 0.4, 0.7, 1.0, 0.3])
    first, second = (intervals(images, 0.5, rounds=50, seed=seed)["ap"] for seed in (0, 1))
    assert first.value == second.value
    assert first != second
    alone = intervals(patients([0.5], 4), 0.5)
    assert alone["recall"] == Interval(0.5, None, None)
    assert alone["recall_at_1_per_mm2"].low is None


@settings(max_examples=25)
@given(images=scenes())
def test_a_summary_is_json_and_says_what_the_metrics_say(images: list[Image]) -> None:
    """No NaN, whatever is missing; scanners only where there are several."""
    report = summary(images, 0.5, rounds=5)
    assert json.loads(json.dumps(report, allow_nan=False)) == report
    at = metrics.score(images, 0.5)
    assert report["f1"] == pytest.approx(at.f1, abs=1e-4)
    assert report["figures"] == at.found + at.missed
    assert report["ece"] == pytest.approx(metrics.calibration_error(images), abs=1e-4)
    mm2 = sum(image.mm2 for image in images)
    assert report["false_per_mm2"] == (pytest.approx(at.false / mm2, abs=1e-4) if images else None)
    named = {image.scanner for image in images} - {""}
    with_objects = {i.scanner for i in images if i.counted(i.truth).any()} & named
    assert set(report.get("scanners", {})) == (with_objects if len(named) > 1 else set())
    for name, part in report.get("scanners", {}).items():
        of_it = metrics.score([image for image in images if image.scanner == name], 0.5)
        assert part["figures"] == of_it.found + of_it.missed
        assert part["recall"] == pytest.approx(of_it.recall, abs=1e-4)
    assert set(report["intervals_95"]) == {"f1", "precision", "recall", "ap", "recall_at_1_per_mm2"}


def test_a_class_that_is_never_found_is_told() -> None:
    """Of two classes one is found wholly, the other never: pooled numbers alone would hide it."""
    found = Detections.build([[0, 0, 4, 4], [20, 20, 24, 24], [50, 50, 54, 54]], [0.9, 0.8, 0.7], [0, 0, 0])
    there = np.array([[2.0, 2], [22, 22], [80, 80]])
    image = Image(found, there, 3.0, 100, label=np.array([0, 0, 1]), excused=np.array([False, False, True]))
    row = summary([image], 0.5, rounds=10, classes=["cell", "mitosis"])
    assert row["classes"]["cell"] == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "ap": 1.0, "figures": 2}
    assert row["classes"]["mitosis"] == {"f1": 0.0, "precision": 1.0, "recall": 0.0, "ap": 0.0, "figures": 1}
    assert "classes" not in summary([image], 0.5, rounds=10, classes=["cell"])
