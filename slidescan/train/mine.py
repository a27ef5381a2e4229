"""Hard negatives: what a detector finds where nothing is.

The slides are assumed free of objects, on the user's word; every detection from half the threshold on is a false alarm,
and a window around it is kept, the highest scored first.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image as Picture

from slidescan.config import ScanConfig
from slidescan.detect.model import Family, Model
from slidescan.scan_slide import scan
from slidescan.slides import Slide
from slidescan.train.augment import Rgb

__all__ = ["load_mined", "mine"]

_WINDOW_PX = 128  # at the detector's µm/px: what decides, with its surroundings
_MOST = 2000  # windows a slide: 100 MB of pixels


def mine(detector: Model | Family, slides: Sequence[Slide], folder: Path) -> int:
    """Scan slides and write a window around each false alarm as PNG; return how many.

    Parameters
    ----------
    detector : Model or Family
    slides : sequence of Slide
    folder : Path
        Takes ``<slide>-<rank>.png``, numbered so that no slide's name shows, and ``done`` when all are scanned.
    """
    folder.mkdir(parents=True, exist_ok=True)
    count = 0
    for k, slide in enumerate(slides):
        variant = detector.at(slide.frame.mpp, allow_coarse=True)
        least = variant.threshold / 2
        settings = ScanConfig.load({}, {"detect.min_score": least, "detect.threshold": least})
        found = scan(slide, variant, config=settings, allow_coarse=True).detections[:_MOST]
        plane = slide.frame.at(variant.mpp)
        scale = slide.frame.mpp / variant.mpp
        for rank, (x, y) in enumerate(np.rint(found.centers * scale).astype(int).tolist()):
            half = _WINDOW_PX // 2
            rgb = slide.read(x - half, y - half, _WINDOW_PX, _WINDOW_PX, plane).rgb
            Picture.fromarray(rgb).save(folder / f"{k}-{rank}.png")
            count += 1
    (folder / "done").write_text(f"{count}\n", encoding="utf-8")
    return count


def load_mined(folder: Path) -> list[Rgb]:
    """Return the windows of a folder, in the order of their names."""
    windows = []
    for file in sorted(folder.glob("*.png")):
        with Picture.open(file) as picture:
            windows.append(np.asarray(picture.convert("RGB")))
    return windows
