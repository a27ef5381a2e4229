"""Trainings of a few steps on crops that are made up."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from slidescan.train import run as training
from slidescan.train.run import train_detector
from slidescan.train.settings import load_settings

ROOT = Path(__file__).resolve().parents[2]


def run(fake_data: Path, out: Path, *, measured: bool = False, **changes: object) -> list[str]:
    """Train the smoke version of the shipped settings, of which 0.25 is finished, on one grid; return what was said.

    Only `measured` it is shown the test patients: a third of the time, which changes no weight.
    """
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    said: list[str] = []
    changes = {"data": fake_data, "shifts": 0, **changes}
    with nullcontext() if measured else unmeasured():
        train_detector(settings.model_copy(update=changes), out, said.append)
    return said


@contextmanager
def unmeasured() -> Iterator[None]:
    """Have nothing shown to what is trained at the end."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(training, "evaluate", lambda *_, **__: {})
        patched.setattr(training, "describe", lambda _: [])
        yield


def weights(path: Path) -> dict[str, NDArray[np.generic]]:
    """The weights of a model directory."""
    return safetensors.numpy.load_file(path / "model.safetensors")
