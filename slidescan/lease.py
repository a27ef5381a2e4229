"""Who may write to a result directory: one process at a time, on whatever machine.

Two claims together. A lock of the operating system is gone the moment its holder dies, but some file systems have none,
and some have one that other machines do not see. A lease is a file that its holder renews: any machine sees it, and it
is void when it was not renewed for a minute. A lease of this machine is of a process that died where its lock is free
or, where there are no locks, no process of its number is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slidescan.commit import disk_error, lives, machine, place
from slidescan.errors import ResultBusyError, ResultLeasedError

__all__ = ["LASTS_S", "claimed"]

LASTS_S = 60  # seconds a lease holds without renewal: several of them may be late on a busy server
_RENEWED_S = 15
_LEASE = "lease"


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold `out` for this process.

    Raises
    ------
    ResultBusyError
        If another process holds it.
    ResultLeasedError
        If one of another machine does, or did within the last minute.
    ResultError
        If it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = os.open(out, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as exc:
        raise disk_error(out, exc) from exc
    try:
        locked = _lock(handle, out)
        lease, ours = out / _LEASE, f"{place()} {os.getpid()} {uuid.uuid4().hex}"
        try:
            _take(lease, ours, locked)
        except OSError as exc:
            if isinstance(exc, ResultBusyError):
                raise
            raise disk_error(lease, exc) from exc
        ended = threading.Event()
        renewal = threading.Thread(target=_renew, args=(lease, ended), daemon=True)
        renewal.start()
        try:
            yield
        finally:
            ended.set()
            renewal.join()
            with contextlib.suppress(OSError):
                if lease.read_text(encoding="utf-8") == ours:
                    lease.unlink()
    finally:
        os.close(handle)


def _lock(handle: int, out: Path) -> bool:
    """Lock the directory; return False where the file system has no locks."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as exc:
        said = f"{out}: another scan is writing there; wait for it or choose another directory"
        raise ResultBusyError(said) from exc
    except OSError:
        return False
    return True


def _take(lease: Path, ours: str, locked: bool) -> None:
    """Make the lease ours, if there is none or the one there is void."""
    aside = lease.with_name(f".{_LEASE}.{uuid.uuid4().hex}.partial")
    while not _create(lease, ours):
        try:
            aside.write_text(ours, encoding="utf-8")
            now = aside.stat().st_mtime  # by the clock of the file system, which tells of renewals, too
            holder, renewed = lease.read_text(encoding="utf-8"), lease.stat().st_mtime
            if not _died_here(holder, locked) and now - renewed < LASTS_S:
                raise ResultLeasedError(
                    f"{lease.parent}: a scan on another machine is writing there, or did until less than {LASTS_S} s "
                    "ago; wait for it or choose another directory"
                )
            if _replace(lease, holder, aside, now):
                return
        except FileNotFoundError:  # given back meanwhile
            continue
        finally:
            aside.unlink(missing_ok=True)


def _died_here(holder: str, locked: bool) -> bool:
    """Return whether the holder of a lease was a process of this machine and is no more."""
    if locked and holder.startswith(machine()):
        return True
    where, _, pid = holder.rpartition(" ")[0].partition(" ")
    return where == place() and pid.isdecimal() and not lives(int(pid))


def _replace(lease: Path, holder: str, ours: Path, now: float) -> bool:
    """Put our lease in the place of a void one; of several that want to, who makes a file first named after it may."""
    right = lease.with_name(f".{_LEASE}.{hashlib.sha256(holder.encode()).hexdigest()[:16]}.partial")
    if not _create(right, ""):
        if now - right.stat().st_mtime < LASTS_S:
            said = f"{lease.parent}: another scan begins to write there; wait for it or choose another directory"
            raise ResultLeasedError(said)
        right.unlink()  # of one that died at this
        return False
    try:
        if lease.read_text(encoding="utf-8") != holder:  # who had the right before has used it
            return False
        ours.replace(lease)
        return True
    finally:
        right.unlink(missing_ok=True)


def _create(lease: Path, text: str) -> bool:
    """Write a lease where there is none; return False where there is one."""
    try:
        file = lease.open("x", encoding="utf-8")
    except FileExistsError:
        return False
    try:
        with file:
            file.write(text)
    except OSError:  # the disk is full: an empty one would be another's
        lease.unlink(missing_ok=True)
        raise
    return True


def _renew(lease: Path, ended: threading.Event) -> None:
    while not ended.wait(_RENEWED_S):
        with contextlib.suppress(OSError):  # a server that is away for a moment; the next one may do
            os.utime(lease)
