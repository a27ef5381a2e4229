"""What is reviewed: flagged regions, or single detections, under the ids they have in every export."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from slidescan.flagged import MOST_CERTAIN
from slidescan.geometry import Box
from slidescan.result import ScanResult
from slidescan.reviews.decisions import What

__all__ = ["ReviewItem", "items_of"]


@dataclass(frozen=True, slots=True)
class ReviewItem:
    """One flagged region or detection to decide on; level-0 px."""

    id: str
    """The UUID it has in flagged.geojson or detections.parquet."""
    what: What
    slide_id: str
    group: str
    label: str
    """The detector's class; of a region, that of most of its detections."""
    score: float | None
    """Highest score in it; None in a blinded review."""
    evidence: float | None
    """-Σ ln(1 - score), nats; None in a blinded review."""
    n: int
    """How many detections are in it."""
    rank: int | None
    """Place by evidence on its slide, from 1; None in a blinded review."""
    box_l0: Box
    polygon_l0: NDArray[np.float64] | None = field(repr=False, compare=False)
    """Outline of a region, (N, 2), not closed; None for a detection, whose box it is."""
    rows: NDArray[np.intp] = field(default_factory=lambda: np.empty(0, np.intp), repr=False, compare=False)
    """Of a region its detections, as rows of `ScanResult.found`."""


def items_of(result: ScanResult, what: What, slide_id: str, group: str = "") -> Iterator[ReviewItem]:
    """Yield all flagged regions of a result, or all detections at or above its threshold, by rank."""
    if what == "region":
        for id_, r in zip(result.region_ids, result.regions, strict=True):
            yield ReviewItem(
                id_, what, slide_id, group, r.label, r.peak, r.evidence, r.n, r.rank, r.box_l0, r.polygon_l0, r.rows
            )
        return
    rows = np.flatnonzero(result.detections.score >= result.threshold)
    found = result.detections[rows]
    columns = zip(rows.tolist(), found.xyxy.tolist(), found.score.tolist(), found.label.tolist(), strict=True)
    for rank, (row, xyxy, score, label) in enumerate(columns, 1):
        evidence = -math.log1p(-min(score, MOST_CERTAIN))
        name, box_l0 = result.classes[label], Box(*xyxy)
        yield ReviewItem(result.ids[row], what, slide_id, group, name, score, evidence, 1, rank, box_l0, None)
