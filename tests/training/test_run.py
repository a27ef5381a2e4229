"""A training run, from crops to a directory that scans."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from PIL import Image as Picture

from slidescan.detect import Family, load_detector
from slidescan.detect.model import Model
from slidescan.errors import ConfigError, ModelError
from slidescan.slides import memory_slide
from slidescan.train import evaluate as evaluation
from slidescan.train import metrics
from slidescan.train import run as training
from slidescan.train.crops import load_crops
from slidescan.train.mitosis import CropSource
from slidescan.train.run import open_test, train_detector
from slidescan.train.settings import TrainSettings, VariantSettings, load_settings
from slidescan.train.windows import Example
from tests.marked import dots
from tests.test_coco import coco
from tests.training.smoke import ROOT, run, unmeasured, weights


def test_a_run_is_a_detector_with_its_numbers(trained: Path) -> None:
    """Both resolutions load as one family from the run's directory; logs, curves and metrics lie beside them."""
    family = load_detector(trained)
    assert isinstance(family, Family)
    assert [v.mpp for v in family.variants] == [0.25, 0.5]
    assert family.attributes == ("atypical",)
    found = family.at(0.5).detect(np.zeros((1, 96, 96, 3), np.uint8), 0.0)[0]
    assert len(found)
    assert found.attributes.shape == (len(found), 1)
    report = json.loads((trained / "0.25" / "metrics.json").read_text())
    assert {
        "field",
        "sparse",
        "mosaic",
        "bare",
        "covered by a nucleus",
        "covered by other tissue",
        "grid_shift",
    } <= set(report)
    for name in ("0.25/pr.png", "0.25/froc.png", "0.25/reliability.png", "0.25/worst.png", "losses-0.5.png"):
        with Picture.open(trained / name) as picture:
            picture.verify()
    header, *rows = (trained / "losses-0.25.csv").read_text().splitlines()
    assert header.startswith("step,minutes,lr,loss")
    assert [row.split(",")[0] for row in rows] == ["4"]  # the last step is logged, whatever its number


def test_the_crops_have_settings_of_their_own(fake_data: Path, tmp_path: Path) -> None:
    """What would be left out of account, or wrong without a word, is refused; no attribute is one of the choices."""
    for changes, told in (
        ({"attributes": ["large"]}, r"attributes: expected none or \[atypical\]"),
        ({"test": tmp_path}, "test: expected none with midog21"),
        ({"validation": tmp_path}, "validation: expected none with midog21"),
        ({"variants": [VariantSettings(mpp=0.3, steps=1)]}, r"mpp: expected a multiple of 0\.25 µm/px .* got 0\.3"),
    ):
        with pytest.raises(ConfigError, match=told):
            run(fake_data, tmp_path / "refused", **changes)
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    alone = settings.variants[0].model_copy(update={"finish_steps": None})
    run(fake_data, tmp_path / "run", attributes=[], variants=[alone])
    assert load_detector(tmp_path / "run" / "0.25").attributes == ()
    shorter = [alone.model_copy(update={"steps": 2})]
    with pytest.raises(ConfigError, match=r"steps: expected 4 or more, as trained, got 2"):
        run(fake_data, tmp_path / "run", attributes=[], variants=shorter)


def spied_splits(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[str]]:
    """A list that grows by the splits that each training image is made of."""
    shown: list[Sequence[str]] = []
    example = CropSource.example

    def seen(self: CropSource, rng: np.random.Generator, size: int) -> Example:
        shown.append(self._trained)
        return example(self, rng, size)

    monkeypatch.setattr(CropSource, "example", seen)
    return shown


def test_what_is_finished_is_calibrated_on_halves(
    fake_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On what two trainings found, each on the half of the validation patients that the other was trained on."""
    looked: list[dict[str, list[metrics.Image]]] = []

    def look(*arguments: Any) -> tuple[Any, dict[str, list[metrics.Image]]]:
        shown, found = evaluation.find_all(*arguments)
        looked.append(found)
        return shown, found

    monkeypatch.setattr(training, "find_all", look)
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    said = run(fake_data, tmp_path, variants=settings.variants[:1])
    _, *halves = looked
    assert [sum("on half of the validation patients" in line for line in said), len(halves)] == [2, 2]
    fields = [image for half in halves for image in half["field"]]
    of_half = [{image.patient for image in half["field"]} for half in halves]
    assert all(of_half)
    assert of_half[0].isdisjoint(of_half[1])
    card = json.loads((tmp_path / "0.25" / "slidescan.json").read_text())
    assert (card["temperature"], card["offset"]) == metrics.fit_calibration(fields)


def test_the_validation_patients_are_trained_on_when_all_is_chosen(
    fake_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other variant, which is not finished, begins with weights that do not know them, and stays as it is."""
    shown = spied_splits(monkeypatch)
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    run(fake_data, tmp_path, variants=[v.model_copy(update={"finish_steps": None}) for v in settings.variants])
    assert set(shown) == {("train",)}
    before = {name: weights(tmp_path / name) for name in ("0.25", "0.5")}
    shown.clear()
    run(fake_data, tmp_path)  # goes on where that ended
    assert set(shown) == {("train", "validation")}
    for name, steps in (("0.25", 4), ("0.5", None)):
        assert json.loads((tmp_path / name / "slidescan.json").read_text())["training"].get("finish_steps") == steps
        old, now, whole = before[name], weights(tmp_path / name), weights(trained / name)
        assert all(np.array_equal(now[key], old[key]) for key in now) == (steps is None)
        assert all(np.array_equal(now[key], whole[key]) for key in now)


@pytest.mark.parametrize(("capability", "told"), [("AVX2", True), ("AVX512", False)])
def test_a_processor_without_bfloat16_is_told_of(
    fake_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capability: str, told: bool
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    said: list[str] = []
    with pytest.raises(ModelError, match="start from"):  # which is found out next
        train_detector(
            settings.model_copy(update={"data": fake_data, "precision": "bf16", "variants": settings.variants[1:]}),
            tmp_path,
            said.append,
        )
    assert any("no instructions for bfloat16" in line for line in said) == told


def test_all_of_the_network_is_finished(fake_data: Path, tmp_path: Path) -> None:
    """In bfloat16 the first convolution too, and what is kept at zero stays there."""
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    run(fake_data, tmp_path, variants=settings.variants[:1], precision="bf16")
    before, after = safetensors.numpy.load_file(tmp_path / "losses-0.25.safetensors"), weights(tmp_path / "0.25")
    kernels = [key for key in after if key.startswith("model.backbone") and after[key].ndim == 4]
    assert len(kernels) > 5
    for key in kernels:
        old = before[f"average.{key}"].astype(after[key].dtype)
        assert not np.array_equal(old, after[key]), key
    pinned = [value for key, value in after.items() if ".self_attn.out_proj." in key]
    assert pinned
    assert not any(value.any() for value in pinned)


def test_a_cycle_begins_anew(fake_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two cycles of two steps, the second has the learning rates of the first."""
    from slidescan.train import loop

    monkeypatch.setattr(loop, "_LOG_STEPS", 1)
    smoke = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke().variants[0]
    run(fake_data, tmp_path, variants=[smoke.model_copy(update={"cycles": 2, "finish_steps": None})])
    _, *rows = (tmp_path / "losses-0.25.csv").read_text().splitlines()
    rates = [float(row.split(",")[2]) for row in rows]
    assert rates == pytest.approx([smoke.lr, 0.51 * smoke.lr] * 2, rel=0.01)


@pytest.mark.parametrize("part", ["all", "first half", "second half"])
def test_who_is_trained_on_among_the_validation_patients(fake_data: Path, tmp_path: Path, part: str) -> None:
    """Crops of theirs that are dyed blue are seen in the training images of who trains on them, in nobody else's."""
    settings = TrainSettings(data=shutil.copytree(fake_data, tmp_path / "data"), share_phantom=0, share_bare=0)
    patients = sorted({crop.patient for crop in load_crops(settings.data, "validation")})
    held_out = {"all": patients, "first half": patients[::2], "second half": patients[1::2]}[part]
    for row in json.loads((settings.data / "midog21" / "annotations.coco.json").read_text())["images"]:
        if row["slide"] in held_out:
            file = settings.data / "midog21" / "images" / row["file_name"]
            Picture.fromarray(np.asarray(Picture.open(file)) // np.array([8, 2, 1], np.uint8)).save(file)
    source = CropSource(settings.data, settings, settings.variants[0])
    first, second = source.halves()  # by whom is looked at
    rng = np.random.default_rng(0)
    told = [(source, False), (source.whole(), True), (first, part != "first half"), (second, part != "second half")]
    for one, seen in told:
        images = [one.example(rng, 256).image.astype(int) for _ in range(20)]
        assert any((image[..., 2] - image[..., 0] > 100).mean() > 0.01 for image in images) == seen


@pytest.mark.parametrize("mosaics", [0.0, 1.0])
def test_of_a_figure_at_the_edge_of_an_image_nothing_is_taught(fake_data: Path, mosaics: float) -> None:
    """What is seen of it may be too little to tell: its place is ignored, and no whole figure is."""
    nothing_else = {"share_phantom": 0, "share_bare": 0, "share_negative": 0, "stain_jitter": 0}
    settings = TrainSettings(data=fake_data, share_mosaic=mosaics, figures_per_mpx=150, **nothing_else)
    source, rng, at_edge = CropSource(settings.data, settings, settings.variants[0]), np.random.default_rng(0), 0
    for _ in range(40):
        example = source.example(rng, 192)
        kinds = [(xyxy[:, :2] + xyxy[:, 2:]) / 2 for xyxy in (example.xyxy_px, example.ignored_xyxy_px)]
        for dot in dots(example.image, least_px=12):
            told = [np.abs(centres - dot).max(1).min(initial=np.inf) < 16 for centres in kinds]
            assert any(told)
            if ((dot > 16) & (dot < 192 - 16)).all():
                assert told == [True, False]
        at_edge += len(example.ignored_xyxy_px)
    assert at_edge > 3


def test_the_threshold_is_chosen_where_figures_are_rare_too(fake_data: Path) -> None:
    """Mosaics alone would have it so low that on tissue with few figures many detections are none."""
    settings = TrainSettings(data=fake_data, share_phantom=0, share_bare=0, eval_images=2)
    source = CropSource(settings.data, settings, settings.variants[0])
    kinds = [image.kind for image in source.shown("validation")]
    assert list(dict.fromkeys(kinds)) == ["field", "sparse", "mosaic"]


def test_start_weights_must_exist(fake_data: Path, tmp_path: Path) -> None:
    """A variant that starts from one not trained yet is an error that says so."""
    for first in ([], [VariantSettings(mpp=0.25, steps=1)]):  # before any is trained
        with pytest.raises(ModelError, match="start from"):
            run(fake_data, tmp_path, variants=[*first, VariantSettings(mpp=0.5, start_mpp=1.0, steps=1)])
        assert not list(tmp_path.glob("losses*"))


def test_pictures_are_measured_at_the_scale_they_were_trained_at(trained: Path, tmp_path: Path) -> None:
    """The card says what was assumed then; --mpp overrules it, and of several detectors none is assumed."""
    data = coco(tmp_path / "data", lambda t: t.update(categories=[{"id": i, "name": "mitotic figure"} for i in (1, 2)]))

    def of(model: Path, *mpp: float | None) -> float | None:
        return open_test(data, Model(model), 2, *mpp).annotated("test")[0].slide.mpp

    assert of(trained / "0.25", None, 0.25) == 0.25
    assert of(trained / "0.25", 0.4, 0.25) == 0.4
    with pytest.raises(ConfigError, match="expected its mpp, for detectors of several"):
        of(trained / "0.25")
    shutil.copytree(trained / "0.25", tmp_path / "model")
    card = json.loads((tmp_path / "model/slidescan.json").read_text())
    card["training"]["slide_mpp"] = 0.3
    (tmp_path / "model/slidescan.json").write_text(json.dumps(card))
    assert of(tmp_path / "model", None, 0.25) == 0.3
    assert of(tmp_path / "model", 0.4) == 0.4


def test_what_is_found_on_empty_tissue_is_unlearned(
    fake_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows around false alarms are kept and trained on, and the card says how many."""
    monkeypatch.setattr(metrics, "best_threshold", lambda *kinds: 0.01)  # what learned nothing scores nothing higher,
    monkeypatch.setattr(metrics, "fit_calibration", lambda images: (1.0, 5.0))  # and not even that
    shutil.copytree(trained, tmp_path / "run")
    before = weights(tmp_path / "run" / "0.5")
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    settings = settings.model_copy(update={"data": fake_data, "shifts": 0, "variants": settings.variants[1:]})
    tissue = np.random.default_rng(0).normal((190, 110, 160), 30, (256, 320, 3)).clip(0, 255).astype(np.uint8)
    said: list[str] = []
    with unmeasured():
        train_detector(settings, tmp_path / "run", said.append, mine_slides=[memory_slide(tissue, 0.5)])
    count = len(list((tmp_path / "run" / "mined-0.5").glob("*.png")))
    assert count > 0
    assert any(f"mined {count} false alarms on 1 slides" in line for line in said)
    card = json.loads((tmp_path / "run" / "0.5" / "slidescan.json").read_text())
    assert card["training"]["mined"] == count
    after = weights(tmp_path / "run" / "0.5")
    assert any(not np.array_equal(before[key], after[key]) for key in before)
    with unmeasured():
        train_detector(settings, tmp_path / "run", said.append)
    again = weights(tmp_path / "run" / "0.5")
    assert all(np.array_equal(again[key], after[key]) for key in after)
    with pytest.raises(ConfigError, match="other slides"):
        train_detector(settings, tmp_path / "run", said.append, mine_slides=[memory_slide(tissue[:200], 0.5)])
    (tmp_path / "case").mkdir()
    (tmp_path / "case" / "manifest.json").touch()
    with pytest.raises(ConfigError, match="case: expected a directory for a training, found the result of a scan"):
        train_detector(settings, tmp_path / "case", said.append)
