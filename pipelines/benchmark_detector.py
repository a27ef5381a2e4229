"""How fast the bundled detector is against a common one: px per second on a CPU, in one run.

RT-DETRv2-R18 as transformers runs it (eager, float32, 640 px, random weights: speed does not depend on them)
against `mitosis` at several tile sizes and precisions, contenders by turns.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from benchmark_models import rt_detr_v2

from slidescan.detect import load_detector

__all__ = ["bench_detector"]

_PEER_PX, _TILES_PX, _SMOKE_PX = 640, (640, 1024, 2048), 256


def bench_detector(smoke: bool) -> str:
    """Return a table of medians in million px per second."""
    peer: Any = rt_detr_v2(smoke).eval()
    runs: list[tuple[str, int, Callable[[], Any]]] = []

    peer_px = _SMOKE_PX if smoke else _PEER_PX
    pixels = torch.rand(1, 3, peer_px, peer_px)

    def run_peer() -> Any:
        with torch.inference_mode():
            return peer(pixel_values=pixels)

    runs.append(("RT-DETRv2-R18, transformers, fp32", peer_px, run_peer))
    rng = np.random.default_rng(0)
    for precision in ("fp32", "bf16"):
        model = load_detector("mitosis", device="cpu", precision=precision).at(0.25)
        for edge in (_SMOKE_PX,) if smoke else _TILES_PX:
            tile = rng.integers(0, 256, (1, edge, edge, 3), np.uint8)
            runs.append((f"{model.name}, {precision}", edge, partial(model.detect, tile, 0.3)))
    seconds: dict[int, list[float]] = {i: [] for i in range(len(runs))}
    for _ in range(2 if smoke else 9):
        for i, (_, _, run) in enumerate(runs):
            run()
            started = time.perf_counter()
            run()
            seconds[i].append(time.perf_counter() - started)
    rates = [edge**2 / 1e6 / float(np.median(seconds[i])) for i, (_, edge, _) in enumerate(runs)]
    lines = [
        f"detector: CPU, {torch.get_num_threads()} threads, medians by turns; as many times RT-DETRv2-R18's px/s",
        "| | tile px | px/s, RT-DETRv2-R18 = 1 |",
        "|---|---|---|",
    ]
    lines += [
        f"| {name} | {edge} | {rate / rates[0]:.1f}x |" for (name, edge, _), rate in zip(runs, rates, strict=True)
    ]
    return "\n".join(lines)
