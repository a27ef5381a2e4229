"""Decisions whose region has another id since the slide was scanned anew find their place by where they are."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import astuple

import numpy as np
import shapely

from slidescan.detections import iou_pairs
from slidescan.geometry import Box
from slidescan.reviews.items import ReviewItem

__all__ = ["reattach"]

_SAME_IOU = 0.5  # from here on two boxes mean one thing: the usual rule for detections (Pascal VOC)


def reattach(boxes_l0: Mapping[str, Box], items: Collection[ReviewItem]) -> dict[str, str]:
    """Return, by old id, the id of the item at the same place; what finds nothing is left out.

    An old box and an item belong together if the box's centre is in the item's outline, or their boxes' intersection
    over union is 0.5 or more. Each is given away once, those that overlap most first; equal ones by id.

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
    outlines = shapely.box(*new_xyxy.T)
    a, b = shapely.STRtree(outlines).query(shapely.box(*old_xyxy.T))
    for row in np.unique(b).tolist():
        polygon_l0 = new[row].polygon_l0
        if polygon_l0 is not None:
            outlines[row] = shapely.Polygon(polygon_l0)
    overlap = iou_pairs(old_xyxy[a], new_xyxy[b])
    centre_x, centre_y = (old_xyxy[a, 0] + old_xyxy[a, 2]) / 2, (old_xyxy[a, 1] + old_xyxy[a, 3]) / 2
    fits = shapely.intersects_xy(outlines[b], centre_x, centre_y) | (overlap >= _SAME_IOU)
    attached: dict[str, str] = {}
    given: set[int] = set()
    for pair in np.lexsort((b, a, -overlap)).tolist():
        old, item_row = old_ids[a[pair]], int(b[pair])
        if fits[pair] and old not in attached and item_row not in given:
            attached[old] = new[item_row].id
            given.add(item_row)
    return attached
