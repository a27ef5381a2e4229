"""TIFF slides, fast: each tile is fetched and decoded once a read, straight from the file.

Hides which directories are levels. Aperio: tiled directories of the first one's shape (label, macro and thumbnail are
never read). OME-TIFF: the largest image that is no label or macro image, and its SubIFDs. Anything else: the first
directory that is no reduced copy, and those that are. What OpenSlide knows under another vendor's name (overlapping
tiles, several regions), or fills from finer levels, is left to it.
Invariants: sizes are checked before decoding; a tile of zero length is white (Aperio and Philips leave glass out); any
other tile that cannot be decoded is a hole and costs nothing else.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import product
from xml.etree import ElementTree as ET

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from slidescan.errors import SlideFormatError, SlideUnsupportedError
from slidescan.geometry import Box
from slidescan.slides.codecs import DECODER_ERRORS, Codec
from slidescan.slides.ifd import Directory, open_file, read_directories
from slidescan.slides.pool import owners, pool, spans
from slidescan.slides.remote import Where
from slidescan.slides.resolution import NOTHING, Resolution, judge, unknown_unit
from slidescan.slides.source import ASIDE, MAX_UNTILED_PX, WHITE, Declined, Facts, check_levels, pyramid
from slidescan.stages import spent, stage

__all__ = ["TiffSource"]

_ROUNDING_PX = 1.5  # a level's side may differ by this from the exact ratio: floor, ceil and round are all in use
_PROBES = 4  # tiles decoded at opening, to decline a codec variant before a scan relies on it
# Names of images beside the slide: Bio-Formats' for SVS, SCN and NDPI. Who they show is on them.
_OME_ROOT = re.compile(rb"<(\w+:)?OME[\s>]")
# OME PhysicalSize units in µm (OME-XML 2016-06); the default is µm.
_UM = {"m": 1e6, "cm": 1e4, "mm": 1e3, "µm": 1.0, "um": 1.0, "nm": 1e-3, "in": 25400.0}
_UM |= {"\u03bcm": 1.0, "\u00c5": 1e-4, "\u212b": 1e-4}  # a Greek letter for the micro sign; ångström, twice


@dataclass(frozen=True, slots=True)
class _Grid:
    """The tiles of one level, (planes, tiles) row by row."""

    size_wh: tuple[int, int]
    codec: Codec
    columns: int
    offsets: NDArray[np.int64]
    counts: NDArray[np.int64]

    def spans(self, index: int) -> list[tuple[int, int]]:
        """Return where a tile's parts lie in the file: offsets and bytes. Of an empty tile, nothing."""
        spans = list(zip(self.offsets[:, index].tolist(), self.counts[:, index].tolist(), strict=True))
        return spans if any(count for _, count in spans) else []


class TiffSource:
    """Reads Aperio, OME and plain pyramidal TIFF of 8-bit RGB.

    Raises
    ------
    SlideFormatError
        If the file is damaged, unsafe, or not 8-bit RGB.
    Declined
        If another reader may know it.
    """

    def __init__(self, path: Where) -> None:
        self._file, self._key = open_file(path), next(owners)
        directories = read_directories(self._file)
        directories[0].check()
        text, others = directories[0].blob(270), 0
        aperio = text.startswith(b"Aperio")
        if aperio:
            first, below, vendor = directories[0], [d for d in directories[1:] if d.is_tiled], "aperio"
            resolution = _aperio_resolution(text)
        elif _OME_ROOT.search(text[:4096]):
            first, resolution, others = _ome(directories, text)
            below, vendor = first.subs, "ome"
        else:
            if self._file.vendor not in (None, "generic-tiff", "aperio"):
                raise Declined(f"{path.name}: a {self._file.vendor} file needs OpenSlide")
            first = next((d for d in directories if not _is_reduced(d)), directories[0])
            below, vendor = [d for d in directories if d.is_tiled and _is_reduced(d)] + first.subs, "generic-tiff"
            whole = [d for d in directories if d.is_tiled and not _is_reduced(d) and d is not first]
            others = sum(min(d.size_wh) >= min(first.size_wh) and max(d.size_wh) >= max(first.size_wh) for d in whole)
            told = first.resolution
            resolution = NOTHING if told is None else judge(*told, "tiff-resolution")
        levels = [first, *_copies(first, below, aperio)]
        self._grids = [self._grid(d, aperio) for d in levels]
        lacking = [_lacks_tissue(self._grids[0], grid) for grid in self._grids]
        if aperio and any(lacking):
            raise Declined(f"{path.name}: levels that lack tiles of the finest need OpenSlide, which fills them")
        # One that a writer did not finish shows glass where there is tissue.
        levels = [one for one, lacks in zip(levels, lacking, strict=True) if not lacks]
        self._grids = [one for one, lacks in zip(self._grids, lacking, strict=True) if not lacks]
        icc = first.blob(34675) or None
        sizes = [d.size_wh for d in levels]
        tiles = [d.tile_wh for d in levels]
        self.facts = Facts("tiff", vendor, pyramid(sizes, tiles), resolution, icc=icc, others=others)
        check_levels(path.name, self.facts.levels)
        self._probe()

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        """Fill `out` from (x, y) level px; return the tiles that failed, in level px."""
        grid = self._grids[level]
        holes: list[Box] = []
        # Rows of bytes: numpy copies these in half the time that it takes for rows of px.
        assert out.strides[1:] == (3, 1)
        into = as_strided(out, (out.shape[0], 3 * out.shape[1]), (out.strides[0], 1))
        (tile_w, tile_h), (width, height) = grid.codec.tile_wh, grid.size_wh
        columns = list(spans(x, x + out.shape[1], tile_w, width))
        rows = list(spans(y, y + out.shape[0], tile_h, height))
        with stage("read"):
            places = (row * grid.columns + column for (row, *_), (column, *_) in product(rows, columns))
            most = grid.codec.max_bytes
            self._file.want(span for place in places for span in grid.spans(place) if 0 < span[1] <= most)
        for row, y0, y1, top, bottom, reads_y in rows:
            for column, x0, x1, left, right, reads_x in columns:
                part = into[top - y : bottom - y, 3 * (left - x) : 3 * (right - x)]
                index, need_wh = row * grid.columns + column, (x1 - x0, y1 - y0)
                if not grid.spans(index):
                    part[...] = WHITE
                    continue
                try:
                    if reads_x * reads_y == 1:
                        tile = self._tile(grid, index, need_wh)
                    else:
                        decode = partial(self._tile, grid, index, need_wh)
                        tile = pool.get((self._key, level, index), decode, reads_x * reads_y)
                except DECODER_ERRORS:
                    part[...] = WHITE
                    holes.append(Box(x0, y0, x1, y1))
                    continue
                part[...] = tile.reshape(len(tile), -1)[top - y0 : bottom - y0, 3 * (left - x0) : 3 * (right - x0)]
        return holes

    def _tile(self, grid: _Grid, index: int, need_wh: tuple[int, int]) -> NDArray[np.uint8]:
        began, parts = time.perf_counter(), []
        for offset, count in grid.spans(index):
            if not 0 < count <= grid.codec.max_bytes:
                raise ValueError("impossible length")
            parts.append(self._file.read(offset, count))
            if len(parts[-1]) < count:
                raise ValueError("cut off by the end of the file")
        read = time.perf_counter()
        spent("read", read - began)
        try:
            return grid.codec.decode(parts, need_wh)
        finally:
            spent("decode", time.perf_counter() - read)

    def _grid(self, directory: Directory, aperio: bool) -> _Grid:
        directory.check()
        width, height = directory.size_wh
        if not directory.is_tiled and width * height > MAX_UNTILED_PX:
            directory.fail(f"{width} × {height} px without tiles are more than the safe {MAX_UNTILED_PX} px")
        codec, columns = Codec.of(directory, aperio), directory.grid_wh[0]
        n = columns * directory.grid_wh[1]
        offsets, counts = (table[: codec.planes * n].reshape(codec.planes, n) for table in directory.segments())
        return _Grid((width, height), codec, columns, offsets, counts)

    def _probe(self) -> None:
        grid = self._grids[0]
        used = np.flatnonzero(grid.counts.any(0))
        if not used.size:
            return
        chosen = used[np.unique(np.linspace(0, used.size - 1, 2 * _PROBES + 1).astype(int)[1::2])]
        reason = ""
        for index in chosen.tolist():
            try:
                self._tile(grid, index, (1, 1))
            except DECODER_ERRORS as exc:
                reason = type(exc).__name__
            else:
                return
        raise Declined(f"{self._file.name}: none of {len(chosen)} sampled tiles decodes ({reason})")


def _is_reduced(directory: Directory) -> bool:
    return bool(directory.first(254, 0) & 1)


def _lacks_tissue(finest: _Grid, grid: _Grid) -> bool:
    """Return whether a level has no tile where the finest has one."""
    (width, height), (tile_w, tile_h), (finest_w, finest_h) = grid.size_wh, grid.codec.tile_wh, finest.codec.tile_wh
    used = finest.counts.any(0).reshape(-1, finest.columns)
    scale_x, scale_y = finest.size_wh[0] / width, finest.size_wh[1] / height
    for row, column in (divmod(int(index), grid.columns) for index in np.flatnonzero(~grid.counts.any(0))):
        # Less a px of the level on each side: its edges lie between those of the finest.
        x0, x1 = (max(0, column * tile_w + 1) * scale_x, (min(width, (column + 1) * tile_w) - 1) * scale_x)
        y0, y1 = (max(0, row * tile_h + 1) * scale_y, (min(height, (row + 1) * tile_h) - 1) * scale_y)
        if used[int(y0 // finest_h) : int(y1 // finest_h) + 1, int(x0 // finest_w) : int(x1 // finest_w) + 1].any():
            return True
    return False


def _copies(first: Directory, below: list[Directory], aperio: bool) -> Iterator[Directory]:
    """Yield the directories that are smaller copies of `first`, largest first; others are not levels."""
    width0, height0 = last_wh = first.size_wh
    for directory in sorted(below, key=lambda d: -d.size_wh[0]):
        width, height = directory.size_wh
        if not (0 < width < last_wh[0] and 0 < height <= last_wh[1]):
            continue
        shape_agrees = abs(width - width0 * height / height0) <= _ROUNDING_PX * max(1.0, width0 / height0)
        try:
            directory.check()
            Codec.of(directory, aperio)
        except SlideFormatError:
            continue
        if shape_agrees:
            last_wh = (width, height)
            yield directory


def _aperio_resolution(text: bytes) -> Resolution:
    """Judge the MPP entry of an Aperio description; nothing else of that text, which can name the patient, is used."""
    found = re.search(rb"\|\s*MPP\s*=\s*([^|\x00]{0,40})", text)
    if found is None:
        return NOTHING
    value = found[1].decode("latin-1")
    return judge(value, value, "aperio")


def _ome(directories: list[Directory], text: bytes) -> tuple[Directory, Resolution, int]:
    """Return the directory and scale of the slide in OME-XML, and how many further images may be slides, too.

    Some exporters write label and macro image before it.
    """
    name = directories[0].file.name
    if b"<!DOCTYPE" in text:
        # Only a document type can declare entities, which unpack without bound; OME-XML has no use for one.
        raise SlideFormatError(f"{name}: its OME-XML declares a document type; unsafe to open")
    try:
        root = ET.fromstring(text.rstrip(b"\0 \r\n"))  # noqa: S314  # size-capped, no entities: see above
    except ET.ParseError as exc:
        raise SlideFormatError(f"{name}: its OME-XML cannot be parsed; the file is damaged") from exc
    images = [image for image in root.iterfind("{*}Image") if image.find("{*}Pixels") is not None]
    named = [image for image in images if not ASIDE.search(image.get("Name", ""))] or images[:1]
    each = [pixels for image in named if (pixels := image.find("{*}Pixels")) is not None]
    pixels = max(each, key=_area, default=None)
    if pixels is None:
        raise SlideFormatError(f"{name}: its OME-XML describes no image; the file is damaged")
    if len({u.text for u in pixels.iterfind("{*}TiffData/{*}UUID")}) > 1:
        raise SlideUnsupportedError(f"{name}: an OME-TIFF spread over several files is not read; merge it into one")
    shape = {axis: pixels.get(f"Size{axis}", "1") for axis in "ZCT"}
    if (shape["Z"], shape["T"]) != ("1", "1") or shape["C"] not in ("3", "4") or pixels.get("Type") != "uint8":
        told = ", ".join(f"{axis} {n if n.isdecimal() else '?'}" for axis, n in shape.items())
        raise SlideUnsupportedError(
            f"{name}: expected one 8-bit RGB image, found sizes {told}; export the brightfield alone"
        )
    entry = pixels.find("{*}TiffData")
    ifd = (entry.get("IFD") if entry is not None else None) or "0"
    if not ifd.isdecimal() or int(ifd) >= len(directories):
        raise SlideFormatError(f"{name}: its OME-XML names a TIFF directory that is not there; the file is damaged")
    sizes = [pixels.get(f"PhysicalSize{axis}") for axis in "XY"]
    # Of another scale it is a copy, or an overview.
    others = sum([one.get(f"PhysicalSize{axis}") for axis in "XY"] == sizes for one in each) - 1
    if None in sizes:
        return directories[int(ifd)], NOTHING, others
    try:
        units = [_UM[pixels.get(f"PhysicalSize{axis}Unit", "µm")] for axis in "XY"]
        x_mpp, y_mpp = (float(str(size)) * unit for size, unit in zip(sizes, units, strict=True))
    except KeyError:
        return directories[int(ifd)], unknown_unit("ome-xml"), others
    except ValueError:
        return directories[int(ifd)], judge("?", "?", "ome-xml"), others
    return directories[int(ifd)], judge(x_mpp, y_mpp, "ome-xml"), others


def _area(pixels: ET.Element) -> int:
    """Return how many px an image in OME-XML says it has."""
    width, height = (pixels.get(f"Size{axis}", "") for axis in "XY")
    return int(width) * int(height) if width.isdecimal() and height.isdecimal() else 0
