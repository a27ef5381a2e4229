"""What the scan tests share: an oracle detector, small slides of dark discs and small settings."""

from __future__ import annotations

import numpy as np

import slidescan as ss
from slidescan.config import ScanConfig
from slidescan.slides import Slide, memory_slide
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image, random_centers

MPP = 0.5
RADIUS_PX = 11
ORACLE = OracleDetector(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
SMALL = {"tiling.region_px": 600, "tissue.thumbnail_px": 512, "map.um_per_px": 8.0}


def tissue(size_wh: tuple[int, int], centers: np.ndarray) -> np.ndarray:
    return disc_image(size_wh, centers, RADIUS_PX, ground=TISSUE_GROUND)


def discs(n: int = 60, size_wh: tuple[int, int] = (2000, 1500), seed: int = 0) -> tuple[Slide, np.ndarray]:
    """Return a slide of dark discs on pink tissue, and their centres."""
    centers = random_centers(np.random.default_rng(seed), size_wh, n, apart_px=3 * RADIUS_PX, margin_px=RADIUS_PX + 1)
    return memory_slide(tissue(size_wh, centers), MPP), centers


def config(**changed: object) -> ScanConfig:
    return ScanConfig.load({}, SMALL | {k.replace("__", "."): v for k, v in changed.items()})


def in_order(result: ss.ScanResult) -> np.ndarray:
    boxes = result.detections.xyxy
    return boxes[np.lexsort(boxes.T)]
