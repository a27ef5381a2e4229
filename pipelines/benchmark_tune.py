"""The launches of the op's kernels that are best on this GPU; ``python pipelines/benchmark.py tune`` writes the table.

Nothing is tuned while a model runs: that costs seconds, breaks the capture of CUDA graphs, and differs from run to run.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch
from benchmark_ops import RT_DETR, Case, timed

if TYPE_CHECKING:
    from slidescan.ops.fused import Launch

__all__ = ["tune"]

_KINDS = [(dtype, depth) for dtype in (torch.bfloat16, torch.float32) for depth in (16, 32, 64)]
_COMPILERS = 6  # processes: compiling is most of the time


def tune(smoke: bool) -> str:
    """Time each launch of both kernels on this GPU and write the best into the table that the package ships."""
    if not torch.cuda.is_available():
        return "tune: needs a GPU; the table stays as it is"
    from slidescan.ops import fused

    kinds = _KINDS[1:2] if smoke else _KINDS
    with ProcessPoolExecutor(min(_COMPILERS, len(kinds)), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile, kinds))  # into Triton's cache on disk
    for dtype, depth in kinds:
        for direction, call in _calls(dtype, depth).items():
            key = fused.launch_key(direction, depth, dtype.itemsize)
            times = {}
            for candidate in _candidates(direction):
                fused.launch_table()[key] = candidate
                call()
                times[candidate] = statistics.median(timed(call, "cuda") for _ in range(11))
            best = min(times, key=lambda candidate: times[candidate])
            fused.launch_table()[key] = best
            print(f"tune: {key}: {best}, {times[best] * 1e6:.0f} µs; slowest {max(times.values()) * 1e6:.0f} µs")
    table = fused.launch_table()
    if not smoke:
        told = {"measured on": torch.cuda.get_device_name(), "made by": "python pipelines/benchmark.py tune"}
        text = json.dumps({**told, "warps, blocks, unroll": table}, indent=1)
        fused.TABLE.write_text(text + "\n", encoding="utf-8")
    return f"tune: {len(table)} launches chosen"


def _candidates(direction: str) -> list[Launch]:
    from slidescan.ops.fused import Launch

    # More than one block a warp would send the sums of the backward kernel through shared memory.
    blocks = (1, 2) if direction == "forward" else (1,)
    return [Launch(*each) for each in itertools.product((1, 2, 4, 8), blocks, (1, 2, 4))]


def _calls(dtype: torch.dtype, depth: int) -> dict[str, Callable[[], object]]:
    """Return a forward and a backward of an RT-DETR decoder with heads of `depth` channels."""
    from slidescan.ops import fused

    case = Case("RT-DETR decoder, B32", 32, RT_DETR, 300, dtype)
    value, locations, weights = case.inputs(0, "cuda")
    value = value[..., :1].expand(*value.shape[:3], depth).contiguous()
    inputs = value, case.shapes, locations, weights, case.points
    grad = torch.ones_like(fused.fused(*inputs))
    return {
        "forward": partial(fused.fused, *inputs),
        "backward": partial(fused.fused_backward, grad, *inputs, (True, True)),
    }


def _compile(kind: tuple[torch.dtype, int]) -> None:
    from slidescan.ops import fused

    dtype, depth = kind
    for direction, call in _calls(dtype, depth).items():
        for candidate in _candidates(direction):
            fused.launch_table()[fused.launch_key(direction, depth, dtype.itemsize)] = candidate
            call()
