"""Where a network computes, and in which precision: known from a model's type, without loading transformers."""

from __future__ import annotations

from typing import Literal

import torch

from slidescan.errors import ModelError

__all__ = ["Precision", "resolve"]

Precision = Literal["fp32", "bf16"]
# Models whose convolutions are apart from what computes coordinates, under names that `lower_precision` knows.
_BF16 = ("d_fine", "rt_detr", "rt_detr_v2")
_AMPERE = 8  # compute capability of the first GPUs with bfloat16


def resolve(name: str, kind: str, device: str | None, precision: str) -> tuple[str, Precision]:
    """Return the device and precision that None and "auto" stand for on this machine and a model of type `kind`.

    Raises
    ------
    ModelError
        If the device is not there, or such a model cannot run in bf16.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as exc:  # AssertionError: torch built without CUDA
        raise ModelError(f"{name}: expected a device of this machine, got {device}; use cpu") from exc
    if precision == "bf16" and kind not in _BF16:
        raise ModelError(f"{name}: expected precision fp32 for a model of type {kind}, got bf16")
    if precision == "auto":
        return device, "bf16" if kind in _BF16 and _has_bf16(torch.device(device)) else "fp32"
    return device, "bf16" if precision == "bf16" else "fp32"


def _has_bf16(device: torch.device) -> bool:
    """Return whether the device's convolutions are faster in bfloat16; older GPUs than Ampere compute it in others."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= _AMPERE
