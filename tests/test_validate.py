"""The GeoJSON validator: one minimal bad document a rule, and no document that makes it fall over."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidescan.errors import ResultError
from slidescan.export import inspect_geojson, validate_geojson
from slidescan.export.rules import RULES, check_feature

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
POLYGON = {"type": "Polygon", "coordinates": [SQUARE]}
UUID = "6ba7b810-9dad-11d1-80b4-00c04fd430c8"


def _feature(*, geometry: Any = POLYGON, top: dict | None = None, **properties: Any) -> dict:
    properties = {"objectType": "detection", **properties}
    return {"type": "Feature", "geometry": geometry, "properties": properties, **(top or {})}


def _without(feature: dict, key: str) -> dict:
    return {k: v for k, v in feature.items() if k != key}


def _polygon(*rings: Any) -> dict:
    return _feature(geometry={"type": "Polygon", "coordinates": list(rings)})


def _class(**members: Any) -> dict:
    return _feature(classification={"name": "a", "color": [1, 2, 3], **members})


def _nested(levels: int) -> dict:
    feature = _feature()
    for _ in range(levels):
        feature = _feature(childObjects=[feature])
    return feature


def _rules(path: Path) -> set[str]:
    return {p.rule for p in validate_geojson(path)}


def _document(path: Path, document: Any) -> Path:
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return path


# Each with exactly one slip; the rule it breaks comes first.
BAD_FEATURES: list[tuple[str, Any]] = [
    ("feature", 7),
    ("feature", None),
    ("feature", _without(_feature(), "type")),
    ("id", _feature(top={"id": "detection_3"})),
    ("id", _feature(top={"id": 3})),
    ("id-form", _feature(top={"id": None})),
    ("id-form", _feature(top={"id": {}})),
    ("properties", {"type": "Feature", "geometry": POLYGON, "properties": None}),
    ("properties", {"type": "Feature", "geometry": POLYGON, "properties": []}),
    ("object-type-missing", _without(_feature(), "properties")),
    ("object-type-missing", {"type": "Feature", "geometry": POLYGON, "properties": {}}),
    ("object-type-place", _feature(top={"objectType": "detection"})),
    ("object-type-unknown", _feature(objectType="DETECTION")),
    ("object-type-unknown", _feature(objectType=1)),
    ("object-type-text", _feature(objectType=None)),
    ("object-type-text", _feature(objectType={})),
    ("tma-core", _feature(objectType="tmaCore")),
    ("name", _feature(name=None)),
    ("name", _feature(name=1)),
    ("locked", _feature(isLocked=None)),
    ("locked", _feature(isLocked=[])),
    ("locked-text", _feature(isLocked="yes")),
    ("locked-text", _feature(isLocked=1)),
    ("stray-number", _feature(probability=0.5)),
    ("class-form", _feature(classification=[])),
    ("class-form", _feature(classification=7)),
    ("class-form", _feature(classification={"color": [1, 2, 3]})),
    ("class-form", _class(name=None)),
    ("class-form", _class(names=["a", 1])),
    ("class-color", _feature(classification={"name": "a"})),
    ("class-old", _feature(classification={"name": "a", "colorRGB": -1})),
    ("class-json", _feature(classification='{"name": "a", "color": [1, 2, 3]}')),
    ("class-colon", _feature(classification="a: b")),
    ("class-colon", _class(name="a:b")),
    ("class-newline", _class(names=["a", "b\nc"])),
    ("color-form", _class(color="[1, 2, 3]")),
    ("color-form", _class(color=[1, 2])),
    ("color-form", _class(color=[1, 2, None])),
    ("color-form", _feature(color="red")),
    ("color-range", _class(color=[0, 0, 256])),
    ("color-range", _class(color=[0.2, 0.5, 1.0])),
    ("measurements", _feature(measurements="none")),
    ("measurements", _feature(measurements=None)),
    ("measurements-list", _feature(measurements=[{"name": "score", "value": 1}])),
    ("measurement-text", _feature(measurements={"score": "high"})),
    ("measurement-text", _feature(measurements={"score": "1_000"})),
    ("measurement-null", _feature(measurements={"score": None})),
    ("measurement-null", _feature(measurements={"score": True})),
    ("measurement-nested", _feature(measurements={"score": [1]})),
    ("metadata", _feature(metadata={"a": {}})),
    ("metadata", _feature(metadata=[])),
    ("children", _feature(childObjects={})),
    ("feature", _feature(children=[{"x": 1}])),
    ("children", _nested(60)),
    ("geometry-missing", _feature(geometry=None)),
    ("geometry-missing", _without(_feature(), "geometry")),
    ("geometry-collection", _feature(geometry={"type": "GeometryCollection", "geometries": [POLYGON]})),
    ("geometry-type", _feature(geometry={"type": "Circle", "coordinates": [0, 0]})),
    ("geometry-type", _feature(geometry="POLYGON EMPTY")),
    ("geometry-coordinates", _feature(geometry={"type": "Polygon"})),
    ("geometry-coordinates", _feature(geometry={"type": "MultiPolygon", "coordinates": []})),
    ("geometry-coordinates", _feature(geometry={"type": "Point", "coordinates": [1]})),
    ("geometry-coordinates", _feature(geometry={"type": "LineString", "coordinates": [1, 2]})),
    ("geometry-coordinates", _polygon()),
    ("geometry-coordinates", _polygon([[0, 0], [1, None], [1, 1], [0, 0]])),
    ("geometry-coordinates", _polygon([[0, 0], [1], [1, 1], [0, 0]])),
    ("geometry-coordinates", _polygon([["0", "0"], ["1", "0"], ["1", "1"], ["0", "0"]])),
    ("geometry-coordinates", _polygon([[0, 0], [1e300, 0], [1, 1], [0, 0]])),
    ("line-short", _feature(geometry={"type": "LineString", "coordinates": [[1, 2]]})),
    ("line-short", _feature(geometry={"type": "MultiLineString", "coordinates": [[[1, 2], [3, 4]], [[1, 2]]]})),
    ("ring-short", _polygon([[0, 0], [1, 0], [0, 0]])),
    ("ring-short", _polygon(SQUARE, [[1, 1], [2, 2], [1, 1]])),
    ("ring-open", _polygon(SQUARE[:-1])),
    ("ring-open", _feature(geometry={"type": "MultiPolygon", "coordinates": [[SQUARE], [SQUARE[:-1]]]})),
    ("polygon-invalid", _polygon([[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]])),
    ("polygon-invalid", _polygon([[0, 0], [5, 0], [5, 0], [0, 0], [0, 0]])),
    ("polygon-invalid", _polygon(SQUARE, [[20, 20], [21, 20], [21, 21], [20, 20]])),
    ("polygon-collapses", _polygon([[0, 0], [0.003, 0], [0.003, 0.003], [0, 0.003], [0, 0]])),
]

BAD_TEXTS: list[tuple[str, str]] = [
    ("empty", ""),
    ("empty", " \n\t "),
    ("json", "not json"),
    ("json", '{"type": "FeatureCollection", "features": ['),
    ("json", '{"type": "FeatureCollection", "features": [{"type": "Fea'),
    ("json", '{"type": "FeatureCollection", "features": [],}'),
    ("json", '{"type": "FeatureCollection", "features": []} {}'),
    ("json", '{"type": "FeatureCollection" "features": []}'),
    ("json", "[1 2]"),
    ("json", "[,]"),
    ("json", "{1: 2}"),
    ("json", "[" * 100_000),
    ("json", "[" + "9" * 10_000 + "]"),
    ("byte-order-mark", '\ufeff{"type": "FeatureCollection", "features": []}'),
    ("bare-nan", json.dumps([_feature(measurements={"score": float("nan")})])),
    ("repeated-key", '{"type": "FeatureCollection", "type": "FeatureCollection", "features": []}'),
    (
        "repeated-key",
        json.dumps([_feature()]).replace('"properties"', '"geometry": null, "properties"').replace("null", "{}"),
    ),
    ("top-level", "7"),
    ("top-level", '"text"'),
    ("top-level", "{}"),
    ("top-level", '{"type": "FeatureCollection"}'),
    ("top-level", '{"type": "FeatureCollection", "features": null}'),
    ("top-level", '{"type": "Topology", "features": []}'),
    ("top-level", '[{"type": "FeatureCollection"}]'),
    ("repeated-id", json.dumps([_feature(top={"id": UUID}), _feature(top={"id": UUID.upper()})])),
]


@pytest.mark.parametrize(("rule", "feature"), BAD_FEATURES)
def test_each_rule_of_an_object(tmp_path: Path, rule: str, feature: Any) -> None:
    """A document with one slip breaks that rule only, at the object's line and place."""
    lines = ['{"type":"FeatureCollection","features":[', json.dumps(_feature()) + ",", json.dumps(feature), "]}"]
    (problem,) = validate_geojson(_document(tmp_path / "a.geojson", "\n".join(lines)))
    assert problem.rule == rule
    assert (problem.line, problem.feature) == (3, 1)
    assert (problem.severity, problem.message) == RULES[rule]


@pytest.mark.parametrize(("rule", "text"), BAD_TEXTS)
def test_each_rule_of_the_file(tmp_path: Path, rule: str, text: str) -> None:
    """A text that is not JSON, or JSON that is no GeoJSON, breaks its rule and raises nothing."""
    assert rule in _rules(_document(tmp_path / "a.geojson", text))


def test_every_rule_is_tested() -> None:
    """No rule stands in the table without a document that breaks it."""
    tested = {rule for rule, _ in BAD_FEATURES} | {rule for rule, _ in BAD_TEXTS}
    assert tested | {"suffix", "packing", "zip", "encoding"} == set(RULES)


@pytest.mark.parametrize(
    "document",
    [
        {"type": "FeatureCollection", "features": [], "slidescan": {"features": 0}},
        {"features": [_feature()], "type": "FeatureCollection"},
        _feature(),
        [_feature(), POLYGON, {"type": "FeatureCollection", "features": [_feature()]}],
        POLYGON,
        [_feature(geometry={"type": "Point", "coordinates": [1.5, 2, 3]})],
        [_feature(geometry={"type": "MultiLineString", "coordinates": [[[0, 0], [1, 1]]]})],
        [_feature(geometry={"type": "MultiPolygon", "coordinates": [[SQUARE, [[2, 2], [3, 2], [3, 3], [2, 2]]]]})],
        [_feature(classification=None), _feature(classification={}), _feature(classification="Tumor"), _class()],
        [_class(names=["a", "b"], color=[1, 2, 3, 255]), _feature(color=[0, 0, 0], name="x", isLocked=True)],
        [_feature(measurements={"a": 1, "b": "NaN", "c": "inf", "d": "-inf", "e": " 1.5e3 ", "f": "-Infinity"})],
        [_feature(metadata={"a": "b", "c": 1, "d": True}, isLocked="true", childObjects=[_feature()])],
        [{"type": "Feature", "geometry": POLYGON, "properties": {"object_type": "cell"}, "nucleusGeometry": POLYGON}],
        [{"type": "Feature", "geometry": None, "properties": {"type": "root"}}],
        [_feature(color=-65536, childObjects=None), _feature(color=None, children=[_feature()])],
    ],
)
def test_what_qupath_reads_as_meant_is_clean(tmp_path: Path, document: Any) -> None:
    """Every form that QuPath writes or accepts passes without a word."""
    assert validate_geojson(_document(tmp_path / "a.json", document)) == []


def test_metadata_written_twice_is_tolerated(tmp_path: Path) -> None:
    """QuPath's own exports repeat the key metadata; that is no problem."""
    text = json.dumps([_feature(metadata={"a": "b"})]).replace('"metadata"', '"metadata": {"a": "b"}, "metadata"')
    assert validate_geojson(_document(tmp_path / "a.geojson", text)) == []


def test_lines_of_pretty_printed_files(tmp_path: Path) -> None:
    """The line is where the object begins, with Windows line ends too and far into the file."""
    features = [_feature()] * 9000 + [_feature(name=None)]
    text = json.dumps({"type": "FeatureCollection", "features": features}, indent=1)
    expected = 1 + text[: text.rindex('"type": "Feature"')].rindex("{")
    expected_line = 1 + text[:expected].count("\n")
    for ends in ("\n", "\r\n"):
        path = tmp_path / "a.geojson"
        path.write_bytes(text.replace("\n", ends).encode())
        (problem,) = validate_geojson(path)
        assert (problem.line, problem.feature) == (expected_line, 9000)


def test_line_of_a_syntax_error(tmp_path: Path) -> None:
    """Broken JSON is found at the line of the fault, after the objects before it were checked."""
    text = json.dumps([_feature(name=None), _feature()], indent=0)
    at = text.rindex('"Polygon"')
    problems = validate_geojson(_document(tmp_path / "a.geojson", text[:at] + "Polygon" + text[at + 9 :]))
    assert [p.rule for p in problems] == ["name", "json"]
    assert problems[1].line == 1 + text[:at].count("\n")


def test_many_equal_problems_are_counted(tmp_path: Path) -> None:
    """A slip in every object is listed a hundred times and then counted."""
    problems = validate_geojson(_document(tmp_path / "a.geojson", [_feature(name=None)] * 1234))
    assert len(problems) == 100
    assert problems[-1].message.endswith("(and 1,134 more of these)")


def test_summary_counts_as_qupath_reads(tmp_path: Path) -> None:
    """Objects are counted by the type QuPath gives them and by class."""
    within = _feature(objectType="DETECTION", classification="b", childObjects=[_class()])
    features = [_class(), _feature(), within, POLYGON]
    report = inspect_geojson(_document(tmp_path / "a.geojson", features))
    assert report.summary == {"detection": {"a": 2, "unclassified": 1}, "annotation": {"unclassified": 1, "b": 1}}
    assert report.is_importable
    assert not inspect_geojson(_document(tmp_path / "b.geojson", [_feature(name=None)])).is_importable


# ---- Packing


def test_packed_files(tmp_path: Path) -> None:
    """gzip passes, zip passes with a warning, and both are read through."""
    good, bad = json.dumps([_feature()]), json.dumps([_feature(name=None)])
    for text, extra in ((good, set()), (bad, {"name"})):
        with gzip.open(tmp_path / "a.json.gz", "wt") as file:
            file.write(text)
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
            archive.writestr("a.geojson", text)
        assert _rules(tmp_path / "a.json.gz") == extra
        assert _rules(tmp_path / "a.zip") == extra | {"zip"}


def test_damaged_packing(tmp_path: Path) -> None:
    """Cut, mislabelled, foreign, encrypted and empty archives are problems and not tracebacks."""
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        archive.writestr("a.geojson", json.dumps([_feature()]))
        archive.writestr("__MACOSX/._a.geojson", b"\0\5\x16\7")
    assert _rules(tmp_path / "mac.zip") == {"zip"}
    whole = gzip.compress(json.dumps([_feature()] * 50).encode())
    with zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("a.geojson", "[]")
        archive.writestr("b.geojson", "[]")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("a.txt", "[]")
    zipped = (tmp_path / "two.zip").read_bytes()
    files = {
        "cut.geojson.gz": whole[:-20],
        "wrong.geojson": whole,
        "plain.geojson.gz": b"[]",
        "plain.zip": b"[]",
        "cut.zip": zipped[:60],
        "flipped.geojson.gz": whole[:30] + b"\0\0\0\0" + whole[34:],
        "encrypted.zip": zipped.replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    for name in [*files, "two.zip", "none.zip"]:
        assert "packing" in _rules(tmp_path / name), name


def test_other_encodings(tmp_path: Path) -> None:
    """Text that is not UTF-8 is a problem, at the start or far into the file."""
    for data in (json.dumps([]).encode("utf-16"), b"[" + b" " * 3_000_000 + b'"\xe9"]'):
        (tmp_path / "a.geojson").write_bytes(data)
        assert _rules(tmp_path / "a.geojson") == {"encoding"}


def test_suffix(tmp_path: Path) -> None:
    """A suffix QuPath does not open is an error, however good the content."""
    assert _rules(_document(tmp_path / "a.txt", [_feature()])) == {"suffix"}


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    """A missing file and a folder are errors in one line."""
    for path in (tmp_path / "missing.geojson", tmp_path):
        with pytest.raises(ResultError, match="check the path") as caught:
            validate_geojson(path)
        assert "\n" not in str(caught.value)


# ---- Robustness

_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(SQUARE),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=12,
)
_odd_feature = st.fixed_dictionaries(
    {"type": st.just("Feature")},
    optional={
        "id": _json,
        "geometry": _json
        | st.fixed_dictionaries(
            {"type": st.sampled_from(["Point", "LineString", "Polygon", "MultiPolygon"]) | _json, "coordinates": _json}
        )
        | st.lists(
            st.lists(st.floats(-1e10, 1e10) | st.integers(), min_size=2, max_size=2), min_size=4, max_size=6
        ).map(lambda ring: {"type": "Polygon", "coordinates": [[*ring, ring[0]]]}),
        "properties": _json
        | st.fixed_dictionaries(
            {},
            optional=dict.fromkeys(
                ("objectType", "classification", "measurements", "metadata", "name", "color", "isLocked"), _json
            ),
        ),
    },
)


@given(_odd_feature | _json)
def test_no_object_makes_it_raise(value: Any) -> None:
    """Any JSON value in the place of a feature gives rule names that exist."""
    assert set(check_feature(value)) <= set(RULES)


@given(
    st.binary(max_size=60)
    | _json.map(lambda v: json.dumps(v).encode())
    | _odd_feature.map(lambda v: json.dumps(v).encode())
)
def test_no_file_makes_it_raise(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    """Any bytes give a list of problems, each on one line."""
    path = tmp_path_factory.getbasetemp() / "any.geojson"
    path.write_bytes(data)
    for problem in validate_geojson(path):
        assert problem.line >= 1
        assert "\n" not in str(problem)


@given(st.data())
def test_a_file_cut_anywhere_is_found(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Every proper beginning of a document is an error."""
    text = json.dumps(
        {"type": "FeatureCollection", "features": [_class(name="é\\"), _feature(measurements={"a": 1e-5})]}
    )
    path = tmp_path_factory.getbasetemp() / "cut.geojson"
    path.write_text(text[: data.draw(st.integers(0, len(text) - 1))])
    assert not inspect_geojson(path).is_importable


def test_messages_keep_the_files_text_to_themselves(tmp_path: Path) -> None:
    """No message repeats a name, class, measurement or id of the file."""
    secret = "DOE^JANE"
    feature = _feature(
        top={"id": secret}, objectType=secret, name=[secret], classification=f"{secret}:", measurements={secret: secret}
    )
    text = json.dumps([feature]) + secret
    assert all(secret not in str(p) for p in validate_geojson(_document(tmp_path / "a.geojson", text)))
