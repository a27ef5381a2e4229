"""Which items of a review, and in which order; a blinded review refuses what would tell scores or what others said."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from slidescan.errors import ConfigError
from slidescan.reviews.decisions import Decision, Verdict
from slidescan.reviews.items import ReviewItem

__all__ = ["STATES", "TELL_SCORES", "Choice", "Sort", "nearest"]

Sort = Literal["evidence", "score", "uncertainty", "slide", "shuffled"]

_EVEN = 0.5  # the calibrated score at which yes and no are as likely: nothing is less certain

_KEYS: Mapping[Sort, Callable[[ReviewItem], Any]] = {
    "evidence": lambda item: (-(item.evidence or 0.0), item.slide_id, item.rank),
    "score": lambda item: (-(item.score or 0.0), item.slide_id, item.rank),
    "uncertainty": lambda item: (abs((item.score or 0.0) - _EVEN), item.slide_id, item.rank),
    "slide": lambda item: (item.slide_id, item.rank or 0, item.id),
    "shuffled": lambda item: item.id,  # ids are digests: their order is one nobody chose
}
TELL_SCORES = ("evidence", "score", "uncertainty")
TELL_OTHERS = ("disputed",)
STATES = (*get_args(Verdict), "decided", "undecided", *TELL_OTHERS)


@dataclass(frozen=True, slots=True)
class Choice:
    """An order and filters, as `Review.items` takes them; None is any.

    Raises
    ------
    ConfigError
        If a setting is not one of these, or would tell in a blinded review what it hides.
    """

    sort: Sort
    slide: str | None
    label: str | None
    decision: str | None
    min_score: float | None
    blinded: bool

    def __post_init__(self) -> None:
        if self.sort not in _KEYS:
            raise ConfigError(f"sort: expected one of {', '.join(_KEYS)}, got {self.sort!r}")
        if self.decision is not None and self.decision not in STATES:
            raise ConfigError(f"decision: expected one of {', '.join(STATES)}, got {self.decision!r}")
        if self.min_score is not None and not 0 <= self.min_score <= 1:
            raise ConfigError(f"min_score: expected a score from 0 to 1, got {self.min_score!r}")
        if not self.blinded:
            return
        if self.sort in TELL_SCORES or self.min_score is not None:
            asked = f"sort={self.sort!r}" if self.sort in TELL_SCORES else f"min_score={self.min_score!r}"
            raise ConfigError(f"{asked}: would tell scores, and this review is blinded; leave it out")
        if self.decision in TELL_OTHERS:
            raise ConfigError(
                f"decision={self.decision!r}: would tell what others decided, and this review is blinded; leave it out"
            )

    @property
    def key(self) -> Callable[[ReviewItem], Any]:
        """What items are sorted by."""
        return _KEYS[self.sort]

    def fits(self, item: ReviewItem, reviewer: str, said: Callable[[str], Mapping[str, Decision]]) -> bool:
        """Return whether an item is chosen; `said` gives by its id what stands, by reviewer."""
        if (self.slide is not None and item.slide_id != self.slide) or self.label not in (None, item.label):
            return False
        if self.min_score is not None and (item.score is None or item.score < self.min_score):
            return False
        if self.decision is None:
            return True
        by_name = said(item.id)
        if self.decision == "disputed":
            return len({made.decision for made in by_name.values()}) > 1
        made = by_name.get(reviewer)
        if self.decision in ("decided", "undecided"):
            return (made is None) == (self.decision == "undecided")
        return made is not None and made.decision == self.decision


def nearest(items: Sequence[ReviewItem], slide_id: str, xy_l0: tuple[float, float], reach_l0: float) -> int | None:
    """Return the number of the item whose box holds a place or is nearest to it; of equally near ones the smallest.

    None if there is no box within `reach_l0`, level-0 px.
    """
    x, y = xy_l0
    near = []
    for number, item in enumerate(items):
        box = item.box_l0
        away = math.hypot(max(box.x0 - x, 0.0, x - box.x1), max(box.y0 - y, 0.0, y - box.y1))
        if item.slide_id == slide_id and away <= reach_l0:
            near.append((away, box.area, number))
    return min(near)[2] if near else None
