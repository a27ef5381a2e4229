"""The tissue mask: what it keeps, what it leaves out, and when it falls back."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from slidescan.config import ScanConfig
from slidescan.errors import ConfigError, SlideUnsupportedError
from slidescan.phantom import Phantom
from slidescan.prepare import prepare
from slidescan.slides import open_slide
from slidescan.slides.tissue import tissue_mask
from slidescan.testing import TISSUE_GROUND
from tests.discs import ORACLE

MPP = 8.0  # µm/px of the synthetic thumbnails
GREEN_PEN, BLUE_PEN, RED_PEN, BLACK_PEN = (70, 167, 151), (25, 55, 145), (205, 60, 85), (24, 20, 14)


@pytest.fixture(scope="module")
def thumbnail() -> tuple[np.ndarray, np.ndarray]:
    """A phantom at 8 µm/px and where its tissue lies."""
    slide = Phantom((1664, 1664), mpp=2.0, seed=3, n_figures=0, n_look_alikes=0)
    pixels = slide.render(0, 0, 1664, 1664).reshape(416, 4, 416, 4, 3).mean((1, 3))
    return np.rint(pixels).astype(np.uint8), slide.tissue_map(MPP)


def blank(height: int = 300, width: int = 300, level: int = 243) -> np.ndarray:
    """Glass with a scanner's noise."""
    noise = np.random.default_rng(0).normal(level, 1.3, (height, width, 3))
    return np.rint(noise.clip(0, 255)).astype(np.uint8)


def read(path: Path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def test_phantom_tissue_is_found(thumbnail: tuple[np.ndarray, np.ndarray]) -> None:
    """All tissue is in the mask, and little beyond the margin."""
    pixels, truth = thumbnail
    found = tissue_mask(pixels, mpp=MPP)
    assert found.method == "tissue"
    assert found.note == ""
    assert found.fraction == pytest.approx(found.mask.mean())
    assert found.mask[truth].mean() > 0.995
    assert tissue_mask(pixels, mpp=MPP, margin_um=0).mask[~truth].mean() < 0.05


@pytest.mark.parametrize("strength", [0.12, 0.3, 2.0])
def test_faint_and_dark_stain(thumbnail: tuple[np.ndarray, np.ndarray], strength: float) -> None:
    """Stain an eighth as strong as usual is still found, noise and all."""
    pixels, truth = thumbnail
    stained = 243 * (np.maximum(pixels, 1) / 243) ** strength
    noisy = stained + np.random.default_rng(1).normal(0, 1.5, stained.shape)
    found = tissue_mask(np.rint(noisy.clip(0, 255)).astype(np.uint8), mpp=MPP)
    assert found.mask[truth].mean() > 0.98
    assert found.fraction < truth.mean() + 0.15


@pytest.mark.parametrize("glass", [(0.97, 0.95, 0.9), (0.85, 0.85, 0.85), (0.93, 0.97, 0.95)])
def test_tinted_glass(thumbnail: tuple[np.ndarray, np.ndarray], glass: tuple[float, float, float]) -> None:
    """Yellow, grey or greenish illumination is no tissue."""
    pixels, truth = thumbnail
    found = tissue_mask((pixels * np.array(glass)).astype(np.uint8), mpp=MPP)
    assert found.mask[truth].mean() > 0.99
    assert found.fraction < truth.mean() + 0.15


def test_jpeg_noise_dust_and_shadow_are_no_tissue(thumbnail: tuple[np.ndarray, np.ndarray], tmp_path: Path) -> None:
    """Heavy compression, grey specks and a cover-slip shadow add nothing."""
    pixels, truth = thumbnail
    dirty = pixels.copy()
    far = ~tissue_mask(pixels, mpp=MPP, margin_um=300).mask
    specks = np.argwhere(far)[::97]
    dirty[specks[:, 0], specks[:, 1]] = 90
    dirty[:, :25] = (dirty[:, :25] * 0.9).astype(np.uint8)
    Image.fromarray(dirty).save(tmp_path / "dirty.jpg", quality=40)
    found = tissue_mask(read(tmp_path / "dirty.jpg"), mpp=MPP)
    assert found.mask[truth].mean() > 0.99
    assert found.mask[far].mean() < 0.02


@pytest.mark.parametrize("ink", [GREEN_PEN, BLUE_PEN, RED_PEN, BLACK_PEN])
def test_pen_on_glass_goes_and_tissue_under_it_stays(ink: tuple[int, int, int]) -> None:
    """A stroke far from tissue is left out; where it crosses tissue the tissue is kept."""
    slide = blank(400, 500)
    slide[150:300, 40:240] = TISSUE_GROUND
    slide[20:380, 400:425] = ink
    slide[200:215, 20:260] = ink
    found = tissue_mask(slide, mpp=MPP)
    assert found.method == "tissue"
    assert found.mask[150:300, 40:240].all()
    assert found.mask[20:380, 400:425].mean() < 0.02
    stroke_mm2 = 360 * 25 * (MPP / 1000) ** 2
    said = re.fullmatch(r"(\S+) mm² have the colour of pen and are left out", found.note)
    assert said is not None
    assert stroke_mm2 < float(said[1]) < 1.3 * stroke_mm2  # its rim is, too
    slide[20:380, 400:425] = slide[0, 0]
    assert tissue_mask(slide, mpp=MPP).note == ""  # all ink left is kept


def test_red_tissue_is_not_mistaken_for_red_pen() -> None:
    """A slide stained as red as red ink is tissue all the same."""
    slide = blank()
    slide[60:240, 60:240] = (205, 60, 85)
    assert tissue_mask(slide, mpp=MPP).mask[60:240, 60:240].all()


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("pale", [(242, 225, 236), (243, 232, 240), (228, 232, 242)])
def test_pale_tissue_on_glass_that_is_pure_white(pale: tuple[int, int, int], beside: bool) -> None:
    """A scanner that balances its white so leaves tissue the brightest that is not white: it is not the glass."""
    pixels = np.full((300, 500, 3), 255.0)
    pixels[60:240, 60:240] = np.array(pale) + np.random.default_rng(0).normal(size=(180, 180, 1)) * 2
    if beside:
        pixels[100:200, 320:420] = (190, 110, 160)
    found = tissue_mask(np.rint(pixels.clip(0, 255)).astype(np.uint8), mpp=MPP, margin_um=0).mask
    assert found[60:240, 60:240].mean() > 0.99
    assert found[:, 430:].mean() == 0.0


@pytest.mark.parametrize("colour", [(50, 75, 190), (60, 140, 150), (50, 38, 32)])
def test_a_fragment_of_another_colour_is_no_pen(colour: tuple[int, int, int]) -> None:
    """Collagen of a trichrome, mucin in alcian blue, a melanoma: no stroke is 4 mm wide. One of 1 mm is one."""
    rng = np.random.default_rng(0)
    pixels = blank(700, 1400).astype(float)
    pixels[100:600, 100:600] = (215, 150, 190) + rng.normal(size=(500, 500, 1)) * 8
    pixels[100:600, 700:1200] = np.array(colour) + rng.normal(size=(500, 500, 1)) * 8
    pixels[50:650, 1275:1385] = BLUE_PEN
    found = tissue_mask(np.rint(pixels.clip(0, 255)).astype(np.uint8), mpp=MPP, margin_um=0).mask
    assert found[110:590, 710:1190].mean() > 0.95
    assert found[:, 1265:].mean() < 0.05


@pytest.mark.parametrize("ground", [(3, 3, 3), (20, 25, 30), (0, 0, 40)])
def test_a_dark_ground_need_not_be_black(ground: tuple[int, int, int]) -> None:
    """Of nuclei that shine on it no tissue can be told."""
    pixels = np.empty((300, 300, 3), np.uint8)
    pixels[...] = ground
    pixels[50:200, 50:200] = (20, 40, 200)
    assert tissue_mask(pixels, mpp=MPP).is_fluorescent


def test_brown_stain_is_tissue() -> None:
    """Immunostained tissue, brown and pale blue, is found."""
    slide = blank()
    slide[60:150, 60:240] = (150, 105, 70)
    slide[150:240, 60:240] = (190, 198, 220)
    assert tissue_mask(slide, mpp=MPP).mask[60:240, 60:240].all()


def test_black_padding_is_left_out(thumbnail: tuple[np.ndarray, np.ndarray]) -> None:
    """Areas the scanner never saw count for nothing, also beside tissue."""
    pixels, truth = thumbnail
    padded = pixels.copy()
    padded[:, :120] = 0
    padded[330:] = 0
    seen = truth.copy()
    seen[:, :120] = seen[330:] = False
    found = tissue_mask(padded, mpp=MPP)
    assert found.mask[seen].mean() > 0.99
    assert found.mask[:, :100].mean() == 0
    assert found.mask[350:].mean() == 0


@pytest.mark.parametrize("level", [255, 243, 225])
def test_empty_slide(level: int) -> None:
    """An empty slide has an empty mask and says so."""
    found = tissue_mask(blank(level=level), mpp=MPP)
    assert (found.method, found.fraction, found.note) == ("empty", 0.0, "no tissue")
    assert not found.mask.any()


def test_all_tissue_is_all_kept() -> None:
    """A crop without glass is kept whole, and the note says what that may mean."""
    crop = Phantom((1024, 1024), seed=5, tissue=1.0).render(0, 0, 1024, 1024)
    found = tissue_mask(crop, mpp=0.25)
    assert found.fraction > 0.99
    assert "crop" in found.note


def test_what_cannot_be_told_is_kept() -> None:
    """Unstained grey tissue and fluorescence fall back to everything that is not blank, and say so."""
    grey = blank()
    grey[60:240, 60:240] = 190
    found = tissue_mask(grey, mpp=MPP)
    assert found.method == "not-blank"
    assert "not blank" in found.note
    assert found.mask[60:240, 60:240].all()
    assert found.fraction < 0.5
    dark = np.zeros((300, 300, 3), np.uint8)
    dark[100:200, 100:200, 2] = 180
    found = tissue_mask(dark, mpp=MPP)
    assert found.is_fluorescent
    dark[100:200, 100:200] = 90  # one channel, shown in grey
    assert tissue_mask(dark, mpp=MPP).is_fluorescent
    dark[100:200, 100:200] = (225, 160, 200)  # tissue on black padding
    dark[120:140, 120:140] = (80, 40, 110)
    assert not tissue_mask(dark, mpp=MPP).is_fluorescent
    assert found.method == "not-blank"
    assert found.mask[100:200, 100:200].all()
    assert found.fraction < 0.3


def test_small_bits_and_holes() -> None:
    """Bits and holes are judged by their area in µm²."""
    slide = blank(400, 400)
    slide[50:350, 50:350] = TISSUE_GROUND
    slide[100:130, 100:130] = 243  # 0.058 mm²: a lumen
    slide[200:300, 200:300] = 243  # 0.64 mm²: glass
    slide[20:24, 20:24] = TISSUE_GROUND  # 1024 µm²: dirt
    found = tissue_mask(slide, mpp=MPP, margin_um=0)
    assert found.mask[100:130, 100:130].all()
    assert not found.mask[210:290, 210:290].any()
    assert not found.mask[15:30, 15:30].any()


@settings(max_examples=25)
@given(st.tuples(*[st.integers(0, 60)] * 4), st.sampled_from([243, 255]))
def test_white_margin_changes_nothing_inside(
    thumbnail: tuple[np.ndarray, np.ndarray], sides: tuple[int, int, int, int], level: int
) -> None:
    """More glass around a slide leaves its mask as it was, but for a band along the old edge."""
    pixels, _ = thumbnail
    top, bottom, left, right = sides
    wide = np.pad(pixels, ((top, bottom), (left, right), (0, 0)), constant_values=level)
    inner = tissue_mask(wide, mpp=MPP).mask[top : top + 416, left : left + 416]
    before = tissue_mask(pixels, mpp=MPP).mask
    assert (inner != before)[16:-16, 16:-16].mean() < 1e-3


def test_resolution_hardly_matters(thumbnail: tuple[np.ndarray, np.ndarray]) -> None:
    """The same slide at half the resolution has the same mask within its margin."""
    pixels, _ = thumbnail
    fine = tissue_mask(pixels, mpp=MPP)
    coarse = tissue_mask(np.rint(pixels.reshape(208, 2, 208, 2, 3).mean((1, 3))).astype(np.uint8), mpp=2 * MPP)
    assert abs(fine.fraction - coarse.fraction) < 0.03
    huge = tissue_mask(np.repeat(np.repeat(pixels, 7, 0), 7, 1), mpp=MPP / 7)
    assert huge.mask.shape == (2912, 2912)
    assert abs(fine.fraction - huge.fraction) < 0.01


@pytest.mark.parametrize("bad", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3)), np.zeros((0, 4, 3), np.uint8)])
def test_refuses_what_is_no_image(bad: np.ndarray) -> None:
    """Wrong shapes, types and µm/px are refused in one line."""
    with pytest.raises(ConfigError, match="tissue_mask rgb"):
        tissue_mask(bad, mpp=MPP)
    with pytest.raises(ConfigError, match="tissue_mask mpp"):
        tissue_mask(blank(8, 8), mpp=0.0)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "mpp", "kept"),
    # mpp is a guess from the width of the tissue; `kept` allows for ink that touches tissue and so must stay.
    [
        ("pen__1k_version__pen_green", 30.0, 0.3),
        ("models__pen_markings_he__pen_green", 100.0, 0.3),
        ("pen__1k_version__pen_black", 8.0, 0.1),
        ("pen__1k_version__pen_red", 30.0, 0.7),
        ("models__pen_markings_he__pen_red", 60.0, 0.65),
        ("models__coverslip_edge_ihc__coverslip_edge", 20.0, 0.3),
    ],
)
def test_real_pen_and_cover_slip(shared: Path, name: str, mpp: float, kept: float) -> None:
    """Of hand-marked pen and cover-slip edges little is kept."""
    folder = shared / "data" / "histoqc"
    found = tissue_mask(read(folder / f"{name}.png"), mpp=mpp)
    marked = np.array(Image.open(folder / f"{name}_mask.png").convert("L")) > 0
    assert found.mask[marked].mean() < kept


@pytest.mark.data
def test_real_ink_on_a_biopsy(shared: Path) -> None:
    """On an inked biopsy all clearly stained px, ink included, are kept and the glass is not."""
    pixels = read(shared / "slides" / "slide_with_ink.jpeg")
    found = tissue_mask(pixels, mpp=2.0)
    spread = pixels.max(2).astype(int) - pixels.min(2)
    assert found.mask[spread > 40].mean() > 0.995
    assert 0.3 < found.fraction < 0.5


@pytest.mark.data
def test_real_slides(shared: Path) -> None:
    """Real thumbnails: tissue is kept, glass left out, a crop is kept whole, fluorescence falls back."""
    expected = {
        "CMU-1-Small-Region.svs": (0.499, 0.5, 0.7, "tissue"),
        "TCGA-CR-7395-01A-01-TS1.svs": (1.0, 0.6, 0.8, "tissue"),
        "prostate_pyramid_badres.tiff": (0.5, 0.97, 1.0, "tissue"),
        "test3-DAPI-2-387.ndpi": (0.228, 0.1, 1.0, "not-blank"),
    }
    for name, (mpp, low, high, method) in expected.items():
        with openslide.OpenSlide(shared / "slides" / name) as slide:
            image = slide.get_thumbnail((1000, 1000)).convert("RGB")
            mpp *= slide.dimensions[0] / image.width
        pixels = np.array(image)
        found = tissue_mask(pixels, mpp=mpp)
        assert found.method == method, name
        assert found.is_fluorescent == ("DAPI" in name)
        assert low <= found.fraction <= high, name
        if method == "tissue":
            spread = pixels.max(2).astype(int) - pixels.min(2)
            assert found.mask[spread > 40].mean() > 0.995, name


@pytest.mark.data
def test_fluorescence_is_not_scanned_for_figures(shared: Path) -> None:
    """It would count as a slide on which nothing was found."""
    slide = open_slide(shared / "slides/test3-DAPI-2-387.ndpi")
    with pytest.raises(SlideUnsupportedError, match="shines on a dark ground"):
        prepare(slide, ORACLE, ScanConfig())
    whole = ScanConfig.load({}, {"tissue.enabled": False})
    assert prepare(slide, ORACLE, whole).plan.n_tiles > 10


@pytest.mark.data
def test_real_tissue_beside_a_cover_slip(shared: Path) -> None:
    """Stained tissue beside a cover-slip edge is kept, and fields that are all tissue stay whole."""
    folder = shared / "data" / "histoqc"
    pixels = read(folder / "models__coverslip_edge_he__coverslip_edge.png")
    spread = pixels.max(2).astype(int) - pixels.min(2)
    assert tissue_mask(pixels, mpp=20.0).mask[spread > 40].mean() > 0.99
    for k in (1, 2, 3, 4):
        assert tissue_mask(read(folder / f"templates__template{k}.png"), mpp=1.0).fraction > 0.99
