"""Outlines of many objects, checked together."""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidescan.export import validate_geojson
from slidescan.export.rules import check_feature


def feature(kind: str, coordinates: Any, **properties: Any) -> dict[str, Any]:
    geometry = {"type": kind, "coordinates": coordinates}
    return {"type": "Feature", "geometry": geometry, "properties": {"objectType": "detection", **properties}}


SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
BOW_TIE = [[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]
THREAD = [[0, 0], [9, 0], [9, 0.001], [0, 0]]
SLANTED = [[0, 0], [9, 1], [8, 9], [0, 0]]
HOLE = [[4, 2], [6, 2], [6, 4], [4, 2]]
OUTLINES = [SLANTED, BOW_TIE, THREAD, [[0, 0], [1, 1]], [[0, 0], [9, 0], [9, 9], [1, 1]]]


def parent_of(ring: list[list[float]]) -> dict[str, Any]:
    children = [feature("Polygon", [inner]) for inner in (ring, SLANTED)]
    return feature("Polygon", [SQUARE], childObjects=children)


RINGS = st.sampled_from(OUTLINES)
OBJECTS = st.one_of(
    RINGS.map(lambda ring: feature("Polygon", [ring])),
    st.sampled_from([[SLANTED, HOLE], [SLANTED, BOW_TIE], [SQUARE]]).map(lambda rings: feature("Polygon", rings)),
    st.lists(RINGS, min_size=1, max_size=3).map(lambda rings: feature("MultiPolygon", [[ring] for ring in rings])),
    RINGS.map(parent_of),
    st.just(7),
)


@given(st.lists(OBJECTS, max_size=9), st.sampled_from([1, 2, 1000]))
def test_a_file_breaks_what_its_objects_break_one_by_one(objects: list[Any], at_once: int) -> None:
    """In their order, however many outlines are checked together."""
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("slidescan.export.validate._AT_ONCE", at_once)
        path = Path(folder) / "a.geojson"
        path.write_text(json.dumps(objects))
        found = [(problem.feature, problem.rule) for problem in validate_geojson(path)]
    expected = [(n, rule) for n, one in enumerate(objects) for rule in dict.fromkeys(check_feature(one))]
    assert [n for n, _ in found] == [n for n, _ in expected]
    assert sorted(found) == sorted(expected)
