"""Deformable attention in plain sight: slow, short, what the tests compare with, and what ONNX can hold."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["reference"]

_FAR = 100.0  # level widths; nothing beyond can touch a level


def reference(
    value: Tensor,
    shapes: Sequence[tuple[int, int]],
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
) -> Tensor:
    """Compute `deform_attn` with `grid_sample`, level by level: slow, short, and what the tests compare with.

    Takes and returns the same as `deform_attn`.

    Examples
    --------
    >>> import torch
    >>> value, centre = torch.arange(4.0).reshape(1, 4, 1, 1), torch.full((1, 1, 1, 1, 2), 0.5)
    >>> reference(value, [(2, 2)], centre, torch.ones(1, 1, 1, 1), [1]).item()
    1.5
    """
    n, _, heads, depth = value.shape
    queries = locations.shape[1]
    working = torch.promote_types(torch.promote_types(value.dtype, locations.dtype), torch.float32)
    rows, places, shares = (tensor.to(working) for tensor in (value, locations, weights))
    places = torch.where(places.abs() < _FAR, places, -_FAR)  # false for NaN, which grid_sample would take for a place
    out = rows.new_zeros((n * heads, depth, queries))
    grids = (2 * places - 1).transpose(1, 2).flatten(0, 1)  # (B·M, Q, K, 2), in [-1, 1]
    shares = shares.transpose(1, 2).flatten(0, 1)  # (B·M, Q, K)
    start = first = 0
    for (height, width), count in zip(shapes, points, strict=True):
        plane = rows[:, start : start + height * width].permute(0, 2, 3, 1).reshape(n * heads, depth, height, width)
        if not out.numel() or not count or not height * width:  # grid_sample rejects these
            out = out + 0 * (plane.sum() + grids[:, :, first : first + count].sum() + shares.sum())
            start, first = start + height * width, first + count
            continue
        grid, share = grids[:, :, first : first + count], shares[:, None, :, first : first + count]
        sampled = functional.grid_sample(plane, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
        out = out + (sampled * share).sum(-1)
        start, first = start + height * width, first + count
    return out.reshape(n, heads * depth, queries).transpose(1, 2).to(value.dtype)
