"""A review in numbers: who decided how much, how far reviewers agree, and what became of earlier decisions.

In a blinded review all of it is of its own reviewer: what others decided would bias.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, get_args

from slidescan.reviews.agreement import Kappa, cohen_kappa
from slidescan.reviews.decisions import Verdict
from slidescan.reviews.session import Review

__all__ = ["notice", "summary_of"]


def summary_of(review: Review) -> dict[str, Any]:
    """Return the numbers of a review as plain values, as far as the logs were read.

    Returns
    -------
    dict
        ``reviewers``: each with its name, counts of each verdict and how many are ``left``, the own one first;
        ``agreement``: of each pair its names, ``n``, ``kappa`` (None where ``why`` says why); ``reattached`` and
        ``orphaned`` decisions; ``unreadable`` lines of the logs.
    """
    ratings = review.ratings()
    by_name: dict[str, Counter[str]] = {review.reviewer: Counter()}
    for said in ratings.values():
        for name, verdict in said.items():
            by_name.setdefault(name, Counter())[verdict] += 1
    names = [review.reviewer] if review.blinded else [review.reviewer, *sorted(set(by_name) - {review.reviewer})]
    reattached, orphaned = _moved(review)
    return {
        "reviewers": [
            {
                "name": name,
                **{verdict: by_name[name][verdict] for verdict in get_args(Verdict)},
                "left": len(review) - by_name[name].total(),
            }
            for name in names
        ],
        "agreement": [] if review.blinded else [_told(kappa) for kappa in cohen_kappa(ratings)],
        "reattached": reattached,
        "orphaned": orphaned,
        "unreadable": review.unreadable,
    }


def notice(review: Review) -> str:
    """Say in one line what became of decisions on an earlier scan; nothing where there are none."""
    reattached, orphaned = _moved(review)
    if not reattached and not orphaned:
        return ""
    n = reattached or orphaned
    of = f"{n:,} decision{'' if n == 1 else 's'} of an earlier scan"
    if not reattached:
        return f"{of} found no place"
    lost = f", {orphaned:,} found no place" if orphaned else ""
    return f"{of} {'was' if n == 1 else 'were'} re-attached{lost}"


def _moved(review: Review) -> tuple[int, int]:
    """Return how many decisions were re-attached, and how many found no place."""
    moved = [case.moved(review.reviewer if review.blinded else None) for case in review.cases.values()]
    return sum(reattached for reattached, _ in moved), sum(orphaned for _, orphaned in moved)


def _told(kappa: Kappa) -> dict[str, Any]:
    """Return a kappa without NaN, which is no JSON."""
    value = None if kappa.why_nan else kappa.kappa
    return {"reviewers": list(kappa.reviewers), "n": kappa.n, "kappa": value, "why": kappa.why_nan}
