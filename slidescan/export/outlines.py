"""What QuPath 0.5 to 0.8 makes of a GeoJSON geometry; the rules are those of `slidescan.export.rules`.

Pure; no value, however odd, raises. Form is looked at one by one, area of many outlines at once: a thousand together
take a quarter of the time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

__all__ = ["Outline", "check_geometry", "check_outlines", "is_geometry", "is_number"]

Outline = list[list[NDArray[np.float64]]]  # polygons of rings (N, 2), px: the outer one, then holes

# How many arrays enclose a position.
_DEPTH = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2, "Polygon": 2, "MultiPolygon": 3}
_GRID_PX = 0.01  # QuPath reduces outlines to this step
_LIMIT_PX = 1e9  # beyond it a coordinate is no pixel, and squaring it may leave float's range


def is_geometry(value: Any) -> bool:
    """Return whether `value` is an object that calls itself a geometry."""
    kind = value.get("type") if isinstance(value, dict) else None
    return isinstance(kind, str) and (kind in _DEPTH or kind == "GeometryCollection")


def is_number(value: Any) -> bool:
    """Return whether a value of JSON is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_geometry(geometry: Any, outlines: list[Outline] | None = None) -> Iterator[str]:
    """Yield the rules that a geometry breaks; for polygons the first of each outline.

    Where `outlines` is given, it gets the well-formed ones, for `check_outlines` to check many at once.

    Examples
    --------
    >>> list(check_geometry({"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1, 1]]]}))
    ['ring-short']
    """
    if geometry is None:
        yield "geometry-missing"
        return
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind == "GeometryCollection":
        yield "geometry-collection"
    elif not isinstance(kind, str) or kind not in _DEPTH:
        yield "geometry-type"
    elif kind == "Polygon":
        if not _is_rectangle(geometry.get("coordinates")):  # nearly every object there is; 20 times as fast
            yield from _check_polygons([geometry.get("coordinates")], outlines)
    elif kind == "MultiPolygon" and isinstance(geometry.get("coordinates"), list):
        yield from _check_polygons(geometry["coordinates"], outlines)
    elif not _are_positions(geometry.get("coordinates"), _DEPTH[kind]):
        yield "geometry-coordinates"
    elif kind in ("LineString", "MultiLineString"):
        lines = [geometry["coordinates"]] if kind == "LineString" else geometry["coordinates"]
        if any(len(line) < 2 for line in lines):
            yield "line-short"


def _are_positions(found: Any, depth: int) -> bool:
    if not isinstance(found, list) or not found:
        return False
    if depth:
        return all(_are_positions(inner, depth - 1) for inner in found)
    return len(found) >= 2 and all(is_number(v) and abs(v) < _LIMIT_PX for v in found)


def _points(ring: Any) -> NDArray[np.float64] | None:
    """Return a ring as (N, 2) px, None if it is not an array of positions."""
    if not isinstance(ring, list):
        return None
    try:
        points = np.asarray(ring)
    except ValueError:  # positions of different length
        return None
    if points.ndim != 2 or points.shape[1] < 2 or points.dtype.kind not in "if":
        return None
    xy = points[:, :2].astype(np.float64)
    return xy if (np.abs(xy) < _LIMIT_PX).all() else None


def _is_rectangle(rings: Any) -> bool:
    """Return whether this is one closed upright rectangle, wide enough to stay one on QuPath's grid."""
    if not isinstance(rings, list) or len(rings) != 1:
        return False
    try:
        (ax, ay), (bx, by), (cx, cy), (dx, dy), end = rings[0]
    except (TypeError, ValueError):
        return False
    if not all(is_number(v) and abs(v) < _LIMIT_PX for v in (ax, ay, bx, by, cx, cy, dx, dy)):
        return False
    is_upright = (ay == by and bx == cx and cy == dy and dx == ax) or (ax == bx and by == cy and cx == dx and dy == ay)
    return bool(is_upright and end == [ax, ay] and min(abs(cx - ax), abs(cy - ay)) >= 2 * _GRID_PX)


def _check_polygons(found: list[Any], outlines: list[Outline] | None) -> Iterator[str]:
    polygons: Outline = []
    for rings in found:
        arrays = [_points(ring) for ring in rings] if isinstance(rings, list) and rings else [None]
        points = [a for a in arrays if a is not None]
        if not found or len(points) < len(arrays):
            yield "geometry-coordinates"
        elif any(len(p) < 4 for p in points):
            yield "ring-short"
        elif any((p[0] != p[-1]).any() for p in points):
            yield "ring-open"
        else:
            polygons.append(points)
    if not found:
        yield "geometry-coordinates"
    elif len(polygons) == len(found):
        if outlines is None:
            yield from filter(None, check_outlines([polygons]))
        else:
            outlines.append(polygons)


# GEOS leaves floating-point flags behind on odd outlines, which NumPy would report as warnings.
@np.errstate(all="ignore")
def check_outlines(outlines: Sequence[Outline]) -> list[str | None]:
    """Return the rule that each outline breaks, or None; a thousand together take a quarter of the time of one by one.

    Examples
    --------
    >>> square, bow_tie = [[0, 0], [9, 0], [9, 9], [0, 9], [0, 0]], [[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]
    >>> check_outlines([[[np.array(ring, float)]] for ring in (square, bow_tie)])
    [None, 'polygon-invalid']
    """
    rings = [ring for polygons in outlines for polygon in polygons for ring in polygon]
    if not rings:
        return []
    made = shapely.linearrings(np.concatenate(rings), indices=np.repeat(np.arange(len(rings)), [*map(len, rings)]))
    owner = [len(polygon) for polygons in outlines for polygon in polygons]
    parts = shapely.polygons(made, indices=np.repeat(np.arange(len(owner)), owner))
    whole = [len(polygons) for polygons in outlines]
    if max(whole) > 1:
        parts = shapely.multipolygons(parts, indices=np.repeat(np.arange(len(whole)), whole))
    valid = shapely.is_valid(parts)
    # Too wide to vanish, and reduction is ten times the work.
    wide = shapely.area(parts) >= 2 * _GRID_PX * shapely.length(parts)
    return [
        "polygon-invalid" if not valid[i] else None if wide[i] else _vanishes(shape) for i, shape in enumerate(parts)
    ]


def _vanishes(shape: shapely.Geometry) -> str | None:
    try:
        return "polygon-collapses" if shapely.set_precision(shape, _GRID_PX).is_empty else None
    except shapely.errors.GEOSException:
        return "polygon-invalid"
