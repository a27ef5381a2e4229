"""What turns gradients into steps: Muon for the kernels of convolutions, AdamW for everything else.

Hides which parameter goes where, and what of it a checkpoint holds. Muon (Jordan 2024) makes the step of a matrix
orthogonal, so that what is rare in its gradient moves as far as what is common. The decoder's matrices are left to
AdamW: boxes are learned slower without. PyTorch's own Muon multiplies in bfloat16, which takes a CPU without
instructions for it forty times as long: two thirds of a training step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Optimiser"]

# Of AdamW's rate, besides the factor that makes steps of one size of both (Liu et al. 2025).
_KERNEL_LR = 2.0
# Of its momentum, and of the quintic whose iterates take singular values to about 1, so many times (Jordan 2024).
_MOMENTUM, _QUINTIC, _ITERATIONS = 0.95, (3.4445, -4.7750, 2.0315), 5
_RMS = 0.2  # of AdamW's steps, times the rate: an orthogonal step is made as long (Liu et al. 2025)
_LEAST = 16  # rows and columns: in a smaller matrix, or in one row a channel, there is nothing to make orthogonal


class Optimiser:
    """Steps the parameters of a network.

    Parameters
    ----------
    network : nn.Module
        On its device and in its layout: its kernels are stepped where they lie.
    weight_decay : float
        Of kernels and matrices; of no bias and no norm.

    Examples
    --------
    >>> convolution = nn.Conv2d(16, 16, 1)
    >>> optimiser = Optimiser(convolution, 1e-4)
    >>> convolution(torch.ones(1, 16, 1, 1)).sum().backward()
    >>> optimiser.step(lr=1e-3)
    >>> sorted(optimiser.tensors())
    ['adamw.0.exp_avg', 'adamw.0.exp_avg_sq', 'adamw.0.step', 'muon.0.momentum_buffer']
    """

    def __init__(self, network: nn.Module, weight_decay: float) -> None:
        self._kernels: list[tuple[nn.Parameter, nn.Parameter]] = []  # and the same memory as a matrix
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for parameter in network.parameters():
            if not parameter.requires_grad:
                continue
            if parameter.ndim == 4 and min(parameter.shape[:2]) >= _LEAST:
                self._kernels.append((parameter, nn.Parameter(_rows(parameter.detach(), parameter))))
            else:
                (decayed if parameter.ndim >= 2 else plain).append(parameter)
        groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}]
        # Fused is half the time of the step on a CPU.
        self._parts: dict[str, torch.optim.Optimizer] = {"adamw": torch.optim.AdamW(groups, fused=True)}
        if self._kernels:
            matrices = [matrix for _, matrix in self._kernels]
            self._parts["muon"] = _Muon(matrices, weight_decay)

    def step(self, lr: float) -> None:
        """Step by the gradients at hand, and forget them."""
        for kernel, matrix in self._kernels:
            matrix.grad = None if kernel.grad is None else _rows(kernel.grad, kernel)
            kernel.grad = None
        for name, part in self._parts.items():
            for group in part.param_groups:
                group["lr"] = lr * (_KERNEL_LR if name == "muon" else 1.0)
            part.step()
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint must hold to go on from here."""
        return {
            f"{name}.{index}.{key}": value
            for name, part in self._parts.items()
            for index, state in part.state_dict()["state"].items()
            for key, value in state.items()
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from what `tensors` returned."""
        for name, part in self._parts.items():
            state: dict[int, dict[str, Any]] = {}
            parameters = [parameter for group in part.param_groups for parameter in group["params"]]
            for path, value in tensors.items():
                owner, index, key = path.split(".")
                if owner == name:
                    # The fused step walks through parameter and state by memory: both must be laid out alike.
                    like = parameters[int(index)]
                    value = torch.empty_like(like).copy_(value) if value.shape == like.shape else value
                    state.setdefault(int(index), {})[key] = value
            part.load_state_dict({**part.state_dict(), "state": state})


class _Muon(torch.optim.Optimizer):
    """Steps matrices by their orthogonal momentum, computed in their own precision."""

    def __init__(self, matrices: Iterable[nn.Parameter], weight_decay: float) -> None:
        super().__init__(matrices, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]  # nobody passes one
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                momentum = state["momentum_buffer"].lerp_(matrix.grad, 1 - _MOMENTUM)
                step = _orthogonal(matrix.grad.lerp(momentum, _MOMENTUM))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(step, alpha=-group["lr"] * _RMS * math.sqrt(max(matrix.shape)))


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return about U Vᵀ of a matrix U S Vᵀ (Newton and Schulz)."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    a, b, c = _QUINTIC
    for _ in range(_ITERATIONS):
        gram = wide @ wide.T
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def _rows(tensor: Tensor, kernel: Tensor) -> Tensor:
    """Return a tensor of the kernel's shape with a row for each channel made, columns in the order of its memory.

    So the kernel itself is not copied; in which order columns come makes no difference to Muon.
    """
    return (tensor if kernel.is_contiguous() else tensor.permute(0, 2, 3, 1)).reshape(len(tensor), -1)
