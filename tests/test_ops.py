"""The deformable-attention op against its reference, at its limits, and inside a model."""

from __future__ import annotations

import copy

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from slidescan.errors import ModelError
from slidescan.ops import accelerate, deform_attn, reference
from slidescan.train.network import build_network

Shapes = list[tuple[int, int]]


def inputs(
    shapes: Shapes, points: list[int], n: int = 2, q: int = 5, m: int = 3, d: int = 4, *, seed: int = 0
) -> tuple[Tensor, Shapes, Tensor, Tensor, list[int]]:
    """Random float64 inputs, locations up to a level's width beyond its borders."""
    rng = torch.Generator().manual_seed(seed)
    length, k = sum(h * w for h, w in shapes), sum(points)
    value = torch.randn(n, length, m, d, generator=rng, dtype=torch.float64)
    locations = torch.rand(n, q, m, k, 2, generator=rng, dtype=torch.float64) * 3 - 1
    weights = torch.rand(n, q, m, k, generator=rng, dtype=torch.float64)
    return value, shapes, locations, weights, points


@given(
    levels=st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7), st.integers(0, 4)), min_size=1, max_size=3),
    n=st.integers(0, 3),
    q=st.integers(0, 4),
    m=st.integers(1, 3),
    d=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_matches_the_reference_for_any_shape(
    levels: list[tuple[int, int, int]], n: int, q: int, m: int, d: int, seed: int
) -> None:
    """Any number of levels, points a level, batches, queries, heads and channels gives what grid_sample gives."""
    shapes, points = [(h, w) for h, w, _ in levels], [k for _, _, k in levels]
    if n == 0 or q == 0 or sum(points) == 0:
        out = deform_attn(*inputs(shapes, points, n, q, m, d, seed=seed))
        assert out.shape == (n, q, m * d)
        assert not out.any()
    else:
        args = inputs(shapes, points, n, q, m, d, seed=seed)
        torch.testing.assert_close(deform_attn(*args), reference(*args), rtol=0, atol=1e-12)


def test_gradients_are_exact() -> None:
    """All three gradients agree with finite differences in float64."""
    value, shapes, locations, weights, points = inputs([(4, 6), (1, 3)], [2, 1], q=3, m=2, d=3)
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    assert torch.autograd.gradcheck(lambda v, p, w: deform_attn(v, shapes, p, w, points), (value, locations, weights))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0, -1.0])
def test_a_hostile_location_contributes_nothing(bad: float) -> None:
    """NaN, infinite and far locations count as zero, in the result and in every gradient."""
    value, shapes, locations, weights, points = inputs([(4, 6), (2, 3)], [2, 2])
    locations = locations.clamp(0.1, 0.9)
    expected = deform_attn(value, shapes, locations, torch.cat((weights[..., :3], 0 * weights[..., 3:]), -1), points)
    locations[..., 3, :] = bad
    for tensor in (value, locations, weights):
        tensor.requires_grad_()
    out = deform_attn(value, shapes, locations, weights, points)
    torch.testing.assert_close(out, expected)
    out.sum().backward()
    for tensor in (value, locations, weights):
        assert tensor.grad is not None
        assert torch.isfinite(tensor.grad).all()
    assert locations.grad is not None
    assert not locations.grad[..., 3, :].any()


@pytest.mark.parametrize("empty", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 3, 0)])
def test_empty_inputs_keep_the_graph(empty: tuple[int, int, int, int]) -> None:
    """Without batch, queries or channels the result is empty and backward works."""
    args = inputs([(2, 2)], [3], *empty)
    args[0].requires_grad_()
    out = deform_attn(*args)
    out.sum().backward()
    assert out.numel() == 0
    assert args[0].grad is not None


def test_half_types_keep_full_coordinates() -> None:
    """A bfloat16 value gives a bfloat16 result computed with float32 coordinates on a wide level."""
    value, shapes, locations, weights, points = inputs([(4, 512)], [3], d=2)
    locations = locations.float()
    exact = deform_attn(value.bfloat16().double(), shapes, locations, weights.bfloat16().double(), points)
    out = deform_attn(value.bfloat16(), shapes, locations, weights.bfloat16(), points)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, rtol=0.01, atol=0.02)


def test_shapes_that_do_not_fit_are_named() -> None:
    """A value of the wrong length raises an error that shows what was expected."""
    value, shapes, locations, weights, points = inputs([(2, 3)], [2])
    with pytest.raises(ValueError, match=r"expected value \(B, 6, M, D\)"):
        deform_attn(value[:, :-1], shapes, locations, weights, points)


def test_accelerate_keeps_the_outputs_and_says_how_many() -> None:
    """A tiny D-FINE gives the same boxes and logits after the swap, and its weights keep their names."""
    torch.manual_seed(0)
    model = build_network(["cell"], width=0.25, queries=20).eval()
    fast = copy.deepcopy(model)
    assert accelerate(fast) == 3
    assert accelerate(fast) == 3
    assert list(fast.state_dict()) == list(model.state_dict())
    pixels = torch.rand(2, 3, 96, 64)
    with torch.no_grad():
        expected, got = model(pixels), fast(pixels)
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, rtol=1e-5, atol=1e-5)


def test_accelerate_refuses_what_it_cannot_change() -> None:
    """A model without the attention raises instead of staying slow in silence."""
    with pytest.raises(ModelError, match="D-FINE"):
        accelerate(torch.nn.Sequential(torch.nn.Linear(2, 2)))
