"""What ends a worker process: too long at one thing, for what hangs in a C library ends only so, or a lost GPU.

Only a process that another restarts (a Dask worker with its nanny) is ended; a person's own never is.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal, TextIO

__all__ = ["LONGEST_S", "start_anew", "what_ended", "within"]

# Seconds an archive gives by default: a hundred times what a region takes on one core.
LONGEST_S = 1800.0
_OF_NANNY = "Dask Worker process"  # so Dask's nanny calls a process, which it starts again when it ends
_LEAST_S = 0.001  # to go: what is over already ends at once
# faulthandler knows one limit a process: the first that runs out of those below.
_lock = threading.Lock()
_running: dict[int, tuple[float, TextIO]] = {}


@contextmanager
def within(limit_s: float | None, mark: Path) -> Iterator[None]:
    """End this worker process if the ``with`` block takes longer; `mark` says so to `what_ended`, or that it died.

    faulthandler watches from a thread without the interpreter, so a block that never gives the interpreter back is
    ended, too. What it writes into `mark` names lines of code, nothing of the slide.
    """
    if limit_s is None or multiprocessing.parent_process() is None:
        yield
        return
    try:
        file = mark.open("w", encoding="utf-8")
    except OSError:  # a full disk is said when the result is committed
        yield
        return
    try:
        _watch(file, time.monotonic() + limit_s)
        try:
            yield
        finally:
            _watch(file, None)
    finally:
        file.close()
        with suppress(OSError):
            mark.unlink(missing_ok=True)


def what_ended(mark: Path) -> Literal["late", "died"] | None:
    """Return how a process ended inside the block of `mark`, None if it did not; take the mark away."""
    try:
        late = mark.stat().st_size > 0
        mark.unlink()
    except OSError:
        return None
    return "late" if late else "died"


def start_anew(mark: Path, why: str) -> None:
    """End this worker process, for another to take its place, and say why in `mark`; a person's own goes on."""
    if not multiprocessing.current_process().name.startswith(_OF_NANNY):
        return
    with suppress(OSError):
        mark.write_text(why, encoding="utf-8")
    os._exit(1)


def _watch(file: TextIO, until: float | None) -> None:
    with _lock:
        if until is None:
            _running.pop(file.fileno(), None)
        else:
            _running[file.fileno()] = until, file
        if not _running:
            faulthandler.cancel_dump_traceback_later()
            return
        first, its_file = min(_running.values(), key=lambda each: each[0])
        left_s = max(_LEAST_S, first - time.monotonic())
        faulthandler.dump_traceback_later(left_s, file=its_file, exit=True)
