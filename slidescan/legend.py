"""What pictures of a result have in common: the density ramp, coverage tints, colours of marks, lengths of bars, words.

One home, so that a colour means the same in the overview, in a figure for a paper and on the review page. Colours are
RGB, 0 to 255.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from slidescan.anomaly import Coverage

__all__ = [
    "COVER_TINT",
    "HOTSPOT",
    "MARK",
    "RAMP_END_PER_MM2",
    "counted",
    "length_text",
    "many",
    "ramp_rgb",
    "round_length_um",
]

# Of flagged regions and of the hotspot: blue and green that colour-blind readers tell apart (Okabe and Ito, 2008).
MARK = (0, 114, 178)
HOTSPOT = (0, 158, 115)
# Heat ramp from transparent yellow to dark red: no blue or purple, which nuclei have.
_RAMP = np.array([[255, 237, 160], [254, 178, 76], [240, 59, 32], [160, 0, 20]], float)
# Density at which the ramp ends, figures per mm²: 20 in 2 mm² is a high mitotic count in most grading schemes.
RAMP_END_PER_MM2 = 20.0
COVER_TINT = {
    Coverage.BACKGROUND: (236, 236, 240),
    Coverage.ANALYSED: (222, 235, 247),
    Coverage.SATURATED: (255, 210, 80),
    Coverage.READ_FAILED: (90, 90, 90),
}


def ramp_rgb(strength: NDArray[np.float64] | np.float64) -> NDArray[np.float64]:
    """Return the colours of densities, as shares of `RAMP_END_PER_MM2`: a last axis of three, 0 to 255."""
    stops = np.linspace(0, 1, len(_RAMP))
    return np.stack([np.interp(strength, stops, _RAMP[:, i]) for i in range(3)], -1)


def round_length_um(most_um: float) -> float:
    """Return the longest of 1, 2, 5, 10, … µm that is at most `most_um`.

    Examples
    --------
    >>> round_length_um(1999.0), round_length_um(0.7)
    (1000.0, 0.5)
    """
    power = 10.0 ** math.floor(math.log10(most_um))
    return max(step * power for step in (1, 2, 5) if step * power <= most_um)


def length_text(um: float) -> str:
    """Return a length in the unit a reader expects."""
    return f"{um / 1000:g} mm" if um >= 1000 else f"{um:g} µm"


def area_text(mm2: float) -> str:
    """Return an area in three digits, or in all before the point.

    Examples
    --------
    >>> area_text(2.0), area_text(1.0499), area_text(1234.5)
    ('2 mm²', '1.05 mm²', '1,234 mm²')
    """
    return f"{mm2:,.0f} mm²" if mm2 >= 100 else f"{mm2:.3g} mm²"


def share_text(share: float, digits: int) -> str:
    """Return a share in percent, rounded down: what lacks a thousandth is not all.

    Examples
    --------
    >>> share_text(0.99999, 2), share_text(0.57, 2), share_text(1.0, 1)
    ('99.99%', '57.00%', '100.0%')
    """
    steps = 10 ** (digits + 2)
    return f"{math.floor(share * steps + 1e-6) / steps:.{digits}%}"  # 0.57 of 10,000 steps is a hair below 5,700


def many(classes: tuple[str, ...]) -> str:
    """Return what is counted, in a word: figures, or objects where there are other classes than mitotic figures."""
    return "figures" if classes == ("mitotic figure",) else "objects"


def counted(n: int, classes: tuple[str, ...], threshold: float) -> str:
    """Say how many were found, and what that means.

    Examples
    --------
    >>> counted(2, ("mitotic figure",), 0.5), counted(2, ("mitosis",), 0.5)
    ('2 mitotic figures at score ≥ 0.50', '2 × mitosis at score ≥ 0.50')
    """
    what = classes[0] if len(classes) == 1 else "object"
    if n != 1:
        what = f"× {what}" if what.endswith("s") else f"{what}s"  # whose plural nobody knows
    return f"{n:,} {what} at score ≥ {threshold:.2f}"
