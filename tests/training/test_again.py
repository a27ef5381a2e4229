"""A training run that ended, was stopped or is made longer, and goes on."""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from slidescan.detect import load_detector
from slidescan.errors import ModelError, ResultError
from slidescan.train import run as training
from slidescan.train.settings import load_settings
from tests.training.smoke import ROOT, run, weights


def test_a_run_that_ended_is_not_done_again(fake_data: Path, trained: Path, tmp_path: Path) -> None:
    """Run again, it changes no weight."""
    before = weights(trained / "0.25")
    run(fake_data, shutil.copytree(trained, tmp_path / "run"))
    after = weights(tmp_path / "run" / "0.25")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_killed_run_goes_on_to_the_same_weights(
    fake_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped between two checkpoints, while learning and again on validation patients: nothing tells it afterwards."""
    from slidescan.train import loop

    average, steps = loop._average, iter(range(0))

    def stop(*arguments: object) -> None:
        if next(steps, None) is None:
            raise KeyboardInterrupt
        average(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_average", stop)
    # Of four steps a variant, of which the first two are kept, and then four of each stage of the finish.
    for n, learned in ((2, False), (2 + 4 + 6, True)):
        steps = iter(range(n))
        with pytest.raises(KeyboardInterrupt):
            run(fake_data, tmp_path)
        assert (tmp_path / "drafts" / "0.5").exists() == learned
        assert not (tmp_path / "0.5").exists()
    monkeypatch.undo()
    run(fake_data, tmp_path)
    for variant in ("0.25", "0.5"):
        whole, resumed = weights(trained / variant), weights(tmp_path / variant)
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


@pytest.mark.parametrize("at", ["_settle", "publish"])
def test_a_finished_model_outlasts_a_run_that_ends(
    fake_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Run again and stopped anywhere, it is what it was, and not one that is uncalibrated or half taught."""
    shutil.copytree(trained, tmp_path / "run")
    before = {file.name: file.read_bytes() for file in (tmp_path / "run" / "0.25").iterdir()}

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(training._Run, at, stop)
    with pytest.raises(KeyboardInterrupt):
        run(fake_data, tmp_path / "run")
    assert {file.name: file.read_bytes() for file in (tmp_path / "run" / "0.25").iterdir()} == before


def test_a_model_is_never_half_another(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped while it takes the place of the one before: there is none until it is published again."""
    for place in ("drafts/0.25", "0.25"):
        shutil.copytree(trained / "0.25", tmp_path / place)
    card = tmp_path / "drafts" / "0.25" / "slidescan.json"
    card.write_text(card.read_text().replace('"threshold"', '"threshold" '))
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    again = training._Run(settings, tmp_path, print)

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(training, "commit", stop)  # as a full disk does
        with pytest.raises(KeyboardInterrupt):
            again.publish(settings.variants[0])
    assert load_detector(tmp_path / "0.25").sha256 == load_detector(trained / "0.25").sha256
    replace, put = Path.replace, list[str]()

    def stop_late(path: Path, to: Path) -> Path:
        if to.name == "slidescan.json":
            raise KeyboardInterrupt
        put.extend([to.name] if path.suffix == ".new" else [])
        return replace(path, to)

    shutil.copytree(trained / "0.5", tmp_path / "0.5")
    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", stop_late)
        with pytest.raises(KeyboardInterrupt):
            again.publish(settings.variants[0])
    assert "model.safetensors" in put
    for where in (tmp_path / "0.25", tmp_path):  # nor is the other variant taken for both
        with pytest.raises(ModelError, match=r"0\.25: expected config\.json beside its weights"):
            load_detector(where)
    published = load_detector(again.publish(settings.variants[0]))
    assert published.sha256 == load_detector(card.parent).sha256 != load_detector(trained / "0.25").sha256


def test_other_weights_are_finished_anew(fake_data: Path, tmp_path: Path) -> None:
    """A run that is made longer does not end with what its former weights became."""
    (variant,) = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke().variants[:1]
    run(fake_data, tmp_path, variants=[variant])
    before = weights(tmp_path / "0.25")
    run(fake_data, tmp_path, variants=[variant.model_copy(update={"steps": 6})])
    after = weights(tmp_path / "0.25")
    assert any(not np.array_equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(("old", "new"), [("optimiser.adamw.", "optimiser."), ("network.", "net.")])
def test_a_checkpoint_of_something_else_is_named(
    fake_data: Path, trained: Path, tmp_path: Path, old: str, new: str
) -> None:
    """It is not read as far as it goes, and what is said of it is no page long."""
    name = "losses-0.25.safetensors"
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(ModelError, match="expected a checkpoint"):
        run(fake_data, tmp_path)
    arrays = {key.replace(old, new): value for key, value in safetensors.numpy.load_file(trained / name).items()}
    safetensors.numpy.save_file(arrays, tmp_path / name, {"run": '{"step": 1, "seconds": 1}'})
    with pytest.raises(ModelError, match="expected a checkpoint") as caught:
        run(fake_data, tmp_path)
    assert len(str(caught.value)) < 400


def test_a_full_disk_is_told(fake_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a line, and what was kept before stays."""

    def full(path: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "no space left")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ResultError, match="the disk is full; free some space and run the same command to continue"):
        run(fake_data, tmp_path)
    assert not list(tmp_path.glob("*losses*.safetensors"))
