"""Slides with GeoJSON of QuPath: what is annotated arrives where it is, and what cannot be meant is said."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture

from slidescan.errors import ConfigError, SlidescanError
from slidescan.export.features import Feature, detection_features, detection_ids, region_features
from slidescan.export.geojson import write_geojson
from slidescan.flagged import FlaggedRegion
from slidescan.geometry import Box
from slidescan.phantom import Phantom, write_phantom
from slidescan.slides import memory_slide
from slidescan.train import qupath
from slidescan.train.annotated import Annotated
from slidescan.train.own import kind_of
from slidescan.train.qupath import load_slides
from slidescan.train.windows import Windows

GREY = 200


def feature(kind: str, coordinates: Any, **properties: Any) -> dict[str, Any]:
    """One object as QuPath writes it."""
    properties = {"objectType": "annotation", "classification": {"name": "cell", "color": [1, 2, 3]}} | properties
    return {"type": "Feature", "geometry": {"type": kind, "coordinates": coordinates}, "properties": properties}


SQUARE = [[10, 20], [30, 20], [30, 50], [10, 50], [10, 20]]
POINT = feature("Point", [40, 60])


def slides(folder: Path, document: Any, name: str = "a.geojson") -> Path:
    """Write a picture of 200 × 100 px and what is annotated on it."""
    Picture.new("RGB", (200, 100), (GREY, GREY, GREY)).save(folder / "a.png")
    data = document if isinstance(document, bytes) else json.dumps(document).encode()
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    return folder


def load_qupath(folder: Path, classes: tuple[str, ...] = ("mitosis", "cell"), **more: Any) -> list[Annotated]:
    """Load with the options of these tests."""
    return load_slides(folder, classes, **{"object_um": 5.0, "mpp": 0.5, "attributes": ["atypical"]} | more)


def test_what_is_exported_comes_back(tmp_path: Path) -> None:
    """A phantom's truth goes out as GeoJSON and returns to a px, without the flagged regions beside it."""
    phantom = write_phantom(tmp_path / "x.svs", Phantom((1536, 1280), tissue=0.6, n_figures=9), workers=1)
    truth = phantom.truth
    ids = detection_ids("a:b", truth.xyxy, truth.label)
    region = FlaggedRegion(
        1, "mitotic figure", np.array([[0.0, 0], [900, 0], [900, 900]]), 3, 0.9, 0.8, 2.0, 0.1, Box(0, 0, 9, 9)
    )
    features = [
        *region_features([region], run_namespace="a:b"),
        *detection_features(truth, classes=["mitotic figure"], ids=ids, measurements={"atypical": np.ones(len(truth))}),
    ]
    write_geojson(tmp_path / "x.geojson.gz", features)
    (found,) = load_slides(tmp_path, ["mitotic figure"], object_um=12.5, attributes=["atypical"])
    np.testing.assert_allclose(found.xyxy_l0, truth.xyxy, atol=1)
    assert len(found.xyxy_l0) >= 5
    assert (found.attributes == 1).all()
    assert (found.label == 0).all()
    assert found.slide.mpp == pytest.approx(0.25)


@pytest.mark.parametrize("name", ["a.geojson", "a.geojson.gz", "annotations/a.geojson", "a.png.geojson"])
@pytest.mark.parametrize("wrap", [lambda f: {"type": "FeatureCollection", "features": [f]}, lambda f: [f], lambda f: f])
def test_qupath_files_of_all_forms(tmp_path: Path, name: str, wrap: Callable[[Any], Any]) -> None:
    """A collection, a list and a single object, packed or not, in each place."""
    (found,) = load_qupath(slides(tmp_path, wrap(POINT), name))
    assert found.xyxy_l0.tolist() == [[35, 55, 45, 65]]
    assert found.label.tolist() == [1]


@pytest.mark.parametrize(
    ("item", "boxes"),
    [
        (feature("MultiPoint", [[40, 60], [50, 70.5]]), [[35, 55, 45, 65], [45, 65.5, 55, 75.5]]),
        (feature("Polygon", [SQUARE]), [[10, 20, 30, 50]]),
        (feature("MultiPolygon", [[SQUARE], [[[5, 21], [7, 21], [7, 25], [5, 21]]]]), [[5, 20, 30, 50]]),
        (feature("Point", [40, 60], classification="cell"), [[35, 55, 45, 65]]),
        (feature("Point", [40, 60], classification={"names": ["cell", "atypical"]}), [[35, 55, 45, 65]]),
        (feature("Point", [40, 60], classification={"name": "cell: Atypical"}), [[35, 55, 45, 65]]),
        (feature("Point", [40, 60], childObjects=[feature("Polygon", [SQUARE])]), [[35, 55, 45, 65], [10, 20, 30, 50]]),
        ([], []),
    ],
)
def test_qupath_shapes_and_classes(tmp_path: Path, item: Any, boxes: list[list[float]]) -> None:
    """Points become boxes of the object's size, outlines their bounding box; derived classes are their first part."""
    (found,) = load_qupath(slides(tmp_path, item))
    assert found.xyxy_l0.tolist() == boxes
    assert (found.label == 1).all()


@pytest.mark.parametrize("name", ["Ignore*", "ignore", "Necrosis*", "cell: Ignore*"])
def test_qupath_ignores_what_it_says(tmp_path: Path, name: str) -> None:
    """QuPath's own ignored classes, by name or star."""
    (found,) = load_qupath(slides(tmp_path, [POINT, feature("Polygon", [SQUARE], classification={"name": name})]))
    assert found.ignored_xyxy_l0.tolist() == [[10, 20, 30, 50]]
    assert len(found.label) == 1


@pytest.mark.parametrize(
    ("measurements", "expected"),
    [
        ({"atypical": 1}, 1),
        ([{"name": "atypical", "value": 0}], 0),
        ({"Area": 3.0}, np.nan),
        ({"atypical": None}, np.nan),
    ],
)
def test_qupath_attributes_are_measurements(tmp_path: Path, measurements: Any, expected: float) -> None:
    """In both forms that QuPath has written."""
    (found,) = load_qupath(slides(tmp_path, feature("Point", [40, 60], measurements=measurements)))
    np.testing.assert_array_equal(found.attributes, [[expected]])


def test_what_a_class_is_derived_by_is_an_attribute(tmp_path: Path) -> None:
    """Where some are marked so, the others are not; a measurement says otherwise. Nobody asked for what is skipped."""
    names = {"names": ["mitosis", "Atypical"]}, {"name": "mitosis"}, {"name": "mitosis: other"}
    items = [feature("Point", [10 * (i + 1), 20], classification=name) for i, name in enumerate(names)]
    items.append(feature("Point", [90, 20], classification=names[1], measurements={"atypical": 0.3}))
    (found,) = load_qupath(slides(tmp_path, items), skip=["other"])
    assert found.label.tolist() == [0, 0, 0, 0]
    assert found.attributes[:, 0].tolist() == [1, 0, 0, 0.3]
    (found,) = load_qupath(slides(tmp_path, items[1:3]), skip=["other"])
    assert np.isnan(found.attributes).all()
    with pytest.raises(ConfigError, match=r"feature 2: .* got 'mitosis: other'; add 'other' to `attributes`"):
        load_qupath(slides(tmp_path, items))


def test_what_is_skipped_says_nothing(tmp_path: Path) -> None:
    """A tumour's outline, of whatever size, and figures that are none; anything else of the class still does."""
    square = [[0, 0], [200, 0], [200, 100], [0, 100], [0, 0]]
    items = [feature("Polygon", [square], classification={"name": name}) for name in ("Tumor", "Tumor: necrotic")]
    items += [feature("Point", [20, 20], classification={"name": "mitosis: imposter"}), POINT]
    (found,) = load_qupath(slides(tmp_path, items), skip=["Tumor", "mitosis: imposter"])
    assert found.xyxy_l0.tolist() == [[35, 55, 45, 65]]
    assert len(found.ignored_xyxy_l0) == 0
    with pytest.raises(ConfigError, match=r"feature 0: expected one of the classes mitosis, cell, got 'Tumor'.*`skip`"):
        load_qupath(slides(tmp_path, items))


def test_what_is_outside_of_the_regions_was_not_annotated(tmp_path: Path) -> None:
    """QuPath's Region* is where objects are annotated: here three, one of them slanting; Ignore* inside of one."""
    classes = [{"classification": {"name": name}} for name in ("Region*", "region*", "Ignore*")]
    slanting = [[80, 10], [160, 10], [120, 70], [80, 10]]
    other = [[100, 40], [190, 40], [190, 90], [100, 90], [100, 40]]
    shapes = ([SQUARE], [slanting], [other], [[[150, 60], [170, 60], [170, 80], [150, 80], [150, 60]]])
    items = [feature("Polygon", at, **classes[i]) for at, i in zip(shapes, (0, 0, 1, 2), strict=True)]
    (found,) = load_qupath(slides(tmp_path, [*items, POINT]))
    assert found.xyxy_l0.tolist() == [[35, 55, 45, 65]]  # whoever marked it outside meant it
    ignored = np.zeros((100, 200), bool)
    for x0, y0, x1, y1 in np.rint(found.ignored_xyxy_l0).astype(int).tolist():
        ignored[y0:y1, x0:x1] = True
    y, x = np.mgrid[:100, :200] + 0.5
    within = ((x > 10) & (x < 30) & (y > 20) & (y < 50)) | ((x > 100) & (x < 190) & (y > 40) & (y < 90))
    in_slanting = (y > 10) & (np.abs(x - 120) < 40 * (70 - y) / 60)
    outside = ~(within | in_slanting) | ((x > 150) & (x < 170) & (y > 60) & (y < 80))
    assert (ignored != outside).mean() < 0.01
    assert not ignored[20:50, 10:30].any()
    assert ignored[90:].all()


@pytest.mark.parametrize("name", ["Region*", "Ignore*"])
def test_a_small_region_and_a_small_hole_stay(tmp_path: Path, name: str) -> None:
    """A region of 1 % of its slide is annotated, as any other; so is a hole of 1 % in what is ignored."""
    small = [[60, 20], [74, 20], [74, 34], [60, 34], [60, 20]]
    whole = [[0, 0], [200, 0], [200, 100], [0, 100], [0, 0]]
    rings = [small] if name == "Region*" else [whole, small]
    (found,) = load_qupath(slides(tmp_path, [feature("Polygon", rings, classification={"name": name}), POINT]))
    ignored = np.zeros((100, 200), bool)
    for x0, y0, x1, y1 in np.rint(found.ignored_xyxy_l0).astype(int).tolist():
        ignored[y0:y1, x0:x1] = True
    y, x = np.mgrid[:100, :200]
    assert np.array_equal(ignored, ~((x >= 60) & (x < 74) & (y >= 20) & (y < 34)))


@pytest.mark.parametrize("at", [[[500, 500], [600, 500], [600, 600], [500, 500]], [[5, 5], [9, 5], [5, 5]]])
def test_a_region_off_the_slide_is_refused(tmp_path: Path, at: list[list[int]]) -> None:
    """Or all of the slide would say nothing but its objects; so would one without an area."""
    region = feature("Polygon", [at], classification={"name": "Region*"})
    with pytest.raises(ConfigError, match=r"a\.geojson: expected Region\* on the slide, got none"):
        load_qupath(slides(tmp_path, [region, POINT]))


def test_holes_and_gaps_of_an_ignored_region_are_not_ignored(tmp_path: Path) -> None:
    """All but one field, as QuPath inverts an annotation; two parts; a slanting edge."""
    hole = [[60, 20], [140, 20], [140, 80], [60, 80], [60, 20]]
    whole = [[0, 0], [200, 0], [200, 100], [0, 100], [0, 0]]
    slanting = [[0, 0], [200, 0], [0, 100], [0, 0]]
    ignored = {"classification": {"name": "Ignore*"}}

    def covered(*shapes: tuple[str, Any]) -> np.ndarray:
        (found,) = load_qupath(slides(tmp_path, [feature(kind, at, **ignored) for kind, at in shapes]))
        mask = np.zeros((100, 200), bool)
        for x0, y0, x1, y1 in np.rint(found.ignored_xyxy_l0).astype(int).tolist():
            mask[y0:y1, x0:x1] = True
        return mask

    y, x = np.mgrid[:100, :200] + 0.5
    inside = (x > 60) & (x < 140) & (y > 20) & (y < 80)
    assert np.array_equal(covered(("Polygon", [whole, hole])), ~inside)
    assert np.array_equal(covered(("MultiPolygon", [[SQUARE], [hole]])), inside | covered(("Polygon", [SQUARE])))
    assert (covered(("Polygon", [slanting])) != (x / 2 + y < 100)).mean() < 0.03


@pytest.mark.parametrize("kind", ["detection", "cell", "tile"])
def test_what_a_program_found_without_a_class_is_no_object(tmp_path: Path, kind: str) -> None:
    """Else every nucleus of a cell detection was one."""
    nucleus = feature("Polygon", [SQUARE], classification=None, objectType=kind)
    with pytest.raises(ConfigError, match=r"a\.geojson: expected a class for every object, found 1 without"):
        load_qupath(slides(tmp_path, [POINT, nucleus]), classes=("cell",))


@pytest.mark.parametrize("key", ["id", "objectType"])
def test_what_a_program_found_is_known_by_its_old_name(tmp_path: Path, key: str) -> None:
    """Before QuPath 0.4 the kind was written as id, and later versions still read it so."""
    nucleus = feature("Polygon", [SQUARE], classification=None)
    del nucleus["properties"]["objectType"]
    (nucleus if key == "id" else nucleus["properties"])[key] = "PathCellObject"
    with pytest.raises(ConfigError, match="expected a class for every object"):
        load_qupath(slides(tmp_path, [POINT, nucleus]), classes=("cell",))


def test_an_outline_without_class_that_is_no_object(tmp_path: Path) -> None:
    """A tumour's outline is not taken for the one class there is; one that is called so is."""
    tumour = [[0, 0], [120, 0], [120, 90], [0, 90], [0, 0]]  # 60 µm, objects are 5
    document = {"type": "FeatureCollection", "features": [POINT, feature("Polygon", [tumour], classification=None)]}
    with pytest.raises(ConfigError, match=r"a\.geojson: feature 1: .*an outline without class 8 times as large"):
        load_qupath(slides(tmp_path, document), classes=("cell",))
    document["features"][1] = feature("Polygon", [tumour])
    (one,) = load_qupath(slides(tmp_path, document), classes=("cell",))
    assert len(one.label) == 2


def test_a_stray_json_does_not_make_pictures_of_slides(tmp_path: Path) -> None:
    """Notes beside annotated slides are notes."""
    slides(tmp_path, {"type": "FeatureCollection", "features": [POINT]})
    (tmp_path / "notes.json").write_text("{}")
    assert kind_of(tmp_path) == "slides"
    (tmp_path / "annotations").mkdir()
    (tmp_path / "a.geojson").rename(tmp_path / "annotations" / "a.geojson")
    assert kind_of(tmp_path) == "slides"
    (tmp_path / "annotations" / "a.geojson").unlink()
    assert kind_of(tmp_path) == kind_of(tmp_path / "notes.json") == "pictures"


def test_without_a_class(tmp_path: Path) -> None:
    """Of one class all objects are; of several each must say its own."""
    bare = [feature("Point", [40, 60], classification=None), feature("Point", [40, 60], classification={}), POINT]
    slides(tmp_path, bare)
    assert load_qupath(tmp_path, ("cell",))[0].label.tolist() == [0, 0, 0]
    with pytest.raises(ConfigError, match=r"a\.geojson: .*found 2 without; set it in QuPath"):
        load_qupath(tmp_path)


@pytest.mark.parametrize("foreign", [None, {"origin": "level0", "offset_l0": [0, 0]}, {"offset_l0": [3, 4]}])
def test_coordinates_count_from_the_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: dict[str, Any] | None
) -> None:
    """QuPath crops to the scanned bounds; a file of slidescan's says where it counts from."""
    slide = memory_slide(np.zeros((100, 200, 3), np.uint8), 0.5, bounds_l0=Box(50, 10, 150, 90))
    monkeypatch.setattr(qupath, "open_slide", lambda path, mpp: slide)
    document = {"type": "FeatureCollection", "features": [POINT]} | ({"slidescan": foreign} if foreign else {})
    (found,) = load_qupath(slides(tmp_path, document))
    dx, dy = foreign["offset_l0"] if foreign else (50, 10)
    assert found.xyxy_l0.tolist() == [[35 + dx, 55 + dy, 45 + dx, 65 + dy]]


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (feature("LineString", [[1, 2], [3, 4]]), "feature 0: .*LineString; draw"),
        ([POINT, feature("Point", [201, 50])], "feature 1: .*200 × 100"),
        ([POINT, feature("Point", [20, float("nan")])], "feature 1: .*finite"),
        (feature("Polygon", [[[1, 1], [1, 5], [1, 1]]]), "feature 0: .*area"),
        (feature("Polygon", []), "feature 0: .*coordinates"),
        (feature("Point", [1]), "feature 0: .*coordinates"),
        (feature("Point", {"x": 1}), "feature 0: .*coordinates"),
        ({"type": "Feature", "properties": {}, "geometry": None}, "found 1 without"),
        (feature("Point", [1, 1], classification={"name": "fat"}), "feature 0: .*mitosis, cell.*'fat'"),
        (feature("Point", [40, 60], measurements={"atypical": 7}), "feature 0: atypical: .*got 7"),
        ({"type": "FeatureCollection"}, "expected a FeatureCollection"),
        ([[POINT, "text"]], "expected a FeatureCollection"),
        ({"slidescan": {"offset_l0": 3}, "type": "FeatureCollection", "features": []}, "offset_l0"),
        (b"{", "line 1"),
        (b"\x1f\x8b", "line 1"),
    ],
)
def test_qupath_errors_say_where(tmp_path: Path, document: Any, message: str) -> None:
    """What is wrong is named, with the file and the object, on one line."""
    with pytest.raises(ConfigError, match=message) as caught:
        load_qupath(slides(tmp_path, document))
    assert str(caught.value).startswith("a.geojson: ")
    assert "\n" not in str(caught.value)


def test_slides_and_geojson_go_together(tmp_path: Path) -> None:
    """Either without the other is named; what is no slide does not matter."""
    with pytest.raises(ConfigError, match="found none"):
        load_qupath(tmp_path)
    with pytest.raises(ConfigError, match="directory"):
        load_qupath(tmp_path / "nowhere")
    slides(tmp_path, POINT)
    (tmp_path / "README.txt").write_text("Ours.")
    (tmp_path / "a.txt").write_text("Ours.")
    (tmp_path / "a").mkdir()
    assert len(load_qupath(tmp_path)) == 1
    with pytest.raises(ConfigError, match="object_um"):
        load_qupath(tmp_path, object_um=0)
    (tmp_path / "b.geojson").write_text("[]")
    with pytest.raises(ConfigError, match=r"b\.geojson: expected a slide b"):
        load_qupath(tmp_path)
    (tmp_path / "b.svs").write_text("broken")
    with pytest.raises(SlidescanError, match=r"b\.svs"):
        load_qupath(tmp_path)
    (tmp_path / "b.geojson").unlink()
    (tmp_path / "c.geojson.gz").write_bytes(gzip.compress(b"[]"))
    (tmp_path / "c.geojson").write_text("[]")
    with pytest.raises(ConfigError, match="found two"):
        load_qupath(tmp_path)
    (tmp_path / "c.geojson").unlink()
    Picture.new("RGB", (9, 9)).save(tmp_path / "c.png")
    Picture.new("RGB", (9, 9)).save(tmp_path / "d.png")
    with pytest.raises(ConfigError, match=r"d\.png: expected d\.geojson"):
        load_qupath(tmp_path)
    (tmp_path / "d.png").rename(tmp_path / "c.jpeg")
    with pytest.raises(ConfigError, match="two slides"):
        load_qupath(tmp_path)


def test_patients(tmp_path: Path) -> None:
    """From the table where there is one, else from the name, as TCGA's begin with them."""
    for name in ("TCGA-AB-1234-01A-01-TS1", "b"):
        Picture.new("RGB", (9, 9)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.geojson").write_text("[]")
    assert [found.patient for found in load_qupath(tmp_path)] == ["TCGA-AB-1234", "b"]
    table = tmp_path / "patients.csv"
    table.write_text("\ufeffslide,patient,scanner\nTCGA-AB-1234-01A-01-TS1,x,XR\nb.png,y,\n", encoding="utf-8")
    assert [(found.patient, found.scanner) for found in load_qupath(tmp_path)] == [("x", "XR"), ("y", "")]
    for text, message in [
        ("slide,patient\nb,y\n", "row for the slide TCGA"),
        ("slide,who\nb,y\n", "columns slide and patient"),
        ("slide,patient\nb,y\nb,z\n", "slide b, found two"),
    ]:
        table.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_qupath(tmp_path)
    table.write_bytes(b"slide,patient\n\xff,\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_qupath(tmp_path)


@pytest.mark.data
def test_a_real_slide(shared: Path, tmp_path: Path) -> None:
    """A slide in Aperio's format with one box: the window shows its pixels."""
    source = shared / "slides" / "CMU-1-Small-Region.svs"
    (tmp_path / "a.svs").symlink_to(source)
    write_geojson(tmp_path / "a.geojson", [Feature("annotation", (600, 700, 640, 740), "cell")])
    (found,) = load_slides(tmp_path, ["cell"], object_um=10)
    assert found.xyxy_l0.tolist() == [[600, 700, 640, 740]]
    example = Windows([found], 0.5).window(np.random.default_rng(0), 96)
    assert example.image.shape == (96, 96, 3)


@pytest.mark.parametrize("classes", [("cell",), ("mitosis", "cell")])
def test_cores_of_a_tissue_array_are_no_objects(tmp_path: Path, classes: tuple[str, ...]) -> None:
    """QuPath exports them beside what is annotated, without a class."""
    core = feature("Polygon", [SQUARE]) | {"properties": {"objectType": "tmaCore", "name": "A-1"}}
    (found,) = load_qupath(slides(tmp_path, [core, POINT]), classes)
    assert len(found.xyxy_l0) == 1
