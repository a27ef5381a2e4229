"""Crops whose figures are green dots, so that pixels say where figures went."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from slidescan.train.crops import Crop

GREEN = np.array([0, 255, 0])


def marked_crops(n: int = 12, edge: int = 128, *, off_centre: bool = False) -> list[Crop]:
    """Pink noise with a green dot of 9 px where the figure is, so that pixels say where figures went."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(n):
        image = rng.normal((210, 150, 190), 12, (edge, edge, 3)).clip(0, 255).astype(np.uint8)
        centre = np.full(2, edge / 2) + (rng.uniform(-8, 8, 2).round() if off_centre else 0)
        y, x = np.mgrid[:edge, :edge] + 0.5
        image[np.hypot(x - centre[0], y - centre[1]) <= 4.5] = GREEN
        crops.append(Crop(image, 0.25, np.array([[*centre, i % 2]]), f"p{i % 4}"))
    return crops


def dots(image: NDArray[np.uint8], least_px: int = 1) -> NDArray[np.float64]:
    """Centres (x, y) of the green dots of an image, those of fewer px left out."""
    green = (image[..., 1].astype(int) - image[..., 0] > 90) & (image[..., 2] < 130)
    labels, count = ndimage.label(green, np.ones((3, 3)))
    large = np.flatnonzero(np.bincount(labels.ravel(), minlength=count + 1)[1:] >= least_px) + 1
    found = ndimage.center_of_mass(green, labels, large)
    return np.array(found, np.float64).reshape(-1, 2)[:, ::-1] + 0.5
