"""Decisions whose region has another id since the slide was scanned anew find their place by where they are."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import astuple

import numpy as np
import shapely
from numpy.typing import NDArray

from slidescan.detections import iou_pairs
from slidescan.geometry import Box
from slidescan.reviews.items import ReviewItem

__all__ = ["at_one_place", "boxes_of", "found_of", "reattach"]

_SAME_IOU = 0.5  # from here on two boxes mean one thing: the usual rule for detections (Pascal VOC)
_LEAST_IOU = 0.2  # below it two boxes do not, even if one's centre is in the other: a cell and debris at its edge


def reattach(boxes_l0: Mapping[str, Box], items: Collection[ReviewItem]) -> dict[str, str]:
    """Return, by old id, the id of the item at the same place; what finds nothing is left out.

    An old box and an item belong together if the box's centre is in the item's outline (of a detection, which has but a
    box, with an intersection over union of 0.2 or more), or the intersection over union of their boxes is 0.5 or more.
    Each is given away once, those that overlap most first; equal ones by id.

    Parameters
    ----------
    boxes_l0 : mapping of str to Box
        By the id they had; of one scan of the slide.
    items : collection of ReviewItem
        Of the present scan of the same slide.
    """
    if not boxes_l0 or not items:
        return {}
    old_ids, new = sorted(boxes_l0), sorted(items, key=lambda item: item.id)
    old_xyxy = np.array([astuple(boxes_l0[id_]) for id_ in old_ids], np.float64)
    new_xyxy = np.array([astuple(item.box_l0) for item in new], np.float64)
    least_iou = _LEAST_IOU if new[0].what == "detection" else 0.0
    pairs = at_one_place(old_xyxy, new_xyxy, lambda row: new[row].polygon_l0, least_iou)
    return {old_ids[old]: new[row].id for old, row in pairs.items()}


def found_of(parts_l0: Sequence[Box], found_xyxy: NDArray[np.floating]) -> list[int]:
    """Return the rows of detections (N, 4) that a decision was made on, whose boxes were `parts_l0` then."""
    return sorted(at_one_place(boxes_of(parts_l0), found_xyxy.astype(np.float64)).values())


def boxes_of(parts_l0: Sequence[Box]) -> NDArray[np.float64]:
    """Return boxes as rows (N, 4)."""
    return np.array([astuple(part) for part in parts_l0], np.float64).reshape(-1, 4)


def at_one_place(
    old_xyxy: NDArray[np.float64],
    new_xyxy: NDArray[np.float64],
    outline: Callable[[int], NDArray[np.float64] | None] = lambda row: None,
    least_iou: float = _LEAST_IOU,
) -> dict[int, int]:
    """Return, by row of the old boxes (N, 4), the row of the new one (M, 4) at the same place, as `reattach` has it.

    `outline` gives the outline of a new one, (K, 2), where that is not its box. Boxes are in one frame, whichever.
    """
    if not len(old_xyxy) or not len(new_xyxy):
        return {}
    outlines = shapely.box(*new_xyxy.T)
    a, b = shapely.STRtree(outlines).query(shapely.box(*old_xyxy.T))
    for row in np.unique(b).tolist():
        if (polygon := outline(row)) is not None:
            outlines[row] = shapely.Polygon(polygon)
    overlap = iou_pairs(old_xyxy[a], new_xyxy[b])
    centre_x, centre_y = (old_xyxy[a, 0] + old_xyxy[a, 2]) / 2, (old_xyxy[a, 1] + old_xyxy[a, 3]) / 2
    inside = shapely.intersects_xy(outlines[b], centre_x, centre_y)
    fits = (inside & (overlap >= least_iou)) | (overlap >= _SAME_IOU)
    attached: dict[int, int] = {}
    given: set[int] = set()
    for pair in np.lexsort((b, a, -overlap)).tolist():
        old, new = int(a[pair]), int(b[pair])
        if fits[pair] and old not in attached and new not in given:
            attached[old] = new
            given.add(new)
    return attached
