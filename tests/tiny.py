"""A small random network in a model directory, for tests of how models are loaded and run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from slidescan.detect.card import Card, write_model
from slidescan.train.network import build_network


def write_tiny(path: Path) -> Path:
    """Write a detector of cells and others at 0.5 µm/px, the same each time."""
    torch.manual_seed(0)
    card = Card("tiny", ("cell", "other"), 0.5, input_px=128, object_um=10.0, threshold=0.3, anchor_px=24.0)
    write_model(build_network(["cell", "other"], width=0.25, queries=12), card, path)
    return path


def noise(n: int, height: int, width: int) -> NDArray[np.uint8]:
    """Random tiles."""
    return np.random.default_rng(0).integers(0, 256, (n, height, width, 3), dtype=np.uint8)
