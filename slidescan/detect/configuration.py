"""What a model directory's ``config.json`` says, judged before transformers reads it.

Hides which keys have transformers fetch, open or run what is not in the directory, and what no network has. Importing
this module does not import torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slidescan.detect.card import SHARDS, read_json, title
from slidescan.errors import ModelError

__all__ = ["read_configuration"]

# Of what is read of a config.json.
_KINDS = {
    "model_type": str,
    "architectures": list,
    "id2label": dict,
    "num_labels": int,
    "num_queries": int,
    "num_detection_tokens": int,
    "two_stage_num_proposals": int,
}
_COUNTS = ("num_queries", "num_detection_tokens", "two_stage_num_proposals")
_MOST_QUERIES = 10_000


def read_configuration(path: Path) -> dict[str, Any]:
    """Return what ``config.json`` says of a detector's network, once it is sure that it can serve.

    Raises
    ------
    ModelError
        If it is no detector of images alone, its weights are not in one file of safetensors, or it cannot be.
    """
    config = read_json(path / "config.json")
    for key, kind in _KINDS.items():
        if not isinstance(config.get(key), kind | None):
            raise ModelError(
                f"{title(path)}/config.json: expected {key} to be of type {kind.__name__}, got {config[key]!r}"
            )
    for key in _COUNTS:
        if config.get(key) is not None and not 0 < config[key] <= _MOST_QUERIES:
            raise ModelError(f"{title(path)}/config.json: expected {key} from 1 to {_MOST_QUERIES}, got {config[key]}")
    if strange := _strange(config):
        raise ModelError(
            f"{title(path)}/config.json: expected all that is run in this directory, got {strange}, which has "
            "transformers run something else; remove it"
        )
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if not any(kind.endswith("ForObjectDetection") for kind in kinds):
        raise ModelError(
            f"{title(path)}: expected an object-detection model of transformers in config.json, found "
            f"architectures {', '.join(kinds) or 'not named'}"
        )
    if "text_config" in config:
        raise ModelError(
            f"{title(path)}: expected a model that needs nothing but an image, found one of type "
            f"{config.get('model_type')}, which needs a text prompt, too; choose one without text_config in "
            "config.json"
        )
    if (path / SHARDS).is_file():
        raise ModelError(
            f"{title(path)}: expected all weights in model.safetensors, found them in several files; save the "
            "model again with a larger max_shard_size"
        )
    if not (path / "model.safetensors").is_file():
        raise ModelError(
            f"{title(path)}: expected model.safetensors beside config.json, found none; pickled weights are "
            "not read, convert them with safetensors"
        )
    return config


def _strange(config: dict[str, Any]) -> str:
    """Return the key of a configuration that has transformers take code, weights or parts from elsewhere, or ""."""
    for key, value in config.items():
        if key == "transformers_weights" and value is not None:
            return key
        if key in ("attn_implementation", "_attn_implementation") and value not in (None, "eager", "sdpa"):
            return key
        if key == "backbone" and isinstance(value, str) and ("/" in value or ":" in value):
            return key
        if key == "return_dict" and value is False:
            return key
        if isinstance(value, dict) and key not in ("id2label", "label2id") and (inside := _strange(value)):
            return f"{key}.{inside}"
    return ""
