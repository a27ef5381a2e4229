"""What a training run was begun with: what has checkpoints goes on with the same, or not at all.

Else calibration and threshold, which follow anew each time, could come of patients that were trained on, and a loss
would go on under another rate than it began with. A run may be made longer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from slidescan.commit import commit
from slidescan.errors import ConfigError
from slidescan.train.annotated import Annotated
from slidescan.train.settings import TrainSettings, VariantSettings

__all__ = ["digest_of", "keep_begun"]

_KEPT = "begun.json"
# What a run may go on under: where things are, what they are called, what is measured when all is trained, and for how
# long each stage goes on. Of data and decisions counts what is in them.
_FREE = {
    *("data", "validation", "test", "decisions", "decision_slides", "name", "variants"),
    *("device", "threads", "checkpoint_steps", "eval_images", "shifts"),
}
_FREE_OF_VARIANT = {"input_px", "steps", "minutes", "mine_steps", "finish_steps"}


def keep_begun(settings: TrainSettings, variant: VariantSettings, data: str, out: Path) -> None:
    """Write into a run's directory what a variant is begun with; refuse another where it has a checkpoint.

    ``begun.json`` holds settings and a digest; nobody's name, and no path but that of a model to start from.

    Parameters
    ----------
    settings, variant : TrainSettings, VariantSettings
    data : str
        Digest of what is trained on and chosen by.
    out : Path

    Raises
    ------
    ConfigError
        If the variant was begun with other data or settings.
    """
    name, file = f"{variant.mpp:g}", out / _KEPT
    told = settings.model_dump(mode="json", exclude=_FREE)
    now: dict[str, Any] = told | variant.model_dump(mode="json", exclude=_FREE_OF_VARIANT) | {"data": data}
    try:
        kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as exc:
        raise ConfigError(f"{file}: cannot be read ({type(exc).__name__}); delete it if nothing else changed") from exc
    if name in kept and (out / f"losses-{name}.safetensors").is_file():
        before = kept[name]
        for key in sorted({*now, *before}, key=lambda key: key != "data"):
            if before.get(key) == now.get(key):
                continue
            what = (
                "the slides, patients and annotations it was begun with, got others"
                if key == "data"
                else f"{before.get(key)}, as it was begun with, got {now.get(key)}"
            )
            raise ConfigError(f"{out}: {key}: expected {what}; give another output directory")
    if kept.get(name) != now:
        text = json.dumps({**kept, name: now}, indent=1) + "\n"
        commit(file, lambda partial: partial.write_text(text, encoding="utf-8"))


def digest_of(annotated: Iterable[Annotated]) -> str:
    """Return a digest of slides, their µm/px, patients and annotations; in any order, wherever they lie."""
    told = []
    for one in annotated:
        whose = [one.slide.fingerprint, one.slide.path.name, one.patient, one.slide.mpp]
        digest = hashlib.sha256(json.dumps(whose).encode())
        for column in (one.xyxy_l0, one.label, one.attributes, one.ignored_xyxy_l0):
            digest.update(repr(column.shape).encode() + np.ascontiguousarray(column).tobytes())
        told.append(digest.hexdigest())
    return hashlib.sha256("".join(sorted(told)).encode()).hexdigest()
