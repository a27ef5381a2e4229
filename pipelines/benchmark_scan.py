"""What a scan is made of, beside reading: stitching, memory, what is freed and kept, shifted grids."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import slidescan as ss
from slidescan.phantom import write_phantom
from slidescan.stitch import stitch
from slidescan.train.agreement import grid_shift_agreement

__all__ = ["bench_grid", "bench_heap", "bench_memory", "bench_stitch"]


def bench_stitch(smoke: bool) -> str:
    """Stitch boxes of which a fifth has a twin across a seam; median of five."""
    n, tile_px = (20_000 if smoke else 1_000_000), 900
    rng = np.random.default_rng(0)
    side = tile_px * int(np.ceil(np.sqrt(n / 150)))
    per_row = side // tile_px
    centers = rng.uniform(0, side, (n, 2))
    row, column = np.divmod(np.arange(per_row**2), per_row)
    cores = np.stack([column, row, column + 1, row + 1], 1).astype(float) * tile_px
    place = np.minimum(centers // tile_px, per_row - 1).astype(int)
    tile = place[:, 1] * per_row + place[:, 0]
    boxes = ss.Detections.build(np.concatenate([centers - 25, centers + 25], 1), rng.random(n))
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        kept = stitch(boxes, tile, cores, slack=12.0, iou=0.3)
        seconds.append(time.perf_counter() - started)
    median = statistics.median(seconds)
    return f"stitch: {n:,} boxes in {median:.2f} s ({median / n * 1e6:.2f} µs a box), {len(kept):,} kept"


# One detection a tile, at its darkest pixel: what is measured is our memory, not a network's.
_MEMORY_PROGRAM = """
import json, sys
import numpy as np
import slidescan as ss
from slidescan.provenance import peak_rss_mb

class Darkest:
    name, sha256, classes, mpp, input_px = "darkest", "0", ("dark",), 0.25, 1024
    object_um, halo_um, max_per_tile, threshold, runs_on, color, attributes = 12.5, None, 100, 0.5, "cpu", "raw", ()
    def at(self, slide_mpp, *, allow_coarse=False): return self
    def detect(self, tiles, min_score):
        found = []
        for tile in tiles:
            y, x = np.unravel_index(tile[..., 1].argmin(), tile.shape[:2])
            found.append(ss.Detections.build([[x - 25, y - 25, x + 25, y + 25]], [0.9]))
        return found

out, path = sys.argv[1:]
result = ss.scan(path, Darkest(), out=out)
print(json.dumps({"mb": peak_rss_mb(), "n": len(result.detections)}))
"""


def bench_memory(smoke: bool) -> str:
    """Scan two phantoms in processes of their own, three times, and compare the medians of their highest memory."""
    peaks = []
    lines = []
    for size_px in (2048, 4096) if smoke else (20_000, 60_000):
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "slide.tiff"
            block_px = 1024 if smoke else 5120
            write_phantom(path, ss.Phantom((size_px, size_px), 0.25, block_px=block_px, n_figures=10))
            told = []
            for run in range(1 if smoke else 3):
                command = [sys.executable, "-c", _MEMORY_PROGRAM, str(Path(scratch) / f"run-{run}"), str(path)]
                told.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        peaks.append(statistics.median(each["mb"] for each in told))
        highest = ", ".join(str(each["mb"]) for each in told)
        lines.append(f"{size_px:,}²: {highest} MB, {told[0]['n']:,} detections")
    return f"memory: {'; '.join(lines)}; ratio {peaks[1] / peaks[0]:.2f}"


# The seconds of a batch of two tiles; "kept" or "default".
_HEAP_PROGRAM = """
import json, statistics, sys, time
import numpy as np
import slidescan.detect.model as model
from slidescan.detect import load_detector

how, edge, turns = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
if how == "default":
    model.keep_freed = lambda: None
detector = load_detector("mitosis", device="cpu").at(0.25)
tiles = np.random.default_rng(0).integers(0, 256, (2, edge, edge, 3), np.uint8)
seconds = []
for _ in range(turns + 1):
    started = time.perf_counter()
    detector.detect(tiles, 0.3)
    seconds.append(time.perf_counter() - started)
print(json.dumps(statistics.median(seconds[1:])))
"""


def bench_heap(smoke: bool) -> str:
    """Score batches in processes of their own, in turns, with and without `slidescan.heap.keep_freed`."""
    seconds: dict[str, list[float]] = {"default": [], "kept": []}
    for _ in range(1 if smoke else 5):
        for how, told in seconds.items():
            command = [sys.executable, "-c", _HEAP_PROGRAM, how, *(("256", "1") if smoke else ("1024", "9"))]
            told.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    ratio = statistics.median(seconds["default"]) / statistics.median(seconds["kept"])
    return f"heap: with what is freed kept {ratio:.2f}x as fast as with glibc's defaults, two tiles a batch, CPU"


def bench_grid(smoke: bool) -> str:
    """Shift the tile grid and count the detections above threshold that reappear within 2 px and 0.05 score."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "slide.tiff"
        size_px = 1024 if smoke else 6144
        write_phantom(path, ss.Phantom((size_px, size_px), 0.25, n_figures=6 if smoke else 60))
        detector, slide = ss.load_detector("mitosis"), ss.open_slide(path)
        agreed = grid_shift_agreement(slide, detector, shifts=1 if smoke else 4, mask=True)
    return f"grid: {agreed.same} of {agreed.compared} detections on a phantom reappear under shifted grids"
