"""What went wrong with a slide: a reason of the closed list, and a line that tells nothing of where the slide lies."""

from __future__ import annotations

import errno
import os
import re
import traceback
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from slidescan.archive.listing import Entry, stem_of
from slidescan.commit import commit
from slidescan.endings import OUT_OF_MEMORY, is_short_of_memory
from slidescan.errors import (
    ConfigError,
    ModelError,
    ResultError,
    SlideError,
    SlideNotFoundError,
    SlideReadError,
    SlideUnsupportedError,
    WorkerError,
    WorkerTimeoutError,
)
from slidescan.slides.remote import locate

__all__ = ["ExplainedError", "as_listed", "explained"]

T = TypeVar("T")
# Of the directory of one slide's result, such as one of another user or a file of that name; others are the disk's.
_OWN_TROUBLES = frozenset({errno.EACCES, errno.EPERM, errno.EEXIST, errno.ENOTDIR, errno.EISDIR})


class ExplainedError(Exception):
    """A slide cannot be scanned, for a reason that its error alone would not tell."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def explained(entry: Entry, out: Path, do: Callable[[], T], failed: Callable[[str, str], T]) -> T:
    """Do something with a slide and return what comes of it, or what `failed` makes of a reason and a message.

    Parameters
    ----------
    entry : Entry
    out : Path
        Directory of its result.
    do : callable
    failed : callable
        Takes one of `slidescan.archive.record.REASONS` and a line.

    Raises
    ------
    ConfigError, ResultError
        What concerns all slides.
    """

    def fail(reason: str, said: object) -> T:
        return failed(reason, as_listed(str(said), entry))

    try:
        return do()
    except ConfigError:  # of all slides
        raise
    except ResultError as exc:
        why = exc.__cause__
        if isinstance(why, OSError) and why.errno in _OWN_TROUBLES and _is_writable(out.parent):
            said = f"its result directory cannot be written to ({why.strerror}); see who owns it and what it is"
            return failed("unwritable", said)
        raise
    except SlideNotFoundError as exc:
        return fail("not_found", exc)
    except ExplainedError as exc:
        return fail(exc.reason, exc)
    except SlideReadError as exc:
        return fail("read_error", exc)
    except SlideUnsupportedError as exc:
        return fail("unsupported", exc)
    except SlideError as exc:
        return fail("open_error", exc)
    except WorkerTimeoutError as exc:
        return fail("timeout", exc)
    except WorkerError as exc:
        return fail("killed", exc)
    except ModelError as exc:
        return fail("model_error", exc)
    except Exception as exc:  # noqa: BLE001  # a fault of ours must not end a night's run, and is reported
        if is_short_of_memory(exc):
            return failed("out_of_memory", OUT_OF_MEMORY)
        return failed("internal_error", f"{type(exc).__name__} in {_place(exc)}")


def _is_writable(folder: Path) -> bool:
    probe = folder / f".{uuid.uuid4().hex}.probe"
    try:
        commit(probe, lambda partial: partial.write_bytes(b"\0"))
        probe.unlink()
    except (ResultError, OSError):
        return False
    return True


def as_listed(said: str, entry: Entry) -> str:
    """Return an error's text with the slide called by its id, and nothing of where it and what is beside it lies.

    Where an archive lies is nobody's business, and folders and files are named after patients.
    """
    where = locate(entry.path)
    places = [where, where.absolute(), Path(os.path.realpath(where))] if isinstance(where, Path) else []
    folders = sorted({f"{place.parent}{os.sep}" for place in places} - {os.sep, f".{os.sep}"}, key=len, reverse=True)
    for told, short in ((entry.path, where.name), *((folder, "") for folder in folders)):
        said = said.replace(" ".join(told.split()), short)  # an error's text has lost its double spaces, too
    if not where.name:
        return said
    # Of the folder beside a MIRAX slide its stem is the name. The id may hold the name: nothing is replaced twice.
    name, *folders = (re.escape(" ".join(each.split())) for each in (where.name, where.stem, stem_of(entry.path)))
    words = "|".join([f"{name}(?![\\w-])", *(f"{folder}(?=/)" for folder in folders)])
    return re.sub(rf"(?<![\w.-])(?:{words})", lambda _: entry.slide_id, said)


def _place(error: BaseException) -> str:
    """Name the function an unforeseen error came from: a person can report it, and it tells nothing of the slide."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}slidescan{os.sep}" in frame.filename]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).stem}.{last.name}, line {last.lineno}"
