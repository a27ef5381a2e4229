"""Scans that stop, start again, share a directory or run elsewhere: nothing is lost, nothing half done looks whole."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from distributed import Client, LocalCluster

import slidescan as ss
from slidescan.detections import Detections
from slidescan.errors import ConfigError, ModelError, ResultError, SlideReadError
from slidescan.phantom import write_phantom
from slidescan.prepare import prepare
from slidescan.provenance import run_key
from slidescan.region import RegionPart, RegionTask, wanted
from slidescan.slides import Slide
from tests.archives import Fragile, write_slide
from tests.discs import MPP, ORACLE, config, discs


def interrupted(state: ss.scan_slide.Progress) -> None:
    """Press Ctrl-C."""
    raise KeyboardInterrupt


def stopped_after_one_region(slide: Slide, out: Path) -> None:
    """Begin a scan and press Ctrl-C when its first region is committed."""
    with pytest.raises(KeyboardInterrupt):
        ss.scan(slide, ORACLE, out=out, config=config(), workers=1, on_progress=interrupted)


def test_a_device_that_fails_is_said_in_a_line() -> None:
    """Here: there is no process that another would be started for."""
    slide, _ = discs()
    detector = Fragile(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
    with pytest.raises(ModelError, match=r"the device failed \(CUDA error: unspecified launch failure\); run the same"):
        ss.scan(slide, detector, config=config(), workers=1)


def test_an_interrupted_scan_continues(tmp_path: Path) -> None:
    """After a stop the committed regions are kept, only the rest is scored, and the result is byte-identical."""
    slide, _ = discs()
    ss.scan(slide, ORACLE, out=tmp_path / "whole", config=config(), title="case")

    def stop(state: ss.scan_slide.Progress) -> None:
        if state.regions_done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), workers=1, on_progress=stop)
    with pytest.raises(ResultError, match="has not finished"):
        ss.load_result(tmp_path / "case")
    committed = {p: p.stat().st_mtime_ns for p in (tmp_path / "case" / "").glob("parts-*/*.npz")}
    assert len(committed) >= 3

    states: list[ss.scan_slide.Progress] = []
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), on_progress=states.append)
    assert len(states) == states[-1].regions - len(committed)
    assert not list((tmp_path / "case").glob("parts-*"))
    whole = json.loads((tmp_path / "whole" / "manifest.json").read_text())["files"]
    again = json.loads((tmp_path / "case" / "manifest.json").read_text())["files"]
    assert whole == again
    assert len(result.detections)


def test_a_killed_process_continues(tmp_path: Path) -> None:
    """SIGKILL in the middle costs the regions in flight and nothing else."""
    slide, _ = discs()
    ss.scan(slide, ORACLE, out=tmp_path / "whole", config=config(), title="case")
    program = (
        "import os, signal, sys\n"
        "sys.path.insert(0, sys.argv[2])\n"
        "import test_scan as t\n"
        "from pathlib import Path\n"
        "import slidescan as ss\n"
        "def kill(state):\n"
        "    if state.regions_done == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "ss.scan(t.discs()[0], t.ORACLE, out=Path(sys.argv[1]), config=t.config(), on_progress=kill)\n"
    )
    arguments = [sys.executable, "-c", program, str(tmp_path / "case"), str(Path(__file__).parent)]
    done = subprocess.run(arguments, capture_output=True, check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    kept = len(list((tmp_path / "case" / "").glob("parts-*/*.npz")))
    assert kept >= 4
    states: list[ss.scan_slide.Progress] = []
    ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), on_progress=states.append)
    assert len(states) == states[-1].regions - kept
    files = [json.loads((tmp_path / n / "manifest.json").read_text())["files"] for n in ("whole", "case")]
    assert files[0] == files[1]


def test_a_damaged_part_is_scored_again(tmp_path: Path) -> None:
    """A truncated region file (a power cut) is not trusted."""
    slide, centers = discs()
    stopped_after_one_region(slide, tmp_path / "case")
    part = next((tmp_path / "case" / "").glob("parts-*/*.npz"))
    whole = part.read_bytes()
    flags = whole.index(b"PK\1\2") + 8  # of the first entry of its directory: bit 0 is "encrypted"
    for damaged in (whole[:flags] + bytes([whole[flags] | 1]) + whole[flags + 1 :], whole[:100]):
        part.write_bytes(damaged)
        assert RegionPart.load(part) is None
    assert len(ss.scan(slide, ORACLE, out=tmp_path / "case", config=config()).detections) == len(centers)


def test_a_finished_scan_is_not_repeated_and_another_is_not_overwritten(tmp_path: Path) -> None:
    """The same scan returns the stored result; other settings are refused until told to overwrite."""
    slide, _ = discs(n=10)
    first = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    states: list[ss.scan_slide.Progress] = []
    again = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), on_progress=states.append)
    assert (states, len(again.detections)) == ([], len(first.detections))
    other = config(detect__min_score=0.4)
    with pytest.raises(ResultError, match=r"result of another set of settings; .*--overwrite"):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=other)
    for what, given in (
        ("slide", (discs(n=5)[0], ORACLE)),
        ("detector", (slide, replace(ORACLE, max_per_tile=999))),
    ):
        with pytest.raises(ResultError, match=f"holds the result of another {what}; "):
            ss.scan(*given, out=tmp_path / "case", config=config())
    with pytest.raises(ConfigError, match="workers: expected 1 or more, got 0"):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), workers=0)
    replaced = ss.scan(slide, ORACLE, out=tmp_path / "case", config=other, overwrite=True)
    assert replaced.config.detect.min_score == 0.4


def test_a_result_is_overwritten_only_by_another(tmp_path: Path) -> None:
    """A scan that is refused for its settings leaves what was there."""
    slide, centers = discs()
    ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    with pytest.raises(ConfigError, match="halo_um must be at least"):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(tiling__halo_um=0.1), overwrite=True)
    assert len(ss.load_result(tmp_path / "case").detections) == len(centers)


def test_settings_changed_after_a_stop_start_anew(tmp_path: Path) -> None:
    """Parts of other settings are never mixed in."""
    slide, centers = discs()
    stopped_after_one_region(slide, tmp_path / "case")
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(tiling__region_px=5000))
    assert len(result.detections) == len(centers)


def test_a_scan_is_one_of_a_reader_and_of_a_scale(tmp_path: Path) -> None:
    """What another reader, or the same weights taken to be of other µm/px, found is another scan."""
    path = tmp_path / "case.tiff"
    write_phantom(path, ss.Phantom((512, 512), 0.25, n_figures=2, n_look_alikes=0))
    slides = [ss.open_slide(path, backend=backend) for backend in ("tiff", "openslide")]
    detectors = [SimpleNamespace(sha256="same", runs_on="cpu, fp32", mpp=mpp) for mpp in (0.25, 0.5)]
    keys = {run_key(slide, detector, config()) for slide in slides for detector in detectors}  # type: ignore[arg-type]
    assert len(keys) == 4


def test_what_is_not_of_a_scan_stays(tmp_path: Path) -> None:
    """A scan into a directory in use removes what scans leave behind, and nothing that looks a little like it."""
    slide, _ = discs(n=10)
    mine = ["parts-2024/notes.txt", "parts-list.csv", ".draft.partial.txt", ".mask.partial"]
    left = ["parts-0123456789abcdef/r00000_c00000.npz", ".lease.0123456789abcdef.partial"]
    left += [f".anomaly.ome.zarr.0123456789abcdef-1-1.partial{old}/zarr.json" for old in ("", ".old")]
    left += [".flagged.geojson.0123456789abcdef-1-1.partial"]  # of another machine
    for name in [*mine, *left]:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    ss.scan(slide, ORACLE, out=tmp_path, config=config())
    assert [name for name in [*mine, *left] if (tmp_path / name).exists()] == mine


def test_two_scans_do_not_write_into_one_directory(tmp_path: Path) -> None:
    """While a scan runs, a second one into its directory is refused; afterwards it may."""
    slide, _ = discs(n=10)
    other = config(tiling__region_px=5000)
    refused: list[str] = []

    def intrude(state: ss.scan_slide.Progress) -> None:
        with pytest.raises(ResultError) as caught:
            ss.scan(slide, ORACLE, out=tmp_path / "case", config=other)
        refused.append(str(caught.value))

    ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), on_progress=intrude)
    assert "another scan is writing there" in refused[0]


def test_a_slide_that_vanishes_leaves_nothing_that_looks_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A read error of the whole file ends the scan with that error; what was committed is kept."""
    slide, centers = discs()
    read, calls = Slide.read, []

    def gone(self: Slide, *args: object) -> object:
        calls.append(args)
        if len(calls) > 4:
            raise SlideReadError("case.svs: the file is gone")
        return read(self, *args)

    monkeypatch.setattr(Slide, "read", gone)
    with pytest.raises(SlideReadError, match="the file is gone"):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), workers=1)
    monkeypatch.undo()
    assert not (tmp_path / "case" / "manifest.json").exists()
    assert len(ss.scan(slide, ORACLE, out=tmp_path / "case", config=config()).detections) == len(centers)


def test_what_was_read_of_a_file_cut_off_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scan whose file is cut off meanwhile ends; with the file whole again, and its old time, nothing is missing."""
    path = tmp_path / "case.tiff"
    n = write_slide(path, 1)
    content, told = path.read_bytes(), path.stat()
    detect, committed = type(ORACLE).detect, list[Path]()

    def cut(*arguments: object) -> list[Detections]:
        committed[:] = tmp_path.glob("case/parts-*/*.npz")
        if len(committed) == 1:
            os.truncate(path, told.st_size // 2)
        if len(committed) > 4:
            raise ModelError("something else ends it")
        return detect(*arguments)  # type: ignore[arg-type]

    def scanned() -> ss.ScanResult:
        return ss.scan(path, ORACLE, out=tmp_path / "case", config=config(tiling__region_px=256), workers=1)

    with monkeypatch.context() as patch:
        patch.setattr(type(ORACLE), "detect", cut)
        with pytest.raises(SlideReadError, match=r"case\.tiff: the file changed while it was scanned"):
            scanned()
    assert committed
    path.write_bytes(content)
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    result = scanned()
    assert (result.anomaly.analysed_fraction, len(result.detections)) == (1.0, n)


def test_a_full_disk_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No space left on the device stops the scan, leaves no partial file, and the scan continues later."""
    slide, centers = discs()

    def full(*args: object, **columns: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("slidescan.region.np.savez", full)
        with pytest.raises(ResultError, match="the disk is full") as caught:
            ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    assert "\n" not in str(caught.value)
    assert list((tmp_path / "case").glob("parts-*/*")) == []
    assert len(ss.scan(slide, ORACLE, out=tmp_path / "case", config=config()).detections) == len(centers)


def test_an_output_path_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """A file where the result directory should be is named."""
    (tmp_path / "case").write_text("mine")
    slide, _ = discs(n=3)
    with pytest.raises(ResultError, match="case"):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    assert (tmp_path / "case").read_text() == "mine"


def test_scan_on_a_dask_cluster_of_processes(tmp_path: Path) -> None:
    """Workers in other processes open the slide themselves and give byte-identical files."""
    from distributed import Client, LocalCluster

    from slidescan.phantom import Phantom, write_phantom

    path = tmp_path / "case.tiff"
    write_phantom(path, Phantom((1500, 1200), MPP, tissue=1.0, n_figures=5, n_look_alikes=0))
    slide = ss.open_slide(path)
    ss.scan(slide, ORACLE, out=tmp_path / "here", config=config(), title="case")
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        ss.scan(slide, ORACLE, out=tmp_path / "there", config=config(), client=client, title="case")
    files = [json.loads((tmp_path / n / "manifest.json").read_text())["files"] for n in ("here", "there")]
    assert files[0] == files[1]


def test_tasks_carry_no_pixels() -> None:
    """What goes to a worker is a few KB however large the region."""
    import pickle

    from slidescan.prepare import prepare

    assert len(pickle.dumps(ORACLE)) < 2000
    slide, _ = discs(n=3)
    prepared = prepare(slide, ORACLE, config(tiling__region_px=5000))
    task = RegionTask(slide, ORACLE, prepared.plan.regions[0], prepared.plane, 42, 6.0, 4, 0.05, Path("part.npz"))
    of_slide = len(pickle.dumps(slide))  # an in-memory slide travels with its array; a file does as its path
    assert len(pickle.dumps(task)) - of_slide < 20_000


def test_a_region_that_nobody_waits_for_ends_uncommitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C does not wait for the region a thread is at: no further tile is scored, and the next run does it."""
    slide, _ = discs()
    prepared = prepare(slide, ORACLE, config())
    (tmp_path / "parts").mkdir()
    part = tmp_path / "parts" / "part.npz"
    task = RegionTask(slide, ORACLE, prepared.plan.regions[0], prepared.plane, 42, 6.0, 4, 0.05, part)
    batches: list[object] = []
    detect = type(ORACLE).detect

    def counted(*arguments: object) -> list[Detections]:
        batches.append(arguments)
        return detect(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(type(ORACLE), "detect", counted)

    def stopped() -> None:
        with wanted(part.parent, here=True):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    task.run()
    assert (batches, part.exists()) == ([], False)
    replace(task, part=tmp_path / "another.npz").run()  # of another scan
    assert batches
    with wanted(part.parent, here=False):
        task.run()
    assert part.is_file()


def test_what_regions_were_scored_on_is_told(tmp_path: Path) -> None:
    """Workers of a cluster may have other devices than who started the scan."""
    slide, _ = discs()
    stopped_after_one_region(slide, tmp_path / "case")
    file = next((tmp_path / "case").glob("parts-*/*.npz"))
    part = RegionPart.load(file)
    assert part is not None
    assert part.runs_on == "cpu"
    replace(part, runs_on="cuda, bf16").save(file)
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    assert result.provenance["device"] == "cpu and cuda, bf16"


def test_a_stopped_scan_continues_on_a_cluster_of_this_process(tmp_path: Path) -> None:
    """A client of threads does the regions that were unwanted a moment ago; Ctrl-C there leaves nothing unwanted."""
    slide, centers = discs()
    stopped_after_one_region(slide, tmp_path / "case")
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        with pytest.raises(KeyboardInterrupt):
            ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), client=client, on_progress=interrupted)
        result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), client=client)
    assert len(result.detections) == len(centers)
