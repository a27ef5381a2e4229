"""The anomaly map: score, density per mm² and coverage on one georeferenced grid.

Coverage is data: each map pixel says whether it was analysed, and a pixel that was not has no score (NaN), so that
"nothing there" and "never looked" never look alike. Nothing is scaled per slide: a value means the same on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter

from slidescan.detections import Detections
from slidescan.geometry import Box, Frame
from slidescan.plan import Grid

__all__ = ["MOST_DENSITY_STEPS", "TISSUE", "AnomalyMap", "Coverage", "anomaly_map", "coarser", "coverage_map"]

# Stored steps: score in 1e-4, density in 0.1 per mm², or ten times as much as often as 16 bit are too few; 0 is "not
# evaluated", so values start at 1.
_SCORE_STEPS = 10_000
MOST_DENSITY_STEPS = 10.0
_LARGEST = 65_535
# Of the Gaussian that density is averaged by, analysed: of a fragment 50 µm wide with one of 200 µm.
_LEAST_SHARE = 0.1

_Px = TypeVar("_Px", bound=np.generic)


class Coverage(IntEnum):
    """State of a map pixel; the higher, the more it needs to be told, so a pyramid keeps the maximum."""

    OUTSIDE = 0
    BACKGROUND = 1
    ANALYSED = 2
    SATURATED = 3
    """Analysed, but the detector ran out of queries there even on smaller tiles: figures may be missing."""
    READ_FAILED = 4


TISSUE = (Coverage.ANALYSED, Coverage.SATURATED, Coverage.READ_FAILED)  # what was to be analysed


@dataclass(frozen=True, slots=True, eq=False)
class AnomalyMap:
    """Score, density and coverage of a slide; arrays are (rows, columns) of `frame`.

    Parameters
    ----------
    frame : Frame
        The map's plane: `frame.mpp` is µm per map pixel, its corner is the slide's corner.
    score : ndarray of float32
        Highest detection score whose box touches the pixel; 0 where analysed and empty, NaN where not analysed.
    density : ndarray of float32
        Detections at or above the threshold per mm² of analysed area, Gaussian-averaged; NaN where not analysed.
    coverage : ndarray of uint8
        A `Coverage` value per pixel.
    """

    frame: Frame
    score: NDArray[np.float32]
    density: NDArray[np.float32]
    coverage: NDArray[np.uint8]

    def area_mm2(self, *states: Coverage) -> float:
        """Return the area in one of `states`, mm²."""
        n_px = sum(int(np.count_nonzero(self.coverage == state)) for state in states)  # isin takes 8 bytes a px
        return n_px * self.frame.mm2_per_px

    @property
    def tissue_mm2(self) -> float:
        """Area that was to be analysed, mm²."""
        return self.area_mm2(*TISSUE)

    @property
    def analysed_fraction(self) -> float:
        """Share of the tissue that was analysed; NaN where there was no tissue."""
        tissue = self.tissue_mm2
        return self.area_mm2(Coverage.ANALYSED, Coverage.SATURATED) / tissue if tissue else float("nan")

    @property
    def density_steps_per_mm2(self) -> float:
        """How many steps of the density `encode` stores per unit: 10, or fewer where nuclei are counted."""
        highest, steps = float(np.nan_to_num(self.density).max(initial=0.0)), MOST_DENSITY_STEPS
        while 1 + round(highest * steps) > _LARGEST:
            steps /= 10
        return steps

    def fitted(self, most_px: int) -> AnomalyMap:
        """Return the map for a picture of `most_px` a side at most: a px is the highest of those in its place."""
        n = -(-max(self.coverage.shape) // most_px)
        if n <= 1:
            return self
        score, density, coverage = coarser(self.score, n), coarser(self.density, n), coarser(self.coverage, n)
        return AnomalyMap(Frame(coverage.shape[::-1], self.frame.mpp * n), score, density, coverage)

    def encode(self) -> NDArray[np.uint16]:
        """Pack into (score, density, coverage) planes of uint16; 0 means not evaluated."""
        seen = np.isfinite(self.score)
        score = np.where(seen, 1 + np.round(np.nan_to_num(self.score) * _SCORE_STEPS), 0)
        density = np.where(seen, 1 + np.round(np.nan_to_num(self.density) * self.density_steps_per_mm2), 0)
        return np.stack([score, density, self.coverage]).astype(np.uint16)

    @classmethod
    def decode(
        cls, planes: NDArray[np.uint16], frame: Frame, density_steps_per_mm2: float = MOST_DENSITY_STEPS
    ) -> AnomalyMap:
        """Unpack what `encode` made, to within half a stored step."""
        raw_score, raw_density, coverage = planes
        seen = raw_score > 0
        score = np.where(seen, (raw_score.astype(np.float32) - 1) / _SCORE_STEPS, np.nan)
        density = np.where(seen, (raw_density.astype(np.float32) - 1) / density_steps_per_mm2, np.nan)
        return cls(frame, score.astype(np.float32), density.astype(np.float32), coverage.astype(np.uint8))

    @staticmethod
    def pyramid(planes: NDArray[np.uint16], smallest_px: int = 256) -> list[NDArray[np.uint16]]:
        """Return `planes` and halved copies down to `smallest_px`.

        Score and coverage keep the maximum, so that one hot or failed pixel is never averaged away; density is the mean
        of the evaluated pixels.
        """
        levels = [planes]
        while max(levels[-1].shape[1:]) > smallest_px:
            above = levels[-1]
            padded = np.pad(above, ((0, 0), (0, above.shape[1] % 2), (0, above.shape[2] % 2)))
            blocks = np.stack([padded[:, r::2, c::2] for r in (0, 1) for c in (0, 1)])
            halved = blocks.max(0)
            evaluated = np.maximum((blocks[:, 1] > 0).sum(0), 1)
            halved[1] = np.round(blocks[:, 1].astype(np.float64).sum(0) / evaluated)
            levels.append(halved)
        return levels


def coarser(plane: NDArray[_Px], n: int) -> NDArray[_Px]:
    """Return the highest value of each n × n px: one hot or unread pixel must not get lost; NaN is none.

    Examples
    --------
    >>> coarser(np.array([[1, 2, 3], [4, 5, 6]]), 2).tolist()
    [[5, 6]]
    """
    for axis, side in enumerate(plane.shape if n > 1 else ()):
        plane = np.fmax.reduceat(plane, np.arange(0, side, n), axis=axis)
    return plane


def coverage_map(
    frame: Frame,
    grid: Grid,
    has_tissue: NDArray[np.bool_],
    failed: list[Box],
    saturated: list[Box],
    tissue: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Return a `Coverage` value for each pixel of the map plane `frame`.

    Parameters
    ----------
    frame : Frame
        The map's plane.
    grid, has_tissue : Grid, ndarray of bool
        The scan's tile grid and which of its tiles were scored.
    failed, saturated : list of Box
        In px of the grid's plane; every map pixel they touch takes that state.
    tissue : ndarray of bool, optional
        Mask stretched over the plane: glass that a scored tile also saw is background, and dilutes no density. A map
        pixel is what is at its centre, so that areas are neither too large nor too small.
    """
    factor = grid.plane.factor_to(frame)
    width, height = frame.size_wh
    column = _tile_index(width, factor, grid.origin[0], grid.core_px, has_tissue.shape[1])
    row = _tile_index(height, factor, grid.origin[1], grid.core_px, has_tissue.shape[0])
    coverage = np.where(has_tissue[np.ix_(row, column)], Coverage.ANALYSED, Coverage.BACKGROUND).astype(np.uint8)
    if tissue is not None:
        sides = zip(coverage.shape, tissue.shape, grid.plane.size_wh[::-1], strict=True)
        # Of a slide narrower than that, what is in its middle.
        middles = [((np.arange(n) + min(0.5, px * factor / 2)) / factor / px, of) for n, of, px in sides]
        at = [np.floor(share * of).clip(0, of).astype(np.intp) for share, of in middles]
        coverage[~np.pad(tissue, ((0, 1), (0, 1)))[np.ix_(*at)]] = Coverage.BACKGROUND  # and what is beyond the slide
    for boxes, state in ((saturated, Coverage.SATURATED), (failed, Coverage.READ_FAILED)):
        for box in boxes:
            x0, y0, x1, y1 = box.scale(factor).clip(frame.bounds).round_out()
            inside = coverage[y0:y1, x0:x1]
            # A hole in the glass beside the tissue was never to be analysed.
            inside[inside != Coverage.BACKGROUND] = state
    return coverage


def _tile_index(n_px: int, factor: float, origin: int, core_px: int, n_tiles: int) -> NDArray[np.intp]:
    """Return, per map pixel along one axis, the tile whose core holds the pixel's centre."""
    center_m = (np.arange(n_px) + 0.5) / factor
    return np.clip(np.floor((center_m - origin) / core_px), 0, n_tiles - 1).astype(np.intp)


def anomaly_map(
    detections: Detections,
    slide: Frame,
    coverage: NDArray[np.uint8],
    frame: Frame,
    *,
    threshold: float,
    density_sigma_um: float,
) -> AnomalyMap:
    """Lay stitched detections onto the map plane.

    Parameters
    ----------
    detections : Detections
        Level-0 px.
    slide, frame : Frame
        Level 0 and the map's plane.
    coverage : ndarray of uint8
        From `coverage_map`, on `frame`.
    threshold : float
        Score from which a detection counts in the density.
    density_sigma_um : float
        Standard deviation of the averaging Gaussian, µm.

    Examples
    --------
    >>> slide, frame = Frame((640, 640), 0.25), Frame((10, 10), 16.0)
    >>> seen = np.full((10, 10), Coverage.ANALYSED, np.uint8)
    >>> one = Detections.build([[70, 70, 120, 120]], [0.8])
    >>> m = anomaly_map(one, slide, seen, frame, threshold=0.5, density_sigma_um=200.0)
    >>> np.argwhere(m.score > 0).tolist(), round(float(m.score[1, 1]), 2)
    ([[1, 1]], 0.8)
    """
    factor = slide.factor_to(frame)
    last_wh = np.array(frame.size_wh) - 1
    column, row = np.clip(np.floor(detections.centers * factor), 0, last_wh).astype(np.intp).T
    # Where something was found has evidently been analysed, even if the mask thought it glass.
    scored, coverage = (coverage == Coverage.ANALYSED) | (coverage == Coverage.SATURATED), coverage.copy()
    found_at = coverage[row, column]
    coverage[row, column] = np.where(found_at == Coverage.BACKGROUND, Coverage.ANALYSED, found_at)
    seen = (coverage == Coverage.ANALYSED) | (coverage == Coverage.SATURATED)
    score = np.zeros(coverage.shape, np.float32)
    _paint_max(score, detections.xyxy * factor, detections.score)

    counts = np.zeros(coverage.shape)
    found = detections.score >= threshold
    np.add.at(counts, (row[found], column[found]), 1.0)
    sigma = frame.px(density_sigma_um)
    # Dividing by the equally averaged analysed area keeps borders and holes from diluting the density; a speck on glass
    # is not the densest place of all for having next to none around it.
    share = np.maximum(gaussian_filter(scored.astype(np.float64), sigma, mode="constant"), _LEAST_SHARE)
    density = gaussian_filter(counts, sigma, mode="constant") / (share * frame.mm2_per_px)

    score[~seen] = np.nan
    density[~seen] = np.nan
    return AnomalyMap(frame, score, density.astype(np.float32), coverage)


def _paint_max(score: NDArray[np.float32], xyxy: NDArray[np.float64], value: NDArray[np.float32]) -> None:
    """Raise every pixel of `score` that a box touches to at least the box's value, in place."""
    if not len(xyxy):
        return
    height, width = score.shape
    x0, y0 = np.floor(xyxy[:, :2]).astype(np.intp).T
    x1, y1 = np.ceil(xyxy[:, 2:]).astype(np.intp).T
    # Boxes are a few map pixels wide: a loop over the offsets inside a box is a loop over very few. Of the larger ones
    # there are few, and only they are looked at further on.
    for dy in range(int((y1 - y0).max())):
        tall = np.flatnonzero(y1 - y0 > dy)
        for dx in range(int((x1 - x0)[tall].max())):
            tall = tall[(x1 - x0)[tall] > dx]
            row, column = y0[tall] + dy, x0[tall] + dx
            inside = (row >= 0) & (column >= 0) & (row < height) & (column < width)
            np.maximum.at(score, (row[inside], column[inside]), value[tall[inside]])
