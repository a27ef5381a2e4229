"""`ScanConfig`: every setting of a scan, typed, with its default, unit and reason in one place.

A YAML file may only override; an unknown key is an error that names it. ``configs/default.yaml`` equals these
defaults (tested).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from slidescan.errors import ConfigError

__all__ = ["DetectConfig", "FlaggedConfig", "MapConfig", "ScanConfig", "StitchConfig", "TilingConfig", "TissueConfig"]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse YAML's `yes`, which would be 1, where it is no setting to be on or off."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("expected something else than yes or no")
        return value


class TissueConfig(_Section):
    """Where to look."""

    enabled: bool = True
    """False scans the whole slide, glass included."""
    thumbnail_px: Annotated[int, Field(ge=256, le=16384)] = 4096
    """Longer side of the thumbnail the mask is computed on, px: 10 µm or finer on a slide of 40 mm."""


def _on_strides(shift_px: tuple[int, int]) -> tuple[int, int]:
    """Round to the coarsest stride of the models here."""
    x, y = (32 * round(px / 32) for px in shift_px)
    return x, y


class TilingConfig(_Section):
    """How the slide is cut."""

    tile_px: Annotated[int, Field(ge=128, le=8192)] | None = None
    """Tile edge the detector is fed, px of the model's plane; default: the detector's own choice."""
    region_px: Annotated[int, Field(ge=256, le=65536)] = 4096
    """Edge of a region, px of the model's plane: the unit of reading, committing and retrying (50 MB of RGB)."""
    halo_um: Positive | None = None
    """Margin a tile sees beyond the core it owns, µm; default: what the detector says it needs, a sixth of the tile
    at most, and no less than its object size plus 1 % of the tile, where DETR-type models have no anchors."""
    shift_px: Annotated[tuple[int, int], AfterValidator(_on_strides)] = (0, 0)
    """Shift of the tile grid, px of the model's plane, rounded to 32 px: the result must not depend on it, and would
    where a network's strides lay differently on the tissue."""


def _one_or_more(classes: Any) -> Any:
    """Take a name for a list of one."""
    if not isinstance(classes, str | list | tuple | None):
        raise ValueError("expected the name of a class, or a list of them")
    return (classes,) if isinstance(classes, str) else classes


class DetectConfig(_Section):
    """How tiles are scored."""

    min_score: Annotated[float, Field(gt=0, le=1)] = 0.05
    """Detections below it are not kept at all; the operating threshold is the model's and applies later."""
    batch_tiles: Annotated[int, Field(ge=1, le=256)] = 8
    """Tiles scored together."""
    classes: Annotated[tuple[str, ...], BeforeValidator(_one_or_more), Field(min_length=1)] | None = None
    """Classes that are kept, by name; default: all of the detector's. What it finds of others, such as look-alikes that
    it was taught as a class of their own, is in no map, no region and no count."""
    threshold: Fraction | None = None
    """Score at which a detection counts as found; default: the detector's own operating point."""


class StitchConfig(_Section):
    """How detections of neighbouring tiles become one set."""

    slack_um: Positive | None = None
    """Must exceed the jitter of a detection's centre between two tiles, µm; default: 3 µm, a quarter of a mitotic
    figure, and of larger objects as large a share, or 2 px of the model's plane where that is more."""
    iou: Fraction = 0.3
    """Boxes of different tiles at a seam that overlap more than this are one object."""


class MapConfig(_Section):
    """The anomaly map."""

    um_per_px: Annotated[float, Field(gt=0, le=256)] = 16.0
    """µm per map pixel: about one mitotic figure. Of larger ones than 256 µm a biopsy would have none."""
    density_sigma_um: Annotated[float, Field(gt=0, le=10_000)] = 200.0
    """Gaussian over which the density per mm² is averaged, µm: about one high-power field (0.24 mm²)."""


class FlaggedConfig(_Section):
    """Flagged regions and the mitotic hotspot."""

    link_um: Positive = 100.0
    """Detections nearer than this belong to one region, µm."""
    max_um: Positive = 1000.0
    """A region wider than this is cut in two, µm: what fits on a screen at 10x."""
    margin_um: Positive = 15.0
    """Rim drawn around a region's detections, µm."""
    hotspot_mm2: Positive = 2.0
    """Area in which mitotic figures are counted (10 high-power fields; WHO Classification of Tumours, 5th edition)."""


class ScanConfig(_Section):
    """All settings of one scan.

    Examples
    --------
    >>> ScanConfig().map.um_per_px
    16.0
    >>> ScanConfig.load({"map": {"um_per_pixel": 8}})
    Traceback (most recent call last):
    slidescan.errors.ConfigError: config: unknown key map.um_per_pixel; known there: um_per_px, density_sigma_um
    """

    tissue: TissueConfig = TissueConfig()
    tiling: TilingConfig = TilingConfig()
    detect: DetectConfig = DetectConfig()
    stitch: StitchConfig = StitchConfig()
    map: MapConfig = MapConfig()
    flagged: FlaggedConfig = FlaggedConfig()
    color: Literal["raw", "srgb"] | None = None
    """`raw` scanner RGB or `srgb` by the slide's ICC profile; default: what the detector was trained on."""

    @classmethod
    def load(cls, source: Path | str | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> ScanConfig:
        """Read a YAML file (or mapping) and apply ``{"section.key": value}`` overrides.

        Raises
        ------
        ConfigError
            If the file cannot be read, or a key is unknown or out of range; the message names it.
        """
        name = "config"
        if isinstance(source, Mapping):
            values: Any = {k: dict(v) if isinstance(v, Mapping) else v for k, v in source.items()}
        else:
            name = str(source)
            try:
                values = yaml.safe_load(Path(source).read_text(encoding="utf-8")) or {}
            except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError) as exc:
                raise ConfigError(f"{name}: expected a YAML file of settings; {exc}") from exc
        if not isinstance(values, dict):
            raise ConfigError(f"{name}: expected sections such as `tiling:`, got {type(values).__name__}")
        # A section under which everything is commented out has its defaults.
        values = {key: {} if value is None and key != "color" else value for key, value in values.items()}
        for dotted, value in (overrides or {}).items():
            section, _, key = dotted.rpartition(".")
            target = values.setdefault(section, {}) if section else values
            if not isinstance(target, dict):
                raise ConfigError(f"{name}: {section} must be a section, got {target!r}")
            target[key] = value
        try:
            return cls.model_validate(values)
        except ValidationError as exc:
            raise ConfigError(f"{name}: {_first_problem(exc)}") from exc

    def dump(self) -> str:
        """Return the settings as YAML."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def checked(config: ScanConfig | None) -> ScanConfig:
    """Return the settings, the defaults for None.

    Raises
    ------
    ConfigError
        If it is something else, such as a mapping or the path of a file.
    """
    if config is None:
        return ScanConfig()
    if not isinstance(config, ScanConfig):
        raise ConfigError(
            f"config: expected a ScanConfig, got {type(config).__name__}; ScanConfig.load makes one of a file, a "
            "mapping, or both"
        )
    return config


def _first_problem(exc: ValidationError) -> str:
    """Say the first validation failure in the words of a person who edits YAML."""
    problem = exc.errors()[0]
    dotted = ".".join(str(part) for part in problem["loc"])
    if problem["type"] != "extra_forbidden":
        return f"{dotted}: {problem['msg'].lower()}, got {problem['input']!r}"
    section: type[BaseModel] = ScanConfig
    for part in problem["loc"][:-1]:
        section = type(getattr(section(), str(part)))
    return f"unknown key {dotted}; known there: {', '.join(section.model_fields)}"
