"""`detect_image`: objects on one picture of any size, in its own px.

A picture that fits the model's tile is scored whole; a larger one takes the path of a slide, so that an object on the
seam of two tiles is found once.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidescan.config import ScanConfig
from slidescan.detections import Detections, Detector
from slidescan.errors import ConfigError
from slidescan.scan_slide import scan
from slidescan.slides import Slide, memory_slide, open_slide

__all__ = ["detect_image"]

_SIDE_PX = 32  # sides are padded to a multiple of it: the coarsest stride of a detector
_HALO = 0.25  # of the tile: an object of up to half a tile is whole in one of them
_SLACK = 0.02  # of the tile: how far two tiles may disagree on the centre of one object


def detect_image(
    image: str | Path | NDArray[np.uint8] | Slide,
    detector: Detector,
    *,
    min_score: float = 0.5,
    tile_px: int | None = None,
    mpp: float | None = None,
) -> Detections:
    """Detect objects on one image.

    Parameters
    ----------
    image : str, Path, ndarray of uint8 (H, W, 3), or Slide
        A PNG, JPEG or slide; RGB.
    detector : Detector
        For a model of photographs, from ``load_detector(directory, mpp=1.0)``: a px is its unit then.
    min_score : float
        In (0, 1].
    tile_px : int, optional
        Edge of a tile, a multiple of 32; default: the detector's own. An image no larger is scored whole.
    mpp : float, optional
        µm/px of the image; default: the detector's, that is, the image is read as it is.

    Returns
    -------
    Detections
        In px of the image, best first.

    Raises
    ------
    SlideError
        If the image cannot be read.
    ConfigError
        If `tile_px` or `min_score` is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> import slidescan as ss
    >>> blank = np.full((100, 150, 3), 240, np.uint8)
    >>> len(ss.detect_image(blank, ss.load_detector("mitosis")))
    0
    """
    edge = tile_px or detector.input_px
    if edge % _SIDE_PX or edge <= 0:
        raise ConfigError(f"tile_px: expected a multiple of {_SIDE_PX}, got {edge}")
    if not 0 < min_score <= 1:
        raise ConfigError(f"min_score: expected a number in (0, 1], got {min_score}")
    if isinstance(image, Slide):
        slide = image
    elif isinstance(image, np.ndarray):
        slide = memory_slide(image, mpp or detector.mpp)
    else:
        slide = open_slide(image, mpp=mpp or detector.mpp)
    variant = detector.at(slide.frame.mpp, allow_coarse=True)
    plane = slide.plane(variant.mpp)
    width, height = plane.size_wh
    if max(width, height) <= edge:
        padded_w, padded_h = (-(-n // _SIDE_PX) * _SIDE_PX for n in (width, height))
        found = variant.detect(slide.read(0, 0, padded_w, padded_h, plane).rgb[None], min_score)[0]
        return _inside(found, width, height).moved(plane.factor_to(slide.frame), 0.0, 0.0)
    settings = {
        "tissue.enabled": False,
        "tiling.tile_px": edge,
        "tiling.halo_um": _HALO * edge * plane.mpp,
        "stitch.slack_um": _SLACK * edge * plane.mpp,
        "detect.min_score": min_score,
        "detect.threshold": min_score,
        "map.um_per_px": max(16, edge // 8) * plane.mpp,
    }
    return scan(slide, variant, config=ScanConfig.load({}, settings)).detections


def _inside(found: Detections, width: int, height: int) -> Detections:
    """Drop what lies in the padding and cut boxes at the image's edge."""
    x, y = found.centers.T
    kept = found[(x < width) & (y < height)]
    return Detections(np.minimum(kept.xyxy, [width, height, width, height]), kept.score, kept.label)
