"""Precision, recall and false detections per area as the threshold falls, from detections judged one by one.

Hides sorting, equal scores and weights: a resampling of images is the same judged table with other weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

__all__ = ["Curve", "Judged"]


@dataclass(frozen=True, slots=True, eq=False)
class Curve:
    """What happens over all images as the threshold falls.

    Parameters
    ----------
    score : ndarray of float64, shape (n,)
        Falling, each once: the thresholds at which something changes.
    found, false : ndarray of int64, shape (n,)
        How many are right and wrong at or above each.
    truths : int
    mm2 : float
        Area of the images, mm².
    """

    score: NDArray[np.float64]
    found: NDArray[np.int64]
    false: NDArray[np.int64]
    truths: int
    mm2: float

    @property
    def precision(self) -> NDArray[np.float64]:
        """Share of the detections that are right; 1 without any."""
        total = self.found + self.false
        share = np.ones(len(total))
        np.divide(self.found, total, out=share, where=total > 0)
        return share

    @property
    def recall(self) -> NDArray[np.float64]:
        """Share of the truths that were found; 1 without any."""
        return self.found / self.truths if self.truths else np.ones(len(self.found))

    @property
    def false_per_mm2(self) -> NDArray[np.float64]:
        """False detections per mm²; 0 without an area, where nothing counts."""
        return self.false / self.mm2 if self.mm2 else np.zeros(len(self.false))

    @property
    def average_precision(self) -> float:
        """Area under precision over recall."""
        if self.truths == 0:
            return 0.0 if self.false.any() else 1.0
        # At each recall the best precision to the right of it: the curve without its saw teeth.
        envelope = np.maximum.accumulate(self.precision[::-1])[::-1]
        return float(np.diff(self.found, prepend=0) @ envelope) / self.truths

    def recall_at(self, false_per_mm2: float) -> float:
        """Return the highest recall with at most so many false detections per mm²; above every score it is 0."""
        # Areas are sums of floats: a hair of slack keeps "1 false in 1 mm²" within "1 per mm²".
        allowed = self.false_per_mm2 <= false_per_mm2 * (1 + 1e-9)
        return float(self.recall[allowed].max(initial=0.0)) if self.truths else 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Judged:
    """The detections that count, of all images, by falling score.

    Parameters
    ----------
    score : ndarray of float64, shape (n,)
    right : ndarray of bool, shape (n,)
    image : ndarray of int, shape (n,)
        Index of the image each is in.
    truths : ndarray of int64, shape (images,)
        How many truths count in each image.
    mm2 : ndarray of float64, shape (images,)
    """

    score: NDArray[np.float64]
    right: NDArray[np.bool_]
    image: NDArray[np.intp]
    truths: NDArray[np.int64]
    mm2: NDArray[np.float64]

    def curve(self, weights: NDArray[np.int64] | None = None) -> Curve:
        """Return the curve with every image taken `weights` times (default: once)."""
        times = np.ones(len(self.truths), np.int64) if weights is None else weights
        each = times[self.image]
        last = np.append(self.score[1:] != self.score[:-1], True)[: len(self.score)]  # of equal scores
        found, total = np.cumsum(each * self.right)[last], np.cumsum(each)[last]
        return Curve(self.score[last], found, total - found, int(times @ self.truths), float(times @ self.mm2))
