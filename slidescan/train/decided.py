"""What reviewers accepted and rejected, as slides to learn from.

Hides how a log of decisions becomes boxes: which scan they were made on, who said what last, and what nobody knows.
The log holds the boxes that were shown, so that decisions count whose region is gone after another scan. A place is one
detection: boxes of two scans are one place if the centre of one is in the other, or they overlap by half, each given
away once (`slidescan.reviews.attach`). On it counts each reviewer's last word; what was said of that detection alone
counts before what was said of a region of several.

Invariants: an accepted detection is an object, a rejected one has nothing in it, and whatever else was detected is
ignored, unless it scored below the threshold in the very box of a decided one: nobody was shown it by itself. Nothing
is dropped silently; what is left out is counted.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from slidescan.commit import commit
from slidescan.errors import ConfigError
from slidescan.result import ScanResult
from slidescan.reviews.attach import at_one_place
from slidescan.reviews.case import Case
from slidescan.reviews.decisions import Decision, Verdict
from slidescan.reviews.start import Slides, decided_cases, open_runs
from slidescan.saved import load_result
from slidescan.train.annotated import Annotated, Objects, refuse_leaks
from slidescan.train.patients import Whose, patient_of, read_all
from slidescan.train.settings import TrainSettings

__all__ = ["Decided", "keep_decided", "load_decided"]

F64 = NDArray[np.float64]
_XYXY = tuple[float, float, float, float]
_Ruling = Literal["accept", "reject", "unsure", "dispute", "several", "unread"]

_KEPT = "decisions.json"


@dataclass(frozen=True, slots=True)
class Decided:
    """Slides with what was decided on them, and how much of it teaches."""

    annotated: Sequence[Annotated]
    """The slides that something was accepted or rejected on; nothing is known beyond that."""
    counts: Counter[str]
    """Places that teach nothing by the reason: ``unsure``, ``dispute``, ``unread``; regions: ``several``."""

    @property
    def accepted(self) -> int:
        """How many objects."""
        return sum(len(one.label) for one in self.annotated)

    @property
    def rejected(self) -> int:
        """How many places without one."""
        return sum(len(one.rejected_xyxy_l0) for one in self.annotated)

    def __str__(self) -> str:
        told = [f"{self.accepted} accepted", f"{self.rejected} rejected"]
        for reason, words in (
            ("unsure", "unsure"),
            ("dispute", "in dispute"),
            ("several", "regions of several figures left out (review --of detections settles them)"),
            ("unread", "left out whose line does not tell of what (decide on them again)"),
        ):
            told += [f"{self.counts[reason]} {words}"] if self.counts[reason] else []
        return f"decisions: {', '.join(told)}, on {len(self.annotated)} slides"

    def refuse_leaks(self, **measured: Sequence[Annotated]) -> None:
        """Refuse what is measured on if its slide or its patient was decided on: it would be known by heart.

        Raises
        ------
        ConfigError
            If there is such a slide or patient.
        """
        known = {one.slide.fingerprint for one in self.annotated} if any(measured.values()) else set()
        for name, members in measured.items():
            if shared := sorted(one.slide.path.name for one in members if one.slide.fingerprint in known):
                raise ConfigError(
                    f"decisions and {name}: expected no slide in both, found {len(shared)}, the first {shared[0]!r}; "
                    "what was decided on can only be trained on: measure on other slides, or leave its decisions out"
                )
        refuse_leaks(decisions=self.annotated, **measured)


@dataclass(frozen=True, slots=True)
class _Word:
    """What one decision says of one box."""

    run_key: str
    order: int
    reviewer: str
    says: Verdict | None
    """None: that some of several are real."""
    alone: bool
    """Whether it was said of this box and no other."""
    name: str | None
    """Class, where it is known."""
    region: str
    xyxy_l0: _XYXY


@dataclass(frozen=True, slots=True)
class _Place:
    """What was said of one detection in the end."""

    ruling: _Ruling
    last: _Word
    row: int | None
    """Of the present result's detections, if it is one of them."""


def load_decided(runs: Path, slides: Slides | None, settings: TrainSettings) -> Decided:
    """Return what the reviewers of a result or an archive decided, with the slides it is on.

    Parameters
    ----------
    runs : Path
        Result directory, or output directory of an archive.
    slides : Slides, optional
        Where the pixels are, as `slidescan.review` takes it or finds it. Only of slides that teach something any are
        asked for.
    settings : TrainSettings
        Classes and attributes; of attributes nothing is known.

    Raises
    ------
    ConfigError
        If it is not known where a slide is, one is another, a class is not one of the settings', nothing decided
        teaches, or a scan kept only some of the detector's classes.
    ResultError
        If `runs` is no result and no archive, or one is damaged.
    SlideError
        If a slide cannot be opened.
    """
    cases = decided_cases(open_runs(runs), slides)
    known = read_all((settings.data, settings.validation, settings.test))
    annotated, counts = [], Counter[str]()
    for case in cases:
        told = _told(case, load_result(case.path, verify=False), settings, known, counts)
        if told is not None:
            annotated.append(told)
    decided = Decided(annotated, counts)
    if not decided.accepted + decided.rejected:
        said = str(decided).removeprefix("decisions: ") if cases else "no decisions.jsonl"
        raise ConfigError(
            f"decisions: expected some that accept or reject a detection, got {said}; review {runs.name} first"
        )
    return decided


def keep_decided(decided: Decided | None, out: Path) -> None:
    """Write into a run's directory what it learns from; with a checkpoint it goes on with the same or not at all.

    ``decisions.json`` holds counts and digests; nobody's name, and no path.

    Raises
    ------
    ConfigError
        If the run was begun with other decisions, or without any.
    """
    text, file = "" if decided is None else _digest(decided), out / _KEPT
    kept = file.read_text(encoding="utf-8") if file.is_file() else ""
    if text == kept:
        return
    if any(out.glob("losses-*.safetensors")):
        before, now = "those it was begun with" if kept else "none, as before", "others" if text else "none"
        raise ConfigError(f"{out}: decisions: expected {before}, got {now}; give those, or another output directory")
    if text:
        commit(file, lambda partial: partial.write_text(text, encoding="utf-8"))
    else:
        file.unlink()


def _digest(decided: Decided) -> str:
    digest = hashlib.sha256()
    for one in decided.annotated:
        for column in (one.xyxy_l0, one.label, one.rejected_xyxy_l0, one.ignored_xyxy_l0):
            digest.update(repr(column.shape).encode() + np.ascontiguousarray(column).tobytes())
    told = {"accepted": decided.accepted, "rejected": decided.rejected, "sha256": digest.hexdigest()}
    return json.dumps({**told, "slides": [one.slide.fingerprint for one in decided.annotated]}, indent=1) + "\n"


def _told(
    case: Case, result: ScanResult, settings: TrainSettings, known: Mapping[str, Whose], counts: Counter[str]
) -> Annotated | None:
    """Return what was decided on one slide, None where that teaches nothing; count what is left out."""
    parts, wholes = _words(case, result, settings.classes)
    places = _places(parts, result.detections.xyxy)
    boxes = _boxes([place.last.xyxy_l0 for place in places])
    regions = [place for place in _places(wholes, _boxes([])) if not _any_within(boxes, place.last.xyxy_l0)]
    by_ruling: dict[_Ruling, list[_Word]] = defaultdict(list)
    for place in (*places, *regions):
        by_ruling[place.ruling].append(place.last)
    for ruling in ("unsure", "dispute", "unread"):
        counts[ruling] += len(by_ruling[ruling])
    counts["several"] += len({word.region for word in by_ruling["several"]})
    accepted, rejected = by_ruling.pop("accept", []), by_ruling.pop("reject", [])
    if not accepted and not rejected:
        return None
    if result.config.detect.classes is not None:  # what else was detected must be ignored, and is not known
        raise ConfigError(
            f"decisions on {case.slide_id!r}: expected a scan that keeps all classes, got one with detect.classes; "
            "scan it again without, and the decisions find their places"
        )
    slide = case.slide()
    objects = Objects(slide, tuple(settings.classes), tuple(settings.attributes))
    for word in accepted:
        objects.add(f"decisions on {case.slide_id!r}", word.name or "", _boxes([word.xyxy_l0]), {})
    left_out = [word.xyxy_l0 for words in by_ruling.values() for word in words]
    objects.ignored.extend((_undecided(result, places), _boxes(left_out)))
    told = objects.annotated(patient_of(known, slide.path.name, case.group or case.slide_id), "")
    slide.close()  # opened again when a window is read
    return replace(told, rejected_xyxy_l0=_boxes([word.xyxy_l0 for word in rejected]), whole=False)


def _undecided(result: ScanResult, places: Sequence[_Place]) -> F64:
    """Return the boxes (N, 4) of the present detections that nothing was decided on."""
    found = result.detections
    settled = [place for place in places if place.ruling in ("accept", "reject")]
    unknown = np.ones(len(found), np.bool_)
    unknown[[place.row for place in settled if place.row is not None]] = False
    rows = np.flatnonzero(unknown & (found.score < result.threshold))  # shown to nobody
    boxes = shapely.box(*_boxes([place.last.xyxy_l0 for place in settled]).T)
    unknown[rows[shapely.STRtree(shapely.points(found.centers[rows])).query(boxes, "intersects")[1]]] = False
    return found.xyxy[unknown]


def _words(case: Case, result: ScanResult, classes: Sequence[str]) -> tuple[list[_Word], list[_Word]]:
    """Return what was said of single detections, and what old lines say of whole regions that are gone."""
    only = classes[0] if len(classes) == 1 else None
    rows: dict[str, int] | None = None
    parts: list[_Word] = []
    wholes: list[_Word] = []
    for decision in case.log.standing.latest_first():
        if decision.slide_fingerprint != result.provenance["slide"]["fingerprint"]:
            continue
        item = case.items.get(decision.region)
        name = decision.label or decision.detected_label or (None if item is None else item.label)
        if decision.what == "detection":
            if name is None:
                rows = rows or {id_: row for row, id_ in enumerate(result.ids)}
                row = rows.get(decision.region)
                name = only if row is None else result.classes[int(result.detections.label[row])]
            parts.append(_word(decision, name, astuple(decision.box_l0)))
            continue
        if decision.parts_l0 is not None:
            boxes = [astuple(part) for part in decision.parts_l0]
        elif item is not None:
            boxes = [tuple(part) for part in case.parts(item).tolist()]
        else:
            wholes.append(_word(decision, None, astuple(decision.box_l0)))
            continue
        parts.extend(_word(decision, name or only, box, of=len(boxes)) for box in boxes)
    return parts, wholes


def _word(decision: Decision, name: str | None, xyxy_l0: _XYXY, *, of: int = 1) -> _Word:
    says = None if decision.decision == "accept" and of > 1 else decision.decision
    # The log holds a detection's own box as float64 and a region's parts as float32: one place, so one box.
    x0, y0, x1, y1 = np.array(xyxy_l0, np.float32).tolist()
    return _Word(
        decision.run_key, decision.order, decision.reviewer, says, of == 1, name, decision.region, (x0, y0, x1, y1)
    )


def _places(words: Sequence[_Word], found_l0: F64) -> list[_Place]:
    """Gather words by place, beginning with the present detections (N, 4), and rule on each."""
    by_run: dict[str, dict[_XYXY, list[_Word]]] = defaultdict(lambda: defaultdict(list))
    for word in sorted(words, key=lambda word: word.order):
        by_run[word.run_key][word.xyxy_l0].append(word)
    known, said = found_l0, defaultdict[int, list[_Word]](list)
    for by_box in by_run.values():  # within a scan no two detections are one place
        boxes = _boxes(list(by_box))
        pairs = at_one_place(boxes, known)
        new = [row for row in range(len(boxes)) if row not in pairs]
        pairs |= {row: len(known) + i for i, row in enumerate(new)}
        known = np.concatenate((known, boxes[new]))
        for row, of_box in enumerate(by_box.values()):
            said[pairs[row]] += of_box
    return [_ruled(of_place, at if at < len(found_l0) else None) for at, of_place in said.items()]


def _ruled(words: Sequence[_Word], row: int | None) -> _Place:
    """Rule on one place: the last word of each reviewer, if they agree."""
    by: dict[str, _Word] = {}
    for word in sorted(words, key=lambda word: word.order):
        if word.alone or word.reviewer not in by or not by[word.reviewer].alone:
            by[word.reviewer] = word
    said = sorted((word for word in by.values() if word.says is not None), key=lambda word: word.order)
    if not said:
        return _Place("several", max(by.values(), key=lambda word: word.order), row)
    verdicts = {word.says for word in said}
    names = {word.name for word in said if word.name is not None}
    last = said[-1]
    if len(verdicts) > 1 or (last.says == "accept" and len(names) > 1):
        return _Place("dispute", last, row)
    if last.says == "accept" and last.name is None:
        return _Place("unread" if not names else "accept", replace(last, name=next(iter(names), None)), row)
    assert last.says is not None
    return _Place(last.says, last, row)


def _boxes(xyxy: Sequence[_XYXY]) -> F64:
    return np.array(xyxy, np.float64).reshape(-1, 4)


def _any_within(boxes: F64, xyxy: _XYXY) -> bool:
    """Say whether the centre of any of the boxes is in another one."""
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    return bool(((centres >= xyxy[:2]) & (centres <= xyxy[2:])).all(1).any())
