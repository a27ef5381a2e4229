"""What reviewers said becomes objects, rejected places and what counts neither way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import slidescan as ss
from slidescan.errors import ConfigError, ResultError
from slidescan.reviews.case import Case
from slidescan.saved import save_result
from slidescan.slides import Slide, memory_slide
from slidescan.train.decided import load_decided
from tests.archives import write_slide
from tests.decided.saying import SETTINGS, boxes_of, centres, decide, load, old
from tests.discs import ORACLE, config, discs
from tests.reviewed import APART, copied


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
        (path / "manifest.json").unlink()  # as a scan does that replaces a result
        save_result(more, path, lambda: __import__("PIL.Image").Image.new("RGB", (8, 8)))
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
        (None, "or --slides on the command line"),
        (tmp_path / "other.tif", "got one of other content"),
        (memory_slide(image, 0.25), "open it with mpp=0.5"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            load_decided(run, slides, SETTINGS)
        assert "\n" not in str(caught.value)
    with pytest.raises(ResultError):
        load_decided(tmp_path, slide, SETTINGS)
