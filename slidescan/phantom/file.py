"""Writes a phantom as the kind of file a scanner makes: a tiled, pyramidal JPEG TIFF in Aperio's dialect.

Hides streaming: square units of level 0 are rendered and encoded by threads; what they shrink to flows on into the
coarser levels. Of level 0 only one row of encoded units exists at once, of the other levels one row of tiles and the
JPEG bytes (a fifteenth of the file). A repeated block is made once. The file appears under its name only when whole.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, ResultError

if TYPE_CHECKING:
    from slidescan.phantom.slide import Phantom

__all__ = ["write_phantom"]

U8 = NDArray[np.uint8]

_UNIT_PX = 512  # rendered and encoded as one; a phantom's own cell, so no cell is made twice
_STEP = 4  # each level is this much coarser, as Aperio writes them
_SMALLEST_PX = 1024  # the last level fits in this edge
_CLASSIC_TIFF_BYTES = 2**32 - 2**26  # 32-bit offsets, less room for tags; raw size is compared: JPEG stays below it


def write_phantom(
    path: str | os.PathLike[str],
    phantom: Phantom,
    *,
    tile_px: int = 256,
    quality: int = 90,
    block_px: int | None = None,
    workers: int | None = None,
) -> Phantom:
    """Write `phantom` as a pyramidal tiled JPEG TIFF (.svs or .tif) and return the phantom the file shows.

    The description follows Aperio, so that OpenSlide and tifffile read the levels and µm/px from it. Levels are each
    4× coarser down to 1024 px. BigTIFF is used when the raw pixels would pass 4 GB. An existing file is replaced,
    atomically.

    Parameters
    ----------
    path : path-like
        Where to write; its directory must exist.
    phantom : Phantom
        What to write.
    tile_px : {128, 256, 512, 1024}
        Edge of a JPEG tile.
    quality : int
        JPEG quality, 1 to 100.
    block_px : int, optional
        Repeat this square over the slide, as `Phantom.block_px`; a multiple of 512 is encoded once and reused.
    workers : int, optional
        Threads that render and encode; default one a core.

    Raises
    ------
    ConfigError
        If `tile_px` or `quality` is not one of those.
    ResultError
        If the file cannot be written.
    """
    if tile_px not in (128, 256, 512, 1024):
        raise ConfigError(f"write_phantom tile_px: expected 128, 256, 512 or 1024, got {tile_px}")
    if not 1 <= quality <= 100:
        raise ConfigError(f"write_phantom quality: expected 1 to 100, got {quality}")
    written = phantom if block_px is None else replace(phantom, block_px=block_px)
    target = Path(path)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with ThreadPoolExecutor(workers or os.cpu_count()) as pool:
            _write(part, written, tile_px, quality, pool)
        part.replace(target)
    except OSError as exc:
        raise ResultError(
            f"{target.name}: expected a writable place for a phantom slide, got {exc.strerror or exc}"
        ) from exc
    finally:
        part.unlink(missing_ok=True)
    return written


def _write(path: Path, phantom: Phantom, tile_px: int, quality: int, pool: ThreadPoolExecutor) -> None:
    import tifffile

    width, height = phantom.size_wh
    sizes = [phantom.size_wh]
    while max(sizes[-1]) > _SMALLEST_PX and min(sizes[-1]) >= _STEP:
        sizes.append((sizes[-1][0] // _STEP, sizes[-1][1] // _STEP))
    coarse: list[_Coarse] = []
    for size in reversed(sizes[1:]):
        coarse.insert(0, _Coarse(size, tile_px, quality, coarse[0] if coarse else None))
    about = f"{width}x{height} [0,0 {width}x{height}] ({tile_px}x{tile_px}) JPEG/YCC Q={quality}"
    description = (
        f"Aperio phantom (synthetic, slidescan)\r\n{about}|AppMag = {10 / phantom.mpp:g}|MPP = {phantom.mpp:.6g}"
    )
    big = width * height * 3 * 1.1 > _CLASSIC_TIFF_BYTES
    with tifffile.TiffWriter(path, bigtiff=big, byteorder="<") as tif:

        def write(data: object, size_wh: tuple[int, int], note: str | None, **how: object) -> None:
            per_cm = 1e4 * size_wh[0] / (phantom.mpp * width)
            shape = (size_wh[1], size_wh[0], 3)
            where = {"resolution": (per_cm, per_cm), "resolutionunit": "CENTIMETER"}
            tif.write(
                data, shape=shape, dtype=np.uint8, description=note, metadata=None, software=False, **where, **how
            )

        tiled = {"tile": (tile_px, tile_px), "photometric": "ycbcr", "compression": "jpeg", "subsampling": (2, 2)}
        write(_level0_tiles(phantom, tile_px, quality, pool, coarse), sizes[0], description, **tiled)
        if coarse:
            # Readers of Aperio files take the second page for the thumbnail and the tiled ones after it for levels.
            write(np.concatenate(coarse[-1].bands), sizes[-1], description, photometric="rgb", compression="deflate")
        for size, level in zip(sizes[1:], coarse, strict=True):
            write(iter(level.tiles), size, description, **tiled)


def _jpeg(tile: U8, quality: int) -> bytes:
    import imagecodecs

    pixels = np.ascontiguousarray(tile)
    return bytes(imagecodecs.jpeg8_encode(pixels, quality, colorspace="rgb", outcolorspace="ycbcr", subsampling="420"))


def _shrunk(pixels: U8) -> U8:
    """Average squares of `_STEP` px; what does not fill one is dropped."""
    h, w = pixels.shape[0] // _STEP, pixels.shape[1] // _STEP
    rows = pixels[: h * _STEP, : w * _STEP].reshape(h, _STEP, w * _STEP, 3).sum(1, dtype=np.uint16)
    total = rows.reshape(h, w, _STEP, 3).sum(2, dtype=np.uint16)
    return np.asarray((total + _STEP * _STEP // 2) // (_STEP * _STEP), np.uint8)


@dataclass
class _Coarse:
    """One level after the first: takes rows as they come, keeps JPEG tiles, passes smaller rows on.

    The last level keeps its pixels as well, for the thumbnail.
    """

    size_wh: tuple[int, int]
    tile_px: int
    quality: int
    below: _Coarse | None
    tiles: list[bytes] = field(default_factory=list)
    bands: list[U8] = field(default_factory=list)
    rows: list[U8] = field(default_factory=list)
    n_rows: int = 0
    n_done: int = 0

    def push(self, pixels: U8) -> None:
        """Take rows (h, W, 3); h must divide the tile edge, except at the slide's end."""
        take = min(len(pixels), self.size_wh[1] - self.n_done - self.n_rows)
        if take > 0:
            self.rows.append(pixels[:take, : self.size_wh[0]])
            self.n_rows += take
        if self.n_rows and (self.n_rows >= self.tile_px or self.n_done + self.n_rows == self.size_wh[1]):
            band = np.concatenate(self.rows)
            for top in range(0, len(band), self.tile_px):
                self._emit(band[top : top + self.tile_px])
            self.rows, self.n_done, self.n_rows = [], self.n_done + self.n_rows, 0
            if self.below is None:
                self.bands.append(band)
            else:
                self.below.push(_shrunk(band))

    def _emit(self, band: U8) -> None:
        pad = (0, self.tile_px - len(band)), (0, -band.shape[1] % self.tile_px), (0, 0)
        full = np.pad(band, pad, mode="edge")
        for left in range(0, full.shape[1], self.tile_px):
            self.tiles.append(_jpeg(full[:, left : left + self.tile_px], self.quality))


def _level0_tiles(
    phantom: Phantom, tile_px: int, quality: int, pool: ThreadPoolExecutor, coarse: list[_Coarse]
) -> Iterator[bytes]:
    """Yield JPEG tiles of level 0 row by row, feeding the first coarser level on the way."""
    width, height = phantom.size_wh
    unit = max(_UNIT_PX, tile_px)
    cols, rows = -(-width // tile_px), -(-height // tile_px)
    seen: dict[tuple[int, int], tuple[list[bytes], U8]] = {}

    def make(x: int, y: int) -> tuple[list[bytes], U8]:
        key = _place_in_block(phantom, x, y, unit)
        if key in seen:
            return seen[key]
        pixels = phantom.render(x, y, unit, unit)
        starts = range(0, unit, tile_px)
        made = (
            [_jpeg(pixels[top : top + tile_px, left : left + tile_px], quality) for top in starts for left in starts],
            _shrunk(pixels),
        )
        if key is not None:
            seen[key] = made
        return made

    per = unit // tile_px
    for top in range(0, height, unit):
        made = list(pool.map(make, range(0, width, unit), [top] * -(-width // unit)))
        if coarse:
            coarse[0].push(np.concatenate([small for _, small in made], 1))
        for row in range(min(per, rows - top // tile_px)):
            for col in range(cols):
                yield made[col // per][0][row * per + col % per]


def _place_in_block(phantom: Phantom, x: int, y: int, unit: int) -> tuple[int, int] | None:
    """Return where in the repeated block a unit lies, or None where its pixels are its own."""
    block = phantom.block_px
    if block is None or block % unit:
        return None
    if x + unit > phantom.size_wh[0] // block * block or y + unit > phantom.size_wh[1] // block * block:
        return None
    return x % block, y % block
