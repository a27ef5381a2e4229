"""What lies where on a phantom, in µm: outline, nests, fat, and every planted object.

Hides how the tissue is laid out. Only maps of the whole slide at `GRID_UM` are held, so a phantom of any size is cheap.
Lengths are µm throughout: the same seed and extent give the same tissue at any resolution.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from scipy.special import expit

from slidescan.phantom.cells import FIGURES, LOOK_ALIKES

if TYPE_CHECKING:
    from slidescan.phantom.slide import Phantom

__all__ = ["GRID_UM", "OBJECT_UM", "Layout", "interpolate", "layout_of"]

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]

OBJECT_UM = 12.5  # edge of a truth box: 50 px at 0.25 µm/px, as the MIDOG boxes
GRID_UM = 8.0  # spacing of the whole-slide maps: finer than any nest or lumen
_ALONE_UM = 30.0  # figures keep this distance, so that boxes never touch


@dataclass(frozen=True, eq=False)
class Layout:
    """Whole-slide maps at `GRID_UM` and the planted objects (figures first, the caller's own before all)."""

    maps: dict[str, F32]
    centers_um: F64
    kinds: tuple[str, ...]
    is_figure: NDArray[np.bool_]


@lru_cache(maxsize=4)
def layout_of(phantom: Phantom) -> Layout:
    """Return the layout of a phantom that does not repeat; the last few are kept."""
    rng = np.random.default_rng([phantom.seed, 3])
    plants_um = np.array(phantom.plant_l0, np.float64).reshape(-1, 2) * phantom.mpp
    maps = _maps(phantom, rng, plants_um)
    free = (maps["edge"] > 30) & (maps["nest"] > 0.8) & (maps["fat"] < 0.1) & (maps["lumen"] < 0.05)
    anywhere = (maps["edge"] > 20) & (maps["fat"] < 0.1) & (maps["lumen"] < 0.05)
    taken: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for x, y in plants_um:
        taken.setdefault((int(x // _ALONE_UM), int(y // _ALONE_UM)), []).append((x, y))
    extent_um = np.array(phantom.size_wh) * phantom.mpp
    figures = _scatter(rng, free, phantom.n_figures, taken, extent_um)
    others = _scatter(rng, anywhere, phantom.n_look_alikes, taken, extent_um)
    n_figures = len(plants_um) + len(figures)
    kinds = (
        rng.choice(FIGURES, n_figures, p=(0.45, 0.25, 0.18, 0.12)).tolist()
        + rng.choice(LOOK_ALIKES, len(others)).tolist()
    )
    centers = np.concatenate([plants_um, figures, others])
    return Layout(maps, centers, tuple(kinds), np.arange(len(centers)) < n_figures)


def _field(rng: np.random.Generator, shape: tuple[int, int], um: float) -> F32:
    """Smooth noise of unit variance on the map, correlated over `um`; drawn coarser where it is smooth anyway."""
    sigma = um / GRID_UM
    step = max(1, int(sigma / 3))
    coarse = rng.standard_normal([-(-n // step) + 2 for n in shape], np.float32)
    smooth = ndimage.gaussian_filter(coarse, sigma / step, mode="wrap", truncate=3)
    # Scaled by what the filter leaves of white noise, not by this draw's own spread: a small slide sees only a part
    # of one wave and must not be stretched to show all of it.
    smooth *= 2 * math.sqrt(math.pi) * sigma / step
    out = ndimage.zoom(smooth, step, order=1, mode="nearest", grid_mode=True) if step > 1 else smooth
    return np.asarray(out[: shape[0], : shape[1]], np.float32)


def _maps(phantom: Phantom, rng: np.random.Generator, plants_um: F64) -> dict[str, F32]:
    shape = tuple(max(2, math.ceil(n * phantom.mpp / GRID_UM)) for n in phantom.size_wh[::-1])
    edge = _islands(rng, (shape[0], shape[1]), phantom.tissue)
    noise = {um: _field(rng, (shape[0], shape[1]), um) for um in (13.0, 16.0, 38.0, 40.0, 90.0, 110.0, 300.0)}
    fat = expit((noise[110.0] - 1.4) / 0.12)
    nest = noise[38.0] + 0.5 * noise[16.0] - 3 * fat
    lumen = noise[13.0] - 2.2
    for x, y in plants_um:  # the caller's own figures lie in a nest, wherever they are
        cy, cx = int(y / GRID_UM), int(x / GRID_UM)
        span = int(90 / GRID_UM)
        rows, cols = slice(max(0, cy - span), cy + span + 1), slice(max(0, cx - span), cx + span + 1)
        v, u = np.ogrid[rows.start : min(rows.stop, shape[0]), cols.start : min(cols.stop, shape[1])]
        away_um = np.hypot((v + 0.5) * GRID_UM - y, (u + 0.5) * GRID_UM - x)
        edge[rows, cols] = np.maximum(edge[rows, cols], 70 - away_um)
        nest[rows, cols] = np.maximum(nest[rows, cols], 1.2 - away_um / 35)
        fat[rows, cols] *= np.clip(away_um / 30 - 1, 0, 1)
        lumen[rows, cols] = np.minimum(lumen[rows, cols], away_um / 10 - 4)
    nest = expit(nest / 0.18)
    maps = {
        "edge": edge,  # µm inside the tissue, negative on glass
        "nest": nest,  # 1 epithelium, 0 stroma
        "fat": fat,
        "lumen": expit(lumen / 0.12) * nest,
        "lymph": expit((noise[40.0] - 1.75) / 0.12) * (1 - nest),
        "along": expit(3 * noise[90.0]),  # 1: collagen runs along x
        "stain": 1 + 0.09 * np.clip(noise[300.0], -2, 2),
    }
    return {name: np.asarray(field, np.float32) for name, field in maps.items()}


def _islands(rng: np.random.Generator, shape: tuple[int, int], share: float) -> F32:
    """Signed distance (µm) to the outline of a few lobed islands that cover `share` of the map."""
    if share in (0, 1):
        return np.full(shape, 1e3 if share else -1e3, np.float32)
    n = 96  # cells along the longer side: enough for outlines that are drawn relative to the slide
    size = [max(4, round(n * s / max(shape))) for s in shape]
    v, u = np.ogrid[: size[0], : size[1]]
    field = np.full(size, -9.0)
    for k in range(rng.integers(3, 6)):
        cy, cx = (rng.uniform(0.18, 0.82) * s for s in size)
        turn, long, short = rng.uniform(0, np.pi), rng.uniform(0.2, 0.34), rng.uniform(0.1, 0.2)
        along, across = (
            (u - cx) * np.cos(turn) + (v - cy) * np.sin(turn),
            (v - cy) * np.cos(turn) - (u - cx) * np.sin(turn),
        )
        blob = 1 - np.hypot(along / long, across / short) / n
        field = np.maximum(field, blob - 0.12 * k)
    noise = ndimage.gaussian_filter(rng.standard_normal(size), 4.5) * 2 * math.sqrt(math.pi) * 4.5
    rim = np.minimum(np.minimum(v, size[0] - 1 - v) / size[0], np.minimum(u, size[1] - 1 - u) / size[1])
    field = np.minimum(field + 0.16 * noise, 0.9) - 6 * np.maximum(
        0, 0.06 - rim
    )  # slides are mounted away from the edge
    factors = [s / c for s, c in zip(shape, size, strict=True)]
    full = ndimage.zoom(field, factors, order=1, mode="nearest", grid_mode=True) + 0.05 * _field(rng, shape, 45.0)
    inside = full > np.quantile(full, 1 - share)
    away = ndimage.distance_transform_edt(inside) - ndimage.distance_transform_edt(~inside)
    return np.asarray(ndimage.gaussian_filter(away * GRID_UM, 1.0), np.float32)


def _scatter(
    rng: np.random.Generator,
    where: NDArray[np.bool_],
    count: int,
    taken: dict[tuple[int, int], list[tuple[float, float]]],
    extent_um: F64,
) -> F64:
    """Draw up to `count` places (x, y) in µm on the map's true cells, `_ALONE_UM` from all in `taken`."""
    spots = np.argwhere(where)[:, ::-1]
    out: list[tuple[float, float]] = []
    for spot in rng.permutation(spots)[: 40 * count]:
        if len(out) == count:
            break
        x, y = (spot + rng.uniform(0, 1, 2)) * GRID_UM
        home = int(x // _ALONE_UM), int(y // _ALONE_UM)
        around = itertools.product((-1, 0, 1), repeat=2)
        near = (p for dx, dy in around for p in taken.get((home[0] + dx, home[1] + dy), ()))
        inside = min(x, y, extent_um[0] - x, extent_um[1] - y) > OBJECT_UM
        if inside and all(math.hypot(x - px, y - py) >= _ALONE_UM for px, py in near):
            taken.setdefault(home, []).append((x, y))
            out.append((x, y))
    return np.array(out, np.float64).reshape(-1, 2)


def interpolate(field: F32, y_um: F64, x_um: F64) -> F32:
    """Interpolate a map at the outer product of two coordinate lists (µm); float32 (len(y), len(x))."""
    edges = []
    for at_um, n in ((y_um, field.shape[0]), (x_um, field.shape[1])):
        at = np.clip(at_um / GRID_UM - 0.5, 0, n - 1)
        low = np.minimum(at.astype(np.intp), n - 2)
        edges.append((low, (at - low).astype(np.float32)))
    (iy, ty), (ix, tx) = edges
    first, last = int(ix[0]), int(ix[-1]) + 2
    part = field[:, first:last]
    rows = part[iy] + (part[iy + 1] - part[iy]) * ty[:, None]
    left = rows[:, ix - first]
    return np.asarray(left + (rows[:, ix - first + 1] - left) * tx, np.float32)
