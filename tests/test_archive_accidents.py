"""What befalls a run from outside: a full disk, one that turns read-only, slides that change, a second run beside it.

Each is compared with one undisturbed run. Disks are mounted in a namespace of the test's own.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow.parquet as pq
import pytest

import slidescan as ss
from slidescan.archive import ArchiveProgress, archive_status, read_listing
from slidescan.archive.record import read_records
from tests.archives import Gated, differing, write_slide
from tests.discs import MPP, SMALL, config

ROOT = Path(__file__).parents[1]
N = 4
# What two runs differ in: when, how fast, in how much memory, in how many attempts, and what the last of them scored.
DIFFER = {"seconds", "profile", "stages_s", "peak_rss_mb", "finished_s", "attempts", "megapixels"}
# `slidescan archive` with a detector that is open about what it does; seconds between two attempts are no test's.
PROGRAM = """
import sys
from pathlib import Path
from unittest import mock
from slidescan import cli
from tests.archives import Gated
from tests.discs import MPP

scored, gate = map(Path, sys.argv[1:3])
detector = Gated(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000, scored=scored, gate=gate)
sys.argv[:3] = ["slidescan", "archive"]
with (
    mock.patch("slidescan.detect.load_detector", return_value=detector),
    mock.patch("slidescan.archive.engine._BACKOFF_S", 0.01),
    mock.patch("slidescan.archive.engine._SLIDES_EACH", 1),  # or all four are done at nearly the same time
):
    cli.main()
"""


def command(slides: Path, out: Path, *, gate: Path = ROOT) -> list[str]:
    """Return the command that scans `slides` and notes each call of the detector beside `out`, once there is a gate."""
    settings = [text for key, value in SMALL.items() for text in ("--set", f"{key}={value}")]
    arguments = [calls_in(out), gate, slides, "-o", out, "--workers", "2"]
    return [sys.executable, "-c", PROGRAM, *map(str, arguments), *settings]


def calls_in(out: Path) -> Path:
    return out.with_name(f"{out.name}.scored")


def n_calls(out: Path) -> int:
    return len(calls_in(out).read_text().splitlines()) if calls_in(out).exists() else 0


def run(slides: Path, out: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(slides, out), cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


def start(slides: Path, out: Path, gate: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command(slides, out, gate=gate), cwd=ROOT, stderr=subprocess.PIPE, text=True)


def wait_until(true: Callable[[], object], *runs: subprocess.Popen[str]) -> None:
    """Wait until something is true, while these runs are on."""
    until = time.monotonic() + 60
    while not true():
        assert time.monotonic() < until
        assert all(each.poll() is None for each in runs)
        time.sleep(0.005)


def tree(out: Path) -> dict[str, Any]:
    """Return all results and the tables, without times."""
    found: dict[str, Any] = {"index": timeless(pq.read_table(out / "index.parquet").to_pylist())}
    found["failures"] = (out / "failures.csv").read_text()
    for file in sorted((out / "slides").rglob("*")):
        if file.is_file():
            manifest = file.name == "manifest.json"
            content = timeless(json.loads(file.read_bytes())) if manifest else file.read_bytes()
            found[file.relative_to(out).as_posix()] = content
    return found


def timeless(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: timeless(value) for key, value in told.items() if key not in DIFFER}
    return [timeless(value) for value in told] if isinstance(told, list) else told


def what_counts_as_done_is(whole: Whole, out: Path) -> set[str]:
    """Make sure that each slide which looks done without reserve in a disturbed run is; return their ids."""
    records = read_records(out / "records")
    done = {name for name, record in records.items() if (record.state, record.reason) == ("done", None)}
    done |= {folder.parent.name for folder in out.glob("slides/*/manifest.json")} - records.keys()
    for name, content in whole.tree.items():
        if name.split("/")[1:2] and name.split("/")[1] in done and not name.endswith("manifest.json"):
            assert (out / name).read_bytes() == content, name
    for name in done:
        ss.load_result(out / "slides" / name)
    return done


def ends_in_one_line(stderr: str, told: str) -> None:
    assert "Traceback" not in stderr
    (line,) = (line for line in stderr.splitlines() if line.startswith("slidescan: "))
    assert told in line
    assert stderr.strip().endswith(line)


@dataclass(frozen=True)
class Whole:
    """An archive, and what an undisturbed run makes of it."""

    slides: Path
    tree: dict[str, Any]
    calls: int
    kib: int
    """On a disk whose blocks are 4 KiB, as a tmpfs has them."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    for seed in range(N):
        write_slide(folder / f"in/{seed}.tiff", seed)
    done = run(folder / "in", folder / "runs")
    assert done.returncode == 0, done.stderr
    assert archive_status(folder / "runs").done == N
    kib = sum(-(-file.stat().st_size // 4096) * 4 for file in (folder / "runs").rglob("*") if file.is_file())
    return Whole(folder / "in", tree(folder / "runs"), n_calls(folder / "runs"), kib)


@pytest.fixture(scope="module")
def disks() -> list[str]:
    """Return how to run a script that may mount."""
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-euc"]
    if sys.platform != "linux" or shutil.which("unshare") is None:
        pytest.skip("mounting without being root needs Linux and unshare")
    tried = subprocess.run([*unshare, "mount -t tmpfs none /mnt"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"mounting is not permitted here: {tried.stderr.strip()}")
    return unshare


def in_namespace(disks: list[str], script: str, whole: Whole, tmp_path: Path) -> list[str]:
    """Run a script with $1 the output directory, $2 a place outside, then the command of a run; return what it says.

    What the runs say goes to the files ``first`` and ``again`` outside, their exit codes are the script's lines.
    """
    out = tmp_path / "runs"
    out.mkdir()
    arguments = ["sh", str(out), str(tmp_path), *command(whole.slides, out)]
    done = subprocess.run(
        [*disks, script, *arguments], cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_full_disk(disks: list[str], whole: Whole, tmp_path: Path) -> None:
    """The run ends with one line; on a larger disk it continues and ends as if nothing had been."""
    script = f"""
        out=$1 outside=$2; shift 2
        mount -t tmpfs -o size={whole.kib // 2}k none "$out"
        code=0; "$@" 2>"$outside/first" >"$outside/said" || code=$?; echo $code
        cp -r "$out" "$outside/full"
        mount -o remount,size=64m "$out"
        code=0; "$@" 2>"$outside/again" >"$outside/said" || code=$?; echo $code
        cp -r "$out" "$outside/finished"
    """
    assert in_namespace(disks, script, whole, tmp_path) == ["3", "0"]
    ends_in_one_line((tmp_path / "first").read_text(), "the disk is full; free some space")
    assert len(what_counts_as_done_is(whole, tmp_path / "full")) < N
    assert differing(tree(tmp_path / "finished"), whole.tree) == {}


def test_a_disk_that_turns_read_only(disks: list[str], whole: Whole, tmp_path: Path) -> None:
    """As after an error of the disk or the mount; the second slide's files are then refused."""
    # A read-only view of the directory is laid over it: a disk on which files are being written refuses to change.
    script = """
        out=$1 outside=$2; shift 2
        mkdir "$outside/view"
        mount --bind "$out" "$outside/view"
        mount -o remount,bind,ro "$outside/view"
        "$@" 2>"$outside/first" >"$outside/said" & run=$!
        i=0
        until [ "$(ls "$out/records" 2>/dev/null)" ] || [ $i = 6000 ]; do i=$((i + 1)); sleep 0.01; done
        mount --bind "$outside/view" "$out"
        code=0; wait $run || code=$?; echo $code
        cp -r "$out" "$outside/stopped"
        umount "$out"
        code=0; "$@" 2>"$outside/again" >"$outside/said" || code=$?; echo $code
    """
    assert in_namespace(disks, script, whole, tmp_path) == ["3", "0"]
    ends_in_one_line((tmp_path / "first").read_text(), "cannot be written (Read-only file system)")
    assert 1 <= len(what_counts_as_done_is(whole, tmp_path / "stopped")) < N
    assert differing(tree(tmp_path / "runs"), whole.tree) == {}


def cut_off(*files: Path) -> list[tuple[Path, bytes, int]]:
    """Cut files in half, as a copy that goes on has them; return what `made_whole` needs."""
    before = [(file, file.read_bytes(), file.stat().st_mtime_ns) for file in files]
    for file in files:
        os.truncate(file, file.stat().st_size // 2)
    return before


def made_whole(file: Path, content: bytes, mtime_ns: int | None) -> None:
    file.write_bytes(content)
    if mtime_ns is not None:
        os.utime(file, ns=(mtime_ns, mtime_ns))


def test_slides_that_are_cut_off_while_they_are_scanned(whole: Whole, tmp_path: Path) -> None:
    """Whole again, one with its old time and one with a new one, they are scanned as if nothing had been."""
    slides, out, gate = tmp_path / "in", tmp_path / "runs", tmp_path / "open"
    shutil.copytree(whole.slides, slides)
    first = start(slides, out, gate)
    wait_until(lambda: all(list(out.glob(f"slides/{name}/parts-*")) for name in (0, 1)) and n_calls(out), first)
    (old, *as_old), (new, content, _) = cut_off(slides / "0.tiff", slides / "1.tiff")
    gate.touch()
    _, said = first.communicate(timeout=60)
    assert first.returncode in (0, 1), said
    assert "Traceback" not in said
    assert what_counts_as_done_is(whole, out) == {"2", "3"}
    made_whole(old, *as_old)
    made_whole(new, content, None)
    again = run(slides, out)
    assert again.returncode == 0, again.stderr
    assert differing(tree(out), whole.tree) == {}


def test_a_slide_that_is_cut_off_before_it_is_opened(whole: Whole, tmp_path: Path) -> None:
    """The run has listed it whole and finds it cut off; whole again with its old time, it is not taken for done."""
    from distributed import Client, LocalCluster

    slides, out, cut = tmp_path / "in", tmp_path / "runs", list[tuple[Path, bytes, int]]()
    shutil.copytree(whole.slides, slides)
    last = slides / f"{N - 1}.tiff"

    def cut_last(_: ArchiveProgress) -> None:
        if not cut:
            assert not (out / "slides" / last.stem).exists()
            cut.extend(cut_off(last))

    detector = Gated(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000, scored=calls_in(out), gate=ROOT)
    options: dict[str, Any] = {"out": out, "config": config()}
    with (
        LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster) as client,
        mock.patch("slidescan.archive.engine._SLIDES_EACH", 1),  # so that the last waits for its turn
    ):
        ss.scan_archive(slides, detector, client=client, on_slide=cut_last, **options)
        assert what_counts_as_done_is(whole, out) == {"0", "1", "2"}
        made_whole(*cut[0])
        ss.scan_archive(slides, detector, client=client, **options)
    assert differing(tree(out), whole.tree) == {}


def test_two_runs_at_once(whole: Whole, tmp_path: Path) -> None:
    """No region is scored twice, and the whole is that of one run; of slides the other is still at, one says so."""
    out, gate = tmp_path / "runs", tmp_path / "open"
    runs = [start(whole.slides, out, gate) for _ in range(2)]

    def both_are_on() -> bool:
        log = out / "log.jsonl"
        return log.exists() and log.read_text().count('"run_started"') == 2 and n_calls(out) > 0

    wait_until(both_are_on, *runs)
    gate.touch()
    told = [each.communicate(timeout=60)[1] for each in runs]
    ended = {each.returncode: said for each, said in zip(runs, told, strict=True)}
    assert 0 in ended, told
    if left := ended.pop(3, None):
        ends_in_one_line(left, "another run was at work on them")
    assert ended.keys() == {0}, told
    assert differing(tree(out), whole.tree) == {}
    assert n_calls(out) == whole.calls
    events = [json.loads(line)["event"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert N <= events.count("slide_done") <= 2 * N  # the one that comes second finds slides done
    assert {entry.slide_id for entry in read_listing(whole.slides)} == set(read_records(out / "records"))


@pytest.mark.parametrize("name", ["kill_archive.py", "simulate_archive.py"])
def test_archive_pipelines_smoke(name: str) -> None:
    """What is killed goes on to the same files; what is simulated is measured."""
    command = [sys.executable, ROOT / "pipelines" / name, "--smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
