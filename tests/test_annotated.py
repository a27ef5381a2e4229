"""Training data of one's own: what is annotated arrives where it is, and windows show it there."""

from __future__ import annotations

import gzip
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from PIL import Image as Picture

from slidescan.errors import ConfigError, SlidescanError
from slidescan.export.features import Feature, detection_features, detection_ids, region_features
from slidescan.export.geojson import write_geojson
from slidescan.flagged import FlaggedRegion
from slidescan.geometry import Box
from slidescan.phantom import Phantom, write_phantom
from slidescan.slides import memory_slide
from slidescan.train import coco as coco_format
from slidescan.train import qupath
from slidescan.train.annotated import Annotated, refuse_leaks, split
from slidescan.train.coco import load_coco
from slidescan.train.qupath import load_slides
from slidescan.train.windows import Example, Windows

NOTHING = np.empty((0, 4))
GREY = 200
COLOURS = np.array(
    [(230, 20, 20), (20, 200, 20), (20, 20, 230), (220, 200, 10), (10, 200, 210), (210, 10, 200), (120, 60, 0)],
    np.uint8,
)


def one(slide: Any, xyxy: Any, patient: str = "p", **more: Any) -> Annotated:
    """Annotate a slide with objects of class 0."""
    boxes = np.array(xyxy, np.float64).reshape(-1, 4)
    columns = {"label": np.zeros(len(boxes), np.int64), "attributes": np.empty((len(boxes), 0))} | more
    return Annotated(slide, boxes, ignored_xyxy_l0=columns.pop("ignored_xyxy_l0", NOTHING), patient=patient, **columns)


# --- COCO ------------------------------------------------------------------------------------------------------------


def coco(
    folder: Path, change: Callable[[dict[str, Any]], Any] = lambda table: None, name: str = "annotations.json"
) -> Path:
    """Write a picture of 100 × 80 px with two objects, its table changed by `change`."""
    folder.mkdir(exist_ok=True)
    Picture.new("RGB", (100, 80), (GREY, GREY, GREY)).save(folder / "a.png")
    table: dict[str, Any] = {
        "images": [{"id": 7, "file_name": "a.png", "width": 100, "height": 80}],
        "categories": [{"id": 0, "name": "unused"}, {"id": 1, "name": "cell"}, {"id": 2, "name": "mitosis"}],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 1, "bbox": [10, 20, 30, 8]},
            {"id": 2, "image_id": 7, "category_id": 2, "bbox": [60.5, 20, 8, 8], "attributes": {"atypical": True}},
        ],
    }
    change(table)
    (folder / name).write_text(json.dumps(table))
    return folder


def load(folder: Path, **more: Any) -> list[Annotated]:
    """Load with the classes and attribute of these tests."""
    return load_coco(folder, ["cell", "mitosis"], **{"mpp": 0.25, "attributes": ["atypical"]} | more)


@pytest.mark.parametrize(
    "name", ["annotations.json", "annotations.coco.json", "_annotations.coco.json", "instances_train.json"]
)
def test_coco_is_found_and_read(tmp_path: Path, name: str) -> None:
    """Each usual name, the file itself, and pictures in images/ give the same objects."""
    coco(tmp_path, name=name)
    (tmp_path / "images").mkdir()
    for path in (tmp_path, tmp_path / name):
        if path != tmp_path:
            (tmp_path / "a.png").rename(tmp_path / "images" / "a.png")
        (found,) = load(path)
        assert found.xyxy_l0.tolist() == [[10, 20, 40, 28], [60.5, 20, 68.5, 28]]
        assert found.label.tolist() == [0, 1]
        np.testing.assert_array_equal(found.attributes, [[np.nan], [1]])
        assert (found.patient, found.scanner, found.slide.mpp, found.slide.size_wh) == ("a", "", 0.25, (100, 80))
        assert (found.slide.read(0, 0, 4, 4, found.slide.frame).rgb == GREY).all()


@pytest.mark.parametrize("key", ["patient", "case", "slide"])
def test_coco_images_say_more(tmp_path: Path, key: str) -> None:
    """Patient, scanner and µm/px come from the image; attributes from the annotation itself, too."""

    def change(table: dict[str, Any]) -> None:
        table["images"][0] |= {key: "x", "scanner": "XR", "mpp": 0.5}
        table["annotations"][0]["atypical"] = 0

    (found,) = load(coco(tmp_path, change))
    assert (found.patient, found.scanner, found.slide.mpp) == ("x", "XR", 0.5)
    assert found.attributes.tolist() == [[0], [1]]


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["annotations"][0].update(iscrowd=1),
        lambda t: t["annotations"][0].update(difficult=1),
        lambda t: t["annotations"][0].update(attributes={"difficult": True}),
        lambda t: t["categories"][1].update(name="Ignored"),
        lambda t: t["categories"][1].update(name="region*"),
    ],
)
def test_coco_ignores_what_it_says(tmp_path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Crowds, the difficult, and classes named so become ignored regions."""
    (found,) = load(coco(tmp_path, change))
    assert found.ignored_xyxy_l0.tolist() == [[10, 20, 40, 28]]
    assert found.label.tolist() == [1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["categories"][1].update(name="lymphocyte"), "annotation 1: .*cell, mitosis.*'lymphocyte'"),
        (lambda t: t["annotations"][1].update(bbox=[10, 10, 0, 5]), "annotation 2: .*area"),
        (lambda t: t["annotations"][1].update(bbox=[10, 10, float("nan"), 5]), "annotation 2: .*finite"),
        (lambda t: t["annotations"][1].update(bbox=[10, 10, 5]), "annotation 2: .*bbox"),
        (lambda t: t["annotations"][1].update(bbox=None), "annotation 2: .*bbox"),
        (lambda t: t["annotations"][1].update(bbox=[10, 10, 10**400, 5]), "annotation 2: .*bbox"),
        (lambda t: t["annotations"][1].update(bbox=[98, 10, 50, 5]), "annotation 2: .*100 × 80"),
        (lambda t: t["annotations"][1].update(image_id=8), "annotation 2: .*image_id"),
        (lambda t: t["annotations"][1].update(image_id=[]), "annotation 2: .*image_id"),
        (lambda t: t["annotations"][1].update(category_id=9), "annotation 2: .*category"),
        (lambda t: t["annotations"][1].update(attributes={"atypical": "maybe"}), "annotation 2: atypical"),
        (lambda t: t["images"][0].update(file_name="b.png"), "image 7: .*'b.png'"),
        (lambda t: t["images"][0].pop("file_name"), "image 7: .*file_name"),
        (lambda t: t["images"][0].update(width=50), "image 7: .*width"),
        (lambda t: t["images"][0].update(mpp=250), "image 7: .*mpp"),
        (lambda t: t["images"].append(t["images"][0]), "image 7 .*twice"),
        (lambda t: t.pop("annotations"), "'annotations'"),
        (lambda t: t.update(images={}), "'images'"),
    ],
)
def test_coco_errors_say_where(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """What is wrong is named, with the file and the annotation, on one line."""
    with pytest.raises(ConfigError, match=message) as caught:
        load(coco(tmp_path, change))
    assert str(caught.value).startswith("annotations.json: ")
    assert "\n" not in str(caught.value)


def test_coco_files_that_are_none(tmp_path: Path) -> None:
    """No table, two of them, broken JSON and damaged pictures are one-line errors."""
    with pytest.raises(ConfigError, match="found none"):
        load(tmp_path)
    with pytest.raises(ConfigError, match="readable"):
        load(tmp_path / "annotations.json")
    coco(tmp_path)
    (tmp_path / "instances_val.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"found annotations\.json, instances_val\.json"):
        load(tmp_path)
    for text in (b"", b"{", b"\xff", b"[] []", b"[" * 100_000):
        (tmp_path / "annotations.json").write_bytes(text)
        with pytest.raises(ConfigError, match=r"annotations\.json: expected") as caught:
            load(tmp_path / "annotations.json")
        assert "\n" not in str(caught.value)
    coco(tmp_path)
    for data in (b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"no picture"):
        (tmp_path / "a.png").write_bytes(data)
        with pytest.raises(SlidescanError, match=r"a\.png"):
            load(tmp_path / "annotations.json")


@pytest.mark.parametrize("large_px", [1 << 25, 1])
def test_pictures_are_decoded_late_and_travel_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large_px: int
) -> None:
    """Loading decodes nothing, only so many decoded pictures are kept, and a slide pickles as its path."""

    def change(table: dict[str, Any]) -> None:
        table["images"] += [{"id": i, "file_name": f"{i}.png"} for i in range(3)]

    coco(tmp_path, change)
    for i in range(3):
        Picture.new("RGB", (100, 80), (i, 0, 0)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(coco_format, "_pictures", held := type(coco_format._pictures)())
    monkeypatch.setattr(coco_format, "_LARGE_PX", large_px)
    monkeypatch.setattr(coco_format, "_CACHE_BYTES", 2 * 100 * 80 * 3)
    found = load(tmp_path)
    assert not held
    for i, loaded in enumerate(found[1:]):
        slide = pickle.loads(pickle.dumps(loaded.slide))
        assert slide.read(0, 0, 1, 1, slide.frame).rgb.tolist() == [[[i, 0, 0]]]
    assert len(held) == 2
    assert len(pickle.dumps(found[0].slide)) < 1000


# --- QuPath ----------------------------------------------------------------------------------------------------------


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
    region = FlaggedRegion(1, "mitotic figure", np.array([[0.0, 0], [900, 0], [900, 900]]), 3, 0.9, 0.8, 2.0, 0.1)
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
        (feature("Point", [40, 60], classification={"names": ["cell", "typical"]}), [[35, 55, 45, 65]]),
        (feature("Point", [40, 60], classification={"name": "cell: typical"}), [[35, 55, 45, 65]]),
        (feature("Point", [40, 60], childObjects=[feature("Polygon", [SQUARE])]), [[35, 55, 45, 65], [10, 20, 30, 50]]),
        ([], []),
    ],
)
def test_qupath_shapes_and_classes(tmp_path: Path, item: Any, boxes: list[list[float]]) -> None:
    """Points become boxes of the object's size, outlines their bounding box; derived classes are their first part."""
    (found,) = load_qupath(slides(tmp_path, item))
    assert found.xyxy_l0.tolist() == boxes
    assert (found.label == 1).all()


@pytest.mark.parametrize("name", ["Ignore*", "ignore", "Region*", "cell: Ignore*"])
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


# --- splits ----------------------------------------------------------------------------------------------------------

BLANK = memory_slide(np.full((64, 64, 3), GREY, np.uint8), 0.25)


@given(patients=st.lists(st.sampled_from("abcdefg"), min_size=2), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_splits_part_no_patient(patients: list[str], share: float, seed: int) -> None:
    """Both sides have a patient, none is in both, nothing is lost, and the order does not matter."""
    members = [one(BLANK, [], patient) for patient in patients]
    if len(set(patients)) == 1:
        with pytest.raises(ConfigError, match="two patients"):
            split(members, share, seed)
        return
    rest, held = split(members, share, seed)
    assert rest
    assert held
    assert len(rest) + len(held) == len(members)
    refuse_leaks(rest=rest, held=held)
    again = split(members[::-1], share, seed)[1]
    assert {m.patient for m in again} == {m.patient for m in held}


def test_leaks_are_refused() -> None:
    """The message says how many patients leak, and between which splits."""
    a, b, c = ([one(BLANK, [], patient) for patient in names] for names in ("xyz", "w", "zy"))
    refuse_leaks(train=a, validation=b, test=[])
    with pytest.raises(ConfigError, match=r"train and test: .*found 2, the first 'y'"):
        refuse_leaks(train=a, validation=b, test=c)
    with pytest.raises(ConfigError, match="share"):
        split(a, 1.0, 0)


# --- windows ---------------------------------------------------------------------------------------------------------


def painted(seed: int, size_wh: tuple[int, int], holes: tuple[Box, ...] = ()) -> Annotated:
    """Squares of 16 px, each of its own colour, which its attribute names, on grey; the last one is ignored."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size_wh[1], size_wh[0], 3), GREY, np.uint8)
    cells = [(x, y) for x in range(0, size_wh[0] - 39, 40) for y in range(0, size_wh[1] - 39, 40)]
    boxes = []
    for k, i in enumerate(rng.permutation(len(cells))[: len(COLOURS)]):
        x, y = np.array(cells[i]) + rng.integers(0, 24, 2)
        pixels[y : y + 16, x : x + 16] = COLOURS[k]
        boxes.append([x, y, x + 16, y + 16])
    rows = np.array(boxes, np.float64)
    n = len(rows) - 1
    slide = memory_slide(pixels, 0.25, holes=holes)
    return Annotated(slide, rows[:n], np.arange(n) % 2, np.arange(n)[:, None] / 10, rows[n:], "p")


def assert_seen_where_said(example: Example, size: int) -> None:
    """Each box has its colour in the middle, and there is no colour outside boxes and ignored regions."""
    image = example.image.astype(int)
    assert image.shape == (size, size, 3)
    assert example.image.dtype == np.uint8
    assert len(example.xyxy_px) == len(example.label) == len(example.attributes)
    for boxes in (example.xyxy_px, example.ignored_xyxy_px):
        assert boxes.shape == (len(boxes), 4)
        assert ((boxes >= 0) & (boxes <= size)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    for (x0, y0, x1, y1), label, attribute in zip(
        example.xyxy_px, example.label, example.attributes[:, 0], strict=True
    ):
        k = round(attribute * 10)
        assert label == k % 2
        assert np.abs(image[int((y0 + y1) / 2), int((x0 + x1) / 2)] - COLOURS[k]).max() < 50
    coloured = image.max(2) - image.min(2) > 50
    for x0, y0, x1, y1 in np.concatenate((example.xyxy_px, example.ignored_xyxy_px)):
        coloured[max(0, int(y0) - 1) : int(np.ceil(y1)) + 1, max(0, int(x0) - 1) : int(np.ceil(x1)) + 1] = False
    assert not coloured.any()


SIZES = st.sampled_from([64, 97, 160])
SLIDES = st.sampled_from([(300, 240), (130, 400), (120, 120)])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999), size=SIZES, size_wh=SLIDES, mpp=st.sampled_from([0.2, 0.25, 0.4]), joined=st.booleans()
)
def test_objects_are_where_the_window_shows_them(
    seed: int, size: int, size_wh: tuple[int, int], mpp: float, joined: bool
) -> None:
    """Scaled, cut, mirrored, turned and joined, boxes stay on their squares, and no square is background."""
    windows = Windows([painted(seed, size_wh), painted(seed + 1, size_wh)], mpp)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        assert_seen_where_said(windows.mosaic(rng, size) if joined else windows.window(rng, size), size)


def test_what_cannot_be_decoded_is_ignored() -> None:
    """A hole is white: an object in it is none, and the place counts neither way."""
    shown = painted(3, (300, 240))
    hole = Box(*shown.xyxy_l0[0].tolist()).grow(4)
    windows = Windows([painted(3, (300, 240), (hole,))], 0.25)
    rng = np.random.default_rng(0)
    for _ in range(40):
        example = windows.window(rng, 96)
        assert_seen_where_said(example, 96)
        assert 0.0 not in example.attributes
        white = (example.image == 255).all(2)
        for x0, y0, x1, y1 in example.ignored_xyxy_px:
            white[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = False
        assert white.mean() < 0.01


def test_objects_are_anywhere_in_half_of_the_windows() -> None:
    """Whole boxes are spread evenly over the window, in both directions; the other windows are of the rest."""
    slide = memory_slide(np.full((3000, 3000, 3), GREY, np.uint8), 0.25)
    windows = Windows([one(slide, [1490, 1490, 1510, 1510])], 0.25)
    rng = np.random.default_rng(1)
    examples = [windows.window(rng, 128) for _ in range(800)]
    holds = sum(len(example.xyxy_px) + len(example.ignored_xyxy_px) > 0 for example in examples)
    assert 340 < holds < 460
    boxes = np.concatenate([example.xyxy_px for example in examples])
    whole = boxes[((boxes > 0.5) & (boxes < 127.5)).all(1)]
    centres = (whole[:, :2] + whole[:, 2:]) / 2
    for axis in centres.T:
        counts = np.histogram(axis, 4, (12, 116))[0] / len(axis)
        assert (np.abs(counts - 0.25) < 0.08).all()


def test_classes_are_equally_likely() -> None:
    """One object of a rare class is drawn as often as all of a common one."""
    slide = memory_slide(np.full((400, 4000, 3), GREY, np.uint8), 0.25)
    boxes = np.array([[x, 200, x + 10, 210] for x in range(100, 4000, 200)], np.float64)
    windows = Windows([one(slide, boxes, label=(np.arange(len(boxes)) > 0).astype(np.int64))], 0.25)
    rng = np.random.default_rng(0)
    labels = np.concatenate([windows.window(rng, 64).label for _ in range(300)])
    assert 0.35 < (labels == 0).mean() < 0.6


def test_background_is_tissue() -> None:
    """On a slide, windows without an object lie where the tissue is; a slide without tissue is not drawn from."""
    pixels = np.full((1600, 2000, 3), 243, np.uint8)
    empty = memory_slide(pixels.copy(), 2.0)
    noise = np.random.default_rng(0).integers(-15, 15, (1200, 700, 1))
    pixels[200:1400, 200:900] = np.array([190, 110, 170]) + noise
    slide = memory_slide(pixels, 2.0)
    windows = Windows([one(empty, []), one(slide, [400, 400, 408, 408])], 2.0)
    rng = np.random.default_rng(0)
    stained = [(windows.window(rng, 48).image[..., 1] < 180).mean() for _ in range(100)]
    assert np.mean(np.array(stained) > 0.2) > 0.85


def test_a_window_is_a_function_of_its_generator() -> None:
    """The same state gives the same example, whatever was drawn before."""
    windows = Windows([painted(0, (300, 240))], 0.25, seed=3)
    first, _, again = (windows.mosaic(np.random.default_rng(seed), 96) for seed in (1, 2, 1))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.xyxy_px, again.xyxy_px)


def test_only_a_few_slides_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many slides there are, handles of those read last are kept and the others closed."""
    monkeypatch.setattr("slidescan.train.windows._OPEN", 2)
    members = [painted(seed, (120, 120)) for seed in range(6)]
    windows = Windows(members, 0.25)
    for member in members:
        member.slide.close()  # as the loaders leave them
    rng = np.random.default_rng(0)
    for _ in range(30):
        windows.window(rng, 64)
        assert sum(member.slide._source is not None for member in members) <= 2


def test_nothing_annotated_is_refused() -> None:
    """Windows need an object."""
    for members in ([], [one(BLANK, [])]):
        with pytest.raises(ConfigError, match="at least one annotated object"):
            Windows(members, 0.25)
