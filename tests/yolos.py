"""Random networks of ultralytics, the files that a training leaves of them, and the mark of what needs the package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from slidescan.detect import convert_yolo
from slidescan.detect.yolo import import_ultralytics
from tests.families import picture

NEEDS_ULTRALYTICS = pytest.mark.skipif(
    importlib.util.find_spec("ultralytics") is None,
    reason="ultralytics is not installed: the optional extra is AGPL-3.0 and not part of the test extra",
)
END2END = ["yolo26n.yaml", "yolov10n.yaml", "yolo26n-p6.yaml"]


def trained(description: str = "yolo26n.yaml") -> Any:
    """A random network of two classes, in float16 as a training leaves it, whose scores and boxes differ."""
    torch.manual_seed(0)
    network = import_ultralytics().DetectionModel(description, nc=2, verbose=False)
    network.names = {0: "cell", 1: "other"}
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
        elif isinstance(module, nn.Conv2d) and module.bias is not None:  # the last ones of the head
            nn.init.normal_(module.weight, std=module.in_channels**-0.5)
            if module.out_channels == 2:
                nn.init.constant_(module.bias, -2.0)
    image = torch.from_numpy(picture(256, 320)).permute(2, 0, 1)[None] / 255
    with torch.no_grad():
        network.train()(torch.cat((image, 0.8 * image.flip(-1))))
    return network.eval().half()


def checkpoint(network: Any, path: Path, **more: Any) -> Path:
    """Write what a training leaves."""
    torch.save({"epoch": -1, "model": network, "ema": None, "train_args": {"imgsz": 250}} | more, path)
    return path


def converted(folder: Path, description: str = "yolo26n.yaml") -> Path:
    """A model directory from such a checkpoint, for 0.25 µm/px."""
    return convert_yolo(checkpoint(trained(description), folder / "best.pt"), folder / "tiny", mpp=0.25).path


class Bomb:
    """What a pickle can do: it makes a directory when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.path),)
