"""Deformable attention on a GPU in one kernel each way, written in Triton.

Hides launch shapes and the accumulation of gradients. A program handles a block of rows (b, q, m) and all their points:
coordinates are computed once a point in float32, the four corners are gathered as whole rows of channels, and nothing
of the size of all samples is ever in memory. Backward forms the gradients of locations and weights without atomics;
that of the value is summed by atomic adds into float32, whose order is not fixed: where torch is asked for
deterministic algorithms it goes through `slidescan.ops.bags` instead.

Importing this needs Triton; with TRITON_INTERPRET=1 set before, the same kernels run on CPU tensors.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from slidescan.ops.bags import gradients, level_table
from slidescan.ops.kernels import backward_kernel, forward_kernel

__all__ = ["TABLE", "fused", "fused_backward", "launch_shape", "launch_table"]

TABLE = Path(__file__).with_name("launch.json")


def fused(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int]
) -> Tensor:
    """Compute `slidescan.ops.deform_attn` in one launch; no gradient is recorded."""
    n, _, heads, depth = value.shape
    queries, n_points = locations.shape[1], locations.shape[3]
    out = value.new_empty((n, queries, heads * depth))
    if out.numel() == 0 or n_points == 0 or value.numel() == 0:
        return out.zero_()
    call, block_r, warps = _prepared(value, shapes, locations, weights, points, backward=False)
    with _on(value):
        forward_kernel[(triton.cdiv(n * queries * heads, block_r),)](
            *call.inputs, out, *call.sizes, **call.constants, BLOCK_R=block_r, num_warps=warps
        )
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
    n, length, heads, _ = value.shape
    queries, n_points = locations.shape[1], locations.shape[3]
    if torch.are_deterministic_algorithms_enabled():
        of_value, of_locations, of_weights = gradients(grad, value, shapes, locations, weights, points)
        return (of_value if for_value else None), *((of_locations, of_weights) if for_points else (None, None))
    working = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    grad_value = value.new_zeros(value.shape, dtype=working) if for_value else None
    grad_location = torch.zeros_like(locations, memory_format=torch.contiguous_format) if for_points else None
    grad_weight = torch.zeros_like(weights, memory_format=torch.contiguous_format) if for_points else None
    if grad.numel() and n_points and value.numel() and any(needs):
        call, block_r, warps = _prepared(value, shapes, locations, weights, points, backward=True)
        spare = grad.new_empty(1)  # stands for a result nobody wants
        with _on(value):
            backward_kernel[(triton.cdiv(n * queries * heads, block_r),)](
                *call.inputs,
                grad.contiguous(),
                *(spare if result is None else result for result in (grad_value, grad_location, grad_weight)),
                *call.sizes,
                length,
                **call.constants,
                FOR_VALUE=for_value,
                FOR_POINTS=for_points,
                BLOCK_R=block_r,
                num_warps=warps,
            )
    return None if grad_value is None else grad_value.to(value.dtype), grad_location, grad_weight


def launch_shape(direction: str, depth: int, item_bytes: int) -> tuple[int, int]:
    """Return rows a program and warps a program, from the table tuned off line.

    `direction` is forward or backward, `depth` the channels of a head padded to a power of two. What the table does not
    hold starts from the width of a load: 16 bytes a lane, one row or more a warp, four warps.
    """
    known = launch_table().get(f"{direction} D{depth} {item_bytes}B")
    if known is not None:
        return known
    lanes = max(1, min(32, depth * item_bytes // 16))
    return 4 * 32 // lanes, 4


@lru_cache(maxsize=1)
def launch_table() -> dict[str, tuple[int, int]]:
    """Return the tuned rows and warps by direction, channels and bytes; a change to it holds for this process."""
    table: dict[str, Any] = json.loads(TABLE.read_text(encoding="utf-8"))["rows and warps"]
    return {key: (int(rows), int(warps)) for key, (rows, warps) in table.items()}


class _Call:
    """The arguments both kernels share."""

    __slots__ = ("constants", "inputs", "sizes")

    def __init__(self, inputs: tuple[Tensor, ...], sizes: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.inputs, self.sizes, self.constants = inputs, sizes, constants


def _prepared(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
    *,
    backward: bool,
) -> tuple[_Call, int, int]:
    n, length, heads, depth = value.shape
    queries, n_points = locations.shape[1], locations.shape[3]
    if value.stride(3) != 1:
        value = value.contiguous()
    batch_stride, row_stride, head_stride, _ = value.stride()
    double = torch.float64 in (value.dtype, locations.dtype)
    padded = triton.next_power_of_2(depth)
    block_r, warps = launch_shape("backward" if backward else "forward", padded, value.element_size())
    table = _level_rows(tuple(map(tuple, shapes)), tuple(points), value.device)
    call = _Call(
        (value, locations.contiguous(), weights.contiguous(), table),
        (n * queries * heads, queries, batch_stride, row_stride, head_stride),
        {
            "K": n_points,
            "M": heads,
            "D": depth,
            "BLOCK_D": padded,
            "WIDE": length * max(row_stride, heads * depth) >= 2**31,
            "WORKING": tl.float64 if double else tl.float32,
        },
    )
    return call, block_r, warps


@lru_cache(maxsize=64)
def _level_rows(shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], device: torch.device) -> Tensor:
    """Return width, height and first row of each point's level, int32 (K, 3); made before a graph is captured."""
    with torch.inference_mode(mode=False):
        return torch.stack(level_table(shapes, points, device), 1).to(torch.int32).contiguous()


def _on(value: Tensor) -> contextlib.AbstractContextManager[Any]:
    return torch.cuda.device(value.device) if value.is_cuda else contextlib.nullcontext()
