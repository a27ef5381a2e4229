"""What is annotated on a slide or picture, whatever format said it; patients and their splits.

After `slidescan.train.coco` and `slidescan.train.qupath` an object is a box in level-0 px of the uncropped slide, a
label and what is known of its attributes, and what must count neither way is an ignored box. Invariant: nothing is
dropped silently; what has no class, or a class (or part of one) that nobody asked for, is an error.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError
from slidescan.export.jsonstream import JsonStream, Unreadable, open_text
from slidescan.slides import Slide

__all__ = ["SEEN", "Annotated", "Objects", "described", "read_json", "refuse_leaks", "seen_by", "seen_in", "split"]

SEEN = "seen"  # in a card's `training`: what `seen_in` said of all that was trained on and chosen by
_SEEN_DIGITS = 16  # of a fingerprint: two of a million pictures that share them are one chance in 40 million


@dataclass(frozen=True, slots=True, eq=False)
class Annotated:
    """A slide or picture and what is annotated on it; all boxes in level-0 px.

    Parameters
    ----------
    slide : Slide
    xyxy_l0 : ndarray of float64, shape (n, 4)
        One box an object. Its centre lies on the slide, its edges may not.
    label : ndarray of int64, shape (n,)
    attributes : ndarray of float64, shape (n, A)
        1 yes, 0 no, NaN unknown.
    ignored_xyxy_l0 : ndarray of float64, shape (m, 4)
        Where nothing is right or wrong.
    patient : str
        Whose tissue; splits never part a patient.
    scanner : str
    rejected_xyxy_l0 : ndarray of float64, shape (k, 4)
        Where something that is no object was taken for one: shown as often as the objects of a class.
    whole : bool
        Whether all objects are annotated, so that any other tissue is background. If not, nothing is known but what is
        around objects and rejected places.
    mpp_assumed : bool
        Whether nothing says its µm/px, and the detector's was taken for it.
    """

    slide: Slide
    xyxy_l0: NDArray[np.float64]
    label: NDArray[np.int64]
    attributes: NDArray[np.float64]
    ignored_xyxy_l0: NDArray[np.float64]
    patient: str
    scanner: str = ""
    rejected_xyxy_l0: NDArray[np.float64] = field(default_factory=lambda: np.empty((0, 4)))
    whole: bool = True
    mpp_assumed: bool = False


def described(annotated: Sequence[Annotated], what: str, classes: Sequence[str], attributes: Sequence[str] = ()) -> str:
    """Return in a line what was read: a scale that is wrong, or objects that are missing, show here or nowhere.

    Examples
    --------
    >>> from slidescan.slides import memory_slide
    >>> slide, none = memory_slide(np.zeros((8, 8, 3), np.uint8), 0.25), np.empty((0, 4))
    >>> described([Annotated(slide, none, np.empty(0, np.int64), np.empty((0, 0)), none, "p")], "slide", ["cell"])
    '1 slide of 1 patient at 0.25 µm/px: 0 cell'
    """
    if not annotated:
        return f"no {what}s"
    scales = sorted({f"{one.slide.frame.mpp:.3g}" for one in annotated}, key=float)
    scale = scales[0] if len(scales) == 1 else f"{scales[0]} to {scales[-1]}"
    label = np.concatenate([one.label for one in annotated])
    answers = np.concatenate([one.attributes for one in annotated])
    parts = [f"{int((label == i).sum()):,} {name}" for i, name in enumerate(classes)]
    for name, column in zip(attributes, answers.T, strict=True):
        parts.append(f"{int((column >= 0.5).sum()):,} {name} of {int(np.isfinite(column).sum()):,} that say")
    if ignored := sum(len(one.ignored_xyxy_l0) for one in annotated):
        parts.append(f"{ignored:,} boxes ignored")
    assumed = sum(one.mpp_assumed for one in annotated)
    guess = f" ({assumed:,} of them do not say it: the detector's; else give slide_mpp)" if assumed else ""
    return (
        f"{_number(len(annotated), what)} of {_number(len({one.patient for one in annotated}), 'patient')} "
        f"at {scale} µm/px{guess}: {', '.join(parts)}"
    )


def _number(n: int, what: str) -> str:
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def split(annotated: Sequence[Annotated], share: float, seed: int) -> tuple[list[Annotated], list[Annotated]]:
    """Set about `share` of the patients apart: the others', and theirs; at least one patient each, with objects.

    Raises
    ------
    ConfigError
        If `share` is not between 0 and 1, or there are fewer than two patients.

    Examples
    --------
    >>> from slidescan.slides import memory_slide
    >>> none, slide = np.empty((0, 4)), memory_slide(np.zeros((8, 8, 3), np.uint8), 0.25)
    >>> ten = [Annotated(slide, none, np.empty(0, np.int64), np.empty((0, 0)), none, f"p{i}") for i in range(10)]
    >>> [len(part) for part in split(ten, 0.2, seed=0)]
    [8, 2]
    """
    if not 0 < share < 1:
        raise ConfigError(f"split: expected a share between 0 and 1, got {share!r}")
    patients = sorted({one.patient for one in annotated})
    if len(patients) < 2:
        raise ConfigError(
            f"training data: expected at least two patients to set some apart for validation, got {len(patients)}; "
            f"add slides of another patient, or say whose they are (patients.csv, or patient in the JSON)"
        )
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    order = [patients[i] for i in np.random.default_rng(seed).permutation(len(patients)).tolist()]
    chosen, others = order[:count], order[count:]
    with_objects = {one.patient for one in annotated if len(one.label)}
    for some, rest in ((chosen, others), (others, chosen)):
        spare = [patient for patient in rest if patient in with_objects]
        if len(spare) > 1 and not with_objects.intersection(some):
            rest[rest.index(spare[0])], some[-1] = some[-1], spare[0]
    return [one for one in annotated if one.patient not in chosen], [one for one in annotated if one.patient in chosen]


def refuse_leaks(**splits: Sequence[Annotated]) -> None:
    """Refuse splits that share a patient: a detector recognises tissue it was trained on.

    Raises
    ------
    ConfigError
        If there is such a patient, or one slide under two names.

    Examples
    --------
    >>> refuse_leaks(train=[], test=[])
    """
    patients = {name: {one.patient for one in members} for name, members in splits.items()}
    for one, other in itertools.combinations(patients, 2):
        if shared := sorted(patients[one] & patients[other]):
            raise ConfigError(
                f"{one} and {other}: expected no patient in both, found {len(shared)}, the first {shared[0]!r}; "
                f"move all slides of a patient into one of them"
            )
    for one, other in itertools.combinations_with_replacement(patients, 2):
        for same in _one_file(splits[one], splits[other]):
            raise ConfigError(
                f"{one if one == other else f'{one} and {other}'}: expected no slide twice, found "
                f"{same[0].slide.path.name} and {same[1].slide.path.name}, which are one; leave out either"
            )


def seen_in(annotated: Iterable[Annotated]) -> set[str]:
    """Return what tells slides and pictures from others by their content alone."""
    return {one.slide.fingerprint[:_SEEN_DIGITS] for one in annotated}


def seen_by(training: Mapping[str, Any]) -> set[str]:
    """Return what `seen_in` said of what a detector was trained on, from its card's `training`."""
    told = training.get(SEEN)
    return {each for each in told if isinstance(each, str)} if isinstance(told, list) else set()


def _one_file(some: Sequence[Annotated], others: Sequence[Annotated]) -> Iterator[tuple[Annotated, Annotated]]:
    """Yield slides that have the same bytes under two names; only those of one size are looked into."""

    def size(one: Annotated) -> tuple[object, ...] | None:
        path = one.slide.path
        if not isinstance(path, Path) or not path.exists():
            return None
        return (*one.slide.size_wh, path.stat().st_size if path.is_file() else 0)

    known: dict[tuple[object, ...], list[Annotated]] = {}
    for one in some:
        if key := size(one):
            known.setdefault(key, []).append(one)
    for other in others:
        for one in known.get(size(other) or (), ()):
            if one is other:  # each pair of a split once
                break
            if one.slide.fingerprint == other.slide.fingerprint:
                yield one, other


@dataclass(frozen=True, slots=True)
class Objects:
    """Collects and checks what is annotated on one slide."""

    slide: Slide
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    skip: tuple[str, ...] = ()
    """Classes, or what classes are derived by, that say nothing."""
    boxes: list[NDArray[np.float64]] = field(default_factory=lambda: [np.empty((0, 4))])
    labels: list[int] = field(default_factory=list)
    answers: list[list[float]] = field(default_factory=list)
    ignored: list[NDArray[np.float64]] = field(default_factory=lambda: [np.empty((0, 4))])
    derived: set[str] = field(default_factory=set)
    """Attributes that some class of the slide is derived by."""

    def skips(self, name: str) -> bool:
        """Return whether what is of the class `name` says nothing."""
        return name not in self.classes and (name in self.skip or name.partition(":")[0].strip() in self.skip)

    def ignores(self, where: str, name: str) -> bool:
        """Return whether objects of the class `name` count neither way."""
        return self._label(where, name) is None

    def add(
        self, where: str, name: str, xyxy_l0: NDArray[np.float64], said: Mapping[str, Any], *, ignored: bool = False
    ) -> None:
        """Add boxes (k, 4) of the class `name`; `said` may hold attributes; `where` begins what is raised."""
        if self.skips(name):
            return
        label = self._label(where, name)
        if not np.isfinite(xyxy_l0).all() or (xyxy_l0[:, 2:] <= xyxy_l0[:, :2]).any():
            raise ConfigError(
                f"{where}: expected a box with finite edges and an area, got another; correct or delete it"
            )
        if ignored or label is None:
            self.ignored.append(xyxy_l0)
            return
        centres = (xyxy_l0[:, :2] + xyxy_l0[:, 2:]) / 2
        if (outside := ((centres < 0) | (centres > self.slide.size_wh)).any(1)).any():
            x, y = centres[outside][0].tolist()
            width, height = self.slide.size_wh
            raise ConfigError(
                f"{where}: expected an object on the {width} × {height} px of {self.slide.path.name}, got one around "
                f"({x:g}, {y:g}); check that it belongs to this image and counts in its px"
            )
        self.boxes.append(xyxy_l0)
        self.labels.extend([label] * len(xyxy_l0))
        yes = self._derived_by(where, name)
        self.derived.update(yes)
        said = dict.fromkeys(yes, 1) | dict(said)
        answers = [_answer(f"{where}: {key}", said.get(key)) for key in self.attributes]
        self.answers.extend([answers] * len(xyxy_l0))

    def annotated(self, patient: str, scanner: str) -> Annotated:
        """Return all of it."""
        answers = np.array(self.answers, np.float64).reshape(len(self.labels), len(self.attributes))
        for column, key in enumerate(self.attributes):
            if key in self.derived:  # who has marked some has looked at all
                answers[np.isnan(answers[:, column]), column] = 0
        boxes, ignored = np.concatenate(self.boxes), np.concatenate(self.ignored)
        return Annotated(self.slide, boxes, np.array(self.labels, np.int64), answers, ignored, patient, scanner)

    def _derived_by(self, where: str, name: str) -> list[str]:
        """Return the attributes that a class is derived by; QuPath's users write them in either case."""
        parts = [] if name in self.classes else [part.strip() for part in name.split(":")[1:]]
        known = {key.casefold(): key for key in self.attributes}
        for part in parts:
            if part.casefold() not in known and part not in self.skip:
                raise ConfigError(
                    f"{where}: expected a class, or one derived by an attribute, got {name!r}; add {part!r} to "
                    f"`attributes`, {name!r} to `classes`, or either to `skip`"
                )
        return [known[part.casefold()] for part in parts if part.casefold() in known]

    def _label(self, where: str, name: str) -> int | None:
        """Return the index of a class, None for one whose objects are ignored."""
        if name not in self.classes:
            if name.lower().startswith("ignore") or name.endswith("*"):
                return None
            first = name.partition(":")[0].strip()
            if first not in self.classes:
                raise ConfigError(
                    f"{where}: expected one of the classes {', '.join(self.classes)}, got {name!r}; "
                    "add it to `classes`, or, if it says nothing of objects, to `skip`"
                )
            name = first
        return self.classes.index(name)


def _answer(where: str, value: Any) -> float:
    if value is None or value != value:
        return math.nan
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise ConfigError(f"{where}: expected true, false, or a number from 0 (no) to 1 (yes), got {value!r}")


def read_json(path: Path) -> Any:
    """Read a JSON file; a ConfigError names the line that is wrong."""
    try:
        with open_text(path) as stream:
            text = JsonStream(stream)
            value = text.value()
            if text.peek():
                raise Unreadable("json", text.line, "there is more after the end")
    except Unreadable as exc:
        raise ConfigError(f"{path.name}: expected JSON, but at line {exc.line} {exc.detail}; export it again") from exc
    except OSError as exc:
        raise ConfigError(f"{path}: expected a readable file of annotations, {exc.strerror or exc}") from exc
    return value
