"""Every sprite and texture of one slide, drawn once and resampled to its µm/px.

Hides resampling and the background textures. Shapes are drawn at `MASTER_MPP` whatever is asked for, so the same seed
shows the same cells at any resolution.

Invariant: a texture is periodic.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit

from slidescan.phantom.cells import DRAW, MASTER_MPP, VARIANTS, Sprite, noise

__all__ = ["Bank", "stain_bank"]

F32 = NDArray[np.float32]

_PERIOD_PX = {"wobble": 1280, "fibre_a": 1024, "fibre_b": 1280, "grain": 1024, "fat": 1024}  # at MASTER_MPP


@dataclass(frozen=True, slots=True, eq=False)
class Bank:
    """Sprites by kind, variant and turn (8 mirrored and quarter-turned views) and periodic textures."""

    sprites: dict[str, tuple[tuple[Sprite, ...], ...]]
    textures: dict[str, F32]


@lru_cache(maxsize=4)
def stain_bank(seed: int, mpp: float) -> Bank:
    """Draw every sprite and texture of `seed` once, resampled to `mpp` µm/px.

    Fibroblasts are ordered by angle: variant k lies at k/VARIANTS of a half turn.
    """
    sprites: dict[str, tuple[tuple[Sprite, ...], ...]] = {}
    for tag, (kind, draw) in enumerate(DRAW.items()):
        rng = np.random.default_rng([seed, 1, tag])
        drawn = (_at(draw(rng, k), mpp) for k in range(VARIANTS))
        sprites[kind] = tuple(tuple(sprite.turned(turn) for turn in range(8)) for sprite in drawn)
    rng = np.random.default_rng([seed, 2])
    textures = {
        "wobble": noise(rng, _PERIOD_PX["wobble"], 9.0) + 0.4 * noise(rng, _PERIOD_PX["wobble"], 2.5),
        "fibre_a": _fibres(rng, _PERIOD_PX["fibre_a"], along_x=True),
        "fibre_b": _fibres(rng, _PERIOD_PX["fibre_b"], along_x=False),
        "grain": 1.3 * noise(rng, _PERIOD_PX["grain"], 0.4) + 1.2 * noise(rng, _PERIOD_PX["grain"], 3.0),
        "fat": _fat_walls(rng, _PERIOD_PX["fat"]),
    }
    return Bank(sprites, {name: _texture_at(texture, mpp) for name, texture in textures.items()})


def _fibres(rng: np.random.Generator, n_px: int, *, along_x: bool) -> F32:
    """Wavy collagen bundles: noise stretched along one axis, bent by a slow displacement across it."""
    long_um, fine_um = 22.0, 0.7
    fine = noise(rng, n_px, (fine_um, long_um)) + 1.1 * noise(rng, n_px, (3 * fine_um, 2 * long_um))
    bend_px = np.asarray(9.0 / MASTER_MPP * noise(rng, n_px, 28.0))
    rows, cols = np.indices((n_px, n_px), np.float32)
    bent = ndimage.map_coordinates(fine, [rows + bend_px, cols], order=1, mode="grid-wrap")
    out = np.asarray(bent / bent.std(), np.float32)
    return out if along_x else np.ascontiguousarray(out.T)


def _fat_walls(rng: np.random.Generator, n_px: int) -> F32:
    """Adipocytes: 1 on the thin walls between cells about 55 µm wide, 0 in their empty middle."""
    cells = max(2, round(n_px * MASTER_MPP / 55))
    step = n_px / cells
    at = (
        np.stack(np.meshgrid(np.arange(cells), np.arange(cells)), -1).reshape(-1, 2)
        + rng.uniform(0.15, 0.85, (cells**2, 2))
    ) * step
    axis = np.arange(n_px, dtype=np.float32)
    near = np.full((2, n_px, n_px), np.inf, np.float32)  # distance² to the nearest and second nearest centre
    for cx, cy in at.astype(np.float32):
        dx, dy = np.abs(axis - cx), np.abs(axis - cy)
        dist2 = np.minimum(dx, n_px - dx)[None, :] ** 2 + np.minimum(dy, n_px - dy)[:, None] ** 2
        near[1] = np.minimum(near[1], np.maximum(near[0], dist2))
        near[0] = np.minimum(near[0], dist2)
    gap_um = (np.sqrt(near[1]) - np.sqrt(near[0])) * MASTER_MPP + 0.5 * noise(rng, n_px, 4.0)
    return np.asarray(expit((2.2 - gap_um) / 0.5), np.float32)


def _zoomed(plane: F32, n_px: int, mode: str) -> F32:
    """Resample a square plane to `n_px` with a filter against aliasing."""
    ratio = n_px / len(plane)
    if ratio == 1:
        return plane
    # A Gaussian of half the coarse pixel spacing leaves little above its Nyquist frequency.
    smooth = ndimage.gaussian_filter(plane, 0.5 / ratio, mode=mode.removeprefix("grid-")) if ratio < 1 else plane
    return np.asarray(ndimage.zoom(smooth, ratio, order=1, mode=mode, grid_mode=True), np.float32)[:n_px, :n_px]


def _at(sprite: Sprite, mpp: float) -> Sprite:
    n_px = max(2, 2 * round(len(sprite.keep) * MASTER_MPP / mpp / 2))
    # 1 - x: outside the frame a sprite changes nothing, so what is resampled must be 0 there.
    keep = 1 - _zoomed(1 - sprite.keep, n_px, "nearest")
    add = np.stack([_zoomed(p, n_px, "nearest") for p in sprite.add])
    light = sprite.transmit
    if light is not None:
        light = np.stack([_zoomed(np.ascontiguousarray(light[..., c]), n_px, "nearest") for c in range(3)], -1)
    return Sprite(keep, add, light)


def _texture_at(texture: F32, mpp: float) -> F32:
    return _zoomed(texture, max(64, round(len(texture) * MASTER_MPP / mpp)), "grid-wrap")
