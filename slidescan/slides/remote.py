"""Slides behind a URL: parts of files through fsspec, many asked for at once, kept in a bounded pool of blocks.

Hides distance and failure. What a server fails to give in time, or gives cut short, is asked for again a few times and
then stops the scan; it is never a hole: the pixels are there, and the next run continues. Invariants: a block of a TIFF
file is fetched once while the pool holds it; no request is for more than a run of blocks; nothing waits without end; of
a URL, which can hold a password, only the file's name is ever told.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit, urlunsplit

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, MissingExtraError, SlideFormatError, SlideNotFoundError, SlideReadError
from slidescan.slides.pool import TilePool, owners

__all__ = ["RefusedError", "Remote", "RemoteFile", "Where", "locate", "read_small"]

# Bytes. A block holds a few JPEG tiles, and is little to fetch for one; a run of them is one request.
_BLOCK_BYTES, _RUN_BYTES = 1 << 16, 1 << 21
# Bytes fetched ahead for one read: the JPEG tiles of a region of 4096² px are 4 to 10 MB.
_AHEAD_BYTES = 1 << 24
_POOL_BYTES = 1 << 26  # of one process
_AT_ONCE = 16  # requests of one read; servers begin to turn clients away at some hundreds
_CONNECT_S, _ANSWER_S = 10, 30  # without a byte for so long, a server does not answer
_WHOLE_S = 300  # of one request: 2 MB at 7 kB/s; one that only drips would take hours
_PAUSES_S = (0.5, 2.0, 8.0)  # before a request is repeated: a server that is restarted is back within ten seconds
_FINAL = frozenset(range(400, 500)) - {408, 429}  # HTTP: asking again will not help

_blocks = TilePool(_POOL_BYTES)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_blocks.clear)


@dataclass(frozen=True, slots=True, repr=False)
class Remote:
    """A file or directory behind a URL, with the part of `pathlib.Path` that readers use.

    Examples
    --------
    >>> case = Remote("https://archive.example/2026/case%201.ome.zarr?token=secret")
    >>> case, case.stem, case.suffix
    (https://…/case 1.ome.zarr, 'case 1.ome', '.zarr')
    >>> (case / "0" / "zarr.json").url
    'https://archive.example/2026/case%201.ome.zarr/0/zarr.json?token=secret'
    """

    url: str

    @property
    def _inner(self) -> str:
        """Of fsspec's chained URLs the first that names a file: a cache in front names none."""
        return next((part for part in self.url.split("::") if "://" in part), self.url)

    @property
    def name(self) -> str:
        """The last part of the URL's path."""
        parts = urlsplit(self._inner)
        return unquote(PurePosixPath(parts.path or parts.netloc.rpartition("@")[2]).name)  # without user and password

    @property
    def stem(self) -> str:
        """The name without its last suffix."""
        return PurePosixPath(self.name).stem

    @property
    def suffix(self) -> str:
        """The name's last suffix, with its dot."""
        return PurePosixPath(self.name).suffix

    @property
    def in_zarr(self) -> bool:
        """Whether it is a Zarr directory by its name, or lies in one."""
        parts = urlsplit(self._inner)  # of `zip://case.zarr/0` the host is where a path begins
        path = PurePosixPath(unquote(parts.path if parts.scheme in ("http", "https") else parts.netloc + parts.path))
        return any(part.lower().endswith(".zarr") for part in path.parts)

    def __truediv__(self, below: str) -> Remote:
        inner, parts = self._inner, urlsplit(self._inner)
        if below == ".":
            return self
        if parts.scheme in ("http", "https"):  # what follows ? stays behind it
            deeper = urlunsplit(parts._replace(path=str(PurePosixPath(parts.path) / below)))
        else:
            deeper = f"{inner.rstrip('/')}/{below}"
        return Remote(self.url.replace(inner, deeper, 1))

    def __repr__(self) -> str:
        return f"{urlsplit(self.url).scheme}://…/{self.name}"

    def filesystem(self) -> tuple[Any, str]:
        """Return fsspec's file system, one a process, and what it calls this file."""
        import fsspec

        scheme = urlsplit(self._inner).scheme
        options: dict[str, Any] = {}
        try:
            if scheme in ("http", "https"):
                import aiohttp

                limits = aiohttp.ClientTimeout(total=_WHOLE_S, sock_connect=_CONNECT_S, sock_read=_ANSWER_S)
                options = {"client_kwargs": {"timeout": limits}}
            if scheme == "s3":
                options = {"config_kwargs": {"connect_timeout": _CONNECT_S, "read_timeout": _ANSWER_S}}
            if "::" in self.url:
                options = {scheme: options}
            found: tuple[Any, str] = fsspec.core.url_to_fs(self.url, **options)
        except ImportError as exc:
            raise MissingExtraError(
                f'{self!r}: reading {scheme}:// needs a package more; pip install "slidescan[remote]", or what fsspec '
                f"names for it"
            ) from exc
        except ValueError as exc:
            raise ConfigError(f"{self!r}: expected a path or a URL of a kind that fsspec knows") from exc
        return found

    def fetch(self, spans: Sequence[tuple[int, int | None]], *, whole: bool = False) -> list[bytes]:
        """Return the bytes of each span (start, end); a negative start with None counts from the end.

        `whole` says that they lie inside the file: fewer are a failure.

        Raises
        ------
        SlideNotFoundError
            If there is no such file.
        SlideReadError
            If the bytes cannot be had.
        """
        system, path = self.filesystem()
        more = {"batch_size": _AT_ONCE} if system.async_impl else {}
        got: dict[int, bytes] = {}
        for pause_s in (*_PAUSES_S, None):
            left = [i for i in range(len(spans)) if i not in got]
            starts, ends = ([spans[i][side] for i in left] for side in (0, 1))
            problem: object = None
            try:
                answers = system.cat_ranges([path] * len(left), starts, ends, **more)
            except Exception as exc:  # noqa: BLE001  # some caches raise what others give as an answer
                answers = [exc] * len(left)
            for i, answer in zip(left, answers, strict=True):
                start, end = spans[i]
                if not isinstance(answer, bytes):
                    problem = answer
                elif end is not None and len(answer) > end - start:
                    raise SlideReadError(f"{self!r}: its server gives whole files only; copy it to this machine")
                elif whole and end is not None and len(answer) < end - start:
                    problem = EOFError()
                else:
                    got[i] = answer
            if problem is None:
                return [got[i] for i in range(len(spans))]
            if pause_s is None or _is_final(problem):
                break
            time.sleep(pause_s)
        if isinstance(problem, FileNotFoundError):
            raise SlideNotFoundError(f"{self!r}: no such file; check the URL")
        advice = "check the URL and your access" if _is_final(problem) else "run the same command again to continue"
        refused = isinstance(problem, PermissionError) or _status(problem) in (401, 403)
        raise (RefusedError if refused else SlideReadError)(f"{self!r}: its server {_said(problem)}; {advice}")


class RefusedError(SlideReadError):
    """A server refuses a file, as S3 does where there is none and the files may not be listed."""


Where = Path | Remote


def locate(path: Any) -> Where:
    """Return where a slide is: a `Remote` for a URL, an absolute path for anything else."""
    if isinstance(path, Remote):
        return path
    if isinstance(path, str) and "://" in path and not path.startswith("file://"):
        scheme, _, rest = path.partition("://")
        try:
            urlsplit(path)
        except ValueError as exc:
            said = f"{scheme.lower()}://…: expected a URL such as https://host/slide.svs, got a malformed one ({exc})"
            raise ConfigError(said) from exc
        return Remote(f"{scheme.lower()}://{rest}")
    if not isinstance(path, str | os.PathLike):
        raise ConfigError(
            f"path: expected that of a slide, got {type(path).__name__}; of pixels in memory use detect_image"
        )
    if path == "":
        raise ConfigError("path: expected that of a slide, got an empty one")
    local = unquote(urlsplit(path).path) if isinstance(path, str) and path.startswith("file://") else path
    if "\0" in os.fspath(local):
        raise ConfigError("path: expected one that a file can have, got one with a NUL character")
    place = Path(local)
    with contextlib.suppress(RuntimeError):  # ~ and no user of that name: a file may be called so
        place = place.expanduser()
    return place.absolute()  # workers are started elsewhere


def read_small(where: Where, most_bytes: int, *, absent_if_refused: bool = False) -> bytes | None:
    """Return a whole small file, one byte more than `most_bytes` of a larger one, None where there is none."""
    try:
        if isinstance(where, Remote):
            return where.fetch([(0, most_bytes + 1)])[0]
        with where.open("rb") as file:
            return file.read(most_bytes + 1)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except RefusedError:
        if absent_if_refused:
            return None
        raise


class RemoteFile:
    """A TIFF file behind a URL; what `slidescan.slides.ifd.File` is for one on a disk.

    Raises
    ------
    SlideNotFoundError, SlideReadError
        If it is not there, or its server refuses.
    SlideFormatError
        If the server does not give parts of files.
    """

    vendor = None  # only OpenSlide tells, and it reads no URL

    def __init__(self, remote: Remote) -> None:
        self._remote, self.name, self._key = remote, remote.name, next(owners)
        self.size = _size(remote)

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset`, fewer at the end of the file."""
        end = min(offset + count, self.size)
        if end <= offset or offset < 0:
            return b""
        first = offset // _BLOCK_BYTES
        whole = b"".join(block.data for block in self._blocks(range(first, -(-end // _BLOCK_BYTES))))
        return whole[offset - first * _BLOCK_BYTES : end - first * _BLOCK_BYTES]

    def want(self, spans: Iterable[tuple[int, int]]) -> None:
        """Fetch the blocks of spans (offset, count) that will be read next, many at once."""
        numbers: dict[int, None] = {}  # in their order
        for offset, count in spans:
            blocks = range(offset // _BLOCK_BYTES, -(-(offset + count) // _BLOCK_BYTES))
            fits = (len(numbers) + len(blocks)) * _BLOCK_BYTES <= _AHEAD_BYTES
            if 0 <= offset < offset + count <= self.size and fits:
                numbers |= dict.fromkeys(blocks)
        self._blocks(numbers)

    def opened(self) -> io.RawIOBase:
        """Return what tifffile reads the directories from."""
        return _Stream(self)

    def _blocks(self, numbers: Iterable[int]) -> list[NDArray[np.uint8]]:
        return _blocks.get_all({(self._key, number): math.inf for number in numbers}, self._fetched)

    def _fetched(self, keys: Sequence[tuple[int, int]]) -> list[NDArray[np.uint8]]:
        runs = list(_runs(sorted(number for _, number in keys)))
        spans = [(run[0] * _BLOCK_BYTES, min((run[-1] + 1) * _BLOCK_BYTES, self.size)) for run in runs]
        found: dict[int, NDArray[np.uint8]] = {}
        for run, data in zip(runs, self._remote.fetch(spans, whole=True), strict=True):
            for i, number in enumerate(run):
                block = data[i * _BLOCK_BYTES : (i + 1) * _BLOCK_BYTES]  # a copy, that goes when it must
                found[number] = np.frombuffer(block, np.uint8)
        return [found[number] for _, number in keys]


class _Stream(io.RawIOBase):
    """A seekable view of a `RemoteFile`."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")  # it may be an array of wider numbers
        data = self._file.read(self._at, len(view))
        view[: len(data)] = data
        self._at += len(data)
        return len(data)


def _size(remote: Remote) -> int:
    """Return a file's bytes, once its server has shown that it gives parts of files."""
    system, path = remote.filesystem()
    problem: object = None
    for pause_s in (_PAUSES_S[0], None):  # whoever mistyped a name is told soon
        try:
            size = system.info(path).get("size")
            if not size:
                raise SlideFormatError(f"{remote!r}: expected a slide, its server names no size; copy it here")
            with system.open(path, "rb", cache_type="none") as file:
                file.seek(size - 1)
                file.read(1)
            return int(size)
        except ValueError as exc:  # fsspec's, where more came than was asked for: nothing was downloaded
            if isinstance(exc, SlideFormatError):
                raise
            raise SlideFormatError(
                f"{remote!r}: its server gives whole files only; copy the slide to this machine"
            ) from exc
        except Exception as exc:  # noqa: BLE001  # each file system has errors of its own
            # fsspec calls whatever went wrong a missing file, and keeps the cause.
            problem = exc.__cause__ or exc
            if pause_s is None or _is_final(problem):
                break
            time.sleep(pause_s)
    if _status(problem) == 404 or isinstance(problem, FileNotFoundError):
        raise SlideNotFoundError(f"{remote!r}: no such slide; check the URL")
    raise SlideReadError(f"{remote!r}: its server {_said(problem)}; check the URL and your access")


def _runs(numbers: list[int]) -> Iterator[list[int]]:
    """Yield neighbours together, as many as one request may fetch."""
    most = _RUN_BYTES // _BLOCK_BYTES
    run: list[int] = []
    for number in numbers:
        if run and (number != run[-1] + 1 or len(run) == most):
            yield run
            run = []
        run.append(number)
    if run:
        yield run


def _status(problem: object) -> int | None:
    answer = getattr(problem, "response", None)  # botocore's errors keep it; aiohttp's have the status
    told = answer.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(answer, dict) else None
    status = getattr(problem, "status", told)
    return status if isinstance(status, int) else None


def _wants_credentials(problem: object) -> bool:
    return type(problem).__name__ == "NoCredentialsError"  # botocore's, which is not imported for this


def _is_final(problem: object) -> bool:
    told = isinstance(problem, FileNotFoundError | PermissionError) or _wants_credentials(problem)
    return told or _status(problem) in _FINAL


def _said(problem: object) -> str:
    """Say what a server did; the exception's own text would name the URL."""
    status = _status(problem)
    if status is not None:
        return f"answers {status}"
    if isinstance(problem, EOFError):
        return "gives fewer bytes than the file has"
    if isinstance(problem, TimeoutError):
        return f"does not answer within {_ANSWER_S} s"
    if isinstance(problem, PermissionError):
        return "refuses"
    if _wants_credentials(problem):
        return "wants credentials (FSSPEC_S3_ANON=true goes without, to a public bucket)"
    return f"cannot be read ({type(problem).__name__})"
