"""Settings of a training run, and the run from crops to a directory that scans."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from numpy.typing import NDArray
from PIL import Image as Picture

from slidescan.detect import Family, load_detector
from slidescan.errors import ConfigError, ModelError
from slidescan.slides import memory_slide
from slidescan.train import metrics
from slidescan.train.run import train_detector
from slidescan.train.settings import TrainSettings, VariantSettings, load_settings
from tests.marked import marked_crops

pytestmark = pytest.mark.cores
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory laid out like the real crops, with green dots for figures."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "midog21" / "images"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i, crop in enumerate(marked_crops(24)):
        Picture.fromarray(crop.image).save(folder / f"MIDOG21_{i}.png")
        split = "test" if i % 4 == 0 else "train"
        row = {"id": i, "file_name": f"MIDOG21_{i}.png", "slide": f"{i % 12}", "benchmark_split": split}
        images.append(
            {**row, "x0": 1000.0 * i, "y0": 0.0, "majority": ("Normal", "Atypical")[i % 3 == 0], "scanner": "s"}
        )
        annotations.append({"image_id": i, "category_id": 1, "bbox": [39, 39, 50, 50], "source": f"MIDOG++ #{i}"})
    table = {"images": images, "annotations": annotations}
    (root / "midog21" / "annotations.coco.json").write_text(json.dumps(table))
    return root


def test_the_shipped_settings_are_valid() -> None:
    """The file in configs/ loads, and its smoke version is a valid run too."""
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml")
    assert [v.mpp for v in settings.variants] == [0.25, 0.5]
    assert TrainSettings.model_validate(settings.smoke().model_dump()).crops


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "learning_rate"),
        ("variants: [{mpp: -1}]", r"variants\.0\.mpp"),
        ("variants: [{tile_px: [100]}]", "tile_px"),
        ("variants: [{mpp: 0.25}]", "steps or minutes"),
        ("a: [", "YAML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    """Unknown keys, values out of range and broken YAML say where."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)
    with pytest.raises(ConfigError, match="expected a YAML file"):
        load_settings(tmp_path / "missing.yaml")


def run(fake_data: Path, out: Path, **changes: object) -> list[str]:
    """Train the smoke version of the shipped settings; return what was said."""
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    said: list[str] = []
    train_detector(settings.model_copy(update={"data": fake_data, **changes}), out, said.append)
    return said


def weights(path: Path) -> dict[str, NDArray[np.generic]]:
    """The weights of a model directory."""
    return safetensors.numpy.load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def trained(fake_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole smoke run."""
    out = tmp_path_factory.mktemp("runs") / "train"
    run(fake_data, out)
    return out


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


def test_a_run_that_ended_is_not_done_again(fake_data: Path, trained: Path) -> None:
    """Run again, it changes no weight."""
    before = weights(trained / "0.25")
    run(fake_data, trained)
    after = weights(trained / "0.25")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_killed_run_goes_on_to_the_same_weights(
    fake_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the third of four steps, with a checkpoint after the second: nothing tells it afterwards."""
    from slidescan.train import loop

    average, steps = loop._average, 0

    def stop(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        average(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_average", stop)
    with pytest.raises(KeyboardInterrupt):
        run(fake_data, tmp_path)
    assert not (tmp_path / "0.25").exists()
    monkeypatch.undo()
    run(fake_data, tmp_path)
    for variant in ("0.25", "0.5"):
        whole, resumed = weights(trained / variant), weights(tmp_path / variant)
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


def test_a_broken_checkpoint_is_named(fake_data: Path, tmp_path: Path) -> None:
    """It is not read as far as it goes."""
    (tmp_path / "losses-0.25.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="expected a checkpoint"):
        run(fake_data, tmp_path)


def test_start_weights_must_exist(fake_data: Path, tmp_path: Path) -> None:
    """A variant that starts from one not trained yet is an error that says so."""
    with pytest.raises(ModelError, match="start from"):
        run(fake_data, tmp_path, variants=[VariantSettings(mpp=0.5, start_mpp=0.25, steps=1)])


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
    train_detector(settings, tmp_path / "run", said.append, mine_slides=[memory_slide(tissue, 0.5)])
    count = len(list((tmp_path / "run" / "mined-0.5").glob("*.png")))
    assert count > 0
    assert any(f"mined {count} false alarms on 1 slides" in line for line in said)
    card = json.loads((tmp_path / "run" / "0.5" / "slidescan.json").read_text())
    assert card["training"]["mined"] == count
    after = weights(tmp_path / "run" / "0.5")
    assert any(not np.array_equal(before[key], after[key]) for key in before)
    train_detector(settings, tmp_path / "run", said.append)
    again = weights(tmp_path / "run" / "0.5")
    assert all(np.array_equal(again[key], after[key]) for key in after)
    with pytest.raises(ConfigError, match="other slides"):
        train_detector(settings, tmp_path / "run", said.append, mine_slides=[memory_slide(tissue[:200], 0.5)])
