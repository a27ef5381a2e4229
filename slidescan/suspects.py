"""Reading that killed a process: found again, tried where nothing else can die, and given up if it was that.

A decoder that crashes takes the process with it, and whoever starts the scan again would meet the same tile. So a
region, or the thumbnail, leaves a mark while it is read. A mark that is found says only that a process ended there, by
a crash or a power cut: it is read once more in a process of its own, and only a crash of that one costs it.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["being_read", "is_suspect", "kills_its_reader"]

_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE}
# Seconds for one region or thumbnail, which takes a few: a decoder that does not come back is one that crashed.
_LONGEST_S = 600


@contextmanager
def being_read(part: Path) -> Iterator[None]:
    """Mark what `part` is made of while it is read; an error takes the mark away, the end of the process does not."""
    mark = _mark(part)
    with suppress(OSError):  # a full disk is said when the region is committed
        mark.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink(missing_ok=True)


def is_suspect(part: Path) -> bool:
    """Return whether a process ended while it read what `part` is made of."""
    return _mark(part).exists()


def kills_its_reader(part: Path, read: Callable[..., Any], *block: Any) -> bool:
    """Call ``read(*block)`` for the suspect in a process of its own; return whether that crashed.

    If it did not, it is no suspect any more.
    """
    code = "from slidescan.suspects import _read; _read()"
    told = pickle.dumps((read, block))
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, input=told, capture_output=True, timeout=_LONGEST_S, check=False)  # noqa: S603
        ended = done.returncode
    except subprocess.TimeoutExpired:
        ended = -signal.SIGABRT
    if ended not in _CRASHES:
        _mark(part).unlink(missing_ok=True)
    return ended in _CRASHES


def _mark(part: Path) -> Path:
    return part.with_suffix(".reading")


def _read() -> None:
    read, block = pickle.load(sys.stdin.buffer)  # noqa: S301  # from the process that started this one
    read(*block)
