"""The training loop: batches in, averaged weights out.

Hides optimiser, schedule, averaging and checkpoints. The loss is the model's own (transformers): optimal matching,
varifocal and box losses at each layer, denoising queries. The schedule follows steps or wall-clock time,
whichever is further, so that a run on a busy machine still ends its cosine. Batch `i` is drawn from a generator seeded
with (seed, i): a resumed run sees the images it would have seen.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slidescan.errors import ModelError
from slidescan.train.augment import Rgb
from slidescan.train.settings import TrainSettings, VariantSettings

__all__ = ["Batch", "pack", "train"]

Batch = tuple[NDArray[np.uint8], list[NDArray[np.float64]]]  # images (B, N, N, 3) and boxes (n, 4) cxcywh in [0, 1]


def train(
    network: nn.Module,
    batches: Callable[[np.random.Generator], Batch],
    settings: TrainSettings,
    variant: VariantSettings,
    *,
    checkpoint: Path,
    log: Callable[[str], None],
) -> nn.Module:
    """Train `network` in place and return the average of its weights.

    Parameters
    ----------
    network : nn.Module
        A transformers D-FINE, accelerated, its anchors set.
    batches : callable
        Draws one batch from a generator.
    settings, variant : TrainSettings, VariantSettings
    checkpoint : Path
        Written now and then; if it exists the run goes on from there.
    log : callable
        Takes one line.

    Raises
    ------
    ModelError
        If the loss stops being finite, or the checkpoint is of another network.
    """
    average = copy.deepcopy(network).eval()
    plain = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
    decayed = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": plain, "weight_decay": 0.0}],
        lr=variant.lr,
    )
    step, spent = _resume(checkpoint, network, average, optimiser)
    begun = time.monotonic() - spent
    network.train()
    losses: list[float] = []

    def draw(i: int) -> Batch:
        return batches(np.random.default_rng((settings.seed, i)))

    # One batch ahead: the network leaves cores idle between its operators.
    with ThreadPoolExecutor(1) as ahead:
        following = ahead.submit(draw, step)
        while (progress := _progress(step, time.monotonic() - begun, variant)) < 1.0:
            warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
            for group in optimiser.param_groups:
                group["lr"] = variant.lr * warm * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)
            images, boxes = following.result()
            following = ahead.submit(draw, step + 1)
            torch.manual_seed(settings.seed + step)  # denoising draws from torch's generator
            pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(255.0)
            labels = [
                {"class_labels": torch.zeros(len(b), dtype=torch.long), "boxes": torch.from_numpy(b).float()}
                for b in boxes
            ]
            loss: Tensor = network(pixel_values=pixels, labels=labels).loss
            if not torch.isfinite(loss):
                raise ModelError(f"training: the loss is {loss.item()} at step {step}; lower lr or use precision fp32")
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
            step += 1
            # The average must forget the random start first, then remember long.
            _average(average, network, min(settings.ema, (1 + step) / (10 + step)))
            losses.append(loss.item())
            if step % 25 == 0:
                spent = time.monotonic() - begun
                log(f"step {step} loss {np.mean(losses[-25:]):.3f} {spent / 60:.1f} min {progress:.1%}")
            if step % settings.checkpoint_steps == 0:
                _save(checkpoint, network, average, optimiser, step, time.monotonic() - begun)
    _save(checkpoint, network, average, optimiser, step, time.monotonic() - begun)
    return average


def _progress(step: int, seconds: float, variant: VariantSettings) -> float:
    by_step = step / variant.steps if variant.steps else 0.0
    by_time = seconds / 60 / variant.minutes if variant.minutes else 0.0
    return max(by_step, by_time) if variant.steps or variant.minutes else 1.0


@torch.no_grad()
def _average(average: nn.Module, network: nn.Module, keep: float) -> None:
    done: set[int] = set()  # tied weights are listed more than once
    for mean, now in zip(average.state_dict().values(), network.state_dict().values(), strict=True):
        if mean.data_ptr() in done:
            continue
        done.add(mean.data_ptr())
        if mean.is_floating_point():
            mean.lerp_(now.to(mean.dtype), 1 - keep)
        else:
            mean.copy_(now)


def _save(
    path: Path, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer, step: int, spent: float
) -> None:
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{k}": v for k, v in state.items()}
    # Tied weights share memory, which safetensors refuses; a checkpoint need not be small.
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    partial = path.with_suffix(".partial")
    safetensors.torch.save_file(tensors, partial, {"run": json.dumps({"step": step, "seconds": spent})})
    partial.replace(path)


def _resume(path: Path, network: nn.Module, average: nn.Module, optimiser: torch.optim.Optimizer) -> tuple[int, float]:
    """Load `path` if it is there; return steps done and seconds spent."""
    if not path.exists():
        return 0, 0.0
    try:
        with safetensors.safe_open(path, "pt") as file:
            run = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        for prefix, module in (("network.", network), ("average.", average)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError, OSError) as exc:
        raise ModelError(
            f"{path.name}: expected a checkpoint of this network; delete it to start anew ({exc})"
        ) from exc
    state: dict[int, dict[str, Any]] = {}
    for key, tensor in tensors.items():
        if key.startswith("optimiser."):
            _, index, name = key.split(".")
            state.setdefault(int(index), {})[name] = tensor
    optimiser.load_state_dict({**optimiser.state_dict(), "state": state})
    return int(run["step"]), float(run["seconds"])


def pack(samples: list[tuple[Rgb, NDArray[np.float64]]], object_px: list[float]) -> Batch:
    """Stack samples of one size; boxes are `object_px` wide around the centres and cut at the image's edge."""
    images = np.stack([image for image, _ in samples])
    size = images.shape[1]
    boxes = []
    for (_, centres), edge in zip(samples, object_px, strict=True):
        corners = np.concatenate((centres - edge / 2, centres + edge / 2), 1).clip(0, size) / size
        boxes.append(np.concatenate(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), 1))
    return images, boxes
