"""A training run goes on with what it was begun with, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slidescan.errors import ConfigError
from slidescan.slides import memory_slide
from slidescan.train.annotated import Annotated
from slidescan.train.begun import digest_of, keep_begun
from slidescan.train.own import OwnSource
from slidescan.train.settings import TrainSettings, VariantSettings

VARIANT = VariantSettings(mpp=0.25, steps=10)


def annotated(name: str, patient: str, x: float = 10.0) -> Annotated:
    """A slide with one object."""
    slide = memory_slide(np.full((64, 64, 3), 200, np.uint8), 0.25, name=name)
    box = np.array([[x, 10.0, x + 20, 30.0]])
    return Annotated(slide, box, np.zeros(1, np.int64), np.empty((1, 0)), np.empty((0, 4)), patient)


def begin(out: Path, identity: str = "a", variant: VariantSettings = VARIANT, **settings: Any) -> None:
    keep_begun(TrainSettings().model_copy(update=settings), variant, identity, out)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """A run that has a checkpoint."""
    begin(tmp_path)
    (tmp_path / "losses-0.25.safetensors").touch()
    return tmp_path


def test_a_run_goes_on_with_the_same(out: Path) -> None:
    """Elsewhere, on another device, for longer and with more to measure: that is the same run."""
    begin(out)
    longer = VARIANT.model_copy(update={"steps": 20, "finish_steps": 5, "input_px": 1024})
    begin(out, variant=longer, device="cuda:1", threads=7, eval_images=9, test=Path("test"), data=Path("moved"))
    begin(out, "b", variant=VariantSettings(mpp=0.5, steps=10))  # one that has no checkpoint


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"identity": "b"}, "data: expected the slides, patients and annotations it was begun with"),
        ({"variant": VARIANT.model_copy(update={"lr": 0.5})}, "lr: expected 0.001, as it was begun with, got 0.5"),
        ({"seed": 1}, "seed: expected 0"),
        ({"classes": ["b", "a"]}, "classes: expected"),
        ({"width": 0.25}, "width: expected 1.0"),
    ],
)
def test_another_is_refused(out: Path, change: dict[str, Any], said: str) -> None:
    """What differs is named, and how to go on; what is kept stays as it was."""
    kept = (out / "begun.json").read_text()
    with pytest.raises(ConfigError, match=said) as refused:
        begin(out, **change)
    assert "give another output directory" in str(refused.value)
    assert (out / "begun.json").read_text() == kept


def test_nothing_is_refused_before_there_is_a_checkpoint(tmp_path: Path) -> None:
    begin(tmp_path)
    begin(tmp_path, "b", seed=3)
    (tmp_path / "losses-0.25.safetensors").touch()
    with pytest.raises(ConfigError, match="data"):
        begin(tmp_path)


def test_the_data_are_slides_patients_and_annotations() -> None:
    """In whatever order; and in which split they are."""
    a, b = annotated("a.svs", "p"), annotated("b.svs", "q")
    digest = digest_of([a, b])
    assert digest_of([b, a]) == digest
    others = ([a], [a, annotated("b.svs", "p")], [a, annotated("b.svs", "q", x=11.0)], [a, annotated("c.svs", "q")])
    assert digest not in [digest_of(other) for other in others]
    first, second = (
        OwnSource({"train": train, "validation": held}, VARIANT, kinds={}).identity
        for train, held in (([a], [b]), ([b], [a]))
    )
    assert first != second
