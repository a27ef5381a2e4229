"""What scanners, stainers and codecs do to the same tissue, as random changes of an RGB image.

Hides the colour arithmetic. Stain is changed in optical density, where haematoxylin and eosin add up (Beer-Lambert), so
one 3x3 matrix and an offset do the whole jitter. Geometry is the business of `slidescan.train.fields`.
"""

from __future__ import annotations

import io

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

__all__ = ["Rgb", "augment", "jitter_stain"]

Rgb = NDArray[np.uint8]

# Optical density (R, G, B) of haematoxylin, eosin and DAB: Ruifrok and Johnston 2001, rows normalised.
_STAINS = np.array([[0.650, 0.704, 0.286], [0.072, 0.990, 0.105], [0.268, 0.570, 0.776]])
_STAINS /= np.linalg.norm(_STAINS, axis=1, keepdims=True)
_UNMIX = np.linalg.inv(_STAINS)
_DENSITY = -np.log((np.arange(256, dtype=np.float32) + 1.0) / 256.0)  # of each 8-bit value


def jitter_stain(rng: np.random.Generator, image: Rgb, strength: float) -> Rgb:
    """Scale and shift each stain's amount by a random factor of about 1 ± `strength`.

    Examples
    --------
    >>> pink = np.full((2, 2, 3), (230, 150, 190), np.uint8)
    >>> bool((jitter_stain(np.random.default_rng(0), pink, 0.0).astype(int) - pink).max() <= 1)
    True
    """
    gain = np.clip(rng.normal(1.0, strength, 3), 0.4, 2.0)
    mix = (_UNMIX * gain) @ _STAINS
    shift = rng.normal(0.0, 0.15 * strength, 3) @ _STAINS
    density = _DENSITY[image].reshape(-1, 3) @ mix.astype(np.float32)
    density += shift.astype(np.float32)
    np.exp(-density, out=density)
    density *= 256.0
    jittered: Rgb = np.clip(density - 0.5, 0, 255).astype(np.uint8)  # -1 of the density, +0.5 to round
    return jittered.reshape(image.shape)


def augment(rng: np.random.Generator, image: Rgb, strength: float = 0.2) -> Rgb:
    """Change stain, exposure, focus and compression at random; `strength` scales the stain part.

    Examples
    --------
    >>> augment(np.random.default_rng(0), np.full((32, 32, 3), 200, np.uint8)).shape
    (32, 32, 3)
    """
    if rng.random() < 0.9:
        image = jitter_stain(rng, image, strength)
    if rng.random() < 0.7:
        table = np.arange(256) / 255.0
        table = table ** rng.uniform(0.8, 1.25)
        table = (table - 0.5) * rng.uniform(0.8, 1.2) + 0.5 + rng.uniform(-0.08, 0.08)
        tint = rng.normal(1.0, 0.03, 3)  # white balance of the scanner
        table_rgb = np.clip(table[:, None] * tint * 255.0 + 0.5, 0, 255).astype(np.uint8)
        image = np.stack([table_rgb[:, c][image[..., c]] for c in range(3)], axis=-1)
    roll = rng.random()
    if roll < 0.25:
        picture = Image.fromarray(image).filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.6)))
        image = np.asarray(picture)
    elif roll < 0.4:
        percent = int(rng.uniform(30, 180))
        image = np.asarray(Image.fromarray(image).filter(ImageFilter.UnsharpMask(rng.uniform(0.6, 2.0), percent, 0)))
    if rng.random() < 0.15:
        noise = rng.normal(0, rng.uniform(1, 6), (*image.shape[:2], 1)).astype(np.float32)
        image = np.clip(image + noise + 0.5, 0, 255).astype(np.uint8)
    if rng.random() < 0.5:
        packed = io.BytesIO()
        Image.fromarray(image).save(packed, "JPEG", quality=int(rng.uniform(35, 95)))
        image = np.asarray(Image.open(packed))
    return image
