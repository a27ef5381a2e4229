"""Regions whose reading killed a process: found again, tried where nothing else can die, and given up if it was they.

A decoder that crashes takes the process with it, and whoever starts the scan again would meet the same tile. So a
region leaves a mark while it is read. A mark that is found says only that a process ended there, by a crash or a power
cut: the region is read once more in a process of its own, and only a crash of that one costs it.
"""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

__all__ = ["being_read", "is_suspect", "kills_its_reader"]

_CRASHES = {-signal.SIGSEGV, -signal.SIGBUS, -signal.SIGABRT, -signal.SIGILL, -signal.SIGFPE}
# Seconds for one region, which takes a few: a decoder that does not come back is one that crashed.
_LONGEST_S = 600


@contextmanager
def being_read(part: Path) -> Iterator[None]:
    """Mark the region of `part` while it is read; an error takes the mark away, the end of the process does not."""
    mark = _mark(part)
    with suppress(OSError):  # a full disk is said when the region is committed
        mark.touch()
    try:
        yield
    finally:
        with suppress(OSError):
            mark.unlink(missing_ok=True)


def is_suspect(part: Path) -> bool:
    """Return whether a process ended while it read the region of `part`."""
    return _mark(part).exists()


def kills_its_reader(part: Path, slide: Any, *block: Any) -> bool:
    """Call ``slide.read(*block)`` for the suspect in a process of its own; return whether that crashed.

    Its mark is gone then.
    """
    code = "from slidescan.suspects import _read; _read()"
    told = pickle.dumps((slide, block))
    try:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, input=told, capture_output=True, timeout=_LONGEST_S, check=False)  # noqa: S603
        ended = done.returncode
    except subprocess.TimeoutExpired:
        ended = -signal.SIGABRT
    _mark(part).unlink(missing_ok=True)
    return ended in _CRASHES


def _mark(part: Path) -> Path:
    return part.with_suffix(".reading")


def _read() -> None:
    slide, block = pickle.load(sys.stdin.buffer)  # noqa: S301  # from the process that started this one
    slide.read(*block)
