"""The demonstration: a phantom with figures on every kind of seam, and how what was found compares with them."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from slidescan.commit import disk_error
from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import ResultError
from slidescan.geometry import Frame
from slidescan.phantom import Phantom, write_phantom
from slidescan.plan import Grid
from slidescan.prepare import halo_px
from slidescan.result import ScanResult
from slidescan.train.metrics import RADIUS_UM, match

__all__ = ["Comparison", "compare", "seam_phantom", "write"]

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


def compare(result: ScanResult, phantom: Phantom) -> Comparison:
    """Compare what a scan found with what the phantom holds."""
    truth = phantom.truth
    pairs = match(result.found.centers, truth.centers, result.frame.px(RADIUS_UM))
    seams = len(phantom.plant_l0)
    on_seams = int((pairs[:, 1] < seams).sum())
    return Comparison(len(truth), len(pairs), len(result.found) - len(pairs), seams, on_seams)
