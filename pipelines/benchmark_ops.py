"""The op against what people use now; ``python pipelines/benchmark.py ops`` prints the table.

Contenders: transformers' own form, the same compiled, and where they are installed the CUDA kernel of 2020
(torch-ms-deform-attn) and DCNv4's FlashDeformAttn. They take turns on the same inputs, three sets of them, so that a
busy moment hits all; each begins as often as any other, for who begins finds the inputs in no cache. Medians.

On a GPU the second-level cache is emptied before each call, and as that takes longer than launching a call, what is
timed is the GPU alone. Extra memory is the highest beyond inputs and gradients. The error is the largest one against
float64, as a share of the largest result: who computes something else is seen there.
"""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slidescan.ops import deform_attn, reference
from slidescan.ops.deform_attn import Backend

__all__ = ["DECODER", "ENCODER", "POINTS", "RT_DETR", "Case", "bench_ops", "timed", "where"]

_HEADS, _DEPTH = 8, 32
POINTS = 4  # on each level
RT_DETR = [(80, 80), (40, 40), (20, 20)]  # 640 px at strides 8, 16, 32
_DEFORMABLE_DETR = [(100, 134), (50, 67), (25, 34), (13, 17)]  # 800 x 1066 px, four levels
_INPUT_SETS = 3
_CACHE_BYTES = 256 << 20  # written between calls; the second-level cache of an H200 holds 60 MB
_HEAD_START = 6  # times it is written: about half a millisecond, in which the host launches all that a call launches
_MOST_HEAD_START = 96  # a call that waits for the GPU itself never gets one that is long enough
_L2_BYTES_PER_S = 5.5e12  # from cache to cores on an H200: the floor of a gather (assumed, not measured)

Inputs = tuple[Tensor, Tensor, Tensor]


Turn = tuple[str, Callable[..., Tensor], list[tuple[Tensor, ...]]]


class Contender(NamedTuple):
    """An op, and what makes its inputs of ours, which is not timed."""

    op: Callable[..., Tensor]
    prepared: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One shape the op meets in a detector; without `queries` as many as there are pixels (an encoder)."""

    name: str
    batch: int
    shapes: list[tuple[int, int]]
    queries: int | None
    dtype: torch.dtype

    @property
    def points(self) -> list[int]:
        """Points of each level."""
        return [POINTS] * len(self.shapes)

    def inputs(self, seed: int, device: str) -> Inputs:
        """Return value, locations around random reference points, and softmaxed weights."""
        rng = torch.Generator().manual_seed(seed)
        length = sum(height * width for height, width in self.shapes)
        queries = self.queries or length
        rows = self.batch, queries, _HEADS
        value = torch.randn(self.batch, length, _HEADS, _DEPTH, generator=rng)
        near = torch.rand(self.batch, queries, 1, 1, 2, generator=rng)
        if self.queries is None:  # an encoder's queries are the pixels themselves
            near = torch.cat([_centres(height, width) for height, width in self.shapes])[None, :, None, None]
        locations = near + 0.05 * torch.randn(*rows, sum(self.points), 2, generator=rng)
        weights = torch.randn(*rows, sum(self.points), generator=rng).softmax(-1)
        # Locations stay float32 for us; the others convert as they need.
        return value.to(device, self.dtype), locations.to(device), weights.to(device, self.dtype)


DECODER = Case("RT-DETR decoder, B32", 32, RT_DETR, 300, torch.float32)
ENCODER = Case("Deformable-DETR encoder, B2", 2, _DEFORMABLE_DETR, None, torch.float32)


def bench_ops(smoke: bool) -> str:
    """Print forward and forward with backward of every contender, as ratios on a CPU and in µs on a GPU."""
    cuda = torch.cuda.is_available()
    f32, bf16 = torch.float32, torch.bfloat16
    if smoke:
        cases = [Case("tiny", 1, [(4, 4), (2, 2)], 5, f32)]
    elif cuda:
        cases = [replace(case, dtype=dtype) for case in (DECODER, ENCODER) for dtype in (f32, bf16)]
    else:
        cases = [
            Case("RT-DETR decoder, B1", 1, RT_DETR, 300, f32),
            Case("RT-DETR decoder, B4", 4, RT_DETR, 300, f32),
            Case("encoder, B1, Q = S = 8400", 1, RT_DETR, None, f32),
        ]
    print(f"ops: {where()}")
    columns = ["case", "what", "error", "forward", "forward + backward"]
    if cuda:
        columns += ["extra memory", "of the L2 floor"]
    print("|", " | ".join(columns), "|")
    print("|", " | ".join("---" for _ in columns), "|", flush=True)
    for case in cases:
        for cells in _rows(case, "cuda" if cuda else "cpu", rounds=1 if smoke else 45):
            print("|", " | ".join(cells[: len(columns)]), "|", flush=True)
    return "ops: ratios are theirs to ours; " + ("of the time on the GPU alone" if cuda else "of wall time")


def _centres(height: int, width: int) -> Tensor:
    """Return x, y in [0, 1] of the pixels' centres, (H·W, 2)."""
    y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
    return torch.stack((x, y), -1).flatten(0, 1)


def _rows(case: Case, device: str, rounds: int) -> list[list[str]]:
    kind = f"{case.name}, {str(case.dtype).removeprefix('torch.')}"
    sets = [case.inputs(seed, device) for seed in range(_INPUT_SETS)]
    exact = reference(*_as_double(sets[0], case))
    torch.compiler.reset()  # or a second case would be compiled for any size
    turns: list[Turn] = []
    error, grads, memory, rows = {}, {}, {}, []
    for name, contender in _contenders(case, device).items():
        prepared = [contender.prepared(*inputs) for inputs in sets]
        try:
            with torch.no_grad():
                out = contender.op(*prepared[0])
            error[name] = float((out.double() - exact).abs().max() / exact.abs().max())
            grads[name] = torch.ones_like(out)
            _train(contender.op, grads[name], *_leaves(prepared[0]))
        except (RuntimeError, TypeError, ValueError) as exc:  # a rival that cannot do a case loses that case alone
            rows.append([kind, name, f"cannot: {str(exc).splitlines()[0]}", "", "", "", ""])
        else:
            turns.append((name, contender.op, prepared))
    if "slidescan" not in error:
        return rows  # which say why
    forward: dict[str, list[float]] = {name: [] for name, _, _ in turns}
    both: dict[str, list[float]] = {name: [] for name, _, _ in turns}
    for round_ in range(rounds):
        for name, op, prepared in _rotated(turns, round_):
            with torch.no_grad():
                forward[name].append(timed(partial(op, *prepared[round_ % _INPUT_SETS]), device))
    for round_ in range(rounds):
        for name, op, prepared in _rotated(turns, round_):
            leaves = _leaves(prepared[round_ % _INPUT_SETS])
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            both[name].append(timed(partial(_train, op, grads[name], *leaves), device))
            if device == "cuda":
                results = sum(leaf.nbytes for leaf in leaves)  # a gradient each
                memory[name] = torch.cuda.max_memory_allocated() - before - results
    ours = [statistics.median(times["slidescan"]) for times in (forward, both)]
    for name, _, _ in turns:
        theirs = [statistics.median(times[name]) for times in (forward, both)]
        cells = [
            f"{t / o:.2f}x" if device == "cpu" else f"{t * 1e6:.0f} µs ({t / o:.2f}x)"
            for t, o in zip(theirs, ours, strict=True)
        ]
        extra, share = f"{memory.get(name, 0) / 2**20:.0f} MiB", f"{_floor_s(case) / theirs[0]:.0%}"
        rows.append([kind, name, f"{error[name]:.0e}", *cells, extra, share])
    return rows


def _rotated(turns: list[Turn], by: int) -> list[Turn]:
    return turns[by % len(turns) :] + turns[: by % len(turns)]


def _leaves(prepared: tuple[Tensor, ...]) -> list[Tensor]:
    return [tensor.detach().requires_grad_() for tensor in prepared]


def _as_double(inputs: Inputs, case: Case) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor, list[int]]:
    value, locations, weights = (tensor.double() for tensor in inputs)
    return value, case.shapes, locations, weights, case.points


def _train(op: Callable[..., Tensor], grad: Tensor, *leaves: Tensor) -> None:
    torch.autograd.grad(op(*leaves), leaves, grad)


def _contenders(case: Case, device: str) -> dict[str, Contender]:
    from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

    shapes, points = case.shapes, case.points
    table = torch.tensor(shapes, device=device)
    starts = torch.cat((table.new_zeros(1), table.prod(1).cumsum(0)[:-1]))
    module = MultiScaleDeformableAttention()

    backend: Backend = "auto" if device == "cpu" else "triton"  # or nothing: a fall-back is not what is measured

    def ours(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return deform_attn(value, shapes, locations, weights, points, backend=backend)

    def by_level(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        # The others want one type, and levels and points as two axes.
        per_level = *weights.shape[:3], len(shapes), POINTS
        return value, locations.to(value.dtype).reshape(*per_level, 2), weights.reshape(per_level)

    def theirs(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return module(value, table, shapes, starts, locations, weights, 64)  # type: ignore[no-any-return]

    found = {
        "slidescan": Contender(ours, lambda *inputs: inputs),
        "transformers (grid_sample)": Contender(theirs, by_level),
    }
    if device == "cpu":
        return found
    found["transformers, compiled"] = Contender(torch.compile(theirs, dynamic=False), by_level)

    kernel = _installed("torch_ms_deform_attn")
    if kernel is not None:

        def packaged(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
            return kernel.ms_deform_attn(value, table, starts, locations, weights)  # type: ignore[no-any-return]

        found["CUDA kernel of 2020 (torch-ms-deform-attn)"] = Contender(packaged, by_level)

    flash = _installed("DCNv4.functions.flash_deform_attn_func")
    if flash is not None:

        def packed(value: Tensor, locations: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
            # It takes logits, after the locations of a head, and 16 bits are float16.
            kind = torch.float32 if value.dtype == torch.float32 else torch.float16
            return value.to(kind), torch.cat((locations.flatten(3), weights.float().log()), -1).to(kind)

        def dcnv4(value: Tensor, locations_and_logits: Tensor) -> Tensor:
            function = flash.FlashDeformAttnFunction
            return function.apply(value, table, starts, locations_and_logits, 64, POINTS)  # type: ignore[no-any-return]

        found["DCNv4 (FlashDeformAttn)"] = Contender(dcnv4, packed)
    return found


@cache
def _installed(name: str) -> Any:
    """Return a rival's module, or None, saying why."""
    try:
        return importlib.import_module(name)
    except (ImportError, NotImplementedError, RuntimeError) as exc:  # DCNv4 refuses GPUs it does not know on import
        print(f"ops: {name.split('.')[0]} is left out: {str(exc) or type(exc).__name__}")
        return None


@cache
def _scratch() -> Tensor:
    return torch.empty(_CACHE_BYTES, dtype=torch.uint8, device="cuda")


def timed(call: Callable[[], object], device: str) -> float:
    """Return the seconds of one call; on a GPU with a cold cache, and without those in which it is launched."""
    if device == "cpu":
        started = time.perf_counter()
        call()
        return time.perf_counter() - started
    head_start = _HEAD_START
    while True:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        for _ in range(head_start):
            _scratch().zero_()
        start.record()
        call()
        waited = start.query()  # type: ignore[no-untyped-call]  # the GPU began before all was launched
        end.record()
        torch.cuda.synchronize()
        if not waited or head_start >= _MOST_HEAD_START:
            return float(start.elapsed_time(end)) * 1e-3
        head_start *= 2


def _floor_s(case: Case) -> float:
    """Return the least seconds a forward can take: four corners of every point come through the second-level cache."""
    length = sum(height * width for height, width in case.shapes)
    samples = case.batch * (case.queries or length) * _HEADS * sum(case.points)
    return samples * 4 * _DEPTH * case.dtype.itemsize / _L2_BYTES_PER_S


def where() -> str:
    """Return device, threads, versions and commit: what a number means nothing without."""
    root = Path(__file__).resolve().parent
    commit = os.environ.get("SLIDESCAN_COMMIT", "")  # where only the files are
    with suppress(OSError):
        command = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        commit = commit or subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    device = f"{platform.machine()} CPU"
    if torch.cuda.is_available():
        device = f"{torch.cuda.get_device_name()}, CUDA {torch.version.cuda}"
    versions = []
    for package in ("torch", "triton", "transformers", "torch-ms-deform-attn", "DCNv4"):
        with suppress(PackageNotFoundError):
            versions.append(f"{package} {version(package)}")
    return ", ".join([device, f"{torch.get_num_threads()} threads", *versions, f"commit {commit or 'unknown'}"])
