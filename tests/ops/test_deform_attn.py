"""The deformable-attention op: every backend against the same truths, and at its limits."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Iterator, Sequence
from functools import partial
from types import SimpleNamespace

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor

from slidescan.ops import deform_attn, reference
from tests.ops.cases import DEVICE, EVERY, OURS, Shapes, all_gradients, inputs, needs_triton


@contextlib.contextmanager
def programs_of(blocks: int) -> Iterator[None]:
    """Cut the kernels' work into programs of so many blocks where they are interpreted: time goes by programs."""
    with pytest.MonkeyPatch.context() as patch:
        if DEVICE == "cpu" and importlib.util.find_spec("triton") is not None:
            from slidescan.ops import fused

            patch.setattr(fused, "launch", lambda *_: fused.Launch(2, blocks, 2))
        yield


@pytest.fixture(autouse=True, scope="module")
def _several_programs() -> Iterator[None]:
    with programs_of(4):
        yield


def by_hand(value: Tensor, shapes: Shapes, locations: Tensor, weights: Tensor, points: Sequence[int]) -> Tensor:
    """The definition in plain Python loops: an oracle that shares nothing with any backend."""
    n, _, heads, depth = value.shape
    out = torch.zeros(n, locations.shape[1], heads, depth, dtype=value.dtype)
    for b, q, m in torch.cartesian_prod(*(torch.arange(size) for size in out.shape[:3])).tolist():
        k = start = 0
        for (height, width), count in zip(shapes, points, strict=True):
            for _ in range(count):
                x, y = (locations[b, q, m, k] * torch.tensor([width, height]) - 0.5).tolist()
                for row in range(height):
                    for column in range(width):
                        share = max(0.0, 1 - abs(x - column)) * max(0.0, 1 - abs(y - row))
                        out[b, q, m] += weights[b, q, m, k] * share * value[b, start + row * width + column, m]
                k += 1
            start += height * width
    return out.flatten(2)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, in what jvp imports
@pytest.mark.parametrize("backend", OURS)
def test_a_forward_derivative_is_refused(backend: str) -> None:
    """It would be zero, silently."""
    value, *rest = inputs([(3, 4), (2, 2)], [2, 1], q=3, m=2, d=3)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda x: deform_attn(x, *rest, backend=backend), (value,), (torch.ones_like(value),))


@pytest.mark.parametrize("backend", EVERY)
def test_shapes_may_be_a_tensor(backend: str) -> None:
    """As the original op takes them, whose levels would begin in wrong places if it were taken for pairs."""
    value, shapes, *rest = inputs([(5, 7), (3, 4), (2, 2)], [1, 2, 1], q=3, m=2, d=4)
    expected = deform_attn(value, shapes, *rest, backend=backend)
    levels = torch.tensor(shapes)
    for told in (levels, list(levels), [(height, width) for height, width in levels]):
        assert torch.equal(deform_attn(value, told, *rest, backend=backend), expected)


def test_tensors_of_another_rank_are_refused() -> None:
    value, shapes, locations, weights, points = inputs([(3, 4)], [2], q=3, m=2, d=3)
    for wrong in ((value[0], locations), (value, locations.flatten())):
        with pytest.raises(ValueError, match="expected value"):
            deform_attn(wrong[0], shapes, wrong[1], weights, points)


@pytest.mark.parametrize("backend", EVERY)
def test_is_its_definition(backend: str) -> None:
    """Ragged points on three levels, some of one px, give what plain loops over all pixels give."""
    args = inputs([(3, 4), (1, 2), (1, 1)], [2, 1, 2], q=3, m=2, d=3)
    expected = by_hand(*(x.cpu() if isinstance(x, Tensor) else x for x in args))
    torch.testing.assert_close(deform_attn(*args, backend=backend).cpu(), expected, rtol=0, atol=1e-13)


@settings(max_examples=12)
@given(
    levels=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7), st.integers(0, 4)), min_size=1, max_size=3),
    n=st.integers(0, 3),
    q=st.integers(0, 20),
    m=st.sampled_from([1, 2, 3, 8]),
    d=st.sampled_from([1, 3, 16, 24]),
    seed=st.integers(0, 1000),
    blocks=st.sampled_from([1, 4, 16]),
)
@example(levels=[(2, 3, 2), (0, 5, 3)], n=1, q=2, m=2, d=4, seed=0, blocks=1)
@example(levels=[(5, 3, 0)], n=1, q=2, m=1, d=4, seed=0, blocks=1)
@example(levels=[(4, 4, 3), (2, 2, 6), (1, 1, 3)], n=2, q=17, m=8, d=32, seed=1, blocks=4)
@pytest.mark.parametrize("backend", OURS)
def test_agrees_with_the_reference_for_any_shape(
    backend: str, levels: list[tuple[int, int, int]], n: int, q: int, m: int, d: int, seed: int, blocks: int
) -> None:
    """Result and all gradients are grid_sample's, whatever the levels, points, batch, queries, heads, channels, cut."""
    shapes, points = [(h, w) for h, w, _ in levels], [k for _, _, k in levels]
    args = inputs(shapes, points, n, q, m, d, seed=seed)
    with programs_of(blocks):
        got_all = all_gradients(args, backend)
    for got, expected in zip(got_all, all_gradients(args, "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("backend", EVERY)
def test_gradients_are_exact(backend: str) -> None:
    """All three gradients agree with finite differences in float64."""
    value, shapes, locations, weights, points = inputs([(2, 3), (1, 2)], [2, 1], n=1, q=2, m=2, d=2)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    op = partial(deform_attn, points=points, backend=backend)
    # Sums by atomic operations on a GPU have no fixed order.
    assert torch.autograd.gradcheck(lambda v, p, w: op(v, shapes, p, w), leaves, nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", OURS)
def test_gradients_in_the_types_and_shapes_of_training(backend: str, dtype: torch.dtype) -> None:
    """Heads of 32 channels, ragged points, values in each type: gradients are the exact ones, to the type's digits."""
    queries = 300 if DEVICE == "cuda" else 9
    value, shapes, locations, weights, points = inputs([(20, 20), (10, 10), (5, 5)], [3, 6, 3], q=queries, m=8, d=32)
    rounded = value.to(dtype), shapes, locations.float(), weights.to(dtype), points
    exact = rounded[0].double(), shapes, rounded[2].double(), rounded[3].double(), points
    for got, expected in zip(all_gradients(rounded, backend), all_gradients(exact, "reference"), strict=True):
        error = (got.double() - expected).abs().max() / expected.abs().max()
        # A location may fall on the other side of a pixel's centre in float32: one sample more or less, of many.
        assert error < 4 * torch.finfo(dtype).eps + 1e-4


@pytest.mark.parametrize("backend", OURS)
def test_a_second_derivative_is_refused(backend: str) -> None:
    """It is an error, never a number without the parts that are missing."""
    value, shapes, locations, weights, points = inputs([(4, 6)], [2])
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    out = deform_attn(value, shapes, locations, weights, points, backend=backend)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.square().sum(), leaves, create_graph=True)


@pytest.mark.parametrize("backend", OURS)
def test_a_result_may_be_changed_in_place(backend: str) -> None:
    """As an add after it does; the gradients are those of the changed result."""
    value, shapes, locations, weights, points = inputs([(4, 6)], [2])
    value.requires_grad_()
    deform_attn(value, shapes, locations, weights, points, backend=backend).mul_(3).sum().backward()
    found, value.grad = value.grad, None
    deform_attn(value, shapes, locations, weights, points, backend=backend).sum().backward()
    torch.testing.assert_close(found, 3 * value.grad)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("backend", OURS)
def test_a_part_of_the_gradients_is_the_same(backend: str, wanted: tuple[bool, bool]) -> None:
    """With a frozen value, or frozen points, the other gradients are what they are with everything."""
    args = inputs([(4, 6), (2, 3)], [2, 2])
    _, of_value, *of_points = all_gradients(args, backend)
    value, shapes, locations, weights, points = args
    value.requires_grad_(wanted[0])
    locations.requires_grad_(wanted[1])
    weights.requires_grad_(wanted[1])
    deform_attn(value, shapes, locations, weights, points, backend=backend).square().sum().backward()
    for tensor, expected in zip((value, locations, weights), (of_value, *of_points), strict=True):
        assert (tensor.grad is None) == (not tensor.requires_grad)
        if tensor.grad is not None:
            torch.testing.assert_close(tensor.grad, expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 2.0, -1.0])
@pytest.mark.parametrize("backend", EVERY)
def test_a_hostile_location_contributes_nothing(backend: str, bad: float) -> None:
    """NaN, infinite and far locations count as zero, in the result and in every gradient."""
    value, shapes, locations, weights, points = inputs([(4, 6), (2, 3)], [2, 2])
    locations = locations.clamp(0.1, 0.9)
    without = torch.cat((weights[..., :3], 0 * weights[..., 3:]), -1)
    expected = deform_attn(value, shapes, locations, without, points, backend=backend)
    locations[..., 3, :] = bad
    out, *gradients = all_gradients((value, shapes, locations, weights, points), backend)
    torch.testing.assert_close(out, expected)
    assert all(torch.isfinite(gradient).all() for gradient in gradients)
    assert not gradients[1][..., 3, :].any()
    assert not gradients[2][..., 3].any()


@pytest.mark.parametrize("place", [0.0, 1.0, 0.5 / 6, 3.5 / 6, 5.5 / 6, -0.5 / 6 + 1e-12])
@pytest.mark.parametrize("backend", OURS)
def test_borders_and_knots(backend: str, place: float) -> None:
    """On a level's border, on a pixel's centre and just inside reach the result is grid_sample's."""
    value, shapes, locations, weights, points = inputs([(6, 6)], [4])
    args = value, shapes, torch.full_like(locations, place), weights, points
    torch.testing.assert_close(deform_attn(*args, backend=backend), reference(*args), rtol=0, atol=1e-12)


@pytest.mark.parametrize("backend", OURS)
def test_the_gradient_at_a_knot_is_that_of_the_right_side(backend: str) -> None:
    """On pixels' centres, where anchors put locations, and at the end of a pixel's reach the gradient is grid_sample's.

    A bilinear sample has a kink there; in eighths all coordinates are exact, so that both sides see the same kink.
    """
    value, shapes, _, weights, points = inputs([(8, 8)], [11], q=11, m=2)
    eighths = (torch.arange(11, dtype=torch.float64, device=DEVICE) - 0.5) / 8  # from -1 px to 9 px
    grid = torch.stack(torch.meshgrid(eighths, eighths, indexing="xy"), -1)
    args = value, shapes, grid[None, :, None].expand(2, 11, 2, 11, 2), weights, points
    for got, expected in zip(all_gradients(args, backend), all_gradients(args, "reference"), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("empty", [(0, 5, 3, 4), (2, 0, 3, 4), (2, 5, 3, 0)])
@pytest.mark.parametrize("backend", EVERY)
def test_empty_inputs_keep_the_graph(backend: str, empty: tuple[int, int, int, int]) -> None:
    """Without batch, queries or channels the result is empty and backward works."""
    out, *gradients = all_gradients(inputs([(2, 2)], [3], *empty), backend)
    assert out.numel() == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", EVERY)
def test_narrow_types_are_rounded_once(backend: str, dtype: torch.dtype) -> None:
    """The result in a narrow type is the exact one of the rounded inputs, rounded: nothing is lost on a wide level."""
    value, shapes, locations, weights, points = inputs([(4, 512)], [3], d=2, dtype=dtype)
    locations = inputs([(4, 512)], [3], d=2)[2].float()
    exact = deform_attn(value.double(), shapes, locations.double(), weights.double(), points)
    out = deform_attn(value, shapes, locations, weights, points, backend=backend)
    assert out.dtype == dtype
    # float32 coordinates on 512 px are off by up to 6e-5 px; a narrow result by half its last digit.
    torch.testing.assert_close(out.double(), exact, rtol=torch.finfo(dtype).eps, atol=4e-4)


@pytest.mark.parametrize("backend", OURS)
def test_any_strides(backend: str) -> None:
    """Transposed, sliced and expanded inputs give what their contiguous copies give, gradients too."""
    value, shapes, locations, weights, points = inputs([(4, 6)], [3], n=2, m=4, d=6)
    apart = value.permute(3, 0, 2, 1).contiguous().permute(1, 3, 2, 0)
    every_second = torch.stack((locations, locations), 1).flatten(0, 1)[::2]
    same_for_all = weights[:1, :1].expand_as(weights)
    strided = apart, shapes, every_second, same_for_all, points
    plain = value, shapes, every_second.contiguous(), same_for_all.contiguous(), points
    out, expected = (deform_attn(*args, backend=backend) for args in (strided, plain))
    torch.testing.assert_close(out, expected)
    heads_first = value.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
    deform_attn(heads_first, shapes, locations, weights, points, backend=backend).square().sum().backward()
    torch.testing.assert_close(
        heads_first.grad, all_gradients((value, *plain[1:2], locations, weights, points), backend)[1]
    )


@pytest.mark.parametrize("backend", OURS)
def test_gradients_repeat_bit_for_bit_on_request(backend: str) -> None:
    """Under `use_deterministic_algorithms` two runs on points that share pixels give equal bits."""
    args = inputs([(2, 2)], [8], q=40, dtype=torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        first, again = all_gradients(args, backend), all_gradients(args, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_offsets_beyond_32_bits() -> None:
    """The fused kernel reaches pixels more than 2^31 elements away: the value is a view of huge strides."""
    pytest.importorskip("triton")
    value, shapes, locations, weights, points = inputs([(2, 2)], [2], n=1, m=1, d=2, dtype=torch.float32)
    # Four rows 2^30 elements apart in memory that is never touched between them.
    far = torch.empty(3 * 2**30 + 2, dtype=torch.float16, device=DEVICE).as_strided((1, 4, 1, 2), (0, 2**30, 0, 1))
    far.copy_(value)
    args = shapes, locations, weights, points
    torch.testing.assert_close(
        deform_attn(far, *args, backend="triton"), deform_attn(far.contiguous(), *args, backend="torch")
    )


def test_shapes_that_do_not_fit_are_named() -> None:
    """A value of the wrong length raises an error that shows what was expected."""
    value, shapes, locations, weights, points = inputs([(2, 3)], [2])
    with pytest.raises(ValueError, match=r"expected value \(B, 6, M, D\)"):
        deform_attn(value[:, :-1], shapes, locations, weights, points)


@needs_triton
@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, ImportError, OSError])
def test_a_gpu_without_a_compiler_falls_back_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, kind: type[Exception]
) -> None:
    """Triton is tried before it is trusted; asked for by name it is an error that gives the reason."""
    op, fused = (importlib.import_module(f"slidescan.ops.{name}") for name in ("deform_attn", "fused"))

    def broken(*_: object) -> Tensor:
        raise kind("Failed to find C compiler.\nMore lines")

    monkeypatch.setattr(fused, "fused", broken)
    op._triton_problem.cache_clear()
    op._announce.cache_clear()
    on_gpu = SimpleNamespace(is_cuda=True, device=torch.device(DEVICE))  # all that is looked at
    try:
        with pytest.warns(
            RuntimeWarning, match=r"cannot run on .* \(Failed to find C compiler\.\); torch is used"
        ) as said:
            assert [op._runs_triton("auto", on_gpu) for _ in range(3)] == [False] * 3
        assert len(said) == 1
        with pytest.raises(ValueError, match=r"Failed to find C compiler\.\); use torch or auto"):
            deform_attn(*inputs([(2, 3)], [2]), backend="triton")
    finally:
        op._triton_problem.cache_clear()
        op._announce.cache_clear()


def test_tensors_of_two_devices_are_refused() -> None:
    """A kernel would read addresses of another GPU."""
    value, shapes, locations, weights, points = inputs([(2, 3)], [2])
    with pytest.raises(ValueError, match=r"expected value, locations and weights on one device, got .*meta"):
        deform_attn(value, shapes, locations.to("meta"), weights, points)


def test_an_unknown_backend_is_named() -> None:
    """A misspelt backend raises an error that lists the known ones."""
    with pytest.raises(ValueError, match="auto, triton, torch, reference, got cuda"):
        deform_attn(*inputs([(2, 3)], [2]), backend="cuda")  # type: ignore[arg-type]
