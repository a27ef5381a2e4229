"""Tissue without figures from elsewhere: dark, dense and spindle-shaped nuclei that the crops hardly show.

Hides the scale and the stain of these images, which are unknown and mixed. The annotated nuclei tell the scale: images
are resized so that the median nucleus has a usual size. Half of them take on the colours of a random crop, else the
network would learn that their stain means "nothing here".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from slidescan.train.augment import Rgb

__all__ = ["Negative", "load_negatives", "show"]

_NUCLEUS_UM = 7.5  # usual diameter of a nucleus in these tissues; varied by a third either way when shown


@dataclass(frozen=True, slots=True, eq=False)
class Negative:
    """An image without figures and the median diameter of its nuclei, px."""

    image: Rgb
    nucleus_px: float


def load_negatives(data: Path) -> list[Negative]:
    """Read ``dsb2018_he`` below `data`; nothing if it is not there: it helps, but training does without."""
    found = []
    for file in sorted((data / "dsb2018_he" / "images").glob("*.png")):
        with Image.open(data / "dsb2018_he" / "labels" / file.name) as picture:
            area = np.bincount(np.asarray(picture).ravel())[1:]
        area = area[area > 20]  # px: smaller ones are scraps at the border
        if len(area):
            with Image.open(file) as picture:
                image = np.asarray(picture.convert("RGB"))
            found.append(Negative(image, float(2 * np.sqrt(np.median(area) / np.pi))))
    return found


def show(rng: np.random.Generator, negative: Negative, like: Rgb, mpp: float, size: int) -> Rgb:
    """Return a `size` px square of the image at about `mpp`, mirrored if too small, maybe in the colours of `like`."""
    factor = _NUCLEUS_UM / mpp / negative.nucleus_px * float(np.exp(rng.uniform(np.log(0.7), np.log(1.4))))
    factor = float(np.clip(factor, 0.25, 3.0))
    width, height = (max(16, round(n * factor)) for n in negative.image.shape[1::-1])
    image = np.asarray(Image.fromarray(negative.image).resize((width, height), Image.Resampling.BILINEAR))
    image = np.rot90(image, int(rng.integers(4)))
    pads = [(0, max(0, size - n)) for n in image.shape[:2]]
    image = np.pad(image, (*pads, (0, 0)), mode="symmetric")
    y, x = (int(rng.integers(0, n - size + 1)) for n in image.shape[:2])
    image = image[y : y + size, x : x + size]
    if rng.random() < 0.5:
        mean, spread = image.mean((0, 1)), image.std((0, 1))
        # No more than twice the contrast: the plainest images would turn to noise.
        gain = np.minimum(like.std((0, 1)) / np.maximum(spread, 1), 2.0)
        image = np.clip((image - mean) * gain + like.mean((0, 1)) + 0.5, 0, 255).astype(np.uint8)
    return np.ascontiguousarray(image)
