"""What was found and what is there, in one image: what metrics are counted from."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from slidescan.detections import Detections

__all__ = ["Image"]


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """What was found and what is there in one image, in the same px.

    Parameters
    ----------
    found : Detections
    truth : ndarray, shape (n, 2)
        Centres x, y.
    radius : float
        Largest distance of a match, px.
    size : int
        Edge of the square image, px.
    margin : float
        Width of the border in which nothing counts, px.
    patient : str
        Whose image it is; empty if nobody knows.
    scanner : str
        What scanned it; empty if nobody knows.
    mpp : float
        µm per px, for areas.
    attributes : ndarray, shape (n, A), optional
        What is known of each truth besides its class: 1 yes, 0 no, NaN unknown.
    area_mm2 : float, optional
        Area that was looked at, where it is not the square within the margin.
    label : ndarray of int, shape (n,), optional
        Class of each truth, which only a detection of that class finds; None where there is but one.
    excused : ndarray of bool, one a detection, optional
        Which lie where nothing is wrong: they may find a truth, and do not count if they find none.
    """

    found: Detections
    truth: NDArray[np.float64]
    radius: float
    size: int
    margin: float = 0.0
    patient: str = ""
    scanner: str = ""
    mpp: float = 1.0
    attributes: NDArray[np.float64] | None = None
    area_mm2: float | None = None
    label: NDArray[np.int64] | None = None
    excused: NDArray[np.bool_] | None = None

    @property
    def mm2(self) -> float:
        """Area in which things count, mm²."""
        if self.area_mm2 is not None:
            return self.area_mm2
        return (max(0.0, self.size - 2 * self.margin) * self.mpp * 1e-3) ** 2

    def of_class(self, label: int) -> Image:
        """Return what was found and what is there of one class."""
        found, there = self.found.label == label, np.zeros(len(self.truth), int) if self.label is None else self.label
        known = there == label
        return replace(
            self,
            found=self.found[found],
            truth=self.truth[known],
            label=None if self.label is None else self.label[known],
            attributes=None if self.attributes is None else self.attributes[known],
            excused=None if self.excused is None else self.excused[found],
        )

    def counted(self, xy: NDArray[np.float64]) -> NDArray[np.bool_]:
        """Return which points lie inside the margin."""
        x, y = xy[:, 0], xy[:, 1]
        low, high = self.margin, self.size - self.margin
        return (x >= low) & (x <= high) & (y >= low) & (y <= high)

    @property
    def found_xyc(self) -> NDArray[np.float64]:
        """Centres of the detections, shape (n, 3): their class is a third coordinate, which keeps classes apart."""
        return self._apart(self.found.centers, None if self.label is None else self.found.label)

    @property
    def truth_xyc(self) -> NDArray[np.float64]:
        """Centres of what is there, as `found_xyc`."""
        return self._apart(self.truth, self.label)

    def _apart(self, xy: NDArray[np.float64], label: NDArray[np.integer] | None) -> NDArray[np.float64]:
        # Three radii are out of reach.
        third = np.zeros(len(xy)) if label is None else label * (3 * max(self.radius, 1e-9))
        return np.column_stack((xy, third))

    def wrong_if_unmatched(self) -> NDArray[np.bool_]:
        """Return which detections count, if they find nothing."""
        inside = self.counted(self.found.centers)
        return inside if self.excused is None else inside & ~self.excused
