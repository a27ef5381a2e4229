"""Where this machine last saw the slides of a result: a note for whoever looks at it, or learns from it, later.

A result names no path, so that it can be passed on. What its pixels were read from is noted aside, in the user's own
state directory, readable to nobody else: a file an output directory. `$SLIDESCAN_STATE` is another directory for it,
and where it is empty nothing is noted. URLs with a password or a token in them are not noted, nor slides in memory.

A note is never needed: what cannot be written or read is as if it was not there, and whoever follows one compares the
slide's fingerprint with the result's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from slidescan.commit import commit
from slidescan.errors import ResultError
from slidescan.slides.remote import Remote, locate

__all__ = ["noted", "recalled"]

_STATE = "SLIDESCAN_STATE"


def noted(out: Path, slides: Mapping[str, str | Path | Remote]) -> None:
    """Note where the slides of an output directory are, beside what is noted of it already.

    Parameters
    ----------
    out : Path
        Result directory of a scan, or output directory of an archive.
    slides : mapping of str to str, Path or Remote
        By slide id; of a single scan the id is the name of `out`.
    """
    at = _note(out)
    places = {slide_id: told for slide_id, where in slides.items() if (told := _told(where)) is not None}
    if at is None or not places:
        return
    known = _read(at)
    if known | places == known:
        return
    with contextlib.suppress(OSError, ResultError):  # a full or closed home is no reason to lose a scan
        at.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        text = json.dumps({"out": str(out.resolve()), "slides": known | places}, indent=0)
        commit(at, lambda partial: _write(partial, text))


def recalled(results: Iterable[Path]) -> dict[Path, str]:
    """Return by result directory where its slide is, of those that a note tells of and that are still there.

    Examples
    --------
    >>> recalled([Path("never/scanned")])
    {}
    """
    notes: dict[Path, dict[str, str]] = {}

    def told(out: Path, slide_id: str) -> str | None:
        if out not in notes:
            at = _note(out)
            notes[out] = {} if at is None else _read(at)
        return notes[out].get(slide_id)

    found = {}
    for result in results:
        own = result.resolve()
        where = told(own, own.name)
        if where is None and own.parent.name == "slides":
            where = told(own.parent.parent, own.name)
        if where is not None and (isinstance(at := locate(where), Remote) or at.exists()):
            found[result] = where
    return found


def _note(out: Path) -> Path | None:
    """Return the file for an output directory, None where nothing is to be noted."""
    state = os.environ.get(_STATE)
    if state == "":
        return None
    try:
        home = Path(state) if state else Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    except RuntimeError:  # nobody's home is known
        return None
    folder = home if state else home / "slidescan"
    return folder / f"{hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:32]}.json"


def _told(where: str | Path | Remote) -> str | None:
    """Return a place as it is found again from any directory; None where it is a secret or no place."""
    at = locate(where) if isinstance(where, str) else where
    if isinstance(at, Remote):
        return None if "?" in at.url or "@" in at.url else at.url
    return str(at.absolute()) if at.exists() else None


def _write(file: Path, text: str) -> None:
    file.touch(mode=0o600)
    file.write_text(text, encoding="utf-8")


def _read(at: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        return {str(slide_id): str(where) for slide_id, where in json.loads(at.read_text("utf-8"))["slides"].items()}
    return {}
