"""What reviewers accepted and rejected becomes objects and hard negatives, and nothing else does."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import slidescan as ss
from slidescan import cli
from slidescan.archive.record import Record
from slidescan.errors import ConfigError, ResultError
from slidescan.export.features import Feature
from slidescan.export.geojson import write_geojson
from slidescan.reviews.case import Case
from slidescan.slides import Slide, memory_slide
from slidescan.testing import TISSUE_GROUND
from slidescan.train.annotated import Annotated
from slidescan.train.decided import Decided, keep_decided, load_decided
from slidescan.train.loop import train
from slidescan.train.run import _network
from slidescan.train.settings import TrainSettings, VariantSettings, load_settings
from slidescan.train.source import Batches
from slidescan.train.windows import Example, Windows
from tests.archives import write_slide
from tests.discs import MPP, ORACLE, config, discs
from tests.reviewed import APART, copied, scan_apart

ROOT = Path(__file__).parents[1]

SETTINGS = TrainSettings(classes=["disc"])
SEVERAL = config(flagged__link_um=1000.0, flagged__margin_um=5.0)  # regions of many discs
NOTHING = np.empty((0, 4))


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=12, size_wh=(900, 700))[0]


@pytest.fixture(scope="module")
def apart(slide: Slide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scan_apart(slide, tmp_path_factory.mktemp("apart"))


@pytest.fixture(scope="module")
def together(slide: Slide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(ss.scan(slide, ORACLE, out=tmp_path_factory.mktemp("together") / "case", config=SEVERAL).path or "")


@pytest.fixture
def run(apart: Path, tmp_path: Path) -> Path:
    """A result whose regions are single discs, to decide on."""
    return copied(apart, tmp_path)


def decide(run: Path, *verdicts: str, who: str = "ann", of: str = "regions", label: str | None = None) -> list[Any]:
    """Decide on the first items, best first; return all items."""
    looked = ss.review(ss.load_result(run, verify=False), reviewer=who, of=of)
    items = looked.items()
    for item, verdict in zip(items, verdicts, strict=False):
        if verdict:
            looked.decide(item.id, verdict, label=label)
    return items


def load(run: Path, slide: Slide, **changed: Any) -> tuple[Annotated, Decided]:
    """Return what was decided on the one slide, and all of it."""
    decided = load_decided(run, slide, SETTINGS.model_copy(update=changed))
    (one,) = decided.annotated
    return one, decided


def centres(xyxy: Any) -> set[tuple[int, int]]:
    """Where boxes are, to compare sets of them."""
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 4)
    return {(round(x0 + x1), round(y0 + y1)) for x0, y0, x1, y1 in boxes.tolist()}


def boxes_of(items: Sequence[Any]) -> set[tuple[int, int]]:
    return {(round(i.box_l0.x0 + i.box_l0.x1), round(i.box_l0.y0 + i.box_l0.y1)) for i in items}


def old(run: Path, *fields: str) -> None:
    """Take fields from the log, as if it was written before they were kept."""
    path = run / "decisions.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k not in fields}) + "\n" for line in told))


# --- the log ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blinded", [False, True])
def test_the_log_holds_what_was_seen(together: Path, tmp_path: Path, blinded: bool) -> None:
    """A region's detections by their boxes, from left to right, and the class; of a detection only its own box."""
    run = copied(together, tmp_path)
    result = ss.load_result(run, verify=False)
    looked = ss.review(result, reviewer="ann", blinded=blinded)
    item = max(looked.items(), key=lambda item: item.n)
    made = looked.decide(item.id, "accept")
    assert made.parts_l0 is not None
    assert len(made.parts_l0) == item.n > 1
    lefts = [part.x0 for part in made.parts_l0]
    assert lefts == sorted(lefts)
    boxes = {tuple(row) for row in result.found.xyxy.astype(np.float32).tolist()}
    read = next(Case(result, "region").log.standing.latest_first())
    assert read.parts_l0 == made.parts_l0
    assert {tuple(np.float32([p.x0, p.y0, p.x1, p.y1]).tolist()) for p in made.parts_l0} <= boxes
    assert read.detected_label == "disc"
    assert read.score is None if blinded else read.score
    alone = ss.review(result, reviewer="ann", of="detections", blinded=blinded)
    assert alone.decide(alone.items()[0].id, "reject").parts_l0 == ()


def test_what_is_in_a_region_is_what_its_outline_holds(together: Path) -> None:
    """Each detection is in one region, though boxes of regions overlap: what is shown, counted and exported agree."""
    case = Case(ss.load_result(together, verify=False), "region")
    parts = {id_: case.parts(item) for id_, item in case.items.items()}
    assert {id_: len(boxes) for id_, boxes in parts.items()} == {id_: item.n for id_, item in case.items.items()}
    triangle = np.array([(0.0, 0.0), (900.0, 0.0), (900.0, 1.0)])  # its box holds the slide's upper edge
    item = replace(next(iter(case.items.values())), polygon_l0=triangle)
    assert not len(case.parts(item))


# --- what teaches what -----------------------------------------------------------------------------------------------


def test_accepted_rejected_and_unsure(run: Path, slide: Slide) -> None:
    """An object, a place without one, and nothing; what nobody decided on is ignored."""
    items = decide(run, "accept", "reject", "accept", "unsure")
    one, decided = load(run, slide, attributes=["atypical"])
    found = ss.load_result(run).detections.xyxy
    assert centres(one.xyxy_l0) < centres(found)
    assert boxes_of([items[0], items[2]]) == centres(one.xyxy_l0)
    assert boxes_of(items[1:2]) == centres(one.rejected_xyxy_l0)
    assert centres(one.ignored_xyxy_l0) == centres(found) - centres(one.xyxy_l0) - centres(one.rejected_xyxy_l0)
    assert one.label.tolist() == [0, 0]
    assert np.isnan(one.attributes).all()
    assert not one.whole
    assert str(decided) == "decisions: 2 accepted, 1 rejected, 1 unsure, on 1 slides"


def test_single_detections_are_decided_on_likewise(run: Path, slide: Slide) -> None:
    """Under the ids of detections."""
    items = decide(run, "reject", "accept", of="detections")
    one, _ = load(run, slide)
    assert (centres(one.rejected_xyxy_l0), centres(one.xyxy_l0)) == (boxes_of(items[:1]), boxes_of(items[1:2]))


def test_an_accepted_region_of_several_is_left_out(together: Path, slide: Slide, tmp_path: Path) -> None:
    """Which of its figures are real nobody said; where one is decided on alone, that counts, whoever came first."""
    run = copied(together, tmp_path)
    several, *_ = decide(run, "accept")
    assert several.n > 2
    with pytest.raises(ConfigError, match=r"0 rejected, 1 regions of several .*--of detections"):
        load_decided(run, slide, SETTINGS)
    case = Case(ss.load_result(run), "region")
    inside = centres(case.parts(several))
    looked = ss.review(ss.load_result(run), reviewer="ben", of="detections")
    first, second, *_ = [item for item in looked.items() if boxes_of([item]) <= inside]
    looked.decide(first.id, "accept")
    looked.decide(second.id, "reject")
    decide(run, "accept")
    one, decided = load(run, slide)
    assert (centres(one.xyxy_l0), centres(one.rejected_xyxy_l0)) == (boxes_of([first]), boxes_of([second]))
    assert inside - boxes_of([first, second]) <= centres(one.ignored_xyxy_l0)
    assert decided.counts["several"] == 1
    for item in looked.items():
        looked.decide(item.id, "reject")
    assert load(run, slide)[1].counts["several"] == 0


def test_all_of_a_rejected_region_is_rejected(together: Path, slide: Slide, tmp_path: Path) -> None:
    """But what the same reviewer accepted in it alone; and accepting the region afterwards takes it back."""
    run = copied(together, tmp_path)
    several, *_ = decide(run, "reject")
    inside = centres(Case(ss.load_result(run), "region").parts(several))
    one, _ = load(run, slide)
    assert centres(one.rejected_xyxy_l0) == inside
    looked = ss.review(ss.load_result(run), reviewer="ann", of="detections")
    alone = next(item for item in looked.items() if boxes_of([item]) <= inside)
    looked.decide(alone.id, "accept")
    decide(run, "reject")
    one, _ = load(run, slide)
    assert (centres(one.xyxy_l0), centres(one.rejected_xyxy_l0)) == (boxes_of([alone]), inside - boxes_of([alone]))
    decide(run, "accept")
    assert not len(load(run, slide)[0].rejected_xyxy_l0)


def test_reviewers_who_differ_teach_nothing(run: Path, slide: Slide) -> None:
    """Neither does unsure against accept, nor two classes; who agree count once, and the last word of each counts."""
    items = decide(run, "accept", "reject", "unsure", "reject", "accept")
    decide(run, "reject", "reject", "accept", "accept", who="ben")
    decide(run, "", "", "", "reject", who="ben")  # comes round
    looked = ss.review(ss.load_result(run), reviewer="ben")
    looked.decide(items[4].id, "accept", label="ring")
    one, decided = load(run, slide, classes=["disc", "ring"])
    assert centres(one.rejected_xyxy_l0) == boxes_of([items[1], items[3]])
    assert not len(one.label)
    assert decided.counts["dispute"] == 3
    assert boxes_of([items[0], items[2], items[4]]) <= centres(one.ignored_xyxy_l0)
    looked.undo()
    assert load(run, slide)[0].label.tolist() == [0]


def rescanned(run: Path, slide: Slide) -> Path:
    """Scan anew, with a detector that sees a little otherwise: all ids differ."""
    ss.scan(slide, replace(ORACLE, jitter_px=3.0), out=run, config=APART, overwrite=True)
    return run


def test_decisions_of_another_scan_count_where_they_are(run: Path, slide: Slide) -> None:
    """Under whatever id: the present detection there is no longer undecided, and the last word on a place counts."""
    items = decide(run, "accept", "reject", "reject")
    at = boxes_of(items[:3])
    again = ss.review(ss.load_result(rescanned(run, slide)), reviewer="ann")
    assert not {item.id for item in again.items()} & {item.id for item in items}
    one, decided = load(run, slide)
    assert (decided.accepted, decided.rejected) == (1, 2)
    assert centres(one.xyxy_l0) | centres(one.rejected_xyxy_l0) == at
    assert len(one.ignored_xyxy_l0) == 9
    third = next(i for i in again.items() if (said := again.decision(i.id)) and said.region == items[2].id)
    again.decide(third.id, "accept")
    one, decided = load(run, slide)
    assert (decided.accepted, decided.rejected, len(one.ignored_xyxy_l0)) == (2, 1, 9)
    assert boxes_of([third]) <= centres(one.xyxy_l0)


def test_decisions_whose_detection_is_gone_still_teach(run: Path, slide: Slide) -> None:
    """A scan that finds nothing leaves what was decided before."""
    items = decide(run, "accept", "reject", "unsure")
    ss.scan(slide, ORACLE, out=run, config=config(detect__threshold=0.999, detect__min_score=0.999), overwrite=True)
    one, _ = load(run, slide)
    assert centres(one.xyxy_l0) == boxes_of(items[:1])
    assert centres(one.rejected_xyxy_l0) == boxes_of(items[1:2])
    assert centres(one.ignored_xyxy_l0) == boxes_of(items[2:3])


def test_decisions_on_another_slide_do_not_count(run: Path, slide: Slide) -> None:
    """The place would be a place of this one."""
    decide(run, "accept", "reject")
    other, _ = discs(n=12, size_wh=(900, 700), seed=1)
    ss.scan(other, ORACLE, out=run, config=APART, overwrite=True)
    with pytest.raises(ConfigError, match="0 accepted, 0 rejected"):
        load_decided(run, other, SETTINGS)


def test_old_lines_say_what_they_can(run: Path, slide: Slide) -> None:
    """With the region there its detections count; without it a rejected one is a place, an accepted one left out."""
    items = decide(run, "accept", "reject", "unsure")
    old(run, "parts_l0", "detected_label")
    one, _ = load(run, slide)
    assert (centres(one.xyxy_l0), centres(one.rejected_xyxy_l0)) == (boxes_of(items[:1]), boxes_of(items[1:2]))
    rescanned(run, slide)
    one, decided = load(run, slide)
    assert not len(one.label)
    assert centres(one.rejected_xyxy_l0) == boxes_of(items[1:2])
    assert boxes_of([items[0], items[2]]) <= centres(one.ignored_xyxy_l0)
    assert "1 left out whose line does not tell" in str(decided)
    again = ss.review(ss.load_result(run), reviewer="ann")
    first = next(i for i in again.items() if (said := again.decision(i.id)) and said.region == items[0].id)
    again.decide(first.id, "accept")  # with its box: what the old line says of the region is said no more
    one, decided = load(run, slide)
    assert centres(one.xyxy_l0) == boxes_of([first])
    assert decided.counts["unread"] == 0
    assert boxes_of(items[:1]).isdisjoint(centres(one.ignored_xyxy_l0))


def test_the_class_is_the_reviewers_or_the_detectors(run: Path, slide: Slide) -> None:
    """Or, in old lines, that of the present detection or the only class; one nobody asked for is an error."""
    items = decide(run, "accept", label="ring")
    decide(run, "", "accept", of="detections")
    one, _ = load(run, slide, classes=["ring", "disc"])
    assert sorted(one.label.tolist()) == [0, 1]
    assert centres(one.xyxy_l0[one.label == 0]) == boxes_of(items[:1])
    with pytest.raises(ConfigError, match="decisions on 'case': expected one of the classes disc, got 'ring'"):
        load(run, slide)
    old(run, "detected_label", "label")
    assert load(run, slide, classes=["ring", "disc"])[0].label.tolist() == [1, 1]
    rescanned(run, slide)
    assert load(run, slide)[0].label.tolist() == [0, 0]
    decide(run, "", "", "reject")
    one, decided = load(run, slide, classes=["ring", "disc"])
    assert (len(one.label), decided.counts["unread"]) == (0, 2)


def test_what_scored_low_in_a_decided_box_was_decided_on(tmp_path: Path) -> None:
    """A second detection below the threshold was shown to nobody by itself; elsewhere, and above it, it is ignored."""
    slide, path = discs(n=3, size_wh=(900, 700))[0], tmp_path / "case"
    result = ss.scan(slide, ORACLE, out=path, config=APART)
    decide(path, "reject", "accept", "unsure")
    ids, found = result.ids, result.detections
    at = [found.xyxy[ids.index(item.id)] for item in ss.review(result, of="detections", reviewer="ann").items()]
    for score, ignored in ((0.1, {0, 2}), (0.9, {0, 1, 2})):
        shifted = ss.Detections.build([at[0] + 7, at[2] + 7], [score, score], [0, 0])
        more = replace(result, path=None, detections=ss.Detections.concat([found, shifted]))
        more.save(path, lambda: __import__("PIL.Image").Image.new("RGB", (8, 8)))
        one, _ = load(path, slide)
        expected = centres([at[2], at[2] + 7] + ([at[0] + 7] if 1 in ignored else []))
        assert centres(one.ignored_xyxy_l0) == expected


def test_what_cannot_be_learned_from_is_one_line(run: Path, slide: Slide, tmp_path: Path) -> None:
    """No slides, none decided on, nothing that teaches, another slide, no result."""
    write_slide(tmp_path / "other.tif", seed=5)
    image = slide.read(0, 0, 900, 700, slide.frame).rgb
    with pytest.raises(ConfigError, match=r"got no decisions\.jsonl; review case first"):
        load_decided(run, slide, SETTINGS)
    decide(run, "unsure")
    with pytest.raises(ConfigError, match="got 0 accepted, 0 rejected, 1 unsure, on 0 slides; review case first"):
        load_decided(run, tmp_path / "nowhere.tif", SETTINGS)  # no pixels are asked for
    decide(run, "accept")
    for slides, said in (
        (None, "add --slides"),
        (tmp_path / "other.tif", "got other.tif, whose content is another"),
        (memory_slide(image, 0.25), "open it with mpp=0.5"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            load_decided(run, slides, SETTINGS)
        assert "\n" not in str(caught.value)
    with pytest.raises(ResultError):
        load_decided(tmp_path, slide, SETTINGS)


# --- windows ---------------------------------------------------------------------------------------------------------

INKS = np.array(
    [(200, 20, 20), (20, 160, 20), (20, 20, 220), (150, 110, 0), (0, 120, 140), (140, 0, 140), (0, 0, 0),
     (190, 130, 30), (30, 130, 190), (130, 190, 30)]
)  # fmt: skip  # the last three score below the threshold
FAINT = 3


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Slide, Path, np.ndarray]:
    """A slide of discs, each of its own ink, its result, and the centres by ink."""
    rng = np.random.default_rng(3)
    pixels = np.full((300, 400, 3), TISSUE_GROUND, np.uint8)
    cells = rng.permutation([(x, y) for x in range(30, 400, 60) for y in range(30, 300, 60)])[: len(INKS)]
    y, x = np.mgrid[:300, :400]
    for ink, (at_x, at_y) in zip(INKS, cells, strict=True):
        pixels[np.hypot(x - at_x, y - at_y) <= 10] = ink
    slide = memory_slide(pixels, MPP)
    path = tmp_path_factory.mktemp("painted") / "case"
    settings_ = config(flagged__link_um=32.0, flagged__margin_um=2.0, detect__threshold=0.6)
    found = ss.scan(slide, ORACLE, out=path, config=settings_)
    assert len(found.found) == len(INKS) - FAINT < len(found.detections)
    assert {1, 2} <= {region.n for region in found.regions} or len(found.regions) < len(INKS) - FAINT
    return slide, path, cells


def seen_as_background(example: Example) -> set[int]:
    """Inks of the discs that a window shows outside boxes and ignored places."""
    image, seen = example.image.astype(int), set()
    covered = np.zeros(image.shape[:2], np.bool_)
    for x0, y0, x1, y1 in np.concatenate((example.xyxy_px, example.ignored_xyxy_px)):
        covered[max(0, int(y0) - 2) : int(np.ceil(y1)) + 2, max(0, int(x0) - 2) : int(np.ceil(x1)) + 2] = True
    for k, ink in enumerate(INKS):
        alike = ndimage.minimum_filter(np.abs(image - ink).max(2) < 30, 3)  # an edge is a blend of two colours
        if (alike & ~covered).any():
            seen.add(k)
    return seen


ACTS = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.sampled_from(["regions", "detections"]),
        st.integers(0, 9),
        st.sampled_from(["accept", "reject", "unsure"]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40)
@given(acts=ACTS, seed=st.integers(0, 999))
def test_what_nobody_decided_on_is_never_background(
    painted: tuple[Slide, Path, np.ndarray], acts: list[tuple[str, str, int, str]], seed: int
) -> None:
    """Whatever was decided: only rejected discs are shown as background, and objects are accepted discs' pixels."""
    slide, path, cells = painted
    (path / "decisions.jsonl").unlink(missing_ok=True)
    result = ss.load_result(path, verify=False)
    said: dict[int, set[str]] = {}
    for who, of, number, verdict in acts:
        looked = ss.review(result, reviewer=who, of=of)
        item = looked.items()[number % len(looked)]
        made = looked.decide(item.id, verdict)
        for box in made.parts_l0 or (made.box_l0,):
            middle = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
            said.setdefault(int(np.hypot(*(cells - middle).T).argmin()), set()).add(verdict)
    try:
        one, _ = load(path, slide)
    except ConfigError:
        return
    windows, rng = Windows([one], MPP), np.random.default_rng(seed)
    for size in (64, 97, 160):
        example = windows.window(rng, size)
        background = seen_as_background(example)
        assert all("reject" in said.get(k, ()) for k in background)
        for x0, y0, x1, y1 in example.xyxy_px:
            middle = example.image[int((y0 + y1) / 2), int((x0 + x1) / 2)].astype(int)
            assert "accept" in said.get(int(np.abs(INKS - middle).max(1).argmin()), ())


def test_windows_are_drawn_around_decided_places_only() -> None:
    """Each class and the rejected as often, each anywhere in the window; nothing is shown of the rest of the slide."""
    pixels = np.full((3000, 3000, 3), TISSUE_GROUND, np.uint8)
    slide = memory_slide(pixels, 0.25)
    at = np.array([[500, 500, 520, 520], [2500, 500, 2520, 520], [2400, 2400, 2420, 2420]], np.float64)
    rejected = np.concatenate((at[2:], at[2:] + 60))
    one = Annotated(slide, at[:2], np.array([0, 1]), np.empty((2, 0)), NOTHING, "p", "", rejected, whole=False)
    windows, rng = Windows([one], 0.25), np.random.default_rng(0)
    counts = {0: 0, 1: 0, None: 0}
    for _ in range(600):
        example = windows.window(rng, 128)
        counts[int(example.label[0]) if len(example.label) else None] += 1
    assert min(counts.values()) > 150  # of 200, less the objects that are cut
    for k, (x, y) in enumerate(at[:, :2].astype(int).tolist()):
        pixels[y : y + 20, x : x + 20] = INKS[k]
    marked = replace(
        one, slide=memory_slide(pixels, 0.25), rejected_xyxy_l0=at[2:], xyxy_l0=NOTHING, label=np.empty(0, int)
    )
    marked = replace(marked, attributes=np.empty((0, 0)))
    windows, centres_ = Windows([marked], 0.25), []
    for _ in range(400):
        shown = np.argwhere(np.abs(windows.window(rng, 128).image.astype(int) - INKS[2]).max(2) < 30)
        assert len(shown)
        centres_.append(shown.mean(0))
    for axis in np.array(centres_).T:
        assert (np.abs(np.histogram(axis, 4, (0, 128))[0] / len(axis) - 0.25) < 0.09).all()


def test_a_share_of_the_images_is_of_decided_slides() -> None:
    """Beside what is mined, whatever the source; none without decisions."""
    dark = memory_slide(np.zeros((300, 300, 3), np.uint8), 0.25)
    box = np.array([[140.0, 140, 160, 160]])
    one = Annotated(dark, NOTHING, np.empty(0, np.int64), np.empty((0, 0)), NOTHING, "p", "", box, whole=False)
    variant = VariantSettings(tile_px=[32], steps=1)

    class White:
        def example(self, rng: np.random.Generator, size: int) -> Example:
            image = np.full((size, size, 3), 255, np.uint8)
            return Example(image, NOTHING, np.empty(0, np.int64), np.empty((0, 0)), NOTHING)

    mined = [np.full((32, 32, 3), 128, np.uint8)]
    settings_ = TrainSettings(batch_mpx=0.5, stain_jitter=0.0, share_decided=0.3, share_mined=0.2)
    for decided, shares in ((Windows([one], 0.25), (0.3, 0.2)), (None, (0.0, 0.2))):
        images, _ = Batches(White(), settings_, variant, mined, decided)(np.random.default_rng(0))  # type: ignore[arg-type]
        means = images.mean((1, 2, 3))
        counted = (means < 70).mean(), ((means >= 70) & (means < 190)).mean()
        assert counted == pytest.approx(shares, abs=0.07)


def dotted(ink: tuple[int, int, int], seed: int) -> tuple[Slide, np.ndarray]:
    """Return a slide of 36 discs of one ink, and their boxes."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(TISSUE_GROUND) + rng.normal(0, 4, (600, 600, 3)), 0, 255).astype(np.uint8)
    y, x = np.mgrid[:600, :600]
    at = np.mgrid[50:600:100, 50:600:100].reshape(2, -1).T + rng.integers(-20, 21, (36, 2))
    for at_x, at_y in at:
        pixels[np.hypot(x - at_x, y - at_y) <= 12] = ink
    return memory_slide(pixels, MPP), np.concatenate((at - 13, at + 13), 1).astype(np.float64)


@pytest.mark.cores
def test_what_was_rejected_is_unlearned(tmp_path: Path) -> None:
    """A network that learned violet discs takes brown ones for some, unless reviewers rejected brown ones."""
    (violet, xyxy), (brown, _) = dotted((60, 30, 90), 0), dotted((110, 60, 20), 1)
    path = Path(ss.scan(brown, ORACLE, out=tmp_path / "case", config=APART).path or "")
    decide(path, *["reject"] * 36)
    one, decided = load(path, brown)
    assert decided.rejected == 36
    annotated = Annotated(violet, xyxy, np.zeros(36, np.int64), np.empty((36, 0)), NOTHING, "p")
    known = Windows([annotated], MPP)

    class Violet:
        def example(self, rng: np.random.Generator, size: int) -> Example:
            return known.window(rng, size)

    small = {"batch_mpx": 0.03, "width": 0.25, "warmup_steps": 5, "ema": 0.9, "device": "cpu", "object_um": 13.0}
    settings_ = SETTINGS.model_copy(update={**small, "share_decided": 0.5, "stain_jitter": 0.0})
    variant = VariantSettings(mpp=MPP, input_px=128, tile_px=[128], steps=80, lr=5e-3)
    scores = []
    for around in (None, Windows([one], MPP)):
        batches = Batches(Violet(), settings_, variant, decided=around)  # type: ignore[arg-type]
        checkpoint = tmp_path / f"{around is None}.safetensors"
        network = train(_network(settings_, variant, None), batches, settings_, variant, checkpoint=checkpoint, log=str)
        for slide in (violet, brown):
            rgb = slide.read(0, 0, 384, 384, slide.frame).rgb
            with torch.no_grad():
                found = network(torch.from_numpy(rgb / np.float32(255)).permute(2, 0, 1)[None])
            scores.append(float(found.logits.sigmoid().max()))
    violet_before, brown_before, violet_after, brown_after = scores
    assert min(violet_before, brown_before, violet_after) > 0.5
    assert brown_after < 0.2


# --- a run -----------------------------------------------------------------------------------------------------------


def test_what_is_measured_on_was_not_decided_on(run: Path, slide: Slide) -> None:
    """Neither the slide, under any name, nor another one of the patient."""
    decide(run, "accept")
    _, decided = load(run, slide)
    other = memory_slide(np.zeros((64, 64, 3), np.uint8), MPP)

    def measured(slide: Slide, patient: str) -> list[Annotated]:
        return [Annotated(slide, NOTHING, np.empty(0, np.int64), np.empty((0, 0)), NOTHING, patient)]

    decided.refuse_leaks(validation=measured(other, "x"), test=[])
    with pytest.raises(ConfigError, match="decisions and test: expected no slide in both, found 1"):
        decided.refuse_leaks(validation=measured(other, "x"), test=measured(slide, "y"))
    with pytest.raises(ConfigError, match="decisions and validation: expected no patient in both, found 1"):
        decided.refuse_leaks(validation=measured(other, "case"), test=[])


def test_a_run_goes_on_with_the_same_decisions(run: Path, slide: Slide, tmp_path: Path) -> None:
    """What is written names nobody; before the first checkpoint anything goes, after it nothing else."""
    out = tmp_path / "model"
    out.mkdir()
    decide(run, "accept", who="Dr. Who")
    _, first = load(run, slide)
    keep_decided(first, out)
    keep_decided(None, out)
    assert not (out / "decisions.json").exists()
    keep_decided(first, out)
    (out / "losses-0.25.safetensors").touch()
    keep_decided(load(run, slide)[1], out)
    told = (out / "decisions.json").read_text()
    assert json.loads(told)["accepted"] == 1
    assert "Who" not in told
    assert str(tmp_path) not in told
    decide(run, "", "reject")
    with pytest.raises(ConfigError, match="expected those it was begun with, got others"):
        keep_decided(load(run, slide)[1], out)
    with pytest.raises(ConfigError, match="got none"):
        keep_decided(None, out)
    (out / "decisions.json").unlink()
    with pytest.raises(ConfigError, match="expected none, as before, got others"):
        keep_decided(first, out)


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of an archive, of which the discs on the left are taken for real, and two annotated ones."""
    root = tmp_path_factory.mktemp("archive")
    (root / "runs" / "records").mkdir(parents=True)
    for name, seed in (("a", 1), ("b", 2)):
        write_slide(root / "in" / f"{name}.tif", seed)
        path = root / "runs" / "slides" / name
        found = ss.scan(root / "in" / f"{name}.tif", ORACLE, out=path, config=APART)
        told = {"best_evidence": found.regions[0].evidence, "flagged_regions": len(found.regions)}
        Record(name, f"site {name}", "key", "done", told=told).save(root / "runs" / "records")
    looked = ss.review(ss.open_archive(root / "runs"), reviewer="ann")
    for item in looked.items():
        looked.decide(item.id, "accept" if item.box_l0.x0 < 450 else "reject")
    for name, seed in (("c", 3), ("d", 4)):
        write_slide(root / "data" / f"{name}.tif", seed)
        box = (400.0, 300.0, 425.0, 325.0)
        write_geojson(root / "data" / f"{name}.geojson", [Feature("annotation", box, "disc")])
    (root / "train.yaml").write_text(
        "data: data\nclasses: [disc]\ndecisions: runs\ndecision_slides: in\nvariants: [{mpp: 0.5, steps: 2}]\n",
        encoding="utf-8",
    )
    return root


def trained(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """Train through the command line; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["slidescan", "train", *map(str, options), "--smoke"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.cores
def test_training_with_decisions(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what it learns from, and so does the model's card; without them it is another run."""
    assert trained(monkeypatch, archive / "train.yaml", "-o", tmp_path / "model") == 0
    said = capsys.readouterr().out
    counts = load_decided(archive / "runs", str(archive / "in"), SETTINGS)
    assert f"decisions: {counts.accepted} accepted, {counts.rejected} rejected, on 2 slides" in said
    card = json.loads((tmp_path / "model" / "0.5" / "slidescan.json").read_text())
    assert card["training"]["accepted"] == counts.accepted > 0
    assert card["training"]["rejected"] == counts.rejected > 0
    assert counts.accepted + counts.rejected == 24
    text = (archive / "train.yaml").read_text().replace("decisions: runs\ndecision_slides: in\n", "")
    (archive / "plain.yaml").write_text(text)
    assert trained(monkeypatch, archive / "plain.yaml", "-o", tmp_path / "model") == 2
    assert "those it was begun with, got none" in capsys.readouterr().err


def test_a_run_that_cannot_learn_from_decisions_says_so(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without slides, with slides and no decisions, and where a decided slide is measured on: one line each."""
    plain = tmp_path / "plain.yaml"
    shutil.copytree(archive / "in", tmp_path / "data")
    for name in "ab":
        box = (400.0, 300.0, 425.0, 325.0)
        write_geojson(tmp_path / "data" / f"{name}.geojson", [Feature("annotation", box, "disc")])
    plain.write_text("data: data\nclasses: [disc]\nvariants: [{mpp: 0.5, steps: 2}]\n")
    runs, slides = ("--add-decisions", archive / "runs"), ("--slides", archive / "in")
    for options, expected in (
        (runs, "add --slides"),
        (slides, "--slides: expected --add-decisions with it"),
        ((*runs, *slides), "decisions and validation: expected no slide in both"),
        ((*runs, "--slides", archive / "data"), "expected where the pixels of 'a' are"),
    ):
        assert trained(monkeypatch, plain, "-o", tmp_path / "model", *options) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line


def test_paths_in_settings_are_taken_from_the_file(tmp_path: Path) -> None:
    """As `data` is; a URL stays what it is."""
    path = tmp_path / "train.yaml"
    for slides, expected in (("in/*.svs", str(tmp_path / "in/*.svs")), ("s3://slides/x", "s3://slides/x")):
        path.write_text(f"decisions: runs\ndecision_slides: {slides}\nvariants: [{{steps: 1}}]\n")
        loaded = load_settings(path)
        assert (loaded.decisions, loaded.decision_slides) == (tmp_path / "runs", expected)


@pytest.mark.cores
def test_what_decisions_teach_can_be_measured() -> None:
    """The pipeline runs at its smallest size, from phantoms to the table."""
    command = [sys.executable, ROOT / "pipelines" / "learn_decisions.py", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(before|after) \|", done.stdout, re.MULTILINE) == ["before", "after"]
