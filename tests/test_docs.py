"""What the documents say is run: README commands and code, the notebook, the pipelines."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image

import slidescan
from slidescan import cli
from slidescan.phantom import Phantom, write_phantom
from tests.families import DETECTORS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def beside_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give a working directory that holds a slide, a picture and an RT-DETR, named as in the README."""
    write_phantom(tmp_path / "case.tiff", Phantom((800, 800), 0.25, seed=5, n_figures=12, tissue=0.8))
    shutil.move(tmp_path / "case.tiff", tmp_path / "case.svs")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (480, 700, 3), np.uint8)).save(tmp_path / "image.jpg")
    torch.manual_seed(0)
    DETECTORS["RT-DETR"]().model.float().save_pretrained(tmp_path / "my-rt-detr")
    for name, seed in (("train/a", 4), ("train/b", 2), ("test/c", 3), ("empty", 1)):
        path = tmp_path / f"{name}.tiff"
        path.parent.mkdir(exist_ok=True)
        phantom = Phantom((512, 512), 0.25, seed=seed, n_figures=0 if name == "empty" else 4, tissue=0.9)
        points = write_phantom(path, phantom).truth.centers.tolist()
        if name == "empty":
            path.rename(tmp_path / "empty.svs")
            continue
        feature = {"type": "Feature", "properties": {"classification": {"name": "mitotic figure"}}}
        features = [{**feature, "geometry": {"type": "Point", "coordinates": xy}} for xy in points]
        path.with_suffix(".geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    (tmp_path / "slides.csv").write_text("slide_path,group\ntrain/a.tiff,north\ntest/c.tiff,south\n")
    (settings,) = blocks("yaml")
    short = settings.replace("steps: 2000", "steps: 2, tile_px: [256], mine_steps: 2")
    (tmp_path / "my.yaml").write_text(f"{short}\nbatch_mpx: 0.2\nshifts: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLIDESCAN_STATE", str(tmp_path / "state"))
    return tmp_path


def test_readme_python_runs(beside_a_case: Path) -> None:
    """Each Python block of the README runs as it stands."""
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), {})
    assert (beside_a_case / "case.geojson.gz").is_file()


def test_readme_commands_run(beside_a_case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each slidescan command of the README runs as it stands, in this process: torch loads once. Make targets exist."""
    commands = [line.split("#")[0].strip() for block in blocks("sh") for line in block.splitlines() if line.strip()]
    assert len(commands) >= 6
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in commands:
        program, *arguments = command.split()
        if program == "make":
            assert re.search(rf"^{arguments[0]}:", makefile, re.MULTILINE)
            continue
        if "--add-decisions" in arguments:
            looked = slidescan.review(slidescan.load_result("runs/case"), of="detections")
            for n, item in enumerate(looked.items()):
                looked.decide(item.id, "reject" if n else "accept")
        monkeypatch.setattr(sys, "argv", ["slidescan", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, command


def test_readme_links_lead_somewhere() -> None:
    """Files the README links to are in the repository."""
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A notebook runs from top to bottom in an empty directory."""
    monkeypatch.setenv("SLIDESCAN_STATE", str(tmp_path / "state"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(tmp_path)}}).execute()


def test_benchmark_smoke() -> None:
    """The benchmark runs at its smallest size and prints every line."""
    command = [sys.executable, ROOT / "pipelines" / "benchmark.py", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900, env=dict(os.environ))
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines()[1:] if not line.startswith("|")]  # the rows of a table
    names = [line.split(":")[0] for line in lines]
    assert names == [
        "stitch",
        "memory",
        "read",
        "overlap",
        "ops",
        "ops",
        "models",
        "models",
        "detector",
        "heap",
        "grid",
        "archive",
        "tune",
    ]


def test_gpu_smoke(tmp_path: Path) -> None:
    """What needs a GPU says so, the rest runs, and the report holds what each step printed and how it ended."""
    command = [sys.executable, ROOT / "pipelines" / "gpu.py", "tune", "memcheck", "ops", "--smoke", "-o", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\w+): (passed|left out)", report, re.MULTILINE) == [
        ("tune", "passed"),
        ("memcheck", "left out"),
        ("ops", "passed"),
    ]
    assert "| tiny, float32 | slidescan |" in report
    assert (tmp_path / "launch.json").is_file()


def test_every_public_name_is_documented() -> None:
    """Each name of `slidescan` has a docstring and is in the package's table of contents."""
    for name in slidescan.__all__:
        assert getattr(slidescan, name).__doc__, name
        assert f"`{name}`" in (slidescan.__doc__ or ""), name
