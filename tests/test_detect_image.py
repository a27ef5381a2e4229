"""One picture of any size: what a detector finds on it, whole and in tiles, and the command that prints it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import tifffile
import transformers as hf
from numpy.typing import NDArray
from PIL import Image, ImageCms, ImageOps

import slidescan as ss
from slidescan.detect import Model, load_detector
from slidescan.detections import Detections
from slidescan.errors import (
    ConfigError,
    ResolutionError,
    SlideFormatError,
    SlideNotFoundError,
    SlideReadError,
    SlideWarning,
)
from slidescan.geometry import Box
from slidescan.slides import memory_slide, open_slide
from slidescan.slides.memory import image_size
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image, random_centers
from tests.families import (
    DETECTORS,
    grounding,
    network,
    picture,
    saved,
)
from tests.test_cli import failed, slidescan

RADIUS_PX = 11
ORACLE = OracleDetector(mpp=0.5, input_px=256, object_um=13.0, max_per_tile=1000)


@pytest.fixture(scope="module")
def rt_detr(tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A small model of photographs."""
    detector = load_detector(saved(network(DETECTORS["RT-DETR"]), tmp_path_factory.mktemp("models") / "tiny"), mpp=1.0)
    assert isinstance(detector, Model)
    return detector


def scored_whole(detector: Model, image: NDArray[np.uint8]) -> Detections:
    """What a detector finds on a picture padded with white, without what lies in the padding."""
    height, width = image.shape[:2]
    padded = np.full((max(128, -height % 32 + height), max(128, -width % 32 + width), 3), 255, np.uint8)
    padded[:height, :width] = image
    found = detector.detect(padded[None], 1e-3)[0]
    found = found[(found.centers < [width, height]).all(1)]
    return Detections(np.minimum(found.xyxy, [width, height, width, height]), found.score, found.label)


def assert_equal(found: Detections, expected: Detections) -> None:
    """The same rows, bit for bit."""
    np.testing.assert_array_equal(found.xyxy, expected.xyxy)
    np.testing.assert_array_equal(found.score, expected.score)
    np.testing.assert_array_equal(found.label, expected.label)


@pytest.mark.parametrize(("height", "width"), [(64, 96), (150, 131), (1, 128)])
def test_a_picture_that_fits_a_tile_is_scored_whole(rt_detr: Model, height: int, width: int) -> None:
    """It gives what the detector gives on it filled up to a multiple of 32 px, at least 128, and nothing beyond."""
    image = picture(height, width)
    found = ss.detect_image(image, rt_detr, min_score=1e-3, tile_px=160)
    assert_equal(found, scored_whole(rt_detr, image))
    assert_equal(found, ss.detect_image(image, rt_detr, min_score=1e-3))


def test_a_picture_with_fewer_places_than_queries() -> None:
    """The smallest pictures are looked at like others: the bundled detector has a hundred queries."""
    assert len(ss.detect_image(np.full((1, 40, 3), 240, np.uint8), ss.load_detector("mitosis"))) == 0


def discs(size_wh: tuple[int, int], n: int) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """A picture of discs, and their centres."""
    rng = np.random.default_rng(0)
    centers = random_centers(rng, size_wh, n, apart_px=3 * RADIUS_PX, margin_px=RADIUS_PX + 1)
    return disc_image(size_wh, centers, RADIUS_PX), centers


def assert_each_once(found: Detections, centers: NDArray[np.float64], within_px: float = 1.0) -> None:
    """Every disc has one box and every box is a disc's."""
    assert len(found) == len(centers)
    assert np.abs(found.centers[:, None] - centers).max(2).min(0).max() <= within_px
    assert (np.diff(found.score) <= 0).all()


@pytest.mark.parametrize("tile_px", [None, 128, 160, 416, 800])
def test_each_disc_of_a_large_picture_is_found_once(tile_px: int | None) -> None:
    """Whatever the tile: none is lost or doubled on a seam."""
    image, centers = discs((700, 530), 50)
    assert_each_once(ss.detect_image(image, ORACLE, tile_px=tile_px), centers)


@dataclass(frozen=True)
class Whole(OracleDetector):
    """Tells a disc's whole width though the picture ends within it, as far as its window reaches."""

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        found = super().detect(tiles, min_score)
        most, edge = self.object_um, tiles.shape[2]
        whole = [np.column_stack([d.xyxy[:, :2], np.minimum(d.xyxy[:, 0] + most, edge), d.xyxy[:, 3]]) for d in found]
        return [replace(d, xyxy=xyxy) for d, xyxy in zip(found, whole, strict=True)]


@pytest.mark.parametrize("beyond_px", [0.5, 1.5])
def test_a_disc_on_a_seam_and_on_the_edge_is_found_once(beyond_px: float) -> None:
    """Where its box would be cut to what is on the picture, its centre is not moved away from the seam."""
    detector = Whole(object_um=80, input_px=256, halo_um=None)
    image = disc_image((260, 300), [(256 + beyond_px, 60.5)], 40, ground=TISSUE_GROUND)
    found = ss.detect_image(image, detector)
    assert len(found) == 1
    assert found.xyxy[0, 2] == 260


class OfPhotos(OracleDetector):
    """Names no µm/px: objects may have any size."""

    @property
    def knows_px_only(self) -> bool:
        return True


class _Unsure(OfPhotos):
    """Its edges are off by 3 px: what a window cuts does not reach to its edge."""

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        found = super().detect(tiles, min_score)
        return [replace(each, xyxy=each.xyxy + np.array([3, 3, -3, -3])) for each in found]


@pytest.mark.parametrize("tile_px", [128, 256, 416])
def test_objects_larger_than_a_tile_are_found_too(tile_px: int) -> None:
    """Once each, the largest also on a picture of several of its sizes; what a tile sees is not seen twice."""
    centers = [(60, 70), (900, 40), (850, 700)]
    image = disc_image((1000, 800), centers, RADIUS_PX)
    large = disc_image((1000, 800), [(450, 400)], 290)
    middle = disc_image((1000, 800), [(880, 350)], 60)
    image = np.minimum(np.minimum(image, large), middle)
    found = ss.detect_image(image, OfPhotos(mpp=1.0, input_px=256, object_um=13.0), tile_px=tile_px)
    assert_each_once(found, np.array([*centers, (450, 400), (880, 350)]), within_px=8)
    unsure = OfPhotos(mpp=1.0, input_px=256, object_um=13.0, jitter_px=6)
    cut = _Unsure(mpp=1.0, input_px=256, object_um=13.0)
    assert_each_once(ss.detect_image(image, unsure, tile_px=256), np.array([*centers, (450, 400), (880, 350)]), 28)
    assert_each_once(ss.detect_image(image, cut, tile_px=256), np.array([*centers, (450, 400), (880, 350)]), 28)
    assert len(ss.detect_image(large, ORACLE, tile_px=tile_px)) == 0  # of a detector of cells it is none


def test_a_tile_little_larger_than_the_objects_serves() -> None:
    """The halo holds half the largest object, where a share of the tile would not."""
    image = disc_image((400, 300), [(64, 64), (250, 150), (330, 240)], 45)
    large = OracleDetector(mpp=0.5, input_px=256, object_um=46.0)
    assert_each_once(ss.detect_image(image, large, tile_px=128), np.array([(64, 64), (250, 150), (330, 240)]))


def test_a_detector_that_names_its_margin_takes_the_path_of_a_slide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture then costs no more tiles than a scan of it, and gives the same boxes."""
    image, centers = discs((700, 530), 50)
    known = replace(ORACLE, halo_um=8.0)
    results: list[ss.ScanResult] = []
    monkeypatch.setattr("slidescan.picture.scan", lambda *a, **k: (results.append(ss.scan(*a, **k)), results[-1])[1])
    found = ss.detect_image(image, known)
    settings = ss.ScanConfig.load({}, {"tissue.enabled": False, "detect.min_score": 0.5})
    scanned = ss.scan(memory_slide(image, 0.5), known, config=settings)
    assert_equal(found, scanned.detections)
    assert_each_once(found, centers)
    ss.detect_image(image, ORACLE)
    tiles = [result.provenance["tiles"]["planned"] for result in (*results, scanned)]
    assert tiles[0] == tiles[2] < tiles[1]


def test_a_full_picture_says_so() -> None:
    """Where tiles hold more than the detector can report, there is a warning that names the remedy."""
    image, _ = discs((700, 530), 50)
    few = OracleDetector(mpp=0.5, input_px=256, object_um=13.0, max_per_tile=1)
    with pytest.warns(SlideWarning, match=r"tiles hold more than the detector can report; a smaller tile_px"):
        ss.detect_image(image, few)
    ss.detect_image(image, few, min_score=few.threshold / 2)
    with pytest.warns(SlideWarning, match="1 tiles hold more"):
        ss.detect_image(image, few, tile_px=1024)


def test_a_margin_too_wide_for_the_tile_is_cut() -> None:
    """The smallest tile serves, whatever margin the detector would like."""
    image, centers = discs((700, 530), 50)
    assert_each_once(ss.detect_image(image, replace(ORACLE, object_um=24.0, halo_um=60.0), tile_px=128), centers)


@pytest.mark.parametrize("tile_px", [160, 512])
def test_a_path_an_array_and_a_slide_are_one_picture(tmp_path: Path, tile_px: int) -> None:
    """Each gives equal results, whole and in tiles."""
    image, centers = discs((400, 300), 20)
    Image.fromarray(image).save(tmp_path / "picture.png")
    found = ss.detect_image(image, ORACLE, tile_px=tile_px)
    assert_each_once(found, centers)
    for same in (tmp_path / "picture.png", str(tmp_path / "picture.png"), memory_slide(image, ORACLE.mpp)):
        assert_equal(ss.detect_image(same, ORACLE, tile_px=tile_px), found)


@pytest.mark.parametrize("tile_px", [160, 1024])
@pytest.mark.parametrize("mpp", [0.3, 0.8])
def test_boxes_are_in_px_of_the_picture(mpp: float, tile_px: int) -> None:
    """A picture of other µm/px is resampled for the detector; its boxes come back, and none leaves the picture."""
    image, centers = discs((401, 307), 20)
    found = ss.detect_image(image, ORACLE, mpp=mpp, tile_px=tile_px)
    assert_each_once(found, centers, within_px=max(1.0, ORACLE.mpp / mpp))
    np.testing.assert_allclose(found.xyxy[:, 2:] - found.xyxy[:, :2], 2 * RADIUS_PX, atol=3 * ORACLE.mpp / mpp)
    cut = disc_image((401, 307), [(398, 304)], RADIUS_PX)
    assert (ss.detect_image(cut, ORACLE, mpp=mpp, tile_px=tile_px).xyxy[:, 2:] == [401, 307]).all()


def test_a_slide_file_keeps_its_own_scale(tmp_path: Path) -> None:
    """The µm/px that a file names are used; a plain picture, which names none, is read as it is."""
    image, centers = discs((400, 300), 12)
    tifffile.imwrite(tmp_path / "scaled.tiff", image, photometric="rgb", resolution=(1e4 / 0.4,) * 2, resolutionunit=3)
    assert open_slide(tmp_path / "scaled.tiff").mpp == pytest.approx(0.4)
    found = ss.detect_image(tmp_path / "scaled.tiff", ORACLE)
    assert_each_once(found, centers)
    assert_equal(found, ss.detect_image(image, ORACLE, mpp=0.4))


def test_a_slide_file_without_a_scale_is_no_plain_picture(tmp_path: Path) -> None:
    """What it says of its scale cannot be true, or it says nothing: nobody guesses."""
    image, centers = discs((400, 300), 12)
    tifffile.imwrite(tmp_path / "dpi.tiff", image, photometric="rgb", resolution=(72, 72), resolutionunit=2)
    with pytest.raises(ResolutionError, match="--mpp"):
        ss.detect_image(tmp_path / "dpi.tiff", ORACLE)
    assert_each_once(ss.detect_image(tmp_path / "dpi.tiff", ORACLE, mpp=ORACLE.mpp), centers)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_boxes_are_on_the_picture_as_it_is_shown(tmp_path: Path, orientation: int, suffix: str) -> None:
    """A camera's EXIF data say which way up."""
    image, _ = discs((400, 300), 12)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(image).save(path, exif=exif, quality=100, subsampling=0)
    with Image.open(path) as picture:
        shown = np.asarray(ImageOps.exif_transpose(picture))
    assert image_size(path) == open_slide(path).size_wh == shown.shape[1::-1]
    assert_equal(ss.detect_image(path, ORACLE), ss.detect_image(shown, ORACLE))


def test_a_model_of_photographs_reads_a_picture_as_it_is(rt_detr: Model, tmp_path: Path) -> None:
    """Whatever µm/px the file names: the model names none."""
    image = np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tiff", image, photometric="rgb", resolution=(1e4 / 0.25,) * 2, resolutionunit=3)
    found = ss.detect_image(tmp_path / "a.tiff", str(rt_detr.path), min_score=1e-3)
    assert_equal(found, scored_whole(rt_detr, image))
    coarser = ss.detect_image(tmp_path / "a.tiff", rt_detr, min_score=1e-3)
    assert not np.array_equal(coarser.xyxy, found.xyxy)


@pytest.mark.parametrize("tile_px", [128, 512])
def test_a_picture_with_holes_is_refused(tile_px: int) -> None:
    """Boxes alone could not say where nothing was looked for."""
    image, _ = discs((300, 200), 5)
    with pytest.raises(SlideReadError, match="cannot be decoded"):
        ss.detect_image(memory_slide(image, 0.5, holes=[Box(10, 10, 60, 60)]), ORACLE, tile_px=tile_px)


class Strict(OracleDetector):
    """Sees red only, wants sRGB and refuses a coarse slide unless asked."""

    @property
    def color(self) -> Literal["raw", "srgb"]:
        return "srgb"

    def at(self, slide_mpp: float, *, allow_coarse: bool = False) -> Strict:
        if slide_mpp > 1.25 * self.mpp and not allow_coarse:
            raise ResolutionError("too coarse")
        return self

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        return super().detect(tiles[..., :1].repeat(3, -1), min_score)


STRICT = Strict(mpp=0.5, input_px=256, object_um=13.0)


def test_a_detector_of_large_px() -> None:
    """Of 20 µm, as for whole organs: tiles of 5 mm."""
    image, centers = discs((600, 400), 20)
    coarse = OracleDetector(mpp=20.0, input_px=256, object_um=500.0)
    assert_each_once(ss.detect_image(image, coarse), centers)


@pytest.mark.parametrize("tile_px", [128, 512])
def test_a_coarse_picture_is_refused_unless_it_is_meant(tile_px: int) -> None:
    """Whole and in tiles alike: there is no finer picture to choose."""
    image, centers = discs((300, 200), 10)
    with pytest.raises(ResolutionError, match="too coarse"):
        ss.detect_image(image, STRICT, mpp=0.8, tile_px=tile_px)
    found = ss.detect_image(image, STRICT, mpp=0.8, tile_px=tile_px, allow_coarse=True)
    assert_each_once(found, centers)


@pytest.mark.parametrize("tile_px", [128, 512])
def test_a_picture_has_the_colours_the_detector_wants(tmp_path: Path, tile_px: int) -> None:
    """A profile with red and green exchanged makes red discs green, whole and in tiles."""
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = icc.replace(b"rXYZ", b"tmp!").replace(b"gXYZ", b"rXYZ").replace(b"tmp!", b"gXYZ")
    centers = np.array([(60, 50), (150, 120), (240, 160)])
    image = disc_image((300, 200), centers, RADIUS_PX, ink=(200, 40, 90))
    Image.fromarray(image).save(tmp_path / "picture.png", icc_profile=swapped)
    assert_each_once(ss.detect_image(tmp_path / "picture.png", STRICT, tile_px=tile_px), centers)
    assert len(ss.detect_image(image, STRICT, tile_px=tile_px)) == 0


@pytest.mark.parametrize(
    "options",
    [
        {"tile_px": 0},
        {"tile_px": -32},
        {"tile_px": 100},
        {"tile_px": 96},
        {"tile_px": 8224},
        {"min_score": 0.0},
        {"min_score": 1.1},
        {"min_score": float("nan")},
        {"mpp": 0.0},
        {"mpp": 100.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("side", [100, 300])
def test_an_option_out_of_range_is_refused(options: dict[str, Any], side: int) -> None:
    """Whether or not the picture fits a tile; the error begins with the option's name."""
    with pytest.raises(ConfigError, match=f"^{next(iter(options))}: expected"):
        ss.detect_image(np.zeros((side, side, 3), np.uint8), ORACLE, **options)


def test_what_is_no_picture_is_refused(tmp_path: Path) -> None:
    """Nothing there, a text, an array of floats, an open slide with two µm/px: each says what is wrong."""
    with pytest.raises(SlideNotFoundError):
        ss.detect_image(tmp_path / "none.png", ORACLE)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(SlideFormatError, match=r"text\.png"):
        ss.detect_image(tmp_path / "text.png", ORACLE)
    with pytest.raises(SlideFormatError, match="uint8"):
        ss.detect_image(np.zeros((64, 64, 3)), ORACLE)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="open slide"):
        ss.detect_image(memory_slide(picture(), 0.5), ORACLE, mpp=0.5)
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    of_px = saved(network(DETECTORS["RT-DETR"]), tmp_path / "model")
    with pytest.raises(ConfigError, match=r"a model that names no µm/px, got 0\.25"):
        ss.detect_image(tmp_path / "picture.png", of_px, mpp=0.25)
    with pytest.raises(ResolutionError, match="picture"):
        ss.detect_image(open_slide(tmp_path / "picture.png"), ORACLE)


def test_the_command_prints_a_line_a_box(rt_detr: Model, tmp_path: Path) -> None:
    """Label, score and box of each, best first, on stdout; how many on stderr; the same as in Python."""
    image = picture(150, 200)
    Image.fromarray(image).save(tmp_path / "picture.png")
    found = ss.detect_image(image, str(rt_detr.path), min_score=0.1, tile_px=128)
    assert len(found)
    arguments = ("--model", rt_detr.path, "--min-score", "0.1", "--tile-px", "128")
    done = slidescan("detect", tmp_path / "picture.png", *arguments)
    assert done.returncode == 0, done.stderr
    rows = [re.fullmatch(r"(.+): (\S+) at \[(.+)\]", line) for line in done.stdout.splitlines()]
    assert [row[1] for row in rows if row] == [rt_detr.classes[label] for label in found.label]
    np.testing.assert_allclose([float(row[2]) for row in rows if row], found.score, atol=6e-4)
    boxes = [[float(edge) for edge in row[3].split(", ")] for row in rows if row]
    np.testing.assert_allclose(boxes, found.xyxy, atol=0.06)
    assert done.stderr == f"{len(found)} found with a score of at least 0.1\n"


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["none.png", "--model", "{tiny}"], 1, "none.png"),
        (["text.png", "--model", "{tiny}"], 1, "text.png"),
        (["picture.png", "--model", "empty"], 2, "empty: expected config.json"),
        (["picture.png", "--model", "dino"], 2, "text prompt"),
        (["picture.png", "--model", "{tiny}", "--tile-px", "100"], 2, "tile_px"),
        (["picture.png", "--model", "{tiny}", "--min-score", "2"], 2, "min_score"),
    ],
    ids=["no picture", "a text", "no model", "needs a prompt", "tile", "score"],
)
def test_a_wrong_command_is_one_line(
    rt_detr: Model, tmp_path: Path, arguments: list[str], code: int, said: str
) -> None:
    """Bad input: one line that names it, the right exit code, and no traceback."""
    Image.fromarray(picture()).save(tmp_path / "picture.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    saved(grounding(hf.GroundingDinoForObjectDetection, hf.GroundingDinoConfig).model, tmp_path / "dino")
    done = slidescan("detect", *(a.replace("{tiny}", str(rt_detr.path)) for a in arguments), cwd=tmp_path)
    assert said in failed(done, code)
    assert done.stdout == ""
