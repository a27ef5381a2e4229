"""Deformable attention as a sparse weighted sum of rows, which is what `embedding_bag` computes.

Hides the arithmetic of corners and borders. Exact, on every device torch has, without a compiler; autograd gives all
three gradients, and repeats them bit for bit.

With a few hundred queries the sum itself is the smaller part of the time. The rest goes into passes over the points,
which should each run over long contiguous memory: x and y are one tensor, first all x, then all y; what depends on a
level is tabled for all heads and points of a query; and what is beyond a border loses its share by arithmetic on
floats, for passes that mix truth values with floats cost several others.

Letters: B batch, Q queries, M heads, K points of all levels, D channels a head, S = sum of H·W.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional

__all__ = ["bags", "gradients", "level_table", "refuse_second_derivative", "refuse_tangents", "working_type"]

Built = TypeVar("Built")


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
    working = working_type(value, locations)
    # int32 halves the traffic of the largest tensors here. They count rows of the value, and corners of all points.
    index = torch.int32 if n * heads * max(length, 4 * queries * n_points) < 2**31 else torch.int64
    levels = _levels(tuple((h, w) for h, w in shapes), tuple(points), heads, working, index, value.device)

    # (2, B, Q, M·K): x and y in px of the point's level.
    places = locations.to(working).reshape(n, queries, heads * n_points, 2).movedim(-1, 0).contiguous()
    place = _within_reach(torch.addcmul(levels.half, places, levels.size), levels.size)
    first = place.detach().floor().clamp_(max=levels.last)
    second, after = first + 1, place.sub_(first)
    # A corner beyond the border is zero padding: it loses its share and keeps a row that exists.
    x_share, y_share = (1 - after).mul_(second.clamp(max=1))
    x_share_2, y_share_2 = after.mul_((levels.last - first).clamp_(max=1))
    share = weights.to(working).reshape(n, queries, heads * n_points)
    taps = _corners(torch.mul, (y_share * share, y_share_2 * share), (x_share, x_share_2), weights.shape)

    (x_row, y_row), (x_row_2, y_row_2) = (
        corner.to(index).mul_(levels.step).add_(levels.origin)
        for corner in (first.clamp_(min=0), second.clamp_(max=levels.last.clamp(min=0)))
    )
    if n > 1:
        image = torch.arange(n, device=value.device, dtype=index)[:, None, None] * (length * heads)
        y_row, y_row_2 = y_row + image, y_row_2 + image
    rows = _corners(torch.add, (y_row, y_row_2), (x_row, x_row_2), weights.shape)

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
    def forward(out: Tensor, table: Tensor, rows: Tensor, taps: Tensor) -> Tensor:
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        _, table, rows, taps = inputs
        ctx.mark_dirty(output)  # the sums themselves, not a view of them: a caller may change them in place
        ctx.save_for_backward(rows, taps)
        ctx.n_rows = len(table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
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


def working_type(value: Tensor, locations: Tensor) -> torch.dtype:
    """Return the type of coordinates and sums: float64 where value or locations are, float32 otherwise.

    Half types hold neither a pixel coordinate nor a sum of many terms well enough.
    """
    return torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)


def refuse_second_derivative() -> None:
    """Raise an error in a backward that is to be differentiated again: parts of that would be missing, silently."""
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "deform_attn: it has no second derivative; leave out create_graph=True (torch.func sets it, too)"
        )


def refuse_tangents(*tensors: Tensor) -> None:
    """Raise an error for forward-mode derivatives (`torch.func.jvp`): they would come out as zero, silently."""
    if any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):  # type: ignore[no-untyped-call]
        raise NotImplementedError("deform_attn: it has no forward-mode derivative; use tensor.backward()")


def _within_reach(place: Tensor, size: Tensor) -> Tensor:
    """Move what no corner reaches, NaN included, to -1 or to the size, where both corners weigh nothing."""
    if place.requires_grad:  # three times slower, and without a gradient at the size itself
        return torch.where(place < size, place, size).clamp(min=-1)
    return place.nan_to_num_(nan=-1.0).clamp_(max=size).clamp_(min=-1)


def _corners(
    combine: Callable[..., Tensor], y: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor], shape: tuple[int, ...]
) -> Tensor:
    """Combine both of y with both of x: (B, Q, M, 4, K), written in place where no gradient needs the parts."""
    y, x = ((one.view(shape), other.view(shape)) for one, other in (y, x))
    if torch.is_grad_enabled() and (y[0].requires_grad or x[0].requires_grad):
        return torch.stack([combine(one, other) for one in y for other in x], -2)
    out = y[0].new_empty((*shape[:3], 4, shape[3]))
    for i, corner in enumerate(out.unbind(-2)):
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


def _kept(build: Callable[..., Built]) -> Callable[..., Built]:
    """Keep what `build` returns for as long as the process lives, one for each set of arguments: a few kilobytes.

    For a CUDA graph reads a table whenever it is replayed. It is built in a thread of its own, which knows nothing of
    inference mode, of fake tensors, nor of the memory pool of a graph that is being recorded.
    """

    @cache
    def once(*arguments: Any) -> Built:
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(partial(build, *arguments)).result()

    return once


@_kept
def level_table(
    shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], device: torch.device, dtype: torch.dtype
) -> Tensor:
    """Return width, height and first row of each point's level, (K, 3); zeros where it has no pixels."""
    return _table(shapes, points).to(dtype).to(device)


def _table(shapes: tuple[tuple[int, int], ...], points: tuple[int, ...]) -> Tensor:
    table, start = [], 0
    for (height, width), count in zip(shapes, points, strict=True):
        area = height * width
        table += [(width, height, start) if area else (0, 0, 0)] * count
        start += area
    return torch.tensor(table, dtype=torch.int64).reshape(-1, 3)


class _Levels(NamedTuple):
    """What depends on a point's level, of x and of y, (2, 1, 1, M·K) each."""

    half: Tensor  # -0.5, of the first pixel's centre
    size: Tensor  # px
    last: Tensor  # px
    step: Tensor  # rows of `value` from one px to the next
    origin: Tensor  # row of `value` of the level's first px and the head


@_kept
def _levels(
    shapes: tuple[tuple[int, int], ...],
    points: tuple[int, ...],
    heads: int,
    working: torch.dtype,
    index: torch.dtype,
    device: torch.device,
) -> _Levels:
    width, height, start = _table(shapes, points).repeat(heads, 1).unbind(1)
    head = torch.arange(heads).repeat_interleave(sum(points))
    size = torch.stack((width, height))[:, None, None]
    step = torch.stack((torch.full_like(head, heads), width * heads))[:, None, None]
    origin = torch.stack((torch.zeros_like(head), start * heads + head))[:, None, None]
    half = torch.tensor(-0.5, dtype=working)
    tables = half, size.to(working), (size - 1).to(working), step.to(index), origin.to(index)
    return _Levels(*(each.to(device) for each in tables))
