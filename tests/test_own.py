"""Data of one's own: what is measured on them, and on which terms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slidescan.train import metrics
from slidescan.train.annotated import Annotated
from slidescan.train.own import OwnSource, ShownSlide
from slidescan.train.settings import TrainSettings, VariantSettings
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
        source = OwnSource(
            {"test": [one]}, VariantSettings(mpp=MPP, steps=1), kinds={"test": "pictures"}, object_um=object_um
        )
        (shown,) = source.shown("test")
        assert metrics.score([shown.find(ORACLE)], 0.5).found == found


def patients(table: dict[str, Any]) -> None:
    """Make two pictures of two patients of one."""
    first = table["images"][0]
    table["images"] = [first | {"patient": "p"}, first | {"id": 8, "patient": "q"}]


@pytest.mark.parametrize("pictures_first", [True, False])
def test_each_split_is_measured_as_what_it_is(tmp_path: Path, pictures_first: bool) -> None:
    """Whole slides as a scan would, with their tissue; pictures as tissue all over: whatever was trained on."""
    (tmp_path / "slides").mkdir()
    places = [coco(tmp_path / "pictures", patients), slides(tmp_path / "slides", POINT)]
    (tmp_path / "slides/b.png").write_bytes((tmp_path / "slides/a.png").read_bytes())
    (tmp_path / "slides/b.geojson").write_bytes((tmp_path / "slides/a.geojson").read_bytes())
    data, test = places if pictures_first else places[::-1]
    settings = TrainSettings(data=data, test=test, classes=["cell", "mitosis"], slide_mpp=MPP, validation_share=0.5)
    source = OwnSource.open(settings, VariantSettings(mpp=MPP, steps=1))
    assert {one.kind for one in source.shown("validation")} == {data.name}
    assert {one.kind for one in source.shown("test")} == {test.name}
    areas = [one.find(ORACLE).mm2 for one in source.shown("test")]
    grey_is_tissue = [0.0 if test.name == "slides" else pytest.approx(100 * 80 * (MPP * 1e-3) ** 2)]
    assert areas == grey_is_tissue * 2
