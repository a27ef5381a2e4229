"""What is told of slides and of a whole archive, from records alone."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from slidescan.archive import Entry
from slidescan.archive.record import REASONS, Record
from slidescan.archive.slide import SlideTask
from slidescan.archive.status import standing
from slidescan.archive.unfinished import UNFINISHED, begin, end
from tests.discs import ORACLE, config

ROOT = Path(__file__).parents[1]


def began(out: Path, at: float, share: list[str] | dict[str, str], *, to_do: list[str] | None = None) -> Path:
    """Put a run on record that began at some time."""
    (out / UNFINISHED).mkdir(exist_ok=True)
    file = begin(
        out, share if isinstance(share, dict) else dict.fromkeys(share, ""), share if to_do is None else to_do, 1
    )
    file.write_text(json.dumps({**json.loads(file.read_text()), "at": at}))
    return file


@pytest.mark.parametrize(
    ("told", "reason"),
    [
        ({"analysed_fraction": 1.0, "read_failed_boxes": 0, "other_images": 0}, None),
        ({"analysed_fraction": 0.91, "read_failed_boxes": 7, "other_images": 1}, "decode_holes"),
        ({"analysed_fraction": 1.0, "read_failed_boxes": 0, "other_images": 2}, "more_images"),
        ({"analysed_fraction": None, "read_failed_boxes": 0, "other_images": 0}, "no_tissue"),
    ],
)
def test_a_slide_is_done_with_a_caveat(tmp_path: Path, told: dict[str, object], reason: str | None) -> None:
    task = SlideTask(Entry("a", "a.svs"), ORACLE, config(), tmp_path, "key")
    record = task.done(told)
    assert (record.state, record.reason, record.attempts) == ("done", reason, 1)
    assert ("91.00% of the tissue" in record.message) == (reason == "decode_holes")
    assert standing([record], tmp_path).caveats == ({reason: 1} if reason else {})


def test_rates_are_of_the_runs_that_are_on(tmp_path: Path) -> None:
    """Two of three jobs are on, one was killed days ago, one, too, and taken up again; models scored half the time."""
    began(tmp_path, 0, ["500", "1100"])
    began(tmp_path, 10, ["c"])
    began(tmp_path, 1_000, ["500", "1100"])
    began(tmp_path, 1_010, ["1050", "b"])
    end(began(tmp_path, 1_020, ["d"]), finished=True)
    (tmp_path / "log.jsonl").write_text('{"at": 1020, "event": "run_started", "slides": 9}\n{"event": "run_')
    told = {"stages_s": {"model": 40.0, "decode": 9.0, "batch": 10.0}, "megapixels": 30.0}
    records = [Record(str(at), "", "k", "done", finished_s=at, told=told) for at in (500, 1_050, 1_100)]
    now = standing(records, tmp_path)
    assert (now.slides, now.done, now.left, now.running) == (9, 2, 7, True)
    assert (now.slides_per_h, now.megapixels_per_s, now.busy) == (72.0, 0.6, 0.5)
    assert now.seconds_left == 50 * 7
    failed = [replace(record, state="failed", reason="not_found") for record in records]
    assert standing(failed, tmp_path).slides_per_h is None


def test_a_slide_under_another_id_is_not_waited_for(tmp_path: Path) -> None:
    """Its run was killed; since then another slide of its name was listed, and both have ids that tell them apart."""
    began(tmp_path, 1_000, {"case": "here"})
    began(tmp_path, 2_000, {"case-1": "here", "case-2": "there"})
    records = [Record(f"case-{n}", "", "k", "done", finished_s=2_010) for n in (1, 2)]
    now = standing(records, tmp_path)
    assert (now.slides, now.done, now.left) == (2, 2, 0)


@pytest.mark.parametrize("state", ["done", "failed"])
def test_what_is_done_anew_is_not_done_yet(tmp_path: Path, state: str) -> None:
    """After a setting was changed, or to try again what failed: thirty of a hundred have been at so far."""
    began(tmp_path, 1_000, [str(n) for n in range(100)])
    reason = "read_error" if state == "failed" else None
    records = [Record(str(n), "", "k", state, reason, finished_s=5) for n in range(98)]
    records[:30] = [replace(each, finished_s=1_010 + n) for n, each in enumerate(records[:30])]
    records[0] = replace(records[0], state="done", reason=None)
    now = standing(records, tmp_path)
    counts = "30 done, 0 failed" if state == "done" else "1 done, 29 failed"
    assert f"100: {counts}, 70 to do" in now.lines()[0]
    assert now.seconds_left == pytest.approx(39 / 30 * 70)


def test_what_is_left_of_several_lists(tmp_path: Path) -> None:
    """Of two at once, one that was stopped, and one that was killed; until each is done, or listed once more."""
    first = began(tmp_path, 1_000, ["a", "b", "c"])
    second = began(tmp_path, 1_001, ["x", "y"])
    records = [Record("a", "", "k", "done", finished_s=1_010), Record("x", "", "k", "done", finished_s=1_011)]
    assert (standing(records, tmp_path).left, standing(records, tmp_path).running) == (3, True)
    end(second, finished=False)
    end(first, finished=False)
    now = standing(records, tmp_path)
    assert (now.slides, now.left, now.running) == (5, 3, False)
    assert now.lines()[-1].startswith("run         none is on")
    shorter = began(tmp_path, 2_000, ["b", "a"], to_do=["b"])
    assert standing(records, tmp_path).left == 3
    records.append(Record("b", "", "k", "done", finished_s=2_010))
    end(shorter, finished=True)
    now = standing(records, tmp_path)
    assert (now.slides, now.left, now.running) == (5, 2, False)  # c of the first list, y of the second
    last = began(tmp_path, 3_000, ["c"])
    end(first, finished=False)  # it is not brought back by a run that ends late
    end(last, finished=True)
    end(second, finished=True)
    assert not list((tmp_path / UNFINISHED).iterdir())


def test_the_readme_has_every_reason() -> None:
    text = (ROOT / "slidescan/archive/README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", text, re.MULTILINE))
    assert told == {reason: meaning for reason, (_, meaning) in REASONS.items()}


def test_a_reason_of_another_slidescan_is_told(tmp_path: Path) -> None:
    now = standing([Record("a", "", "k", "failed", "moonlight")], tmp_path)
    assert any("moonlight" in line for line in now.lines())
