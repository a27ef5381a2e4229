"""One slide from pixels to a result directory, with an oracle instead of a network."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slidescan as ss
from slidescan.anomaly import Coverage
from slidescan.config import ScanConfig
from slidescan.errors import ConfigError, ResolutionError, ResultError, SlideReadError
from slidescan.geometry import Box
from slidescan.region import RegionTask
from slidescan.slides import Slide, memory_slide
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image, random_centers

MPP = 0.5
RADIUS_PX = 11
ORACLE = OracleDetector(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
SMALL = {"tiling.region_px": 600, "tissue.thumbnail_px": 512, "map.um_per_px": 8.0}


def tissue(size_wh: tuple[int, int], centers: np.ndarray) -> np.ndarray:
    return disc_image(size_wh, centers, RADIUS_PX, ground=TISSUE_GROUND)


def discs(n: int = 60, size_wh: tuple[int, int] = (2000, 1500), seed: int = 0) -> tuple[Slide, np.ndarray]:
    """Return a slide of dark discs on pink tissue, and their centres."""
    centers = random_centers(np.random.default_rng(seed), size_wh, n, apart_px=3 * RADIUS_PX, margin_px=RADIUS_PX + 1)
    return memory_slide(tissue(size_wh, centers), MPP), centers


def config(**changed: object) -> ScanConfig:
    return ScanConfig.load({}, SMALL | {k.replace("__", "."): v for k, v in changed.items()})


def in_order(result: ss.ScanResult) -> np.ndarray:
    boxes = result.detections.xyxy
    return boxes[np.lexsort(boxes.T)]


def test_every_disc_exactly_once(tmp_path: Path) -> None:
    """A whole scan finds each disc once, where it is, and says that all tissue was analysed."""
    slide, centers = discs()
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    distance = np.abs(result.detections.centers[:, None] - centers[None]).max(2)
    assert len(result.detections) == len(centers)
    assert distance.min(0).max() <= 1.0
    assert result.anomaly.analysed_fraction == 1.0
    assert sum(r.n for r in result.regions) == len(result.found)


@settings(max_examples=15)
@given(
    st.integers(200, 400),
    st.sampled_from([300, 700, 5000]),
    st.tuples(st.integers(0, 400), st.integers(0, 400)),
)
def test_the_grid_does_not_matter(tile_px: int, region_px: int, shift_px: tuple[int, int]) -> None:
    """Tile size, region size and grid offset leave every detection as it is."""
    slide, _ = discs(size_wh=(1100, 900), n=30)
    detector = OracleDetector(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
    changed = {"tiling.tile_px": tile_px, "tiling.region_px": region_px, "tiling.shift_px": shift_px}
    there = ScanConfig.load({}, SMALL | changed)
    np.testing.assert_array_equal(
        in_order(ss.scan(slide, detector, config=config())), in_order(ss.scan(slide, detector, config=there))
    )


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    """One thread or three write byte-identical detections and map."""
    slide, _ = discs()
    for n in (1, 3):
        ss.scan(slide, ORACLE, out=tmp_path / str(n), config=config(), workers=n)
    one, three = (json.loads((tmp_path / n / "manifest.json").read_text())["files"] for n in ("1", "3"))
    assert one == three


def test_a_resampled_plane_keeps_the_places() -> None:
    """A detector at another µm/px finds the same discs to within a px of its own plane."""
    slide, centers = discs(size_wh=(1500, 1200), n=30)
    coarse = OracleDetector(mpp=0.8, input_px=256, object_um=20.0, max_per_tile=1000)
    result = ss.scan(slide, coarse, config=config())
    assert len(result.detections) == len(centers)
    distance = np.abs(result.detections.centers[:, None] - centers[None]).max(2)
    assert distance.min(0).max() <= 0.8 / MPP


def test_an_interrupted_scan_continues(tmp_path: Path) -> None:
    """After a stop the committed regions are kept, only the rest is scored, and the result is byte-identical."""
    slide, _ = discs()
    ss.scan(slide, ORACLE, out=tmp_path / "whole", config=config())

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
    ss.scan(slide, ORACLE, out=tmp_path / "whole", config=config())
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

    def stop(state: ss.scan_slide.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), workers=1, on_progress=stop)
    part = next((tmp_path / "case" / "").glob("parts-*/*.npz"))
    part.write_bytes(part.read_bytes()[:100])
    assert len(ss.scan(slide, ORACLE, out=tmp_path / "case", config=config()).detections) == len(centers)


def test_a_finished_scan_is_not_repeated_and_another_is_not_overwritten(tmp_path: Path) -> None:
    """The same scan returns the stored result; other settings are refused until told to overwrite."""
    slide, _ = discs(n=10)
    first = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    states: list[ss.scan_slide.Progress] = []
    again = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), on_progress=states.append)
    assert (states, len(again.detections)) == ([], len(first.detections))
    other = config(detect__min_score=0.4)
    with pytest.raises(ResultError, match="--overwrite"):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=other)
    replaced = ss.scan(slide, ORACLE, out=tmp_path / "case", config=other, overwrite=True)
    assert replaced.config.detect.min_score == 0.4


def test_settings_changed_after_a_stop_start_anew(tmp_path: Path) -> None:
    """Parts of other settings are never mixed in."""
    slide, centers = discs()

    def stop(state: ss.scan_slide.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(), workers=1, on_progress=stop)
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(tiling__region_px=5000))
    assert len(result.detections) == len(centers)


def test_a_hole_lowers_coverage_and_the_scan_completes(tmp_path: Path) -> None:
    """What cannot be read is marked read-failed, has no score, and the rest is found."""
    _, centers = discs()
    hole = Box(500, 400, 740, 640)
    slide = memory_slide(tissue((2000, 1500), centers), MPP, holes=(hole,))
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    px = 8.0 / MPP
    inside = np.s_[int(400 / px) : int(np.ceil(640 / px)), int(500 / px) : int(np.ceil(740 / px))]
    assert (result.coverage[inside] == Coverage.READ_FAILED).all()
    assert np.isnan(result.anomaly.score[inside]).all()
    assert (result.coverage == Coverage.READ_FAILED).sum() == result.coverage[inside].size
    assert 0.97 < result.anomaly.analysed_fraction < 0.99
    clear = ~((np.abs(centers - [620, 520]) < 120 + RADIUS_PX + 1).all(1))
    distance = np.abs(result.detections.centers[:, None] - centers[clear][None]).max(2)
    assert distance.min(0).max() <= 1.0


def test_what_the_thumbnail_could_not_read_is_not_called_glass(tmp_path: Path) -> None:
    """A hole over half of a lone piece of tissue is read-failed, though the thumbnail shows white there."""
    image = np.full((1500, 2000, 3), 244, np.uint8)
    image[400:1000, 600:1400] = TISSUE_GROUND
    whole = ss.scan(memory_slide(image, MPP), ORACLE, config=config())
    slide = memory_slide(image, MPP, holes=(Box(600, 300, 1000, 1100),))
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    failed_mm2 = result.anomaly.area_mm2(Coverage.READ_FAILED)
    assert failed_mm2 >= 400 * 600 * (MPP * 1e-3) ** 2
    assert result.anomaly.analysed_fraction < 0.7
    assert whole.anomaly.analysed_fraction == 1.0


def test_a_detector_that_reports_off_the_slide(tmp_path: Path) -> None:
    """Boxes centred in the white beyond the slide's edge are dropped, others are clipped to the slide."""

    class Loose(OracleDetector):
        def detect(self, tiles: np.ndarray, min_score: float) -> list[ss.Detections]:
            window = [[30, 30, 60, 60], [100, 100, 130, 130]]
            return [ss.Detections.build(window, [0.9, 0.9]) for _ in tiles]

    slide, _ = discs(n=5, size_wh=(300, 300))
    detector = Loose(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
    result = ss.scan(slide, detector, out=tmp_path / "case", config=config(tissue__enabled=False))
    x, y = result.detections.centers.T
    assert len(result.detections)
    assert min(x.min(), y.min()) >= 0
    assert max(x.max(), y.max()) < 300
    assert result.detections.xyxy.min() >= 0
    assert result.detections.xyxy.max() <= 300


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


def test_min_score_above_the_threshold_is_refused() -> None:
    """A floor above the operating threshold would make the counts false."""
    slide, _ = discs(n=3)
    with pytest.raises(ConfigError, match="must not exceed the threshold"):
        ss.scan(slide, ORACLE, config=config(detect__min_score=0.9))


def test_unreadable_tissue_is_an_error_not_an_empty_result(tmp_path: Path) -> None:
    """If no tissue can be read nothing is called done."""
    _, centers = discs()
    slide = memory_slide(tissue((2000, 1500), centers), MPP, holes=(Box(0, 0, 2000, 1500),))
    with pytest.raises(SlideReadError, match="could be read"):
        ss.scan(slide, ORACLE, out=tmp_path / "case", config=config(tissue__enabled=False))
    assert not (tmp_path / "case" / "manifest.json").exists()


def test_zero_tissue_is_a_valid_outcome(tmp_path: Path) -> None:
    """Clear glass gives a complete, empty result whose map is all background."""
    slide = memory_slide(np.full((1500, 2000, 3), 244, np.uint8), MPP)
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    assert len(result.detections) == 0
    assert set(np.unique(result.coverage)) == {Coverage.BACKGROUND}
    assert result.summary()["analysed_fraction"] is None
    assert "no tissue" in result.provenance["tissue"]["note"]
    loaded = ss.load_result(tmp_path / "case", verify=True)
    assert (len(loaded.detections), loaded.hotspot, loaded.flagged()) == (0, None, ())


def test_a_full_tile_is_cut_smaller(tmp_path: Path) -> None:
    """A detector that can report few objects a tile still finds all, from smaller tiles, and says so."""
    slide, centers = discs(n=200)
    few = OracleDetector(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=10)
    result = ss.scan(slide, few, out=tmp_path / "case", config=config())
    assert result.provenance["tiles"]["retiled"] > 0
    assert result.provenance["tiles"]["saturated"] == 0
    assert len(result.detections) == len(centers)


def test_a_tile_that_stays_full_is_told(tmp_path: Path) -> None:
    """Where even the smallest tiles are full the map says saturated."""
    slide, _ = discs(n=200)
    fewest = OracleDetector(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1)
    result = ss.scan(slide, fewest, out=tmp_path / "case", config=config())
    assert result.provenance["tiles"]["saturated"] > 0
    assert (result.coverage == Coverage.SATURATED).any()


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


def test_unknown_scale_and_too_small_halo_are_refused() -> None:
    """Nothing is guessed: no µm/px, no scan; a halo that cannot hold an object is a setting error."""
    slide, centers = discs(n=3)
    with pytest.raises(ResolutionError, match="--mpp"):
        ss.scan(memory_slide(tissue((600, 600), centers[:1] % 500), None), ORACLE, config=config())
    with pytest.raises(ConfigError, match="halo_um must be at least 13"):
        ss.scan(slide, ORACLE, config=config(tiling__halo_um=5.0))


def test_load_result_gives_everything_back(tmp_path: Path) -> None:
    """What is loaded equals what was returned."""
    slide, _ = discs()
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    loaded = ss.load_result(tmp_path / "case", verify=True)
    np.testing.assert_array_equal(result.detections.xyxy, loaded.detections.xyxy)
    np.testing.assert_array_equal(result.detections.score, loaded.detections.score)
    np.testing.assert_allclose(result.anomaly.score, loaded.anomaly.score, atol=5.1e-5)
    np.testing.assert_array_equal(result.coverage, loaded.coverage)
    assert result.ids == loaded.ids
    ranked, again = ([(r.rank, r.n, r.evidence) for r in each.flagged(5)] for each in (result, loaded))
    assert ranked == again
    assert (result.hotspot, result.config, result.threshold) == (loaded.hotspot, loaded.config, loaded.threshold)
    for key in ("slide", "detector", "config", "versions", "device", "seconds", "peak_rss_mb", "tiles"):
        assert loaded.provenance[key] == result.provenance[key]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no manifest", "other schema", "no files", "not json"])
def test_a_damaged_result_is_refused(tmp_path: Path, harm: str) -> None:
    """A result whose files are not what the manifest lists is never loaded."""
    slide, _ = discs(n=10)
    out = tmp_path / "case"
    ss.scan(slide, ORACLE, out=out, config=config())
    table, manifest = out / "detections.parquet", out / "manifest.json"
    if harm == "truncate":
        table.write_bytes(table.read_bytes()[:-8])
    elif harm == "flip":
        data = bytearray(table.read_bytes())
        data[len(data) // 2] ^= 1
        table.write_bytes(bytes(data))
    elif harm == "remove":
        shutil.rmtree(out / "anomaly.ome.zarr")
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "other schema":
        manifest.write_text('{"schema": 99}')
    elif harm == "no files":
        manifest.write_text('{"schema": 1}')
    else:
        manifest.write_text("{")
    with pytest.raises(ResultError, match="case"):
        ss.load_result(out)


def test_ids_are_stable_and_unique(tmp_path: Path) -> None:
    """The same slide and model give the same ids under other settings; no two rows share one."""
    slide, _ = discs()
    a = ss.scan(slide, ORACLE, config=config())
    b = ss.scan(slide, ORACLE, config=config(tiling__region_px=5000, tiling__shift_px=[31, 7]))
    assert set(a.ids) == set(b.ids)
    assert len(set(a.ids)) == len(a.ids)


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


def test_scan_on_a_dask_cluster_of_processes(tmp_path: Path) -> None:
    """Workers in other processes open the slide themselves and give byte-identical files."""
    from distributed import Client, LocalCluster

    from slidescan.phantom import Phantom, write_phantom

    path = tmp_path / "case.tiff"
    write_phantom(path, Phantom((1500, 1200), MPP, tissue=1.0, n_figures=5, n_look_alikes=0))
    slide = ss.open_slide(path)
    ss.scan(slide, ORACLE, out=tmp_path / "here", config=config())
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        ss.scan(slide, ORACLE, out=tmp_path / "there", config=config(), client=client)
    files = [json.loads((tmp_path / n / "manifest.json").read_text())["files"] for n in ("here", "there")]
    assert files[0] == files[1]


def test_import_is_light() -> None:
    """`import slidescan` loads none of the heavy packages."""
    program = (
        "import sys, slidescan, slidescan.cli\n"
        "heavy = {'torch', 'dask', 'distributed', 'transformers', 'openslide', 'zarr', 'skimage', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
