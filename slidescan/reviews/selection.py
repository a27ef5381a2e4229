"""Which objects of a result were accepted, rejected or left unsure: what an export by decision writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import shapely

from slidescan.errors import ConfigError, ResultError
from slidescan.result import ScanResult
from slidescan.reviews.case import Case
from slidescan.reviews.decisions import DECISIONS, Decision, Verdict
from slidescan.reviews.items import inside

__all__ = ["decided_classes", "decided_ids"]

_DECIDED: Mapping[str, Verdict] = {"accepted": "accept", "rejected": "reject", "unsure": "unsure"}


class _Last:
    """The last decision on an item, of anyone or of one reviewer."""

    def __init__(self, case: Case, reviewer: str | None) -> None:
        said = {item_id: case.decisions(item_id) for item_id in case.items}
        self.case = case
        self.by_id: dict[str, Decision] = {
            item_id: made[reviewer] if reviewer is not None else list(made.values())[-1]
            for item_id, made in said.items()
            if made and (reviewer is None or reviewer in made)
        }


def decided_ids(result: ScanResult, decisions: str, *, reviewer: str | None = None) -> frozenset[str]:
    """Return the ids of the regions that were decided so, and of the detections in them.

    Where reviewers differ, the later decision counts. A detection is in a region if its centre is in the outline, of
    several in the smallest; where it was decided on by itself, that counts.

    Parameters
    ----------
    result : ScanResult
        Saved, with decisions beside it.
    decisions : {"accepted", "rejected", "unsure"}
    reviewer : str, optional
        Count only this reviewer's decisions.

    Raises
    ------
    ConfigError
        If it is not one of these, or the reviewer decided nothing here.
    ResultError
        If the result has no decisions.
    """
    if decisions not in _DECIDED:
        raise ConfigError(f"decisions: expected accepted, rejected or unsure, got {decisions!r}")
    wanted = _DECIDED[decisions]
    regions, detections = _decided(result, reviewer)
    chosen = {id_ for id_, decision in regions.by_id.items() if decision.decision == wanted}
    alone = {id_ for id_, decision in detections.by_id.items() if decision.decision == wanted}
    parts = {id_ for id_, region in _homes(result, regions.case).items() if region in chosen}
    return frozenset(chosen | (parts - detections.by_id.keys()) | alone)


def decided_classes(result: ScanResult, *, reviewer: str | None = None) -> dict[str, str]:
    """Return by id the class that a reviewer gave a region or detection, where it is not the detector's.

    A detection that is alone in its region has the region's. Parameters and errors are those of `decided_ids`.
    """
    regions, detections = _decided(result, reviewer)
    named = {id_: decision.label for id_, decision in regions.by_id.items() if decision.label is not None}
    alone = {
        id_: named[region]
        for id_, region in _homes(result, regions.case).items()
        if region in named and regions.case.items[region].n == 1 and id_ not in detections.by_id
    }
    return named | alone | {id_: made.label for id_, made in detections.by_id.items() if made.label is not None}


def _decided(result: ScanResult, reviewer: str | None) -> tuple[_Last, _Last]:
    """Return what was decided last on regions and on detections."""
    regions = Case(result, "region")
    if not regions.log.path.is_file():
        raise ResultError(f"{regions.path}: no {DECISIONS} there; review the result first")
    names = sorted({decision.reviewer for decision in regions.log.standing.latest_first()})
    if reviewer is not None and reviewer not in names:
        raise ConfigError(f"reviewer: expected one who decided here ({', '.join(names) or 'nobody'}), got {reviewer!r}")
    return _Last(regions, reviewer), _Last(Case(result, "detection"), reviewer)


def _homes(result: ScanResult, regions: Case) -> dict[str, str]:
    """Return by detection the region it is in: outlines overlap, and the smallest is that of its own cluster."""
    items = list(regions.items.values())
    areas = np.array([shapely.Polygon(item.polygon_l0).area for item in items])
    pairs = inside(items, result.detections.centers)
    largest_first = pairs[np.argsort(-areas[pairs[:, 0]], kind="stable")] if len(pairs) else pairs
    return {result.ids[row]: items[region].id for region, row in largest_first.tolist()}
