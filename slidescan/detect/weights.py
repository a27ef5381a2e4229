"""A transformers model directory's weights: read in float32, written in half.

Hides transformers' loader and its chatter. Only safetensors are opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from slidescan.errors import ModelError, SlidescanError

__all__ = ["load_network", "save_network"]

_COUNTED = ".num_batches_tracked"


def load_network(path: Path) -> nn.Module:
    """Load the transformers model of a model directory, in float32.

    Raises
    ------
    ModelError
        If the weights are damaged or of another network.
    """
    from transformers import AutoModelForObjectDetection

    try:
        with _quiet():
            model, notes = AutoModelForObjectDetection.from_pretrained(
                path, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True,
                trust_remote_code=False, ignore_mismatched_sizes=True,  # they are told of below
            )  # fmt: skip
    except (SlidescanError, MemoryError):
        raise
    except Exception as exc:  # what a wrong configuration ends in is any error: its own, torch's, Python's
        # Of a backbone's package that is not installed the first line says it, the others how to install it.
        said = next(iter(str(exc).strip().splitlines()), type(exc).__name__)
        raise ModelError(f"{path.name}: cannot load the weights: {said}") from exc
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys")
    # Those of another shape come with both shapes.
    keys = [key if isinstance(key, str) else key[0] for kind in kinds for key in notes.get(kind, ())]
    # Steps that a batch norm has counted are in many published DETRs, and say nothing of its result.
    wrong = sorted(key for key in keys if not key.endswith(_COUNTED))
    if wrong:
        raise ModelError(
            f"{path.name}: expected model.safetensors to fit config.json; {len(wrong)} entries do not, such as "
            f"{wrong[0]}"
        )
    if getattr(model.config, "anchor_image_size", None) is not None:
        model.config.anchor_image_size = None  # anchors of one size of image, kept from when it was made
    return model  # type: ignore[no-any-return]


def save_network(model: nn.Module, path: Path) -> None:
    """Write config.json and model.safetensors, matrices and kernels in float16."""
    network: Any = model
    with _quiet():
        network.save_pretrained(path)
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    small = {key: t.half() if t.ndim > 1 and t.is_floating_point() else t for key, t in tensors.items()}
    file.unlink()  # save_pretrained's, which none but its owner may read
    file.write_bytes(safetensors.torch.save(small, {"format": "pt"}))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers from writing progress bars and load reports to the terminal: what is wrong is raised."""
    from transformers.utils import logging

    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
