"""Where this machine last saw the slides of a result: a note for whoever looks at it, or learns from it, later.

A result names no path, so that it can be passed on. What its pixels were read from is noted aside, in the user's own
state directory, readable to nobody else: a file an output directory, which is forgotten when that is gone.
`$SLIDESCAN_STATE` is another directory for it, and where it is empty nothing is noted. URLs with a password or a token
in them are not noted, nor slides in memory.

A note is never needed: what cannot be written or read is as if it was not there, and whoever follows one compares the
slide's fingerprint with the result's. Of two processes that note at once, the later counts.
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


def noted(out: Path, slides: Mapping[str, str | Path | Remote | None]) -> None:
    """Note where the slides of an output directory are, beside what is noted of it already.

    Parameters
    ----------
    out : Path
        Result directory of a scan, or output directory of an archive.
    slides : mapping of str to str, Path, Remote or None
        By slide id; of a single scan the id is the name of `out`. None: nowhere, such as in memory.
    """
    # A full or closed home is no reason to lose a scan.
    with contextlib.suppress(OSError, ResultError):
        at = _note(out)
        if at is None:
            return
        known = _read(at)
        now = {**known, **{slide_id: _told(where) for slide_id, where in slides.items()}}
        places = {slide_id: told for slide_id, told in now.items() if told is not None}
        if places == known:
            return
        at.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not known:
            _forget_what_is_gone(at.parent)
        text = f"{json.dumps(str(out.resolve()))}\n{json.dumps(places)}\n"
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
        where = notes[out].get(slide_id)
        return where if where is not None and _is_there(where) else None

    found = {}
    for result in results:
        own = result.resolve()
        where = told(own, own.name)
        if where is None and own.parent.name == "slides":
            where = told(own.parent.parent, own.name)
        if where is not None:
            found[result] = where
    return found


def _note(out: Path) -> Path | None:
    """Return the file for an output directory, None where nothing is to be noted."""
    told, state = os.environ.get(_STATE), os.environ.get("XDG_STATE_HOME", "")
    if told == "":
        return None
    try:
        home = Path(state) if Path(state).is_absolute() else Path("~/.local/state").expanduser()
        folder = home / "slidescan" if told is None else Path(told).expanduser()
    except RuntimeError:  # nobody's home is known
        return None
    return folder / f"{hashlib.sha256(os.fsencode(out.resolve())).hexdigest()[:32]}.json"


def _told(where: str | Path | Remote | None) -> str | None:
    """Return a place as it is found again from any directory; None where it is a secret or none."""
    at = locate(where) if isinstance(where, str) else where
    if isinstance(at, Remote):
        return None if "?" in at.url or "@" in at.url else at.url
    return None if at is None else str(at.absolute())


def _is_there(where: str) -> bool:
    at = locate(where)
    return isinstance(at, Remote) or os.path.exists(at)  # noqa: PTH110  # Path.exists raises where a folder is closed


def _forget_what_is_gone(folder: Path) -> None:
    """Remove notes of output directories that are there no more, though the folder they were in is."""
    for note in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError), note.open(encoding="utf-8") as file:
            out = json.loads(file.readline())
            if os.path.isdir(os.path.dirname(out)) and not os.path.lexists(out):  # noqa: PTH112, PTH120  # never raise
                note.unlink()


def _write(file: Path, text: str) -> None:
    file.touch(mode=0o600)
    file.write_text(text, encoding="utf-8")


def _read(at: Path) -> dict[str, str]:
    with contextlib.suppress(OSError, ValueError, IndexError, TypeError, AttributeError):
        places = json.loads(at.read_text("utf-8").splitlines()[1])
        return {str(slide_id): str(where) for slide_id, where in places.items()}
    return {}
