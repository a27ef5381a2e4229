"""TIFF directories, read with every size bounded before a byte of it is fetched.

Hides byte order, classic and BigTIFF, tag types and SubIFDs. Own code and not tifffile because the file is untrusted
here: tifffile follows a directory loop for ever and logs about damage, and a worker should hold one descriptor that
threads share through `os.pread`, not a seekable file. Tests compare it with tifffile on every real file.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import SlideFormatError, SlideReadError
from slidescan.slides.source import MAX_BLOB_BYTES, MAX_LEVEL0_PX, MAX_SIDE_PX, MAX_TILE_PX, Declined

__all__ = ["Directory", "File", "is_tiff", "read_directories"]

MAX_DIRECTORIES = 4096  # directories, SubIFDs included; real slides have at most a few dozen
MAX_ENTRIES = 4096  # tags a directory; TIFF defines fewer than 300
_NDPI_TAG = 65420  # present in every Hamamatsu file: its offsets are 64 bits wide in a 32-bit layout

# TIFF 6.0 and BigTIFF field types.
_TYPES = {1: "u1", 2: "u1", 3: "u2", 4: "u4", 5: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 10: "i4", 11: "f4", 12: "f8"}
_TYPES |= {13: "u4", 16: "u8", 17: "i8", 18: "u8"}
_RATIONAL = (5, 10)


def is_tiff(head: bytes) -> bool:
    """Return whether a file that begins so claims to be a TIFF."""
    return head[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


class File:
    """A read-only descriptor that closes when the last reader lets go of it, so closing never races a read."""

    def __init__(self, path: Path) -> None:
        self.name = path.name
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as exc:
            raise SlideReadError(f"{self.name}: cannot be opened ({exc.strerror})") from exc
        self.size = os.fstat(self._fd).st_size

    def __del__(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)

    def read(self, offset: int, count: int) -> bytes:
        """Return `count` bytes from `offset`, fewer at the end of the file; network mounts may answer in pieces."""
        count = max(0, min(count, self.size - offset))
        parts: list[bytes] = []
        while count > 0:
            try:
                part = os.pread(self._fd, count, offset)
            except OSError as exc:
                raise SlideReadError(f"{self.name}: reading failed ({exc.strerror})") from exc
            if not part:
                break
            parts.append(part)
            offset, count = offset + len(part), count - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)


@dataclass(frozen=True, slots=True)
class Directory:
    """One image of a TIFF file: its tags, and the SubIFDs below it."""

    file: File
    order: str
    entries: dict[int, tuple[int, int, int]]  # tag: (type, count, where the value is)
    subs: list[Directory] = field(default_factory=list)

    def values(self, tag: int) -> NDArray[np.generic]:
        """Return a tag's numbers, empty where absent; rationals as pairs (N, 2)."""
        kind, count, where = self.entries.get(tag, (1, 0, 0))
        if kind not in _TYPES:
            self.fail(f"tag {tag} has an unknown type")
        dtype = np.dtype(self.order + _TYPES[kind])
        size = count * dtype.itemsize * (2 if kind in _RATIONAL else 1)
        if where + size > self.file.size:
            self.fail(f"tag {tag} ends past the end of the file")
        if kind in (1, 2, 7) and size > MAX_BLOB_BYTES:
            self.fail(f"tag {tag} holds {size} bytes, more than {MAX_BLOB_BYTES}")
        numbers = np.frombuffer(self.file.read(where, size), dtype)
        return numbers.reshape(-1, 2) if kind in _RATIONAL else numbers

    def blob(self, tag: int) -> bytes:
        """Return a tag's bytes, empty where absent."""
        return self.values(tag).tobytes()

    def first(self, tag: int, default: int) -> int:
        """Return the first number of a tag."""
        numbers = self.values(tag)
        return int(numbers.flat[0]) if numbers.size else default

    @property
    def size_wh(self) -> tuple[int, int]:
        """Image width and height, px."""
        return self.first(256, 0), self.first(257, 0)

    @property
    def is_tiled(self) -> bool:
        """Whether the pixels are in tiles and not in strips."""
        return 322 in self.entries

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
        if um is None or x.shape != (1, 2) or y.shape != (1, 2):
            return None
        (x_px, x_per), (y_px, y_per) = x[0].tolist(), y[0].tolist()
        return (um * x_per / x_px if x_px else float("inf")), (um * y_per / y_px if y_px else float("inf"))

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
        offsets, counts = (self.entries.get(tag, (0, 0, 0))[1] for tag in ((324, 325) if self.is_tiled else (273, 279)))
        if min(offsets, counts) < columns * rows * planes:
            self.fail(
                f"{columns} × {rows} tiles are needed for {width} × {height} px, {min(offsets, counts)} are listed"
            )

    def segments(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return byte offsets and byte counts of the tiles, row by row."""
        tags = (324, 325) if self.is_tiled else (273, 279)
        offsets, counts = (self.values(tag).astype(np.int64, casting="unsafe") for tag in tags)
        return offsets, counts

    def fail(self, reason: str) -> NoReturn:
        """Raise `SlideFormatError` naming the file."""
        raise SlideFormatError(f"{self.file.name}: {reason}; the file is damaged or unsafe to open")

    def refuse(self, reason: str) -> NoReturn:
        """Raise `SlideFormatError` for sound pixels of the wrong kind."""
        raise SlideFormatError(f"{self.file.name}: {reason}; export the slide as 8-bit RGB")


def read_directories(file: File) -> list[Directory]:
    """Return the main directories of a TIFF file, each with its SubIFDs.

    Raises
    ------
    SlideFormatError
        If the structure is damaged, loops, or exceeds the limits above.
    Declined
        If it is no TIFF, or a Hamamatsu file, whose offsets only OpenSlide knows.
    """
    head = file.read(0, 16)
    if not is_tiff(head) or len(head) < 16:
        raise Declined(f"{file.name}: not a TIFF file")
    order = "<" if head[:2] == b"II" else ">"
    big = head[2:4] in (b"+\0", b"\0+")
    walk = _Walk(file, order, big)
    start = struct.unpack_from(order + "Q", head, 8)[0] if big else struct.unpack_from(order + "I", head, 4)[0]
    if not big and file.size >= 1 << 32 and not 0 < start < file.size:
        start = struct.unpack_from(order + "Q", head, 4)[0]
    found = walk.chain(start)
    if not found:
        raise SlideFormatError(f"{file.name}: a TIFF without any image; the file is damaged")
    return found


class _Walk:
    """Follows directory offsets, each at most once."""

    def __init__(self, file: File, order: str, big: bool) -> None:
        self._file, self._order = file, order
        self._count, self._next, self._step = ("Q", "Q", 20) if big else ("H", "I", 12)
        self._seen: set[int] = set()

    def chain(self, offset: int) -> list[Directory]:
        found: list[Directory] = []
        while offset:
            directory, offset = self._directory(offset)
            found.append(directory)
            if _NDPI_TAG in directory.entries:
                raise Declined(f"{self._file.name}: Hamamatsu NDPI needs OpenSlide")
            for sub in directory.values(330).astype(np.int64, casting="unsafe").tolist():
                directory.subs.append(self._directory(sub)[0])
        return found

    def _directory(self, offset: int) -> tuple[Directory, int]:
        name = self._file.name
        if offset in self._seen:
            raise SlideFormatError(f"{name}: its TIFF directories form a loop; the file is damaged")
        self._seen.add(offset)
        if len(self._seen) > MAX_DIRECTORIES:
            raise SlideFormatError(f"{name}: more than {MAX_DIRECTORIES} TIFF directories; unsafe to open")
        head = struct.Struct(self._order + self._count)
        tail = struct.Struct(self._order + self._next)
        raw = self._file.read(offset, head.size)
        entries = head.unpack(raw)[0] if len(raw) == head.size else 0
        if not 0 < entries <= MAX_ENTRIES:
            raise SlideFormatError(f"{name}: a TIFF directory is missing or cut off; the file is damaged")
        body = self._file.read(offset + head.size, entries * self._step + tail.size)
        if len(body) != entries * self._step + tail.size:
            raise SlideFormatError(f"{name}: a TIFF directory is cut off; the file is damaged")
        item = struct.Struct(f"{self._order}HH{self._next}{self._next}")
        tags: dict[int, tuple[int, int, int]] = {}
        for at in range(0, entries * self._step, self._step):
            tag, kind, count, value = item.unpack_from(body, at)
            width = np.dtype(_TYPES.get(kind, "u1")).itemsize * count * (2 if kind in _RATIONAL else 1)
            inline = offset + head.size + at + self._step - tail.size
            tags[tag] = (kind, count, inline if width <= tail.size else value)
        return Directory(self._file, self._order, tags), tail.unpack_from(body, entries * self._step)[0]
