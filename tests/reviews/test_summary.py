"""What a review tells of others, of itself in numbers, and of places; what a blinded one keeps to itself."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import slidescan as ss
from slidescan.errors import ConfigError
from slidescan.geometry import Box
from slidescan.reviews import Review
from slidescan.reviews.asked import NotThereError
from slidescan.reviews.chosen import nearest
from slidescan.reviews.desk import Desk
from slidescan.reviews.summary import notice, summary_of
from tests.reviewed import copied


def by(reviewer: str, case: Path, **options: Any) -> Review:
    return ss.review(ss.load_result(case, verify=False), reviewer=reviewer, **options)


def three_reviewers(case: Path) -> list[str]:
    """Ann, ben and cy decide; on the first and third item not alike. Return the ids by rank."""
    ids = [item.id for item in by("ann", case).items()]
    for name, verdicts in (("ann", "aar"), ("ben", "rau"), ("cy", "a")):
        looked = by(name, case)
        for id_, letter in zip(ids, verdicts, strict=False):
            verdict = {"a": "accept", "r": "reject", "u": "unsure"}[letter]
            looked.decide(id_, verdict, note=f"{name} saw it")  # type: ignore[arg-type]
    return ids


@pytest.fixture(scope="module")
def moved(scanned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ann's three decisions and ben's one, of a scan whose ids were others; and a line that was cut off."""
    case = Path(shutil.copytree(scanned, tmp_path_factory.mktemp("moved") / "case"))
    ann, ben = by("ann", case), by("ben", case)
    items = ann.items()
    for item in items[:3]:
        ann.decide(item.id, "accept")
    ben.decide(items[3].id, "reject")
    log = (case / "decisions.jsonl").read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    lines[0]["box_l0"] = [0.0, 0.0, 3.0, 3.0]  # where nothing was flagged
    for line in lines:
        line["region"], line["run_key"] = f"old {line['region']}", "another"
    (case / "decisions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + "half a li\n")
    return case


class TestOthers:
    def told(self, desk: Desk) -> dict[str, Any]:
        return {item["id"]: item for item in desk.answer("items", {"page": 0, "size": 100})["items"]}

    def test_what_others_decided_is_told(self, case: Path) -> None:
        """Name, verdict and note of each other reviewer, who decided last at the end; never the own."""
        ids = three_reviewers(case)
        told = self.told(Desk(by("ann", case)))
        assert told[ids[0]]["others"] == [
            {"reviewer": "ben", "decision": "reject", "note": "ben saw it"},
            {"reviewer": "cy", "decision": "accept", "note": "cy saw it"},
        ]
        assert [other["reviewer"] for other in told[ids[2]]["others"]] == ["ben"]
        assert told[ids[5]]["others"] == []
        desk = Desk(by("dan", case))
        answer = desk.answer("decide", {"id": ids[0], "decision": "unsure"})
        assert [other["reviewer"] for other in answer["item"]["others"]] == ["ann", "ben", "cy"]

    def test_a_blinded_review_tells_nothing_of_others(self, case: Path) -> None:
        """No answer names another reviewer, gives a verdict or a note of theirs, or sorts by them."""
        ids = three_reviewers(case)
        desk = Desk(by("ann", case, blinded=True))
        shown = self.told(desk)[ids[0]]["decided"]["event_id"]
        answers = [
            desk.answer("state", {}),
            desk.answer("items", {"page": 0, "size": 100}),
            desk.answer("summary", {}),
            desk.answer("decide", {"id": ids[0], "decision": "reject", "note": "mine", "over": shown}),
            desk.answer("undo", {}),
        ]
        text = json.dumps(answers)
        for word in ("ben", "cy", "cy saw it", "unsure saw", "kappa"):
            assert f'"{word}' not in text
        assert '"mine"' in text
        with pytest.raises(ConfigError, match="decision='disputed': would tell what others decided") as refused:
            desk.answer("items", {"page": 0, "size": 1, "decision": "disputed"})
        assert "\n" not in str(refused.value)
        with pytest.raises(ConfigError, match="blinded"):
            by("ann", case, blinded=True).items(decision="disputed")

    def test_disputed(self, case: Path) -> None:
        """What reviewers said differently with their last words, seen without opening the review anew."""
        looked = by("dan", case)
        desk = Desk(looked)
        assert desk.answer("items", {"page": 0, "size": 9, "decision": "disputed"})["total"] == 0
        ids = three_reviewers(case)
        told = desk.answer("items", {"page": 0, "size": 9, "decision": "disputed"})
        assert [item["id"] for item in told["items"]] == [ids[0], ids[2]]
        by("ben", case).decide(ids[0], "accept")
        looked.refresh()
        assert [item.id for item in looked.items(decision="disputed")] == [ids[2]]
        looked.decide(ids[1], "unsure")
        assert {item.id for item in looked.items("slide", decision="disputed")} == {ids[1], ids[2]}


class TestSummary:
    def test_counts_and_kappa(self, case: Path) -> None:
        """Each reviewer's counts, the own ones first; of each pair Cohen's kappa or why there is none; all JSON."""
        three_reviewers(case)
        desk = Desk(by("ben", case))
        told = desk.answer("summary", {})
        assert told["reviewers"] == [
            {"name": "ben", "accept": 1, "reject": 1, "unsure": 1, "left": 9},
            {"name": "ann", "accept": 2, "reject": 1, "unsure": 0, "left": 9},
            {"name": "cy", "accept": 1, "reject": 0, "unsure": 0, "left": 11},
        ]
        ann_ben, ann_cy, ben_cy = told["agreement"]
        # Observed 1/3; by chance (2·1 + 1·1 + 0·1) / 9.
        assert (ann_ben["reviewers"], ann_ben["n"], ann_ben["why"]) == (["ann", "ben"], 3, "")
        assert ann_ben["kappa"] == pytest.approx((1 / 3 - 3 / 9) / (1 - 3 / 9))
        assert (ann_cy["n"], ann_cy["kappa"]) == (1, None)
        assert ann_cy["why"].startswith("both said nothing but accept")
        assert (ben_cy["n"], ben_cy["kappa"]) == (1, 0)
        json.dumps(told, allow_nan=False)
        with pytest.raises(ConfigError, match="nothing"):
            desk.answer("summary", {"reviewer": "ann"})

    def test_of_one_who_has_decided_nothing(self, case: Path) -> None:
        told = summary_of(by("ann", case))
        assert told["reviewers"] == [{"name": "ann", "accept": 0, "reject": 0, "unsure": 0, "left": 12}]
        assert (told["agreement"], told["reattached"], told["orphaned"], told["unreadable"]) == ([], 0, 0, 0)

    def test_it_sees_what_others_did_meanwhile(self, case: Path) -> None:
        desk = Desk(by("ann", case))
        ids = three_reviewers(case)
        assert [each["left"] for each in desk.answer("summary", {})["reviewers"]] == [9, 9, 11]
        assert desk.answer("decide", {"id": ids[4], "decision": "accept"})["left"] == 8

    def test_blinded_it_is_of_oneself(self, case: Path) -> None:
        three_reviewers(case)
        told = Desk(by("ann", case, blinded=True)).answer("summary", {})
        assert told["reviewers"] == [{"name": "ann", "accept": 2, "reject": 1, "unsure": 0, "left": 9}]
        assert told["agreement"] == []


class TestMoved:
    def test_it_is_said(self, moved: Path) -> None:
        """How many decisions found their place after another scan, and how many did not; and lines that are none."""
        looked = by("ann", moved)
        told = summary_of(looked)
        assert (told["reattached"], told["orphaned"], told["unreadable"]) == (3, 1, 1)
        said = "3 decisions of an earlier scan were re-attached, 1 found no place"
        assert (notice(looked), Desk(looked).answer("state", {})["notice"]) == (said, said)

    def test_blinded_only_of_ones_own(self, moved: Path) -> None:
        assert notice(by("ann", moved, blinded=True)) == (
            "2 decisions of an earlier scan were re-attached, 1 found no place"
        )
        ben = by("ben", moved, blinded=True)
        assert notice(ben) == "1 decision of an earlier scan was re-attached"
        assert [summary_of(ben)[name] for name in ("reattached", "orphaned")] == [1, 0]
        assert notice(by("cy", moved, blinded=True)) == ""

    def test_nothing_found_a_place(self, scanned: Path, moved: Path, tmp_path: Path) -> None:
        case = copied(scanned, tmp_path)
        log = (moved / "decisions.jsonl").read_text().splitlines()
        (case / "decisions.jsonl").write_text(log[0] + "\n")
        assert notice(by("ann", case)) == "1 decision of an earlier scan found no place"

    def test_the_command_says_it(
        self, moved: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """One line before the URL."""
        from slidescan.cli_review import review
        from slidescan.reviews.server import ReviewServer

        monkeypatch.setattr(ReviewServer, "run", lambda self: self._socket.close())
        review(moved, slides=None, reviewer="ann", blinded=False, of="regions", port=0, top=None)
        lines = capsys.readouterr().out.splitlines()
        assert lines[1] == "3 decisions of an earlier scan were re-attached, 1 found no place"
        assert lines[2].startswith("http://127.0.0.1:")


class TestPlaces:
    def find(self, desk: Desk, **values: Any) -> int | None:
        return desk.answer("find", {"listing": self.listing, "slide": 0, "reach_l0": 0, **values})["index"]

    def test_an_item_is_found_by_where_it_is(self, case: Path) -> None:
        """At its middle, at its corners, and a little beside it where the reach is that far; the smaller one first."""
        desk = Desk(by("ann", case))
        told = desk.answer("items", {"page": 0, "size": 100, "sort": "slide"})
        self.listing = told["listing"]
        boxes = [Box(*item["box_l0"]) for item in told["items"]]
        for box in boxes:
            for x, y in (((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), (box.x0, box.y0), (box.x1, box.y1)):
                around = [(each.area, n) for n, each in enumerate(boxes) if each.grow(1e-9).intersects(Box(x, y, x, y))]
                assert self.find(desk, x_l0=x, y_l0=y) == min(around)[1]
        topmost = min((n for n, box in enumerate(boxes) if box.y0 > 2), key=lambda n: boxes[n].y0)
        above = {"x_l0": (boxes[topmost].x0 + boxes[topmost].x1) / 2, "y_l0": boxes[topmost].y0 - 1.5}
        assert self.find(desk, **above) is None
        assert self.find(desk, **above, reach_l0=2) == topmost
        assert self.find(desk, x_l0=0, y_l0=0, reach_l0=900) is not None

    def test_only_of_the_list(self, case: Path) -> None:
        desk = Desk(by("ann", case))
        item = desk.answer("items", {"page": 0, "size": 1})["items"][0]
        desk.answer("decide", {"id": item["id"], "decision": "accept"})
        self.listing = desk.answer("items", {"page": 0, "size": 1, "decision": "undecided"})["listing"]
        x0, y0, *_ = item["box_l0"]
        assert self.find(desk, x_l0=x0, y_l0=y0) is None

    def test_of_boxes_that_hold_it_the_smallest(self, case: Path) -> None:
        """A box that holds the place before one beside it, of equally near ones the smallest, of another slide none."""
        item = by("ann", case).items()[0]
        boxes = [Box(0, 0, 100, 100), Box(40, 40, 60, 60), Box(110, 0, 120, 10), Box(110, 0, 130, 30)]
        items = [replace(item, box_l0=box) for box in boxes]
        for xy, reach, number in (
            ((50, 50), 0, 1),
            ((10, 10), 50, 0),
            ((104, 5), 10, 0),
            ((107, 5), 10, 2),
            ((105, 60), 4, None),
            ((103, 104), 5, 0),
            ((103, 104.1), 5, None),
        ):
            assert nearest(items, "case", xy, reach) == number, (xy, reach)
        assert nearest(items, "other", (50, 50), 10) is None
        assert nearest([], "case", (50, 50), 10) is None

    def test_places_out_of_range(self, case: Path) -> None:
        desk = Desk(by("ann", case))
        self.listing = desk.answer("items", {"page": 0, "size": 1})["listing"]
        good = {"x_l0": 10, "y_l0": 10}
        assert self.find(desk, **good) is None
        hostile = (-1, 901, 10**30, float("nan"), float("inf"), "1", None, True, [1])
        for name in ("x_l0", "y_l0", "reach_l0"):
            for value in hostile:
                with pytest.raises(ConfigError, match=f"^{name}: expected a number from 0 to"):
                    self.find(desk, **{**good, name: value})
        for changed in ({"slide": 1}, {"slide": -1}, {"slide": None}, {"listing": -1}, {"path": "x"}):
            with pytest.raises(ConfigError):
                self.find(desk, **good, **changed)
        with pytest.raises(NotThereError, match="list anew"):
            self.find(desk, **good, listing=99)
