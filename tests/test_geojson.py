"""GeoJSON export: what comes out is what went in, and QuPath takes all of it."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given
from hypothesis import strategies as st

from slidescan.detections import Detections
from slidescan.errors import ConfigError, ResultError
from slidescan.export import (
    Feature,
    detection_features,
    detection_ids,
    polygon_features,
    region_features,
    validate_geojson,
    write_geojson,
)
from slidescan.flagged import FlaggedRegion
from slidescan.geometry import Box


def _read(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)


def _write_one(tmp_path: Path, feature: Feature) -> dict:
    """Write one feature and return it as read back."""
    path = tmp_path / "one.geojson"
    assert write_geojson(path, [feature]) == 1
    assert validate_geojson(path) == []
    return _read(path)["features"][0]


# ---- Ids


@given(
    st.text(max_size=20),
    st.lists(st.tuples(*[st.floats(-1e6, 1e6)] * 4, st.integers(0, 50)), unique=True, max_size=20),
)
def test_ids_equal_the_standard_library(namespace: str, rows: list[tuple]) -> None:
    """Ids of distinct rows are uuid5 of the rounded box and label under the run's own namespace."""
    boxes = np.array([r[:4] for r in rows]).reshape(-1, 4)
    labels = [r[4] for r in rows]
    names = [
        ",".join(str(int(v)) for v in np.rint(box * 64)) + f",{label}" for box, label in zip(boxes, labels, strict=True)
    ]
    root = uuid.uuid5(uuid.UUID("6d0f5e6c-54d5-4a4e-9a6f-2b1c9d7e8f30"), namespace)
    ids = detection_ids(namespace, boxes, labels)
    assert len(set(ids)) == len(rows)
    if len(set(names)) == len(names):
        assert ids == [str(uuid.uuid5(root, name)) for name in names]


def test_ids_do_not_depend_on_the_other_rows() -> None:
    """A detection keeps its id when the table is filtered, reordered or run again with float noise."""
    boxes = np.array([[0, 0, 8, 8], [100.5, 3, 120, 20], [7, 7, 9, 9]])
    ids = detection_ids("a:b", boxes, [0, 1, 0])
    assert detection_ids("a:b", boxes[::-1] + 1e-4, [0, 1, 0]) == ids[::-1]
    assert detection_ids("other:b", boxes, [0, 1, 0]) != ids


def test_equal_rows_get_different_ids() -> None:
    """Two rows alike in box and label still have one id each, or QuPath would drop one of them."""
    assert len(set(detection_ids("a", [[0, 0, 8, 8]] * 3, [0, 0, 0]))) == 3


# ---- Detections


def test_detections_come_back_exactly(tmp_path: Path) -> None:
    """Boxes, classes, scores and ids survive the file, less the viewer's origin."""
    table = Detections.build([[110, 220.25, 150, 260], [1000, 1000, 1040.004, 1040]], [0.93, 0.00001234], [0, 1])
    ids = detection_ids("slide:model", table.xyxy, table.label)
    path = tmp_path / "case.geojson"
    features = detection_features(
        table, classes=["mitotic figure", "imposter"], ids=ids, offset_l0=(10, 20), measurements={"rank": [1, 2]}
    )
    origin = {"origin": "qupath", "offset_l0": [10, 20]}
    assert write_geojson(path, features, properties=origin) == 2
    document = _read(path)
    first, second = document["features"]
    assert first["geometry"]["coordinates"] == [[[100, 200.25], [140, 200.25], [140, 240], [100, 240], [100, 200.25]]]
    assert first["properties"]["objectType"] == "detection"
    assert first["properties"]["measurements"] == {"score": 0.93, "rank": 1}
    assert second["properties"]["measurements"]["score"] == 0.00001234
    assert [first["id"], second["id"]] == ids
    assert second["geometry"]["coordinates"][0][2] == [1030, 1020]
    assert [f["properties"]["classification"]["name"] for f in (first, second)] == ["mitotic figure", "imposter"]
    assert origin.items() <= document["slidescan"].items()
    assert document["slidescan"]["features"] == 2
    assert validate_geojson(path) == []


def test_numbers_are_short(tmp_path: Path) -> None:
    """Whole coordinates carry no decimal point and others at most two decimals."""
    path = tmp_path / "a.json"
    write_geojson(
        path, [Feature("tile", (-0.001, 1.0, 2.123456, 123456.789), "x", measurements={"score": 0.123456789})]
    )
    text = path.read_text()
    assert "[0,1],[2.12,1],[2.12,123456.79],[0,123456.79],[0,1]" in text
    assert '"score":0.1235' in text


def test_columns_of_other_length_are_refused() -> None:
    """A column that does not match the table is named, and so is a label without a class."""
    table = Detections.build([[0, 0, 4, 4]], [0.5], [1])
    with pytest.raises(ConfigError, match="column 'ids': expected 1 rows"):
        list(detection_features(table, classes=["a", "b"], ids=[]))
    with pytest.raises(ConfigError, match="got 1 names"):
        list(detection_features(table, classes=["a"], ids=["x"]))


def test_flagged_regions_are_locked_annotations(tmp_path: Path) -> None:
    """A flagged region is a locked annotation with its rank and count in the name, the same on every export."""
    outline = np.array([[0.0, 0], [400, 0], [400, 300]])
    region = FlaggedRegion(
        1,
        "mitotic figure",
        outline,
        n=7,
        peak=0.98,
        mean=0.7,
        evidence=12.5,
        area_mm2=0.01,
        peak_box_l0=Box(0, 0, 9, 9),
    )
    (feature,) = region_features([region], run_namespace="slide:model", offset_l0=(100, 0))
    (again,) = region_features([region], run_namespace="slide:model")
    out = _write_one(tmp_path, feature)
    assert out["properties"]["name"] == "1: mitotic figure ×7"
    assert out["properties"]["isLocked"] is True
    assert out["properties"]["objectType"] == "annotation"
    assert out["properties"]["measurements"]["evidence"] == 12.5
    assert shapely.from_geojson(json.dumps(out["geometry"])).equals(shapely.Polygon(outline - [100, 0]))
    assert out["id"] == again.id


def test_region_without_outline_is_refused() -> None:
    """An outline of two points is an error that names the region."""
    region = FlaggedRegion(
        3, "x", np.zeros((2, 2)), n=1, peak=1.0, mean=1.0, evidence=1.0, area_mm2=0.0, peak_box_l0=Box(0, 0, 9, 9)
    )
    with pytest.raises(ConfigError, match="flagged region 3"):
        list(region_features([region], run_namespace=""))


# ---- Outlines


def test_invalid_outlines_are_repaired(tmp_path: Path) -> None:
    """A bow tie becomes its two triangles, a hole stays, and what has no area goes and is counted."""
    bow_tie = shapely.Polygon([(0, 0), (10, 10), (10, 0), (0, 10)])
    ring = shapely.Point(50, 50).buffer(10).difference(shapely.Point(50, 50).buffer(5))
    sliver = shapely.Polygon([(0, 0), (100, 0.001), (100, 0.002)])
    mixed = shapely.GeometryCollection([shapely.box(0, 0, 4, 4), shapely.LineString([(4, 4), (9, 9)])])
    with np.errstate(invalid="ignore"):
        broken = shapely.Polygon([(0, 0), (np.nan, 1), (2, 2)])
    empty = [sliver, shapely.Point(1, 1), shapely.Polygon(), broken]
    path = tmp_path / "a.geojson"
    names = ["a", "b", "c", *"defg"]
    n = write_geojson(path, polygon_features([bow_tie, ring, mixed, *empty], class_names=names, run_namespace=""))
    document = _read(path)
    out = [shapely.from_geojson(json.dumps(f["geometry"])) for f in document["features"]]
    assert n == 3
    assert document["slidescan"]["skipped"] == 4
    assert out[0].area == pytest.approx(50)
    assert out[1].area == pytest.approx(ring.area, rel=1e-3)
    assert out[2].equals(shapely.box(0, 0, 4, 4))
    assert [f["properties"]["classification"]["name"] for f in document["features"]] == ["a", "b", "c"]
    assert validate_geojson(path) == []


def test_outline_valid_only_before_rounding(tmp_path: Path) -> None:
    """An outline that rounding to 0.01 px ties into a knot is written valid all the same."""
    spike = shapely.Polygon([(0, 0), (10, 0), (10, 10), (5.0040, 0.0040), (4.996, 0.0030), (0, 10)])
    assert spike.is_valid
    out = shapely.from_geojson(json.dumps(_write_one(tmp_path, Feature("detection", spike, "a"))["geometry"]))
    assert out.is_valid
    assert out.area == pytest.approx(spike.area, abs=0.2)


def test_outline_that_vanishes_on_import_is_skipped(tmp_path: Path) -> None:
    """A triangle that is valid on the 0.01 px grid but snaps to a line when QuPath reduces it is left out."""
    needle = shapely.Polygon([(0, 1), (0, 2), (0.01, 0)])
    assert write_geojson(tmp_path / "a.geojson", [Feature("detection", needle, "a")]) == 0


def test_polygons_are_shifted_to_the_viewers_origin() -> None:
    """The offset is subtracted from outlines as it is from boxes."""
    (feature,) = polygon_features([shapely.box(5, 6, 7, 8)], class_names=["a"], run_namespace="", offset_l0=(5, 6))
    assert feature.geometry.bounds == (0, 0, 2, 2)


def test_polygons_and_classes_must_be_in_step() -> None:
    """A class too few or too many is an error and not a shifted table."""
    for names in (["a"], ["a", "b", "c"]):
        with pytest.raises(ConfigError, match="class_names"):
            list(polygon_features([shapely.box(0, 0, 1, 1)] * 2, class_names=names, run_namespace=""))


_coordinate = st.floats(-50, 50) | st.integers(-5, 5).map(float) | st.sampled_from([1e300, float("nan"), float("inf")])
_point = st.tuples(st.floats(-50, 50) | st.integers(-5, 5), st.floats(-50, 50) | st.integers(-5, 5))
_outline = st.lists(_point, min_size=3, max_size=8).map(shapely.Polygon)
_shape = (
    st.tuples(_coordinate, _coordinate, _coordinate, _coordinate)
    | _outline
    | st.lists(_outline, max_size=3).map(shapely.MultiPolygon)
    | st.lists(_outline | _point.map(shapely.Point), max_size=3).map(shapely.GeometryCollection)
)
_feature = st.builds(
    Feature,
    kind=st.sampled_from(["detection", "annotation", "tile"]),
    geometry=_shape,
    class_name=st.text(max_size=8) | st.sampled_from(["a:b", "a\nb", "{", "", "\u2028", "\ud800"]),
    color=st.tuples(*[st.integers(0, 255)] * 3),
    name=st.text(max_size=8),
    measurements=st.dictionaries(st.text(max_size=5), st.floats() | st.integers(-(10**9), 10**9), max_size=4),
    locked=st.booleans(),
    id=st.just("") | st.uuids().map(str),
)


@given(st.lists(_feature, max_size=6, unique_by=lambda f: f.id or object()), st.sampled_from([".geojson", ".json.gz"]))
def test_every_export_imports_clean(
    tmp_path_factory: pytest.TempPathFactory, features: list[Feature], suffix: str
) -> None:
    """Whatever goes in, the validator finds nothing, every object is counted, and the bytes are the same again."""
    path = tmp_path_factory.getbasetemp() / f"fuzz{suffix}"
    n = write_geojson(path, features, properties={"scale": float("nan"), "note": None})
    before = path.read_bytes()
    document = _read(path)
    assert validate_geojson(path) == []
    assert len(document["features"]) == n
    assert document["slidescan"]["skipped"] == len(features) - n
    assert "null" not in json.dumps(document["slidescan"])
    write_geojson(path, features, properties={})
    assert path.read_bytes() == before


@given(_outline)
def test_valid_outlines_keep_their_area(tmp_path_factory: pytest.TempPathFactory, outline: shapely.Polygon) -> None:
    """Rounding moves an outline by less than 0.01 px."""
    path = tmp_path_factory.getbasetemp() / "area.geojson"
    valid = shapely.make_valid(outline, method="structure", keep_collapsed=False)
    write_geojson(path, [Feature("detection", outline, "a")])
    out = [shapely.from_geojson(json.dumps(f["geometry"])) for f in _read(path)["features"]]
    assert sum(g.area for g in out) == pytest.approx(valid.area, abs=0.01 * valid.length + 1e-3)


# ---- The file


def test_gzip_bytes_depend_on_the_objects_only(tmp_path: Path) -> None:
    """Two files of other names and times are byte-identical, with neither in the header."""
    paths = [tmp_path / "a.geojson.gz", tmp_path / "other.GeoJSON.GZ"]
    for path in paths:
        write_geojson(path, [Feature("detection", (0, 0, 9, 9), "x")])
    first, second = (p.read_bytes() for p in paths)
    assert first == second
    assert first[3:8] == bytes(5)  # no flags (name), no time


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    """When the source of objects fails half-way, the old file stays and no part of the new one does."""
    for name in ("a.geojson", "b.geojson.gz"):
        path = tmp_path / name
        write_geojson(path, [])
        before = path.read_bytes()

        def broken() -> Iterator[Feature]:
            yield from [Feature("detection", (0, 0, 9, 9), "x")] * 5000
            raise KeyError("source")

        with pytest.raises(KeyError):
            write_geojson(path, broken())
        assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.geojson", "b.geojson.gz"]


@pytest.mark.parametrize(
    ("feature", "message"),
    [
        (Feature("cell", (0, 0, 1, 1), "a"), "Feature.kind"),  # type: ignore[arg-type]
        (Feature("tile", (0, 0, 1, 1), "a", (0, 0, 256)), "Feature.color"),
        (Feature("tile", (0, 0, 1, 1), "a", id="7"), "Feature.id"),
        (Feature("tile", [0, 0, 1, 1], "a"), "Feature.geometry"),
    ],
)
def test_unwritable_features_are_refused(tmp_path: Path, feature: Feature, message: str) -> None:
    """A slip of the caller is an error in one line."""
    with pytest.raises(ConfigError, match=message):
        write_geojson(tmp_path / "a.geojson", [feature])
    assert list(tmp_path.iterdir()) == []


def test_unwritable_targets_are_refused(tmp_path: Path) -> None:
    """A suffix QuPath does not know, a missing folder, and values JSON cannot hold each get one line."""
    with pytest.raises(ConfigError, match="rename the output"):
        write_geojson(tmp_path / "a.csv", [])
    with pytest.raises(ResultError, match="No such file"):
        write_geojson(tmp_path / "missing" / "a.geojson", [])
    with pytest.raises(ConfigError, match="JSON can hold"):
        write_geojson(tmp_path / "a.geojson", [], properties={"x": object()})


def test_a_full_disk_is_said_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the words of every other file of a result."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ResultError, match="the disk is full; free some space"):
        write_geojson(tmp_path / "a.geojson", [])
    assert list(tmp_path.iterdir()) == []


def test_classes_are_made_safe(tmp_path: Path) -> None:
    """What QuPath takes for a derived class or refuses becomes an underscore."""
    out = _write_one(tmp_path, Feature("detection", (0, 0, 9, 9), "Tumor: big\nround", (1, 2, 3)))
    assert out["properties"]["classification"] == {"name": "Tumor_ big_round", "color": [1, 2, 3]}


# ---- Scale

_EXPORT = """
import sys
from pathlib import Path
import pyarrow.parquet as pq, shapely
from slidescan.export.features import polygon_features
from slidescan.export.geojson import write_geojson
from slidescan.provenance import peak_rss_mb

limit = int(sys.argv[3])
classes = []
def outlines():
    n = 0
    for batch in pq.ParquetFile(sys.argv[1]).iter_batches(4096, columns=["geometry", "class_name"]):
        batch = batch.slice(0, limit - n)
        n += len(batch)
        classes.extend(batch["class_name"].to_pylist())
        yield from shapely.from_wkb(batch["geometry"].to_numpy(zero_copy_only=False))
        if n == limit:
            return
def names():
    while classes:
        yield classes.pop(0)
n = write_geojson(sys.argv[2], polygon_features(outlines(), class_names=names(), run_namespace="hgsc"))
print(n, peak_rss_mb())
"""


def _export_nuclei(shared: Path, path: Path, limit: int) -> tuple[int, int]:
    source = shared / "data" / "hgsc" / "hgsc_nuclei_wsi.parquet"
    run = subprocess.run(
        [sys.executable, "-c", _EXPORT, source, path, str(limit)], capture_output=True, text=True, check=True
    )
    n, peak_mib = map(int, run.stdout.split())
    return n, peak_mib


def test_a_class_has_one_colour() -> None:
    """Of its regions and of its detections, or a viewer that keeps the first it sees shows two classes alike."""
    classes = ["mitotic figure", "apoptotic body"]
    square = np.array([[0.0, 0], [9, 0], [9, 9]])
    regions = [
        FlaggedRegion(rank, name, square, 1, 0.9, 0.9, 2.0, 0.1, Box(0, 0, 9, 9))
        for rank, name in enumerate(classes, 1)
    ]
    found = Detections.build([[0, 0, 9, 9]] * 2, [0.9, 0.9], [0, 1])
    shown = [
        *region_features(regions, run_namespace="a:b", classes=classes),
        *detection_features(found, classes=classes, ids=["x", "y"]),
    ]
    colours = {name: {each.color for each in shown if each.class_name == name} for name in classes}
    assert [len(each) for each in colours.values()] == [1, 1]
    assert colours[classes[0]] != colours[classes[1]]


@pytest.mark.data
def test_the_nuclei_of_a_slide(shared: Path, tmp_path: Path) -> None:
    """150,000 nuclei of a real slide stream to GeoJSON, in hardly more memory than a part of them, and import."""
    path = tmp_path / "nuclei.geojson.gz"
    part, part_mib = _export_nuclei(shared, path, 15_000)
    assert part == 15_000
    assert part_mib < 500
    assert validate_geojson(path) == []
    more, more_mib = _export_nuclei(shared, path, 150_000)
    assert more == 150_000
    assert more_mib < part_mib + 50  # held in memory, they would take 115 MiB more
