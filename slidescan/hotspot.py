"""The mitotic hotspot: of all squares of one size the one that holds the most detections, exactly.

A sweep over the detections whose cost grows with how many lie beside each other, not with how many squares come near
the best: half a million nuclei, spread evenly over a slide, take seconds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidescan.detections import Detections
from slidescan.geometry import Box, Frame

__all__ = ["Hotspot", "mitotic_hotspot"]

# Of the histogram that tells where the best square may be: 2 million cells take some 100 MB, and a slide of 60 x 25 mm
# would have 3 million.
_CELLS_PER_SIDE, _MOST_CELLS = 64, 2_000_000


@dataclass(frozen=True, slots=True)
class Hotspot:
    """The square window with most figures."""

    box_l0: Box
    count: int
    area_mm2: float
    """Area of the window inside the slide, mm²."""


def mitotic_hotspot(detections: Detections, frame: Frame, *, threshold: float, area_mm2: float) -> Hotspot | None:
    """Find the axis-parallel square of `area_mm2` that holds the most detections, exactly.

    Counted are detections at or above `threshold` by their centre. A slide smaller than the square is counted whole;
    None without detections. Ties are broken by a fixed rule.

    Notes
    -----
    Some best square has a detection on its left and one on its upper side.

    Examples
    --------
    >>> d = Detections.build([[0, 0, 2, 2], [10, 10, 12, 12], [5000, 0, 5002, 2]], [0.9, 0.9, 0.9])
    >>> mitotic_hotspot(d, Frame((8000, 8000), 0.25), threshold=0.5, area_mm2=0.01).count
    2
    """
    xy = detections.centers[detections.score >= threshold]
    if not len(xy):
        return None
    side = math.sqrt(area_mm2) * 1000 / frame.mpp
    count, corner = _fullest_square(_promising(xy, side), side)
    # Slid back inside, the square still holds all it held: nothing lies beyond the slide's edge.
    x0, y0 = (max(0.0, min(v, size - side)) for v, size in zip(corner, frame.size_wh, strict=True))
    box = Box(x0, y0, x0 + side, y0 + side).clip(frame.bounds)
    return Hotspot(box, count, box.area * frame.mm2_per_px)


def _promising(xy: NDArray[np.float64], side: float) -> NDArray[np.float64]:
    """Leave out points that no best square can hold, by a histogram."""
    sides = xy.max(0) / side + 2
    if sides.prod() > _MOST_CELLS:  # so small a square holds few
        return xy
    per_side = int(min(_CELLS_PER_SIDE, max(1.0, math.sqrt(_MOST_CELLS / (sides[0] * sides[1])))))
    cell = side / per_side
    column, row = np.floor(xy / cell).astype(np.intp).T
    histogram = np.zeros((row.max() + 1, column.max() + 1), np.int64)
    np.add.at(histogram, (row, column), 1)
    aligned = _sums(histogram, per_side)
    top, left = (cell * n for n in divmod(int(aligned.argmax()), aligned.shape[1]))
    at_least = int(((xy >= (left, top)) & (xy <= (left + side, top + side))).all(1).sum())
    # A square whose corner is in a cell reaches over one more than it has on a side, and by rounding into another.
    reach = per_side + 2
    hopeful = _sums(histogram, reach) >= at_least
    held = _sums(hopeful[::-1, ::-1].astype(np.int64), reach)[::-1, ::-1] > 0
    promising: NDArray[np.float64] = xy[held[row, column]]
    return promising


def _sums(counts: NDArray[np.int64], n: int) -> NDArray[np.int64]:
    """Return for each cell the sum of the n × n cells that begin with it."""
    rows, columns = counts.shape
    down = np.pad(counts, ((1, n), (0, 0))).cumsum(0)
    along = np.pad(down[n : n + rows] - down[:rows], ((0, 0), (1, n))).cumsum(1)
    sums: NDArray[np.int64] = along[:, n : n + columns] - along[:, :columns]
    return sums


def _fullest_square(xy: NDArray[np.float64], side: float) -> tuple[int, tuple[float, float]]:
    """Return the highest count and the upper left corner (x, y) of a square that has it.

    The left side goes from point to point; for each y of a point it is counted how many of those that a square holds
    from left to right a square would that begins there. Where none came in, no count is higher than before.
    """
    xy = xy[np.lexsort((xy[:, 1], xy[:, 0]))]
    x, y = xy.T
    tops = np.unique(y)
    first = np.searchsorted(tops + side, y, "left").tolist()
    last = np.searchsorted(tops, y, "right").tolist()
    ends = np.searchsorted(x, x + side, "right").tolist()
    counts = np.zeros(len(tops), np.int32)
    best, corner, held_from, held_to = 0, (0.0, 0.0), 0, 0
    for begin in np.flatnonzero(np.diff(x, prepend=-np.inf)).tolist():
        for i in range(held_from, begin):
            counts[first[i] : last[i]] -= 1
        new = range(held_to, ends[begin])
        for i in new:
            counts[first[i] : last[i]] += 1
        for i in new:
            count = int(counts[first[i] : last[i]].max())
            if count > best:
                top = first[i] + int(counts[first[i] : last[i]].argmax())
                best, corner = count, (float(x[begin]), float(tops[top]))
        held_from, held_to = begin, ends[begin]
    return best, corner
