"""Through OpenSlide: its dead handles, its transparency and its missing guards stay inside the reader."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import openslide
import pytest
import tifffile
from PIL import Image

from slidescan.errors import SlideFormatError, SlideReadError
from slidescan.geometry import Box
from slidescan.slides import Slide, open_slide
from slidescan.slides.fingerprint import fingerprint, stamp
from slidescan.slides.open import pooled
from slidescan.slides.openslide import OpenSlideSource

# Of a MIRAX slide of 2 x 2 tiles whose index is not there.
_SLIDEDAT = """[GENERAL]
SLIDE_ID = A
IMAGENUMBER_X = 2
IMAGENUMBER_Y = 2
[HIERARCHICAL]
HIER_COUNT = 1
NONHIER_COUNT = 0
INDEXFILE = Index.dat
HIER_0_NAME = Slide zoom level
HIER_0_COUNT = 1
HIER_0_VAL_0_SECTION = LEVEL_0
[DATAFILE]
FILE_COUNT = 1
FILE_0 = Data0000.dat
[LEVEL_0]
OVERLAP_X = 0
OVERLAP_Y = 0
MICROMETER_PER_PIXEL_X = 0.25
MICROMETER_PER_PIXEL_Y = 0.25
IMAGE_FORMAT = JPEG
IMAGE_FILL_COLOR_BGR = 16777215
DIGITIZER_WIDTH = 64
DIGITIZER_HEIGHT = 64
IMAGE_CONCAT_FACTOR = 0
"""


class _Fake:
    """An OpenSlide handle of a 1000 × 800 px slide with a dead place, transparency and odd properties."""

    bad_l0 = Box(500, 300, 510, 310)
    opened = 0

    def __init__(self, path: str, said: dict[str, str]) -> None:
        type(self).opened += 1
        self.properties = {"openslide.vendor": "mirax", **said}
        self.level_dimensions = ((1000, 800),)
        self.level_downsamples = (1.0,)
        self.color_profile = None
        self._dead = False

    def set_cache(self, cache: object) -> None:
        pass

    def read_region(self, where: tuple[int, int], level: int, size: tuple[int, int]) -> Image.Image:
        (x, y), (width, height) = where, size
        if self._dead or Box(x, y, x + width, y + height).intersects(self.bad_l0):
            self._dead = True
            raise openslide.OpenSlideError("JPEG is bad")
        rgba = np.full((height, width, 4), (10, 20, 30, 255), np.uint8)
        rgba[:, : max(0, 100 - x)] = 0  # left of column 100 nothing was scanned
        return Image.fromarray(rgba)


def mirax(path: Path) -> Path:
    """Write what a MIRAX slide looks like from outside: the file that is opened is a JPEG, a preview of the slide."""
    Image.new("RGB", (60, 40), (200, 180, 190)).save(path, format="JPEG")
    path.with_suffix("").mkdir()
    (path.with_suffix("") / "Slidedat.ini").write_text("[GENERAL]\n")
    return path


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Slide:
    """A slide over `_Fake`, with a background colour, bounds and storage tiles of 128 px."""
    said = {
        "openslide.background-color": "0A0B0C",
        "openslide.mpp-x": "0.25",
        "openslide.mpp-y": "0.26",
        "openslide.level[0].tile-width": "128",
        "openslide.level[0].tile-height": "128",
        **{f"openslide.bounds-{side}": value for side, value in zip("xy", ("100", "0"), strict=True)},
        "openslide.bounds-width": "900",
        "openslide.bounds-height": "800",
    }
    monkeypatch.setattr(openslide, "OpenSlide", lambda path: _Fake(path, said))
    return open_slide(mirax(tmp_path / "case.mrxs"))


def test_facts_are_taken_over(fake: Slide) -> None:
    """Scale, bounds and vendor come through; two scales close together become their geometric mean."""
    assert (fake.backend, fake.vendor, fake.mpp_source) == ("openslide", "mirax", "openslide")
    assert fake.mpp == pytest.approx((0.25 * 0.26) ** 0.5)
    assert fake.bounds_l0 == Box(100, 0, 1000, 800)
    assert fake.levels[0].tile_wh == (128, 128)


def test_not_scanned_is_background_and_outside_is_white(fake: Slide) -> None:
    """Transparent px take the slide's background colour, never black."""
    row = fake.read_level(0, -5, 0, 200, 1).rgb[0]
    assert (row[:5] == 255).all()
    assert (row[5:105] == (10, 11, 12)).all()
    assert (row[105:] == (10, 20, 30)).all()


def test_a_read_error_costs_its_tiles(fake: Slide) -> None:
    """The block is bisected along the storage grid: the tiles that hold the dead place are holes, the rest is read."""
    pixels = fake.read_level(0, 130, 10, 800, 700)
    assert pixels.holes == (Box(384, 256, 512, 384),)
    assert (pixels.rgb[246:374, 254:382] == 255).all()
    pixels.rgb[246:374, 254:382] = (10, 20, 30)
    assert (pixels.rgb == (10, 20, 30)).all()


def test_threads_are_not_hurt_by_each_others_errors(fake: Slide) -> None:
    """A thread in a good place reads it all, although another keeps killing the handle."""
    holes: list[int] = []

    def read(x: int, expected: int) -> None:
        for _ in range(20):
            found = len(fake.read_level(0, x, 200, 150, 200).holes)
            if found != expected:
                holes.append(found)

    threads = [threading.Thread(target=read, args=job) for job in ((450, 1), (700, 0), (450, 1), (800, 0))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert holes == []


def test_a_file_that_vanishes_is_an_error(fake: Slide, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the file cannot be opened again the slide is unreadable, which is no hole."""

    def gone(path: str) -> _Fake:
        raise openslide.OpenSlideError("Unsupported or missing image file")

    monkeypatch.setattr(openslide, "OpenSlide", gone)
    with pytest.raises(SlideReadError, match="can no longer be opened"):
        fake.read_level(0, 400, 200, 300, 300)


def test_names_of_its_other_files_are_not_told(tmp_path: Path) -> None:
    """A slide is called by its id in an archive; its parts are named as it is, after the patient."""
    path = tmp_path / "Doe Jane_1970.vms"
    parts = {"ImageFile": ".jpg", "MapFile": "_map2.jpg", "OptimisationFile": ".opt", "MacroImage": "_macro.jpg"}
    said = ["NoLayers=1", "NoJpegColumns=1", "NoJpegRows=1", "SourceLens=40", "PhysicalWidth=100", "PhysicalHeight=100"]
    said += [f"{key}={path.stem}{end}" for key, end in parts.items()]
    path.write_text("\n".join(["[Virtual Microscope Specimen]", *said, ""]))
    with pytest.raises(SlideFormatError, match=r"Couldn't open a \.jpg file of it: No such file") as refused:
        open_slide(path)
    assert "1970" not in str(refused.value).removeprefix(path.name)


@pytest.mark.parametrize("name", ["case.tiff", "case.mrxs"])
def test_a_disk_that_fails_is_no_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What could not be read may be there another time: an archive tries it again."""
    from slidescan.slides import ifd

    path = tmp_path / name
    if name == "case.mrxs":
        mirax(path)
    else:
        tifffile.imwrite(path, np.zeros((64, 64, 3), np.uint8), tile=(64, 64), photometric="rgb")

    whole = Path.open

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fail_later(path: Path, *arguments: Any) -> Any:  # once OpenSlide has given up
        if sys._getframe(1).f_globals["__name__"] == OpenSlideSource.__module__:
            fail()
        return whole(path, *arguments)

    monkeypatch.setattr(ifd.tifffile, "TiffFile", fail)
    monkeypatch.setattr(Path, "open", fail_later)
    with pytest.raises(SlideReadError, match=f"{name}: .*cannot be read .Input/output error"):
        open_slide(path)


def test_unsafe_tiles_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """OpenSlide has no guard of its own: a giant tile is refused before the first read."""
    said = {"openslide.level[0].tile-width": "20000", "openslide.level[0].tile-height": "20000"}
    monkeypatch.setattr(openslide, "OpenSlide", lambda path: _Fake(path, said))
    path = mirax(tmp_path / "a.mrxs")
    with pytest.raises(SlideFormatError, match="found 20000 × 20000 px"):
        OpenSlideSource(path)


@pytest.mark.parametrize(("mpp", "known"), [("0", False), ("-0.499", False), ("inf", False), ("499000", False)])
def test_implausible_scale_is_not_passed_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, mpp: str, known: bool
) -> None:
    """OpenSlide hands nonsense through; here it becomes a problem in words."""
    said = {"openslide.mpp-x": mpp, "openslide.mpp-y": mpp}
    monkeypatch.setattr(openslide, "OpenSlide", lambda path: _Fake(path, said))
    path = mirax(tmp_path / "a.mrxs")
    slide = open_slide(path)
    assert (slide.mpp is not None) is known
    assert "not plausible" in str(slide.mpp_problem)


def test_a_mirax_slide_is_never_its_preview(tmp_path: Path) -> None:
    """It goes to OpenSlide, whose words name no folder; without its own folder it is refused."""
    path = mirax(tmp_path / "DOE_JANE.mrxs")
    (path.with_suffix("") / "Slidedat.ini").write_text(_SLIDEDAT)
    with pytest.raises(SlideFormatError, match="OpenSlide cannot open it") as refused:
        open_slide(path)
    assert "Index.dat" in str(refused.value)
    assert str(tmp_path) not in str(refused.value)
    shutil.rmtree(path.with_suffix(""))
    with pytest.raises(SlideFormatError, match="copy both"):
        open_slide(path, mpp=0.25)


@pytest.mark.parametrize("kind", ["mrxs", "vms", "zarr"])
def test_what_changes_beside_the_named_file_is_a_change(tmp_path: Path, kind: str) -> None:
    """Of MIRAX, VMS and Zarr the pixels lie elsewhere; a file of another slide beside it is none of its own."""
    path = tmp_path / f"case.{kind}"
    pixels = {"mrxs": "case/Data0000.dat", "vms": "map.jpg", "zarr": "case.zarr/0/zarr.json"}[kind]
    (tmp_path / pixels).parent.mkdir(parents=True, exist_ok=True)
    if kind == "vms":
        path.write_text("[Virtual Microscope Specimen]\nMapFile=map.jpg\n")
    elif kind == "mrxs":
        path.write_bytes(b"preview")
    before, digest = stamp(path), fingerprint(path, (8, 8))
    (tmp_path / "other.jpg").write_bytes(b"of another slide")
    assert (stamp(path), fingerprint(path, (8, 8))) == (before, digest)
    (tmp_path / pixels).write_bytes(b"arrives late")
    assert stamp(path) != before
    assert fingerprint(path, (8, 8)) != digest


def test_a_process_that_had_it_open_sees_what_changed_beside_it(
    tmp_path: Path, write_ngff: Callable[..., Path]
) -> None:
    """An array is written anew within a Zarr: a slide that travels to a worker is not the worker's old one."""
    path = write_ngff(tmp_path / "a.zarr", [np.full((200, 200, 3), 100, np.uint8)], "0.5")
    pooled(path).read_level(0, 0, 0, 9, 9)
    shutil.rmtree(path / "0")
    other = write_ngff(tmp_path / "b.zarr", [np.full((200, 200, 3), 200, np.uint8)], "0.5")
    (other / "0").rename(path / "0")
    assert pickle.loads(pickle.dumps(open_slide(path))).read_level(0, 0, 0, 9, 9).rgb.mean() == 200


def test_a_stamp_asks_for_no_file_elsewhere(tmp_path: Path) -> None:
    """A VMS slide names its files; what lies in another folder is not its own."""
    (tmp_path / "a.vms").write_text("[Virtual Microscope Specimen]\nMapFile=map.jpg\nImageFile=../b/x.jpg\n")
    for name in ("map.jpg", "b/x.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert stamp(tmp_path / "a.vms")[2] == 1


def test_the_fingerprint_of_mirax_knows_no_name(tmp_path: Path) -> None:
    """Renamed, file and folder, it is the same slide."""
    first, second = mirax(tmp_path / "a.mrxs"), mirax(tmp_path / "b.mrxs")
    assert fingerprint(first, (8, 8)) == fingerprint(second, (8, 8))


def test_real_dicom(shared: Path) -> None:
    """A DICOM slide opens by any of its files, at the scale of the SVS it was made from."""
    paths = sorted((shared / "slides/dicom_cmu_napari").glob("*.dcm"))
    slides = [open_slide(path) for path in paths]
    assert {(s.vendor, s.mpp, s.mpp_source, s.size_wh) for s in slides} == {("dicom", 0.499, "dicom", (2220, 2967))}
    svs = open_slide(shared / "slides/CMU-1-Small-Region.svs").read_level(0, 300, 400, 900, 800).rgb
    again = slides[0].read_level(0, 300, 400, 900, 800)
    assert again.holes == ()
    assert np.abs(again.rgb.astype(int) - svs).mean() < 5
    with pytest.raises(SlideFormatError, match=r"name one \.dcm file"):
        open_slide(paths[0].parent)


def test_a_dicom_slide_is_all_its_files(shared: Path, tmp_path: Path) -> None:
    """Whichever is named, it is one slide, and a change of any of them is a change."""
    for file in (shared / "slides/dicom_cmu_napari").glob("*.dcm"):
        shutil.copy(file, tmp_path)
    paths = sorted(tmp_path.glob("*.dcm"))
    assert len({open_slide(path).fingerprint for path in paths}) == 1
    level = max(paths, key=lambda path: path.stat().st_size)
    other = next(path for path in paths if path != level)
    before, digest = stamp(other), open_slide(other).fingerprint
    data = bytearray(level.read_bytes())
    data[len(data) // 2] ^= 1
    level.write_bytes(data)
    assert stamp(other) != before
    assert open_slide(other).fingerprint != digest
    (tmp_path / "renamed.dcm").write_bytes(data)
    level.unlink()
    renamed = open_slide(other).fingerprint
    level.write_bytes(data)
    (tmp_path / "renamed.dcm").unlink()
    assert open_slide(other).fingerprint == renamed


def test_real_ndpi(shared: Path) -> None:
    """A fluorescence NDPI is read at every level, in and beyond its edges."""
    slide = open_slide(shared / "slides/test3-DAPI-2-387.ndpi")
    plane = slide.plane(0.5)
    assert plane.mpp == 0.5
    pixels = slide.read(-10, -10, 300, 300, plane)
    assert (pixels.rgb[:10] == 255).all()
    assert pixels.rgb[10:, 10:].max() < 255
    assert slide.plane(0.4564) == type(plane)((1984, 2432), slide.frame.mpp * 2)


def test_one_bad_tile_of_tall_ones_is_one_hole(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 200, (512, 640, 3), np.uint8)
    path = tmp_path / "a.tiff"
    tifffile.imwrite(path, pixels, tile=(512, 128), photometric="rgb", compression="jpeg", metadata=None)
    with tifffile.TiffFile(path) as tiff:
        at = tiff.pages[0].dataoffsets[3]
    with path.open("r+b") as file:
        file.seek(at)
        file.write(bytes(200))
    block = open_slide(path, backend="openslide").read_level(0, 0, 0, 640, 512)
    assert block.holes == (Box(384, 0, 512, 512),)
