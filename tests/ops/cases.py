"""Random inputs of the op, and what every backend gives for them."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from slidescan.ops import deform_attn

Shapes = list[tuple[int, int]]
Inputs = tuple[Tensor, Shapes, Tensor, Tensor, list[int]]

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
OURS = ["torch", pytest.param("triton", marks=needs_triton)]
EVERY = [*OURS, "reference"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def inputs(
    shapes: Shapes,
    points: list[int],
    n: int = 2,
    q: int = 5,
    m: int = 3,
    d: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    """Random inputs, locations up to a level's width beyond its borders."""
    rng = torch.Generator().manual_seed(seed)
    length, k = sum(h * w for h, w in shapes), sum(points)
    value = torch.randn(n, length, m, d, generator=rng, dtype=torch.float64)
    locations = torch.rand(n, q, m, k, 2, generator=rng, dtype=torch.float64) * 3 - 1
    weights = torch.rand(n, q, m, k, generator=rng, dtype=torch.float64)
    return value.to(DEVICE, dtype), shapes, locations.to(DEVICE, dtype), weights.to(DEVICE, dtype), points


def all_gradients(args: Inputs, backend: str) -> list[Tensor]:
    """Result, and gradients of value, locations and weights."""
    value, shapes, locations, weights, points = args
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (value, locations, weights)]
    out = deform_attn(leaves[0], shapes, leaves[1], leaves[2], points, backend=backend)
    return [out.detach(), *torch.autograd.grad(out.double().square().sum(), leaves)]
