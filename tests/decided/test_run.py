"""Training with decisions: what is refused, what goes on, and the command from end to end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import slidescan as ss
from slidescan import cli
from slidescan.archive.record import Record
from slidescan.errors import ConfigError
from slidescan.export.features import Feature
from slidescan.export.geojson import write_geojson
from slidescan.slides import Slide, memory_slide
from slidescan.train.annotated import Annotated
from slidescan.train.decided import keep_decided, load_decided
from slidescan.train.settings import load_settings
from tests.archives import write_slide
from tests.decided.saying import NOTHING, SETTINGS, decide, load
from tests.discs import MPP, ORACLE
from tests.reviewed import APART

ROOT = Path(__file__).parents[2]


def test_what_is_measured_on_was_not_decided_on(run: Path, slide: Slide) -> None:
    """Neither the slide, under any name, nor another one of the patient."""
    decide(run, "accept")
    _, decided = load(run, slide)
    other = memory_slide(np.zeros((64, 64, 3), np.uint8), MPP)

    def measured(slide: Slide, patient: str) -> list[Annotated]:
        return [Annotated(slide, NOTHING, np.empty(0, np.int64), np.empty((0, 0)), NOTHING, patient)]

    decided.refuse_leaks(validation=measured(other, "x"), test=[])
    with pytest.raises(ConfigError, match="decisions and test: expected no slide in both, found 1"):
        decided.refuse_leaks(validation=measured(other, "x"), test=measured(slide, "y"))
    with pytest.raises(ConfigError, match="decisions and validation: expected no patient in both, found 1"):
        decided.refuse_leaks(validation=measured(other, "case"), test=[])


def test_a_scan_that_left_classes_out_teaches_nothing(run: Path, slide: Slide) -> None:
    """What it left out near an object would be taught as nothing; the decisions are there after another scan."""
    decide(run, "accept")
    some = APART.model_copy(update={"detect": APART.detect.model_copy(update={"classes": ("disc",)})})
    ss.scan(slide, ORACLE, out=run, config=some, overwrite=True)
    with pytest.raises(ConfigError, match="expected a scan that keeps all classes, got one with"):
        load(run, slide)
    ss.scan(slide, ORACLE, out=run, config=APART, overwrite=True)
    assert load(run, slide)[1].accepted == 1


def test_a_run_goes_on_with_the_same_decisions(run: Path, slide: Slide, tmp_path: Path) -> None:
    """What is written names nobody; before the first checkpoint anything goes, after it nothing else."""
    out = tmp_path / "model"
    out.mkdir()
    decide(run, "accept", who="Dr. Who")
    _, first = load(run, slide)
    keep_decided(first, out)
    keep_decided(None, out)
    assert not (out / "decisions.json").exists()
    keep_decided(first, out)
    (out / "losses-0.25.safetensors").touch()
    keep_decided(load(run, slide)[1], out)
    told = (out / "decisions.json").read_text()
    assert json.loads(told)["accepted"] == 1
    assert "Who" not in told
    assert str(tmp_path) not in told
    decide(run, "", "reject")
    with pytest.raises(ConfigError, match="expected those it was begun with, got others"):
        keep_decided(load(run, slide)[1], out)
    with pytest.raises(ConfigError, match="got none"):
        keep_decided(None, out)
    (out / "decisions.json").unlink()
    with pytest.raises(ConfigError, match="expected none, as before, got others"):
        keep_decided(first, out)


def test_whose_a_decided_slide_is_the_tables_say(tmp_path: Path) -> None:
    """Else a patient that is measured on was trained on, under a slide's name."""
    write_slide(tmp_path / "A2.tif", 1)
    ss.scan(tmp_path / "A2.tif", ORACLE, out=tmp_path / "runs" / "A2", config=APART)
    decide(tmp_path / "runs" / "A2", "accept")
    (tmp_path / "test").mkdir()
    settings = SETTINGS.model_copy(update={"test": tmp_path / "test"})
    for table, patient in ((None, "A2"), ("slide,patient\nA1,P1\nA2,P1\n", "P1")):
        if table:
            (tmp_path / "test" / "patients.csv").write_text(table)
        decided = load_decided(tmp_path / "runs" / "A2", str(tmp_path / "A2.tif"), settings)
        assert [one.patient for one in decided.annotated] == [patient]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two slides of an archive, of which the discs on the left are taken for real, and two annotated ones."""
    root = tmp_path_factory.mktemp("archive")
    (root / "runs" / "records").mkdir(parents=True)
    for name, seed in (("a", 1), ("b", 2)):
        write_slide(root / "in" / f"{name}.tif", seed)
        path = root / "runs" / "slides" / name
        found = ss.scan(root / "in" / f"{name}.tif", ORACLE, out=path, config=APART)
        told = {"best_evidence": found.regions[0].evidence, "flagged_regions": len(found.regions)}
        Record(name, f"site {name}", "key", "done", told=told).save(root / "runs" / "records")
    looked = ss.review(ss.open_archive(root / "runs"), reviewer="ann")
    for item in looked.items():
        looked.decide(item.id, "accept" if item.box_l0.x0 < 450 else "reject")
    for name, seed in (("c", 3), ("d", 4)):
        write_slide(root / "data" / f"{name}.tif", seed)
        box = (400.0, 300.0, 425.0, 325.0)
        write_geojson(root / "data" / f"{name}.geojson", [Feature("annotation", box, "disc")])
    (root / "train.yaml").write_text(
        "data: data\nclasses: [disc]\ndecisions: runs\ndecision_slides: in\nvariants: [{mpp: 0.5, steps: 2}]\n",
        encoding="utf-8",
    )
    return root


def trained(monkeypatch: pytest.MonkeyPatch, *options: object) -> int:
    """Train through the command line; return its exit code."""
    monkeypatch.setattr(sys, "argv", ["slidescan", "train", *map(str, options), "--smoke"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


def test_training_with_decisions(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It says what it learns from, and so does the model's card; without them it is another run."""
    assert trained(monkeypatch, archive / "train.yaml", "-o", tmp_path / "model") == 0
    said = capsys.readouterr().out
    counts = load_decided(archive / "runs", str(archive / "in"), SETTINGS)
    assert f"decisions: {counts.accepted} accepted, {counts.rejected} rejected, on 2 slides" in said
    card = json.loads((tmp_path / "model" / "0.5" / "slidescan.json").read_text())
    assert card["training"]["accepted"] == counts.accepted > 0
    assert card["training"]["rejected"] == counts.rejected > 0
    assert counts.accepted + counts.rejected == 24
    text = (archive / "train.yaml").read_text().replace("decisions: runs\ndecision_slides: in\n", "")
    (archive / "plain.yaml").write_text(text)
    assert trained(monkeypatch, archive / "plain.yaml", "-o", tmp_path / "model") == 2
    assert "those it was begun with, got none" in capsys.readouterr().err


def test_a_run_that_cannot_learn_from_decisions_says_so(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without slides, with slides and no decisions, and where a decided slide is measured on: one line each."""
    plain = tmp_path / "plain.yaml"
    shutil.copytree(archive / "in", tmp_path / "data")
    for name in "ab":
        box = (400.0, 300.0, 425.0, 325.0)
        write_geojson(tmp_path / "data" / f"{name}.geojson", [Feature("annotation", box, "disc")])
    plain.write_text("data: data\nclasses: [disc]\nvariants: [{mpp: 0.5, steps: 2}]\n")
    runs, slides = ("--add-decisions", archive / "runs"), ("--slides", archive / "in")
    for options, expected in (
        (runs, "or --slides on the command line"),
        (slides, "--slides: expected --add-decisions with it"),
        ((*runs, *slides), "decisions and validation: expected no slide in both"),
        ((*runs, "--slides", archive / "data"), "expected 'a' or another that was scanned"),
    ):
        assert trained(monkeypatch, plain, "-o", tmp_path / "model", *options) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert expected in line


def test_paths_in_settings_are_taken_from_the_file(tmp_path: Path) -> None:
    """As `data` is; a URL stays what it is."""
    path = tmp_path / "train.yaml"
    for slides, expected in (("in/*.svs", str(tmp_path / "in/*.svs")), ("s3://slides/x", "s3://slides/x")):
        path.write_text(f"decisions: runs\ndecision_slides: {slides}\nvariants: [{{steps: 1}}]\n")
        loaded = load_settings(path)
        assert (loaded.decisions, loaded.decision_slides) == (tmp_path / "runs", expected)


def test_what_decisions_teach_can_be_measured() -> None:
    """The pipeline runs at its smallest size, from phantoms to the table."""
    command = [sys.executable, ROOT / "pipelines" / "learn_decisions.py", "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    assert re.findall(r"^(before|after) \|", done.stdout, re.MULTILINE) == ["before", "after"]
