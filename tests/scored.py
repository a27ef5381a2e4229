"""Images with boxes at known places and scores, for what is measured and what is drawn of it."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from slidescan.detections import Detections
from slidescan.train.metrics import Image

RADIUS_PX = 5.0
SIZE_PX = 80


def boxes_at(xy: NDArray[np.float64], score: NDArray[np.float64]) -> Detections:
    """Small boxes centred at `xy`."""
    xy = np.asarray(xy, np.float64).reshape(-1, 2)
    return Detections.build(np.concatenate((xy - 1, xy + 1), 1), score)


def row(score: NDArray[np.float64], right: NDArray[np.bool_], patient: str = "") -> Image:
    """An image with detections in a row, of which some are right."""
    xy = np.stack((np.arange(len(score)) * 10.0, np.zeros(len(score))), 1)
    return Image(boxes_at(xy, score), xy[right], 1.0, max(1000, 10 * len(score)), 0.0, patient)


def patients(shares: list[float], images_each: int = 2) -> list[Image]:
    """Images of 10 truths a patient, of which a share scores 0.75 and the rest 0.25, and 5 false at 0.5."""
    images = []
    for i, share in enumerate(shares):
        score = np.concatenate((np.where(np.arange(10) < 10 * share, 0.75, 0.25), np.full(5, 0.5)))
        images += [row(score, np.arange(15) < 10, f"p{i}")] * images_each
    return images
