"""The processes of a run that `kill_archive.py` kills: found by their session, signalled, waited for."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

_LEFT_S = 30  # until which the workers of a run that was killed must have ended
LONGEST_S = 180  # for a run: more is one that hangs


def of_session(session: int) -> dict[int, bytes]:
    """Return the processes that live in a session and their command lines."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        try:
            # After the name, which may hold anything: state, parent, group, session.
            state, _, _, of, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(of) == session and state not in "ZX":
                found[int(entry.name)] = (entry / "cmdline").read_bytes()
        except OSError:  # it has ended
            continue
    return found


def workers_of(session: int) -> list[int]:
    """Return the worker processes of a run."""
    there = of_session(session)
    servers = {pid for pid, command in there.items() if b"multiprocessing.forkserver" in command}
    forked = {pid for pid in servers if _parent(pid) in servers}  # under the name of what they were forked from
    return sorted(forked | {pid for pid, command in there.items() if b"spawn_main" in command})


def _parent(pid: int) -> int:
    with suppress(OSError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def until(true: Callable[[], object], seconds: float) -> bool:
    """Wait until something is true; return whether it came to be in time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process that may have ended."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def begun(run: subprocess.Popen[bytes], file: Path) -> None:
    """Wait until a run has made a folder or written to a file, or has ended."""
    until(lambda: run.poll() is not None or file.is_dir() or (file.exists() and file.stat().st_size), LONGEST_S)


def ended(run: subprocess.Popen[bytes], seconds: float = LONGEST_S) -> int | None:
    """Wait for the end of a run; return its exit code, or None if it hangs and had to be killed."""
    if until(lambda: run.poll() is not None, seconds):
        return run.returncode
    for pid in of_session(run.pid):
        kill(pid)
    run.wait()
    return None


def left_by(run: subprocess.Popen[bytes], seconds: float = _LEFT_S) -> int:
    """Wait for all processes of a run that has ended; return how many did not end, and end them."""
    until(lambda: not of_session(run.pid), seconds)
    left = of_session(run.pid)
    for pid in left:
        kill(pid)
    return len(left)
