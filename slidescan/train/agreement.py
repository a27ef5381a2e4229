"""Grid-shift agreement: what of a result depends on where the tiles happened to lie.

A slide is scanned, then scanned again with the origin of its pixels, and so the grid of tiles, moved by random offsets.
What changes then was decided by the grid and not by the tissue.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from slidescan.config import ScanConfig
from slidescan.detect.model import Model
from slidescan.detections import Detections
from slidescan.scan_slide import scan
from slidescan.slides import memory_slide
from slidescan.train.augment import Rgb

__all__ = ["Agreement", "grid_shift_agreement"]

_NEAR_PX, _NEAR_SCORE = 2.0, 0.05  # within which a detection counts as the same
_LEAST_SCORE = 0.05


@dataclass(frozen=True, slots=True)
class Agreement:
    """How many detections of one grid another grid repeats.

    Parameters
    ----------
    compared : int
        Detections above the threshold, over all shifts, that both grids could see whole.
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
    image: Rgb, detector: Model, *, shifts: int = 8, seed: int = 0, tile_px: int | None = None
) -> Agreement:
    """Scan an image on its own grid and on shifted ones, and compare.

    Parameters
    ----------
    image : ndarray of uint8, shape (H, W, 3)
        At the detector's µm/px.
    detector : Model
    shifts : int
        How many; each by a random offset of up to a tile in x and y.
    seed : int
    tile_px : int, optional
        Edge of the tiles; default: the detector's own.

    Returns
    -------
    Agreement
        In px of `image`. Detections within a tile's overlap of the border that moves are left out.
    """
    rng = np.random.default_rng(seed)
    edge = tile_px or detector.input_px
    base = _scanned(image, detector, edge)
    reach = 2 * detector.object_um / detector.mpp  # what a border may change, px
    distances, changes, same, compared = [np.empty(0)], [np.empty(0)], 0, 0
    for dx, dy in rng.integers(1, edge, (shifts, 2)).tolist():
        again = _scanned(np.ascontiguousarray(image[dy:, dx:]), detector, edge).moved(1.0, dx, dy)
        centres = base.centers
        asked = base[(base.score >= detector.threshold) & (centres >= (dx + reach, dy + reach)).all(1)]
        compared += len(asked)
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


def _scanned(image: NDArray[np.uint8], detector: Model, tile_px: int) -> Detections:
    settings = {
        "tissue.enabled": False,
        "tiling.tile_px": tile_px,
        "detect.min_score": min(_LEAST_SCORE, detector.threshold),
    }
    return scan(memory_slide(image, detector.mpp), detector, config=ScanConfig.load({}, settings)).detections
