"""Pixels of an OME-NGFF (or bare RGB) Zarr directory.

Hides zarr-python. Invariants: `ngff` has judged the metadata before an array is opened; what a chunk says of its own
size is checked before a codec believes it; a chunk that cannot be decoded is a hole. So is one that is absent, unless
the array's fill value is white: zarr-python would return black there, and black glass is either a lost file or a place
that was never scanned.
"""

from __future__ import annotations

import lzma
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.abc.store import SuffixByteRequest
from zarr.storage import LocalStore, WrapperStore

from slidescan.errors import SlideFormatError, SlideReadError
from slidescan.geometry import Box
from slidescan.slides.ngff import META, Dataset, is_zarr, read_zarr_image
from slidescan.slides.packed import check_packed
from slidescan.slides.pool import MOST_TILE_BYTES, Span, owners, pool, spans
from slidescan.slides.remote import Remote, Where, read_small
from slidescan.slides.source import MAX_BLOB_BYTES, WHITE, Facts, check_levels, pyramid
from slidescan.stages import stage

__all__ = ["ZarrSource"]

_PIECES, _PIECE_BYTES = 17, 32 << 10  # files of level 0 that tell a slide, and bytes of each (`fingerprint`)
# What zarr-python and its codecs raise for damaged data; bzip2 and gzip also an OSError without a number.
_CHUNK_ERRORS = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    MemoryError,  # of a chunk that unpacks to more than there is
    ArithmeticError,
    zlib.error,
    lzma.LZMAError,
)
_Place = tuple[int, int, int, int]  # of a chunk: source, level, row, column
_NO_CHUNK = 2**64 - 1  # stands in a shard's index for a chunk that was not written


class ZarrSource:
    """Reads one RGB pyramid from a Zarr directory.

    Raises
    ------
    SlideFormatError
        If it is not a uint8 RGB image, its sizes are unsafe, or it uses an unknown codec.
    """

    def __init__(self, path: Where) -> None:
        self._name, self._owner = path.name, next(owners)
        self._image = read_zarr_image(path)
        wh, datasets = self._image.wh, self._image.datasets
        levels = pyramid([wh(d.shape) for d in datasets], [wh(d.chunks) for d in datasets])
        vendor = "ngff" if self._image.is_ngff else None
        self.facts = Facts("zarr", vendor, levels, self._image.resolution, others=self._image.others)
        check_levels(self._name, levels)
        self._missing: list[set[str]] = []
        self._indices: dict[str, bytes] = {}
        self._arrays = [self._open(d) for d in datasets]

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        """Fill `out` from (x, y) level px; return the chunks that failed, in level px."""
        block = Box(x, y, x + out.shape[1], y + out.shape[0])
        (width, height), fill = self.facts.levels[level].tile_wh, self._image.datasets[level].fill
        pooled = 3 * width * height <= MOST_TILE_BYTES
        holes = [] if self._fill(level, block, out, pooled=pooled) else self._salvage(level, block, out)
        absent = self._absent(level, block) if fill != WHITE else []
        for (column, row), _ in (piece for hole in absent for piece in _pieces(hole, (width, height))):
            pool.forget((self._owner, level, row, column))  # it may yet come
        holes += absent
        for hole in holes:
            x0, y0, x1, y1 = hole.round_out()
            out[y0 - y : y1 - y, x0 - x : x1 - x] = WHITE
        return holes

    def pieces(self) -> Iterator[bytes]:
        """Yield what tells this slide from others: its metadata, and files of level 0 from all over it."""
        for dataset in self._image.datasets:
            for name in META:
                yield read_small(dataset.path / name, MAX_BLOB_BYTES, absent_if_refused=True) or b""
        dataset = self._image.datasets[0]
        width, height = self.facts.levels[0].size_wh
        file_w, file_h = self._image.wh(dataset.files)
        columns, rows = -(-width // file_w), -(-height // file_h)
        for i in range(0, columns * rows, max(1, columns * rows // _PIECES)):
            row, column = divmod(i, columns)
            yield read_small(dataset.path / self._key(dataset, column, row), _PIECE_BYTES) or b""

    def _fill(self, level: int, block: Box, out: NDArray[np.uint8], *, pooled: bool) -> bool:
        """Put the px of a block into `out`; return whether all could be decoded."""
        try:
            if pooled:
                self._block(level, block, out)
            else:
                _lay(self._pixels(level, *block.round_out()), out)
        except SlideReadError:
            raise
        except OSError as exc:
            if exc.errno is None:  # a codec's
                return False
            raise SlideReadError(f"{self._name}: cannot be read ({exc.strerror})") from exc
        except _CHUNK_ERRORS:
            return False
        return True

    def _salvage(self, level: int, block: Box, out: NDArray[np.uint8]) -> list[Box]:
        """Read chunk by chunk."""
        holes: list[Box] = []
        for _, part in _pieces(block, self.facts.levels[level].tile_wh):
            x0, y0, x1, y1 = part.translate(-block.x0, -block.y0).round_out()
            if not self._fill(level, part, out[y0:y1, x0:x1], pooled=False):  # or it would fill the pool with this
                holes.append(part)
        return holes

    def _absent(self, level: int, block: Box) -> list[Box]:
        """Return where a chunk file is missing, or a chunk in a shard.

        Raises `SlideReadError` when the array itself is gone: then nothing is a hole, the slide is.
        """
        dataset, axes = self._image.datasets[level], self._image.axes
        channels = range(-(-3 // dataset.files[axes.index("c")]))
        holes: list[Box] = []
        for (column, row), part in _pieces(block, self._image.wh(dataset.files)):
            for channel in channels:
                key, where = self._key(dataset, column, row, channel), dataset.path
                if key in self._missing[level] if isinstance(where, Remote) else not (where / key).is_file():
                    holes.append(part)
                    break
            else:
                holes += self._unwritten(dataset, column, row, part)
        if holes and not is_zarr(dataset.path):
            raise SlideReadError(f"{self._name}: the slide is gone; check the path or the mount")
        return holes

    def _unwritten(self, dataset: Dataset, column: int, row: int, part: Box) -> Iterator[Box]:
        """Yield the chunks of a shard that were not written, as far as they are in `part`."""
        if not dataset.index:
            return
        axes, counts = self._image.axes, [n // m for n, m in zip(dataset.files, dataset.chunks, strict=True)]
        lacking = np.zeros((1, 1), np.bool_)
        for channel in range(-(-3 // dataset.files[axes.index("c")])):
            index = self._shard_index(dataset, self._key(dataset, column, row, channel))[: 16 * math.prod(counts)]
            if len(index) < 16 * math.prod(counts):  # cut off: it will not be decoded either
                return
            none = (np.frombuffer(index, "<u8").reshape(*counts, 2) == _NO_CHUNK).all(-1)
            none = none.any(tuple(i for i, axis in enumerate(axes) if axis not in "yx"))
            lacking = lacking | (none if axes.index("y") < axes.index("x") else none.T)
        (file_w, file_h), (width, height) = self._image.wh(dataset.files), self._image.wh(dataset.chunks)
        for inner_row, inner_column in np.argwhere(lacking).tolist():
            x0, y0 = column * file_w + inner_column * width, row * file_h + inner_row * height
            hole = Box(x0, y0, x0 + width, y0 + height).clip(part)
            if not hole.is_empty:
                yield hole

    def _shard_index(self, dataset: Dataset, key: str) -> bytes:
        """Return where the chunks of a shard lie in it, asked for once behind a URL."""
        where, size, at_end = dataset.path / key, abs(dataset.index), dataset.index < 0
        if not isinstance(where, Path):
            name = where.url
            if name not in self._indices:
                self._indices[name] = where.fetch([(-size, None) if at_end else (0, size)])[0]
            return self._indices[name]
        try:
            with where.open("rb") as file:
                if at_end:
                    file.seek(-size, os.SEEK_END)
                return file.read(size)
        except OSError:  # it is shorter, or gone by now
            return b""

    def _key(self, dataset: Dataset, column: int, row: int, channel: int = 0) -> str:
        place = {"x": column, "y": row, "c": channel}
        return dataset.key(tuple(place.get(axis, 0) for axis in self._image.axes))

    def _block(self, level: int, block: Box, out: NDArray[np.uint8]) -> None:
        """Read what no other block will want at once, and what lies near the edges by whole chunks, for all of them."""
        x0, y0, x1, y1 = block.round_out()
        (tile_w, tile_h), (width, height) = self.facts.levels[level].tile_wh, self.facts.levels[level].size_wh
        columns, rows = spans(x0, x1, tile_w, width), spans(y0, y1, tile_h, height)
        parts = [[list(run) for _, run in groupby(side, lambda span: span.reads)] for side in (rows, columns)]
        for down, along in product(*parts):
            top, bottom, left, right = down[0].start, down[-1].stop, along[0].start, along[-1].stop
            into = out[top - y0 : bottom - y0, left - x0 : right - x0]
            if down[0].reads * along[0].reads == 1:
                _lay(self._pixels(level, left, top, right, bottom), into)
            else:
                self._shared(level, down, along, into)

    def _shared(self, level: int, rows: list[Span], columns: list[Span], out: NDArray[np.uint8]) -> None:
        """Put the px of chunks into `out`, by way of the pool; of what that lacks, neighbours are read at once."""
        places = ((self._owner, level, row.number, column.number) for row, column in product(rows, columns))
        chunks = dict(zip(places, product(rows, columns), strict=True))

        def decode(lacking: Sequence[_Place]) -> list[NDArray[np.uint8]]:
            tiles = {}
            for group in _rectangles(lacking):
                (first_row, first), (last_row, last) = chunks[group[0]], chunks[group[-1]]
                around = self._pixels(level, first.low, first_row.low, last.high, last_row.high)
                for place in group:
                    row, column = chunks[place]
                    tile = tiles[place] = np.empty((row.high - row.low, column.high - column.low, 3), np.uint8)
                    y, x = row.low - first_row.low, column.low - first.low
                    _lay(around[y : y + tile.shape[0], x : x + tile.shape[1]], tile)
            return [tiles[place] for place in lacking]

        reads = {place: row.reads * column.reads for place, (row, column) in chunks.items()}
        x0, y0 = columns[0].start, rows[0].start
        for tile, (row, column) in zip(pool.get_all(reads, decode), chunks.values(), strict=True):
            part = tile[row.start - row.low : row.stop - row.low, column.start - column.low : column.stop - column.low]
            out[row.start - y0 : row.stop - y0, column.start - x0 : column.stop - x0] = part

    def _pixels(self, level: int, x0: int, y0: int, x1: int, y1: int) -> NDArray[np.uint8]:
        """Return px of a level, decoded at once, (H, W, 3)."""
        where = {"y": slice(y0, y1), "x": slice(x0, x1), "c": slice(None)}
        axes = self._image.axes
        with stage("decode"):
            pixels = np.asarray(self._arrays[level][tuple(where.get(axis, 0) for axis in axes)])
        kept = [axis for axis in axes if axis in where]
        return pixels.transpose([kept.index(axis) for axis in "yxc"])

    def _open(self, dataset: Dataset) -> Any:  # zarr's own types do not pass strict mode
        import zarr
        from imagecodecs.numcodecs import register_codecs

        register_codecs(verbose=False)
        self._missing.append(set())
        if isinstance(dataset.path, Remote):
            from slidescan.slides.urlstore import UrlStore

            store = UrlStore(dataset.path, self._missing[-1])
        else:
            store = LocalStore(dataset.path, read_only=True)
        try:
            return zarr.open_array(_Checked(store, dataset), mode="r")
        except _CHUNK_ERRORS as exc:
            raise SlideFormatError(f"{self._name}: zarr cannot open its array ({type(exc).__name__})") from exc


def _rectangles(places: Sequence[_Place]) -> Iterable[list[_Place]]:
    """Group places, which come row by row, into rectangles, each from its first place to its last."""
    groups: dict[tuple[int, int, int], list[_Place]] = {}  # by first and last column, and the row that would follow
    for (row, _), numbered in groupby(enumerate(places), lambda pair: (pair[1][2], pair[1][3] - pair[0])):
        run = [place for _, place in numbered]
        first, last = run[0][3], run[-1][3]
        groups[first, last, row + 1] = groups.pop((first, last, row), []) + run
    return groups.values()


def _lay(rgb: NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    if rgb.strides[2] == 1:
        out[...] = rgb
    else:
        for channel in range(3):  # a fifth of the time that numpy takes for all at once
            out[..., channel] = rgb[..., channel]


class _Checked(WrapperStore):  # type: ignore[misc]  # zarr's own types do not pass strict mode
    """A store that gives no chunk whose own words are unsafe to decode; raises ValueError instead."""

    def __init__(self, store: Any, dataset: Dataset) -> None:
        super().__init__(store)
        self._coder, self._sum_bytes, self._index = dataset.coder, dataset.sum_bytes, dataset.index
        # A filter may have widened the values.
        self._most_bytes = 8 * math.prod(dataset.chunks) + 65536

    async def get(self, key: str, prototype: Any, byte_range: Any = None) -> Any:
        found = await super().get(key, prototype, byte_range)
        if found is not None and key.rsplit("/", 1)[-1] not in META:
            for unit in self._units(found.as_numpy_array().data, byte_range):
                check_packed(self._coder, unit[: len(unit) - self._sum_bytes], self._most_bytes)
        return found

    def _units(self, data: memoryview, byte_range: Any) -> list[memoryview]:
        """Return what of the data will be decoded alone: all of it, or the parts of a whole shard."""
        size, at_end = abs(self._index), self._index < 0
        if size and byte_range is None:
            table = (data[-size:] if at_end else data[:size])[: size // 16 * 16]
            places = np.frombuffer(table, "<u8").reshape(-1, 2).tolist()
            return [data[start : start + count] for start, count in places if start < _NO_CHUNK]
        is_index = isinstance(byte_range, SuffixByteRequest) if at_end else size and byte_range.start == 0
        return [] if is_index else [data]


def _pieces(block: Box, piece_wh: tuple[int, int]) -> list[tuple[tuple[int, int], Box]]:
    """Cut a block along a grid; return the (column, row) and the part of the block in each."""
    (x0, y0, x1, y1), (width, height) = block.round_out(), piece_wh
    cells = product(range(y0 // height, -(-y1 // height)), range(x0 // width, -(-x1 // width)))
    return [((c, r), Box(c * width, r * height, (c + 1) * width, (r + 1) * height).clip(block)) for r, c in cells]
