"""How good detections are: one-to-one matching of centres, precision, recall, F1, average precision, calibration.

Hides the bookkeeping of images. Invariants: a truth is found at most once; with a margin, what lies near an image's
border counts neither for nor against, whether truth or detection, but may still be matched with its partner inside.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize
from scipy.spatial.distance import cdist

from slidescan.detections import Detections

__all__ = [
    "RADIUS_UM",
    "Image",
    "Scores",
    "average_precision",
    "best_threshold",
    "calibrate",
    "fit_calibration",
    "match",
    "score",
]

RADIUS_UM = 7.5  # a detection this near a figure's centre has found it: the MIDOG challenges' rule


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """What was found and what is there in one image, in the same px.

    Parameters
    ----------
    found : Detections
    truth : ndarray, shape (n, 2)
        Centres x, y.
    radius : float
        Largest distance of a match, px.
    size : int
        Edge of the square image, px.
    margin : float
        Width of the border in which nothing counts, px.
    """

    found: Detections
    truth: NDArray[np.float64]
    radius: float
    size: int
    margin: float = 0.0

    def counted(self, xy: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which points lie inside the margin."""
        x, y = xy[:, 0], xy[:, 1]
        low, high = self.margin, self.size - self.margin
        return (x >= low) & (x <= high) & (y >= low) & (y <= high)


@dataclass(frozen=True, slots=True)
class Scores:
    """Counts over all images at one threshold."""

    found: int
    missed: int
    false: int

    @property
    def precision(self) -> float:
        """Share of the detections that are right; 1 without any."""
        return self.found / (self.found + self.false) if self.found + self.false else 1.0

    @property
    def recall(self) -> float:
        """Share of the truths that were found; 1 without any."""
        return self.found / (self.found + self.missed) if self.found + self.missed else 1.0

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall."""
        total = 2 * self.found + self.missed + self.false
        return 2 * self.found / total if total else 1.0


def match(found_xy: NDArray[np.float64], truth_xy: NDArray[np.float64], radius: float) -> NDArray[np.intp]:
    """Pair detections with truths within `radius`: as many pairs as possible, then the shortest.

    Parameters
    ----------
    found_xy, truth_xy : ndarray, shape (n, 2) and (m, 2)
    radius : float
        In the units of the points.

    Returns
    -------
    ndarray of int, shape (pairs, 2)
        Rows of `found_xy` and `truth_xy`.

    Examples
    --------
    >>> match(np.array([[0.0, 0.0], [3.0, 0.0]]), np.array([[2.0, 0.0], [50.0, 0.0]]), 2.5).tolist()
    [[1, 0]]
    """
    if len(found_xy) == 0 or len(truth_xy) == 0:
        return np.empty((0, 2), np.intp)
    distance = cdist(found_xy, truth_xy)
    # A pair out of reach costs more than any number of pairs within it, so the count is maximised first.
    forbidden = (min(distance.shape) + 1) * max(radius, 1e-9)
    rows, columns = linear_sum_assignment(np.where(distance <= radius, distance, forbidden))
    near = distance[rows, columns] <= radius
    return np.stack((rows[near], columns[near]), 1)


def score(images: Sequence[Image], threshold: float) -> Scores:
    """Count found, missed and false at `threshold` over all images."""
    found = missed = false = 0
    for image in images:
        kept = image.found[image.found.score >= threshold]
        pairs = match(kept.centers, image.truth, image.radius)
        true_in, kept_in = image.counted(image.truth), image.counted(kept.centers)
        hit = int(true_in[pairs[:, 1]].sum())
        found += hit
        missed += int(true_in.sum()) - hit
        kept_in[pairs[:, 0]] = False
        false += int(kept_in.sum())
    return Scores(found, missed, false)


def best_threshold(images: Sequence[Image]) -> float:
    """Return the threshold in 0.05, 0.06, … 0.95 with the best F1; the middle one of several."""
    steps = np.arange(5, 96) / 100
    f1 = np.array([score(images, float(t)).f1 for t in steps])
    best = steps[f1 >= f1.max() - 1e-9]
    return float(best[len(best) // 2])


def average_precision(images: Sequence[Image]) -> float:
    """Return the area under the precision-recall curve, detections taken by falling score over all images."""
    scores, hits, n_truth = [np.empty(0)], [np.empty(0, bool)], 0
    for image in images:
        right, counts = _outcome(image)
        scores.append(image.found.score[counts].astype(np.float64))
        hits.append(right[counts])
        n_truth += int(image.counted(image.truth).sum())
    order = np.argsort(-np.concatenate(scores), kind="stable")
    hit = np.concatenate(hits)[order]
    if n_truth == 0:
        return 1.0 if len(hit) == 0 else 0.0
    precision = np.cumsum(hit) / np.arange(1, len(hit) + 1)
    # At each recall the best precision to the right of it: the curve without its saw teeth.
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    return float(envelope[hit].sum() / n_truth)


def fit_calibration(images: Sequence[Image]) -> tuple[float, float]:
    """Return temperature and offset for which sigmoid(logit / temperature + offset) is the most likely to be right.

    Both are needed: a detector's scores are spread too little and also centred for another density of objects, and a
    temperature alone would answer the second by pushing every score to 0 or 1.
    """
    probability, right = [np.empty(0)], [np.empty(0, bool)]
    for image in images:
        hit, counts = _outcome(image)
        probability.append(image.found.score[counts].astype(np.float64))
        right.append(hit[counts])
    p = np.clip(np.concatenate(probability), 1e-6, 1 - 1e-6)
    hit = np.concatenate(right)
    if not hit.any() or hit.all():
        return 1.0, 0.0
    logit = np.log(p / (1 - p))
    sign = np.where(hit, 1.0, -1.0)

    def cost(fit: NDArray[np.float64]) -> float:
        # A weak pull to no change keeps a handful of detections from being parted perfectly by an infinite slope.
        pull = 1e-3 * ((fit[0] - 1) ** 2 + fit[1] ** 2)
        return float(np.logaddexp(0, -sign * (logit * fit[0] + fit[1])).mean() + pull)

    slope, offset = minimize(cost, (1.0, 0.0), bounds=((0.2, 5.0), (-10.0, 10.0))).x
    return round(1 / float(slope), 3), round(float(offset), 3)


def calibrate(images: Sequence[Image], temperature: float, offset: float) -> list[Image]:
    """Return the images with every score s changed to sigmoid(logit(s) / temperature + offset).

    Examples
    --------
    >>> image = Image(Detections.build([[0, 0, 2, 2]], [0.5]), np.empty((0, 2)), 1.0, 10)
    >>> calibrate([image], 1.0, 0.0)[0].found.score.tolist()
    [0.5]
    """
    changed = []
    for image in images:
        p = np.clip(image.found.score.astype(np.float64), 1e-6, 1 - 1e-6)
        score = 1 / (1 + np.exp(-(np.log(p / (1 - p)) / temperature + offset)))
        found = Detections(image.found.xyxy, score.astype(np.float32), image.found.label)
        changed.append(replace(image, found=found))
    return changed


def _outcome(image: Image) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return of each detection whether it is right and whether it counts; the best scored comes first to each truth."""
    centres = image.found.centers
    right, counts = np.zeros(len(centres), bool), image.counted(centres)
    if len(centres) and len(image.truth):
        distance = cdist(centres, image.truth)
        true_in = image.counted(image.truth)
        for i in np.argsort(-image.found.score, kind="stable"):
            j = int(distance[i].argmin())
            if distance[i, j] <= image.radius:
                right[i], counts[i] = True, bool(true_in[j])
                distance[:, j] = np.inf
    return right, counts
