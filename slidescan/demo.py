"""The demonstration: a phantom with figures on every kind of seam, and how what was found compares with them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import ResultError
from slidescan.geometry import Frame
from slidescan.phantom import Phantom, write_phantom
from slidescan.plan import Grid
from slidescan.prepare import halo_px
from slidescan.region import disk_error
from slidescan.result import ScanResult

__all__ = ["Comparison", "compare", "match", "seam_phantom", "write"]

# µm within which a detection is a figure's: the radius of the MIDOG challenges.
MATCH_UM = 7.5
_MPP = 0.25


@dataclass(frozen=True, slots=True)
class Comparison:
    """Counts of planted figures, of those found, and of detections that are no figure."""

    planted: int
    found: int
    extra: int
    planted_on_seams: int
    found_on_seams: int


def seam_phantom(detector: Detector, config: ScanConfig, *, size_px: int, seed: int) -> Phantom:
    """Return a phantom with figures exactly on tile and region edges and their crossings, and many elsewhere."""
    frame = Frame((size_px, size_px), _MPP)
    variant = detector.at(frame.mpp)
    tile_px = config.tiling.tile_px or variant.input_px
    layout = config.tiling
    grid = Grid(frame, tile_px, halo_px(variant, frame, tile_px, config), layout.shift_px)
    region_px = max(1, config.tiling.region_px // grid.core_px) * grid.core_px
    middle = size_px // 2 // region_px * region_px or region_px
    tile_edge, half = middle + grid.core_px, grid.core_px // 2
    plant = (
        (middle, middle),
        (middle, middle + half),
        (middle + half, middle),
        (tile_edge, tile_edge),
        (tile_edge, middle + half),
        (middle + half, tile_edge),
        (middle, tile_edge),
        (tile_edge, middle),
    )
    inside = tuple((float(x), float(y)) for x, y in plant if max(x, y) < size_px - 100)
    figures = round(size_px * size_px * 4e-7)
    return Phantom((size_px, size_px), _MPP, seed, figures, inside, n_look_alikes=2 * figures)


def write(path: Path, phantom: Phantom) -> float:
    """Write the phantom slide and return the seconds it took."""
    started = time.perf_counter()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_phantom(path, phantom)
    except OSError as exc:
        if isinstance(exc, ResultError):
            raise
        raise disk_error(path, exc) from exc
    return time.perf_counter() - started


def match(found: NDArray[np.float64], truth: NDArray[np.float64], radius: float) -> NDArray[np.bool_]:
    """Return which rows of `truth` have a partner in `found` within `radius`, one to one, as many as possible.

    Examples
    --------
    >>> match(np.array([[0.0, 0.0]]), np.array([[1.0, 0.0], [0.0, 2.0]]), radius=3.0)
    array([ True, False])
    """
    matched = np.zeros(len(truth), bool)
    if len(found) and len(truth):
        distance = cdist(truth, found)
        rows, columns = linear_sum_assignment(np.where(distance <= radius, distance, 1e6))
        matched[rows[distance[rows, columns] <= radius]] = True
    return matched


def compare(result: ScanResult, phantom: Phantom) -> Comparison:
    """Compare what a scan found with what the phantom holds."""
    truth = phantom.truth
    hit = match(result.found.centers, truth.centers, result.frame.px(MATCH_UM))
    seams = len(phantom.plant_l0)
    return Comparison(len(truth), int(hit.sum()), len(result.found) - int(hit.sum()), seams, int(hit[:seams].sum()))
