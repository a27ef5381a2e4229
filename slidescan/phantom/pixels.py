"""Pixels of a phantom, one fixed cell at a time.

Hides how tissue is composed: textures make the ground, sprites are laid on a jittered lattice that is seeded by place,
and two stain planes become light. A cell is always made whole, so a box is bit-identical however it is asked for.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from slidescan.phantom.bank import stain_bank
from slidescan.phantom.cells import VARIANTS
from slidescan.phantom.layout import GRID_UM, Layout, interpolate, layout_of

if TYPE_CHECKING:
    from slidescan.phantom.slide import Phantom

__all__ = ["CELL_PX", "GLASS", "cell"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

CELL_PX = 512  # what is rendered at once; planes of this size stay in the processor's cache
GLASS = 243.0  # grey of clear glass, 0..255: scanners leave it a little below white
_NOISE = 1.3  # standard deviation of sensor noise, grey levels
_REACH_UM = 14.0  # half the largest sprite
_CLEAR_UM = 8.5  # no ordinary nucleus is centred nearer to a planted object
_STAINS = np.array([[0.57, 0.77, 0.31], [0.17, 0.88, 0.42]])  # RGB absorption of haematoxylin and eosin, natural log
_LATTICE_UM = {"nucleus": 10.6, "fibroblast": 15.0, "lymphocyte": 6.9}  # typical distance of neighbours


@lru_cache(maxsize=4)
def _optics(seed: int) -> tuple[F32, F32]:
    """Stain colours of this slide (2, 3) and sensor noise of one cell with the glass level added."""
    rng = np.random.default_rng([seed, 4])
    stains = (_STAINS * rng.uniform(0.93, 1.07, _STAINS.shape)).astype(np.float32)
    return stains, (_NOISE * rng.standard_normal((CELL_PX, CELL_PX, 3), np.float32) + 0.5).astype(np.float32)


@lru_cache(maxsize=96)
def cell(phantom: Phantom, cx: int, cy: int) -> NDArray[np.uint8]:
    """Pixels of one whole cell, uint8 (CELL_PX, CELL_PX, 3), read-only."""
    layout = layout_of(phantom)
    stains, noise = _optics(phantom.seed)
    x0, y0 = cx * CELL_PX, cy * CELL_PX
    y_um, x_um = ((at + 0.5 + np.arange(CELL_PX, dtype=np.float64)) * phantom.mpp for at in (y0, x0))
    planes, pigments = None, []
    inside = interpolate(layout.maps["edge"], y_um, x_um)
    if float(inside.max()) > -40:  # µm; the outline never wanders further
        planes = _ground(phantom, layout, inside, x0, y0, y_um, x_um)
        for sprite_kind, variant, turn, x_px, y_px in _objects(phantom, layout, x0, y0):
            sprite = stain_bank(phantom.seed, phantom.mpp).sprites[sprite_kind][variant][turn]
            n = len(sprite.keep)
            left, top = round(x_px - n / 2) - x0, round(y_px - n / 2) - y0
            x_in, y_in = slice(max(0, left), min(CELL_PX, left + n)), slice(max(0, top), min(CELL_PX, top + n))
            if x_in.start >= x_in.stop or y_in.start >= y_in.stop:
                continue
            cut = slice(y_in.start - top, y_in.stop - top), slice(x_in.start - left, x_in.stop - left)
            under = planes[:, y_in, x_in]
            under *= sprite.keep[cut]
            under += sprite.add[:, cut[0], cut[1]]
            if sprite.transmit is not None:
                pigments.append((y_in, x_in, sprite.transmit[cut]))
    light = np.full((CELL_PX, CELL_PX, 3), GLASS, np.float32)
    if planes is not None:
        for c in range(3):
            light[..., c] *= np.exp(-(planes[0] * stains[0, c] + planes[1] * stains[1, c]))
    for y_in, x_in, transmit in pigments:
        light[y_in, x_in] *= transmit
    light += noise
    out = np.clip(light, 0, 255, out=light).astype(np.uint8)
    out.flags.writeable = False
    return out


def _ground(phantom: Phantom, layout: Layout, inside: F32, x0: int, y0: int, y_um: F64, x_um: F64) -> F32:
    """Stain planes (2, CELL_PX, CELL_PX) of everything but cells: collagen, cytoplasm, fat, lumens, clefts, outline."""
    textures = stain_bank(phantom.seed, phantom.mpp).textures

    def texture(name: str) -> F32:
        whole = textures[name]
        rows, cols = ((np.arange(at, at + CELL_PX) % len(whole)) for at in (y0, x0))
        return np.asarray(whole[rows][:, cols], np.float32)

    maps = {name: interpolate(field, y_um, x_um) for name, field in layout.maps.items() if name != "edge"}
    wobble, grain, along = texture("wobble"), texture("grain"), maps["along"]
    collagen = texture("fibre_b") * (1 - along) + texture("fibre_a") * along
    nest = np.clip((maps["nest"] - 0.5) * 2.2 + 0.5 + 0.16 * wobble, 0, 1)
    cover = np.clip((inside + 7 * wobble + 3 * collagen) / 16 + 0.5, 0, 1)
    cover *= cover * (3 - 2 * cover) * maps["stain"]
    cover *= 1 - np.clip(3 * maps["lumen"] - 1 + 0.3 * wobble, 0, 1) * 0.97
    cover *= 1 - np.clip(maps["fat"] * 1.5 - 0.25, 0, 1) * (1 - texture("fat"))
    # Tissue shrinks when it is fixed: clefts open along nests and between bundles.
    border = 4 * nest * (1 - nest)
    cover *= 1 - 0.85 * np.clip(border * (wobble - 0.35) * 1.6 + (1 - nest) * (-collagen - 1.55) * 1.5, 0, 1)
    out = np.empty((2, CELL_PX, CELL_PX), np.float32)
    out[0] = cover * np.maximum(nest * (0.2 + 0.035 * grain) + (1 - nest) * (0.07 + 0.015 * collagen + 0.01 * grain), 0)
    out[1] = cover * np.maximum(
        nest * (0.42 + 0.045 * grain) + (1 - nest) * (0.56 + 0.17 * collagen + 0.035 * grain), 0.04
    )
    return out


def _hash01(seed: int, layer: int, i: NDArray[np.int64], j: NDArray[np.int64]) -> F64:
    """Uniform numbers in [0, 1) that depend on the place alone (SplitMix64 finaliser, Steele et al. 2014)."""
    key = np.uint64((seed * 1_000_003 + layer * 7919 + 1) % 2**64)
    z = i.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + j.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray((z ^ (z >> np.uint64(31))) >> np.uint64(11), np.float64) / 2**53


def _objects(phantom: Phantom, layout: Layout, x0: int, y0: int) -> list[tuple[str, int, int, float, float]]:
    """Every sprite that may reach into a cell: (kind, variant, turn, x px, y px) in drawing order."""
    mpp, seed, edge_um = phantom.mpp, phantom.seed, CELL_PX * phantom.mpp
    low_um = np.array([x0, y0]) * mpp - _REACH_UM
    high_um = low_um + edge_um + 2 * _REACH_UM
    near = np.flatnonzero(((layout.centers_um > low_um) & (layout.centers_um < high_um)).all(1))
    out: list[tuple[str, int, int, float, float]] = []
    for layer, (kind, step) in enumerate(_LATTICE_UM.items()):
        i, j = np.meshgrid(
            *(np.arange(int(a // step) - 1, int(b // step) + 2) for a, b in zip(low_um, high_um, strict=True))
        )
        draws = [_hash01(seed, 8 * layer + k, i, j) for k in range(5)]
        # Odd rows are shifted by half a step, else the eye finds the lattice.
        x = (i + 0.5 * (j & 1) + 0.5 + 0.85 * (draws[0] - 0.5)) * step
        y = (j + 0.5 + 0.85 * (draws[1] - 0.5)) * step
        at = [y / GRID_UM - 0.5, x / GRID_UM - 0.5]
        here = {
            name: ndimage.map_coordinates(field, at, order=1, mode="nearest") for name, field in layout.maps.items()
        }
        solid = (here["edge"] > 4) & (here["lumen"] < 0.2) & (here["fat"] < 0.25)
        likely = {
            "nucleus": here["nest"] * 0.93,
            "fibroblast": (1 - here["nest"]) * 0.55,
            "lymphocyte": here["lymph"] * 0.9 + 0.006,
        }
        chosen = solid & (draws[2] < likely[kind])
        for k in near:
            chosen &= np.hypot(x - layout.centers_um[k, 0], y - layout.centers_um[k, 1]) > _CLEAR_UM
        for jj, ii in np.argwhere(chosen):
            variant, turn = int(draws[3][jj, ii] * VARIANTS), int(draws[4][jj, ii] * 8)
            name = kind
            if kind == "fibroblast":  # lies with the fibres: along x where `along` is 1, never mirrored
                turn_to = 0.5 * (1 - here["along"][jj, ii]) + 0.16 * (draws[3][jj, ii] - 0.5)
                variant, turn = int(turn_to * VARIANTS) % VARIANTS, 0
                name = "red_cell" if draws[4][jj, ii] < 0.06 else kind
            out.append((name, variant, turn, float(x[jj, ii]) / mpp, float(y[jj, ii]) / mpp))
    for k in near:
        variant, turn = (
            int(_hash01(seed, 90 + a, np.array([k]), np.array([0]))[0] * m) for a, m in ((0, VARIANTS), (1, 8))
        )
        out.append((layout.kinds[k], variant, turn, layout.centers_um[k, 0] / mpp, layout.centers_um[k, 1] / mpp))
    return out
