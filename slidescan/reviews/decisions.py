"""What reviewers decided: a log beside the result that only ever grows, one event a line.

::

    <result>/decisions.jsonl
        {"schema": 1, "event": "decide", "event_id": …, "at": …, "reviewer": …, "region": …, "decision": "accept", …}
        {"schema": 1, "event": "undo", "event_id": …, "at": …, "reviewer": …, "undoes": …}

Invariants: a line is written in one piece and is on the disk when `DecisionLog.append` returns; no line is ever changed
or removed, and nobody waits long for a lock; a line that was cut off costs nothing but itself; events of a kind or
schema that is not known here stay in the file and count for nothing. The order of the lines is the order of the events:
clocks are not asked. No line holds a path.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from slidescan.errors import ResultError
from slidescan.geometry import Box
from slidescan.reviews.words import person

__all__ = ["DECISIONS", "Decision", "DecisionLog", "Standing", "Undo", "Verdict", "What"]

DECISIONS = "decisions.jsonl"
_SCHEMA = 1
_LOCK_S, _AGAIN_S = 2.0, 0.005  # to wait for a lock, and between two tries: an append takes ms
# How each line begins. Inside a JSON text a quote has a backslash before it, so no note can hold this.
_BEGIN = re.compile(rb'(?=\{"schema":)')

Verdict = Literal["accept", "reject", "unsure"]
What = Literal["region", "detection"]
_LAST_S = 253_402_300_800.0  # the year 10000, since 1970: later than any table can tell


@dataclass(frozen=True, slots=True)
class Decision:
    """What one reviewer decided of one region or detection, and what it was decided on."""

    event_id: str
    at: float
    """When, seconds since 1970 (UTC)."""
    reviewer: str
    what: What
    region: str
    """Id of the region (or detection), as in flagged.geojson (detections.parquet)."""
    decision: Verdict
    label: str | None
    """The class the reviewer chose; None: as the detector says."""
    note: str
    """What the reviewer typed."""
    box_l0: Box
    """Where it is; finds it again where another scan has other ids."""
    score: float | None
    """As shown to the reviewer; None in a blinded review."""
    evidence: float | None
    """As shown, in nats; None in a blinded review."""
    run_key: str
    model_sha256: str
    slide_fingerprint: str
    detected_label: str | None = None
    """The detector's class, of a region that of most of its detections; None in lines from before it was kept."""
    parts_l0: tuple[Box, ...] | None = None
    """Boxes of the detections in a region, from left to right; empty for a detection; None: as above."""
    order: int = 0
    """Place among the events of its log, from 1; given when it is read."""


@dataclass(frozen=True, slots=True)
class Undo:
    """A reviewer takes back a decision of their own."""

    event_id: str
    at: float
    reviewer: str
    undoes: str
    """The `event_id` of the decision."""


class Standing:
    """Which decisions stand after all events so far; events are added in the order of the log.

    An event that is there twice counts once. Only a decision can be undone, once, and only by who made it.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._live: dict[str, Decision] = {}
        self._by_region: dict[str, dict[str, Decision]] = {}

    def add(self, event: Decision | Undo) -> None:
        """Take the next event into account."""
        if event.event_id in self._seen:
            return
        self._seen.add(event.event_id)
        if isinstance(event, Decision):
            decided = replace(event, order=len(self._seen))
            self._live[event.event_id] = decided
            self._by_region.setdefault(event.region, {})[event.event_id] = decided
            return
        undone = self._live.get(event.undoes)
        if undone is not None and undone.reviewer == event.reviewer:
            del self._live[undone.event_id]
            of_region = self._by_region[undone.region]
            del of_region[undone.event_id]
            if not of_region:
                del self._by_region[undone.region]

    @property
    def regions(self) -> Iterator[str]:
        """The ids decisions stand for."""
        return iter(self._by_region)

    def of(self, region: str) -> Iterator[Decision]:
        """Yield the decisions on a region that were not undone, in order, overruled ones too."""
        yield from self._by_region.get(region, {}).values()

    def latest_first(self) -> Iterator[Decision]:
        """Yield all decisions that were not undone, the last one first."""
        return reversed(self._live.values())

    def current(self) -> dict[tuple[str, str], Decision]:
        """Return what stands: the last decision of each reviewer on each region."""
        return {(decision.reviewer, decision.region): decision for decision in self._live.values()}


class DecisionLog:
    """The decisions of one result directory, read as far as the file went when it was last looked at.

    Safe to use from many threads and many processes at once, and from many machines where their file system has locks:
    NFS, where each machine appends where it last saw the end, has them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self.standing = Standing()
        self.unreadable = 0
        """Lines that are no event: cut off by a power failure or a full disk, or edited by hand."""
        self.events = 0
        """How many were read."""
        self.read_bytes = 0
        self._inode = -1

    def refresh(self) -> None:
        """Read what was added since.

        Raises
        ------
        ResultError
            If the file is there and cannot be read.
        """
        with self._lock:
            try:
                with self.path.open("rb") as file:
                    now = os.fstat(file.fileno())
                    if now.st_size < self.read_bytes or now.st_ino != self._inode:  # another copy was put there
                        self._forget()
                    self._inode = now.st_ino
                    file.seek(self.read_bytes)
                    data = file.read()
            except FileNotFoundError:
                return
            except OSError as exc:
                raise ResultError(f"{self.path}: cannot be read ({exc.strerror}); check who may read it") from exc
            *lines, begun = data.split(b"\n")
            for line in lines:
                for event in _events(line):
                    if event is None:
                        self.unreadable += 1
                    else:
                        self.standing.add(event)
                        self.events += 1
            # Not ended yet, or by hand: whole or nothing, and read again next time, when it counts no second time.
            for event in _events(begun):
                if event is not None:
                    self.standing.add(event)
            self.read_bytes += len(data) - len(begun)

    def append(self, event: Decision | Undo) -> None:
        """Write an event to the disk and take it into account, with all that others wrote before it.

        Raises
        ------
        ResultError
            If it cannot be written; nothing is decided then.
        """
        line = _line(event)
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _lock(descriptor)
                size = os.fstat(descriptor).st_size
                if size and os.pread(descriptor, 1, size - 1) != b"\n":
                    line = b"\n" + line  # behind a line that was cut off
                written = os.write(descriptor, line)
                try:
                    if written < len(line):
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    os.fsync(descriptor)
                except OSError:  # what is there all the same would be read as a decision
                    if os.fstat(descriptor).st_size == size + written:  # and nobody wrote behind it, without locks
                        os.ftruncate(descriptor, size)
                    raise
            finally:
                os.close(descriptor)
            if not size:
                _sync_directory(self.path.parent)
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            why = "the disk is full; free some space" if full else f"{exc.strerror}; make it writable for you"
            raise ResultError(f"{self.path}: the decision was not saved: {why} and decide again") from exc
        self.refresh()


def _lock(descriptor: int) -> None:
    """Wait for the appends of others until the file is closed; not for ever for one that was stopped within its own."""
    late_s = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > late_s:
                return
            time.sleep(_AGAIN_S)
        except OSError:  # there are no locks here
            return


def _sync_directory(path: Path) -> None:
    """Make a new file's name outlast a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _line(event: Decision | Undo) -> bytes:
    """Return the event as a line; ASCII, so that no cut leaves half a letter."""
    told: dict[str, Any] = {"schema": _SCHEMA, "event": "undo" if isinstance(event, Undo) else "decide"}
    told |= {name: getattr(event, name) for name in event.__slots__ if name != "order"}
    if isinstance(event, Decision):
        told["box_l0"] = list(astuple(event.box_l0))
        told["parts_l0"] = None if event.parts_l0 is None else [list(astuple(part)) for part in event.parts_l0]
    return json.dumps(told, allow_nan=False).encode() + b"\n"


def _events(line: bytes) -> Iterator[Decision | Undo | None]:
    """Yield the events of a line: one; two where the first was cut off as the second was written; None for no event."""
    for piece in _BEGIN.split(line):
        if not piece.strip():
            continue
        try:
            told = json.loads(piece)
            if not isinstance(told, dict):
                raise TypeError
            if told.get("schema") != _SCHEMA or told.get("event") not in ("decide", "undo"):
                continue  # of a later slidescan
            yield _undo(told) if told["event"] == "undo" else _decision(told)
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            yield None


def _undo(told: dict[str, Any]) -> Undo:
    return Undo(_text(told["event_id"]), _time(told["at"]), person(_text(told["reviewer"])), _text(told["undoes"]))


def _decision(told: dict[str, Any]) -> Decision:
    if told["decision"] not in get_args(Verdict) or told["what"] not in get_args(What):
        raise ValueError("no such decision")
    parts, detected_label = told.get("parts_l0"), told.get("detected_label")
    shown = (told.get(name) for name in ("score", "evidence"))
    score, evidence = (None if value is None else _number(value) for value in shown)
    label = told.get("label")
    return Decision(
        event_id=_text(told["event_id"]),
        at=_time(told["at"]),
        reviewer=person(_text(told["reviewer"])),
        what=told["what"],
        region=_text(told["region"]),
        decision=told["decision"],
        label=None if label is None else _text(label),
        note=_text(told.get("note", "")),
        box_l0=_box(told["box_l0"]),
        score=score,
        evidence=evidence,
        run_key=_text(told["run_key"]),
        model_sha256=_text(told["model_sha256"]),
        slide_fingerprint=_text(told["slide_fingerprint"]),
        detected_label=None if detected_label is None else _text(detected_label),
        parts_l0=None if parts is None else tuple(map(_box, parts)),
    )


def _box(told: Any) -> Box:
    x0, y0, x1, y1 = map(_number, told)
    return Box(x0, y0, x1, y1)


def _number(told: Any) -> float:
    number = float(told)
    if not math.isfinite(number):
        raise ValueError("no such number")
    return number


def _time(told: Any) -> float:
    seconds = _number(told)
    if not 0 <= seconds < _LAST_S:
        raise ValueError("no such time")
    return seconds


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value.encode().decode()  # half of a surrogate pair is a ValueError
