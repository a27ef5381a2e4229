"""Multi-scale deformable attention: a few bilinear samples a query, weighted and summed.

Hides the arithmetic of levels, corners and borders behind one function. The work is a sparse weighted sum of rows, and
that is what `torch.nn.functional.embedding_bag` does, so no compiler is needed and autograd gives all three gradients.

Invariants
----------
- Coordinates are computed in float32 or better whatever the dtype of the inputs: in bfloat16 a location on a 128 px
  wide level is off by up to 1 px.
- A location that is NaN, infinite or outside its level contributes nothing: no value, no gradient.
- Rows are addressed with 64 bits only where 32 are too few.

Letters: B batch, Q queries, M heads, L levels, K points of all levels, D channels a head, S = sum of H·W.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from slidescan.errors import ModelError

__all__ = ["accelerate", "deform_attn", "reference"]


def deform_attn(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
) -> Tensor:
    """Sum weighted bilinear samples of `value` at `locations`.

    A location (0, 0) is the outer corner of the first pixel of its level and (1, 1) that of the last (align_corners is
    false); outside is zero. Each level may have its own number of points.

    Parameters
    ----------
    value : Tensor, shape (B, S, M, D)
        Levels flattened row by row and stacked; any float dtype.
    shapes : sequence of (H, W)
        Size of each level; S is the sum of H·W.
    locations : Tensor, shape (B, Q, M, K, 2)
        x, y in [0, 1]; points of the first level first.
    weights : Tensor, shape (B, Q, M, K)
        Usually a softmax over K.
    points : sequence of int
        Points of each level; K is their sum.

    Returns
    -------
    Tensor, shape (B, Q, M·D)
        In the dtype of `value`.

    Raises
    ------
    ValueError
        If the shapes do not fit together.

    Examples
    --------
    >>> import torch
    >>> value = torch.arange(4.0).reshape(1, 4, 1, 1)           # one level of 2 x 2
    >>> centre = torch.full((1, 1, 1, 1, 2), 0.5)
    >>> deform_attn(value, [(2, 2)], centre, torch.ones(1, 1, 1, 1), [1]).item()
    1.5
    """
    _check(value, shapes, locations, weights, points)
    n, length, heads, depth = value.shape
    queries, n_points = locations.shape[1], locations.shape[3]
    # Half types hold neither a pixel coordinate nor a sum of many terms well enough.
    working = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    width, height, start = _levels(tuple(map(tuple, shapes)), tuple(points), value.device)

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


def reference(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
) -> Tensor:
    """Compute `deform_attn` with `grid_sample`, level by level: slow, short, and what the tests compare with.

    Takes and returns the same as `deform_attn`, for finite locations.

    Examples
    --------
    >>> import torch
    >>> value, centre = torch.arange(4.0).reshape(1, 4, 1, 1), torch.full((1, 1, 1, 1, 2), 0.5)
    >>> reference(value, [(2, 2)], centre, torch.ones(1, 1, 1, 1), [1]).item()
    1.5
    """
    _check(value, shapes, locations, weights, points)
    n, _, heads, depth = value.shape
    queries = locations.shape[1]
    out = value.new_zeros((n * heads, depth, queries))
    grids = (2 * locations - 1).transpose(1, 2).flatten(0, 1)  # (B·M, Q, K, 2), in [-1, 1]
    shares = weights.transpose(1, 2).flatten(0, 1)  # (B·M, Q, K)
    start = first = 0
    for (height, width), count in zip(shapes, points, strict=True):
        plane = value[:, start : start + height * width].permute(0, 2, 3, 1).reshape(n * heads, depth, height, width)
        grid, share = grids[:, :, first : first + count], shares[:, None, :, first : first + count]
        sampled = functional.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (sampled * share).sum(-1)
        start, first = start + height * width, first + count
    return out.view(n, heads * depth, queries).transpose(1, 2)


def accelerate(model: torch.nn.Module) -> int:
    """Make the deformable attention of a transformers model use `deform_attn`; return how many modules changed.

    Weights and outputs stay the same. Works on the models that hold the op as an attribute (D-FINE and DEIMv2); modules
    that sample the nearest pixel instead of interpolating keep their own code. Calling it again changes nothing more.

    Raises
    ------
    ModelError
        If nothing in the model can be changed: it is of another family, and would silently stay slow.

    Examples
    --------
    >>> import torch
    >>> accelerate(torch.nn.Linear(2, 2))
    Traceback (most recent call last):
    ...
    slidescan.errors.ModelError: Linear: expected a D-FINE type model, found no deformable attention to replace
    """
    # One `if` a family; the others call the op in other ways (see this package's docstring).
    changed = 0
    module: Any
    for module in model.modules():
        if hasattr(module, "ms_deformable_attn_core") and getattr(module, "decoder_method", "default") == "default":
            module.ms_deformable_attn_core = _as_transformers_calls_it
            changed += 1
    if changed == 0:
        raise ModelError(
            f"{type(model).__name__}: expected a D-FINE type model, found no deformable attention to replace"
        )
    return changed


def _as_transformers_calls_it(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
    method: str = "default",
) -> Tensor:
    assert method == "default"  # accelerate leaves the others alone
    return deform_attn(value, shapes, locations, weights, points)


@lru_cache(maxsize=64)  # a run has one or two tile sizes; the tables are a few hundred bytes
def _levels(
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


def _check(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int]
) -> None:
    length, n_points = sum(height * width for height, width in shapes), sum(points)
    n, heads = value.shape[0], value.shape[2]
    if (
        len(shapes) != len(points)
        or value.shape[1] != length
        or locations.shape != (n, locations.shape[1], heads, n_points, 2)
        or weights.shape != locations.shape[:-1]
    ):
        raise ValueError(
            f"deform_attn: expected value (B, {length}, M, D), locations (B, Q, M, {n_points}, 2), weights "
            f"(B, Q, M, {n_points}) for shapes {list(shapes)} and points {list(points)}; got {tuple(value.shape)}, "
            f"{tuple(locations.shape)}, {tuple(weights.shape)}"
        )
