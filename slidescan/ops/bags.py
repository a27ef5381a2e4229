"""Deformable attention as a sparse weighted sum of rows, which is what `embedding_bag` computes.

Hides the arithmetic of corners and borders. Exact, on every device torch has, without a compiler; autograd gives all
three gradients, and repeats them bit for bit.

Letters: B batch, Q queries, M heads, K points of all levels, D channels a head, S = sum of H·W.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
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
    width, height, start = level_table(tuple(map(tuple, shapes)), tuple(points), value.device)

    place = locations.to(working)
    x, y = place[..., 0] * width - 0.5, place[..., 1] * height - 0.5  # (B, Q, M, K), px of the point's level
    inside = (x > -1) & (x < width) & (y > -1) & (y < height)  # false for NaN, which no clamp would catch
    x, y = torch.where(inside, x, 0), torch.where(inside, y, 0)
    weight = torch.where(inside, weights.to(working), 0)

    left, top = x.floor(), y.floor()
    right, bottom = left + 1, top + 1
    # A corner beyond the border is zero padding: it keeps a valid row and loses its share.
    to_left, to_right = (right - x) * (left >= 0), (x - left) * (right < width)
    to_top, to_bottom = (bottom - y) * (top >= 0) * weight, (y - top) * (bottom < height) * weight
    taps = torch.cat((to_top * to_left, to_top * to_right, to_bottom * to_left, to_bottom * to_right), -1)

    # int32 halves the traffic of the largest tensor here; the limit is that of its largest entry.
    index = torch.int32 if n * length * heads < 2**31 else torch.int64
    first = torch.arange(n, device=value.device, dtype=index)[:, None] * (length * heads)
    first = (first + torch.arange(heads, device=value.device, dtype=index))[:, None, :, None]  # (B, 1, M, 1)
    in_left, in_right = left.clamp(min=0).to(index) * heads + first, right.minimum(width - 1).to(index) * heads + first
    line = width.to(index) * heads
    in_top, in_bottom = top.clamp(min=0).to(index), bottom.minimum(height - 1).to(index)
    in_top, in_bottom = in_top * line + start.to(index) * heads, in_bottom * line + start.to(index) * heads
    rows = torch.cat((in_top + in_left, in_top + in_right, in_bottom + in_left, in_bottom + in_right), -1)

    bags = n * queries * heads
    if bags == 0 or n_points == 0 or length == 0 or depth == 0:
        # embedding_bag rejects some empty inputs; an empty sum keeps the result on the graph.
        nothing = taps.sum() * 0 + value.to(working).sum() * 0
        return (nothing + value.new_zeros((n, queries, heads * depth), dtype=working)).to(value.dtype)
    out = functional.embedding_bag(
        rows.reshape(bags, 4 * n_points),
        value.to(working).reshape(n * length * heads, depth),
        mode="sum",
        per_sample_weights=taps.reshape(bags, 4 * n_points),
    )
    return out.view(n, queries, heads * depth).to(value.dtype)


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


@lru_cache(maxsize=64)  # a run has one or two tile sizes; the tables are a few hundred bytes
def level_table(
    shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return width, height and first row of each point's level, int64, (K,) each."""
    table, start = [], 0
    for (height, width), count in zip(shapes, points, strict=True):
        table += [(width, height, start)] * count
        start += height * width
    with torch.inference_mode(mode=False):  # cached tensors must serve training too
        columns = torch.tensor(table, dtype=torch.int64, device=device).reshape(-1, 3)
        return columns[:, 0].clone(), columns[:, 1].clone(), columns[:, 2].clone()
