"""µm per px: which value wins, and whether it can be true.

Hides the order (the user's override, then the file) and the plausibility rule. Invariant: an implausible value never
becomes a number that a scan could use; it becomes a sentence. Scanners do write 0, inf, nan, 499000 and values in the
wrong unit, and readers below pass them on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from slidescan.errors import ConfigError

__all__ = ["MAX_MPP", "MIN_MPP", "NOTHING", "Resolution", "judge", "number", "override", "unknown_unit"]

MIN_MPP = 0.05  # µm/px; a quarter of the diffraction limit of light, so finer is a unit error
MAX_MPP = 20.0  # µm/px; a nucleus is then half a px
MAX_ANISOTROPY = 0.05  # relative x/y disagreement; real scanners stay below 1 %


@dataclass(frozen=True, slots=True)
class Resolution:
    """A verdict: `mpp` in µm/px, or None and the `problem` in words; `source` says who said it."""

    mpp: float | None
    source: str
    problem: str | None = None


NOTHING = Resolution(None, "none", "the file does not say")


def override(mpp: float) -> Resolution:
    """Return the user's own value; it always wins.

    Raises
    ------
    ConfigError
        If it is not within 0.05 to 20 µm/px.
    """
    value = number(mpp)
    if value is None or not MIN_MPP <= value <= MAX_MPP:
        raise ConfigError(f"mpp: expected {MIN_MPP:g} to {MAX_MPP:g} µm/px, got {mpp!r}; a 40× scan is about 0.25")
    return Resolution(value, "override")


def unknown_unit(source: str) -> Resolution:
    """Return the verdict on a size in a unit that is no length known here; which, stays in the file."""
    return Resolution(None, source, f"the file says it in a unit that is not a known length ({source})")


def judge(x_mpp: object, y_mpp: object, source: str) -> Resolution:
    """Return the verdict on the two values a file gives; text is parsed, a comma may stand for the point.

    Examples
    --------
    >>> judge("0.25", "0.25", "aperio").mpp
    0.25
    >>> judge(0.499, 499.0, "tiff-resolution").problem
    'the file says 0.499 × 499 µm/px (tiff-resolution), which is not plausible'
    """
    if x_mpp is None and y_mpp is None:
        return NOTHING
    x, y = number(x_mpp), number(y_mpp)
    if x is None or y is None:
        return Resolution(None, source, f"the file's entry ({source}) is not a number")
    told = " × ".join(dict.fromkeys(f"{value:.6g}" for value in (x, y)))
    if not (MIN_MPP <= x <= MAX_MPP and MIN_MPP <= y <= MAX_MPP):
        return Resolution(None, source, f"the file says {told} µm/px ({source}), which is not plausible")
    if abs(x - y) > MAX_ANISOTROPY * min(x, y):
        return Resolution(None, source, f"the file says {told} µm/px ({source}): x and y differ by more than 5 %")
    return Resolution(x if x == y else math.sqrt(x * y), source)


def number(value: object) -> float | None:
    """Return `value` as a float (nan and inf included), or None where it is no number."""
    try:
        return float(str(value).strip().replace(",", "."))
    except ValueError:
        return None
