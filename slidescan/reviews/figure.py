"""A review as a contact sheet: fields of view in order, with what was decided."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slidescan.contact_sheet import View
from slidescan.reviews.items import ReviewItem

if TYPE_CHECKING:
    from slidescan.reviews.session import Review

__all__ = ["views"]

# Okabe and Ito (2008): told apart by colour-blind readers; the word stands beside the colour all the same.
_COLORS = {"accept": "#009E73", "reject": "#D55E00", "unsure": "#E69F00"}


def views(review: Review, items: Sequence[ReviewItem], fov_um: float, px: int) -> list[View]:
    """Return the fields of view of items: boxes, rank, score and this reviewer's decision.

    A blinded review shows a running number in place of rank and score.
    """
    several = len({item.slide_id for item in items}) > 1
    shown = []
    for place, item in enumerate(items, 1):
        said = [str(place if item.rank is None else item.rank)]
        of = f"{item.slide_id}\n" if several and not review.blinded else ""  # a rank is one of its slide
        if item.score is not None:
            said.append(f"{item.score:.2f}")
        made = review.decision(item.id)
        if made is not None:
            said.append(made.decision)
        view = View(review.crop(item.id, fov_um, px), review.outlines_um(item.id, fov_um), of + " · ".join(said))
        shown.append(view if made is None else view._replace(color=_COLORS[made.decision]))
    return shown
