"""Which objects of a result were accepted, rejected or left unsure: what an export by decision writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import astuple

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, ResultError
from slidescan.result import ScanResult
from slidescan.reviews.attach import at_one_place
from slidescan.reviews.case import Case
from slidescan.reviews.decisions import DECISIONS, Decision, Verdict

__all__ = ["decided", "decided_ids"]

_DECIDED: Mapping[str, Verdict] = {"accepted": "accept", "rejected": "reject", "unsure": "unsure"}


def decided(result: ScanResult, decisions: str, *, reviewer: str | None = None) -> dict[str, str | None]:
    """Return by id the regions that were decided so and the detections in them, with the class a reviewer gave.

    None stands for the detector's class. Where reviewers differ, the later decision counts. A detection that was found
    is of one region, whatever outlines it lies in; where it was decided on by itself, that counts. One that is alone in
    its region has the region's class. Nobody was shown any below the threshold, and of a region that was decided on in
    an earlier scan only those that were in it then: it is decided with all of them, or they are without it.

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
    if reviewer is not None and reviewer not in names:
        raise ConfigError(f"reviewer: expected one who decided here ({', '.join(names) or 'nobody'}), got {reviewer!r}")
    last_of = {id_: last for id_, last in _last(regions, reviewer).items() if last.decision == wanted}
    alone = _last(Case(result, "detection"), reviewer) if any(one.what == "detection" for one in made) else {}
    found = np.flatnonzero(result.detections.score >= result.threshold)
    shown = {id_: _shown(result, found[regions.items[id_].rows], id_, last) for id_, last in last_of.items()}
    said = {id_: last.label for id_, last in last_of.items() if len(shown[id_]) == regions.items[id_].n}
    parts = {
        id_: last_of[region].label if regions.items[region].n == 1 else None
        for region, ids in shown.items()
        for id_ in ids
        if id_ not in alone
    }
    return said | parts | {id_: last.label for id_, last in alone.items() if last.decision == wanted}


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


def _shown(result: ScanResult, rows: NDArray[np.intp], region: str, last: Decision) -> list[str]:
    """Return the ids of those detections in a region, given by row, that were shown when it was decided on."""
    if last.region != region and last.parts_l0:  # a line from before they were kept tells of none
        then = np.array([astuple(part) for part in last.parts_l0], np.float64)
        rows = rows[sorted(at_one_place(then, result.detections.xyxy[rows]).values())]
    return [result.ids[row] for row in rows.tolist()]
