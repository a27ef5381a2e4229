"""Grid-shift agreement: what of a result depends on where the tiles happened to lie.

A slide is scanned, then scanned again with the grid of tiles moved by random offsets (of whole 32 px: no grid lies
otherwise). What changes then was decided by the grid and not by the tissue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from slidescan.config import ScanConfig
from slidescan.detections import Detections, Detector
from slidescan.scan_slide import scan
from slidescan.slides import Slide

__all__ = ["Agreement", "grid_shift_agreement"]

_NEAR_PX, _NEAR_SCORE = 2.0, 0.05  # within which a detection counts as the same
_LEAST_SCORE = 0.05


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many detections of one grid another grid repeats.

    Parameters
    ----------
    compared : int
        Detections above the threshold, over all shifts.
    same : int
        Those that came back within 2 px and 0.05 of the score.
    moved_px, changed_score : float
        95th percentiles over those that came back within 20 px at any score; NaN without any.
    """

    compared: int
    same: int
    moved_px: float
    changed_score: float

    @property
    def share(self) -> float:
        """Share that came back; 1 where there was nothing to compare."""
        return self.same / self.compared if self.compared else 1.0


def grid_shift_agreement(
    slide: Slide, detector: Detector, *, shifts: int = 8, seed: int = 0, mask: bool = False
) -> Agreement:
    """Scan a slide on its own grid and on shifted ones, and compare.

    Parameters
    ----------
    slide : Slide
    detector : Detector
    shifts : int
        How many; each by a random offset of up to a tile in x and y.
    seed : int
    mask : bool
        Scan tissue only; else all of it, as for a field that is tissue all over.

    Returns
    -------
    Agreement
        Distances in level-0 px of `slide`.
    """
    rng = np.random.default_rng(seed)
    variant = detector.at(slide.frame.mpp, allow_coarse=True)
    base = _scanned(slide, variant, (0, 0), mask)
    asked = base[base.score >= variant.threshold]
    distances, changes, same, compared = [np.empty(0)], [np.empty(0)], 0, 0
    for dx, dy in (32 * rng.integers(1, max(2, variant.input_px // 32), (shifts, 2))).tolist():
        compared += len(asked)
        again = _scanned(slide, variant, (dx, dy), mask)
        if not len(asked) or not len(again):
            continue
        distance, row = cKDTree(again.centers).query(asked.centers)
        change = np.abs(again.score[row] - asked.score)
        same += int(((distance <= _NEAR_PX) & (change <= _NEAR_SCORE)).sum())
        found = distance <= 10 * _NEAR_PX
        distances.append(distance[found])
        changes.append(change[found])
    moved, changed = np.concatenate(distances), np.concatenate(changes)
    return Agreement(
        compared,
        same,
        float(np.percentile(moved, 95)) if len(moved) else float("nan"),
        float(np.percentile(changed, 95)) if len(changed) else float("nan"),
    )


def _scanned(slide: Slide, detector: Detector, shift_px: tuple[int, int], mask: bool) -> Detections:
    settings = {
        "tissue.enabled": mask,
        "tiling.shift_px": list(shift_px),
        "detect.min_score": min(_LEAST_SCORE, detector.threshold),
    }
    return scan(slide, detector, config=ScanConfig.load({}, settings)).detections
