"""What becomes of decisions after a review: another scan of the slide, and exports."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import shapely

import slidescan as ss
from slidescan import cli
from slidescan.detections import Detections
from slidescan.errors import ResultError
from slidescan.flagged import flag_regions
from slidescan.geometry import Frame
from slidescan.reviews.selection import decided
from slidescan.reviews.start import open_runs
from slidescan.slides import Slide
from tests.discs import ORACLE, config, discs
from tests.reviewed import APART, lines


def moved(result: ss.ScanResult, slide: Slide, **changed: object) -> ss.ScanResult:
    """Scan the slide anew into the same directory with a detector that sees a little otherwise: all ids differ."""
    detector = replace(ORACLE, jitter_px=3.0)
    return ss.scan(slide, detector, out=result.path, config=config(**changed), overwrite=True)


def test_decisions_find_their_place_after_another_scan(result: ss.ScanResult, slide: Slide) -> None:
    """Another model has other ids: decisions are re-attached, undo reaches them, and nothing is written by itself."""
    ann = ss.review(result, reviewer="ann")
    at = [item.box_l0 for item in ann.items()]
    for number, item in enumerate(ann.items()[:5]):
        ann.decide(item.id, "accept", note=str(number))
    ss.review(result, reviewer="ben").decide(item.id, "unsure")
    before = lines(result)
    looked = ss.review(moved(result, slide, flagged__link_um=10.0, flagged__margin_um=5.0), reviewer="ann")
    assert not {item.id for item in looked.items()} & {item.id for item in ann.items()}
    assert (looked.left, looked.reattached, looked.orphaned) == (7, 6, 0)
    for item in looked.items(decision="accept"):
        old = at[int(looked.decision(item.id).note)]
        assert abs(old.x0 - item.box_l0.x0) + abs(old.y0 - item.box_l0.y0) < 8
    assert looked.table()["reattached"].sum() == 5
    assert lines(result) == before
    fifth = next(item.id for item in looked.items() if (said := looked.decision(item.id)) and said.note == "4")
    looked.decide(fifth, "reject")  # the last word on this place, under whatever id
    assert ss.review(ss.load_result(result.path), reviewer="ann").decision(fifth).decision == "reject"
    assert looked.decisions(fifth)["ben"].decision == "unsure"
    assert (looked.undo(), looked.decision(fifth).note, looked.undo(), looked.left) == (fifth, "4", fifth, 8)


def test_a_region_of_very_many_finds_its_place(tmp_path: Path) -> None:
    """More than a page shows of it: all of them are told from another scan's."""
    slide, _ = discs(n=230, size_wh=(2600, 2600))
    whole = {"flagged__link_um": 1000.0, "flagged__max_um": 9000.0}
    first = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(**whole))
    assert [region.n for region in first.regions] == [230]
    looked = ss.review(first, reviewer="ann")
    looked.decide(looked.items()[0].id, "accept")
    again = moved(first, slide, **whole)
    after = ss.review(again, reviewer="ann")
    assert (after.left, after.reattached, after.orphaned) == (0, 1, 0)
    assert len(decided(again, "accepted")) == 231


def test_what_was_accepted_is_of_the_class_that_was_shown(
    result: ss.ScanResult, slide: Slide, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model with another name for it does not change what a reviewer has said, in the review or in an export."""
    ann = ss.review(result, reviewer="ann")
    assert {item.label for item in ann.items()} == {"disc"}
    ann.decide(ann.items()[0].id, "accept")
    monkeypatch.setattr(type(ORACLE), "classes", ("lymphocyte",))
    other = replace(ORACLE, jitter_px=3.0)
    after = ss.scan(slide, other, out=result.path, config=APART, overwrite=True)
    looked = ss.review(after, reviewer="ann")
    (item,) = looked.items(decision="accept")
    assert (item.label, looked.decision(item.id).label) == ("lymphocyte", "disc")
    table = looked.table().set_index("id").loc[item.id]
    assert (table["label"], table["decided_label"]) == ("lymphocyte", "disc")
    assert decided(after, "accepted")[item.id] == "disc"


def test_decisions_without_a_place_are_counted_and_kept(result: ss.ScanResult, slide: Slide) -> None:
    """Regions that became one are to be decided on, what was in them is; on another slide no decision has a place."""
    ann = ss.review(result, reviewer="ann")
    for item in ann.items():
        ann.decide(item.id, "accept")
    again = moved(result, slide, flagged__link_um=1000.0)
    looked = ss.review(again, reviewer="ann")
    alone = sum(region.n == 1 for region in again.regions)
    assert len(looked) == len(again.regions) < 12
    assert (looked.reattached, looked.orphaned, looked.left) == (alone, 12 - alone, len(looked) - alone)
    assert len(set(decided(again, "accepted")) & set(again.ids)) == 12
    other, _ = discs(n=12, size_wh=(900, 700), seed=1)
    looked = ss.review(moved(result, other), reviewer="ann")
    assert (looked.reattached, looked.orphaned) == (0, 12)
    assert looked.left == len(looked)
    assert len(lines(result)) == 12


def test_a_decision_on_something_else_is_not_taken_for_one_on_what_stayed(result: ss.ScanResult) -> None:
    """A region kept its id, and a place within it, decided on by itself then, is gone: that decision has no place."""
    ann = ss.review(result, reviewer="ann")
    stayed, other = ann.items()[:2]
    ann.decide(stayed.id, "accept")
    ann.decide(other.id, "reject", note="debris")
    first, second = lines(result)
    second |= {"region": "00000000-0000-5000-8000-000000000000", "box_l0": first["box_l0"]}
    assert result.path is not None
    told = [json.dumps(line | {"run_key": "of another scan"}) + "\n" for line in (first, second)]
    (result.path / "decisions.jsonl").write_text("".join(told))
    looked = ss.review(result, reviewer="ann")
    assert looked.decision(stayed.id).decision == "accept"
    assert (looked.reattached, looked.orphaned) == (0, 1)


def test_a_reviewers_class_is_exported(result: ss.ScanResult, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the region, of the detection alone in it, and of one decided on by itself; the others keep the detector's."""
    ann, run = ss.review(result, reviewer="ann"), result.path
    assert run is not None
    ids = [item.id for item in ann.items()][:3]
    for id_, label in zip(ids, ("apoptotic body", None, None), strict=True):
        ann.decide(id_, "accept", label=label)
    alone = ss.review(result, of="detections", reviewer="ann")
    homes = {item.id: result.ids[int(item.rows[0])] for item in ann.items()}  # all were found, each alone
    alone.decide(homes[ids[2]], "accept", label="lymphocyte")
    regions, found = exported(monkeypatch, run, "--decisions", "accepted")
    assert (regions, found) == (set(ids), {homes[id_] for id_ in ids})
    told = {f["id"]: f["properties"] for f in json.loads((run / "out.geojson").read_text())["features"]}
    names = {id_: each["classification"]["name"] for id_, each in told.items()}
    assert [names[id_] for id_ in ids] == ["apoptotic body", "disc", "disc"]
    assert [names[homes[id_]] for id_ in ids] == ["apoptotic body", "disc", "lymphocyte"]
    assert "apoptotic body" in told[ids[0]]["name"]
    monkeypatch.setattr(sys, "argv", f"slidescan export {run} -f csv -o {run}/x.csv --decisions accepted".split())
    with pytest.raises(SystemExit):
        cli.main()
    rows = {row["id"]: row["label"] for row in csv.DictReader((run / "x.csv").read_text().splitlines())}
    assert rows == {homes[id_]: names[homes[id_]] for id_ in ids}


def test_what_nobody_was_shown_is_not_accepted(result: ss.ScanResult) -> None:
    """A region is of what was found; below the threshold there may be more within its outline."""
    ann = ss.review(result, reviewer="ann")
    for item in ann.items():
        ann.decide(item.id, "accept")
    found = [result.ids[row] for row in np.flatnonzero(result.detections.score >= result.threshold)]
    assert set(decided(result, "accepted")) == {item.id for item in ann.items()} | set(found)
    doubtful = replace(result.detections, score=np.full(len(result.detections), result.threshold / 2, np.float32))
    assert decided(replace(result, detections=doubtful), "accepted") == {}


@pytest.mark.parametrize("verdict", ["accept", "reject"])
def test_what_a_later_scan_adds_to_a_region_was_not_decided(
    result: ss.ScanResult, slide: Slide, verdict: Literal["accept", "reject"]
) -> None:
    """Regions that became one: what was decided on is, and neither the others nor the whole of it."""
    ann, which = ss.review(result, reviewer="ann"), {"accept": "accepted", "reject": "rejected"}[verdict]
    ann.decide(ann.items()[0].id, verdict)
    box = ann.items()[0].box_l0
    again = moved(result, slide, flagged__link_um=1000.0)
    (id_,) = decided(again, which)
    x, y = again.detections.centers[again.ids.index(id_)].tolist()
    assert box.x0 < x < box.x1
    assert box.y0 < y < box.y1
    looked = ss.review(again, reviewer="ann")
    assert looked.left == len(looked)
    rows = {item.id: item.rows.tolist() for item in looked.items()}
    region = next(
        item
        for item in looked.items()
        if again.found.xyxy[rows[item.id]].tolist().count(again.detections.xyxy[again.ids.index(id_)].tolist())
    )
    looked.decide(region.id, verdict)
    assert len(decided(again, which)) == 1 + region.n > 2


def test_a_detection_is_not_taken_for_its_neighbour(result: ss.ScanResult) -> None:
    """Debris at the edge of a cell, in its box, was rejected; it is gone, and the cell was not decided on."""
    ann = ss.review(result, reviewer="ann", of="detections")
    cell, other = ann.items()[:2]
    ann.decide(other.id, "reject", note="debris")
    (line,) = lines(result)
    box = cell.box_l0
    at = [box.x0, box.y0, box.x0 + 0.3 * (box.x1 - box.x0), box.y0 + 0.3 * (box.y1 - box.y0)]
    gone = {"region": "00000000-0000-5000-8000-000000000000", "run_key": "of another scan"}
    assert result.path is not None
    for box_l0, reattached in ((at, 0), ([box.x0 + 2, box.y0, box.x1 + 2, box.y1], 1)):
        (result.path / "decisions.jsonl").write_text(json.dumps(line | gone | {"box_l0": box_l0}) + "\n")
        looked = ss.review(result, reviewer="ann", of="detections")
        assert looked.reattached == reattached
        assert (looked.decision(cell.id) is None) == (reattached == 0)


def test_where_outlines_overlap_each_detection_is_of_one_region() -> None:
    """Where a cluster too wide is cut, both outlines hold what lies there, and it is of the part that counts it."""
    rng = np.random.default_rng(0)
    xy = rng.uniform(200, 3800, (300, 2))
    found = Detections.build(np.concatenate((xy - 10, xy + 10), 1), rng.uniform(0.6, 0.9, 300))
    regions = flag_regions(
        found, Frame((4000, 4000), 0.5), ("disc",), threshold=0.5, link_um=150, max_um=600, margin_um=15
    )
    outlines = [shapely.Polygon(region.polygon_l0) for region in regions]
    assert sum(sum(outline.covers(shapely.Point(at)) for outline in outlines) for at in found.centers) > len(found)
    assert sorted(row for region in regions for row in region.rows) == list(range(len(found)))
    for region in regions:
        assert len(region.rows) == region.n
        assert found.score[region.rows].max() == pytest.approx(region.peak)


def exported(monkeypatch: pytest.MonkeyPatch, run: Path, *options: str) -> tuple[set[str], set[str]]:
    """Export through the command line; return the ids of regions and detections."""
    out = run / "out.geojson"
    monkeypatch.setattr(sys, "argv", ["slidescan", "export", str(run), "-o", str(out), *options])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    features = json.loads(out.read_text())["features"]
    kinds = ("annotation", "detection")
    regions, found = ({f["id"] for f in features if f["properties"]["objectType"] == kind} for kind in kinds)
    return regions, found


def test_export_of_what_was_decided(
    result: ss.ScanResult, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Regions decided so with their detections, under the same ids; the later of two reviewers counts."""
    ann, ben = (ss.review(result, reviewer=name) for name in ("ann", "ben"))
    run = result.path
    assert run is not None
    ids = [item.id for item in ann.items()]

    def refused(*options: str) -> str:
        monkeypatch.setattr(sys, "argv", ["slidescan", "export", str(run), "-o", str(run / "x.geojson"), *options])
        with pytest.raises(SystemExit):
            cli.main()
        return capsys.readouterr().err

    assert "no decisions.jsonl there; review the result first" in refused("--decisions", "accepted")
    for id_ in ids[:3]:
        ann.decide(id_, "accept")
    ben.decide(ids[0], "reject")
    centres = dict(zip(result.ids, result.detections.centers, strict=True))

    def inside(*chosen: str) -> set[str]:
        at = [item.box_l0 for item in ann.items() if item.id in chosen]
        return {id_ for id_, (x, y) in centres.items() if any(b.x0 < x < b.x1 and b.y0 < y < b.y1 for b in at)}

    accepted = exported(monkeypatch, run, "--decisions", "accepted")
    assert accepted == (set(ids[1:3]), inside(*ids[1:3]))
    assert len(accepted[1]) == 2
    assert exported(monkeypatch, run, "--decisions", "rejected") == ({ids[0]}, inside(ids[0]))
    assert exported(monkeypatch, run, "--decisions", "unsure") == (set(), set())
    of_ann = exported(monkeypatch, run, "--decisions", "accepted", "--reviewer", "ann", "--top-k", "2")
    assert of_ann[0] == set(ids[:2])
    assert len(of_ann[1]) == 2
    assert exported(monkeypatch, run) == (set(ids), set(result.ids))
    # A detection decided on by itself.
    alone = ss.review(result, of="detections", reviewer="ann")
    (in_second,), (in_last,) = inside(ids[1]), inside(ids[-1])
    alone.decide(in_second, "reject")
    alone.decide(in_last, "accept")
    assert exported(monkeypatch, run, "--decisions", "accepted")[1] == inside(ids[2]) | {in_last}
    assert exported(monkeypatch, run, "--decisions", "rejected") == ({ids[0]}, inside(ids[0]) | {in_second})
    monkeypatch.setattr(sys, "argv", f"slidescan export {run} -f csv -o {run}/x.csv --decisions rejected".split())
    with pytest.raises(SystemExit):
        cli.main()
    assert len((run / "x.csv").read_text().splitlines()) == 3
    capsys.readouterr()
    assert "expected accepted, rejected or unsure, got 'maybe'" in refused("--decisions", "maybe")
    assert "decided here (ann, ben), got 'cat'" in refused("--decisions", "accepted", "--reviewer", "cat")
    assert "--reviewer goes with --decisions" in refused("--reviewer", "ann")


def test_what_is_neither_a_result_nor_an_archive_is_said(tmp_path: Path) -> None:
    """A scan that has not finished looks like an empty directory."""
    with pytest.raises(ResultError, match="found neither; if a scan writes there, it has not finished"):
        open_runs(tmp_path)
    with pytest.raises(ResultError, match="found neither; there is no such directory"):
        open_runs(tmp_path / "nowhere")
