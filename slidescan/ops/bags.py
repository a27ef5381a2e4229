"""Deformable attention as a sparse weighted sum of rows, which is what `embedding_bag` computes.

Hides the arithmetic of corners and borders. Exact, on every device torch has, without a compiler; autograd gives all
three gradients, and repeats them bit for bit.

With a few hundred queries the sum itself is the smaller part of the time. The rest goes into passes over the points, so
each pass should run over long contiguous memory: x and y stay side by side as they come, what depends on a level is
tabled for all heads and points of a query, and what is beyond a border loses its share by arithmetic on floats, for
passes that mix truth values with floats cost several others.

Letters: B batch, Q queries, M heads, K points of all levels, D channels a head, S = sum of H·W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

__all__ = ["bags", "gradients", "level_table"]


def bags(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
) -> Tensor:
    """Compute `slidescan.ops.deform_attn` with torch's own operators."""
    n, length, heads, depth = value.shape
    queries, n_points = locations.shape[1], locations.shape[3]
    # Half types hold neither a pixel coordinate nor a sum of many terms well enough.
    working = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    # int32 halves the traffic of the largest tensors here. They count rows of the value, and corners of all points.
    index = torch.int32 if n * heads * max(length, 4 * queries * n_points) < 2**31 else torch.int64
    levels = _levels(tuple((h, w) for h, w in shapes), tuple(points), heads, working, index, value.device)

    # (B, Q, M·K·2): x and y in px of the point's level. What is out of reach goes to -1 or to the size, where both
    # corners weigh nothing; NaN is not below the size either.
    place = locations.to(working).reshape(n, queries, heads * n_points * 2)
    place = torch.addcmul(levels.half, place, levels.size)
    place = torch.where(place < levels.size, place, levels.size).clamp(min=-1)
    first = place.detach().floor().minimum(levels.last)
    second, after = first + 1, place - first
    # A corner beyond the border is zero padding: it loses its share and keeps a row that exists.
    pairs = n, queries, heads * n_points, 2
    of_first = ((1 - after) * second.clamp(max=1)).view(pairs)
    of_second = (after * (levels.last - first).clamp(max=1)).view(pairs)
    share = weights.to(working).reshape(pairs[:3])
    taps = _corners(
        torch.mul, (of_first[..., 1] * share, of_second[..., 1] * share), (of_first[..., 0], of_second[..., 0])
    )

    at_first, at_second = (
        (corner.to(index) * levels.step + levels.origin).view(pairs)
        for corner in (first.clamp(min=0), second.minimum(levels.last.clamp(min=0)))
    )
    image = torch.arange(n, device=value.device, dtype=index)[:, None, None] * (length * heads)
    rows = _corners(
        torch.add, (at_first[..., 1] + image, at_second[..., 1] + image), (at_first[..., 0], at_second[..., 0])
    )

    n_bags = n * queries * heads
    if n_bags == 0 or n_points == 0 or length == 0 or depth == 0:
        # embedding_bag rejects some empty inputs; an empty sum keeps the result on the graph.
        nothing = taps.sum() * 0 + value.to(working).sum() * 0
        return (nothing + value.new_zeros((n, queries, heads * depth), dtype=working)).to(value.dtype)
    table = value.to(working).reshape(n * length * heads, depth)
    rows, taps = rows.view(n_bags, 4 * n_points), taps.view(n_bags, 4 * n_points)
    out = functional.embedding_bag(rows, table.detach(), mode="sum", per_sample_weights=taps)
    if torch.is_grad_enabled() and table.requires_grad:
        out = _WithTable.apply(out, table, rows, taps.detach())  # type: ignore[no-untyped-call]
    return out.view(n, queries, heads * depth).to(value.dtype)


class _WithTable(torch.autograd.Function):
    """The sums of bags as they are, with a gradient of the table they were taken from.

    That gradient is itself a sum of bags: one for each row of the table, of what the row was added to. Sorting the rows
    makes these bags, and takes a fifth of the time of embedding_bag's own gradient (measured on a CPU). The sort is
    stable, so the order of every sum is fixed.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, table: Tensor, rows: Tensor, taps: Tensor) -> Tensor:
        ctx.save_for_backward(rows, taps)
        ctx.n_rows = len(table)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, taps = ctx.saved_tensors
        order = rows.flatten().sort(stable=True).indices
        counts = rows.new_zeros(ctx.n_rows + 1).index_add_(0, rows.flatten() + 1, rows.new_ones(1).expand(rows.numel()))
        of_table = functional.embedding_bag(
            order.div(rows.shape[1], rounding_mode="floor").to(rows.dtype),
            grad.contiguous(),
            counts.cumsum(0, dtype=rows.dtype),
            mode="sum",
            per_sample_weights=taps.flatten()[order],
            include_last_offset=True,
        )
        return grad, of_table, None, None


def _corners(combine: Callable[..., Tensor], y: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]) -> Tensor:
    """Combine both of y with both of x: (..., 4), written in place where no gradient needs the parts."""
    if torch.is_grad_enabled() and (y[0].requires_grad or x[0].requires_grad):
        return torch.stack([combine(one, other) for one in y for other in x], -1)
    out = y[0].new_empty((*y[0].shape, 4))
    for i, corner in enumerate(out.unbind(-1)):
        combine(y[i // 2], x[i % 2], out=corner)
    return out


def gradients(
    grad: Tensor,
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of value, locations and weights, from the inputs alone: the sum is formed again."""
    with torch.enable_grad():
        inputs = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
        out = bags(inputs[0], shapes, inputs[1], inputs[2], points)
        return torch.autograd.grad(out, inputs, grad)  # type: ignore[return-value]  # one a tensor


def level_table(
    shapes: Sequence[tuple[int, int]], points: Sequence[int], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return width, height and first row of each point's level, (K, 3); zeros where it has no pixels."""
    table, start = [], 0
    for (height, width), count in zip(shapes, points, strict=True):
        area = height * width
        table += [(width, height, start) if area else (0, 0, 0)] * count
        start += area
    with torch.inference_mode(mode=False):  # it is kept, and must serve training too
        return torch.tensor(table, dtype=dtype, device=device).reshape(-1, 3)


class _Levels(NamedTuple):
    """What depends on a point's level, x and y by turns, (M·K·2,) each."""

    half: Tensor  # -0.5, of the first pixel's centre
    size: Tensor  # px
    last: Tensor  # px
    step: Tensor  # rows of `value` from one px to the next
    origin: Tensor  # row of `value` of the level's first px and the head


@lru_cache(maxsize=64)  # a run has one or two tile sizes; the tables are a few kilobytes
def _levels(
    shapes: tuple[tuple[int, int], ...],
    points: tuple[int, ...],
    heads: int,
    working: torch.dtype,
    index: torch.dtype,
    device: torch.device,
) -> _Levels:
    with torch.inference_mode(mode=False):
        table = level_table(shapes, points, device, torch.int64).repeat(heads, 1)
        head = torch.arange(heads, device=device).repeat_interleave(sum(points))
        size = table[:, :2]
        step = torch.stack((torch.full_like(head, heads), size[:, 0] * heads), 1)
        origin = torch.stack((torch.zeros_like(head), table[:, 2] * heads + head), 1)
        half = torch.tensor(-0.5, dtype=working, device=device)
        floats = (each.to(working).flatten() for each in (size, size - 1))
        return _Levels(half, *floats, *(each.to(index).flatten() for each in (step, origin)))
