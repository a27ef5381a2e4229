"""The training loop: batches in, averaged weights out.

Hides optimiser, schedule, averaging, checkpoints and the log. Batch `i` is drawn from a generator seeded by (seed, i)
and so is the denoising noise of step `i`: on a CPU a run that was killed and resumed ends with the very weights of one
that was not, if its length is given in steps; a GPU sums gradients in any order. A length in minutes follows the clock
instead, so that a run on a busy machine ends its schedule all the same.

transformers' loss is not used (see `slidescan.train.loss`). Backbone and encoder run in bfloat16 where asked; whatever
becomes a coordinate stays float32 (`slidescan.detect.network.lower_precision`).
"""

from __future__ import annotations

import copy
import csv
import json
import math
import textwrap
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import nn

from slidescan.commit import commit
from slidescan.errors import ConfigError, ModelError
from slidescan.heap import keep_freed
from slidescan.train.loss import Target, detection_loss
from slidescan.train.optimiser import Optimiser
from slidescan.train.settings import TrainSettings, VariantSettings

__all__ = ["Batch", "train"]

Batch = tuple[NDArray[np.uint8], list[Target]]  # images (B, N, N, 3) and what is in each

_FLOOR = 0.02  # of the learning rate, at the end: what is averaged last must still move
_FLAT = 0.6  # share of a flat schedule before it anneals
_LOG_STEPS = 25
_FEWEST_QUERIES = 20  # a tile, or all there are
_TERMS = ("class", "l1", "giou", "attribute", "noise", "dense")


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
        A transformers D-FINE, accelerated, its anchors set, on its device.
    batches : callable
        Draws one batch from a generator.
    settings, variant : TrainSettings, VariantSettings
    checkpoint : Path
        Written now and then; if it exists the run goes on from there. The log is beside it, ending in ``.csv``.
    log : callable
        Takes one line.

    Raises
    ------
    ModelError
        If the loss stops being finite, or the checkpoint is of another network.
    """
    keep_freed()
    average = copy.deepcopy(network).eval()
    optimiser = Optimiser(network, settings.weight_decay)
    step, spent = _resume(checkpoint, network, average, optimiser)
    if variant.steps is not None and step > variant.steps:
        raise ConfigError(f"steps: expected {step} or more, as trained, got {variant.steps}; give another directory")
    table = _Log(checkpoint.with_suffix(".csv"), step)
    begun = time.monotonic() - spent
    network.train()
    inner: Any = network.model  # without transformers' loss
    device = next(network.parameters()).device
    queries = inner.config.num_queries
    losses: list[dict[str, float]] = []

    def draw(i: int) -> Batch:
        return batches(np.random.default_rng((settings.seed, i)))

    drawn = _drawn(draw, step, ahead=device.type != "cpu")
    while (progress := _progress(step, time.monotonic() - begun, variant)) < 1.0:
        warm = min(1.0, (step + 1) / max(1, settings.warmup_steps))
        lr = variant.lr * warm * _share(progress * variant.cycles % 1, settings.schedule)
        images, targets = next(drawn)
        torch.manual_seed(settings.seed + step)  # denoising draws from torch's generator
        pixels = torch.from_numpy(images).to(device).permute(0, 3, 1, 2).float().div_(255.0)
        targets = [target.to(device) for target in targets]
        labels = [{"class_labels": target.labels, "boxes": target.boxes} for target in targets]
        shapes = [(images.shape[1] // stride, images.shape[2] // stride) for stride in inner.config.feat_strides]
        # As many queries a px on small tiles as on the largest: a batch of many would be little but decoder.
        share = images.shape[1] * images.shape[2] / max(variant.tile_px) ** 2
        most = min(queries, sum(height * width for height, width in shapes))
        inner.config.num_queries = min(most, max(_FEWEST_QUERIES, round(queries * share)))
        terms = detection_loss(inner(pixels, labels=labels), targets, shapes)
        loss = sum(terms.values(), torch.zeros((), device=device))
        if not torch.isfinite(loss):
            raise ModelError(f"training: the loss is {loss.item()} at step {step}; lower lr or use precision fp32")
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(network.parameters(), settings.clip_norm)
        optimiser.step(lr)
        step += 1
        # The average must forget the random start first, then remember long.
        _average(average, network, min(settings.ema, (1 + step) / (10 + step)))
        losses.append({name: terms[name].item() for name in _TERMS})
        if step % _LOG_STEPS == 0 or step == variant.steps:
            spent = time.monotonic() - begun
            means = {name: float(np.mean([row[name] for row in losses])) for name in _TERMS}
            losses.clear()
            table.add(step, spent / 60, lr, means)
            done = _progress(step, spent, variant)
            parts = ", ".join(f"{name} {mean:.2f}" for name, mean in means.items())
            left = f"{spent / 60:.1f} min, {spent / 60 * (1 - done) / done:.1f} min left"
            log(f"step {step} ({done:.0%}, {left}): loss {sum(means.values()):.2f} ({parts})")
        if step % settings.checkpoint_steps == 0:
            _save(checkpoint, network, average, optimiser, step, time.monotonic() - begun)
    _save(checkpoint, network, average, optimiser, step, time.monotonic() - begun)
    return average


def _drawn(draw: Callable[[int], Batch], step: int, *, ahead: bool) -> Iterator[Batch]:
    """Yield the batches from `step` on; with `ahead`, the next one is drawn while one is trained on.

    On a CPU that is slower (0.67 to 0.57 s a step on 2 cores): the network waits for the core that draws.
    """
    if not ahead:
        yield from map(draw, count(step))
        return
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(draw, step)
        for i in count(step + 1):
            batch, following = following.result(), pool.submit(draw, i)
            yield batch


class _Log:
    """The losses as CSV; rows after the checkpoint that a run goes on from are dropped, for they come again."""

    def __init__(self, path: Path, step: int) -> None:
        self._path = path
        kept = []
        if step and path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                kept = [row for row in csv.reader(file) if row and row[0].isdigit() and int(row[0]) <= step]
        with path.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([["step", "minutes", "lr", "loss", *_TERMS], *kept])

    def add(self, step: int, minutes: float, lr: float, means: dict[str, float]) -> None:
        row = [f"{minutes:.2f}", f"{lr:.3g}", *(f"{mean:.4f}" for mean in (sum(means.values()), *means.values()))]
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow([step, *row])


def _progress(step: int, seconds: float, variant: VariantSettings) -> float:
    by_step = step / variant.steps if variant.steps else 0.0
    by_time = seconds / 60 / variant.minutes if variant.minutes else 0.0
    return max(by_step, by_time) if variant.steps or variant.minutes else 1.0


def _share(progress: float, schedule: str) -> float:
    """Return what of the learning rate is left after `progress` of a cycle."""
    if schedule == "flat":
        progress = max(0.0, (progress - _FLAT) / (1 - _FLAT))
    return _FLOOR + (1 - _FLOOR) * (1 + math.cos(math.pi * progress)) / 2


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


def _save(path: Path, network: nn.Module, average: nn.Module, optimiser: Optimiser, step: int, spent: float) -> None:
    tensors = {f"network.{k}": v for k, v in network.state_dict().items()}
    tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    tensors |= {f"optimiser.{k}": v for k, v in optimiser.tensors().items()}
    # Tied weights share memory, which safetensors refuses; a checkpoint need not be small.
    tensors = {k: v.detach().clone().contiguous() for k, v in tensors.items()}
    data = safetensors.torch.save(tensors, {"run": json.dumps({"step": step, "seconds": spent})})
    commit(path, lambda partial: partial.write_bytes(data))


def _resume(path: Path, network: nn.Module, average: nn.Module, optimiser: Optimiser) -> tuple[int, float]:
    """Load `path` if it is there; return steps done and seconds spent."""
    if not path.exists():
        return 0, 0.0
    try:
        with safetensors.safe_open(path, "pt") as file:
            run = json.loads(file.metadata()["run"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  not a dict
        parts = {
            owner: {k.removeprefix(owner): v for k, v in tensors.items() if k.startswith(owner)}
            for owner in ("network.", "average.", "optimiser.")
        }
        network.load_state_dict(parts["network."])
        average.load_state_dict(parts["average."])
        optimiser.load(parts["optimiser."])
    except (safetensors.SafetensorError, RuntimeError, LookupError, TypeError, ValueError, OSError) as exc:
        why = textwrap.shorten(str(exc), 200)  # torch's lists every weight
        raise ModelError(
            f"{path.name}: expected a checkpoint of this network; delete it to start anew ({why})"
        ) from exc
    return int(run["step"]), float(run["seconds"])
