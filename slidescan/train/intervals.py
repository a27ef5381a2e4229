"""How sure the metrics are: intervals from resampling patients, and the summary that goes into ``metrics.json``.

Patients are resampled, not images or detections: what one patient's images share (stain, tumour, scanner) makes them
agree with each other, and counting them as independent would promise too much.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidescan.train.metrics import Curve, Image, Scores, average_precision, calibration_error, judge, score

__all__ = ["Interval", "intervals", "summary"]

_PERCENT = (2.5, 97.5)  # ends of a 95 % interval
_DIGITS = 4  # of a float in a summary: a tenth of what an interval of hundreds of figures can tell


@dataclass(frozen=True, slots=True)
class Interval:
    """A value and the ends of its 95 % interval, None where fewer than two patients have objects."""

    value: float
    low: float | None
    high: float | None


def intervals(
    images: Sequence[Image],
    threshold: float,
    *,
    rounds: int = 1000,
    seed: int = 0,
    levels: Sequence[float] = (1.0,),
) -> dict[str, Interval]:
    """Return metrics with percentile bootstrap intervals over patients.

    Parameters
    ----------
    images : sequence of Image
        All images of a patient are drawn together; one without a patient is a patient of its own.
    threshold : float
        Of F1, precision and recall.
    rounds : int
        Resamplings, at least 1.
    seed : int
        The same seed gives the same intervals.
    levels : sequence of float
        False detections per mm² at which to give the recall.

    Returns
    -------
    dict of Interval
        ``f1``, ``precision``, ``recall``, ``ap`` and, for each level, ``recall_at_<level>_per_mm2``.

    Examples
    --------
    >>> from slidescan.detections import Detections
    >>> found = Detections.build([[4, 4, 6, 6]], [0.75])
    >>> image = Image(found, np.array([[5.0, 5.0]]), 2.0, 20, patient="a")
    >>> intervals([image], 0.5)["f1"]
    Interval(value=1.0, low=None, high=None)
    """
    judged = judge(images)
    # Counts at the threshold are those of `score`, so that the value is the one the threshold was chosen by.
    parts = [score([image], threshold) for image in images]
    counts = np.array([(at.found, at.missed, at.false) for at in parts], np.int64).reshape(-1, 3)

    def measure(weights: NDArray[np.int64]) -> dict[str, float]:
        return _measure(Scores(*map(int, weights @ counts)), judged.curve(weights), levels)

    values = measure(np.ones(len(images), np.int64))
    patient = np.array(_patients(images), np.intp)
    n = len(set(patient.tolist()))
    if len(np.unique(patient[judged.truths > 0])) < 2:  # what one patient's objects say of others' nobody knows
        return {name: Interval(value, None, None) for name, value in values.items()}
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), rounds)[:, patient]
    # Of a draw without an object nothing can be said: that all were found would widen the interval.
    again = [measure(weights) for weights in draws[draws @ judged.truths > 0]]
    ends = {name: np.percentile([one[name] for one in again], _PERCENT) for name in values}
    return {name: Interval(value, *map(float, ends[name])) for name, value in values.items()}


def summary(
    images: Sequence[Image],
    threshold: float,
    *,
    rounds: int = 1000,
    seed: int = 0,
    levels: Sequence[float] = (1.0,),
    classes: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the metrics at a threshold as plain values for JSON.

    Parameters
    ----------
    images, threshold, rounds, seed, levels
        As for `intervals`.
    classes : sequence of str
        Indexed by label.

    Returns
    -------
    dict
        ``f1``, ``precision``, ``recall``, ``ap``, ``recall_at_<level>_per_mm2``; ``figures`` (truths), ``patients``
        (those named), ``mm2``, ``false_per_mm2`` (at the threshold; None without an area), ``ece``; ``intervals_95``:
        [low, high] or None by name; ``scanners``, where more than one is named: F1, precision, recall, AP and figures
        of each that has any; ``classes``, where there are several, the same of each.
    """
    sure = intervals(images, threshold, rounds=rounds, seed=seed, levels=levels)
    at, mm2 = score(images, threshold), sum(image.mm2 for image in images)
    row: dict[str, Any] = {name: round(one.value, _DIGITS) for name, one in sure.items()}
    row["figures"] = at.found + at.missed
    row["patients"] = len({image.patient for image in images} - {""})
    row["mm2"] = round(mm2, _DIGITS)
    row["false_per_mm2"] = round(at.false / mm2, _DIGITS) if mm2 else None
    row["ece"] = round(calibration_error(images), _DIGITS)
    row["intervals_95"] = {
        name: None if one.low is None or one.high is None else [round(one.low, _DIGITS), round(one.high, _DIGITS)]
        for name, one in sure.items()
    }
    scanners = sorted({image.scanner for image in images} - {""})
    if len(scanners) > 1:
        of_each = {name: _brief([i for i in images if i.scanner == name], threshold) for name in scanners}
        row["scanners"] = {name: brief for name, brief in of_each.items() if brief["figures"]}
    if len(classes) > 1:
        row["classes"] = {
            name: _brief([image.of_class(label) for image in images], threshold) for label, name in enumerate(classes)
        }
    return row


def _brief(images: Sequence[Image], threshold: float) -> dict[str, Any]:
    at = score(images, threshold)
    row = {"f1": at.f1, "precision": at.precision, "recall": at.recall, "ap": average_precision(images)}
    return {name: round(value, _DIGITS) for name, value in row.items()} | {"figures": at.found + at.missed}


def _measure(at: Scores, curve: Curve, levels: Sequence[float]) -> dict[str, float]:
    row = {"f1": at.f1, "precision": at.precision, "recall": at.recall, "ap": curve.average_precision}
    return row | {f"recall_at_{level:g}_per_mm2": curve.recall_at(level) for level in levels}


def _patients(images: Sequence[Image]) -> list[int]:
    """Return a number of each image's patient, from 0."""
    numbers: dict[str | int, int] = {}
    return [numbers.setdefault(image.patient or i, len(numbers)) for i, image in enumerate(images)]
