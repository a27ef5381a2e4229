"""The optimiser: which parameter is stepped how, and that a checkpoint holds all of it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from slidescan.train.optimiser import Optimiser


def network(layout: torch.memory_format) -> nn.Module:
    """Two convolutions, one of them by channel, and a head."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(16, 32, 3), nn.Conv2d(32, 32, 3, groups=32), nn.Flatten(), nn.Linear(32, 16))
    return nn.Sequential(*layers).to(memory_format=layout)


def steps(model: nn.Module, optimiser: Optimiser, seeds: range) -> list[np.ndarray]:
    """Step once a seed and return the parameters."""
    for seed in seeds:
        torch.manual_seed(seed)
        model(torch.randn(4, 16, 5, 5)).square().mean().backward()
        optimiser.step(1e-2)
    return [parameter.detach().numpy().copy() for parameter in model.parameters()]


def test_a_kernel_moves_as_far_in_every_direction() -> None:
    """Its step is orthogonal but for what the iteration leaves, and of the size of one of AdamW times two."""
    model = network(torch.channels_last)
    before, *_ = steps(model, Optimiser(model, 0.0), range(0))
    after, *_ = steps(model, Optimiser(model, 0.0), range(1))
    singular = np.linalg.svd((after - before).reshape(32, -1), compute_uv=False)
    expected = 2 * 1e-2 * 0.2 * np.sqrt(16 * 9)  # a matrix with such singular values has a root mean square of 0.2 lr
    assert singular.min() > 0.5 * expected
    assert singular.max() < 1.5 * expected


def test_all_else_takes_adamw() -> None:
    """Matrices, biases and kernels of one channel: its first step is the rate, nearly whatever the gradient."""
    model = network(torch.channels_last)
    before = steps(model, Optimiser(model, 0.0), range(0))
    after = steps(model, Optimiser(model, 0.0), range(1))
    for old, new in zip(before[1:], after[1:], strict=True):
        np.testing.assert_allclose(np.abs(new - old), 1e-2, rtol=0.05)


def test_the_layout_of_a_kernel_makes_no_difference() -> None:
    """Channels last or first, its own memory is stepped."""
    untrained = [parameter.detach().numpy() for parameter in network(torch.contiguous_format).parameters()]
    last, first = (network(layout) for layout in (torch.channels_last, torch.contiguous_format))
    two = [steps(model, Optimiser(model, 1e-2), range(3)) for model in (last, first)]
    for start, a, b in zip(untrained, *two, strict=True):
        assert np.linalg.norm(a - b) < 1e-4 * np.linalg.norm(a - start)  # sums in another order


@pytest.mark.parametrize("shape", [(24, 96), (96, 24)])
def test_kernels_step_as_with_pytorchs_own_muon(shape: tuple[int, int]) -> None:
    """But for its bfloat16, of 8 bits."""
    torch.manual_seed(0)
    theirs = nn.Parameter(torch.randn(shape))
    convolution = nn.Conv2d(shape[1], shape[0], 1, bias=False)
    with torch.no_grad():
        convolution.weight.copy_(theirs[..., None, None])
    start = theirs.detach().clone()
    ours = Optimiser(convolution, 1e-2)
    muon = torch.optim.Muon([theirs], lr=2e-2, weight_decay=1e-2, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(shape)
        theirs.grad, convolution.weight.grad = gradient.clone(), gradient[..., None, None].clone()
        muon.step()
        ours.step(1e-2)
    moved = convolution.weight[..., 0, 0] - start
    assert (moved - (theirs - start)).norm() < 0.02 * moved.norm()


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_what_was_loaded_goes_on_the_same(layout: torch.memory_format) -> None:
    """To the bit."""
    whole = network(layout)
    optimiser = Optimiser(whole, 1e-2)
    steps(whole, optimiser, range(3))
    resumed = network(layout)
    resumed.load_state_dict(whole.state_dict())
    other = Optimiser(resumed, 1e-2)
    other.load({key: value.clone(memory_format=torch.contiguous_format) for key, value in optimiser.tensors().items()})
    for a, b in zip(steps(whole, optimiser, range(3, 6)), steps(resumed, other, range(3, 6)), strict=True):
        np.testing.assert_array_equal(a, b)
