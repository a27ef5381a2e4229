"""The command line, run as a person runs it: in a process of its own."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from slidescan import cli
from slidescan.endings import OUT_OF_MEMORY
from slidescan.phantom import Phantom, write_phantom

ROOT = Path(__file__).parents[1]


def slidescan(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "slidescan.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd)


def failed(done: subprocess.CompletedProcess[str], code: int) -> str:
    """Return the one line of a clean failure."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("slidescan: ")
    return lines[0]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "case.tiff"
    write_phantom(path, Phantom((1600, 1536), 0.25, seed=2, n_figures=12, n_look_alikes=8, tissue=0.6))
    return path


def detector_of_photos(path: Path) -> None:
    """Write what says that it is a DETR for 0.25 µm/px, a kind that has no bf16; its weights are never read."""
    path.mkdir()
    (path / "config.json").write_text(
        '{"model_type": "detr", "architectures": ["DetrForObjectDetection"], "id2label": {"0": "cat"}}'
    )
    (path / "slidescan.json").write_text(
        '{"name": "photos", "classes": ["cat"], "mpp": 0.25, "input_px": 512, "object_um": 20.0}'
    )
    (path / "model.safetensors").write_bytes(b"")


def test_info_scan_export_validate(phantom: Path, tmp_path: Path) -> None:
    """The commands of the README work one after the other and say what they did."""
    said = slidescan("info", phantom)
    assert said.returncode == 0, said.stderr
    assert "1,600 × 1,536 px" in said.stdout
    assert "0.25 µm/px" in said.stdout
    assert "tiles in" in said.stdout
    done = slidescan("scan", phantom, "-o", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "mitosis-0.25" in done.stderr
    assert "looked at   100.00%" in done.stdout
    run = tmp_path / "case"
    assert f"result      {run}" in done.stdout
    assert {p.name for p in run.iterdir()} == {
        "anomaly.ome.zarr", "detections.parquet", "flagged.geojson", "manifest.json", "overview.png"
    }  # fmt: skip
    out = tmp_path / "case.geojson.gz"
    assert slidescan("export", run, "-o", out, "--min-score", "0.05").returncode == 0
    checked = slidescan("validate", out)
    assert checked.returncode == 0
    assert re.fullmatch(rf"{out}: QuPath reads it: \d+ detections?, \d annotations?\n", checked.stdout)
    (tmp_path / "none.geojson").write_text('{"type": "FeatureCollection", "features": []}')
    assert "QuPath reads it: there is no object in it" in slidescan("validate", tmp_path / "none.geojson").stdout
    assert slidescan("export", run, "-o", tmp_path / "case.csv").returncode == 0
    assert (tmp_path / "case.csv").read_text().startswith('"id","x0"')
    again = slidescan("scan", phantom, "-o", tmp_path, "--profile")
    assert again.returncode == 0
    assert again.stdout.startswith(done.stdout)
    told = again.stdout.removeprefix(done.stdout)
    assert all(f"\n  {stage} " in told for stage in ("read", "decode", "assemble", "load", "batch", "model", "write"))
    assert "of the slower, the model" in told


def test_validate_names_the_line_that_breaks(tmp_path: Path) -> None:
    """A feature QuPath would misread is told with its line, and the exit code is 1."""
    path = tmp_path / "bad.geojson"
    path.write_text(
        '{"type": "FeatureCollection", "features": [\n'
        '{"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [[[0,0],[0,9],[9,9],[0,0]]]},\n'
        ' "properties": {"objectType": "detection", "classification": {"name": "mitosis"}}}\n'
        "]}\n"
    )
    done = slidescan("validate", path)
    assert done.returncode == 1
    assert f"{path}:2:" in done.stdout
    assert "color" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["scan", "nowhere.svs"], 1, "nowhere.svs"),
        (["scan", "."], 1, ""),
        (["scan", "empty.svs"], 1, "empty.svs"),
        (["scan", "text.svs"], 1, "text.svs"),
        (["info", "text.svs"], 1, "text.svs"),
        (["scan", "{case}", "--mpp", "77"], 2, "0.05"),
        (["scan", "{case}", "--mpp", "1.0"], 1, "--allow-coarse"),
        (["scan", "{case}", "--model", "no/such/../dir"], 2, ""),
        (["scan", "{case}", "--set", "tiling.tile_size=5"], 2, "tiling.tile_size"),
        (["scan", "{case}", "--set", "tiling"], 2, "section.key=value"),
        (["scan", "{case}", "--backend", "vips"], 2, "vips"),
        (["scan", "{case}", "--precision", "fp8"], 2, "fp8"),
        (["export", "nowhere", "-o", "x.json", "--what", "some"], 2, "'some' is not one of 'all', 'detections'"),
        (["export", "nowhere", "-o", "x.json", "-f", "xml"], 2, "'xml' is not one of"),
        (["scan", "{case}", "--model", "photos", "--precision", "bf16"], 2, "got bf16"),
        (["info", "{case}", "--model", "photos", "--precision", "bf16"], 2, "got bf16"),
        (["detect", "{case}", "--model", "photos", "--precision", "bf16"], 2, "got bf16"),
        (["archive", "*.svs", "--model", "photos", "--precision", "bf16"], 2, "got bf16"),
        (["scan", "{case}", "--scheduler", "tcp://127.0.0.1:9"], 2, "127.0.0.1:9"),
        (["scan", "{case}", "--model", "plain"], 2, "--model-mpp"),
        (["scan", "{case}", "--model", "photos", "--model-mpp", "0.5"], 2, "expected none, for photos says what"),
        (["scan"], 2, "'slide'"),
        (["scann", "x"], 2, "scann"),
        (["export", "nowhere", "-o", "x.geojson"], 3, "nowhere"),
        (["validate", "nowhere.geojson"], 1, ""),
        (["demo", "--size-px", "10"], 2, "2048"),
        (["evaluate", "mitosis", "--data", ".", "-o", "text.svs/x"], 3, "choose another output directory"),
    ],
)  # fmt: skip
def test_a_wrong_command_is_one_line(phantom: Path, tmp_path: Path, arguments: list[str], code: int, said: str) -> None:
    """Bad input: one line that names it, the right exit code, no traceback, and nothing that looks like a result."""
    (tmp_path / "empty.svs").touch()
    (tmp_path / "text.svs").write_text("not a slide")
    detector_of_photos(tmp_path / "photos")
    shutil.copytree(tmp_path / "photos", tmp_path / "plain")
    (tmp_path / "plain" / "slidescan.json").unlink()
    done = slidescan(*(a.replace("{case}", str(phantom)) for a in arguments), cwd=tmp_path)
    if arguments[0] == "validate":
        assert done.returncode in (1, 3)
        assert "Traceback" not in done.stderr
        assert "nowhere.geojson" in done.stdout + done.stderr
    else:
        assert said in failed(done, code)
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("Unable to allocate 12.9 GiB"),
        RuntimeError("not enough memory: 9 GB"),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_too_little_memory_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of numpy and of torch; what else is raised is a bug and keeps its traceback."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("slidescan.slides.open_slide", fail)
    monkeypatch.setattr(sys, "argv", ["slidescan", "scan", "case.svs"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 3
    assert capsys.readouterr().err == f"slidescan: {OUT_OF_MEMORY}\n"
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        cli.main()


@pytest.mark.parametrize("command", [["scan_archive", "nowhere.csv"], ["learn_decisions", "--model", "nowhere"]])
def test_a_pipeline_that_is_told_nonsense_ends_in_a_line(tmp_path: Path, command: list[str]) -> None:
    """Its line begins with the pipeline's name and says what was not found; the exit code is that of the commands."""
    program = [sys.executable, ROOT / "pipelines" / f"{command[0]}.py", *command[1:]]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=300, cwd=tmp_path)
    assert re.fullmatch(rf"{command[0]}: nowhere.*\n", done.stderr), done.stderr
    assert done.returncode == 2
    assert not list(tmp_path.iterdir())


def _heed_sigint() -> None:
    """A shell's background job ignores SIGINT and passes that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_who_asks_to_stop_gets_one_line_and_exit_code_3(tmp_path: Path, asked: signal.Signals) -> None:
    """By Ctrl-C or as a queue does, in the middle of a scan: no traceback, and the same command finishes it."""
    path = tmp_path / "case.tiff"
    write_phantom(path, Phantom((1600, 1600), 0.25, n_figures=5, n_look_alikes=0, tissue=0.9))
    command = [sys.executable, "-m", "slidescan.cli", "scan", path, "-o", tmp_path, "--set", "tiling.region_px=900"]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_sigint
    )
    while not list(tmp_path.glob("case/parts-*/*.npz")) and running.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(timeout=0.05)
    running.send_signal(asked)
    _, stderr = running.communicate(timeout=120)
    assert running.returncode == 3, stderr
    assert stderr.splitlines()[-1].startswith("slidescan: stopped; what was done is kept")
    assert "Traceback" not in stderr
    if asked == signal.SIGINT:  # what is kept does not depend on who asked
        done = slidescan(*command[3:])
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("name", "more", "said"),
    [
        ("a\nb.svs", [], "--slide-id: expected a plain name for the result, got its file's, which needs --slide-id"),
        ("a.svs", ["--slide-id", "a\x1b[31mb"], r"--slide-id: expected a plain name for the result, got 'a\x1b[31mb'"),
        ("a.svs", ["--slide-id", " "], "--slide-id: expected a plain name for the result, got ' '"),
    ],
)
def test_a_name_that_is_not_plain(tmp_path: Path, name: str, more: list[str], said: str) -> None:
    write_phantom(tmp_path / name, Phantom((600, 600), 0.25, n_figures=1, n_look_alikes=0))
    done = slidescan("scan", tmp_path / name, "-o", tmp_path / "runs", *more)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_version() -> None:
    """--version says the version."""
    assert slidescan("--version").stdout.startswith("slidescan 0.")
