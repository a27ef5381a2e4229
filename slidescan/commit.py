"""Files that are whole or not there: written aside and moved into place in one step.

Hides the name aside, and who may remove one that a killed process left: it tells machine and process, so that any later
run on that machine sees that nobody writes there any more. `commit` writes a file again that was taken all the same.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import platform
import re
import shutil
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

from slidescan.errors import ConfigError, ResultError

__all__ = [
    "aside",
    "can_be_made",
    "commit",
    "disk_error",
    "flush",
    "lives",
    "local",
    "machine",
    "made",
    "place",
    "short_name",
    "sweep",
]

# Seconds after which nobody writes a file any more, wherever: the largest takes a minute. Clocks differ by less.
_ABANDONED_S = 24 * 3600
_TRIES = 3
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/")  # two letters at least; a Path has but one slash left
_ASIDE = re.compile(r"\..+\.([0-9a-f]+)-(\d+)-\d+\.partial(\.old)?", re.DOTALL)  # see `aside`: machine, process
_LONG_BYTES = 160  # of a name that still has room for what is added to it: file systems end at 255


def commit(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write(partial)` and move what it wrote to `path` in one step; leave nothing behind on failure.

    Raises
    ------
    ResultError
        If the disk is full or cannot be written.
    """
    partial = aside(path)
    try:
        if not path.parent.is_dir():  # libraries would tell of the name aside
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        for left in reversed(range(_TRIES)):
            try:
                write(partial)
                with partial.open("rb") as written:
                    os.fsync(written.fileno())  # or a power cut leaves a name without its bytes
                partial.replace(path)
                return
            except FileNotFoundError:  # swept, or the folder is gone
                if not left:
                    raise
    except OSError as exc:
        raise disk_error(path, exc) from exc
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def aside(path: Path) -> Path:
    """Return where this thread writes what is named `path` when it is whole; a file there is of one that was killed."""
    return path.with_name(f".{short_name(path)}.{place()}-{os.getpid()}-{threading.get_ident()}.partial")


def short_name(path: Path) -> str:
    """Return the name of a file, or a digest of it where there is no room for what is added to a name aside."""
    name = os.fsencode(path.name)
    return path.name if len(name) < _LONG_BYTES else hashlib.sha256(name).hexdigest()


def local(out: str | Path) -> Path:
    """Return where to write as a path.

    Raises
    ------
    ConfigError
        If it is a URL: a directory of that name would be made here. Or if it is empty.
    """
    if out == "":
        raise ConfigError("out: expected a directory, got an empty name; . is the one you are in")
    if found := _URL.match(str(out)):
        raise ConfigError(f"{out}: expected a directory of this machine, got a {found[1]} URL; write here and copy it")
    return Path(out)


def made(directory: Path) -> Path:
    """Make a directory to write into, now, before hours of work for it; return it.

    Raises
    ------
    ConfigError
        If it is a URL.
    ResultError
        If it cannot be made or written into.
    """
    local(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if not os.access(directory, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as exc:
        raise disk_error(directory, exc) from exc
    return directory


def can_be_made(directory: Path) -> Path:
    """See that a directory could be made and written into, without doing so; return it.

    Raises
    ------
    ResultError
        If it could not.
    """
    there = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    code = 0 if os.access(there, os.W_OK) else errno.EACCES
    if code or not there.is_dir():
        code = code or errno.ENOTDIR
        raise disk_error(directory, OSError(code, os.strerror(code)))
    return directory


def flush(tree: Path) -> None:
    """Have the disk hold every file below a directory, before a name says that it is whole."""
    for file in tree.rglob("*"):
        if file.is_file():
            with file.open("rb") as written:
                os.fsync(written.fileno())


def sweep(folder: Path, *, held: bool = False) -> None:
    """Remove what was half written in a folder by a process that was killed; what is being written stays.

    Of another machine's only the age tells, or that the folder is `held`: then no other machine writes there.
    """
    for partial in folder.glob(".*.partial*"):
        if found := _ASIDE.fullmatch(partial.name):
            here = found[1] == place()
            with contextlib.suppress(OSError):
                if here and lives(int(found[2])):
                    continue
                if here or held or time.time() - partial.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def disk_error(path: Path, exc: OSError) -> ResultError:
    """Say in one line why `path` cannot be written and what to do."""
    if exc.errno in (errno.ENOSPC, errno.EDQUOT):
        return ResultError(f"{path.parent}: the disk is full; free some space and run the same command to continue")
    return ResultError(f"{path}: cannot be written ({exc.strerror or exc}); choose another output directory with -o")


@cache
def machine() -> str:
    """Name this machine since it started, without telling its name."""
    with contextlib.suppress(OSError):
        return hashlib.sha256(Path("/proc/sys/kernel/random/boot_id").read_bytes()).hexdigest()[:16]
    return hashlib.sha256(platform.node().encode()).hexdigest()[:16]


@cache
def place() -> str:
    """Name where a number of a process means something: containers of one machine count theirs each."""
    with contextlib.suppress(OSError):
        return f"{machine()}{Path('/proc/self/ns/pid').stat().st_ino:x}"
    return machine()


def lives(pid: int) -> bool:
    """Return whether a process of this place is there."""
    try:
        with contextlib.suppress(PermissionError):  # another user's
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
