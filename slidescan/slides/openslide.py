"""Slides through OpenSlide: everything it opens, without its traps.

Hides three of them. Its handle is dead after the first read error, so an error swaps the handle and bisects the block
down to storage tiles: only those become holes. Its pixels are RGBA with transparent for "not scanned", which must
become background, never black. It decodes without a size guard, so tile sizes (of a TIFF: its directories) come first.
Limit: a level block is addressed in whole level-0 px, so on a level with an odd downsample OpenSlide shifts it by up
to half a level-0 px and smooths; the TIFF reader does not.
"""

from __future__ import annotations

import os
import re
import threading
from pathlib import Path

import numpy as np
import openslide
import pyarrow as pa
from numpy.typing import NDArray
from PIL import Image, ImageCms

from slidescan.errors import SlideFormatError, SlideReadError
from slidescan.geometry import Box
from slidescan.slides.ifd import Directory, File, read_directories
from slidescan.slides.resolution import NOTHING, judge, number
from slidescan.slides.source import MAX_BLOB_BYTES, WHITE, Declined, Facts, check_levels, composite, pyramid
from slidescan.stages import stage

__all__ = ["OpenSlideSource"]

_UNUSABLE = b"damaged"  # stands for a profile that cannot be read: no error unless sRGB is asked for
_BOUNDS = ("x", "y", "width", "height")
# All that is read of a slide's properties.
_WANTED = ("vendor", "mpp-x", "mpp-y", "background-color", "icc-size", *(f"bounds-{k}" for k in _BOUNDS))
_LEAF_PX = 256  # px; where the format has no tiles, the side of the smallest block given up
_PROBES = 4  # places read at opening
_CACHE_BYTES = 64 << 20  # bytes a process for all handles; region reads rarely meet a tile twice
_END_BYTES = 1 << 16  # read to see whether a disk fails: headers and directories are there
# A file's name in OpenSlide's messages: all of "open …: ", spaces, too, and elsewhere a word that has a suffix.
_FILE = re.compile(r"(?<=\bopen ).+?(?=: |$)|[^\s'\"()]+\.[A-Za-z]\w{1,3}\b")
_OF_MIRAX = re.compile(r"Slidedat\.ini|Index\.dat|Data\d{4}\.dat")  # in every slide
# Where OpenSlide took its mpp from; both readers must name one source for one file.
_SAID_BY = {"aperio": "aperio", "dicom": "dicom", "generic-tiff": "tiff-resolution"}

_cache_lock = threading.Lock()
_cache: openslide.OpenSlideCache | None = None


class OpenSlideSource:
    """Reads any slide OpenSlide knows.

    Raises
    ------
    SlideFormatError
        If OpenSlide refuses the file, its sizes are unsafe, or nothing sampled can be read.
    """

    def __init__(self, path: Path) -> None:
        directories = _checked_directories(path)
        self._path = path
        self._lock = threading.Lock()
        try:
            self._handle = _open(path)
            sizes = list(self._handle.level_dimensions)
            # By name, never all: the others hold names and dates, and a damaged one cannot even be listed.
            wanted = [*_WANTED, *(f"level[{i}].tile-{side}" for i in range(len(sizes)) for side in ("width", "height"))]
            found = {key: self._handle.properties.get(f"openslide.{key}") for key in wanted}
            said = {key: value for key, value in found.items() if value is not None}
            # OpenSlide's own factors address its levels; geometry uses `downsample_of` like every other reader.
            self._factors = tuple(self._handle.level_downsamples)
            icc = self._icc(said)
        except openslide.OpenSlideError as exc:
            _see_that_it_can_be_read(path)
            raise SlideFormatError(
                f"{path.name}: OpenSlide cannot open it ({_short(exc, path)}); expected a complete whole-slide image"
            ) from exc
        vendor = said.get("vendor")
        tiles = [_tile_wh(said, i, size) for i, size in enumerate(sizes)]
        x_mpp, y_mpp = said.get("mpp-x"), said.get("mpp-y")
        source = _SAID_BY.get(vendor or "", "openslide")
        self.facts = Facts(
            backend="openslide",
            vendor=vendor,
            levels=pyramid(sizes, tiles),
            resolution=NOTHING if x_mpp is None and y_mpp is None else judge(x_mpp, y_mpp, source),
            bounds_l0=_bounds(said),
            icc=icc,
        )
        check_levels(path.name, self.facts.levels)
        self._unsafe = _unsafe_tiles(directories, sizes)
        colour = said.get("background-color", "")
        known = len(colour) == 6 and all(c in "0123456789abcdefABCDEF" for c in colour)
        r, g, b = bytes.fromhex(colour) if known else (WHITE,) * 3
        self._background = (r, g, b)
        self._probe()

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        """Fill `out` from (x, y) level px; return the tiles that failed, in level px."""
        handle = self._handle
        try:
            self._read(handle, level, x, y, out)
        except openslide.OpenSlideError:
            with self._lock:
                if self._handle is handle:
                    self._handle = self._reopen()
        else:
            return []
        # On a handle of its own: an error of another thread cannot be taken for one of ours.
        holes: list[Box] = []
        self._salvage(self._reopen(), level, x, y, out, holes)
        return holes

    def _salvage(
        self, handle: openslide.OpenSlide, level: int, x: int, y: int, out: NDArray[np.uint8], holes: list[Box]
    ) -> openslide.OpenSlide:
        """Read a block that may hold bad tiles; return a live handle."""
        try:
            self._read(handle, level, x, y, out)
        except openslide.OpenSlideError:
            handle = self._reopen()
        else:
            return handle
        height, width = out.shape[:2]
        tile_w, tile_h = self.facts.levels[level].tile_wh
        columns, rows = -(-(x + width) // tile_w) - x // tile_w, -(-(y + height) // tile_h) - y // tile_h
        if columns == rows == 1:
            out[...] = WHITE
            holes.append(Box(x, y, x + width, y + height))
        elif columns > 1 and (rows == 1 or columns * tile_w >= rows * tile_h):
            cut = (x // tile_w + columns // 2) * tile_w - x
            handle = self._salvage(handle, level, x, y, out[:, :cut], holes)
            handle = self._salvage(handle, level, x + cut, y, out[:, cut:], holes)
        else:
            cut = (y // tile_h + rows // 2) * tile_h - y
            handle = self._salvage(handle, level, x, y, out[:cut], holes)
            handle = self._salvage(handle, level, x, y + cut, out[cut:], holes)
        return handle

    def _read(self, handle: openslide.OpenSlide, level: int, x: int, y: int, out: NDArray[np.uint8]) -> None:
        factor = self._factors[level]
        height, width = out.shape[:2]
        margin = int(factor % 1 > 0)  # between two px OpenSlide mixes them
        touched = Box(x - margin, y - margin, x + width + margin, y + height + margin)
        if any(tile.intersects(touched) for tile in self._unsafe[level]):
            raise openslide.OpenSlideError("a tile with more bytes than its px can have")
        with stage("decode"):
            image = handle.read_region((round(x * factor), round(y * factor)), level, (width, height))
        rgba = _pixels(image)
        if rgba[..., 3].min() == 255:
            for channel in range(3):  # one after the other: a third of the time that numpy takes for px of three
                out[..., channel] = rgba[..., channel]
        else:
            out[...] = composite(rgba, self._background)

    def _reopen(self) -> openslide.OpenSlide:
        try:
            return _open(self._path)
        except openslide.OpenSlideError as exc:
            raise SlideReadError(f"{self._path.name}: can no longer be opened: {_short(exc, self._path)}") from exc

    def _probe(self) -> None:
        width, height = self.facts.levels[0].size_wh
        for i in range(_PROBES):
            place = width * (2 * i + 1) // (2 * _PROBES), height * (2 * i + 1) // (2 * _PROBES)
            try:
                self._read(self._handle, 0, *place, np.empty((1, 1, 3), np.uint8))
            except openslide.OpenSlideError as exc:
                reason = _short(exc, self._path)
                self._handle = self._reopen()
            else:
                return
        raise SlideFormatError(
            f"{self._path.name}: OpenSlide opens it but reads none of {_PROBES} places ({reason}); copy the file again"
        )

    def _icc(self, said: dict[str, str]) -> bytes | None:
        size = number(said.get("icc-size", "0")) or 0
        if size > MAX_BLOB_BYTES:
            raise SlideFormatError(f"{self._path.name}: its ICC profile has {size:.0f} bytes; unsafe to open")
        try:
            profile = self._handle.color_profile if size > 0 else None
        except (ImageCms.PyCMSError, OSError):
            return _UNUSABLE
        return bytes(profile.tobytes()) if profile is not None else None


def _checked_directories(path: Path) -> list[Directory]:
    """Return a TIFF file's directories, none of which is damaged or unsafe; of other files none.

    Nor of a Hamamatsu file: its layout is OpenSlide's own.
    """
    try:
        directories = read_directories(File(path))
    except Declined:
        return []
    for index, directory in enumerate(directories):
        if index == 0 or directory.is_tiled:
            directory.check()
    return directories


def _unsafe_tiles(directories: list[Directory], sizes_wh: list[tuple[int, int]]) -> list[list[Box]]:
    """Return each level's tiles that list more bytes than their px can have, in level px.

    OpenSlide makes room for as many as are listed, and ends the process where it cannot.
    """
    found: list[list[Box]] = [[] for _ in sizes_wh]
    tiled = [(directory, directory.segments()[1].astype(np.uint64)) for directory in directories if directory.is_tiled]
    for directory, counts in tiled:
        (tile_w, tile_h), (columns, _) = directory.tile_wh, directory.grid_wh
        for index in np.flatnonzero(counts > 8 * tile_w * tile_h + 65536).tolist():
            # What it will be read for is known to OpenSlide alone: empty tiles are filled from finer levels.
            if directory.size_wh not in sizes_wh or not all(listed.all() for _, listed in tiled):
                directory.fail(f"a tile of {counts[index]} bytes is listed")
            x, y = index % columns * tile_w, index // columns * tile_h
            found[sizes_wh.index(directory.size_wh)].append(Box(x, y, x + tile_w, y + tile_h))
    return found


def _open(path: Path) -> openslide.OpenSlide:
    global _cache
    handle = openslide.OpenSlide(str(path))
    with _cache_lock:
        if _cache is None:
            _cache = openslide.OpenSlideCache(_CACHE_BYTES)
        handle.set_cache(_cache)
    return handle


def _tile_wh(said: dict[str, str], level: int, size_wh: tuple[int, int]) -> tuple[int, int]:
    width, height = (said.get(f"level[{level}].tile-{side}", "") for side in ("width", "height"))
    if width.isdecimal() and height.isdecimal():
        return int(width), int(height)
    return min(_LEAF_PX, size_wh[0]), min(_LEAF_PX, size_wh[1])


def _bounds(said: dict[str, str]) -> Box | None:
    x, y, width, height = (number(said.get(f"bounds-{side}")) for side in _BOUNDS)
    if x is None or y is None or width is None or height is None:
        return None
    return Box(x, y, x + width, y + height)


def _pixels(image: Image.Image) -> NDArray[np.uint8]:
    """Return an image's RGBA (H, W, 4), read only.

    Its own memory, where Pillow lends it: to copy it out took as long as OpenSlide's decoding.
    """
    try:
        return np.asarray(pa.array(image).flatten()).reshape(image.height, image.width, 4)
    except ValueError:  # Pillow keeps it in pieces
        return np.asarray(image)


def _see_that_it_can_be_read(path: Path) -> None:
    """Read both ends of a file: to OpenSlide a disk that fails, which may pass, is a damaged file."""
    if not path.is_file():
        return
    try:
        with path.open("rb") as file:
            file.read(_END_BYTES)
            file.seek(-min(_END_BYTES, path.stat().st_size), os.SEEK_END)
            file.read(_END_BYTES)
    except OSError as exc:
        raise SlideReadError(f"{path.name}: cannot be read ({exc.strerror})") from exc


def _short(exc: openslide.OpenSlideError, path: Path) -> str:
    """Return OpenSlide's reason without a path, without the names of the slide's other files, and not at length.

    Their names begin with the slide's own, which may be the patient's.
    """
    said = str(exc).replace(f"Reading {path}: ", "").replace(f"{path.parent}{os.sep}", "")
    said = said.replace(f"{path.parent.absolute()}{os.sep}", "")

    def kind(found: re.Match[str]) -> str:
        name = Path(found[0]).name
        return name if name == path.name or _OF_MIRAX.fullmatch(name) else f"a {Path(name).suffix} file of it"

    return _FILE.sub(kind, said)[:160]
