"""From what was flagged to what was decided: `review`, its decisions, and how far reviewers agree.

The plural, since `slidescan.review` is the function. `slidescan.reviews.figure` is imported on its own: it needs
matplotlib.
"""

from __future__ import annotations

from slidescan.reviews.agreement import Kappa, cohen_kappa
from slidescan.reviews.decisions import Decision
from slidescan.reviews.items import ReviewItem
from slidescan.reviews.selection import decided, decided_ids
from slidescan.reviews.session import Review
from slidescan.reviews.start import review

__all__ = ["Decision", "Kappa", "Review", "ReviewItem", "cohen_kappa", "decided", "decided_ids", "review"]
