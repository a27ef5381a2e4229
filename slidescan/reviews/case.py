"""One result in review: its items, the decisions that stand for each, and where its pixels come from."""

from __future__ import annotations

import time
import uuid
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from os import PathLike
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError
from slidescan.geometry import Box
from slidescan.provenance import as_scanned
from slidescan.result import ScanResult
from slidescan.reviews.attach import found_of, reattach
from slidescan.reviews.decisions import DECISIONS, Decision, DecisionLog, Undo, Verdict, What
from slidescan.reviews.items import ReviewItem, items_of
from slidescan.slides import Slide, pooled

__all__ = ["MOST_PARTS", "Case", "SlideAt"]

SlideAt = Slide | str | PathLike[str]

MOST_PARTS = 200  # boxes of a region that a page shows: some 10 kB


class Case:
    """A saved result with its decision log; of the result only what a review needs is kept.

    Decisions made on another scan of the slide count here for what they were re-attached to: a region that holds what
    was not in it then is another, and is to be decided on. Where a reviewer has decided on one place more than once,
    under whatever ids, the last decision counts.
    """

    def __init__(self, result: ScanResult, what: What, *, slide_id: str = "", group: str = "") -> None:
        self.path = _saved(result)
        self.slide_id = slide_id or self.path.resolve().name
        self.group = group
        self.what = what
        self.frame = result.frame
        self.classes = result.classes
        self.items = {item.id: item for item in items_of(result, what, self.slide_id, group)}
        # Of a region its detections are shown, too; float32 is off by 0.01 px at 200,000 px.
        self._found_l0 = result.found.xyxy.astype(np.float32) if what == "region" else np.empty((0, 4), np.float32)
        self.log = DecisionLog(self.path / DECISIONS)
        provenance = result.provenance
        self._run_key, self._model = str(provenance["run_key"]), str(provenance["detector"]["sha256"])
        self._fingerprint, self._color = str(provenance["slide"]["fingerprint"]), provenance["slide"]["color"]
        self._slide_at: SlideAt | None = None
        self._seen: tuple[ReviewItem | None, NDArray[np.float32]] = None, self._found_l0[:0]
        self._strangers: frozenset[str] = frozenset()
        self._attached: dict[str, str] = {}
        self._former: dict[str, list[str]] = {}
        self.refresh()

    def refresh(self) -> None:
        """See what others decided since."""
        self.log.refresh()
        standing = self.log.standing
        strangers = frozenset(
            region
            for region in standing.regions
            if region not in self.items and next(standing.of(region)).what == self.what
        )
        if strangers == self._strangers:
            return
        self._strangers, self._attached, self._former = strangers, {}, defaultdict(list)
        # One scan at a time: a place that was decided on in two scans has two boxes, and both mean the item there now.
        by_run: dict[str, dict[str, Box]] = defaultdict(dict)
        for region in strangers:
            decision = next(standing.of(region))
            if decision.slide_fingerprint == self._fingerprint:
                by_run[decision.run_key][region] = decision.box_l0
        # What was decided on under its own id in that scan was there beside the stranger, and is not it.
        own: dict[str, set[str]] = defaultdict(set)
        for region in standing.regions:
            for decision in standing.of(region) if region in self.items else ():
                own[decision.run_key].add(region)
        for run, boxes_l0 in by_run.items():
            free = [item for item in self.items.values() if item.id not in own[run]]
            for old, item_id in reattach(boxes_l0, free).items():
                parts = next(standing.of(old)).parts_l0
                if not parts or len(found_of(parts, self._found_l0[self.items[item_id].rows])) == self.items[item_id].n:
                    self._attached[old] = item_id
                    self._former[item_id].append(old)

    def decisions(self, item_id: str) -> dict[str, Decision]:
        """Return what stands for an item by reviewer, who decided last at the end.

        What was decided on as of another class, in an earlier scan, is still of the class that was shown.
        """
        standing, former, shown = self.log.standing, self._former.get(item_id, ()), self.items[item_id].label
        made = [decision for region in (item_id, *former) for decision in standing.of(region)]
        if former:
            made.sort(key=lambda decision: decision.order)
        last: dict[str, Decision] = {}
        for decision in made:
            last.pop(decision.reviewer, None)
            if decision.label is None and decision.detected_label not in (None, shown):
                decision = replace(decision, label=decision.detected_label)
            last[decision.reviewer] = decision
        return last

    def loose(self) -> list[Decision]:
        """Return the decisions on this slide that stand for no item, in order: what they were on may be in another."""
        standing = self.log.standing
        made = [d for region in self._strangers - self._attached.keys() for d in standing.of(region)]
        return sorted((d for d in made if d.slide_fingerprint == self._fingerprint), key=lambda d: d.order)

    def made_by(self, reviewer: str) -> Iterator[tuple[str, Decision]]:
        """Yield a reviewer's decisions that were not undone with the item each is on, the last one first."""
        for decision in self.log.standing.latest_first():
            item_id = self._attached.get(decision.region, decision.region)
            if decision.reviewer == reviewer and item_id in self.items:
                yield item_id, decision

    @property
    def reattached(self) -> int:
        """Decisions that stand through where they are, since their ids are gone."""
        return self.moved()[0]

    @property
    def orphaned(self) -> int:
        """Decisions whose place holds nothing any more, or more than it did, or that were made on another slide."""
        return self.moved()[1]

    def moved(self, reviewer: str | None = None) -> tuple[int, int]:
        """Return how many decisions, of all or of one reviewer, are `reattached`, and how many `orphaned`."""
        standing = self.log.standing
        places = [
            region in self._attached
            for region in self._strangers  # one a reviewer and region
            for name in {decision.reviewer for decision in standing.of(region)}
            if reviewer in (None, name)
        ]
        return sum(places), len(places) - sum(places)

    def decide(self, item: ReviewItem, decision: Verdict, *, reviewer: str, label: str | None, note: str) -> Decision:
        """Write a decision with what it was decided on; `item` is as it was shown, scores hidden or not."""
        # All of them, or a later scan could not tell that it is the same region: the shortest text for each float32.
        parts = [Box(*(float(str(edge)) for edge in part)) for part in self.parts(item)]
        decided = Decision(
            event_id=uuid.uuid4().hex,
            at=time.time(),
            reviewer=reviewer,
            what=item.what,
            region=item.id,
            decision=decision,
            label=label,
            note=note,
            box_l0=item.box_l0,
            score=item.score,
            evidence=item.evidence,
            run_key=self._run_key,
            model_sha256=self._model,
            slide_fingerprint=self._fingerprint,
            detected_label=item.label,
            parts_l0=tuple(parts),
        )
        self.log.append(decided)
        self.refresh()
        return decided

    def undo(self, decision: Decision) -> None:
        """Write that a reviewer takes back a decision."""
        self.log.append(Undo(uuid.uuid4().hex, time.time(), decision.reviewer, decision.event_id))
        self.refresh()

    def parts(self, item: ReviewItem) -> NDArray[np.float32]:
        """Return the boxes (N, 4) of the detections in a region, from left to right; none for a detection."""
        parts = self._inside(item)
        ordered: NDArray[np.float32] = parts[np.lexsort(parts.T[::-1])]  # by score it would tell scores
        return ordered

    def focus(self, item: ReviewItem) -> Box:
        """Return what a field too small for an item shows: its best detection, of one without score the middle one."""
        parts, box = self._inside(item), item.box_l0
        if not len(parts):
            return box
        off = (parts[:, :2] + parts[:, 2:]) / 2 - ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
        return Box(*parts[0 if item.score is not None else int((off**2).sum(1).argmin())].tolist())

    def _inside(self, item: ReviewItem) -> NDArray[np.float32]:
        """Return the boxes (N, 4) of the detections in a region, best first; none for a detection."""
        seen = self._seen
        if seen[0] is not item:  # parts and focus are asked for one after the other, of several by several threads
            seen = self._seen = item, self._found_l0[self.items[item.id].rows]  # a blinded one has none
        return seen[1]

    def read_from(self, slide_at: SlideAt) -> None:
        """Take pixels from a slide, opened when it is first needed."""
        self._slide_at = slide_at

    @property
    def located(self) -> bool:
        """Whether anything was said of where its pixels are."""
        return self._slide_at is not None

    def slide(self) -> Slide:
        """Return the slide, at the scale and in the colours it was scanned with.

        Raises
        ------
        ConfigError
            If it was not given, is not the one that was scanned, or is open at another scale.
        SlideError
            If it cannot be opened.
        """
        at = self._slide_at
        if at is None:
            raise ConfigError(
                f"slides: expected where the pixels of {self.slide_id!r} are, got nothing for it; a result names no "
                "path, so pass slides=, or --slides on the command line"
            )
        slide = at if isinstance(at, Slide) else pooled(at, mpp=self.frame.mpp, color=self._color)
        return as_scanned(slide, self._fingerprint, self.frame, f"slides: {self.slide_id!r}")


def _saved(result: ScanResult) -> Path:
    if result.path is None:
        raise ConfigError(
            "result: expected one that is saved, got one without a directory, so decisions would be lost; scan with "
            "out=DIR and review that"
        )
    return result.path
