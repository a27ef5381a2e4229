"""What runs over an archive have still to do: a file a run, which goes when all of it is done.

So it is known from any machine, and whatever ended a run, what nobody has looked at yet. Invariant: a slide is to do in
one run, the last that was given it.
"""

from __future__ import annotations

import contextlib
import json
import time
import uuid
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from slidescan.commit import commit

__all__ = ["UNFINISHED", "Unfinished", "begin", "end", "unfinished"]

UNFINISHED = "unfinished"  # a folder of the output directory


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A run that is on, was stopped or was killed."""

    at: float
    """When it began, seconds since 1970."""
    scoring: int
    """How many models could score at once."""
    share: list[str]
    """Ids of the slides it was given."""
    to_do: list[str]
    """Those of them that were to be scanned."""
    stopped: bool = False
    """Whether it said that it ends."""
    places: dict[str, str] = field(default_factory=dict)
    """By id, what tells a slide from others of its name (`slidescan.archive.listing.tag_of`), where that is known."""


def begin(out: Path, share: Mapping[str, str], to_do: Collection[str], scoring: int) -> Path:
    """Put on record what a run is about to do; return its file. `share` has each slide's place by its id.

    Raises
    ------
    ResultError
        If `out` cannot be written.
    """
    folder = out / UNFINISHED
    places = set(share.values())
    file = folder / f"{uuid.uuid4().hex}.json"
    _write(file, Unfinished(round(time.time(), 3), scoring, list(share), list(to_do), places=dict(share)))
    for earlier, told in _read(folder):
        # By its place: another list may have another slide of that name, or the same under another id.
        known = told.places
        ours = {each for each in told.share if (known[each] in places if known.get(each) else each in share)}
        if earlier == file or not ours:
            continue
        left = [slide_id for slide_id in told.to_do if slide_id not in ours]
        if left:
            _write(earlier, replace(told, share=left, to_do=left))
        else:
            earlier.unlink(missing_ok=True)
    return file


def end(file: Path, *, finished: bool) -> None:
    """Put on record that a run ends, having done all or not."""
    if finished:
        file.unlink(missing_ok=True)
        return
    for other, told in _read(file.parent):  # another may have taken its place
        if other == file:
            _write(file, replace(told, stopped=True))


def unfinished(out: Path) -> list[Unfinished]:
    """Return the runs that have not done all they were to do, whether they are on or not."""
    return [told for _, told in _read(out / UNFINISHED)]


def _write(file: Path, told: Unfinished) -> None:
    data = json.dumps(asdict(told), ensure_ascii=False).encode(errors="replace")
    commit(file, lambda partial: partial.write_bytes(data))


def _read(folder: Path) -> list[tuple[Path, Unfinished]]:
    """Return what can be read; a file may go at any moment."""
    found = []
    for file in sorted(folder.glob("*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found.append((file, Unfinished(**json.loads(file.read_text(encoding="utf-8")))))
    return found
