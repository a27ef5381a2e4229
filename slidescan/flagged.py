"""What a person looks at first: ranked regions of detections.

A pure function of stitched detections in level-0 px, deterministic, and independent of the map's resolution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from itertools import product

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.spatial import ConvexHull, cKDTree

from slidescan.detections import Detections
from slidescan.geometry import Box, Frame

__all__ = ["MOST_CERTAIN", "FlaggedRegion", "flag_regions"]

# A score of 1 would be infinite evidence; 1e-6 is finer than any calibration can tell.
MOST_CERTAIN = 1 - 1e-6
_NEAREST = 8  # neighbours by which most of what is linked is seen to be
_CELLS_APART = 2  # cells of reach / √2: points farther than that apart are out of reach


@dataclass(frozen=True, slots=True, eq=False)
class FlaggedRegion:
    """A cluster of detections worth looking at.

    `evidence` is -Σ ln(1 - score): for calibrated scores, how unlikely it is (in nats) that none of them is real.
    """

    rank: int
    label: str
    polygon_l0: NDArray[np.float64]
    """Convex outline with margin, (N, 2) level-0 px, not closed."""
    n: int
    peak: float
    mean: float
    evidence: float
    area_mm2: float
    peak_box_l0: Box
    """The detection of highest score."""
    n_label: int = 0
    """Those of its detections that are of `label`, which has most evidence."""
    rows: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp), repr=False)
    """Of the detections at or above the threshold, those in it: outlines overlap, and each detection is of one."""

    @property
    def box_l0(self) -> Box:
        """Bounding box of the outline, level-0 px."""
        (x0, y0), (x1, y1) = self.polygon_l0.min(0).tolist(), self.polygon_l0.max(0).tolist()
        return Box(x0, y0, x1, y1)


def flag_regions(
    detections: Detections,
    frame: Frame,
    classes: tuple[str, ...],
    *,
    threshold: float,
    link_um: float,
    max_um: float,
    margin_um: float,
) -> tuple[FlaggedRegion, ...]:
    """Cluster detections and rank the clusters by evidence.

    Detections at or above `threshold` whose centres lie within `link_um` of each other share a region (transitively); a
    region wider than `max_um` is halved at the median until it is not.

    Parameters
    ----------
    detections : Detections
        Level-0 px.
    frame : Frame
        Level 0 of the slide.
    classes : tuple of str
        A region is named after the class with most evidence in it.

    Returns
    -------
    tuple of FlaggedRegion
        By falling evidence; `rank` starts at 1.

    Examples
    --------
    >>> pair = Detections.build([[0, 0, 50, 50], [100, 0, 150, 50], [9000, 0, 9050, 50]], [0.9, 0.8, 0.7])
    >>> settings = dict(threshold=0.5, link_um=100.0, max_um=1000.0, margin_um=15.0)
    >>> [(r.rank, r.n) for r in flag_regions(pair, Frame((10000, 100), 0.25), ("mitotic figure",), **settings)]
    [(1, 2), (2, 1)]
    """
    found = detections[detections.score >= threshold]
    if not len(found):
        return ()
    centers, corners = found.centers, _corners(found, frame, margin_um)
    cluster = _linked(centers, frame.px(link_um))
    order = np.argsort(cluster, kind="stable")
    members = np.split(order, np.flatnonzero(np.diff(cluster[order])) + 1)
    regions = [
        _region(found, rows, corners, frame, classes)
        for whole in members
        for rows in _halved(whole, centers, frame.px(max_um))
    ]
    regions.sort(key=lambda r: (-r.evidence, r.box_l0))
    return tuple(replace(region, rank=rank) for rank, region in enumerate(regions, 1))


def _linked(xy: NDArray[np.float64], reach: float) -> NDArray[np.intp]:
    """Return the cluster of each point: those within `reach` of each other share one, transitively.

    Not from all pairs, of which half a million nuclei have forty million. In a cell whose diagonal is `reach` all are
    linked; nearest neighbours link most cells that touch; and only around cells near one of another cluster are pairs
    listed.
    """
    cell = np.floor((xy - xy.min(0)) / (reach / math.sqrt(2))).astype(np.int64) + _CELLS_APART
    stride = int(cell[:, 0].max()) + 2 * _CELLS_APART  # offsets never reach into another row
    key = cell[:, 1] * stride + cell[:, 0]
    order = np.argsort(key, kind="stable")
    along = np.stack((order[:-1], order[1:]), 1)[key[order[:-1]] == key[order[1:]]]
    k = min(_NEAREST, len(xy))
    _, near = cKDTree(xy).query(xy, k=range(1, k + 1), distance_upper_bound=reach)
    rows = np.repeat(np.arange(len(xy)), k)
    nearest = np.stack((rows, near.ravel()), 1)[near.ravel() < len(xy)]
    links = np.concatenate((along, nearest))
    cluster = _components(links, len(xy))
    cells, first = np.unique(key, return_index=True)
    of_cell, open_ = cluster[first], np.zeros(len(cells), bool)
    for dx, dy in product(range(-_CELLS_APART, _CELLS_APART + 1), repeat=2):
        at = np.minimum(np.searchsorted(cells, cells + dy * stride + dx), len(cells) - 1)
        open_ |= (cells[at] == cells + dy * stride + dx) & (of_cell[at] != of_cell)
    left = np.flatnonzero(open_[np.searchsorted(cells, key)])
    if len(left):
        pairs = left[cKDTree(xy[left]).query_pairs(reach, output_type="ndarray")]
        cluster = _components(np.concatenate((links, pairs)), len(xy))
    return cluster


def _components(links: NDArray[np.intp], n: int) -> NDArray[np.intp]:
    graph = coo_array((np.ones(len(links), np.int8), (links[:, 0], links[:, 1])), shape=(n, n))
    found: NDArray[np.intp] = connected_components(graph, directed=False)[1]
    return found


def _halved(rows: NDArray[np.intp], centers: NDArray[np.float64], max_px: float) -> list[NDArray[np.intp]]:
    """Cut a cluster at the median of its longer axis until no part is wider than `max_px`."""
    if len(rows) == 1:
        return [rows]
    todo, parts = [rows], []
    while todo:
        part = todo.pop()
        extent = np.ptp(centers[part], axis=0)
        if extent.max() <= max_px:
            parts.append(part)
            continue
        along = part[np.argsort(centers[part, int(extent.argmax())], kind="stable")]
        todo += [along[: len(along) // 2], along[len(along) // 2 :]]
    return parts


def _corners(found: Detections, frame: Frame, margin_um: float) -> NDArray[np.float64]:
    """Return (4, N, 2) corners of the boxes grown by the margin, no farther than the slide."""
    margin = frame.px(margin_um)
    grown = found.xyxy + np.array([-margin, -margin, margin, margin])
    corners = np.stack([grown[:, [0, 1]], grown[:, [2, 1]], grown[:, [2, 3]], grown[:, [0, 3]]])
    inside: NDArray[np.float64] = np.clip(corners, 0, frame.size_wh)
    return inside


def _region(
    found: Detections, rows: NDArray[np.intp], corners: NDArray[np.float64], frame: Frame, classes: tuple[str, ...]
) -> FlaggedRegion:
    """Describe one cluster; its rank is not yet known."""
    polygon_l0, area_px = _outline(corners[:, rows].reshape(-1, 2))
    found = found[rows]
    # float64 and sorted: the sum must not depend on the order of the rows
    order = np.argsort(found.score, kind="stable")
    scores = found.score[order].astype(np.float64)
    nats = -np.log1p(-np.minimum(scores, MOST_CERTAIN))
    evidence, label = nats.sum(), int(np.bincount(found.label[order], nats).argmax())
    return FlaggedRegion(
        rank=0,
        label=classes[label],
        polygon_l0=polygon_l0,
        n=len(found),
        peak=float(scores[-1]),
        mean=float(scores.mean()),
        evidence=float(evidence),
        area_mm2=area_px * frame.mm2_per_px,
        peak_box_l0=Box(*found.xyxy[int(np.lexsort((*found.xyxy.T, -found.score))[0])].tolist()),
        n_label=int((found.label == label).sum()),
        rows=np.sort(rows),
    )


def _outline(corners: NDArray[np.float64]) -> tuple[NDArray[np.float64], float]:
    """Return the convex outline of boxes' corners and its area in px²; of one box its four corners, as they come."""
    if len(corners) > 4:
        hull = ConvexHull(corners)
        return corners[hull.vertices], float(hull.volume)  # scipy calls a polygon's area its volume
    (x0, y0), _, (x1, y1), _ = corners.tolist()
    return corners, (x1 - x0) * (y1 - y0)
