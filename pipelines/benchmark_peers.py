"""How long other tools need for the tiles of our plan: TIAToolbox, wsidata (LazySlide reads with it) and SAHI.

They pin other versions than slidescan, so they live in environments of their own:

python -m venv peers && peers/bin/pip install tiatoolbox wsidata sahi
SLIDESCAN_PEERS=peers/bin/python python pipelines/benchmark.py read

The variable may name several interpreters, joined like PATH: where TIAToolbox and wsidata cannot agree on dask (2.1.3
and 0.12.0 cannot), each gets its own. A tool is taken from the first that has it, and left out where none has.

This file runs there too, and then knows nothing of slidescan: it opens the slide, says so, and answers every number of
threads with the seconds that reading took.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["started"]

_BATCH = 8  # tiles
_HERE = Path(__file__).resolve()

# A region of the plan: its box and those of its tiles, level-0 px.
Region = dict[str, Any]
Cut = Callable[[Region], list[Any]]


def _tiatoolbox(slide: str) -> Cut:
    """Read tile by tile."""
    reader = importlib.import_module("tiatoolbox.wsicore.wsireader").WSIReader.open(slide)

    def cut(region: Region) -> list[Any]:
        return [
            reader.read_rect((x0, y0), (x1 - x0, y1 - y0), resolution=0, units="level")
            for x0, y0, x1, y1 in region["tiles"]
        ]

    return cut


def _wsidata(slide: str) -> Cut:
    """Read tile by tile."""
    reader = importlib.import_module("wsidata").open_wsi(slide, store=None).reader

    def cut(region: Region) -> list[Any]:
        return [reader.get_region(x0, y0, x1 - x0, y1 - y0, level=0) for x0, y0, x1, y1 in region["tiles"]]

    return cut


def _sahi(slide: str) -> Cut:
    """Slice regions: SAHI reads no slides, only images in memory, so OpenSlide gives it a whole region at once."""
    slice_image = importlib.import_module("sahi.slicing").slice_image
    handle = importlib.import_module("openslide").OpenSlide(slide)

    def cut(region: Region) -> list[Any]:
        x0, y0, x1, y1 = region["read"]
        rgb = np.asarray(handle.read_region((x0, y0), 0, (x1 - x0, y1 - y0)).convert("RGB"))
        lefts = sorted({tile[0] for tile in region["tiles"]})
        edge = region["tiles"][0][2] - lefts[0]
        overlap = (edge - (lefts[1] - lefts[0])) / edge if len(lefts) > 1 else 0.0
        sizes = {"slice_height": edge, "slice_width": edge}
        sliced = slice_image(rgb, **sizes, overlap_height_ratio=overlap, overlap_width_ratio=overlap)
        return list(sliced.images)

    return cut


PEERS: dict[str, tuple[str, Callable[[str], Cut]]] = {
    "tiatoolbox": ("TIAToolbox, read_rect", _tiatoolbox),
    "wsidata": ("wsidata (LazySlide), get_region", _wsidata),
    "sahi": ("SAHI, slicing regions that OpenSlide reads", _sahi),
}


@contextmanager
def started(slide: Path, regions: Path) -> Iterator[tuple[dict[str, Callable[[int], float]], dict[str, str]]]:
    """Start all tools; yield what reads the slide with some threads and tells the seconds, and why others are missing.

    A reader raises RuntimeError with the reason where its tool fails.
    """
    readers: dict[str, Callable[[int], float]] = {}
    missing: dict[str, str] = {}
    with ExitStack() as running:
        for package, (name, _) in PEERS.items():
            missing[name] = "SLIDESCAN_PEERS names no interpreter"
            for python in filter(None, os.environ.get("SLIDESCAN_PEERS", "").split(os.pathsep)):
                command, pipe = [python, str(_HERE), package, str(slide), str(regions)], subprocess.PIPE
                try:
                    process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
                except OSError as exc:
                    missing[name] = f"its interpreter does not start ({exc.strerror})"
                    continue
                running.enter_context(process)  # closes its input, which ends it
                answer = _ask(process)
                if answer.startswith("ready "):
                    readers[name.replace(",", f" {answer.removeprefix('ready ')},", 1)] = partial(
                        _seconds, process, name
                    )
                    del missing[name]
                    break
                missing[name] = answer or "its process ended"
        yield readers, missing


def _seconds(process: subprocess.Popen[str], name: str, threads: int) -> float:
    answer = _ask(process, str(threads))
    try:
        return float(answer)
    except ValueError:
        raise RuntimeError(f"{name}, {threads} threads: {answer or 'its process ended'}") from None


def _ask(process: subprocess.Popen[str], line: str = "") -> str:
    """Send a line where there is one; return the answer, empty from a process that is gone."""
    assert process.stdin is not None
    assert process.stdout is not None
    if line:
        process.stdin.write(f"{line}\n")
        process.stdin.flush()
    return process.stdout.readline().strip()


def _read(open_peer: Callable[[str], Cut], slide: str, regions: list[Region], threads: int) -> None:
    """Read all tiles in batches, each thread with a reader of its own."""
    own = threading.local()

    def prepare() -> None:
        own.cut = open_peer(slide)

    def batches(region: Region) -> None:
        tiles = own.cut(region)
        for first in range(0, len(tiles), _BATCH):
            np.stack(tiles[first : first + _BATCH])

    with ThreadPoolExecutor(threads, initializer=prepare) as pool:
        list(pool.map(batches, regions))


def main() -> None:
    """Answer every number of threads on standard input; the first answer is the version."""
    package, slide, wanted = sys.argv[1:]
    # What packages print must not look like an answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    regions = json.loads(Path(wanted).read_text(encoding="utf-8"))
    _, open_peer = PEERS[package]
    try:
        open_peer(slide)({**regions[0], "tiles": regions[0]["tiles"][:1]})
        print("ready", importlib.metadata.version(package), file=answers, flush=True)
        for line in sys.stdin:
            started = time.perf_counter()
            _read(open_peer, slide, regions, int(line))
            print(time.perf_counter() - started, file=answers, flush=True)
    except Exception as exc:  # noqa: BLE001  # whatever it is, it is the answer
        print(" ".join(f"{type(exc).__name__}: {exc}".split())[:200], file=answers, flush=True)


if __name__ == "__main__":
    main()
