"""A review without a browser: the loop, what it shows of which pixels, other reviewers, archives."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

import slidescan as ss
from slidescan.archive.record import Record
from slidescan.errors import ConfigError, ResultError
from slidescan.reviews import Review
from slidescan.slides import Slide, memory_slide
from tests.archives import write_slide
from tests.discs import MPP, ORACLE, config
from tests.reviewed import APART, lines

ROOT = Path(__file__).parents[2]


def test_the_loop(result: ss.ScanResult) -> None:
    """Best first until none is left; what was decided is there in the next session, and not for another reviewer."""
    assert result.path is not None
    exported = json.loads((result.path / "flagged.geojson").read_text())["features"]
    looked = ss.review(result, reviewer="ann")
    assert [item.id for item in looked.items()] == [feature["id"] for feature in exported]
    assert [item.rank for item in looked.items()] == list(range(1, 13))
    seen = []
    while item := looked.next():
        assert looked.left == 12 - len(seen)
        looked.decide(item.id, "reject" if len(seen) % 3 else "accept", note=f"no. {len(seen)}")
        seen.append(item.id)
    assert seen == [item.id for item in looked.items()]
    again = ss.review(ss.load_result(result.path), reviewer="ann")
    assert (again.left, again.next(), repr(again)) == (0, None, "Review('ann', 12 items, 0 left)")
    assert [again.decision(id_).note for id_ in seen] == [f"no. {i}" for i in range(12)]
    assert len(again.items(decision="accept")) == 4
    other = ss.review(result, reviewer="ben")
    assert (other.left, other.decision(seen[0])) == (12, None)
    assert other.decision(seen[0], "ann").decision == "accept"
    told = lines(result)[0]
    assert (told["reviewer"], told["region"], told["decision"]) == ("ann", seen[0], "accept")
    assert told["run_key"] == result.provenance["run_key"]
    assert str(result.path.parent) not in (result.path / "decisions.jsonl").read_text()


def test_single_detections(result: ss.ScanResult) -> None:
    """The same, under the ids of detections.parquet; regions are another matter."""
    assert result.path is not None
    looked = ss.review(result, of="detections", reviewer="ann")
    table = pq.read_table(result.path / "detections.parquet")
    assert [item.id for item in looked.items("score")] == table["id"].to_pylist()
    looked.decide(looked.next().id, "unsure")
    assert ss.review(result, of="detections", reviewer="ann").left == 11
    regions = ss.review(result, reviewer="ann")
    assert (regions.left, regions.undo(), regions.reattached, regions.orphaned) == (12, None, 0, 0)


def test_deciding_again_and_undo(result: ss.ScanResult) -> None:
    """The last word counts; undo takes back the last act, then the one before, in a later session, too."""
    looked = ss.review(result, reviewer="ann")
    first, second = (item.id for item in looked.items()[:2])
    looked.decide(first, "accept")
    looked.decide(second, "unsure", label="apoptosis")
    looked.decide(first, "reject")
    ss.review(result, reviewer="ben").decide(first, "accept")
    assert looked.undo() == first
    assert looked.decision(first).decision == "accept"
    assert looked.decision(second).label == "apoptosis"
    again = ss.review(result, reviewer="ann")
    assert (again.undo(), again.undo(), again.undo()) == (second, first, None)
    assert again.left == 12
    assert [line["event"] for line in lines(result)] == ["decide"] * 4 + ["undo"] * 3
    assert again.decisions(first).keys() == {"ben"}


def test_orders_and_filters(result: ss.ScanResult) -> None:
    """Each order is what it says, each filter leaves what it says, and what is not one is one line."""
    looked = ss.review(result, reviewer="ann")
    scores = [item.score for item in looked.items("score")]
    assert scores == sorted(scores, reverse=True)
    doubts = [abs(item.score - 0.5) for item in looked.items("uncertainty")]
    assert doubts == sorted(doubts)
    assert looked.items("shuffled") != looked.items()
    assert looked.items("slide", slide="case", label="disc") == looked.items("slide")
    assert looked.items(min_score=scores[3])[-1].score >= scores[3]
    assert looked.next("uncertainty") == looked.items("uncertainty")[0]
    looked.decide(looked.next().id, "unsure")
    counts = [len(looked.items(decision=state)) for state in ("decided", "undecided", "accept", "reject", "unsure")]
    assert counts == [1, 11, 0, 0, 1]
    for wrong in ({"sort": "colour"}, {"decision": "maybe"}, {"slide": "other"}, {"label": "mitosis"}):
        with pytest.raises(ConfigError, match="expected one of"):
            looked.next(**wrong) if "decision" not in wrong else looked.items(**wrong)
    with pytest.raises(ConfigError, match="score from 0 to 1"):  # not "nothing is left"
        looked.next(min_score=90)
    some = looked.next().id
    for item_id, decision, more, said in (
        ("nothing", "accept", {}, "item_id"),
        (some, "yes", {}, "accept, reject or unsure"),
        (some, "accept", {"label": "a\nb"}, "label"),
        (some, "accept", {"note": "a" * 10_001}, "note"),
        (some, "accept", {"note": {"sure": 0.8}}, "note: expected text"),
        (some, "accept", {"note": None}, "note: expected text"),
        (some, "accept", {"note": "half \ud800"}, "note: expected text"),
    ):
        with pytest.raises(ConfigError, match=said):
            looked.decide(item_id, decision, **more)
    assert len(lines(result)) == 1


def test_the_next_is_the_first_that_is_left(result: ss.ScanResult) -> None:
    """Whatever was decided and undone before, here or by the same reviewer in another window."""
    rng, windows = np.random.default_rng(0), [ss.review(result, reviewer="ann") for _ in range(2)]
    for _ in range(80):
        looked = windows[int(rng.integers(2))]
        looked.refresh()
        for sort in ("evidence", "uncertainty"):
            assert looked.next(sort) == next(iter(looked.items(sort, decision="undecided")), None)
        act = rng.random()
        if act < 0.3:
            looked.undo()
        elif item := looked.next("uncertainty") if act < 0.8 else looked.items()[int(rng.integers(12))]:
            looked.decide(item.id, "accept")


def test_undo_takes_back_what_this_window_did_last(result: ss.ScanResult) -> None:
    """Another one of the same reviewer, a shared account's, has decided on other items since."""
    first, second = (ss.review(result, reviewer="ann") for _ in range(2))
    ids = [item.id for item in first.items()]
    for window, id_ in ((first, ids[0]), (first, ids[1]), (second, ids[2])):
        window.decide(id_, "accept")
    first.refresh()
    assert [first.undo() for _ in range(3)] == [ids[1], ids[0], ids[2]]  # and then what is the last of all


def test_a_blinded_review_tells_no_scores(result: ss.ScanResult, slide: Slide) -> None:
    """Neither items, table, text, figure nor log hold a score, and no order tells one; not even another's decision."""
    open_ = ss.review(result, reviewer="ann")
    best = open_.next()
    open_.decide(best.id, "accept")
    looked = ss.review(result, reviewer="ben", blinded=True, slides=slide)
    items = looked.items()
    assert {(item.score, item.evidence, item.rank) for item in items} == {(None, None, None)}
    assert {item.id for item in items} == {item.id for item in open_.items()}
    assert [item.id for item in items] not in ([i.id for i in open_.items(sort)] for sort in ("evidence", "score"))
    assert items == ss.review(result, reviewer="cat", blinded=True).items()
    looked.decide(best.id, "reject")
    assert looked.decision(best.id, "ann").score is None
    assert not {"score", "evidence", "rank"} & set(looked.table().columns)
    assert [(line["score"], line["evidence"]) for line in lines(result)] == [(best.score, best.evidence), (None, None)]
    told = repr((items, looked.table(everyone=True).to_dict("records"), looked.decisions(best.id)))
    assert f"{best.score:.4f}"[:6] not in told
    titles = [axes.get_title() for axes in looked.plot().axes]
    assert min(titles, key=lambda title: int(title.split()[0]))[0] == "1"
    assert not any("0." in title for title in titles)
    for hidden in ({"sort": "evidence"}, {"sort": "score"}, {"sort": "uncertainty"}, {"min_score": 0.5}):
        with pytest.raises(ConfigError, match="blinded"):
            looked.items(**hidden)


def test_a_blinded_review_has_nothing_in_order_of_rank(result: ss.ScanResult) -> None:
    """Neither the rows of an item's detections, best first, nor what was decided."""
    for item in (ann := ss.review(result, reviewer="ann")).items():
        ann.decide(item.id, "accept")
    blinded = ss.review(result, reviewer="ann", blinded=True)
    assert not any(len(item.rows) for item in blinded.items())
    assert list(blinded.ratings()) == sorted(item.id for item in ann.items())
    assert all(len(blinded.cases[item.slide_id].parts(item)) == item.n for item in blinded.items())


def test_a_blinded_reviewer_decides_before_others_are_heard(result: ss.ScanResult) -> None:
    """In whatever way it is asked, nothing tells what others said of what this reviewer has not decided on."""
    ben = ss.review(result, reviewer="ben")
    first, second = [item.id for item in ben.items()][:2]
    for id_ in (first, second):
        ben.decide(id_, "reject", note="debris")
    ann = ss.review(result, reviewer="ann", blinded=True)
    assert (ann.decisions(first), ann.decision(first, "ben"), ann.ratings(), ann.agreement()) == ({}, None, {}, ())
    assert "debris" not in ann.table(everyone=True).to_csv()
    ann.decide(first, "accept")
    assert set(ann.decisions(first)) == {"ann", "ben"}
    assert ann.ratings() == {first: {"ann": "accept", "ben": "reject"}}
    assert [kappa.n for kappa in ann.agreement()] == [1]


def test_two_reviewers_at_once(result: ss.ScanResult) -> None:
    """Each sees the other's decisions after refresh, and both agree as far as they do."""
    ann, ben = (ss.review(result, reviewer=name) for name in ("ann", "ben"))
    ids = [item.id for item in ann.items()]
    for i, id_ in enumerate(ids[:4]):
        ann.decide(id_, "accept" if i % 2 else "reject")
        ben.decide(id_, "accept" if i < 2 else "reject")
    ann.decide(ids[0], "accept")
    assert ben.decision(ids[0], "ann").decision == "reject"
    ben.refresh()
    assert ben.decision(ids[0], "ann").decision == "accept"
    assert list(ben.decisions(ids[0])) == ["ben", "ann"]
    assert ben.ratings() == ann.ratings()
    (kappa,) = ben.agreement()
    # Of a a r a against a a r r: 3 of 4 alike, by chance (3·2 + 1·2) / 16.
    assert (kappa.n, kappa.observed, kappa.expected, kappa.kappa) == (4, 0.75, 0.5, 0.5)


def test_table(result: ss.ScanResult) -> None:
    """A row an item in order, or an item and reviewer; null where nothing was decided."""
    looked = ss.review(result, reviewer="ann")
    first = looked.next()
    looked.decide(first.id, "reject", label="debris", note="blurred")
    ss.review(result, reviewer="ben").decide(first.id, "accept")
    looked.refresh()
    table = looked.table()
    assert table["rank"].tolist() == list(range(1, 13))
    row = table.iloc[0]
    assert (row["decision"], row["decided_label"], row["note"], row["reviewer"]) == (
        "reject",
        "debris",
        "blurred",
        "ann",
    )
    assert (row["x0"], row["y1"], row["reattached"]) == (first.box_l0.x0, first.box_l0.y1, False)
    assert table["decision"].isna().sum() == table["decided_at"].isna().sum() == table["reattached"].isna().sum() == 11
    assert row["decided_at"].timestamp() == pytest.approx(looked.decision(first.id).at, abs=1e-6)
    everyone = looked.table(everyone=True)
    assert everyone["reviewer"].tolist() == ["ann", "ben"]
    assert everyone.dtypes.equals(table.dtypes)


def test_crops_show_the_right_place(result: ss.ScanResult, slide: Slide) -> None:
    """At the slide's scale they are its pixels; at others the disc keeps its place and its µm; outside is white."""
    looked = ss.review(result, slides=slide, reviewer="ann")
    image = slide.read(0, 0, 900, 700, slide.frame).rgb
    padded = np.pad(image, ((100, 100), (100, 100), (0, 0)), constant_values=255)
    for item in looked.items():
        box = item.box_l0
        x, y = round((box.x0 + box.x1) / 2 - 64), round((box.y0 + box.y1) / 2 - 64)
        crop = looked.crop(item.id, fov_um=128 * MPP, px=128)
        np.testing.assert_array_equal(crop, padded[y + 100 : y + 228, x + 100 : x + 228])
        for px in (64, 256):  # coarser than the slide, and finer
            other = looked.crop(item.id, 128 * MPP, px)
            assert other.shape == (px, px, 3)
            dark = [np.argwhere(pixels.mean(2) < 128).mean(0) / len(pixels) for pixels in (crop, other)]
            np.testing.assert_allclose(*dark, atol=0.02)
        x0, y0, x1, y1 = looked.box_um(item.id, 64.0)
        assert (x1 - x0, y1 - y0) == pytest.approx((box.width * MPP, box.height * MPP))
        assert (x0 + x1, y0 + y1) == pytest.approx((64, 64))
    for wrong in ({"fov_um": 0}, {"fov_um": float("nan")}, {"px": 0}, {"px": 5000}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            looked.crop(item.id, **wrong)


@pytest.mark.parametrize("blinded", [False, True])
def test_a_crop_of_a_large_region_shows_a_detection(slide: Slide, tmp_path: Path, blinded: bool) -> None:
    """The best one; in a blinded review the one nearest to the region's middle, which tells no score."""
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(flagged__link_um=400.0))
    looked = ss.review(result, slides=slide, reviewer="ann", blinded=blinded)
    item = max(looked.items(), key=lambda item: item.n)
    box, centers = item.box_l0, result.found.centers
    assert max(box.width, box.height) * MPP > 64
    middle = np.array([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2])
    nearest = int(((centers - middle) ** 2).sum(1).argmin())
    shown = centers[nearest if blinded else 0]
    x0, y0, x1, y1 = looked.box_um(item.id)
    np.testing.assert_allclose(((x0 + x1) / 2 - 32, (y0 + y1) / 2 - 32), (middle - shown) * MPP, atol=0.01)
    assert looked.crop(item.id, px=128)[60:68, 60:68].mean() < 100
    _, *parts = looked.outlines_um(item.id)
    assert len(parts) == item.n
    assert any(np.allclose(part.mean(0), 32, atol=0.01) for part in parts)
    x0, y0, x1, y1 = looked.box_um(item.id, 2000.0)  # as it lies, where it fits
    np.testing.assert_allclose(((x0 + x1) / 2, (y0 + y1) / 2), 1000.0)


def test_pixels_of_no_other_slide_are_shown(result: ss.ScanResult, slide: Slide, tmp_path: Path) -> None:
    """Nothing without a slide, with another one or at another scale; the rest works."""
    image = slide.read(0, 0, 900, 700, slide.frame).rgb
    write_slide(tmp_path / "other.tif", seed=5)
    for slides, said in (
        (None, "pass slides="),
        (tmp_path / "other.tif", "got one of other content; give"),
        (memory_slide(image, 0.25), "open it with mpp=0.5"),
    ):
        looked = ss.review(result, slides=slides, reviewer="ann")
        with pytest.raises(ConfigError, match=said):
            looked.crop(looked.next().id)
        with pytest.raises(ConfigError, match=said):
            looked.plot(1)
    with pytest.raises(ConfigError, match="slides: expected 'case' or another that was scanned, got none of them"):
        ss.review(result, slides={"elsewhere": slide}, reviewer="ann")


def test_contact_sheet(result: ss.ScanResult, slide: Slide, tmp_path: Path) -> None:
    """Rank, score and decision of each, as asked; a picture comes out without a display."""
    looked = ss.review(result, slides=slide, reviewer="ann")
    looked.decide(looked.next().id, "accept")
    figure = looked.plot(5, columns=3)
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == f"1 · {looked.items()[0].score:.2f} · accept"
    assert [title.split()[0] for title in titles] == ["1", "2", "3", "4", "5"]
    assert [text.get_text() for text in figure.axes[0].texts] == ["20 µm"]
    figure.savefig(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 5000
    assert not looked.plot(0).axes


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides and a copy of the first, scanned as an archive lays them out."""
    root = tmp_path_factory.mktemp("archive")
    for name, seed in (("a", 1), ("b", 2)):
        write_slide(root / "in" / f"{name}.tif", seed)
        path = root / "runs" / "slides" / name
        found = ss.scan(root / "in" / f"{name}.tif", ORACLE, out=path, config=APART)
        (root / "runs" / "records").mkdir(exist_ok=True)
        told = {"best_evidence": found.regions[0].evidence, "flagged_regions": len(found.regions)}
        Record(name, f"site {name}", "key", "done", told=told).save(root / "runs" / "records")
    shutil.copytree(root / "runs" / "slides" / "a", root / "runs" / "slides" / "copy")
    Record("copy", "", "key", "done", told=told).save(root / "runs" / "records")
    return root


def test_archive(archive: Path, tmp_path: Path) -> None:
    """All regions of all slides, or the best; decisions lie beside each slide's result; pixels come from the list."""
    runs = tmp_path / "runs"
    shutil.copytree(archive / "runs", runs)
    shutil.rmtree(runs / "slides" / "copy")
    (runs / "records" / "copy.json").unlink()
    opened = ss.open_archive(runs)
    whole = ss.review(opened, reviewer="ann", slides=archive / "in")
    assert {item.slide_id for item in whole.items()} == {"a", "b"}
    assert len(whole.items(slide="a")) == len(opened.result("a").regions)
    best = ss.review(
        opened.top(5), reviewer="ann", slides={"a": archive / "in" / "a.tif", "b": archive / "in" / "b.tif"}
    )
    assert best.items() == whole.items()[:5]
    assert [(item.slide_id, item.rank) for item in best.items()] == [(r.slide_id, r.region.rank) for r in opened.top(5)]
    assert best.items()[0].group.startswith("site ")
    for item in whole.items():
        crop = whole.crop(item.id, 64.0, 128)
        assert crop[62:66, 62:66].mean() < 100
    first, second = (whole.items(slide=name)[0].id for name in "ab")
    for id_ in (first, second, first):
        whole.decide(id_, "accept")
    assert (runs / "slides" / "a" / "decisions.jsonl").read_bytes().count(b"\n") == 2
    assert [whole.undo() for _ in range(4)] == [first, second, first, None]
    whole.decide(second, "reject")
    assert ss.review(opened, reviewer="ann").left == len(whole) - 1
    assert ss.review(opened.top(0), reviewer="ann").next() is None
    titles = {axes.get_title().split()[0] for axes in whole.plot(len(whole)).axes}
    assert titles == {"a", "b"}


def test_two_results_of_one_slide_are_not_reviewed_at_once(archive: Path, tmp_path: Path) -> None:
    """A decision on a region of the one would be written to the other's log."""
    other = shutil.copytree(archive / "runs", tmp_path / "other")
    regions = [*ss.open_archive(archive / "runs").top(2), *ss.open_archive(other).top(2)]
    with pytest.raises(ConfigError, match="expected one result a slide, got two of"):
        ss.review(regions, reviewer="ann")


def test_a_slide_that_is_there_twice_is_reviewed_once(archive: Path) -> None:
    """One content, one set of ids, whatever the names."""
    opened = ss.open_archive(archive / "runs")
    looked = ss.review(opened, reviewer="ann")
    assert {item.slide_id for item in looked.items()} == {"a", "b"}


def test_what_cannot_be_reviewed_is_one_line(archive: Path, result: ss.ScanResult, slide: Slide) -> None:
    """Each says what was expected and what to do."""
    opened = ss.open_archive(archive / "runs")
    stale = [replace(opened.top(1)[0], result_path=result.path)]
    for what, options, said in (
        (replace(result, path=None), {}, "scan with out=DIR"),
        (str(result.path), {}, "load_result or open_archive"),
        (opened.top(2), {"of": "detections"}, "pass the archive"),
        (stale, {}, "scanned anew"),
        (result, {"of": "cells"}, "regions or detections"),
        (result, {"reviewer": " "}, "reviewer"),
        (opened, {"slides": slide}, "list of slides or a mapping"),
    ):
        with pytest.raises(ConfigError, match=said):
            ss.review(what, **options)
    assert ss.review(result).reviewer


KILLED = """
import os, signal, sys
import slidescan as ss
looked = ss.review(ss.load_result(sys.argv[1]), reviewer="ann")
for item in looked.items()[:3]:
    looked.decide(item.id, "accept")
assert "matplotlib" not in sys.modules
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_session_lost_nothing(result: ss.ScanResult) -> None:
    """SIGKILL right after a decision: all three are there."""
    done = subprocess.run([sys.executable, "-c", KILLED, result.path], check=False, cwd=ROOT, timeout=120)
    assert done.returncode == -signal.SIGKILL
    looked = ss.review(result, reviewer="ann")
    assert [item.rank for item in looked.items(decision="accept")] == [1, 2, 3]


def test_decide_says_that_it_could_not_be_saved(result: ss.ScanResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing was decided."""
    looked: Review = ss.review(result, reviewer="ann")

    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResultError, match="the decision was not saved: Permission denied"):
        looked.decide(looked.next().id, "accept")
    assert looked.left == 12
