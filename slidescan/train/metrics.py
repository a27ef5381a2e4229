"""How good detections are: one-to-one matching of centres, precision, recall, F1, average precision, FROC, calibration.

Hides the bookkeeping of images. Invariants: a truth is found at most once; with a margin, what lies near an image's
border counts neither for nor against, whether truth or detection, but may still be matched with its partner inside.

At one threshold (`score`) pairs are matched as well as can be. What follows the order of scores (`judge` and all that
uses it) gives each truth to the best scored detection that reaches it, so that a lower threshold never takes it back.
The two differ only where truths are less than two radii apart, or at a margin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment, minimize
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, min_weight_full_bipartite_matching
from scipy.spatial import cKDTree

from slidescan.train.curves import Curve, Judged
from slidescan.train.image import Image

__all__ = [
    "RADIUS_UM",
    "Curve",
    "Image",
    "Judged",
    "Mistake",
    "Scores",
    "average_precision",
    "best_threshold",
    "calibrate",
    "calibration_error",
    "curve",
    "fit_calibration",
    "judge",
    "match",
    "mistakes",
    "recall_at",
    "reliability",
    "score",
]

RADIUS_UM = 7.5  # a detection this near a figure's centre has found it: the MIDOG challenges' rule
_DENSE = 1 << 16  # pairs of a group up to which looking at all is as fast as at those within reach alone
_LEAST_SCORE = 0.05  # below, a list of queries is nearly all negatives and would make any calibration error look small


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


@dataclass(frozen=True, slots=True)
class Mistake:
    """One false detection or missed truth.

    Parameters
    ----------
    image : int
        Index of its image.
    x_px, y_px : float
        Its centre.
    score : float
        Of the detection; of a truth, the best of any detection within the radius, 0 without one.
    """

    image: int
    x_px: float
    y_px: float
    score: float


def match(found_xy: NDArray[np.float64], truth_xy: NDArray[np.float64], radius: float) -> NDArray[np.intp]:
    """Pair detections with truths within `radius`: as many pairs as possible, then the shortest.

    Parameters
    ----------
    found_xy, truth_xy : ndarray, shape (n, d) and (m, d)
        Two coordinates, or more.
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
    near = _near(found_xy, truth_xy, radius)
    if not len(near):
        return np.empty((0, 2), np.intp)
    n = len(found_xy)
    # Groups of points that reach each other are paired by themselves: a slide has thousands.
    graph = coo_array((np.ones(len(near), np.int8), (near["i"], n + near["j"])), shape=(n + len(truth_xy),) * 2)
    group = connected_components(graph, directed=False)[1][near["i"]]
    order = np.argsort(group, kind="stable")
    parts = np.split(near[order], np.flatnonzero(np.diff(group[order])) + 1)
    alone = np.array([(part["i"][0], part["j"][0]) for part in parts if len(part) == 1], np.intp).reshape(-1, 2)
    return np.concatenate([alone, *(_paired(part, radius) for part in parts if len(part) > 1)])


def _near(found_xy: NDArray[np.float64], truth_xy: NDArray[np.float64], radius: float) -> NDArray[np.void]:
    """Return every pair within reach: rows (i, j, v) of detection, truth and distance."""
    if len(found_xy) == 0 or len(truth_xy) == 0:
        return np.empty(0, [("i", np.intp), ("j", np.intp), ("v", np.float64)])
    found, truth = cKDTree(found_xy), cKDTree(truth_xy)
    within: NDArray[np.void] = found.sparse_distance_matrix(truth, radius, output_type="ndarray")
    return within


def _paired(near: NDArray[np.void], radius: float) -> NDArray[np.intp]:
    """Pair the points of one group."""
    (found, i), (truth, j) = (np.unique(near[side], return_inverse=True) for side in ("i", "j"))
    n, m = len(found), len(truth)
    # A pair out of reach costs more than any number of pairs within it, so the count is maximised first.
    forbidden = (min(n, m) + 1) * max(radius, 1e-9)
    if n * m <= _DENSE:
        cost = np.full((n, m), forbidden)
        cost[i, j] = near["v"]
        rows, columns = linear_sum_assignment(cost)
        kept = cost[rows, columns] < forbidden
    else:  # a slide of nuclei that touch is one group: each may be left with a partner of its own that is none
        data = np.concatenate((near["v"], np.full(n, forbidden))) + forbidden  # 0 would be no pair
        at = np.concatenate((i, np.arange(n))), np.concatenate((j, m + np.arange(n)))
        rows, columns = min_weight_full_bipartite_matching(coo_array((data, at), shape=(n, m + n)).tocsr())
        kept = columns < m
    return np.stack((found[rows[kept]], truth[columns[kept]]), 1)


def score(images: Sequence[Image], threshold: float) -> Scores:
    """Count found, missed and false at `threshold` over all images."""
    found = missed = false = 0
    for image in images:
        kept = image.found.score >= threshold
        pairs = match(image.found_xyc[kept], image.truth_xyc, image.radius)
        true_in, wrong = image.counted(image.truth), image.wrong_if_unmatched()[kept]
        hit = int(true_in[pairs[:, 1]].sum())
        found += hit
        missed += int(true_in.sum()) - hit
        wrong[pairs[:, 0]] = False
        false += int(wrong.sum())
    return Scores(found, missed, false)


def best_threshold(*kinds: Sequence[Image]) -> float:
    """Return the threshold in 0.05, 0.06, … 0.95 with the best mean F1 over kinds of images; the middle of several."""
    steps = np.arange(5, 96) / 100
    f1 = np.mean([[score(images, float(t)).f1 for t in steps] for images in kinds], axis=0)
    best = steps[f1 >= f1.max() - 1e-9]
    return float(best[len(best) // 2])


def judge(images: Sequence[Image]) -> Judged:
    """Say of every detection that counts whether it is right."""
    score, hit, index = [np.empty(0)], [np.empty(0, bool)], [np.empty(0, np.intp)]
    for i, image in enumerate(images):
        taken, counts = _outcome(image)
        score.append(image.found.score[counts].astype(np.float64))
        hit.append(taken[counts] >= 0)
        index.append(np.full(int(counts.sum()), i, np.intp))
    joined = np.concatenate(score)
    order = np.argsort(-joined, kind="stable")
    truths = np.array([image.counted(image.truth).sum() for image in images], np.int64)
    mm2 = np.array([image.mm2 for image in images], np.float64)
    return Judged(joined[order], np.concatenate(hit)[order], np.concatenate(index)[order], truths, mm2)


def curve(images: Sequence[Image]) -> Curve:
    """Return found and false detections over all images at every threshold.

    Examples
    --------
    >>> from slidescan.detections import Detections
    >>> found = Detections.build([[4, 4, 6, 6], [14, 4, 16, 6]], [0.75, 0.25])
    >>> at = curve([Image(found, np.array([[15.0, 5.0]]), 2.0, 20)])
    >>> at.score.tolist(), at.precision.tolist(), at.recall.tolist()
    ([0.75, 0.25], [0.0, 0.5], [0.0, 1.0])
    """
    return judge(images).curve()


def average_precision(images: Sequence[Image]) -> float:
    """Return the area under the precision-recall curve, detections taken by falling score over all images."""
    return curve(images).average_precision


def recall_at(images: Sequence[Image], false_per_mm2: float) -> float:
    """Return the highest recall at a threshold with at most so many false detections per mm² (a point of the FROC)."""
    return curve(images).recall_at(false_per_mm2)


def mistakes(images: Sequence[Image], threshold: float) -> tuple[list[Mistake], list[Mistake]]:
    """Return the false detections, highest score first, and the missed truths, least seen first."""
    false, missed = [], []
    for i, image in enumerate(images):
        taken, counts = _outcome(image)
        kept, centres = image.found.score >= threshold, image.found.centers
        wrong = np.flatnonzero(kept & counts & (taken < 0))
        false += [Mistake(i, float(centres[k, 0]), float(centres[k, 1]), float(image.found.score[k])) for k in wrong]
        lost = image.counted(image.truth)
        lost[taken[kept & (taken >= 0)]] = False
        near, best = _near(image.found_xyc, image.truth_xyc, image.radius), np.zeros(len(image.truth))
        np.maximum.at(best, near["j"], image.found.score[near["i"]])
        unseen = np.flatnonzero(lost)
        missed += [Mistake(i, float(image.truth[j, 0]), float(image.truth[j, 1]), float(best[j])) for j in unseen]
    return sorted(false, key=lambda m: -m.score), sorted(missed, key=lambda m: m.score)


def reliability(
    images: Sequence[Image], bins: int = 15, *, min_score: float = _LEAST_SCORE
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Compare scores with how often they are right, in bins of equal width over [0, 1].

    Parameters
    ----------
    images : sequence of Image
    bins : int
    min_score : float
        Detections scored lower are left out: they are nearly all negatives, and any number of them can be listed.

    Returns
    -------
    mean, share, count : ndarray
        Mean score, share that is right, and number of detections of the bins that are not empty.
    """
    judged = judge(images)
    used = judged.score >= min_score
    score, right = judged.score[used], judged.right[used]
    bin_of = np.minimum((score * bins).astype(np.intp), bins - 1)
    count = np.bincount(bin_of, minlength=bins)
    full = count > 0
    mean, share = (np.bincount(bin_of, v, bins)[full] / count[full] for v in (score, right.astype(np.float64)))
    return mean, share, count[full]


def calibration_error(images: Sequence[Image], bins: int = 15, *, min_score: float = _LEAST_SCORE) -> float:
    """Return the expected calibration error: the mean gap between score and share right over the bins of `reliability`.

    Examples
    --------
    >>> from slidescan.detections import Detections
    >>> sure = Image(Detections.build([[4, 4, 6, 6]], [0.75]), np.array([[5.0, 5.0]]), 2.0, 20)
    >>> calibration_error([sure])
    0.25
    """
    mean, share, count = reliability(images, bins, min_score=min_score)
    return float(np.abs(mean - share) @ count / count.sum()) if len(count) else 0.0


def fit_calibration(images: Sequence[Image]) -> tuple[float, float]:
    """Return temperature and offset for which sigmoid(logit / temperature + offset) is the most likely to be right.

    Both are needed: a detector's scores are spread too little and also centred for another density of objects, and a
    temperature alone would answer the second by pushing every score to 0 or 1.
    """
    judged = judge(images)
    p, hit = np.clip(judged.score, 1e-6, 1 - 1e-6), judged.right
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
    >>> from slidescan.detections import Detections
    >>> image = Image(Detections.build([[0, 0, 2, 2]], [0.5]), np.empty((0, 2)), 1.0, 10)
    >>> calibrate([image], 1.0, 0.0)[0].found.score.tolist()
    [0.5]
    """
    changed = []
    for image in images:
        p = np.clip(image.found.score.astype(np.float64), 1e-6, 1 - 1e-6)
        score = 1 / (1 + np.exp(-(np.log(p / (1 - p)) / temperature + offset)))
        found = replace(image.found, score=score.astype(np.float32))
        changed.append(replace(image, found=found))
    return changed


def _outcome(image: Image) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Return of each detection the truth it found (-1: none, it is false) and whether it counts; best scored first."""
    taken, counts = np.full(len(image.found), -1, np.intp), image.wrong_if_unmatched()
    near = _near(image.found_xyc, image.truth_xyc, image.radius)
    # Best score first, and of its truths the nearest that is left.
    near = near[np.lexsort((near["j"], near["v"], near["i"], -image.found.score[near["i"]]))]
    true_in, free = image.counted(image.truth), np.ones(len(image.truth), bool)
    for i, j in zip(near["i"].tolist(), near["j"].tolist(), strict=True):
        if taken[i] < 0 and free[j]:
            taken[i], counts[i], free[j] = j, bool(true_in[j]), False
    return taken, counts
