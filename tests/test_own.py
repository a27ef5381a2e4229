"""Data of one's own: what is measured on them, and on which terms."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image as Picture
from typer.testing import CliRunner

from slidescan.cli import app
from slidescan.errors import ConfigError
from slidescan.train import metrics
from slidescan.train.annotated import Annotated, split
from slidescan.train.own import OwnSource, ShownSlide, load_annotated
from slidescan.train.run import train_detector
from slidescan.train.settings import TrainSettings, VariantSettings
from slidescan.train.windows import Windows
from tests.discs import MPP, ORACLE, RADIUS_PX, discs
from tests.test_coco import coco
from tests.test_qupath import POINT, slides


@pytest.mark.parametrize("kind", ["slides", "pictures"])
def test_what_an_ignored_region_hides(kind: str) -> None:
    """Half of the discs are annotated. In an ignored region these are found, too, and the others no mistake."""
    slide, centers = discs(n=20)
    right = centers[::2]
    boxes = np.concatenate((right - RADIUS_PX, right + RADIUS_PX), 1)
    everything = np.array([[0.0, 0, *slide.size_wh]])
    for ignored, false in ((np.empty((0, 4)), 10), (everything, 0)):
        one = Annotated(slide, boxes, np.zeros(10, np.int64), np.empty((10, 0)), ignored, "p")
        image = ShownSlide(one, kind).find(ORACLE)
        assert metrics.score([image], 0.5) == metrics.Scores(10, 0, false)


@pytest.mark.parametrize("kind", ["slides", "pictures"])
def test_what_is_ignored_is_not_looked_at(kind: str) -> None:
    """Its area counts as little as what is found there; where regions overlap, once."""
    slide, _ = discs(n=20)
    width, height = slide.size_wh
    nothing = np.empty((0, 4))
    left, overlapping = [-50.0, -50, width / 2, height + 50], [width / 4, 0.0, width / 2, height]
    areas = []
    for ignored in (nothing, np.array([left]), np.array([left, overlapping]), np.array([[0.0, 0, width, height]])):
        one = Annotated(slide, nothing, np.empty(0, np.int64), np.empty((0, 0)), ignored, "p")
        areas.append(ShownSlide(one, kind).find(ORACLE).mm2)
    assert areas[0] > 0
    assert areas[1] == pytest.approx(areas[0] / 2, rel=0.1)
    assert areas[1:] == [areas[2], areas[2], 0]


def test_a_threshold_needs_objects_to_be_chosen_by(tmp_path: Path) -> None:
    """Else any without a false detection would do."""
    (tmp_path / "empty").mkdir()
    data = coco(tmp_path / "data")
    empty = coco(tmp_path / "empty", lambda t: t.update(annotations=[]))
    (empty / "a.png").rename(empty / "e.png")
    table = (empty / "annotations.json").read_text()
    (empty / "annotations.json").write_text(table.replace("a.png", "e.png"))
    settings = TrainSettings(data=data, validation=empty, classes=["cell", "mitosis"], attributes=["atypical"])
    with pytest.raises(ConfigError, match=r"validation: expected annotated objects .*got none on 1 slides"):
        OwnSource.open(settings, VariantSettings(mpp=MPP, steps=1))


@pytest.mark.parametrize("seed", range(8))
def test_both_sides_of_a_split_have_objects(seed: int) -> None:
    """Where two patients have some, whoever is drawn."""
    slide, none = discs(n=1)[0], np.empty((0, 4))

    def of(patient: int) -> Annotated:
        n = int(patient < 2)
        return Annotated(slide, np.tile([0.0, 0, 9, 9], (n, 1)), np.zeros(n, int), np.empty((n, 0)), none, str(patient))

    for share in (0.2, 0.8):
        parts = split([of(patient) for patient in range(10)], share, seed)
        assert [sum(len(one.label) for one in part) for part in parts] == [1, 1]
        assert sorted(one.patient for part in parts for one in part) == [str(patient) for patient in range(10)]


def test_a_detector_that_mixes_up_the_classes_is_told(tmp_path: Path) -> None:
    """Places are right and classes are not: nothing is found."""
    slide, centers = discs(n=6)
    boxes = np.concatenate((centers - RADIUS_PX, centers + RADIUS_PX), 1)
    for label, found in ((0, 6), (1, 0)):
        one = Annotated(slide, boxes, np.full(6, label), np.empty((6, 0)), np.empty((0, 4)), "p")
        assert metrics.score([ShownSlide(one, "pictures").find(ORACLE)], 0.5).found == found


def test_a_small_object_is_found_from_nearer(tmp_path: Path) -> None:
    """Else its neighbour's detection would do; and a large one's centre is no nearer than it is told."""
    slide, centers = discs(n=6)
    half = 3 / MPP
    one = Annotated(
        slide,
        np.concatenate((centers + 4 / MPP - half, centers + 4 / MPP + half), 1),
        np.zeros(6, np.int64),
        np.empty((6, 0)),
        np.empty((0, 4)),
        "p",
    )
    for object_um, found in ((6.0, 0), (12.5, 6)):  # 5.7 µm beside
        settings = TrainSettings(object_um=object_um)
        source = OwnSource(
            {"test": [one]}, VariantSettings(mpp=MPP, steps=1), kinds={"test": "pictures"}, settings=settings
        )
        (shown,) = source.shown("test")
        assert metrics.score([shown.find(ORACLE)], 0.5).found == found


def patients(table: dict[str, Any]) -> None:
    """Make two pictures of two patients, each with an object."""
    first = table["images"][0]
    table["images"] = [first | {"patient": "p"}, first | {"id": 8, "file_name": "b.png", "patient": "q"}]
    table["annotations"][1]["image_id"] = 8


@pytest.mark.parametrize("pictures_first", [True, False])
def test_each_split_is_measured_as_what_it_is(tmp_path: Path, pictures_first: bool) -> None:
    """Whole slides as a scan would, with their tissue; pictures as tissue all over: whatever was trained on."""
    (tmp_path / "slides").mkdir()
    (tmp_path / "pictures").mkdir()
    Picture.new("RGB", (100, 80), (200, 200, 201)).save(tmp_path / "pictures/b.png")
    places = [coco(tmp_path / "pictures", patients), slides(tmp_path / "slides", POINT)]
    with Picture.open(tmp_path / "slides/a.png") as same:
        Picture.new("RGB", same.size, (202, 202, 202)).save(tmp_path / "slides/b.png")
    (tmp_path / "slides/b.geojson").write_bytes((tmp_path / "slides/a.geojson").read_bytes())
    data, test = places if pictures_first else places[::-1]
    settings = TrainSettings(
        data=data, test=test, classes=["cell", "mitosis"], slide_mpp=MPP, validation_share=0.5, object_um=12.5
    )
    source = OwnSource.open(settings, VariantSettings(mpp=MPP, steps=1))
    assert {one.kind for one in source.shown("validation")} == {data.name}
    assert {one.kind for one in source.shown("test")} == {test.name}
    areas = [one.find(ORACLE).mm2 for one in source.shown("test")]
    grey_is_tissue = [0.0 if test.name == "slides" else pytest.approx(100 * 80 * (MPP * 1e-3) ** 2)]
    assert areas == grey_is_tissue * 2


def annotated_picture(folder: Path, *, seed: int = 0, edge_px: int = 24) -> Path:
    """Write a picture of noise with two objects, of two patients' slides."""
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    folder.mkdir()
    for i in range(2):
        Picture.fromarray(rng.integers(0, 255, (80, 100, 3), np.uint8)).save(folder / f"{folder.name}{i}.png")
        images.append({"id": i, "file_name": f"{folder.name}{i}.png", "patient": f"{folder.name}{i}"})
        annotations.append({"image_id": i, "category_id": 1, "bbox": [10, 10, edge_px, edge_px]})
    table = {"images": images, "categories": [{"id": 1, "name": "cell"}], "annotations": annotations}
    (folder / "annotations.json").write_text(json.dumps(table))
    return folder


def test_one_picture_under_two_names_is_no_test(tmp_path: Path) -> None:
    data, test = annotated_picture(tmp_path / "a"), annotated_picture(tmp_path / "b")
    variant = VariantSettings(mpp=0.25, steps=1)
    settings = TrainSettings(data=data, test=test, classes=["cell"], variants=[variant])
    with pytest.raises(ConfigError, match=r"expected no slide twice, found a\d\.png and b\d\.png, which are one"):
        OwnSource.open(settings, variant)
    other = annotated_picture(tmp_path / "c", seed=1)
    assert OwnSource.open(settings.model_copy(update={"test": other}), variant)


def test_what_was_trained_on_is_no_test(tmp_path: Path) -> None:
    """A measurement on it says so, whatever the pictures are called by now; one on others does not."""
    data, other = annotated_picture(tmp_path / "a"), annotated_picture(tmp_path / "b", seed=1)
    variant = VariantSettings(mpp=0.25, steps=1)
    settings = TrainSettings(data=data, classes=["cell"], variants=[variant], validation_share=0.5).smoke()
    train_detector(settings, tmp_path / "run", lambda _: None)
    again = annotated_picture(tmp_path / "c")
    for measured, seen in ((data, 2), (again, 2), (other, None)):
        options = ["evaluate", str(tmp_path / "run"), "--data", str(measured), "-o", str(tmp_path / "out")]
        done = CliRunner().invoke(app, [*options, "--shifts", "0"], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        assert ("trained on, or chosen by, 2 of these images" in done.output) == bool(seen)
        assert json.loads((tmp_path / "out/0.25/metrics.json").read_text()).get("seen") == seen


def test_tiles_that_objects_do_not_fit_into_are_refused(tmp_path: Path) -> None:
    """In them hardly any object is seen whole, and nothing would be taught."""
    data = annotated_picture(tmp_path / "a", edge_px=40)
    for tile_px, fits in ((32, False), (64, True)):
        variant = VariantSettings(mpp=0.25, steps=1, tile_px=[tile_px])
        settings = TrainSettings(data=data, classes=["cell"], variants=[variant])
        if fits:
            assert OwnSource.open(settings, variant)
        else:
            with pytest.raises(ConfigError, match=r"tile_px: .* got 32 px, where half of the objects have 40 px"):
                OwnSource.open(settings, variant)


@pytest.mark.parametrize(("mpp", "um"), [(0.1, "2.4"), (0.25, None), (2.0, "48")])
def test_objects_of_another_size_than_was_assumed(tmp_path: Path, mpp: float, um: str | None) -> None:
    """Matching, anchors and margins would all be of another's; who says it knows it."""
    told = {"data": annotated_picture(tmp_path / "a"), "classes": ["cell"], "slide_mpp": mpp}
    variant = VariantSettings(mpp=mpp, steps=1)
    assert OwnSource.open(TrainSettings(**told, object_um=12.5), variant)
    if um is None:
        assert OwnSource.open(TrainSettings(**told), variant)
        return
    with pytest.raises(ConfigError, match=rf"object_um: .* half have {um} µm or more, got its default 12\.5"):
        OwnSource.open(TrainSettings(**told), variant)


def test_what_was_read_is_told(tmp_path: Path) -> None:
    """A scale that nobody gave, and what is missing, show before hours of training."""
    variant = VariantSettings(mpp=0.5, steps=1)
    settings = TrainSettings(
        data=annotated_picture(tmp_path / "a"),
        test=coco(tmp_path / "b", lambda t: t["annotations"][0].update(iscrowd=1)),
        classes=["cell", "mitosis"],
        attributes=["atypical"],
        variants=[variant],
    )
    train, validation, test = OwnSource.open(settings, variant).told()
    guess = "at 0.5 µm/px (1 of them do not say it: the detector's; else give slide_mpp)"
    assert train == validation.replace("validation", "train")
    assert train == f"train: 1 picture of 1 patient {guess}: 1 cell, 0 mitosis, 0 atypical of 0 that say"
    assert test == f"test: 1 picture of 1 patient {guess}: 0 cell, 1 mitosis, 1 atypical of 1 that say, 1 boxes ignored"
    known = settings.model_copy(update={"slide_mpp": 0.25, "crowds": "objects"})
    test = OwnSource.open(known, variant).told()[2]
    assert test == "test: 1 picture of 1 patient at 0.25 µm/px: 1 cell, 1 mitosis, 1 atypical of 1 that say"


def test_settings_that_say_nothing_of_ones_own_data(tmp_path: Path) -> None:
    """Whoever sets one would wait for what it does."""
    variant = VariantSettings(mpp=0.25, steps=1)
    settings = TrainSettings(data=annotated_picture(tmp_path / "a"), classes=["cell"], share_phantom=0.5)
    with pytest.raises(ConfigError, match="share_phantom: expected only with the crops of midog21"):
        OwnSource.open(settings, variant)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_of_mosaics_is_heeded(tmp_path: Path, share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = TrainSettings(data=annotated_picture(tmp_path / "a"), classes=["cell"], share_mosaic=share)
    source = OwnSource.open(settings, VariantSettings(mpp=0.25, steps=1))
    drawn: list[str] = []
    for name in ("mosaic", "window"):
        draw = getattr(Windows, name)
        monkeypatch.setattr(Windows, name, lambda *a, name=name, draw=draw: (drawn.append(name), draw(*a))[1])
    for i in range(4):
        source.example(np.random.default_rng(i), 64)
    assert drawn == ["mosaic" if share else "window"] * 4


def test_one_picture_twice_in_a_split_is_refused(tmp_path: Path) -> None:
    """Before the training, not after it, when the validation patients are halved."""
    data = annotated_picture(tmp_path / "a")
    (data / "a1.png").write_bytes((data / "a0.png").read_bytes())
    one = OwnSource.open(
        TrainSettings(data=annotated_picture(tmp_path / "b", seed=1), classes=["cell"]), VariantSettings(steps=1)
    )
    pair = load_annotated(data, TrainSettings(classes=["cell"]), 0.25)
    with pytest.raises(ConfigError, match=r"validation: expected no slide twice, found a0\.png and a1\.png"):
        OwnSource({"train": list(one.annotated("train")), "validation": pair}, VariantSettings(steps=1), kinds={})
