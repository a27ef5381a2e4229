"""Options that several commands have, and what they stand for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
import yaml

from slidescan.errors import ConfigError

if TYPE_CHECKING:
    from slidescan.detect.model import Precision
    from slidescan.detections import Detector

__all__ = ["ModelMppOpt", "PrecisionOpt", "assigned", "detector_of"]

PrecisionOpt = Annotated[
    Literal["auto", "fp32", "bf16"],
    typer.Option(
        help="Of the network's convolutions. bf16 is faster on a GPU, and on a CPU that has it (AVX-512, AMX); auto: "
        "bf16 for D-FINE and RT-DETR on a GPU that has it, fp32 otherwise."
    ),
]
ModelMppOpt = Annotated[
    float | None,
    typer.Option(help="µm/px the model was trained at, where its directory does not say: transformers' own."),
]


def detector_of(model: str, precision: Precision = "auto", mpp: float | None = None) -> Detector:
    """Return the detector that the options name."""
    from slidescan.detect import load_detector

    detector = load_detector(model, precision=precision, mpp=mpp)
    if mpp is not None and mpp != detector.mpp:
        raise ConfigError(f"--model-mpp: expected none, for {model} says what it was trained at, got {mpp:g}")
    return detector


def assigned(assignments: list[str]) -> dict[str, Any]:
    """Return what `--set section.key=value` options say."""
    found = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set expects section.key=value, got {assignment!r}")
        try:
            found[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as exc:
            raise ConfigError(f"--set {key.strip()}: expected a YAML value, got {value!r}") from exc
    return found
