"""TIFF directories: what tifffile reads, held in memory, with every size bounded before a pixel is decoded.

Hides tifffile's pages. It is made for files one trusts, so what it lets pass is refused here: directories that form a
loop, a chain that is cut off, tables that do not fit the image. What it logs can hold the slide's texts: dropped.
Tiles are fetched past it: threads share one descriptor through `os.pread`, which a seekable file does not allow.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import openslide
import tifffile
from numpy.typing import NDArray

from slidescan.errors import SlideError, SlideFormatError, SlideReadError, SlideUnsupportedError
from slidescan.slides.remote import RemoteFile, Where
from slidescan.slides.source import MAX_BLOB_BYTES, MAX_LEVEL0_PX, MAX_SIDE_PX, MAX_TILE_PX, Declined

__all__ = ["Directory", "File", "is_tiff", "open_file", "read_directories"]

MAX_DIRECTORIES = 4096  # directories, SubIFDs included; real slides have at most a few dozen
# The tags that are read; no other one is, so nothing of them can reach an output.
_SHAPE_TAGS = (254, 256, 257, 273, 277, 278, 279, 284, 322, 323, 324, 325, 330)
_COLOUR_TAGS = (258, 259, 262, 317, 338, 339, 347, 34675)
_SCALE_TAGS = (270, 282, 283, 296)  # 270: the description, of which only the µm/px is used
_TABLES = (273, 279, 324, 325)  # one entry a tile: bounded by the file, not by `MAX_BLOB_BYTES`

_reading = threading.local()
logging.getLogger("tifffile").addFilter(lambda record: not getattr(_reading, "quiet", False))


def open_file(path: Where) -> File | RemoteFile:
    """Open a file for reading in parts."""
    return File(path) if isinstance(path, Path) else RemoteFile(path)


def is_tiff(head: bytes) -> bool:
    """Return whether a file that begins so claims to be a TIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class File:
    """A read-only descriptor that closes when the last reader lets go of it, so closing never races a read."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise SlideReadError(f"{self.name}: cannot be opened ({exc.strerror})") from exc
        self.size = os.fstat(self._fd).st_size

    @cached_property
    def vendor(self) -> str | None:
        """Whose file OpenSlide takes it for."""
        vendor: str | None = openslide.OpenSlide.detect_format(str(self.path))
        return vendor

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset`, fewer at the end of the file; network mounts may answer in pieces."""
        if offset < 0:  # of 64 bits, from a damaged table
            return b""
        count = max(0, min(count, self.size - offset))
        try:
            data = os.pread(self._fd, count, offset)
            while len(data) < count and (more := os.pread(self._fd, count - len(data), offset + len(data))):
                data += more
        except OSError as exc:
            raise SlideReadError(f"{self.name}: reading failed ({exc.strerror})") from exc
        return data

    def want(self, spans: Iterable[tuple[int, int]]) -> None:
        """Do nothing: a disk is near."""

    def opened(self) -> Path:
        """Return what tifffile reads the directories from."""
        return self.path


@dataclass(frozen=True, slots=True)
class Directory:
    """One image of a TIFF file: its tags, and the SubIFDs below it."""

    file: File | RemoteFile
    tags: dict[int, Any]  # as tifffile gives them: a number, a tuple of numbers, bytes or str
    subs: list[Directory] = field(default_factory=list)

    def values(self, tag: int) -> tuple[int, ...]:
        """Return a tag's numbers, empty where absent; a rational is two."""
        value = self.tags.get(tag, ())
        try:
            return tuple(map(int, value)) if isinstance(value, tuple) else (int(value),)
        except (TypeError, ValueError):
            self.fail(f"tag {tag} holds no numbers")

    def blob(self, tag: int) -> bytes:
        """Return a tag's bytes, empty where absent; text as UTF-8."""
        value = self.tags.get(tag, b"")
        if isinstance(value, str):
            return value.encode()
        return value if isinstance(value, bytes) else b""

    def first(self, tag: int, default: int) -> int:
        """Return the first number of a tag."""
        numbers = self.values(tag)
        return numbers[0] if numbers else default

    @property
    def size_wh(self) -> tuple[int, int]:
        """Image width and height, px."""
        return self.first(256, 0), self.first(257, 0)

    @property
    def is_tiled(self) -> bool:
        """Whether the pixels are in tiles and not in strips."""
        return 322 in self.tags

    @property
    def tile_wh(self) -> tuple[int, int]:
        """Tile width and height, px; a strip spans the width."""
        if self.is_tiled:
            return self.first(322, 0), self.first(323, 0)
        width, height = self.size_wh
        return width, min(height, self.first(278, height))

    @property
    def grid_wh(self) -> tuple[int, int]:
        """How many tiles lie side by side and below each other."""
        (width, height), (tile_w, tile_h) = self.size_wh, self.tile_wh
        return -(-width // tile_w), -(-height // tile_h)

    @property
    def resolution(self) -> tuple[float, float] | None:
        """µm per px from the resolution tags, or None where they have no unit."""
        um = {2: 25400.0, 3: 10000.0}.get(self.first(296, 2))
        x, y = self.values(282), self.values(283)
        if um is None or len(x) != 2 or len(y) != 2:
            return None
        return (um * x[1] / x[0] if x[0] else float("inf")), (um * y[1] / y[0] if y[0] else float("inf"))

    def check(self) -> None:
        """Refuse sizes that are unsafe to decode, or tables that do not fit the image.

        Raises
        ------
        SlideFormatError
            With the reason, before any pixel is decoded.
        """
        (width, height), (tile_w, tile_h) = self.size_wh, self.tile_wh
        if not (0 < width <= MAX_SIDE_PX and 0 < height <= MAX_SIDE_PX and width * height <= MAX_LEVEL0_PX):
            self.fail(f"image size {width} × {height} px is not plausible")
        if tile_w <= 0 or tile_h <= 0:
            self.fail(f"tile size {tile_w} × {tile_h} px is not possible")
        if tile_w * tile_h > MAX_TILE_PX:
            self.fail(f"one tile unpacks to {tile_w} × {tile_h} px, more than the safe {MAX_TILE_PX} px")
        columns, rows = self.grid_wh
        planes = self.first(277, 1) if self.first(284, 1) == 2 else 1
        listed, needed = min(len(table) for table in self.segments()), columns * rows * planes
        if listed < needed or (listed > needed and not self.is_tiled):  # strips are not as high as it says
            self.fail(f"{columns} × {rows} tiles are needed for {width} × {height} px, {listed} are listed")

    def segments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return byte offsets and byte counts of the tiles, row by row."""
        offsets, counts = (
            np.array(self.values(tag), np.uint64).astype(np.int64)
            for tag in ((324, 325) if self.is_tiled else (273, 279))
        )
        return offsets, counts

    def fail(self, reason: str) -> NoReturn:
        """Raise `SlideFormatError` naming the file."""
        raise SlideFormatError(f"{self.file.name}: {reason}; the file is damaged or unsafe to open")

    def refuse(self, reason: str) -> NoReturn:
        """Raise `SlideUnsupportedError` for sound pixels of the wrong kind."""
        raise SlideUnsupportedError(f"{self.file.name}: {reason}; export the slide as 8-bit RGB")


def read_directories(file: File | RemoteFile) -> list[Directory]:
    """Return the main directories of a TIFF file, each with its SubIFDs.

    Raises
    ------
    SlideFormatError
        If the structure is damaged, loops, or exceeds the limits above.
    Declined
        If it is no TIFF, or a Hamamatsu file, whose offsets only OpenSlide knows, or, behind a URL, another vendor's.
    """
    head = file.read(0, 16)
    if not is_tiff(head) or len(head) < 16:
        raise Declined(f"{file.name}: not a TIFF file")
    if file.vendor == "hamamatsu":
        raise Declined(f"{file.name}: Hamamatsu NDPI needs OpenSlide")
    try:
        with _quiet(), tifffile.TiffFile(file.opened(), is_ndpi=False) as tiff:
            if isinstance(file, RemoteFile) and (vendor := _vendor(tiff.pages.first)):
                raise Declined(f"{file.name}: a {vendor} file needs OpenSlide")
            found = list(_main(file, tiff))
    except SlideError:
        raise
    except Exception as exc:  # tifffile raises whatever damage leads to
        if isinstance(exc, OSError) and exc.errno is not None:  # the disk's, which may pass
            raise SlideReadError(f"{file.name}: its TIFF directories cannot be read ({exc.strerror})") from exc
        raise SlideFormatError(f"{file.name}: a TIFF directory is missing or cut off; copy the file again") from exc
    if not found:
        raise SlideFormatError(f"{file.name}: a TIFF without any image; the file is damaged")
    return found


def _vendor(page: tifffile.TiffPage) -> str | None:
    """Name who wrote a file in a layout of their own, as OpenSlide's own detection does."""
    said = {
        "hamamatsu": 65420 in page.tags,
        "leica": page.is_scn,
        "ventana": page.is_bif,
        "philips": page.is_philips,
        "trestle": str(page.software).startswith("MedScan"),
    }
    return next((vendor for vendor, is_theirs in said.items() if is_theirs), None)


def _main(file: File | RemoteFile, tiff: tifffile.TiffFile) -> Iterator[Directory]:
    """Yield the directories of the main chain, each offset at most once."""
    seen: set[int] = set()

    def directory(page: tifffile.TiffPage) -> Directory:
        if page.offset in seen:
            raise SlideFormatError(f"{file.name}: its TIFF directories form a loop; the file is damaged")
        seen.add(page.offset)
        if len(seen) > MAX_DIRECTORIES:
            raise SlideFormatError(f"{file.name}: more than {MAX_DIRECTORIES} TIFF directories; unsafe to open")
        return Directory(file, _tags(file, page))

    for index in range(MAX_DIRECTORIES + 1):
        try:
            page = tiff.pages[index].aspage()  # one after the other: its length would follow a loop
        except IndexError:
            break
        main = directory(page)
        if main.tags.get(330):
            main.subs.extend(directory(sub.aspage()) for sub in page.pages or ())
        yield main
    size = tiff.tiff.offsetsize
    if file.read(tiff.pages.next_page_offset, size) != bytes(size):
        raise SlideFormatError(f"{file.name}: its chain of TIFF directories is missing or cut off; copy the file again")


def _tags(file: File | RemoteFile, page: tifffile.TiffPage) -> dict[int, Any]:
    found = {}
    for code in _SHAPE_TAGS + _COLOUR_TAGS + _SCALE_TAGS:
        tag = page.tags.get(code)
        if tag is None:
            continue
        if code not in _TABLES and tag.valuebytecount > MAX_BLOB_BYTES:
            raise SlideFormatError(
                f"{file.name}: tag {code} holds {tag.valuebytecount} bytes, more than {MAX_BLOB_BYTES}; unsafe to open"
            )
        found[code] = tag.value
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Drop what tifffile logs in this thread."""
    _reading.quiet = True
    try:
        yield
    finally:
        _reading.quiet = False
