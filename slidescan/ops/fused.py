"""Deformable attention on a GPU in one kernel each way, written in Triton.

Hides launches and the accumulation of gradients. A program handles rows (q, m) of one image and all their points:
coordinates are computed once a point in float32, the four corners are gathered as whole rows of channels, and nothing
of the size of all samples is ever in memory. Backward forms the gradients of locations and weights without atomics;
that of the value is summed by atomic adds into float32, whose order is not fixed: where torch is asked for
deterministic algorithms it goes through `slidescan.ops.bags` instead.

Importing this needs Triton; with TRITON_INTERPRET=1 set before, the same kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton.errors import TritonError

from slidescan.ops.bags import gradients, level_table, working_type
from slidescan.ops.kernels import backward_kernel, forward_kernel

__all__ = ["TABLE", "Launch", "TritonError", "fused", "fused_backward", "launch", "launch_key", "launch_table"]

TABLE = Path(__file__).with_name("launch.json")


def fused(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int]
) -> Tensor:
    """Compute `slidescan.ops.deform_attn` in one launch; no gradient is recorded."""
    n, _, heads, depth = value.shape
    out = value.new_empty((n, locations.shape[1], heads * depth))
    if out.numel() == 0 or locations.shape[3] == 0 or value.numel() == 0:
        return out.zero_()
    call = _Call("forward", value, shapes, locations, weights, points)
    with _on(value):
        forward_kernel[call.grid](*call.inputs, out, *call.sizes, **call.constants)
    return out


def fused_backward(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
    needs: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of value, and of locations and weights, as far as `needs` (value, points) asks for them."""
    for_value, for_points = needs
    length, n_points = value.shape[1], locations.shape[3]
    if torch.are_deterministic_algorithms_enabled():
        of_value, of_locations, of_weights = gradients(grad, value, shapes, locations, weights, points)
        return (of_value if for_value else None), *((of_locations, of_weights) if for_points else (None, None))
    grad_value = value.new_zeros(value.shape, dtype=working_type(value, locations)) if for_value else None
    grad_location = torch.zeros_like(locations, memory_format=torch.contiguous_format) if for_points else None
    grad_weight = torch.zeros_like(weights, memory_format=torch.contiguous_format) if for_points else None
    if grad.numel() and n_points and value.numel() and any(needs):
        call = _Call("backward", value, shapes, locations, weights, points)
        spare = grad.new_empty(1)  # stands for a result nobody wants
        results = (spare if result is None else result for result in (grad_value, grad_location, grad_weight))
        with _on(value):
            backward_kernel[call.grid](
                *call.inputs,
                grad.contiguous(),
                *results,
                *call.sizes,
                length,
                **call.constants,
                BLOCK_K=_power_of_2(n_points),
                FOR_VALUE=for_value,
                FOR_POINTS=for_points,
            )
    return None if grad_value is None else grad_value.to(value.dtype), grad_location, grad_weight


class Launch(NamedTuple):
    """How a kernel is cut into programs: warps a program, blocks of rows a warp takes at once, points at a time."""

    warps: int
    blocks: int
    unroll: int

    def rows(self, direction: str, depth: int, item_bytes: int) -> int:
        """Return the rows of a program; `depth` is the channels of a head padded to a power of two.

        A lane of the forward kernel has 16 bytes of a row. One of the backward kernel has four channels, because that
        is what the hardware adds to float32 at once; with more the compiler would move each sum through shared memory.
        """
        channels = max(1, 16 // item_bytes) if direction == "forward" else 4
        return max(1, self.warps * self.blocks * 32 * channels // depth)


# What the table does not hold. Chosen by the registers and loads of the machine code, not yet by time.
_UNTUNED = {"forward": Launch(2, 1, 4), "backward": Launch(2, 1, 2)}


def launch(direction: str, depth: int, item_bytes: int) -> Launch:
    """Return how to launch a kernel, from the table tuned off line; `direction` is forward or backward."""
    return launch_table().get(launch_key(direction, depth, item_bytes), _UNTUNED[direction])


def launch_key(direction: str, depth: int, item_bytes: int) -> str:
    """Return the name of a launch in the table."""
    return f"{direction} D{depth} {item_bytes}B"


@lru_cache(maxsize=1)
def launch_table() -> dict[str, Launch]:
    """Return the tuned launches by direction, channels and bytes; a change to it holds for this process."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))["warps, blocks, unroll"]
    return {key: Launch(*map(int, launch)) for key, launch in table.items()}


_MOST_SUMS = 2048  # of a program, rows by points: more, with heads of few channels, take minutes to compile


class _Call:
    """What both kernels take: programs, tensors, sizes, and what is compiled in."""

    __slots__ = ("constants", "grid", "inputs", "sizes")

    def __init__(
        self,
        direction: str,
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        locations: Tensor,
        weights: Tensor,
        points: Sequence[int],
    ) -> None:
        n, length, heads, depth = value.shape
        queries, n_points = locations.shape[1], locations.shape[3]
        if value.stride(3) != 1:
            value = value.contiguous()
        strides = value.stride()[:3]
        align = math.gcd(8, *strides)  # 8 channels of two bytes are what a lane reads at once
        padded, item = _power_of_2(depth), value.element_size()
        how = launch(direction, padded, item)
        rows = min(how.rows(direction, padded, item), max(1, _MOST_SUMS // _power_of_2(n_points)))
        reach = max(
            length * max(strides[1], heads * depth), heads * strides[2], queries * heads * max(2 * n_points, depth)
        )
        self.grid = (n * -(-queries * heads // rows),)
        self.inputs = (
            value,
            locations.contiguous(),
            weights.contiguous(),
            level_table(tuple((h, w) for h, w in shapes), tuple(points), value.device, torch.int32),
        )
        self.sizes = (queries, *(stride // align for stride in strides))
        self.constants: dict[str, Any] = {
            "K": n_points,
            "M": heads,
            "D": depth,
            "ALIGN": align,
            "WIDE": reach >= 2**31,
            "WORKING": tl.float64 if working_type(value, locations) == torch.float64 else tl.float32,
            "BLOCK_D": padded,
            "BLOCK_R": rows,
            # Rows that no lane can read 8 bytes of at once need many registers a point.
            "UNROLL": min(how.unroll, n_points) if align * item >= 8 else 1,
            "num_warps": how.warps,
            "enable_fp_fusion": True,  # what it was before Triton 3.9 began to warn of a change
        }


def _power_of_2(n: int) -> int:
    """Return the least power of two that is no less."""
    return 1 << (n - 1).bit_length()


def _on(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()
