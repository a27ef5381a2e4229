"""Whole detectors with the op in them and without; ``python pipelines/benchmark.py models`` prints the table.

What a user of `accelerate` gains: the op is a part of a model, small in some and large in others. Random weights, for
speed does not depend on them. Wall time with everything in it, host included; the variants of a model take turns, and a
row is a median. The score threshold, resizing and post-processing are no part of it.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.synchronize import Barrier, Lock
from threading import BrokenBarrierError
from typing import Any

import torch
import transformers as hf
from benchmark_ops import where
from torch import Tensor, nn

from slidescan.ops import accelerate

__all__ = ["bench_models"]

Calls = dict[str, Callable[[], Any]]

_PX = 640  # edge of an image
_OBJECTS = 16  # an image, in training
_COMPILED_S = 60  # for which a compiled model waits for the others, so that none compiles while one is measured


@dataclass(frozen=True)
class Model:
    """One detector: how it is made, and how many images it takes at once on a GPU; on a CPU it takes one."""

    name: str
    make: Callable[[bool], nn.Module]
    batch: int


def rt_detr_v2(smoke: bool) -> nn.Module:
    """RT-DETRv2 on a ResNet-18."""
    backbone = hf.RTDetrResNetConfig(
        embedding_size=64,
        hidden_sizes=[64, 128, 256, 512],
        depths=[1, 1, 1, 1] if smoke else [2, 2, 2, 2],
        layer_type="basic",
        out_indices=[2, 3, 4],
    )
    config = hf.RTDetrV2Config(
        backbone_config=backbone,
        encoder_in_channels=[128, 256, 512],
        hidden_expansion=0.5,
        decoder_layers=2 if smoke else 3,
        freeze_backbone_batch_norms=False,
    )
    return hf.RTDetrV2ForObjectDetection(config)  # type: ignore[no-any-return]


def d_fine(smoke: bool) -> nn.Module:
    """D-FINE-S: HGNetV2-B0, points [3, 6, 3]."""
    channels = [64, 256, 512, 1024]
    backbone = hf.HGNetV2Config(
        stem_channels=[3, 16, 16],
        stage_in_channels=[16, *channels[:-1]],
        stage_mid_channels=[16, 32, 64, 128],
        stage_out_channels=channels,
        stage_num_blocks=[1, 1, 2, 1],
        stage_downsample=[False, True, True, True],
        stage_light_block=[False, False, True, True],
        stage_kernel_size=[3, 3, 5, 5],
        stage_numb_of_layers=[3, 3, 3, 3],
        depths=[1, 1, 2, 1],
        hidden_sizes=channels,
        embedding_size=16,
        out_indices=[2, 3, 4],
    )
    config = hf.DFineConfig(
        backbone_config=backbone,
        encoder_in_channels=[256, 512, 1024],
        hidden_expansion=0.5,
        depth_mult=0.34,
        decoder_layers=2 if smoke else 3,
        decoder_n_points=[3, 6, 3],
        freeze_backbone_batch_norms=False,
    )
    return hf.DFineForObjectDetection(config)  # type: ignore[no-any-return]


def deformable_detr(smoke: bool) -> nn.Module:
    """Deformable DETR on a ResNet-50: in its encoder every pixel is a query."""
    layers = 2 if smoke else 6
    config = hf.DeformableDetrConfig(
        backbone_config=hf.ResNetConfig(out_indices=[2, 3, 4]), encoder_layers=layers, decoder_layers=layers
    )
    return hf.DeformableDetrForObjectDetection(config)  # type: ignore[no-any-return]


MODELS = (
    Model("RT-DETRv2-R18", rt_detr_v2, 16),
    Model("D-FINE-S", d_fine, 16),
    Model("Deformable-DETR-R50", deformable_detr, 4),
)


def bench_models(smoke: bool) -> str:
    """Print images and training steps a second of each model: as it is, accelerated, and both compiled."""
    cuda = torch.cuda.is_available()
    print(f"models: {where()}, float32" + (" with bfloat16 autocast" if cuda else ""))
    print("| model | variant | images/s | training steps/s |\n|---|---|---|---|", flush=True)
    if cuda and not smoke:
        # Compiling takes minutes and many cores: a process a model compiles, and they take turns on the GPU.
        context = multiprocessing.get_context("spawn")
        turns = context.Barrier(len(MODELS)), context.Lock()
        with ProcessPoolExecutor(len(MODELS), context, initializer=_take_turns, initargs=turns) as pool:
            for rows in pool.map(_gpu_rows, MODELS):
                print("\n".join(rows), flush=True)
    else:
        for model in MODELS[:1] if smoke else MODELS:
            px = 128 if smoke else _PX
            print("\n".join(_rows(model, 1, px, _variants(model, smoke, "cpu"), rounds=1 if smoke else 5)), flush=True)
    return "models: in brackets the ratio to transformers as it is, compiled where both are"


_turns: tuple[Barrier, Lock]  # of a process of its own: all are so far, and whose turn it is


def _take_turns(barrier: Barrier, lock: Lock) -> None:
    global _turns
    _turns = barrier, lock


def _gpu_rows(model: Model) -> list[str]:
    all_, measure = _turns
    try:
        variants = _variants(model, smoke=False, device="cuda")
        pixels, _ = _batch(model.batch, _PX, "cuda")
        with measure:  # and said before what may take too long
            print("\n".join(_rows(model, model.batch, _PX, variants, rounds=5)), flush=True)
        all_.wait()
        graphs = {f"{name}, compiled": torch.compile(network) for name, network in variants.items()}
        for graph in graphs.values():
            _infer(graph, pixels)
    except BaseException:
        traceback.print_exc()  # the others' broken barrier is what would be told
        all_.abort()  # or they would wait for it
        raise
    with suppress(BrokenBarrierError):  # one that compiles for ever takes no row from those that are ready
        all_.wait(_COMPILED_S)
    with measure:
        # In training transformers' matching of boxes breaks the graph wherever it is met.
        forward = _medians({name: partial(_infer, graph, pixels) for name, graph in graphs.items()}, rounds=9)
    first = forward["transformers, compiled"]
    told = {name: f"{model.batch / seconds:.2f} ({first / seconds:.2f}x)" for name, seconds in forward.items()}
    return [f"| {model.name}, B{model.batch}, {_PX} px | {name} | {images} | |" for name, images in told.items()]


def _rows(model: Model, batch: int, px: int, variants: dict[str, nn.Module], rounds: int) -> list[str]:
    pixels, labels = _batch(batch, px, next(variants["transformers"].parameters()).device)
    training: Calls = {name: partial(_step, network, pixels, labels) for name, network in variants.items()}
    inference: Calls = {name: partial(_infer, network, pixels) for name, network in variants.items()}
    steps, forward = _medians(training, rounds), _medians(inference, 2 * rounds - 1)
    rows = []
    for name, seconds in forward.items():
        step = f"{1 / steps[name]:.2f} ({steps['transformers'] / steps[name]:.2f}x)"
        images = f"{batch / seconds:.2f} ({forward['transformers'] / seconds:.2f}x)"
        rows.append(f"| {model.name}, B{batch}, {px} px | {name} | {images} | {step} |")
    return rows


def _batch(batch: int, px: int, device: str | torch.device) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """Return images and their boxes."""
    rng = torch.Generator().manual_seed(0)
    pixels = torch.rand(batch, 3, px, px, generator=rng).to(device)
    boxes = 0.1 + 0.8 * torch.rand(_OBJECTS, 4, generator=rng) * torch.tensor([1, 1, 0.2, 0.2])
    labels = {"class_labels": torch.zeros(_OBJECTS, dtype=torch.long, device=device), "boxes": boxes.to(device)}
    return pixels, [labels] * batch


def _variants(model: Model, smoke: bool, device: str) -> dict[str, nn.Module]:
    variants = {"transformers": _made(model, smoke, device), "accelerated": _made(model, smoke, device)}
    # On a GPU by the kernels or not at all: a fall-back is not what is measured.
    accelerate(variants["accelerated"], "triton" if device == "cuda" else "auto")
    return variants


def _made(model: Model, smoke: bool, device: str) -> nn.Module:
    torch.manual_seed(0)
    return model.make(smoke).to(device)


def _medians(calls: Calls, rounds: int) -> dict[str, float]:
    """Return the median seconds of each; the first round compiles and fills caches."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            _wait()
            started = time.perf_counter()
            call()
            _wait()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _infer(network: Any, pixels: Tensor) -> None:
    network.eval()
    with torch.inference_mode(), torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        network(pixel_values=pixels)


def _step(network: Any, pixels: Tensor, labels: list[dict[str, Tensor]]) -> None:
    network.train()
    network.zero_grad()
    with torch.autocast(pixels.device.type, torch.bfloat16, enabled=pixels.is_cuda):
        loss = network(pixel_values=pixels, labels=labels).loss
    loss.backward()
