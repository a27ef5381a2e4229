"""Which objects of a result were accepted, rejected or left unsure: what an export by decision writes."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, ResultError
from slidescan.result import ScanResult
from slidescan.reviews.attach import at_one_place, boxes_of
from slidescan.reviews.case import Case
from slidescan.reviews.decisions import DECISIONS, Decision, Verdict
from slidescan.reviews.words import person

__all__ = ["decided", "decided_ids"]

_DECIDED: Mapping[str, Verdict] = {"accepted": "accept", "rejected": "reject", "unsure": "unsure"}


def decided(result: ScanResult, decisions: str, *, reviewer: str | None = None) -> dict[str, str | None]:
    """Return by id the regions that were decided so and the detections in them, with the class a reviewer gave.

    None stands for the detector's class. Where reviewers differ, the later decision counts. A detection that was found
    is of one region, whatever outlines it lies in; where it was decided on by itself, that counts. One that is alone in
    its region has the region's class. Below the threshold nobody was shown any. Of a region that holds more than it did
    when it was decided on, in an earlier scan, those that were in it then are decided, and it is not.

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
    wanted, regions = _DECIDED[decisions], Case(result, "region")
    if not regions.log.path.is_file():
        raise ResultError(f"{regions.path}: no {DECISIONS} there; review the result first")
    made = list(regions.log.standing.latest_first())
    names = sorted({decision.reviewer for decision in made})
    reviewer = None if reviewer is None else person(reviewer)
    if reviewer is not None and reviewer not in names:
        raise ConfigError(f"reviewer: expected one who decided here ({', '.join(names) or 'nobody'}), got {reviewer!r}")
    last = _last(regions, reviewer)
    said = {id_: one.label for id_, one in last.items() if one.decision == wanted}
    alone = _last(Case(result, "detection"), reviewer) if any(one.what == "detection" for one in made) else {}
    found = np.flatnonzero(result.detections.score >= result.threshold)
    parts = _in_others(result, found, [one for one in regions.loose() if reviewer in (None, one.reviewer)], wanted)
    for item in regions.items.values():
        ids = [result.ids[row] for row in found[item.rows].tolist()]
        if item.id in said:
            parts |= dict.fromkeys(ids, said[item.id] if item.n == 1 else None)
        for id_ in ids:
            if id_ in alone or (item.id in last and item.id not in said):
                parts.pop(id_, None)
    return said | parts | {id_: one.label for id_, one in alone.items() if one.decision == wanted}


def decided_ids(result: ScanResult, decisions: str, *, reviewer: str | None = None) -> frozenset[str]:
    """Return the ids of what was `decided` so."""
    return frozenset(decided(result, decisions, reviewer=reviewer))


def _last(case: Case, reviewer: str | None) -> dict[str, Decision]:
    """Return by item the last decision, of anyone or of one reviewer."""
    said = {item_id: case.decisions(item_id) for item_id in case.items}
    return {
        item_id: made[reviewer] if reviewer is not None else list(made.values())[-1]
        for item_id, made in said.items()
        if made and (reviewer is None or reviewer in made)
    }


def _in_others(
    result: ScanResult, found: NDArray[np.intp], made: list[Decision], wanted: Verdict
) -> dict[str, str | None]:
    """Return by id what was decided so in regions that are parts of others now; `found` are rows of the detections."""
    last: dict[int, Decision] = {}
    for run in dict.fromkeys(decision.run_key for decision in made):
        of_run = [decision for decision in made if decision.run_key == run]
        latest = {decision.region: decision for decision in of_run}  # of each region, whose parts are the same
        whose = [decision for decision in latest.values() for _ in decision.parts_l0 or ()]
        parts = [part for decision in latest.values() for part in decision.parts_l0 or ()]
        for old, row in at_one_place(boxes_of(parts), result.detections.xyxy[found]).items():
            if row not in last or last[row].order < whose[old].order:
                last[row] = whose[old]
    return {
        result.ids[found[row]]: decision.label if len(decision.parts_l0 or ()) == 1 else None
        for row, decision in last.items()
        if decision.decision == wanted
    }
