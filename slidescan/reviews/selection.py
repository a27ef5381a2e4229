"""Which objects of a result were accepted, rejected or left unsure: what an export by decision writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from slidescan.errors import ConfigError, ResultError
from slidescan.result import ScanResult
from slidescan.reviews.case import Case
from slidescan.reviews.decisions import DECISIONS, Decision, Verdict
from slidescan.reviews.items import inside

__all__ = ["decided_ids"]

_DECIDED: Mapping[str, Verdict] = {"accepted": "accept", "rejected": "reject", "unsure": "unsure"}


@dataclass(frozen=True, slots=True)
class _Last:
    """The last decision on an item, of anyone or of one reviewer."""

    reviewer: str | None

    def of(self, said: Mapping[str, Decision]) -> Verdict | None:
        if self.reviewer is not None:
            return said[self.reviewer].decision if self.reviewer in said else None
        return list(said.values())[-1].decision if said else None


def decided_ids(result: ScanResult, decisions: str, *, reviewer: str | None = None) -> frozenset[str]:
    """Return the ids of the regions that were decided so, and of the detections in them.

    Where reviewers differ, the later decision counts. A detection is in a region if its centre is in the outline; where
    it was decided on by itself, that counts.

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
    wanted, last = _DECIDED[decisions], _Last(reviewer)
    regions = Case(result, "region")
    if not regions.log.path.is_file():
        raise ResultError(f"{regions.path}: no {DECISIONS} there; review the result first")
    names = sorted({decision.reviewer for decision in regions.log.standing.latest_first()})
    if reviewer is not None and reviewer not in names:
        raise ConfigError(f"reviewer: expected one who decided here ({', '.join(names) or 'nobody'}), got {reviewer!r}")
    chosen = {id_ for id_ in regions.items if last.of(regions.decisions(id_)) == wanted}
    pairs = inside([regions.items[id_] for id_ in sorted(chosen)], result.detections.centers)
    parts = {result.ids[row] for _, row in pairs.tolist()}
    if any(decision.what == "detection" for decision in regions.log.standing.latest_first()):
        detections = Case(result, "detection")
        alone = {id_: verdict for id_ in detections.items if (verdict := last.of(detections.decisions(id_)))}
        parts = (parts - alone.keys()) | {id_ for id_, verdict in alone.items() if verdict == wanted}
    return frozenset(chosen | parts)
