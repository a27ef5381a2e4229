"""Mined windows are of the slides they were mined on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slidescan.errors import ConfigError, ResolutionError
from slidescan.slides import Slide, memory_slide
from slidescan.train.annotated import Annotated
from slidescan.train.mine import mine, refuse_annotated
from slidescan.train.own import OwnSource
from slidescan.train.settings import VariantSettings
from tests.discs import ORACLE, discs


def test_what_a_stopped_run_left_is_not_of_this_one(tmp_path: Path) -> None:
    """Windows of a slide that was withdrawn since are gone; those of the slides given are there, and stay."""
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(tmp_path / "0-70.png")
    slide, centers = discs(n=9, size_wh=(900, 700))
    said: list[str] = []
    windows = mine(ORACLE, [slide], tmp_path, said.append)
    assert (len(windows), said) == (len(centers), ["mined 9 false alarms on 1 slides"])
    assert all(window.any() for window in windows)
    assert len(mine(ORACLE, [], tmp_path, said.append)) == 9


def test_the_order_of_slides_does_not_matter(tmp_path: Path) -> None:
    """A shell lists them as it likes; others are refused."""
    slides = [discs(n=2, size_wh=(900, 700), seed=seed)[0] for seed in range(3)]
    assert len(mine(ORACLE, slides[:2], tmp_path, print)) == 4
    assert len(mine(ORACLE, slides[1::-1], tmp_path, print)) == 4
    with pytest.raises(ConfigError, match="holds what was mined on other slides"):
        mine(ORACLE, slides, tmp_path, print)


def test_what_was_mined_before_may_be_damaged(tmp_path: Path) -> None:
    """Of a disk that was full, say: the next run says what to do."""
    (tmp_path / "mined.json").write_text("")
    with pytest.raises(ConfigError, match=r"mined\.json: expected what was mined before, found it damaged; delete"):
        mine(ORACLE, [], tmp_path, print)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_slide_with_objects_teaches_no_background(split: str) -> None:
    """Nor one that is measured on; of those trained on, one without objects may."""
    slides = {name: discs(n=3, seed=i)[0] for i, name in enumerate(("train", "validation", "test", "other"))}

    def of(slide: Slide, n: int = 1) -> Annotated:
        return Annotated(slide, np.ones((n, 4)), np.zeros(n, int), np.empty((n, 0)), np.empty((0, 4)), str(id(slide)))

    def source(n: int) -> OwnSource:
        splits = {name: [of(slides[name], n)] for name in ("train", "validation", "test")}
        return OwnSource(splits, VariantSettings(mpp=0.5, steps=1), kinds={})

    refuse_annotated([slides["other"]], source(1))
    with pytest.raises(ConfigError, match=f"mine: .*free of objects.* which is a {split} slide"):
        refuse_annotated([slides["other"], slides[split]], source(1))
    if split == "train":
        refuse_annotated([slides[split]], source(0))
        with pytest.raises(ResolutionError, match="µm/px"):
            refuse_annotated([memory_slide(np.zeros((9, 9, 3), np.uint8), None)], source(1))


def test_a_slide_of_a_patient_that_is_measured_on_is_not_mined() -> None:
    """Its tissue would be known: as the table says, whose it is."""
    mined, shown = (discs(n=3, seed=i)[0] for i in range(2))
    nothing = np.empty((0, 4))
    one = Annotated(shown, nothing, np.empty(0, int), np.empty((0, 0)), nothing, "p")
    source = OwnSource({"test": [one]}, VariantSettings(mpp=0.5, steps=1), kinds={})
    refuse_annotated([mined], source, {mined.path.name: ("q", "")})
    with pytest.raises(ConfigError, match="mine: expected slides of patients that nothing is measured on"):
        refuse_annotated([mined], source, {mined.path.name: ("p", "")})
