"""COCO directories: what is annotated arrives where it is, and what cannot be meant is said."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image as Picture

from slidescan.errors import ConfigError, SlidescanError
from slidescan.slides import open_slide
from slidescan.train import coco as coco_format
from slidescan.train.annotated import Annotated
from slidescan.train.coco import load_coco
from slidescan.train.own import OwnSource, kind_of, load_annotated
from slidescan.train.settings import TrainSettings, VariantSettings

GREY = 200


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
        lambda t: t["annotations"][0].update(ignore=1),
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
        (lambda t: t["images"][0].update(id=7.5), "image 7.5: .*id"),
        (lambda t: t["images"].append(t["images"][0]), "image 7 .*twice"),
        (lambda t: t["images"].append(t["images"][0] | {"id": 8}), "images 7 and 8 are one file"),
        (lambda t: t["annotations"][1].update(difficult="perhaps"), "annotation 2: .*difficult"),
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


def test_pictures_are_decoded_late_and_travel_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading decodes nothing, only so many decoded pictures are kept, and a slide pickles as its path."""

    def change(table: dict[str, Any]) -> None:
        table["images"] += [{"id": i, "file_name": f"{i}.png"} for i in range(3)]

    coco(tmp_path, change)
    for i in range(3):
        Picture.new("RGB", (100, 80), (i, 0, 0)).save(tmp_path / f"{i}.png")
    monkeypatch.setattr(coco_format, "_pictures", held := type(coco_format._pictures)())
    monkeypatch.setattr(coco_format, "_CACHE_BYTES", 2 * 100 * 80 * 3)
    found = load(tmp_path)
    assert not held
    for i, loaded in enumerate(found[1:]):
        slide = pickle.loads(pickle.dumps(loaded.slide))
        assert slide.read(0, 0, 1, 1, slide.frame).rgb.tolist() == [[[i, 0, 0]]]
    assert len(held) == 2
    assert len(pickle.dumps(found[0].slide)) < 1000


def test_patient_0_is_one_patient(tmp_path: Path) -> None:
    """A number that a program counted from 0: not nobody, whose pictures are each a patient of its own."""

    def of_patient_0(table: dict[str, Any]) -> None:
        first = table["images"][0]
        for id_, patient in ((8, 0), (9, "")):
            Picture.new("RGB", (100, 80)).save(tmp_path / f"{id_}.png")
            table["images"].append(first | {"id": id_, "file_name": f"{id_}.png", "patient": patient})
        first["patient"] = 0

    assert [one.patient for one in load(coco(tmp_path, of_patient_0))] == ["0", "0", "9"]


def test_tiles_of_one_slide_of_tcga_are_one_patients(tmp_path: Path) -> None:
    """Else a slide's tiles were split between training and validation."""
    names = "TCGA-AA-1234-01Z_0_0.png", "TCGA-AA-1234-01Z_0_512.png", "TCGA_0.png"

    def of_tcga(table: dict[str, Any]) -> None:
        first = table["images"][0]
        table["images"] = [first | {"id": 7 + i, "file_name": name} for i, name in enumerate(names)]

    coco(tmp_path, of_tcga)
    for name in names:
        (tmp_path / name).write_bytes((tmp_path / "a.png").read_bytes())
    assert [one.patient for one in load(tmp_path)] == ["TCGA-AA-1234", "TCGA-AA-1234", "TCGA_0"]


def test_of_several_resolutions_a_picture_must_say_its_own(tmp_path: Path) -> None:
    """One detector's may be assumed; of two, one would be trained at a wrong scale."""
    coco(tmp_path)
    two = [VariantSettings(mpp=0.25, steps=1), VariantSettings(mpp=0.5, steps=1)]
    settings = TrainSettings(classes=["cell", "mitosis"], variants=two)
    settings = settings.model_copy(update={"data": tmp_path})
    with pytest.raises(ConfigError, match=r"image 7: expected its mpp, for detectors of several µm/px"):
        OwnSource.open(settings, two[1])
    told = settings.model_copy(update={"slide_mpp": 0.4})
    assert load_annotated(tmp_path, told, None)[0].slide.mpp == 0.4
    assert load_annotated(tmp_path, told, 0.5)[0].slide.mpp == 0.4
    assert load_annotated(tmp_path, settings, 0.5)[0].slide.mpp == 0.5


@pytest.mark.parametrize(("said", "expected"), [({}, 0.5), ({"mpp": None}, 0.5), ({"mpp": 0.3}, 0.3)])
def test_a_picture_that_says_its_own_is_at_it(tmp_path: Path, said: dict[str, Any], expected: float) -> None:
    """As `scan` would take it, and not as the detector; the JSON has the last word."""

    def change(table: dict[str, Any]) -> None:
        table["images"][0] |= {"file_name": "a.tiff", "width": None, "height": None} | said

    coco(tmp_path, change)
    cm = (20_000, 20_000)  # px a cm: 0.5 µm/px
    tifffile.imwrite(tmp_path / "a.tiff", np.full((80, 100, 3), GREY, np.uint8), resolution=cm, resolutionunit=3)
    assert load(tmp_path)[0].slide.mpp == pytest.approx(expected)


def test_whose_pictures_are(tmp_path: Path) -> None:
    """The JSON says it, else a table, else a name of TCGA, else the folder: no patient is taken for several."""
    names = ["P1/1.png", "P1/2.png", "P2/images/1.png", "P2/TCGA-AA-1234-01Z.png"]

    def change(table: dict[str, Any]) -> None:
        table["images"] += [{"id": i, "file_name": name} for i, name in enumerate(names)]

    coco(tmp_path, change)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Picture.new("RGB", (100, 80)).save(tmp_path / name)
    assert [one.patient for one in load(tmp_path)] == ["a", "P1", "P1", "P2", "TCGA-AA-1234"]
    rows = ["a.png,x,XR", "P1/1.png,y,", "2,y,", "P2/images/1.png,z,"]
    (tmp_path / "patients.csv").write_text("\n".join(["slide,patient,scanner", *rows]))
    with pytest.raises(ConfigError, match=r"row for the slide P2/TCGA-AA-1234-01Z\.png"):
        load(tmp_path)
    (tmp_path / "patients.csv").write_text("\n".join(["slide,patient,scanner", *rows, "TCGA-AA-1234-01Z,z,"]))
    found = load(tmp_path)
    assert [one.patient for one in found] == ["x", "y", "y", "z", "z"]
    assert found[0].scanner == "XR"


@pytest.mark.parametrize(
    ("said", "table", "whose"),
    [
        ({"slide": "s1"}, "s1,P,XR", ("P", "XR")),  # a slide is no patient where a table tells more
        ({"slide": "s1"}, "a,P,XR", ("P", "XR")),
        ({"slide": "TCGA-AA-0001-01Z-00-DX1"}, None, ("TCGA-AA-0001", "")),
        ({"patient": "Q", "slide": "s1"}, "s1,P,XR", ("Q", "XR")),
        ({"patient": "Q"}, "other,P,XR", ("Q", "")),
        ({"patient": 7.0}, None, ("7", "")),
        ({"patient": " p1 "}, None, ("p1", "")),
        ({"patient": float("nan"), "slide": "s"}, None, ("s", "")),
    ],
)
def test_what_json_and_table_say_together(
    tmp_path: Path, said: dict[str, Any], table: str | None, whose: tuple[str, str]
) -> None:
    """No patient is two because of how a table was saved, and what either says is known."""
    coco(tmp_path, lambda all_of_it: all_of_it["images"][0].update(said))
    if table:
        (tmp_path / "patients.csv").write_text(f"slide,patient,scanner\n{table}\n")
    (found,) = load(tmp_path)
    assert (found.patient, found.scanner) == whose


def test_a_picture_is_the_slide_that_it_is_elsewhere(tmp_path: Path) -> None:
    """Else one that is measured on could be mined, or was decided on."""
    (found,) = load(coco(tmp_path))
    assert found.slide.fingerprint == open_slide(tmp_path / "a.png").fingerprint


def test_pictures_of_one_folder_are_each_a_patients(tmp_path: Path) -> None:
    """It is where an export put them all."""

    def change(table: dict[str, Any]) -> None:
        table["images"] = [{"id": 7 + i, "file_name": f"batch/{i}.png"} for i in range(2)]

    coco(tmp_path, change)
    (tmp_path / "batch").mkdir()
    for i in range(2):
        Picture.new("RGB", (100, 80)).save(tmp_path / f"batch/{i}.png")
    assert [one.patient for one in load(tmp_path)] == ["0", "1"]


def test_as_cvat_exports_it(tmp_path: Path) -> None:
    """The JSON in annotations/, the pictures in images/ beside that."""
    (tmp_path / "images").mkdir()
    coco(tmp_path / "annotations", name="instances_default.json")
    (tmp_path / "annotations/a.png").rename(tmp_path / "images/a.png")
    assert kind_of(tmp_path) == "pictures"
    for path in (tmp_path, tmp_path / "annotations/instances_default.json"):
        assert load(path)[0].slide.path == tmp_path / "images/a.png"


@pytest.mark.parametrize("name", ["a.png", "a.jpg"])
def test_a_picture_that_is_shown_turned(tmp_path: Path, name: str) -> None:
    """Boxes are drawn on it as it is shown."""
    coco(tmp_path, lambda t: t["images"][0].update(file_name=name))
    exif = Picture.Exif()
    exif[0x0112] = 6
    pixels = np.zeros((100, 80, 3), np.uint8)
    pixels[:, :40] = 255
    Picture.fromarray(pixels).save(tmp_path / name, exif=exif)
    slide = load(tmp_path)[0].slide
    assert slide.read(0, 0, 100, 40, slide.frame).rgb.min() > 250


@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_picture_that_cannot_be_read_is_told_at_once(tmp_path: Path, mode: str) -> None:
    """Of a validation picture, say: not after hours of training."""
    coco(tmp_path)
    Picture.new(mode, (100, 80)).save(tmp_path / "a.png")
    with pytest.raises(SlidescanError, match=r"a\.png: expected an 8-bit colour image, found mode"):
        load(tmp_path)


@pytest.mark.parametrize("value", [0, None, False, "0", "", "False", " no "])
def test_what_is_not_difficult(tmp_path: Path, value: Any) -> None:
    """However tables and XML say it."""
    for key in ("iscrowd", "difficult"):
        (found,) = load(coco(tmp_path, lambda t, key=key: t["annotations"][0].update({key: value})))  # type: ignore[misc]
        assert len(found.label) == 2


def test_ids_of_a_table_with_gaps(tmp_path: Path) -> None:
    """Numbers that became floats, of which some may be whole."""

    def change(table: dict[str, Any]) -> None:
        table["images"][0]["id"] = 7.0
        table["annotations"][0]["category_id"] = 1.0

    assert len(load(coco(tmp_path, change))[0].label) == 2


def test_cvats_masks_are_objects_where_one_says_so(tmp_path: Path) -> None:
    """It writes every mask as a crowd."""
    masks = coco(tmp_path, lambda t: [row.update(iscrowd=1) for row in t["annotations"]])
    assert len(load(masks)[0].label) == 0
    (found,) = load(masks, crowds="objects")
    assert found.label.tolist() == [0, 1]
    assert len(found.ignored_xyxy_l0) == 0


@pytest.mark.parametrize("folder", ["images/train", "train"])
def test_a_subset_of_cvat_has_a_folder(tmp_path: Path, folder: str) -> None:
    """Which file_name does not say; a table of patients lies where the export was unpacked."""
    coco(tmp_path / "annotations", name="instances_train.json")
    (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "annotations/a.png").rename(tmp_path / folder / "a.png")
    (tmp_path / "patients.csv").write_text("slide,patient\na,x\n")
    (found,) = load(tmp_path)
    assert found.slide.path == tmp_path / folder / "a.png"
    assert found.patient == "x"


@pytest.mark.parametrize(
    ("names", "patients"),
    [
        (["P1/tiles/1.png", "P1/tiles/2.png", "P2/tiles/3.png"], ["P1", "P1", "P2"]),
        (["all/P1/he/1.png", "all/P1/ihc/2.png", "all/P2/he/3.png"], ["P1", "P1", "P2"]),
        (["P1/1.png", "P1/more/2.png", "P2/3.png"], ["P1", "P1", "P2"]),
    ],
)
def test_the_outermost_folder_is_the_patient(tmp_path: Path, names: list[str], patients: list[str]) -> None:
    """What is below it may have the same names for all, or several for one."""

    def change(table: dict[str, Any]) -> None:
        table["images"] = [{"id": 7 + i, "file_name": name} for i, name in enumerate(names)]

    coco(tmp_path, change)
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Picture.new("RGB", (100, 80)).save(tmp_path / name)
    assert [one.patient for one in load(tmp_path)] == patients


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table["categories"].append({"id": 1, "name": "mitosis"}), "category 1 is there twice"),
        (lambda table: table["annotations"].append(table["annotations"][0]), "annotation 1 is there twice"),
        (lambda table: table["images"][0].update(file_name="a" * 300), "expected its file_name beside"),
    ],
)
def test_what_is_there_twice_is_refused(tmp_path: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    """The second name of a category would be that of all its objects, and a copy an object that nobody can find."""
    with pytest.raises(ConfigError, match=message):
        load(coco(tmp_path, change))
