"""Decisions outlast what befalls a process or a disk, fold as a simple model says, and agree as Cohen's paper says."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidescan.errors import ResultError
from slidescan.geometry import Box
from slidescan.reviews import Decision, ReviewItem, cohen_kappa, decisions
from slidescan.reviews.attach import reattach
from slidescan.reviews.decisions import DecisionLog, Standing, Undo, _line

ROOT = Path(__file__).parents[2]
SAID = ("accept", "reject", "unsure")


def decided(
    event_id: str, reviewer: str = "ann", region: str = "r0", decision: str = "accept", note: str = ""
) -> Decision:
    return Decision(
        event_id, 1.5, reviewer, "region", region, decision, None, note, Box(0, 1, 2, 3.25), 0.75, None, "k", "m", "s"
    )  # fmt: skip


def undone(event_id: str, undoes: str, reviewer: str = "ann") -> Undo:
    return Undo(event_id, 2.5, reviewer, undoes)


def read(path: Path) -> DecisionLog:
    log = DecisionLog(path)
    log.refresh()
    return log


def ids(log: DecisionLog) -> list[str]:
    return [decision.event_id for decision in log.standing.latest_first()][::-1]


# An act: who, on which region, what; or which of the acts so far to take back.
ACTS = st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from(SAID) | st.integers(0, 30)))


@given(ACTS)
def test_what_stands_is_what_a_list_would_say(acts: list[tuple[str, str, str | int]]) -> None:
    """After any decisions and undos, one's own or not, the last decision that was not undone stands."""
    standing, model = Standing(), []
    for number, (reviewer, region, act) in enumerate(acts):
        if isinstance(act, str):
            standing.add(decided(f"e{number}", reviewer, region, act))
            model.append((f"e{number}", reviewer, region, act))
        else:
            standing.add(undone(f"e{number}", f"e{act}", reviewer))
            model = [made for made in model if made[:2] != (f"e{act}", reviewer)]
        if number % 3 == 0:  # an event that is there twice
            standing.add(decided(f"e{number}", reviewer, region, "unsure"))
    last = {(reviewer, region): act for _, reviewer, region, act in model}
    assert {key: made.decision for key, made in standing.current().items()} == last
    assert [made.event_id for made in standing.latest_first()] == [event_id for event_id, *_ in model][::-1]
    assert set(standing.regions) == {region for _, _, region, _ in model}
    for region in "xyz":
        assert [m.event_id for m in standing.of(region)] == [event_id for event_id, _, at, _ in model if at == region]


@given(st.text(max_size=40), st.text(max_size=20))
def test_whatever_is_typed_comes_back(note: str, label: str) -> None:
    """Line ends, quotes, half surrogates and what looks like an event are a note like any other."""
    first = replace(decided("a", note=note + '{"schema": 1, "event": "undo"}\n'), label=label)
    with tempfile.TemporaryDirectory() as folder:
        log = DecisionLog(Path(folder, "decisions.jsonl"))
        log.append(first)
        log.append(decided("b"))
        back = list(read(log.path).standing.of("r0"))
        assert log.path.read_bytes().isascii()
    assert back == [replace(first, order=1), replace(decided("b"), order=2)]


@given(st.none() | st.lists(st.tuples(*[st.floats(-1e6, 1e6, width=32)] * 4), max_size=4), st.none() | st.text())
def test_what_was_seen_comes_back(boxes: list[tuple[float, float, float, float]] | None, label: str | None) -> None:
    """Boxes of the detections in a region, in their order, and the detector's class; not known is neither none."""
    parts = None if boxes is None else tuple(Box(*box) for box in boxes)
    made = replace(decided("a"), parts_l0=parts, detected_label=label)
    with tempfile.TemporaryDirectory() as folder:
        log = DecisionLog(Path(folder, "decisions.jsonl"))
        log.append(made)
        assert list(read(log.path).standing.of("r0")) == [replace(made, order=1)]


def test_lines_from_before_boxes_were_kept_are_read(tmp_path: Path) -> None:
    """What they do not hold is not known; boxes that are none make a line unreadable."""
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(replace(decided("a"), parts_l0=(), detected_label="disc"))
    line = json.loads(log.path.read_text())
    wrong = [
        {**line, "event_id": f"w{i}", "parts_l0": parts} for i, parts in enumerate(([[0, 1]], [[0, 0, 1, None]], 7))
    ]
    del line["parts_l0"], line["detected_label"]
    log.path.write_text("".join(json.dumps(each) + "\n" for each in ({**line, "event_id": "b"}, *wrong)))
    (back,) = read(log.path).standing.latest_first()
    assert (back.event_id, back.parts_l0, back.detected_label) == ("b", None, None)
    assert read(log.path).unreadable == 3


def test_a_line_cut_off_anywhere_costs_nothing_but_itself(tmp_path: Path) -> None:
    """What was written before and after is read; the next line begins on its own; no byte is taken back."""
    log = DecisionLog(tmp_path / "whole")
    log.append(decided("a"))
    begun = log.path.stat().st_size
    log.append(decided("b"))
    data = log.path.read_bytes()
    for end in range(begun, len(data)):
        path = tmp_path / f"cut{end}"
        path.write_bytes(data[:end])
        cut = read(path)
        cut.append(decided("c"))
        whole = end == len(data) - 1  # all but the line's end
        expected = ["a", "b", "c"] if whole else ["a", "c"]
        assert ids(cut) == ids(read(path)) == expected
        assert cut.unreadable == read(path).unreadable == (not whole and end > begun)
        assert path.read_bytes().startswith(data[:end])
        # Another process whose disk was full in the very moment: its half line, and this one right behind it.
        path.write_bytes(data[:end] + data[:begun].replace(b'"a"', b'"d"'))
        assert ids(read(path)) == (["a", "b", "d"] if whole else ["a", "d"])


def test_events_of_a_later_slidescan_are_kept_and_count_for_nothing(tmp_path: Path) -> None:
    """Other kinds, other schemas, and lines that are no events."""
    path = tmp_path / "decisions.jsonl"
    log = DecisionLog(path)
    log.append(decided("a"))
    line = json.loads(path.read_text())
    later = [{**line, "schema": 2, "event_id": "b"}, {**line, "event": "praise", "event_id": "c"}]
    broken = [
        {**line, "event_id": "d", "decision": "maybe"},
        {**line, "event_id": "e", "box_l0": [0, 0, math.inf, 1]},
        {**line, "event_id": "g", "box_l0": [0, 0, 10**400, 1]},
        {**line, "event_id": "h", "at": 10**400},
        {**line, "event_id": "i", "at": math.nan},
        {**line, "event_id": "j", "score": math.inf},
        {**line, "event_id": 7},
        {"schema": 1, "event": "decide"},
        [],
    ]
    text = "".join(json.dumps(each) + "\n" for each in later + broken) + "\n\xff{\n" + "[" * 100_000 + "\n"
    path.write_bytes(path.read_bytes() + text.encode("latin-1"))
    before = path.read_bytes()
    log.append(undone("z", "c"))
    log.append(decided("f"))
    assert ids(log) == ids(read(path)) == ["a", "f"]
    assert log.unreadable == len(broken) + 2
    assert path.read_bytes().startswith(before)


def test_an_older_copy_put_back_is_read_anew(tmp_path: Path) -> None:
    """What was restored from a backup is what stands."""
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(decided("a"))
    older = log.path.read_bytes()
    log.append(decided("b"))
    log.path.write_bytes(older)
    log.refresh()
    assert ids(log) == ["a"]


def test_a_larger_copy_put_there_is_read_anew(tmp_path: Path) -> None:
    """As a merge of two logs is: its lines are not those that were read."""
    log, other = DecisionLog(tmp_path / "decisions.jsonl"), DecisionLog(tmp_path / "other.jsonl")
    log.append(decided("a"))
    for name in "bca":
        other.append(decided(name))
    other.path.replace(log.path)
    log.refresh()
    assert sorted(ids(log)) == ["a", "b", "c"]


def test_what_could_not_be_flushed_was_not_decided(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk behind a network says so at the end; the line is there by then."""

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(decided("a"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ResultError, match="the disk is full"):
            log.append(decided("b"))
    log.refresh()
    assert ids(log) == ids(read(log.path)) == ["a"]


@pytest.mark.parametrize("change", [{"at": 1.7e18}, {"at": -1}, {"note": "\ud83d"}, {"reviewer": "\udc00bob"}])
def test_what_no_table_can_hold_is_no_line(tmp_path: Path, change: dict[str, object]) -> None:
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(decided("a"))
    told = json.loads(log.path.read_text()) | change
    with log.path.open("a") as file:
        file.write(json.dumps(told) + "\n")
    log.refresh()
    assert (ids(log), log.unreadable) == (["a"], 1)


def test_a_decision_is_on_the_disk_when_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One write, then the file's bytes are flushed, and with the first line the directory that names it."""
    done, write, fsync = [], os.write, os.fsync

    def written(descriptor: int, data: bytes) -> int:
        done.append("write")
        return write(descriptor, data)

    def flushed(descriptor: int) -> None:
        done.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)
        fsync(descriptor)

    monkeypatch.setattr(os, "write", written)
    monkeypatch.setattr(os, "fsync", flushed)
    log = DecisionLog(tmp_path / "decisions.jsonl")
    log.append(decided("a"))
    log.append(undone("b", "a"))
    assert done == ["write", "decisions.jsonl", tmp_path.name, "write", "decisions.jsonl"]


WRITERS = """
import os, sys
from pathlib import Path
from tests.reviews.test_decisions import DecisionLog, decided
begin, go = os.pipe()
children = []
for name in "pq":
    if not (child := os.fork()):
        log = DecisionLog(Path(sys.argv[1]))
        os.read(begin, 1)
        for i in range(200):
            log.append(decided(f"{name}{i}", name, f"r{i % 7}", note=name * (i % 90)))
        os._exit(0)
    children.append(child)
os.write(go, b"go")
sys.exit(any(os.waitpid(child, 0)[1] for child in children))
"""


def test_two_processes_never_mix_or_lose_lines(tmp_path: Path) -> None:
    """Each appends 200 events as fast as it can, from one start."""
    path = tmp_path / "decisions.jsonl"
    subprocess.run([sys.executable, "-c", WRITERS, path], check=True, cwd=ROOT, timeout=120)
    # A line may be empty: who finds the other's half written begins a new one behind it.
    lines = [line for line in path.read_text().splitlines() if line]
    assert len([json.loads(line) for line in lines]) == 400
    log = read(path)
    assert log.unreadable == 0
    for name in "pq":
        assert [made for made in ids(log) if made[0] == name] == [f"{name}{i}" for i in range(200)]


def test_an_append_waits_for_another_machines(tmp_path: Path) -> None:
    """As on NFS, where two that append at once overwrite each other; a lock held in this test stands for the other."""
    log = read(tmp_path / "log")
    log.append(decided("a"))
    with (tmp_path / "log").open("ab") as other, ThreadPoolExecutor() as pool:
        fcntl.flock(other, fcntl.LOCK_EX)
        ours = pool.submit(log.append, decided("b"))
        with pytest.raises(TimeoutError):
            ours.result(timeout=0.05)
        other.write(_line(decided("c")))
        other.flush()
        fcntl.flock(other, fcntl.LOCK_UN)
        ours.result(timeout=30)
    assert ids(read(tmp_path / "log")) == ["a", "c", "b"]


@pytest.mark.parametrize("locks", [True, False], ids=["held by one that was stopped", "of a disk without locks"])
def test_a_lock_that_cannot_be_had_keeps_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    log = read(tmp_path / "log")
    log.append(decided("a"))
    with (tmp_path / "log").open("ab") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        monkeypatch.setattr(decisions, "_LOCK_S", 0.0)
        if not locks:
            monkeypatch.setattr(fcntl, "flock", refuse)
        log.append(decided("b"))
    assert ids(read(tmp_path / "log")) == ["a", "b"]


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_directory_that_cannot_be_written_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """Nothing is decided, and the error says where, why and what to do."""

    def refuse(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    log = DecisionLog(tmp_path / "decisions.jsonl")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(ResultError, match=rf"decisions\.jsonl: the decision was not saved: {os.strerror(code)}; make"):
        log.append(decided("a"))
    assert not ids(log)
    assert not log.path.exists()


def test_a_full_disk_is_one_line_and_the_next_decision_begins_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Part of a line fits; once there is space again deciding goes on."""
    log, write = DecisionLog(tmp_path / "decisions.jsonl"), os.write
    log.append(decided("a"))
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:40]))
        with pytest.raises(ResultError, match="the disk is full; free some space and decide again"):
            log.append(decided("b"))
    log.append(decided("c"))
    assert ids(log) == ids(read(log.path)) == ["a", "c"]
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(ResultError, match="the disk is full"):
        DecisionLog(tmp_path / "full").append(decided("a"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ResultError, match="cannot be read"):
        read(tmp_path / "folder")


def test_kappa_of_known_tables() -> None:
    """Worked by hand: 20 and 15 alike of 50, 0.7 observed, 0.5 expected; and three reviewers with gaps."""
    table = {("accept", "accept"): 20, ("accept", "reject"): 5, ("reject", "accept"): 10, ("reject", "reject"): 15}
    pairs = [pair for pair, times in table.items() for _ in range(times)]
    (kappa,) = cohen_kappa({str(i): {"ben": b, "ann": a} for i, (a, b) in enumerate(pairs)})
    assert (kappa.reviewers, kappa.n, kappa.observed, kappa.expected) == (("ann", "ben"), 50, 0.7, 0.5)
    assert kappa.kappa == pytest.approx(0.4)
    # ann: a r u a; ben: a r u r over the same four. 3 of 4 alike; by chance (2*1 + 1*2 + 1*1) / 16 = 5/16.
    ann, ben, cat = "arua", "arur", "  a "
    words = {said[0]: said for said in SAID}
    said = [
        decided(f"{name}{i}", name, f"r{i}", words[letter])
        for name, letters in (("ann", ann), ("ben", ben), ("cat", cat))
        for i, letter in enumerate(letters)
        if letter.strip()
    ]
    ann_ben, ann_cat, ben_cat = cohen_kappa(said)
    assert (ann_ben.n, ann_ben.observed, ann_ben.expected) == (4, 0.75, 0.3125)
    assert ann_ben.kappa == pytest.approx((0.75 - 0.3125) / (1 - 0.3125))
    assert (ann_cat.n, ann_cat.kappa, ben_cat.kappa) == (1, 0, 0)
    assert cohen_kappa({}) == cohen_kappa([decided("a")]) == ()


@given(st.lists(st.tuples(st.sampled_from(SAID), st.sampled_from(SAID)), min_size=1, max_size=30))
def test_kappa_is_symmetric_and_at_most_one(pairs: list[tuple[str, str]]) -> None:
    """And 1 just where all is alike in two categories or more; NaN, with the reason, where chance explains all."""
    (kappa,) = cohen_kappa({str(i): {"a": one, "b": other} for i, (one, other) in enumerate(pairs)})
    (turned,) = cohen_kappa({str(i): {"a": other, "b": one} for i, (one, other) in enumerate(pairs)})
    assert turned == kappa or math.isnan(kappa.kappa)
    assert 0 <= kappa.observed <= 1
    assert 0 <= kappa.expected <= 1
    if len({said for pair in pairs for said in pair}) == 1:
        assert math.isnan(kappa.kappa)
        assert kappa.why_nan == f"both said nothing but {pairs[0][0]}, as chance would have it"
    else:
        assert -1 <= kappa.kappa <= 1
        assert (kappa.kappa == 1) == all(one == other for one, other in pairs)
        assert not kappa.why_nan


def test_kappa_without_anything_in_common() -> None:
    """Two who looked at different regions."""
    (kappa,) = cohen_kappa({"x": {"ann": "accept"}, "y": {"ben": "accept"}})
    assert (kappa.n, kappa.why_nan) == (0, "they decided on nothing in common")
    assert math.isnan(kappa.kappa)


def item(id_: str, box: Box, polygon: list[tuple[float, float]] | None = None) -> ReviewItem:
    outline = None if polygon is None else np.array(polygon, float)
    return ReviewItem(id_, "region", "case", "", "disc", 0.9, 2.3, 1, 1, box, outline)


def test_reattachment_by_geometry() -> None:
    """Moved a little it is the same; beside it, or only touching, it is not; each is given away once."""
    at = Box(100, 100, 140, 140)
    assert reattach({"old": at}, [item("new", at.translate(8, 8))]) == {"old": "new"}
    assert reattach({"old": at}, [item("new", at.translate(41, 0))]) == {}
    assert reattach({"old": at}, [item("new", at.translate(25, 25))]) == {}  # IoU 0.09, centre outside
    assert reattach({"old": at}, [item("new", Box(0, 0, 1000, 1000))]) == {"old": "new"}  # centre inside, IoU 0.002
    corner = [(0.0, 0.0), (1000.0, 0.0), (1000.0, 50.0)]  # a triangle whose box holds the centre
    assert reattach({"old": at}, [item("new", Box(0, 0, 1000, 1000), corner)]) == {}
    half = [(100.0, 100.0), (140.0, 100.0), (100.0, 110.0)]  # centre outside, but the boxes are one
    assert reattach({"old": at}, [item("new", at, half)]) == {"old": "new"}
    # Two old in one new: that which overlaps more; equal ones by id.
    wide = item("new", Box(100, 100, 190, 140))
    assert reattach({"a": at, "b": Box(146, 100, 190, 140)}, [wide]) == {"b": "new"}
    assert reattach({"b": at, "a": at.translate(50, 0)}, [wide]) == {"a": "new"}
    # One old in two new, and a chain in which the best pair leaves the next best for the other.
    assert reattach({"a": at}, [item("y", at.translate(1, 0)), item("x", at.translate(-1, 0))]) == {"a": "x"}
    chain = {"a": at, "b": at.translate(10, 0)}
    assert reattach(chain, [item("x", at.translate(9, 0)), item("y", at.translate(19, 0))]) == {"a": "y", "b": "x"}
    assert reattach({}, [wide]) == reattach({"a": at}, []) == {}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), max_size=12), st.randoms())
def test_reattachment_is_one_to_one_and_whatever_the_order(places: list[tuple[int, int]], random: object) -> None:
    """The same pairs come of any order; no item twice; each fits."""
    old = {f"o{i}": Box(x, y, x + 10, y + 10) for i, (x, y) in enumerate(places[::2])}
    new = [item(f"n{i}", Box(x, y, x + 12, y + 12)) for i, (x, y) in enumerate(places[1::2])]
    attached = reattach(old, new)
    assert len(set(attached.values())) == len(attached)
    boxes = {each.id: each.box_l0 for each in new}
    for before, after in attached.items():
        assert boxes[after].intersects(old[before])
    shuffled = list(old.items())
    random.shuffle(shuffled)
    random.shuffle(new)
    assert reattach(dict(shuffled), new) == attached
