"""The op: one function, three ways to compute it, and its registration with torch.

Hides which way is taken. Eager calls go straight to it; under `torch.compile` and `torch.export` the call becomes one
node, ``slidescan::deform_attn``, which keeps its gradient.

Invariants of every way
-----------------------
- Coordinates and sums are in float32 or better whatever the dtype of the inputs: in bfloat16 a location on a 128 px
  wide level is off by up to 1 px.
- A location that is NaN, infinite or half a px outside its level contributes nothing: no value, no gradient; as long
  as values and weights are finite.
- Where torch is asked for deterministic algorithms, gradients repeat bit for bit.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from slidescan.ops.bags import bags, gradients, refuse_second_derivative, refuse_tangents
from slidescan.ops.reference import reference

__all__ = ["Backend", "deform_attn"]

Backend = Literal["auto", "triton", "torch", "reference"]


def deform_attn(
    value: Tensor,
    shapes: Sequence[tuple[int, int]] | Tensor,
    locations: Tensor,
    weights: Tensor,
    points: Sequence[int],
    *,
    backend: Backend = "auto",
) -> Tensor:
    """Sum weighted bilinear samples of `value` at `locations`.

    A location (0, 0) is the outer corner of the first pixel of its level and (1, 1) that of the last (align_corners is
    false); outside is zero. Each level may have its own number of points.

    Parameters
    ----------
    value : Tensor, shape (B, S, M, D)
        Levels flattened row by row and stacked; any float dtype, any strides.
    shapes : sequence of (H, W)
        Size of each level; S is the sum of H·W.
    locations : Tensor, shape (B, Q, M, K, 2)
        x, y in [0, 1]; points of the first level first.
    weights : Tensor, shape (B, Q, M, K)
        Usually a softmax over K.
    points : sequence of int
        Points of each level; K is their sum.
    backend : {"auto", "triton", "torch", "reference"}
        triton is one fused kernel each way, for CUDA; torch is exact and needs nothing; reference is `grid_sample`,
        slow, and what ONNX can hold. auto takes triton on CUDA, reference in an ONNX export, torch elsewhere.

    Returns
    -------
    Tensor, shape (B, Q, M·D)
        In the dtype of `value`.

    Raises
    ------
    ValueError
        If the shapes do not fit together, or the backend is unknown or cannot run here.

    References
    ----------
    Zhu et al., Deformable DETR, ICLR 2021, equation 3.

    Examples
    --------
    >>> import torch
    >>> value = torch.arange(4.0).reshape(1, 4, 1, 1)           # one level of 2 x 2
    >>> centre = torch.full((1, 1, 1, 1, 2), 0.5)
    >>> deform_attn(value, [(2, 2)], centre, torch.ones(1, 1, 1, 1), [1]).item()
    1.5
    """
    if isinstance(shapes, Tensor):  # as the original op has them
        shapes = [(int(height), int(width)) for height, width in shapes.tolist()]
    elif any(isinstance(side, Tensor) for shape in shapes for side in shape):  # rows of that, or torch.jit.trace's
        shapes = [(int(height), int(width)) for height, width in shapes]
    _check(value, shapes, locations, weights, points)
    if backend not in get_args(Backend):
        raise ValueError(f"deform_attn: expected backend {', '.join(get_args(Backend))}, got {backend}")
    if backend == "reference" or (backend == "auto" and torch.onnx.is_in_onnx_export()):
        return reference(value, shapes, locations, weights, points)
    if torch.compiler.is_compiling() or type(value) not in (Tensor, torch.nn.Parameter):  # others, such as fake ones
        flat = [side for shape in shapes for side in shape]
        node: Tensor = torch.ops.slidescan.deform_attn(value, locations, weights, flat, list(points), backend)
        return node
    refuse_tangents(value, locations, weights)
    if not _runs_triton(backend, value):
        return bags(value, shapes, locations, weights, points)
    from slidescan.ops.fused import fused

    if torch.is_grad_enabled() and (value.requires_grad or locations.requires_grad or weights.requires_grad):
        out: Tensor = _Fused.apply(value, locations, weights, shapes, points)  # type: ignore[no-untyped-call]
        return out
    return fused(value, shapes, locations, weights, points)


def _runs_triton(backend: str, value: Tensor) -> bool:
    """Return whether this call goes to Triton and not to torch's own operators."""
    if backend == "torch" or (backend == "auto" and not value.is_cuda):
        return False
    if value.is_cuda or os.environ.get("TRITON_INTERPRET") == "1":
        problem = _triton_problem(value.device)
    else:
        problem = f"the tensors are on {value.device.type}"
    if problem is None:
        return True
    if backend == "auto":
        _announce(problem)
        return False
    raise ValueError(f"deform_attn: backend triton needs CUDA tensors and Triton: {problem}; use torch or auto")


@lru_cache(maxsize=16)  # devices of a machine
def _triton_problem(device: torch.device) -> str | None:
    """Return why Triton cannot be used on this device, or None: it is tried on the smallest case there is."""
    if importlib.util.find_spec("triton") is None:
        return "it is not installed"
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "deform_attn: expected a call before the one that a CUDA graph captures: it compiles kernels"
        )
    try:
        fused = importlib.import_module("slidescan.ops.fused")
    except (ImportError, OSError, RuntimeError) as exc:
        return f"it cannot be loaded ({_first_line(exc)})"
    one = torch.ones(1, 1, 1, 1, 1, device=device)
    try:
        fused.fused(one[0], [(1, 1)], one.expand(1, 1, 1, 1, 2), one[0], [1])
    except torch.OutOfMemoryError:  # another time there may be room
        raise
    # No C compiler, no headers of Python, no libcuda.so where it looks for it, a cache that no library may be loaded
    # from, a GPU it does not know: it raises as many kinds.
    except (
        AssertionError, ImportError, OSError, RuntimeError, subprocess.SubprocessError, fused.TritonError
    ) as exc:  # fmt: skip
        return f"it cannot run on {device} ({_first_line(exc)})"
    return None


def _first_line(exc: BaseException) -> str:
    return next(iter(str(exc).strip().splitlines()), type(exc).__name__)


@lru_cache(maxsize=16)
def _announce(problem: str) -> None:
    """Say once that the slower way is taken."""
    warnings.warn(f"deform_attn: Triton: {problem}; torch is used on CUDA, slower", RuntimeWarning, stacklevel=4)


class _Fused(torch.autograd.Function):
    """Eager calls with gradients: no dispatcher between."""

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        locations: Tensor,
        weights: Tensor,
        shapes: Sequence[tuple[int, int]],
        points: Sequence[int],
    ) -> Tensor:
        from slidescan.ops.fused import fused

        ctx.save_for_backward(value, locations, weights)
        ctx.shapes, ctx.points = shapes, points
        return fused(value, shapes, locations, weights, points)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from slidescan.ops.fused import fused_backward

        refuse_second_derivative()
        value, locations, weights = ctx.saved_tensors
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        return *fused_backward(grad, value, ctx.shapes, locations, weights, ctx.points, needs), None, None


# The same as one node of a graph. Shapes travel flat, for a schema has no pairs.
_library: Any = torch.library.Library("slidescan", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "deform_attn(Tensor value, Tensor locations, Tensor weights, SymInt[] shapes, SymInt[] points, str backend) "
    "-> Tensor"
)
_library.define(
    "deform_attn_backward(Tensor grad, Tensor value, Tensor locations, Tensor weights, SymInt[] shapes, "
    "SymInt[] points, str backend) -> (Tensor, Tensor, Tensor)"
)


def _pairs(flat: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _node(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], points: list[int], backend: str
) -> Tensor:
    inputs = value, _pairs(shapes), locations, weights, points
    refuse_tangents(value, locations, weights)
    if not _runs_triton(backend, value):
        return bags(*inputs)
    from slidescan.ops.fused import fused

    return fused(*inputs)


def _node_backward(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], points: list[int], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = value, _pairs(shapes), locations, weights, points
    if _runs_triton(backend, value):
        from slidescan.ops.fused import fused_backward

        of_value, of_locations, of_weights = fused_backward(grad, *inputs, (True, True))
        assert of_value is not None  # all three were asked for
        assert of_locations is not None
        assert of_weights is not None
    else:
        of_value, of_locations, of_weights = gradients(grad, *inputs)
    # A graph is promised fresh contiguous tensors.
    return of_value.contiguous(), of_locations.contiguous(), of_weights.contiguous()


def _node_like(
    value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], points: list[int], backend: str
) -> Tensor:
    return value.new_empty((value.shape[0], locations.shape[1], value.shape[2] * value.shape[3]))


def _node_backward_like(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: list[int], points: list[int], backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    value, locations, weights, *ctx.rest = inputs
    ctx.save_for_backward(value, locations, weights)


def _node_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    if type(grad) is Tensor:  # and no tracer's: the gradient of what was found here would be zero, silently
        refuse_second_derivative()
    found = torch.ops.slidescan.deform_attn_backward(grad, *ctx.saved_tensors, *ctx.rest)
    return *found, None, None, None


_library.impl("deform_attn", _node, "CompositeExplicitAutograd")
_library.impl("deform_attn_backward", _node_backward, "CompositeExplicitAutograd")
torch.library.register_fake("slidescan::deform_attn", _node_like, lib=_library)
torch.library.register_fake("slidescan::deform_attn_backward", _node_backward_like, lib=_library)
torch.library.register_autograd("slidescan::deform_attn", _node_gradient, setup_context=_keep, lib=_library)


def _check(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, points: Sequence[int]
) -> None:
    length, n_points = sum(height * width for height, width in shapes), sum(points)
    n, heads = (value.shape[0], value.shape[2]) if value.ndim == 4 else (-1, -1)
    if (
        value.ndim != 4
        or locations.ndim != 5
        or len(shapes) != len(points)
        or value.shape[1] != length
        or locations.shape != (n, locations.shape[1], heads, n_points, 2)
        or weights.shape != locations.shape[:-1]
    ):
        raise ValueError(
            f"deform_attn: expected value (B, {length}, M, D), locations (B, Q, M, {n_points}, 2), weights "
            f"(B, Q, M, {n_points}) for shapes {list(shapes)} and points {list(points)}; got {tuple(value.shape)}, "
            f"{tuple(locations.shape)}, {tuple(weights.shape)}"
        )
    if not value.device == locations.device == weights.device:  # a kernel would read another GPU's addresses
        raise ValueError(
            f"deform_attn: expected value, locations and weights on one device, got {value.device}, "
            f"{locations.device}, {weights.device}"
        )
