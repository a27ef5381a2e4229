"""How fast slides are read: px per second from file to batches of tiles, against the codec alone and OpenSlide.

The slide is made of whole JPEG tiles of a real one, copied byte for byte (of a phantom where there is none). All
contenders read the same tiles, by turns, in one run: what counts is the ratio.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
import openslide
import tifffile

import slidescan as ss
from slidescan.phantom import write_phantom
from slidescan.plan import Region, plan

__all__ = ["assemble", "bench_read"]

_SHARED = Path(os.environ.get("SLIDESCAN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared"))
_TILE_PX, _HALO_PX, _REGION_PX, _BATCH = 1024, 112, 4096, 8  # as the bundled detector is fed
_OPENSLIDE_PX = 480  # what peers ask OpenSlide for: four tiles of 240 px


def assemble(path: Path, edge_px: int) -> tuple[int, int]:
    """Write a slide of `edge_px` or a little less, of one real slide's JPEG tiles; return its width and height."""
    source = _SHARED / "slides" / "CMU-1-Small-Region.svs"
    with tempfile.TemporaryDirectory() as scratch:
        if not source.is_file():
            source = Path(scratch) / "phantom.tiff"
            write_phantom(source, ss.Phantom((2048, 2048), 0.5, n_figures=4))
        with tifffile.TiffFile(source) as slide:
            page: Any = slide.pages[0]
            wide, high = page.imagewidth // page.tilewidth, page.imagelength // page.tilelength
            columns, file = -(-page.imagewidth // page.tilewidth), slide.filehandle
            coded = []
            for row in range(high):
                for column in range(wide):
                    file.seek(page.dataoffsets[row * columns + column])
                    coded.append(file.read(page.databytecounts[row * columns + column]))
            across, down = edge_px // page.tilewidth, edge_px // page.tilelength

            def tiles() -> Iterator[bytes]:
                for row in range(down):
                    for column in range(across):
                        yield coded[row % high * wide + column % wide]

            size = across * page.tilewidth, down * page.tilelength
            with tifffile.TiffWriter(path, bigtiff=True) as writer:
                writer.write(
                    tiles(),
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


def _bare(path: Path, threads: int) -> None:
    """Decode every tile with imagecodecs and drop it."""
    with tifffile.TiffFile(path) as slide:
        page: Any = slide.pages[0]
        places, tables = list(zip(page.dataoffsets, page.databytecounts, strict=True)), page.jpegtables
        ycbcr = "YCBCR" if page.photometric == 6 else "RGB"
    descriptor = os.open(path, os.O_RDONLY)

    def decode(part: list[tuple[int, int]]) -> None:
        for offset, count in part:
            imagecodecs.jpeg8_decode(
                os.pread(descriptor, count, offset), tables=tables, colorspace=ycbcr, outcolorspace="RGB"
            )

    try:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(decode, [places[i : i + 256] for i in range(0, len(places), 256)]))
    finally:
        os.close(descriptor)


def _openslide(path: Path, threads: int) -> None:
    """Read the slide in blocks, each thread with a handle of its own."""
    with openslide.OpenSlide(path) as slide:
        width, height = slide.dimensions

    def rows(tops: list[int]) -> None:
        with openslide.OpenSlide(path) as own:
            for top in tops:
                for left in range(0, width, _OPENSLIDE_PX):
                    np.asarray(own.read_region((left, top), 0, (_OPENSLIDE_PX, _OPENSLIDE_PX)).convert("RGB"))

    tops = list(range(0, height, _OPENSLIDE_PX))
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(rows, [tops[i::threads] for i in range(threads)]))


def _ours(path: Path, threads: int) -> None:
    """Read every region of a plan and cut its tiles into batches, as a scan does."""
    slide = ss.open_slide(path, mpp=0.5)
    plane = slide.frame
    regions = plan(plane, None, tile_px=_TILE_PX, halo_px=_HALO_PX, region_px=_REGION_PX).regions

    def batches(region: Region) -> None:
        x0, y0, x1, y1 = region.read.round_out()
        rgb = slide.read(x0, y0, x1 - x0, y1 - y0, plane).rgb
        for start in range(0, len(region.tiles), _BATCH):
            boxes = [tile.read.translate(-x0, -y0).round_out() for tile in region.tiles[start : start + _BATCH]]
            np.stack([rgb[top:bottom, left:right] for left, top, right, bottom in boxes])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(batches, regions))


def bench_read(smoke: bool) -> str:
    """Return a table of medians."""
    contenders: dict[str, Callable[[Path, int], None]] = {
        "imagecodecs, every tile once, nothing placed": _bare,
        f"OpenSlide, {_OPENSLIDE_PX} px blocks": _openslide,
        "slidescan, regions and batches of tiles": _ours,
    }
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slide.svs"
        width, height = assemble(path, 1200 if smoke else 24_000)
        lines = [f"read: {width} x {height} px of JPEG tiles, {os.cpu_count()} cores; medians"]
        lines += ["| | threads | px/s, imagecodecs = 1 |", "|---|---|---|"]
        for threads in (1, 2) if smoke else (1, 2, 4, 8):
            seconds: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in range(1 if smoke else 5):
                for name, run in contenders.items():
                    started = time.perf_counter()
                    run(path, threads)
                    seconds[name].append(time.perf_counter() - started)
            medians = {name: statistics.median(times) for name, times in seconds.items()}
            best = next(iter(medians.values()))
            lines += [f"| {name} | {threads} | {best / median:.2f} |" for name, median in medians.items()]
    return "\n".join(lines)
