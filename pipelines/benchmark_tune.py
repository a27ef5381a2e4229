"""The launches of the op's kernels that are best on this GPU; ``python pipelines/benchmark.py tune`` writes the table.

Nothing is tuned while a model runs: that costs seconds, breaks the capture of CUDA graphs, and differs from run to run.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from benchmark_ops import DECODER, ENCODER, timed

from slidescan.commit import commit

if TYPE_CHECKING:
    from slidescan.ops.fused import Launch

__all__ = ["tune"]

_KINDS = [(dtype, depth) for dtype in (torch.bfloat16, torch.float32) for depth in (16, 32, 64)]
_WARPS = (1, 2, 4, 8)

Kind = tuple[torch.dtype, int, str]  # of the value, channels a head, forward or backward


def tune(smoke: bool) -> str:
    """Time each launch of both kernels on this GPU and write the best into the table that the package ships."""
    if not torch.cuda.is_available():
        return "tune: needs a GPU; the table stays as it is"
    from slidescan.ops import fused

    kinds: list[Kind] = [(*kind, way) for kind in (_KINDS[1:2] if smoke else _KINDS) for way in ("forward", "backward")]
    parts = list(itertools.product(kinds, _WARPS))
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(os.cpu_count() or 1, len(parts)), context) as pool:  # compiling is most of the time
        list(pool.map(_compile, *zip(*parts, strict=True)))  # into Triton's cache on disk
    tuned = dict(fused.launch_table())
    for kind in kinds:
        dtype, depth, way = kind
        key = fused.launch_key(way, depth, dtype.itemsize)
        times: dict[Launch, list[float]] = {}
        refused: set[Launch] = set()
        for call in _calls(kind):
            for candidate in _candidates(way):
                fused.launch_table()[key] = candidate
                if candidate in refused:
                    continue
                try:
                    call()
                except fused.TritonError as exc:  # too many registers, say
                    print(f"tune: {key}: {candidate} is left out: {exc}", flush=True)
                    refused.add(candidate)
                    times.pop(candidate, None)
                    continue
                times.setdefault(candidate, []).append(statistics.median(timed(call, "cuda") for _ in range(9)))
        least = [min(each) for each in zip(*times.values(), strict=True)]
        # The launch that loses least over both cases.
        best = min(times, key=lambda each: sum(time / low for time, low in zip(times[each], least, strict=True)))
        fused.launch_table()[key] = best
        told = ", ".join(
            f"{mine * 1e6:.0f} µs ({low * 1e6:.0f} to {max(all_) * 1e6:.0f})"
            for mine, low, all_ in zip(times[best], least, zip(*times.values(), strict=True), strict=True)
        )
        print(f"tune: {key}: {best}, {told}", flush=True)
        tuned[key] = best
        if not smoke:  # after each: what was measured stays, whatever ends this
            told_by = {"measured on": torch.cuda.get_device_name(), "made by": "python pipelines/benchmark.py tune"}
            text = json.dumps({**told_by, "warps, blocks, unroll": tuned}, indent=1)
            commit(fused.TABLE, lambda partial, text=text: partial.write_text(text + "\n", encoding="utf-8"))  # type: ignore[misc]
    return f"tune: {len(tuned)} launches chosen, each for a decoder and an encoder (best to worst launch in brackets)"


def _candidates(way: str, warps: Iterable[int] = _WARPS) -> list[Launch]:
    from slidescan.ops.fused import Launch

    # More than one block a warp would send the sums of the backward kernel through shared memory.
    blocks = (1, 2) if way == "forward" else (1,)
    return [Launch(*each) for each in itertools.product(warps, blocks, (1, 2, 4))]


def _calls(kind: Kind) -> Iterator[Callable[[], object]]:
    """Yield the calls of an RT-DETR decoder and of a Deformable DETR encoder, one way."""
    from slidescan.ops import fused

    dtype, depth, way = kind
    for case in (DECODER, ENCODER):
        value, locations, weights = replace(case, dtype=dtype).inputs(0, "cuda")
        value = value[..., :1].expand(*value.shape[:3], depth).contiguous()
        inputs = value, case.shapes, locations, weights, case.points
        if way == "forward":
            yield partial(fused.fused, *inputs)
        else:
            grad = value.new_ones(value.shape[0], locations.shape[1], value.shape[2] * depth)
            yield partial(fused.fused_backward, grad, *inputs, (True, True))


def _compile(kind: Kind, warps: int) -> None:
    from slidescan.ops import fused

    dtype, depth, way = kind
    for call in _calls(kind):
        for candidate in _candidates(way, (warps,)):
            fused.launch_table()[fused.launch_key(way, depth, dtype.itemsize)] = candidate
            with suppress(fused.TritonError):  # said when it is timed
                call()
