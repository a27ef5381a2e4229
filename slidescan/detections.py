"""`Detections`, the one table that moves through everything, and `Detector`, the protocol that fills it.

Design: plain columns, no vendor constructors. The frame of `xyxy` is said by whoever holds the table: a detector
returns tile px, everything after the region task is level-0 px.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["COLUMNS", "Detections", "Detector", "distinct", "iou_pairs"]

COLUMNS = ("id", "x0", "y0", "x1", "y1", "score", "label")  # of a table of detections; attributes have other names


@dataclass(frozen=True, slots=True, eq=False)
class Detections:
    """Boxes with scores and labels, one row each.

    Parameters
    ----------
    xyxy : ndarray of float64, shape (N, 4)
        Box edges x0, y0, x1, y1; the holder's name or docstring says in which frame.
    score : ndarray of float32, shape (N,)
        In [0, 1].
    label : ndarray of int16, shape (N,)
        Index into the detector's `classes`.
    attributes : ndarray of float32, shape (N, A)
        Probability of each of the detector's `attributes`; A is 0 for most detectors, and where it is not given.

    Raises
    ------
    ValueError
        If the columns differ in length or shape.

    Examples
    --------
    >>> d = Detections.build([[0, 0, 4, 4], [8, 8, 12, 12]], [0.9, 0.2])
    >>> len(d), len(d[d.score > 0.5])
    (2, 1)
    """

    xyxy: NDArray[np.float64]
    score: NDArray[np.float32]
    label: NDArray[np.int16]
    attributes: NDArray[np.float32] = field(default_factory=lambda: np.empty((0, 0), np.float32))

    def __post_init__(self) -> None:
        n = len(self.xyxy)
        if self.attributes.shape == (0, 0):  # not given
            object.__setattr__(self, "attributes", np.empty((n, 0), np.float32))
        columns = self.score.shape, self.label.shape, self.attributes.shape[:-1]
        if self.xyxy.shape != (n, 4) or columns != ((n,),) * 3:
            raise ValueError(
                f"Detections: xyxy must be (N, 4), score, label (N,) and attributes (N, A), "
                f"got {self.xyxy.shape}, {self.score.shape}, {self.label.shape}, {self.attributes.shape}"
            )

    @classmethod
    def build(
        cls, xyxy: object, score: object, label: object | None = None, attributes: object | None = None
    ) -> Detections:
        """Build from anything array-like, cast to the column types; `label` defaults to 0."""
        boxes = np.asarray(xyxy, np.float64).reshape(-1, 4)
        scores = np.asarray(score, np.float32).reshape(-1)
        labels = np.zeros(len(boxes), np.int16) if label is None else np.asarray(label, np.int16).reshape(-1)
        if attributes is None or not len(boxes):
            return cls(boxes, scores, labels)
        return cls(boxes, scores, labels, np.asarray(attributes, np.float32).reshape(len(boxes), -1))

    @classmethod
    def empty(cls) -> Detections:
        """Return a table without rows."""
        return cls.build(np.empty((0, 4)), np.empty(0))

    @classmethod
    def concat(cls, parts: Iterable[Detections]) -> Detections:
        """Stack tables in order."""
        items = [part for part in parts if len(part)]
        if not items:
            return cls.empty()
        return cls(
            np.concatenate([p.xyxy for p in items]),
            np.concatenate([p.score for p in items]),
            np.concatenate([p.label for p in items]),
            np.concatenate([p.attributes for p in items]),
        )

    def __len__(self) -> int:
        return len(self.xyxy)

    def __getitem__(self, rows: NDArray[np.bool_] | NDArray[np.intp] | slice) -> Detections:
        """Return the chosen rows (mask, index array or slice)."""
        return Detections(self.xyxy[rows], self.score[rows], self.label[rows], self.attributes[rows])

    @property
    def centers(self) -> NDArray[np.float64]:
        """Box centres, shape (N, 2), in the frame of `xyxy`."""
        return (self.xyxy[:, :2] + self.xyxy[:, 2:]) / 2

    def inside(self, size_wh: tuple[int, int]) -> Detections:
        """Return what has its centre on a picture of that size, boxes cut at its edges."""
        x, y = self.centers.T
        kept = self[(x >= 0) & (y >= 0) & (x < size_wh[0]) & (y < size_wh[1])]
        return replace(kept, xyxy=kept.xyxy.clip(0, (*size_wh, *size_wh)))

    def moved(self, scale: float, dx: float, dy: float) -> Detections:
        """Return the table with boxes multiplied by `scale` and then shifted by (`dx`, `dy`)."""
        return replace(self, xyxy=self.xyxy * scale + np.array([dx, dy, dx, dy]))


@runtime_checkable
class Detector(Protocol):
    """What scores tiles. A scan needs nothing else of a model.

    It must pickle (Dask sends it to workers; load weights on first use) and must be deterministic.
    """

    @property
    def name(self) -> str:
        """Short name for people and file metadata, such as ``mitosis-0.25``."""
        ...

    @property
    def sha256(self) -> str:
        """Digest of the weights and configuration: its identity in provenance and resume."""
        ...

    @property
    def classes(self) -> Sequence[str]:
        """Class names, indexed by label."""
        ...

    @property
    def attributes(self) -> Sequence[str]:
        """What it says of each object besides its class, such as ``atypical``; most say nothing."""
        ...

    @property
    def mpp(self) -> float:
        """µm/px it was trained at and must be fed at."""
        ...

    @property
    def input_px(self) -> int:
        """Best tile edge in px at `mpp`."""
        ...

    @property
    def object_um(self) -> float:
        """Edge of the largest object it reports, µm; tiles overlap by at least this much."""
        ...

    @property
    def halo_um(self) -> float | None:
        """Margin a tile needs beyond its core for its place not to matter, µm; None: not known."""
        ...

    @property
    def max_per_tile(self) -> int:
        """Most objects one tile can hold (by its queries); near it a tile counts as saturated."""
        ...

    @property
    def runs_on(self) -> str:
        """Device and precision it computes in, such as ``cpu, fp32``: both are part of a scan's identity."""
        ...

    @property
    def color(self) -> Literal["raw", "srgb"]:
        """The colours it was trained on: the scanner's own, or converted to sRGB by the slide's ICC profile."""
        ...

    @property
    def threshold(self) -> float:
        """Operating score: detections at or above it count as found."""
        ...

    def at(self, slide_mpp: float, *, allow_coarse: bool = False) -> Detector:
        """Return the variant to use on a slide scanned at `slide_mpp` (itself if there is but one)."""
        ...

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        """Score tiles (B, H, W, 3) RGB; return one table a tile, in tile px, scores >= `min_score`.

        Tiles cannot be written to: they may be views of a region, and overlap.
        """
        ...


def distinct(detections: Detections, iou: float) -> Detections:
    """Return the best of all rows that say the same object.

    Row by row from the first, what overlaps a row that was kept, has its label and comes later goes.

    Parameters
    ----------
    detections : Detections
        Best first.
    iou : float
        Intersection over union above which two boxes of one label say the same.

    Examples
    --------
    >>> distinct(Detections.build([[0, 0, 9, 9], [1, 0, 10, 9], [9, 0, 18, 9]], [0.9, 0.8, 0.7]), 0.5).score
    array([0.9, 0.7], dtype=float32)
    """
    left, kept = np.arange(len(detections)), []
    while len(left):
        first, rest = left[0], left[1:]
        kept.append(first)
        boxes = detections.xyxy[rest]
        same = iou_pairs(np.broadcast_to(detections.xyxy[first], boxes.shape), boxes) > iou
        left = rest[~(same & (detections.label[rest] == detections.label[first]))]
    return detections[np.array(kept, np.intp)]


def iou_pairs(a_xyxy: NDArray[np.float64], b_xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the intersection over union of row i of `a_xyxy` with row i of `b_xyxy`, shape (N,).

    Examples
    --------
    >>> iou_pairs(np.array([[0.0, 0, 2, 2]]), np.array([[1.0, 0, 3, 2]])).round(3)
    array([0.333])
    """
    overlap_wh = np.minimum(a_xyxy[:, 2:], b_xyxy[:, 2:]) - np.maximum(a_xyxy[:, :2], b_xyxy[:, :2])
    overlap = np.clip(overlap_wh, 0, None).prod(1)
    union = (a_xyxy[:, 2:] - a_xyxy[:, :2]).prod(1) + (b_xyxy[:, 2:] - b_xyxy[:, :2]).prod(1) - overlap
    return np.asarray(overlap / np.maximum(union, np.finfo(float).tiny))
