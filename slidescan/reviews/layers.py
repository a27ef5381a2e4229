"""What lies over a slide in its context: density of figures, coverage and boxes, packed as the page draws them."""

from __future__ import annotations

import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slidescan.anomaly import AnomalyMap
from slidescan.detections import Detections
from slidescan.legend import RAMP_END_PER_MM2, ramp_rgb
from slidescan.saved import load_result

__all__ = ["Layers", "layers_of"]

_LEAST, _STRONGEST = 0.05, 0.9  # of the ramp: where colour begins; the alpha it reaches
_MOST_PX = 4096  # longer side of a map picture, px: what every browser can draw; 65 mm of slide at 16 µm


@dataclass(frozen=True, slots=True)
class Layers:
    """Of one slide; pictures cover `map_wh_l0` from the slide's corner, which may be a little more than the slide."""

    heat_png: bytes
    """RGBA: colour is density, transparent where there is none."""
    coverage_png: bytes
    """Grey levels are `slidescan.anomaly.Coverage` values."""
    boxes: bytes
    """Little-endian float32, six a detection: x0, y0, x1, y1 in level-0 px, score (NaN if blinded), class."""
    n: int
    map_wh_l0: tuple[float, float]
    classes: tuple[str, ...]
    threshold: float


def layers_of(path: Path, *, blinded: bool) -> Layers:
    """Read the layers of a saved result.

    Blinded, they tell no score: no density, only the boxes at or above the threshold, and these from left to right.
    """
    result = load_result(path, verify=False)
    detections = result.found if blinded else result.detections
    anomaly = result.anomaly.fitted(_MOST_PX)
    factor = anomaly.frame.factor_to(result.frame)
    height, width = anomaly.coverage.shape
    return Layers(
        heat_png=b"" if blinded else _png(Image.fromarray(_heat(anomaly))),
        coverage_png=_png(Image.fromarray(anomaly.coverage)),
        boxes=_packed(detections, blinded=blinded).tobytes(),
        n=len(detections),
        map_wh_l0=(width * factor, height * factor),
        classes=result.classes,
        threshold=result.threshold,
    )


def _packed(detections: Detections, *, blinded: bool) -> NDArray[np.float32]:
    score = np.full(len(detections), np.nan) if blinded else detections.score
    # float32 has 24 bits: at 200,000 px a box's edge is 0.01 px off.
    packed = np.column_stack([detections.xyxy, score, detections.label]).astype("<f4")
    return packed[np.lexsort(packed[:, :4].T)] if blinded else packed


def _heat(anomaly: AnomalyMap) -> NDArray[np.uint8]:
    strength = np.clip(np.nan_to_num(anomaly.density) / RAMP_END_PER_MM2, 0, 1)
    alpha = np.clip((strength - _LEAST) * 4, 0, _STRONGEST) * 255
    return np.dstack([ramp_rgb(strength), alpha]).round().astype(np.uint8)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", compress_level=4)
    return file.getvalue()
