"""Pixels of an OME-NGFF (or bare RGB) Zarr directory.

Hides zarr-python. Invariants: `ngff` has judged the metadata before an array is opened; a chunk that cannot be decoded
is a hole. So is one that is absent, unless the array's fill value is white: zarr-python would return black there, and
black glass is either a lost file or a place that was never scanned.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import SlideFormatError, SlideReadError
from slidescan.geometry import Box
from slidescan.slides.ngff import META, Dataset, is_zarr, read_zarr_image
from slidescan.slides.remote import Remote, Where, read_small
from slidescan.slides.source import MAX_BLOB_BYTES, WHITE, Facts, check_levels, pyramid
from slidescan.stages import stage

__all__ = ["ZarrSource"]

# What zarr-python and its codecs raise for damaged data.
_PIECES, _PIECE_BYTES = 17, 32 << 10  # files of level 0 that tell a slide, and bytes of each (`fingerprint`)
_CHUNK_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, EOFError)


class ZarrSource:
    """Reads one RGB pyramid from a Zarr directory.

    Raises
    ------
    SlideFormatError
        If it is not a uint8 RGB image, its sizes are unsafe, or it uses an unknown codec.
    """

    def __init__(self, path: Where) -> None:
        self._name = path.name
        self._image = read_zarr_image(path)
        wh, datasets = self._image.wh, self._image.datasets
        levels = pyramid([wh(d.shape) for d in datasets], [wh(d.chunks) for d in datasets])
        self.facts = Facts("zarr", "ngff" if self._image.is_ngff else None, levels, self._image.resolution)
        check_levels(self._name, levels)
        self._missing: list[set[str]] = []
        self._arrays = [self._open(d) for d in datasets]

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        """Fill `out` from (x, y) level px; return the chunks that failed, in level px."""
        block = Box(x, y, x + out.shape[1], y + out.shape[0])
        try:
            out[...] = self._block(level, block)
            holes = []
        except _CHUNK_ERRORS:
            holes = self._salvage(level, block, out)
        except SlideReadError:
            raise
        except OSError as exc:
            raise SlideReadError(f"{self._name}: cannot be read ({exc.strerror or type(exc).__name__})") from exc
        if self._image.datasets[level].fill != WHITE:
            holes += self._absent(level, block)
        for hole in holes:
            x0, y0, x1, y1 = hole.round_out()
            out[y0 - y : y1 - y, x0 - x : x1 - x] = WHITE
        return holes

    def pieces(self) -> Iterator[bytes]:
        """Yield what tells this slide from others: its metadata, and files of level 0 from all over it."""
        for dataset in self._image.datasets:
            for name in META:
                yield read_small(dataset.path / name, MAX_BLOB_BYTES) or b""
        dataset = self._image.datasets[0]
        width, height = self.facts.levels[0].size_wh
        cells = _pieces(Box(0, 0, width, height), self._image.wh(dataset.files))
        for (column, row), _ in cells[:: max(1, len(cells) // _PIECES)]:
            yield read_small(dataset.path / self._key(dataset, column, row), _PIECE_BYTES) or b""

    def _salvage(self, level: int, block: Box, out: NDArray[np.uint8]) -> list[Box]:
        """Read chunk by chunk."""
        holes: list[Box] = []
        for _, part in _pieces(block, self.facts.levels[level].tile_wh):
            x0, y0, x1, y1 = part.translate(-block.x0, -block.y0).round_out()
            try:
                out[y0:y1, x0:x1] = self._block(level, part)
            except _CHUNK_ERRORS:
                holes.append(part)
        return holes

    def _absent(self, level: int, block: Box) -> list[Box]:
        """Return where a chunk file is missing.

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
        if holes and not is_zarr(dataset.path):
            raise SlideReadError(f"{self._name}: the slide is gone; check the path or the mount")
        return holes

    def _key(self, dataset: Dataset, column: int, row: int, channel: int = 0) -> str:
        place = {"x": column, "y": row, "c": channel}
        return dataset.key(tuple(place.get(axis, 0) for axis in self._image.axes))

    def _block(self, level: int, block: Box) -> NDArray[np.uint8]:
        x0, y0, x1, y1 = block.round_out()
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
        store: Any = dataset.path
        self._missing.append(set())
        if isinstance(store, Remote):
            from slidescan.slides.urlstore import UrlStore

            store = UrlStore(store, self._missing[-1])
        try:
            return zarr.open_array(store, mode="r")
        except _CHUNK_ERRORS as exc:
            raise SlideFormatError(f"{self._name}: zarr cannot open its array ({type(exc).__name__})") from exc


def _pieces(block: Box, piece_wh: tuple[int, int]) -> list[tuple[tuple[int, int], Box]]:
    """Cut a block along a grid; return the (column, row) and the part of the block in each."""
    (x0, y0, x1, y1), (width, height) = block.round_out(), piece_wh
    cells = product(range(y0 // height, -(-y1 // height)), range(x0 // width, -(-x1 // width)))
    return [((c, r), Box(c * width, r * height, (c + 1) * width, (r + 1) * height).clip(block)) for r, c in cells]
