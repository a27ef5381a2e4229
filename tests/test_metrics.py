"""Curves, calibration error, bootstrap intervals, summaries, and the pictures drawn of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from numpy.typing import NDArray
from PIL import Image as Picture

from slidescan.detections import Detections
from slidescan.train import metrics
from slidescan.train.intervals import Interval, intervals, summary
from slidescan.train.metrics import Image
from slidescan.train.report import draw_curves, draw_losses, draw_worst

RADIUS_PX = 5.0
SIZE_PX = 80
BLUE = (0, 114, 178)  # of the first line of a chart
LOSSES = "step,minutes,lr,loss,class,l1\n10,0.1,1e-4,3.0,2.0,1.0\n20,0.2,2e-4,2.0,1.5,0.5\n30,0.3,1e-4,1.0,0.7,0\n"


def boxes_at(xy: NDArray[np.float64], score: NDArray[np.float64]) -> Detections:
    """Small boxes centred at `xy`."""
    xy = np.asarray(xy, np.float64).reshape(-1, 2)
    return Detections.build(np.concatenate((xy - 1, xy + 1), 1), score)


def cut_from(sample: NDArray[np.uint8]) -> Callable[[float, float, int], NDArray[np.uint8]]:
    """What cuts a square around a point, the edge of the sample repeated."""

    def cut(x: float, y: float, edge: int) -> NDArray[np.uint8]:
        rows, columns = (np.clip(round(at - edge / 2) + np.arange(edge), 0, len(sample) - 1) for at in (y, x))
        return sample[rows[:, None], columns]

    return cut


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


def row(score: NDArray[np.float64], right: NDArray[np.bool_], patient: str = "") -> Image:
    """An image with detections in a row, of which some are right."""
    xy = np.stack((np.arange(len(score)) * 10.0, np.zeros(len(score))), 1)
    return Image(boxes_at(xy, score), xy[right], 1.0, max(1000, 10 * len(score)), 0.0, patient)


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


def patients(shares: list[float], images_each: int = 2) -> list[Image]:
    """Images of 10 truths a patient, of which a share scores 0.75 and the rest 0.25, and 5 false at 0.5."""
    images = []
    for i, share in enumerate(shares):
        score = np.concatenate((np.where(np.arange(10) < 10 * share, 0.75, 0.25), np.full(5, 0.5)))
        images += [row(score, np.arange(15) < 10, f"p{i}")] * images_each
    return images


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
    if len(groups) < 2:
        assert all(one.low is one.high is None for one in sure.values())
        return
    rows = []
    for times in np.random.default_rng(seed).multinomial(len(groups), [1 / len(groups)] * len(groups), rounds):
        drawn = [image for group, n in zip(groups.values(), times, strict=True) for image in group * int(n)]
        at = metrics.score(drawn, threshold)
        rows.append((at.f1, at.precision, at.recall, metrics.average_precision(drawn), metrics.recall_at(drawn, level)))
    low, high = np.percentile(rows, (2.5, 97.5), axis=0)
    assert list(sure) == ["f1", "precision", "recall", "ap", "recall_at_3.125_per_mm2"]
    np.testing.assert_allclose([one.low for one in sure.values()], low, atol=1e-12)
    np.testing.assert_allclose([one.high for one in sure.values()], high, atol=1e-12)


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
    assert set(report.get("scanners", {})) == (named if len(named) > 1 else set())
    for name, part in report.get("scanners", {}).items():
        of_it = metrics.score([image for image in images if image.scanner == name], 0.5)
        assert part["figures"] == of_it.found + of_it.missed
        assert part["recall"] == pytest.approx(of_it.recall, abs=1e-4)
    assert set(report["intervals_95"]) == {"f1", "precision", "recall", "ap", "recall_at_1_per_mm2"}


# --- pictures --------------------------------------------------------------------------------------------------------


def pixels(path: Path) -> NDArray[np.uint8]:
    """The RGB pixels of a picture, which says nothing besides them."""
    with Picture.open(path) as picture:
        assert set(picture.info) <= {"dpi"}
        return np.asarray(picture.convert("RGB"))


def count_of(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture.astype(int) - colour).max(-1) <= 2).sum())


def test_curves_are_drawn(tmp_path: Path) -> None:
    """Three charts of 800 px with a line; images without figures have no recall and so no line in two of them."""
    images = patients([0.1, 0.5, 0.9])
    bare = [replace(image, truth=np.empty((0, 2))) for image in images]
    for kinds, folder in (({"mosaic": images, "bare": bare}, "both"), ({"bare": bare}, "bare"), ({}, "none")):
        (tmp_path / folder).mkdir()
        draw_curves(kinds, 0.5, tmp_path / folder)
        for name in ("pr", "froc", "reliability"):
            picture = pixels(tmp_path / folder / f"{name}.png")
            assert picture.shape == (600, 800, 3)
            drawn = folder == "both" or (folder == "bare" and name == "reliability")
            bluish = picture[..., 2].astype(int) - picture[..., 0] > 60  # of discs that let the grid through, too
            assert (bluish.sum() > 100) == drawn


def test_the_operating_point_is_where_it_should_be(tmp_path: Path) -> None:
    """Higher precision moves the disc up: the blue pixels' middle follows."""
    heights = []
    for name, n_false in (("good", 2), ("poor", 30)):
        score = np.concatenate((np.full(10, 0.75), np.full(n_false, 0.75)))
        (tmp_path / name).mkdir()
        draw_curves({"field": [row(score, np.arange(len(score)) < 10)]}, 0.5, tmp_path / name)
        picture = pixels(tmp_path / name / "pr.png")[:, 600:]  # recall 1, right of the legend
        blue = np.abs(picture.astype(int) - BLUE).max(-1) <= 2
        heights.append(float(np.flatnonzero(blue.any(1)).mean()))
    assert heights[0] < 200
    assert heights[1] > 350


def test_pictures_do_not_depend_on_names(tmp_path: Path) -> None:
    """Neither patients nor scanners nor file names are in them: without, they are the same byte for byte."""
    images = patients([0.1, 0.5, 0.9])
    samples = [np.full((image.size, image.size, 3), 200, np.uint8) for image in images]
    for folder, some in (("a", images), ("other", [replace(i, patient="", scanner="x") for i in images])):
        (tmp_path / folder).mkdir()
        draw_curves({"field": some}, 0.5, tmp_path / folder)
        draw_worst([cut_from(sample) for sample in samples], some, 0.5, tmp_path / folder / "worst.png")
        (tmp_path / folder / f"{folder}.csv").write_text(LOSSES)
        draw_losses(tmp_path / folder / f"{folder}.csv", tmp_path / folder / "loss.png")
    for name in ("pr", "froc", "reliability", "worst", "loss"):
        a, other = (tmp_path / folder / f"{name}.png" for folder in ("a", "other"))
        assert a.read_bytes() == other.read_bytes()


def test_the_worst_mistake_comes_first(tmp_path: Path) -> None:
    """Patches are where the page has them, in order, with the mistake in the middle and the edge repeated."""
    truth = np.array([[20.0, 60.0], [60.0, 60.0]])
    found = boxes_at(np.array([[2.0, 20.0], [60.0, 20.0], [60.0, 60.0]]), np.array([0.75, 0.875, 0.25]))
    sample = np.full((SIZE_PX, SIZE_PX, 3), 255, np.uint8)
    colours = {(2, 20): (200, 0, 0), (60, 20): (0, 200, 0), (20, 60): (0, 0, 200), (60, 60): (200, 0, 200)}
    for (x, y), colour in colours.items():
        sample[max(0, y - 5) : y + 5, max(0, x - 5) : x + 5] = colour
    empty = Image(Detections.empty(), np.empty((0, 2)), RADIUS_PX, SIZE_PX)
    image = Image(found, truth, RADIUS_PX, SIZE_PX, mpp=0.5)
    path = tmp_path / "worst.png"
    draw_worst([cut_from(sample * 0), cut_from(sample)], [empty, image], 0.5, path, window_um=10.0)
    page = pixels(path)
    assert page.shape == (387, 800, 3)
    # Two rows of patches of 126 px, 132 px apart, from 40 px and 230 px down.
    first, second, lost_first, lost_second = (page[y : y + 126, x : x + 126] for y in (40, 230) for x in (7, 139))
    for patch, colour in ((first, (0, 200, 0)), (second, (200, 0, 0)), (lost_first, (0, 0, 200))):
        assert tuple(patch[63, 63]) == colour
        assert tuple(patch[3, 63]) == (255, 255, 255)
        assert 0.1 < count_of(patch, colour) / 126**2 < 0.3  # a quarter less what the scaling blurs
    assert tuple(lost_second[63, 63]) == (200, 0, 200)
    assert tuple(second[63, 2]) == (200, 0, 0)  # beyond the left border
    assert tuple(first[63, 2]) == (255, 255, 255)

    draw_worst([cut_from(sample * 0), cut_from(sample)], [empty, image], 0.5, path, window_um=10.0, most=1)
    assert count_of(pixels(path), (200, 0, 0)) == 0


def test_a_page_without_mistakes_says_none(tmp_path: Path) -> None:
    """Two headings, and a word where the patches would be."""
    image = Image(Detections.empty(), np.empty((0, 2)), RADIUS_PX, SIZE_PX)
    draw_worst([cut_from(np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8))], [image], 0.5, tmp_path / "worst.png")
    page = pixels(tmp_path / "worst.png")
    for top in (40, 230):
        word = page[top : top + 150] < 128
        assert 20 < word.any(-1).sum() < 1000
        assert word.any((0, 2))[370:430].any()


def test_losses_are_drawn_from_what_is_whole(tmp_path: Path) -> None:
    """Rows repeated by a resumed run and a row half written change nothing; without rows the picture says so."""
    head, *rows = LOSSES.splitlines()
    (tmp_path / "whole.csv").write_text(LOSSES)
    (tmp_path / "torn.csv").write_text("\n".join([head, "10,0.1,1e-4,9,9,9", *rows, "40,0.4,1e-"]))
    (tmp_path / "empty.csv").write_text(head + "\n")
    for name in ("whole", "torn", "empty"):
        draw_losses(tmp_path / f"{name}.csv", tmp_path / f"{name}.png")
    whole, torn, empty = (pixels(tmp_path / f"{name}.png") for name in ("whole", "torn", "empty"))
    np.testing.assert_array_equal(whole, torn)
    assert whole.shape == empty.shape == (600, 800, 3)
    assert count_of(whole, BLUE) > 100
    assert count_of(empty, BLUE) == 0


def test_many_steps_are_averaged(tmp_path: Path) -> None:
    """A loss that jumps up and down at every step is drawn as a smooth line."""
    lines = [f"{i},{i / 100},1e-4,{1 + 9 * (i % 2)},1,100" for i in range(6000)]
    (tmp_path / "long.csv").write_text("\n".join(["step,minutes,lr,loss,class,l1", *lines]))
    draw_losses(tmp_path / "long.csv", tmp_path / "long.png")
    dark = pixels(tmp_path / "long.png")[60:540, 120:560].max(-1) < 80  # inside the axes, left of the legend
    assert 0 < dark.sum(0).max() < 10
