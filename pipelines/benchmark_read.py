"""How fast slides are read: px per second from file to batches of tiles, against the codec alone and other readers.

The slide is made of whole JPEG tiles of a real one, copied byte for byte (of a phantom where there is none); JPEG 2000
and OME-Zarr are made of its pixels. All readers of a slide take turns in one run: what counts is the ratio.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count, product
from pathlib import Path
from typing import Any
from unittest import mock

import imagecodecs
import numpy as np
import openslide
import tifffile
import zarr
from benchmark_peers import started
from numpy.typing import NDArray
from PIL import Image

import slidescan as ss
from slidescan.heap import keep_freed
from slidescan.phantom import write_phantom
from slidescan.plan import Region, plan
from slidescan.region import batches, cut
from slidescan.slides.codecs import Codec

__all__ = ["assemble", "bench_read", "small_slide"]

_SHARED = Path(os.environ.get("SLIDESCAN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
_TILE_PX, _HALO_PX, _REGION_PX, _BATCH = 1024, 112, 4096, 8  # as the bundled detector is fed on a CPU
_OPENSLIDE_PX = 480  # what peers ask OpenSlide for: four tiles of 240 px
_MPP = 0.5  # µm/px that every slide is opened with
_COARSE_MPP = 0.8  # µm/px of a plane without a level of its own
_JPEG2000_PX, _JPEG2000_DB = 256, 34  # px a tile, as Aperio; dB of PSNR: 1.5 to 1.9 bits a px, real 1.4
_CHUNK_PX, _SHARD_PX = 512, 2048  # px; OME-Zarr of slides is mostly written so

_BARE = "imagecodecs, every tile once, nothing placed"
_BLOCKS = f"OpenSlide, {_OPENSLIDE_PX} px blocks"
_OURS = "slidescan, regions and batches of tiles"

Rgb = NDArray[np.uint8]
Take = Callable[[Region, Rgb], int | None]
# Reads a whole slide with so many threads; returns its seconds where it knows them better than who waits for it.
Reader = Callable[[int], float | None]


def small_slide(scratch: Path) -> Path:
    """Return a slide of 1 mm²: a real one, or where there is none a phantom written to `scratch`."""
    path = _SHARED / "slides" / "CMU-1-Small-Region.svs"
    if not path.is_file():
        path = scratch / "phantom.tiff"
        write_phantom(path, ss.Phantom((2048, 2048), 0.5, n_figures=4))
    return path


def assemble(path: Path, edge_px: int) -> tuple[int, int]:
    """Write a slide of `edge_px` or a little less, of one real slide's JPEG tiles; return its width and height."""
    with tempfile.TemporaryDirectory() as scratch, tifffile.TiffFile(small_slide(Path(scratch))) as slide:
        page: Any = slide.pages[0]
        wide, high = page.imagewidth // page.tilewidth, page.imagelength // page.tilelength
        columns, file = -(-page.imagewidth // page.tilewidth), slide.filehandle
        coded = []
        for row, column in product(range(high), range(wide)):
            file.seek(page.dataoffsets[row * columns + column])
            coded.append(file.read(page.databytecounts[row * columns + column]))
        across, down = edge_px // page.tilewidth, edge_px // page.tilelength
        places = product(range(down), range(across))
        size = across * page.tilewidth, down * page.tilelength
        with tifffile.TiffWriter(path, bigtiff=True) as writer:
            writer.write(
                (coded[row % high * wide + column % wide] for row, column in places),
                shape=(size[1], size[0], 3),
                dtype=np.uint8,
                tile=(page.tilelength, page.tilewidth),
                photometric=page.photometric,
                compression=page.compression,
                subsampling=page.subsampling if page.photometric == 6 else None,
                jpegtables=page.jpegtables,
                description=page.description.split("|")[0] + "|MPP = 0.499" if "Aperio" in page.description else "",
                metadata=None,
            )
    return size


def _write_jpeg2000(path: Path, jpeg: Path, edge_px: int) -> None:
    """Write the upper left corner of a slide as an Aperio file of JPEG 2000 tiles."""
    slide, tile, across = ss.open_slide(jpeg, mpp=_MPP), _JPEG2000_PX, edge_px // _JPEG2000_PX

    def coded(place: int) -> bytes:
        rgb = slide.read_level(0, place % across * tile, place // across * tile, tile, tile).rgb
        return bytes(imagecodecs.jpeg2k_encode(rgb, level=_JPEG2000_DB, codecformat="j2k"))

    shape, said = (across * tile, across * tile, 3), "Aperio Image Library|MPP = 0.499"
    options = {"tile": (tile, tile), "photometric": "rgb", "compression": 33005, "description": said, "metadata": None}
    with ThreadPoolExecutor() as pool, tifffile.TiffWriter(path) as writer:
        writer.write(pool.map(coded, range(across**2)), shape=shape, dtype=np.uint8, **options)


def _write_zarr(path: Path, jpeg: Path, edge_px: int, shards: tuple[int, int, int] | None) -> None:
    """Write the upper left corner of a slide as OME-Zarr 0.5 with one level."""
    slide, codec = ss.open_slide(jpeg, mpp=_MPP), zarr.codecs.BloscCodec(cname="zstd")
    axes = [{"name": "c", "type": "channel"}, *({"name": n, "type": "space", "unit": "micrometer"} for n in "yx")]
    level = {"path": "0", "coordinateTransformations": [{"type": "scale", "scale": [1, _MPP, _MPP]}]}
    told = {"version": "0.5", "multiscales": [{"axes": axes, "datasets": [level]}]}
    group = zarr.create_group(path, zarr_format=3, attributes={"ome": told})
    options = {"dtype": "uint8", "chunks": (3, _CHUNK_PX, _CHUNK_PX), "shards": shards, "compressors": codec}
    array = group.create_array("0", shape=(3, edge_px, edge_px), **options)
    for top in range(0, edge_px, _SHARD_PX):
        rgb = slide.read_level(0, 0, top, edge_px, min(_SHARD_PX, edge_px - top)).rgb
        array[:, top : top + len(rgb)] = rgb.transpose(2, 0, 1)


def _bare(path: Path, threads: int) -> None:
    """Decode every tile with imagecodecs and drop it."""
    with tifffile.TiffFile(path) as slide:
        page: Any = slide.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
        decoder = imagecodecs.jpeg2k_decode
        if page.compression == 7:
            coded = "YCBCR" if page.photometric == 6 else "RGB"
            options = {"tables": page.jpegtables, "colorspace": coded, "outcolorspace": "RGB"}
            decoder = partial(imagecodecs.jpeg8_decode, **options)
    descriptor = os.open(path, os.O_RDONLY)

    def decode(part: list[tuple[int, int]]) -> None:
        for offset, size in part:
            decoder(os.pread(descriptor, size, offset))

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, [places[i : i + 64] for i in range(0, len(places), 64)]))
    finally:
        os.close(descriptor)


def _openslide(path: Path, threads: int, shrink: float = 1.0) -> None:
    """Read the slide in blocks, each thread with a handle of its own, and shrink them with Pillow where asked to."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions
    edge, wanted = round(_OPENSLIDE_PX * shrink), (_OPENSLIDE_PX, _OPENSLIDE_PX)

    def rows(tops: list[int]) -> None:
        with openslide.OpenSlide(path) as own:
            for top in tops:
                for left in range(0, width, edge):
                    image = own.read_region((left, top), 0, (edge, edge)).convert("RGB")
                    np.asarray(image if shrink == 1 else image.resize(wanted, Image.Resampling.BICUBIC))

    tops = list(range(0, height, edge))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(rows, [tops[i::threads] for i in range(threads)]))


def _zarr(path: Path, threads: int) -> None:
    """Read the array in blocks of whole chunks as large as a region; zarr-python has threads of its own besides."""
    array = zarr.open_array(path / "0", mode="r")
    starts = product(*(range(0, side, _REGION_PX) for side in array.shape[1:]))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda at: array[:, at[0] : at[0] + _REGION_PX, at[1] : at[1] + _REGION_PX].shape, starts))


def _regions(slide: ss.Slide, mpp: float = _MPP, region_px: int = _REGION_PX) -> tuple[Region, ...]:
    return plan(slide.plane(mpp), None, tile_px=_TILE_PX, halo_px=_HALO_PX, region_px=region_px).regions


def _stream(path: Path, threads: int, take: Take, mpp: float = _MPP, region_px: int = _REGION_PX) -> list[int | None]:
    """Read every region of a plan, as a scan does; return what `take` makes of each."""
    slide = ss.open_slide(path, mpp=_MPP)
    plane = slide.plane(mpp)

    def read(region: Region) -> int | None:
        x0, y0, x1, y1 = region.read.round_out()
        return take(region, slide.read(x0, y0, x1 - x0, y1 - y0, plane).rgb)

    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(read, _regions(slide, mpp, region_px)))


def _batches(region: Region, rgb: Rgb) -> None:
    x0, y0, _, _ = region.read.round_out()
    for tiles in batches(region.tiles, _BATCH, by_row=True):
        cut(rgb, tiles, x0, y0)


def _ours(path: Path, threads: int, mpp: float = _MPP) -> None:
    """Read every region and cut its tiles into batches."""
    _stream(path, threads, _batches, mpp)


def _anew(read: Callable[[Path, int], None], path: Path, times: int, threads: int) -> None:
    """Read a slide too small for threads several times, each opened anew, or caches would be measured."""
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(lambda _: read(path, 1), range(times)))


def _decoded(path: Path, threads: int) -> int:
    """Count the tiles that `_ours` decodes, the one that opening tries included."""
    decode, numbers = Codec.decode, count()

    def counted(*args: Any, **options: Any) -> Any:
        next(numbers)
        return decode(*args, **options)

    with mock.patch.object(Codec, "decode", counted):
        _ours(path, threads)
    return next(numbers)


def _rows(slide: str, readers: Mapping[str, Reader], smoke: bool, repeats: int = 5) -> list[str]:
    """Let readers take turns; return a row each, relative to the first."""
    rows = []
    for threads in (1, 2) if smoke else (1, 2, 4, 8):
        seconds: dict[str, list[float]] = {name: [] for name in readers}
        for _ in range(1 if smoke else repeats):
            for name, read in readers.items():
                begun = time.perf_counter()
                told = read(threads)
                seconds[name].append(time.perf_counter() - begun if told is None else told)
        medians = {name: statistics.median(times) for name, times in seconds.items()}
        first = next(iter(medians.values()))
        rows += [f"| {slide} | {name} | {threads} | {first / median:.2f} |" for name, median in medians.items()]
    return rows


def _three(path: Path) -> dict[str, Reader]:
    return {_BARE: partial(_bare, path), _BLOCKS: partial(_openslide, path), _OURS: partial(_ours, path)}


def _formats(jpeg: Path, scratch: Path, smoke: bool) -> list[str]:
    """Measure other formats, and a plane that no level has."""
    shrink, path, edge_px = _COARSE_MPP / _MPP, scratch / "jpeg2000.svs", 768 if smoke else 12_000
    coarse = {
        _BARE: partial(_bare, jpeg),
        f"{_BLOCKS} after Pillow's resize": partial(_openslide, jpeg, shrink=shrink),
        _OURS: partial(_ours, jpeg, mpp=_COARSE_MPP),
    }
    rows = _rows(f"JPEG at {_COARSE_MPP} µm/px", coarse, smoke, repeats=3)
    _write_jpeg2000(path, jpeg, edge_px)
    rows += _rows("JPEG 2000", _three(path), smoke, repeats=3)
    for name, shards in (("OME-Zarr", None), ("OME-Zarr, sharded", (3, _SHARD_PX, _SHARD_PX))):
        path = scratch / f"{name}.zarr"
        _write_zarr(path, jpeg, edge_px, shards)
        blocks = f"zarr-python, {_REGION_PX} px blocks"
        rows += _rows(name, {blocks: partial(_zarr, path), _OURS: partial(_ours, path)}, smoke)
    times = 1 if smoke else 8
    for name, pattern in (("DICOM", "dicom_cmu_napari/*.dcm"), ("NDPI", "test3-DAPI-2-387.ndpi")):
        found = sorted((_SHARED / "slides").glob(pattern))
        if found:
            both = {_BLOCKS: _openslide, _OURS: _ours}
            again = {reader: partial(_anew, read, found[0], times) for reader, read in both.items()}
            rows += _rows(f"{name}, {times} × a small slide", again, smoke)
        else:
            rows.append(f"| {name} | left out: no {pattern} in the test data | | |")
    return rows


def _peers(jpeg: Path, scratch: Path, smoke: bool) -> list[str]:
    """Measure what other tools need for the tiles of our plan, or say why one is not measured."""
    regions = [
        {"read": region.read.round_out(), "tiles": [tile.read.round_out() for tile in region.tiles]}
        for region in _regions(ss.open_slide(jpeg, mpp=_MPP))
    ]
    wanted = scratch / "regions.json"
    wanted.write_text(json.dumps(regions), encoding="utf-8")
    slide, readers = f"JPEG, tiles of {_TILE_PX} px", {_BARE: partial(_bare, jpeg), _OURS: partial(_ours, jpeg)}
    with started(jpeg, wanted) as (peers, missing):
        rows = [f"| {slide} | {name}: left out: {reason} | | |" for name, reason in missing.items()]
        try:
            return rows + (_rows(slide, {**readers, **peers}, smoke, repeats=3) if peers else [])
        except RuntimeError as exc:  # all that was measured before is worth keeping
            return [*rows, f"| {slide} | left out: {exc} | | |"]


def bench_read(smoke: bool) -> str:
    """Return a table of medians."""
    keep_freed()  # as a scan does
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slide.svs"
        width, height = assemble(path, 1200 if smoke else 24_000)
        lines = [f"read: {width} x {height} px of JPEG tiles (others less), {os.cpu_count()} cores; medians"]
        lines += ["| slide | reader | threads | px/s, the slide's first reader = 1 |", "|---|---|---|---|"]
        lines += _rows("JPEG", _three(path), smoke)
        with tifffile.TiffFile(path) as slide:
            stored = len(slide.pages[0].dataoffsets)
        for n in (1, 8):
            lines.append(f"| JPEG | slidescan decodes {_decoded(path, n)} tiles of {stored} in the file | {n} | |")
        half_px = _REGION_PX // 2  # or 64 threads would find 36 regions
        one, many = (_stream(path, n, lambda _, rgb: zlib.crc32(rgb.data), region_px=half_px) for n in (1, 64))
        differ = sum(a != b for a, b in zip(one, many, strict=True))
        lines.append(f"| JPEG | slidescan: {differ} of {len(one)} regions differ from 1 thread's | 64 | |")
        lines += _formats(path, Path(scratch), smoke)
        lines += _peers(path, Path(scratch), smoke)
    return "\n".join(lines)
