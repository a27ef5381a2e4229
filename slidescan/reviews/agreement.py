"""How far two reviewers agree beyond chance: Cohen's kappa."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations

from slidescan.reviews.decisions import Decision

__all__ = ["Kappa", "cohen_kappa"]


@dataclass(frozen=True, slots=True)
class Kappa:
    """Agreement of two reviewers over what both decided on; accept, reject and unsure are three categories."""

    reviewers: tuple[str, str]
    n: int
    """How many items both decided on."""
    kappa: float
    """(observed - expected) / (1 - expected): 1 is full agreement, 0 that of chance; NaN where `why_nan` says so."""
    observed: float
    """Share decided alike; NaN without items."""
    expected: float
    """Share that would be decided alike by chance, from how often each reviewer used each category."""
    why_nan: str = ""


def cohen_kappa(ratings: Mapping[str, Mapping[str, str]] | Iterable[Decision]) -> tuple[Kappa, ...]:
    """Compute Cohen's kappa of each pair of reviewers.

    Parameters
    ----------
    ratings : mapping of str to mapping of str to str, or iterable of Decision
        By item and reviewer, what was decided, as `Review.ratings` returns; or decisions in order, the last of a
        reviewer on a region counts.

    Returns
    -------
    tuple of Kappa
        A pair each, by name.

    Notes
    -----
    Cohen, "A coefficient of agreement for nominal scales", Educational and Psychological Measurement 20 (1960). Two
    reviewers who both used one and the same category alone agree always, and would by chance: 0 / 0, so NaN.

    Examples
    --------
    >>> said = {"a": ("accept", "accept"), "b": ("accept", "reject"), "c": ("reject", "reject")}
    >>> (kappa,) = cohen_kappa({id_: {"ann": by_ann, "ben": by_ben} for id_, (by_ann, by_ben) in said.items()})
    >>> kappa.reviewers, kappa.n, round(kappa.kappa, 2)
    (('ann', 'ben'), 3, 0.4)
    """
    if not isinstance(ratings, Mapping):
        collected: dict[str, dict[str, str]] = {}
        for decision in ratings:
            collected.setdefault(decision.region, {})[decision.reviewer] = decision.decision
        ratings = collected
    reviewers = sorted({reviewer for by_reviewer in ratings.values() for reviewer in by_reviewer})
    return tuple(_kappa(pair, ratings) for pair in combinations(reviewers, 2))


def _kappa(pair: tuple[str, str], ratings: Mapping[str, Mapping[str, str]]) -> Kappa:
    a, b = pair
    both = [(said[a], said[b]) for said in ratings.values() if a in said and b in said]
    n, nan = len(both), float("nan")
    if not n:
        return Kappa(pair, 0, nan, nan, nan, "they decided on nothing in common")
    by_a, by_b = (Counter(said) for said in zip(*both, strict=True))
    alike = sum(one == other for one, other in both)
    # In whole numbers, n² times the shares: full agreement is 1 and no hair less.
    chance = sum(by_a[category] * by_b[category] for category in by_a)
    observed, expected = alike / n, chance / n**2
    if chance == n**2:
        return Kappa(pair, n, nan, observed, expected, f"both said nothing but {both[0][0]}, as chance would have it")
    return Kappa(pair, n, (n * alike - chance) / (n**2 - chance), observed, expected)
