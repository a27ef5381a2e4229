"""`accelerate`: transformers models with our op in the place of theirs.

Hides the three ways in which transformers calls the op. Only instances are changed, never a class or a module of
transformers: other models in the process stay as they are, and so do weights and names of parameters. Save an
accelerated model by its state_dict and accelerate the loaded one: classes made here cannot be pickled.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from typing import Any, get_args

import torch
from torch import Tensor, nn

from slidescan.errors import ModelError
from slidescan.ops.deform_attn import Backend, deform_attn

__all__ = ["accelerate"]

_UNTOUCHED = "_slidescan_untouched"  # of a kind of module with our op: transformers' own


def accelerate(model: nn.Module, backend: Backend = "auto") -> int:
    """Make the deformable attention of a transformers model use `deform_attn`; return how many modules it is in.

    Weights stay the same, outputs to round-off. Works for Deformable DETR, RT-DETR, RT-DETRv2, D-FINE, DEIMv2, LW-DETR,
    RF-DETR, Grounding DINO, OmDet-Turbo, Mask2Former, OneFormer and whatever else calls the op as they do. Calling it
    again changes nothing more, except the backend.

    Parameters
    ----------
    model : nn.Module
    backend : {"auto", "triton", "torch", "reference"}
        As of `deform_attn`.

    Raises
    ------
    ModelError
        If it is no model, or has no deformable attention of these kinds: it would silently stay as slow as it is; or if
        there is no such backend.

    Examples
    --------
    >>> import torch
    >>> accelerate(torch.nn.Linear(2, 2))
    Traceback (most recent call last):
    ...
    slidescan.errors.ModelError: Linear: expected a transformers model with deformable attention, found none to replace
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"model: expected a loaded transformers model, got {type(model).__name__}; load it first")
    if backend not in get_args(Backend):
        raise ModelError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    changed = sum(_swap(module, backend) for module in model.modules())
    if changed == 0:
        raise ModelError(
            f"{type(model).__name__}: expected a transformers model with deformable attention, found none to replace"
        )
    return changed


def _swap(module: Any, backend: Backend) -> bool:
    """Put the op into one module, if it calls transformers' own."""
    if hasattr(module, "ms_deformable_attn_core"):
        module.ms_deformable_attn_core = _with_points(backend)
        return True
    kind = type(module)
    untouched: type[nn.Module] = vars(kind).get(_UNTOUCHED, kind)
    ours = _with_our_op(untouched, backend)  # type: ignore[arg-type]  # a class can be hashed
    if ours is None:
        return False
    # A method of the instance would be bound to it, and replicas on other GPUs would compute with its weights.
    module.__class__ = ours
    if "forward" in vars(module):  # another library's, around the forward of before
        module.forward = types.MethodType(ours.forward, module)
    return True


@cache
def _with_our_op(kind: type[nn.Module], backend: Backend) -> type[nn.Module] | None:
    """Return a kind of module that calls our op where `kind` calls transformers'; None where it does not."""
    forward: Any = kind.forward
    own: Callable[..., Tensor]
    if kind.__name__ == "MultiScaleDeformableAttention" and "sampling_locations" in _parameters(forward):
        own = _as_module(backend)
    else:
        replacements: dict[str, Callable[..., Tensor]] = {
            "multi_scale_deformable_attention_v2": _with_points(backend),
            "multi_scale_deformable_attention": _without_points(backend),
        }
        called = replacements.keys() & set(getattr(getattr(forward, "__code__", None), "co_names", ()))
        called &= set(getattr(forward, "__globals__", ()))
        if not called:
            return None
        # The same code, looking the op up elsewhere. torch.compile reuses what it compiled wherever it meets the same
        # code object, hence the copy, and would look the op up in the module of `__name__`.
        scope = {**forward.__globals__, **{name: replacements[name] for name in called}}
        scope.pop("__name__", None)
        copied = types.FunctionType(
            forward.__code__.replace(), scope, forward.__name__, forward.__defaults__, forward.__closure__
        )
        copied.__kwdefaults__ = forward.__kwdefaults__
        own = copied
    members = {"forward": own, "__module__": kind.__module__, "__qualname__": kind.__qualname__, _UNTOUCHED: kind}
    return type(kind.__name__, (kind,), members)


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _as_module(backend: Backend) -> Callable[..., Tensor]:
    """Return the op as RT-DETR, Deformable DETR and Grounding DINO call it: a sub-module."""

    def forward(
        _: nn.Module,
        value: Tensor,
        value_spatial_shapes: Tensor,
        value_spatial_shapes_list: Sequence[tuple[int, int]],
        level_start_index: Tensor,
        sampling_locations: Tensor,
        attention_weights: Tensor,
        im2col_step: int = 64,
    ) -> Tensor:
        return _rectangular(value, value_spatial_shapes_list, sampling_locations, attention_weights, backend)

    return forward


def _without_points(backend: Backend) -> Callable[..., Tensor]:
    """Return the op as Mask2Former and OneFormer call it: a function with as many points on each level."""

    def attend(value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        return _rectangular(value, shapes, locations, weights, backend)

    return attend


def _rectangular(
    value: Tensor, shapes: Sequence[tuple[int, int]], locations: Tensor, weights: Tensor, backend: Backend
) -> Tensor:
    """Levels and points as two axes: (B, Q, M, L, K, 2)."""
    points = [locations.shape[4]] * len(shapes)
    return deform_attn(value, shapes, locations.flatten(3, 4), weights.flatten(3), points, backend=backend)


def _with_points(backend: Backend) -> Callable[..., Tensor]:
    """Return the op as RT-DETRv2, D-FINE and DEIMv2 call it: points of all levels in one axis."""

    def attend(
        value: Tensor,
        shapes: Sequence[tuple[int, int]],
        locations: Tensor,
        weights: Tensor,
        points: Sequence[int],
        method: str = "default",
    ) -> Tensor:
        if method == "discrete":
            locations = _nearest(locations, shapes, points)
        return deform_attn(value, shapes, locations, weights, points, backend=backend)

    return attend


@lru_cache(maxsize=64)  # tile sizes in use, a few
def _sizes(shapes: tuple[tuple[int, int], ...], points: tuple[int, ...], device: torch.device) -> Tensor:
    """Return width and height of each point's level (K, 2); made once, for a copy to a GPU stops a CUDA graph."""
    rows = [[width, height] for (height, width), count in zip(shapes, points, strict=True) for _ in range(count)]
    return torch.tensor(rows, device=device)


def _nearest(locations: Tensor, shapes: Sequence[tuple[int, int]], points: Sequence[int]) -> Tensor:
    """Move each location to the centre of the pixel that RT-DETRv2's ``discrete`` method reads; no gradient."""
    told = tuple((int(height), int(width)) for height, width in shapes), tuple(points), locations.device
    is_eager = type(locations) is Tensor and not torch.compiler.is_compiling()
    sizes = _sizes(*told) if is_eager else _sizes.__wrapped__(*told)
    place = locations.detach().to(torch.promote_types(locations.dtype, torch.float32))
    pixel = (place * sizes + 0.5).to(torch.int64)  # truncates, as transformers does
    return (pixel.clamp(min=torch.zeros_like(sizes), max=sizes - 1).to(place.dtype) + 0.5) / sizes
