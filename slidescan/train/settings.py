"""The settings of a training run, as its YAML file has them; an unknown key is an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slidescan.errors import ConfigError

__all__ = ["TrainSettings", "VariantSettings", "load_settings"]

_Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class VariantSettings(_Strict):
    """One resolution of the detector, on which tiles and how long to train it."""

    mpp: Annotated[float, Field(gt=0)] = 0.25
    input_px: Annotated[int, Field(gt=0, multiple_of=32)] = 640
    tile_px: list[Annotated[int, Field(gt=0, multiple_of=32)]] = [256, 384, 384, 512, 768]
    steps: Annotated[int, Field(gt=0)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    start_mpp: float | None = None  # begin with the weights of this variant, trained before it


class TrainSettings(_Strict):
    """Everything a run depends on besides the data.

    Shares are of the training images; what they leave is realistic fields. Tile sizes are drawn with equal probability
    and batches hold `batch_mpx` million px whatever the size.

    Examples
    --------
    >>> TrainSettings().batch_mpx
    1.18
    """

    data: Path = Path("../shared/data")  # relative to the repository
    name: str = "mitosis"
    classes: list[str] = ["mitotic figure"]
    seed: int = 0
    threads: Annotated[int, Field(gt=0)] = 2
    precision: Annotated[str, Field(pattern="^(fp32|bf16)$")] = "bf16"
    width: Annotated[float, Field(gt=0)] = 1.0
    batch_mpx: Annotated[float, Field(gt=0)] = 1.18
    share_mosaic: _Share = 0.25
    share_bare: _Share = 0.04
    share_phantom: _Share = 0.06
    share_negative: _Share = 0.12  # tissue from elsewhere, where there is some
    figures_per_mpx: Annotated[float, Field(gt=0)] = 40.0
    stain_jitter: Annotated[float, Field(ge=0)] = 0.2
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    ema: _Share = 0.998
    checkpoint_steps: Annotated[int, Field(gt=0)] = 200
    crops: Annotated[int, Field(gt=0)] | None = None  # read only so many a split
    eval_images: Annotated[int, Field(gt=0)] = 48
    variants: list[VariantSettings] = [VariantSettings(minutes=30)]

    def smoke(self) -> TrainSettings:
        """Return the same run made so small that it ends within a minute and learns nothing."""
        tiny = {"width": 0.25, "batch_mpx": 0.07, "crops": 24, "eval_images": 2, "warmup_steps": 1}
        variants = [
            v.model_copy(update={"steps": 4, "minutes": None, "input_px": 256, "tile_px": [128]}) for v in self.variants
        ]
        return self.model_copy(update={**tiny, "precision": "fp32", "variants": variants})


def load_settings(path: Path) -> TrainSettings:
    """Read settings from a YAML file.

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, or a key is unknown or its value out of range.
    """
    try:
        table: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: expected a YAML file of training settings, {exc.strerror}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path}: expected YAML, got {exc}") from exc
    try:
        return TrainSettings.model_validate(table or {})
    except ValidationError as exc:
        first = exc.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {key}: {first['msg']}, got {first['input']!r}") from exc
