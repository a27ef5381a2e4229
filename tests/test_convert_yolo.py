"""From what a training of ultralytics leaves to a model directory; skipped where that package is not installed."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from torch import nn

from slidescan.detect import convert_yolo
from slidescan.errors import ModelError
from tests.families import picture
from tests.test_cli import failed, slidescan
from tests.yolos import NEEDS_ULTRALYTICS, Bomb, checkpoint, trained

pytestmark = NEEDS_ULTRALYTICS
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("description", ["yolo11n.yaml", "yolo26n-seg.yaml", "rtdetr-l.yaml", "no-such.yaml"])
def test_other_networks_are_not_converted(tmp_path: Path, description: str) -> None:
    """One line says what was expected; nothing is written."""
    with pytest.raises(ModelError, match="expected"):
        convert_yolo(description, tmp_path / "out", mpp=0.25)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", [{"mpp": 0.0}, {"mpp": 0.25, "object_um": -1.0}, {"mpp": 0.25, "threshold": 2.0}])
def test_numbers_out_of_range_write_nothing(tmp_path: Path, wrong: dict[str, float]) -> None:
    """They are refused before anything is read or written."""
    with pytest.raises(ModelError, match="expected mpp and object_um above 0"):
        convert_yolo("yolo26n.yaml", tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_is_something_else_is_refused(tmp_path: Path) -> None:
    """Code is not run; a truncated file, another object and another network than described are one line each."""
    path, out = tmp_path / "best.pt", tmp_path / "out"
    network = trained()

    def refused(said: str) -> None:
        with pytest.raises(ModelError, match=said):
            convert_yolo(path, out, mpp=0.25)

    checkpoint(network, path, extra=Bomb(tmp_path / "ran"))
    refused("cannot read it")
    assert not (tmp_path / "ran").exists()
    checkpoint(nn.Conv2d(1, 1, 1), path)
    refused("it holds a Conv2d")
    changed = copy.deepcopy(network)
    changed.model[0].act = nn.ReLU()
    checkpoint(changed, path)
    refused(r"got another \(it finds something else\); convert it with the version")
    del changed.model[0].act
    checkpoint(changed, path)
    refused(r"got another \(.*no attribute 'act'")
    changed.yaml["scale"] = "s"
    checkpoint(changed, path)
    refused("entries do not")
    path.write_bytes(checkpoint(network, path).read_bytes()[:100_000])
    refused("cannot read it")
    path.unlink()
    refused("no such")
    assert not out.exists()


def test_the_pipeline_converts(tmp_path: Path) -> None:
    """Its smoke run writes a model and says its name; without a file it is one line."""
    command = [sys.executable, ROOT / "pipelines" / "convert_ultralytics.py", "-o", "out", "--mpp", "1"]
    done = subprocess.run([*command, "--smoke"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "ultralytics:out: 80 classes, tiles of 640 px at 1 µm/px\n"
    done = subprocess.run([*command, "none.pt"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"convert_ultralytics: none\.pt: expected .*\n", done.stderr)
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    assert "write ultralytics:out" in failed(slidescan("detect", "picture.png", "--model", "out", cwd=tmp_path), 2)
