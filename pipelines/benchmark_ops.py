"""The op against what people use now; ``python pipelines/benchmark.py ops`` prints the table.

Contenders: transformers' own form, the same compiled, and the CUDA kernel of 2020 where torch-ms-deform-attn is
installed. They take turns on the same inputs, three sets of them, so that a busy moment hits all; on a GPU the
second-level cache is emptied before each call. Medians.
"""

from __future__ import annotations

import importlib
import itertools
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slidescan.ops import deform_attn

__all__ = ["bench_ops", "tune"]

_HEADS, _DEPTH, _POINTS = 8, 32, 4
_INPUT_SETS = 3
_CACHE_BYTES = 256 << 20  # written between calls; the second-level cache of an H200 holds 50 MB
_L2_BYTES_PER_S = 5.5e12  # from cache to cores on an H200: the floor of a gather (assumed, not measured)
_RT_DETR = [(80, 80), (40, 40), (20, 20)]  # 640 px at strides 8, 16, 32
_DEFORMABLE_DETR = [(100, 134), (50, 67), (25, 34), (13, 17)]  # 800 x 1066 px, four levels

Inputs = tuple[Tensor, Tensor, Tensor]
Op = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Case:
    """One shape the op meets in a detector; without `queries` as many as there are pixels (an encoder)."""

    name: str
    batch: int
    shapes: list[tuple[int, int]]
    queries: int | None
    dtype: torch.dtype

    def inputs(self, seed: int, device: str) -> Inputs:
        """Return value, locations around random reference points, and softmaxed weights."""
        rng = torch.Generator().manual_seed(seed)
        length = sum(height * width for height, width in self.shapes)
        queries = self.queries or length
        rows = self.batch, queries, _HEADS
        value = torch.randn(self.batch, length, _HEADS, _DEPTH, generator=rng)
        near = torch.rand(self.batch, queries, 1, 1, 2, generator=rng)
        locations = near + 0.05 * torch.randn(*rows, len(self.shapes) * _POINTS, 2, generator=rng)
        weights = torch.randn(*rows, len(self.shapes) * _POINTS, generator=rng).softmax(-1)
        # Locations stay float32 for us; the others convert as they need.
        return value.to(device, self.dtype), locations.to(device), weights.to(device, self.dtype)


def bench_ops(smoke: bool) -> str:
    """Print forward and forward with backward of every contender, as ratios on a CPU and in µs on a GPU."""
    cuda = torch.cuda.is_available()
    f32, bf16 = torch.float32, torch.bfloat16
    if smoke:
        cases = [Case("tiny", 1, [(4, 4), (2, 2)], 5, f32)]
    elif cuda:
        cases = [
            Case("RT-DETR decoder, B32", 32, _RT_DETR, 300, f32),
            Case("RT-DETR decoder, B32", 32, _RT_DETR, 300, bf16),
            Case("Deformable-DETR encoder, B2", 2, _DEFORMABLE_DETR, None, f32),
            Case("Deformable-DETR encoder, B2", 2, _DEFORMABLE_DETR, None, bf16),
        ]
    else:
        cases = [
            Case("RT-DETR decoder, B1", 1, _RT_DETR, 300, f32),
            Case("RT-DETR decoder, B4", 4, _RT_DETR, 300, f32),
            Case("encoder, B1, Q = S = 8400", 1, _RT_DETR, None, f32),
        ]
    lines = [f"ops: {_where()}", "| case | what | forward | forward + backward |", "|---|---|---|---|"]
    for case in cases:
        lines += _rows(case, "cuda" if cuda else "cpu", rounds=1 if smoke else 15)
    return "\n".join(lines)


def tune(smoke: bool) -> str:
    """Time each launch shape of both kernels on this GPU and write the best into the table that the package ships."""
    if not torch.cuda.is_available():
        return "tune: needs a GPU; the table stays as it is"
    from slidescan.ops import fused

    table = fused.launch_table()
    table.clear()
    for dtype in (torch.bfloat16, torch.float32):
        case = Case("RT-DETR decoder, B32", 2 if smoke else 32, _RT_DETR, 300, dtype)
        for depth in (16, 32, 64):
            value, locations, weights = case.inputs(0, "cuda")
            value = value[..., :1].expand(*value.shape[:3], depth).contiguous()
            inputs = value, case.shapes, locations, weights, [_POINTS] * len(case.shapes)
            grad = fused.fused(*inputs)
            calls: dict[str, Callable[[], object]] = {
                "forward": partial(fused.fused, *inputs),
                "backward": partial(fused.fused_backward, grad, *inputs, (True, True)),
            }
            for direction, call in calls.items():
                key = f"{direction} D{depth} {dtype.itemsize}B"
                times: dict[tuple[int, int], float] = {}
                for shape in itertools.product((8, 16, 32, 64, 128), (1, 2, 4, 8)):  # rows, warps
                    table[key] = shape
                    times[shape] = statistics.median(_time(call, "cuda") for _ in range(2 if smoke else 12))
                table[key] = min(times, key=lambda shape: times[shape])
    if not smoke:
        told = {"measured on": torch.cuda.get_device_name(), "made by": "python pipelines/benchmark.py tune"}
        fused.TABLE.write_text(json.dumps({**told, "rows and warps": table}, indent=1) + "\n", encoding="utf-8")
    return f"tune: {len(table)} launch shapes chosen"


def _rows(case: Case, device: str, rounds: int) -> list[str]:
    contenders = _contenders(case, device)
    sets = [case.inputs(seed, device) for seed in range(_INPUT_SETS)]
    forward: dict[str, list[float]] = {name: [] for name in contenders}
    both: dict[str, list[float]] = {name: [] for name in contenders}
    memory = {}
    for round_ in range(rounds + 1):  # the first one compiles and fills caches
        for name, op in contenders.items():
            inputs = sets[round_ % _INPUT_SETS]
            with torch.no_grad():
                seconds = _time(partial(op, *inputs), device)
            leaves = [tensor.detach().requires_grad_() for tensor in inputs]
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            train = _time(partial(_train, op, *leaves), device)
            if device == "cuda":
                memory[name] = torch.cuda.max_memory_allocated() - before
            if round_:
                forward[name].append(seconds)
                both[name].append(train)
    ours = [statistics.median(times["slidescan"]) for times in (forward, both)]
    rows = []
    for name in contenders:
        theirs = [statistics.median(times[name]) for times in (forward, both)]
        cells = [
            f"{t / o:.2f}x" if device == "cpu" else f"{t * 1e6:.0f} µs ({t / o:.2f}x)"
            for t, o in zip(theirs, ours, strict=True)
        ]
        label = name
        if device == "cuda":
            label += f", {memory[name] / 2**20:.0f} MiB"
            if name == "slidescan":
                label += f", {_floor_s(case) / ours[0]:.0%} of the L2 floor"
        rows.append(f"| {case.name}, {str(case.dtype).removeprefix('torch.')} | {label} | {cells[0]} | {cells[1]} |")
    return rows


def _train(op: Op, *leaves: Tensor) -> None:
    torch.autograd.backward(op(*leaves).square().sum())


def _contenders(case: Case, device: str) -> dict[str, Op]:
    from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

    shapes, points = case.shapes, [_POINTS] * len(case.shapes)
    table = torch.tensor(shapes, device=device)
    starts = torch.cat((table.new_zeros(1), table.prod(1).cumsum(0)[:-1]))
    module = MultiScaleDeformableAttention()

    def levels(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:3], len(shapes), _POINTS, *tensor.shape[4:])

    def theirs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        places = levels(locations.to(value.dtype))  # grid_sample takes one dtype
        return module(value, table, shapes, starts, places, levels(weights), 64)  # type: ignore[no-any-return]

    found: dict[str, Op] = {
        "slidescan": lambda value, locations, weights: deform_attn(value, shapes, locations, weights, points),
        "transformers (grid_sample)": theirs,
    }
    if device == "cpu":
        return found
    found["transformers, compiled"] = torch.compile(theirs)
    try:
        kernel: Any = importlib.import_module("torch_ms_deform_attn").ms_deform_attn
    except ImportError:
        return found

    def packaged(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return kernel(value, table, starts, levels(locations.to(value.dtype)), levels(weights))  # type: ignore[no-any-return]

    found["CUDA kernel of 2020 (torch-ms-deform-attn)"] = packaged
    return found


def _time(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call, with a cold cache on a GPU."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    torch.empty(_CACHE_BYTES, dtype=torch.uint8, device=device).zero_()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda.synchronize()
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1e-3


def _floor_s(case: Case) -> float:
    """Return the least seconds a forward can take: four corners of every point come through the second-level cache."""
    length = sum(height * width for height, width in case.shapes)
    samples = case.batch * (case.queries or length) * _HEADS * len(case.shapes) * _POINTS
    return samples * 4 * _DEPTH * case.dtype.itemsize / _L2_BYTES_PER_S


def _where() -> str:
    root = Path(__file__).resolve().parent
    told = subprocess.run(
        ["git", "-C", root, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    commit = told.stdout.strip() or "unknown"
    return f"{device}, {torch.get_num_threads()} threads, torch {torch.__version__}, commit {commit}"
