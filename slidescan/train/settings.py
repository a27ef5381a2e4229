"""The settings of a training run, as its YAML file has them; an unknown key is an error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from slidescan.detections import COLUMNS
from slidescan.errors import ConfigError
from slidescan.slides.resolution import MAX_MPP, MIN_MPP

__all__ = ["TrainSettings", "VariantSettings", "load_settings"]

_Share = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class VariantSettings(_Strict):
    """One resolution of the detector, on which tiles and how long to train it."""

    mpp: Annotated[float, Field(ge=MIN_MPP, le=MAX_MPP)] = 0.25
    input_px: Annotated[int, Field(ge=128, multiple_of=32)] = 640  # less is nothing beside its halo
    tile_px: Annotated[list[Annotated[int, Field(gt=0, multiple_of=32)]], Field(min_length=1)] = [256, 384, 512, 640]
    steps: Annotated[int, Field(gt=0)] | None = None
    minutes: Annotated[float, Field(gt=0)] | None = None
    lr: Annotated[float, Field(gt=0)] = 1e-3
    cycles: Annotated[int, Field(gt=0)] = 1  # so often lr begins anew (Loshchilov and Hutter 2017)
    start_mpp: float | None = None  # begin with the weights of this variant, trained before it
    start: str | None = None  # or with those of a model: a bundled name, or a directory
    mine_steps: Annotated[int, Field(gt=0)] = 400  # more of them with mined negatives, at a tenth of lr
    finish_steps: Annotated[int, Field(gt=0)] | None = None  # at last, on the validation data too, at a fifth of lr


class TrainSettings(_Strict):
    """Everything a run depends on besides the data.

    Shares are of the training images; what they leave is realistic fields. Tile sizes are drawn with equal probability
    and batches hold `batch_mpx` million px whatever the size. Figures per px, and all shares but those of mosaics,
    mined and decided windows, serve the crops that `mitosis` is trained on and nothing else.

    Examples
    --------
    >>> TrainSettings().batch_mpx
    0.8
    """

    data: Path = Path("data")  # see slidescan.train.run.open_source
    # Of annotated slides, overriding their own; of pictures that do not say theirs.
    slide_mpp: Annotated[float, Field(gt=0)] | None = None
    validation: Path | None = None  # data of its own; else a share of the patients of `data`
    validation_share: Annotated[float, Field(gt=0, lt=1)] = 0.2
    test: Path | None = None
    decisions: Path | None = None  # results that were reviewed: a scan's directory, or an archive's
    decision_slides: str | None = None  # their slide; of an archive its table, folder or pattern
    name: str = "mitosis"
    classes: Annotated[list[str], Field(min_length=1)] = ["mitotic figure"]
    attributes: list[str] = []
    skip: list[str] = []  # of your own data: classes, or what classes are derived by, that say nothing of objects
    crowds: Literal["ignored", "objects"] = "ignored"  # what COCO's iscrowd is; CVAT's masks are objects
    object_um: Annotated[float, Field(gt=0)] = 12.5  # edge of the box around an annotated point; of anchors, too
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: str | None = None  # None takes a GPU if there is one
    threads: Annotated[int, Field(gt=0)] | None = None  # None: as many as torch takes, OMP_NUM_THREADS if that is set
    precision: Annotated[str, Field(pattern="^(fp32|bf16)$")] = "fp32"
    width: Annotated[float, Field(gt=0)] = 1.0
    batch_mpx: Annotated[float, Field(gt=0)] = 0.8
    share_mosaic: _Share = 0.25
    share_bare: _Share = 0.04
    share_phantom: _Share = 0.06
    share_negative: _Share = 0.12  # tissue from elsewhere, where there is some
    share_mined: _Share = 0.2  # where there is some
    share_decided: _Share = 0.2  # around what reviewers accepted and rejected, where there is some
    figures_per_mpx: Annotated[float, Field(gt=0)] = 40.0
    stain_jitter: Annotated[float, Field(ge=0)] = 0.25
    schedule: Literal["cosine", "flat"] = "cosine"  # flat anneals in the last part only
    warmup_steps: Annotated[int, Field(ge=0)] = 100
    weight_decay: Annotated[float, Field(ge=0)] = 1e-4
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    ema: _Share = 0.998
    checkpoint_steps: Annotated[int, Field(gt=0)] = 200
    crops: Annotated[int, Field(gt=0)] | None = None  # read only so many a split
    eval_images: Annotated[int, Field(gt=0)] = 96  # of each composed kind
    shifts: Annotated[int, Field(ge=0)] = 8  # of the grid of tiles, to compare detections on
    variants: Annotated[list[VariantSettings], Field(min_length=1)] = [VariantSettings(minutes=30)]

    @model_validator(mode="after")
    def _check(self) -> TrainSettings:
        if any(variant.steps is None and variant.minutes is None for variant in self.variants):
            raise ValueError("expected steps or minutes for each of the variants, or nothing would be trained")
        names = [f"{variant.mpp:g}" for variant in self.variants]
        if len(set(names)) < len(names):
            raise ValueError(f"expected variants of different mpp, each has a directory of its own, got {names}")
        said = [*self.classes, *self.attributes]
        if len(set(said)) < len(said) or not all(name.strip() for name in said):
            raise ValueError(f"expected a name of its own for each class and attribute, got {said}")
        if len({*self.attributes, *COLUMNS}) < len(self.attributes) + len(COLUMNS):
            raise ValueError(f"expected each attribute once, and none of {', '.join(COLUMNS)}, got {self.attributes}")
        for variant in self.variants:
            if variant.start is not None and variant.start_mpp is not None:
                raise ValueError(f"expected start or start_mpp for {variant.mpp:g} µm/px, got both")
            if variant.start is not None and "width" in self.model_fields_set:
                raise ValueError("expected no width for a variant that starts with the weights of a model, got one")
        return self

    def smoke(self) -> TrainSettings:
        """Return the same run made so small that it ends within a minute and learns nothing."""
        tiny = {
            "threads": 1,  # so little work is slower on more
            "width": 0.25,
            "batch_mpx": 0.07,
            "crops": 24,
            "eval_images": 2,
            "warmup_steps": 1,
            "checkpoint_steps": 2,
            "shifts": 1,
        }
        small = {"steps": 4, "minutes": None, "input_px": 512, "tile_px": [128], "mine_steps": 2}
        variants = [v.model_copy(update={**small, "finish_steps": v.finish_steps and 4}) for v in self.variants]
        return self.model_copy(update={**tiny, "precision": "fp32", "variants": variants})


def load_settings(path: Path) -> TrainSettings:
    """Read settings from a YAML file; paths in it are taken from where the file is.

    Raises
    ------
    ConfigError
        If the file is missing or not YAML, or a key is unknown or its value out of range.
    """
    try:
        table: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"{path}: expected a YAML file of training settings, {exc.strerror}") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:  # ValueError: no such date, too long a number
        said = " ".join(str(exc).split())
        raise ConfigError(f"{path}: expected YAML, got {said}") from exc
    try:
        settings = TrainSettings.model_validate(table or {})
    except ValidationError as exc:
        first = exc.errors()[0]
        if not first["loc"]:  # of the settings as a whole
            raise ConfigError(f"{path}: {first['msg'].removeprefix('Value error, ')}") from exc
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            section: type[BaseModel] = VariantSettings if first["loc"][0] == "variants" else TrainSettings
            raise ConfigError(f"{path}: unknown key {key}; known there: {', '.join(section.model_fields)}") from exc
        raise ConfigError(f"{path}: {key}: {first['msg']}, got {first['input']!r}") from exc
    places: dict[str, Any] = {key: getattr(settings, key) for key in ("data", "validation", "test", "decisions")}
    changes = {key: path.parent / place for key, place in places.items() if place is not None}
    changes["variants"] = [
        variant.model_copy(update={"start": str(place)})
        if variant.start is not None and (place := path.parent / variant.start).is_dir()
        else variant
        for variant in settings.variants
    ]
    if settings.decision_slides is not None and "://" not in settings.decision_slides:
        changes["decision_slides"] = str(path.parent / settings.decision_slides)
    return settings.model_copy(update=changes)
