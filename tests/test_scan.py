"""One slide from pixels to a result directory, with an oracle instead of a network."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import slidescan as ss
from slidescan.anomaly import Coverage
from slidescan.cli_report import report
from slidescan.config import ScanConfig
from slidescan.detections import Detections
from slidescan.errors import ConfigError, ModelError, ResolutionError, SlideReadError
from slidescan.geometry import Box
from slidescan.prepare import prepare
from slidescan.slides import memory_slide
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image, random_centers
from tests.discs import MPP, ORACLE, RADIUS_PX, SMALL, config, discs, in_order, tissue


def test_every_disc_exactly_once(tmp_path: Path) -> None:
    """A whole scan finds each disc once, where it is, and says that all tissue was analysed."""
    slide, centers = discs()
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    distance = np.abs(result.detections.centers[:, None] - centers[None]).max(2)
    assert len(result.detections) == len(centers)
    assert distance.min(0).max() <= 1.0
    assert result.anomaly.analysed_fraction == 1.0
    assert sum(r.n for r in result.regions) == len(result.found)


class Both(OracleDetector):
    """Takes pale discs for look-alikes."""

    __slots__ = ()
    classes = ("figure", "look-alike")  # type: ignore[assignment]

    def detect(self, tiles: np.ndarray, min_score: float) -> list[Detections]:
        found = OracleDetector.detect(self, tiles, min_score)
        return [Detections.build(each.xyxy, each.score, each.score < 0.7) for each in found]


def test_classes_that_are_not_wanted_are_in_nothing(tmp_path: Path) -> None:
    """No map, no region, no count, no text; what is kept is as it was."""
    rgb = tissue((1100, 900), discs(n=30, size_wh=(1100, 900))[1])
    pale = np.where((rgb < 100).all(2, keepdims=True), rgb // 2 + np.uint8(62), rgb)  # score 0.63 for 0.76
    slide = memory_slide(np.concatenate([rgb, pale], 1), MPP)
    detector = Both(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
    whole = ss.scan(slide, detector, config=config())
    assert np.bincount(whole.detections.label).tolist() == [30, 30]
    for names, label in (("figure", 0), (["look-alike"], 1)):
        some = ss.scan(slide, detector, out=tmp_path / str(label), config=config(detect__classes=names))
        of_class = whole.detections[whole.detections.label == label]
        np.testing.assert_array_equal(in_order(some), of_class.xyxy[np.lexsort(of_class.xyxy.T)])
        assert (some.classes, set(some.detections.label)) == ((detector.classes[label],), {0})
        assert f"30 {detector.classes[label]}s at score" in repr(some)
        assert {region.label for region in some.regions} == {detector.classes[label]}
        assert sum(region.n for region in some.regions) == len(some.found) == 30
        elsewhere = some.anomaly.score[:, 73:] if label == 0 else some.anomaly.score[:, :65]  # the halves meet at 68.75
        assert np.nanmax(elsewhere) == 0 < np.nanmax(some.anomaly.score)
    both = ss.scan(slide, detector, config=config(detect__classes=["look-alike", "figure"]))
    np.testing.assert_array_equal(in_order(both), in_order(whole))
    with pytest.raises(ConfigError, match=r"detect\.classes: expected some of figure, look-alike, got 'disc'"):
        ss.scan(slide, detector, config=config(detect__classes=["figure", "disc"]))


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


@given(
    st.sampled_from([256, 320, 416]),
    st.sampled_from([0.3, 0.5, 0.7]),
    st.floats(14, 30),
    st.tuples(st.integers(-999, 999), st.integers(-999, 999)),
)
def test_every_grid_lies_alike_on_the_strides(
    tile_px: int, mpp: float, halo_um: float, shift_px: tuple[int, int]
) -> None:
    """All tiles of all grids begin at one phase of 32 px, whatever was asked for."""
    slide = memory_slide(np.zeros((700, 900, 3), np.uint8), mpp=0.3)
    detector = OracleDetector(mpp=mpp, input_px=tile_px, object_um=20.0)
    asked = {"tissue.enabled": False, "tiling.halo_um": halo_um, "tiling.shift_px": shift_px}
    planned = prepare(slide, detector, ScanConfig.load({}, asked), allow_coarse=True).plan
    reads = [tile.read for region in planned.regions for tile in region.tiles]
    halo = planned.grid.halo_px
    assert {(read.x0 % 32, read.y0 % 32) for read in reads} == {(-halo % 32, -halo % 32)}


def test_a_picture_in_memory_may_have_the_name_of_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What happens to a file or directory of its name is none of its business, in a first scan and in the next."""
    monkeypatch.chdir(tmp_path)
    _, centers = discs(n=3, size_wh=(600, 600))
    slide = memory_slide(tissue((600, 600), centers), MPP, name="case")
    for changed in ({}, {"detect__min_score": 0.3}):
        assert len(ss.scan(slide, ORACLE, out="case", config=config(**changed), overwrite=True).found) == 3


def test_a_map_too_large_to_be_laid_is_refused_before_anything_is_scored() -> None:
    """In a line that says what will do."""
    slide, _ = discs()
    with pytest.raises(ConfigError, match=r"map\.um_per_px: expected 0\.1 µm or more.*got 0\.001"):
        ss.scan(slide, ORACLE, config=config(map__um_per_px=1e-3))


def test_the_number_of_workers_does_not_matter(tmp_path: Path) -> None:
    """One thread or three write byte-identical detections and map."""
    slide, _ = discs()
    for n in (1, 3):
        ss.scan(slide, ORACLE, out=tmp_path / str(n), config=config(), workers=n, title="case")
    one, three = (json.loads((tmp_path / n / "manifest.json").read_text())["files"] for n in ("1", "3"))
    assert one == three


class OnGpu(OracleDetector):
    """A detector whose first two calls wait for each other."""

    @property
    def runs_on(self) -> str:
        return "cuda, bf16"

    def detect(self, tiles: np.ndarray, min_score: float) -> list[ss.Detections]:
        if next(CALLS) < 2:
            MEETING.wait(timeout=60)
        return super().detect(tiles, min_score)


MEETING, CALLS = threading.Barrier(2), itertools.count()


def test_a_gpu_is_given_two_regions_at_once() -> None:
    """Or it would idle while one of them is cut into tiles; what is found is the same."""
    slide, _ = discs()
    on_gpu = OnGpu(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000)
    result = ss.scan(slide, on_gpu, config=config(), workers=3)
    assert result.provenance["profile"]["scoring"] == 2
    assert in_order(result).tolist() == in_order(ss.scan(slide, ORACLE, config=config())).tolist()


def test_a_resampled_plane_keeps_the_places() -> None:
    """A detector at another µm/px finds the same discs to within a px of its own plane."""
    slide, centers = discs(size_wh=(1500, 1200), n=30)
    coarse = OracleDetector(mpp=0.8, input_px=256, object_um=20.0, max_per_tile=1000)
    result = ss.scan(slide, coarse, config=config())
    assert len(result.detections) == len(centers)
    distance = np.abs(result.detections.centers[:, None] - centers[None]).max(2)
    assert distance.min(0).max() <= 0.8 / MPP


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


def test_a_small_hole_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """One of 8 px would be 0 % of the slide."""
    _, centers = discs()
    slide = memory_slide(tissue((2000, 1500), centers), MPP, holes=(Box(500, 400, 508, 408),))
    report(ss.scan(slide, ORACLE, config=config()))
    assert re.search(
        r"looked at   9\d\.\d\d% of .* tissue; 1 part of the slide could not be read", capsys.readouterr().out
    )


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


@pytest.mark.parametrize("wrong", ["nan", "fewer"])
def test_a_detector_of_ones_own_that_is_at_fault(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    """It is named, in a line."""

    def detect(self: object, tiles: np.ndarray, min_score: float) -> list[Detections]:
        box = np.array([[np.nan, 1.0, 2.0, 3.0]])
        return [Detections.build(box, [0.9])] * (len(tiles) if wrong == "nan" else len(tiles) - 1)

    monkeypatch.setattr(OracleDetector, "detect", detect)
    with pytest.raises(ModelError, match="expected finite boxes and scores, a table of them a tile"):
        ss.scan(discs(n=3)[0], ORACLE, config=config())


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
    few = OracleDetector(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=12)
    result = ss.scan(slide, few, out=tmp_path / "case", config=config())
    assert result.provenance["tiles"]["retiled"] > 0
    assert result.provenance["tiles"]["saturated"] == 0
    assert len(result.detections) == len(centers)


def test_a_tile_that_stays_full_is_told(tmp_path: Path) -> None:
    """Where even the smallest tiles are full the map says saturated."""
    slide, _ = discs(n=200)
    fewest = OracleDetector(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1)
    result = ss.scan(slide, fewest, out=tmp_path / "case", config=config())
    tiles = result.provenance["tiles"]
    assert 0 < tiles["saturated"] <= tiles["planned"]  # of which parts stayed full, sixteenths at the end
    assert (result.coverage == Coverage.SATURATED).any()


def test_large_objects_at_seams_are_found_once() -> None:
    """Of 160 µm at 2 µm/px, whose centres move by 8 µm from tile to tile: more than a mitotic figure's do."""
    rng = np.random.default_rng(0)
    centers = random_centers(rng, (2500, 2500), 130, apart_px=100, margin_px=60)
    slide = memory_slide(disc_image((2500, 2500), centers, 40, ground=TISSUE_GROUND), 2.0)
    detector = OracleDetector(mpp=2.0, input_px=320, object_um=168.0, jitter_px=4.0, max_per_tile=300)
    found = ss.scan(slide, detector).found.centers
    near = np.abs(found[:, None] - centers[None]).max(2) < 20
    assert near.sum(0).tolist() == [1] * len(centers)


def test_unknown_scale_and_too_small_halo_are_refused() -> None:
    """Nothing is guessed: no µm/px, no scan; a halo that cannot hold an object is a setting error."""
    slide, centers = discs(n=3)
    with pytest.raises(ResolutionError, match="--mpp"):
        ss.scan(memory_slide(tissue((600, 600), centers[:1] % 500), None), ORACLE, config=config())
    with pytest.raises(ConfigError, match="halo_um must be at least 13"):
        ss.scan(slide, ORACLE, config=config(tiling__halo_um=5.0))


def test_import_is_light() -> None:
    """`import slidescan` loads none of the heavy packages."""
    program = (
        "import sys, slidescan, slidescan.cli\n"
        "heavy = {'torch', 'dask', 'distributed', 'transformers', 'openslide', 'zarr', 'skimage', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_and_detectors_of_another_kind(tmp_path: Path) -> None:
    """A mapping or a file of settings is told of `load`; a detector may be named by a Path."""
    slide, _ = discs(n=3)
    for wrong, kind in (({"detect.threshold": 0.3}, "dict"), ("settings.yaml", "str")):
        with pytest.raises(ConfigError, match=rf"config: expected a ScanConfig, got {kind}; ScanConfig.load makes one"):
            ss.scan(slide, ORACLE, config=wrong)  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="config: expected a ScanConfig"):
            ss.scan_archive([], ORACLE, out=tmp_path, config=wrong)  # type: ignore[arg-type]
    for call in (
        lambda: ss.scan(slide, tmp_path / "model"),
        lambda: ss.detect_image(np.zeros((9, 9, 3), np.uint8), tmp_path / "model"),
        lambda: ss.scan_archive([], tmp_path / "model", out=tmp_path / "runs"),
    ):
        with pytest.raises(ModelError, match="model"):
            call()
