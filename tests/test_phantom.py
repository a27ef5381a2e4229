"""The phantom slide, its file, and the oracle detector."""

from __future__ import annotations

import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from slidescan.detections import Detector
from slidescan.errors import ConfigError, ResultError
from slidescan.phantom import OBJECT_UM, Phantom, file, write_phantom
from slidescan.testing import INK, TISSUE_GROUND, OracleDetector, disc_image, random_centers

PLANTS = ((512.0, 512.0), (1024.0, 300.5), (100.0, 1400.0))
SLIDE = Phantom((1500, 1600), seed=1, n_figures=8, n_look_alikes=10, plant_l0=PLANTS, tissue=0.5)


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """The whole of `SLIDE`."""
    return SLIDE.render(0, 0, *SLIDE.size_wh)


@settings(max_examples=60)
@given(st.integers(-40, 1490), st.integers(-40, 1590), st.integers(1, 700), st.integers(1, 700))
def test_any_box_is_a_cut_of_the_whole(x: int, y: int, w: int, h: int) -> None:
    """A box has the pixels of the whole slide, and glass beyond the slide's edge."""
    whole = np.pad(SLIDE.render(0, 0, 1500, 1600), ((40, 800), (40, 800), (0, 0)), constant_values=243)
    assert np.array_equal(whole[y + 40 : y + 40 + h, x + 40 : x + 40 + w], SLIDE.render(x, y, w, h))


def test_pixels_do_not_depend_on_what_was_rendered_before(pixels: np.ndarray) -> None:
    """A phantom with nothing cached renders the same bytes."""
    from slidescan.phantom import bank, layout
    from slidescan.phantom import pixels as cells

    for cached in (cells.cell, layout.layout_of, bank.stain_bank):
        cached.cache_clear()
    assert np.array_equal(pixels[700:900, 600:1100], SLIDE.render(600, 700, 500, 200))


def test_truth_is_exact(pixels: np.ndarray) -> None:
    """Planted figures come first and to the px; boxes are 12.5 µm, inside the slide, and never touch."""
    truth = SLIDE.truth
    assert np.array_equal(truth.centers[:3], PLANTS)
    assert len(truth) == 11
    assert np.allclose(truth.xyxy[:, 2:] - truth.xyxy[:, :2], OBJECT_UM / SLIDE.mpp)
    scattered = truth.xyxy[3:]
    assert scattered.min() >= 0
    assert (scattered[:, 2:] <= SLIDE.size_wh).all()
    centers = np.vstack([truth.centers, SLIDE.look_alikes.centers])
    apart = np.hypot(*(centers[:, None] - centers[None]).transpose(2, 0, 1))[np.triu_indices(len(centers), 1)]
    assert apart.min() * SLIDE.mpp >= 29.9


def test_figures_are_dark_and_centred(pixels: np.ndarray) -> None:
    """The chromatin of each figure lies around the centre of its box, and most of it inside."""
    for x, y in SLIDE.truth.centers:
        left, top = max(0, round(x) - 40), max(0, round(y) - 40)
        part = pixels[top : top + 80, left : left + 80].mean(2)
        rows, cols = np.nonzero(part < 85)
        near = np.hypot(cols + left + 0.5 - x, rows + top + 0.5 - y) < 32
        assert near.sum() > 150
        off_um = np.hypot(np.mean(cols[near] + left + 0.5 - x), np.mean(rows[near] + top + 0.5 - y)) * SLIDE.mpp
        assert off_um < 1.5


def test_same_tissue_at_half_the_resolution(pixels: np.ndarray) -> None:
    """At twice the µm/px the same seed shows the same field at half the size."""
    half = Phantom((750, 800), 0.5, 1, 8, [(x / 2, y / 2) for x, y in PLANTS], 0.5, 10)
    assert np.allclose(half.truth.xyxy * 2, SLIDE.truth.xyxy)
    small = pixels.reshape(800, 2, 750, 2, 3).mean((1, 3))
    ours = half.render(0, 0, 750, 800).astype(float)
    assert abs(small.mean() - ours.mean()) < 2
    assert np.corrcoef(small[..., 1].ravel(), ours[..., 1].ravel())[0, 1] > 0.95


def test_looks_like_a_slide(pixels: np.ndarray) -> None:
    """Glass is off-white with faint noise, tissue is pink to purple, and as much of it as was asked for."""
    glass = Phantom((600, 600), tissue=0.0, n_figures=5).render(0, 0, 600, 600)
    assert abs(glass.mean() - 243) < 1
    assert 0.5 < glass.std() < 3
    big = Phantom((8192, 8192), tissue=0.3).tissue_map(8.0)
    assert big.mean() == pytest.approx(0.3, abs=0.02)
    inside = SLIDE.tissue_map(0.25)
    red, green, blue = pixels[inside].mean(0)
    assert green + 20 < blue < red + 20
    assert pixels[inside].mean() < 225 < pixels[~inside].mean()
    assert Phantom((600, 600), tissue=1.0).tissue_map(1.0).all()


def test_other_seed_other_slide() -> None:
    """The seed changes the tissue, the figures and the stain."""
    other = replace(SLIDE, seed=2)
    assert not np.array_equal(other.truth.centers[3:], SLIDE.truth.centers[3:])
    assert (other.render(400, 400, 200, 200) != SLIDE.render(400, 400, 200, 200)).mean() > 0.5


def test_repeated_block() -> None:
    """A repeated block gives the same pixels and truth in every copy; the rest is glass."""
    block = Phantom((700, 700), seed=3, n_figures=3, tissue=0.8)
    wide = replace(block, size_wh=(2300, 1400), block_px=700)
    assert len(wide.truth) == 6 * len(block.truth)
    assert np.allclose(wide.truth.xyxy[-len(block.truth) :], block.truth.moved(1.0, 1400, 700).xyxy)
    assert np.array_equal(wide.render(1300, 600, 300, 300)[100:, 100:], block.render(0, 0, 200, 200))
    assert (wide.render(2100, 0, 200, 50) == 243).all()
    assert np.array_equal(wide.tissue_map(7.0)[25:, 25:50], block.tissue_map(7.0))


def test_survives_pickling() -> None:
    """A phantom pickles as its settings and hashes, lists included."""
    again = pickle.loads(pickle.dumps(SLIDE))
    assert again == SLIDE
    assert hash(again) == hash(replace(SLIDE, plant_l0=[list(p) for p in PLANTS]))


@pytest.mark.parametrize(
    "bad",
    [
        {"size_wh": (0, 10)},
        {"mpp": 9.0},
        {"tissue": 1.5},
        {"n_figures": -1},
        {"plant_l0": ((20000, 5),)},
        {"block_px": 99999},
        {"block_px": 1024, "plant_l0": ((2000, 5),)},
    ],
)
def test_refuses_nonsense(bad: dict[str, object]) -> None:
    """Settings out of range are named in one line."""
    with pytest.raises(ConfigError, match="expected"):
        Phantom(**bad)


def test_file_is_read_by_openslide_and_tifffile(tmp_path: Path, pixels: np.ndarray) -> None:
    """Levels, µm/px and pixels come back from the file in both readers."""
    path = tmp_path / "phantom.svs"
    assert write_phantom(path, SLIDE, tile_px=256, workers=2) == SLIDE
    assert [p.name for p in tmp_path.iterdir()] == ["phantom.svs"]
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((1500, 1600), (375, 400))
        assert float(slide.properties["openslide.mpp-x"]) == 0.25
        seen = np.array(slide.read_region((0, 0), 0, (1500, 1600)))[..., :3].astype(int)
        coarse = np.array(slide.read_region((0, 0), 1, (375, 400)))[..., :3].astype(int)
        assert list(slide.associated_images) == ["thumbnail"]
    assert np.abs(seen - pixels).mean() < 4
    assert np.abs(seen.mean((0, 1)) - pixels.mean((0, 1))).max() < 0.5
    assert np.abs(coarse - pixels.reshape(400, 4, 375, 4, 3).mean((1, 3))).mean() < 4
    with tifffile.TiffFile(path) as tif:
        assert tif.is_svs
        assert not tif.is_bigtiff
        assert [level.shape for level in tif.series[0].levels] == [(1600, 1500, 3), (400, 375, 3)]
        assert np.abs(tif.series[0].levels[1].asarray().astype(int) - coarse).max() <= 2


def test_repeated_file_and_deeper_pyramid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repeated block is written once a unit, to a BigTIFF where offsets need it, with all levels true to level 0."""
    monkeypatch.setattr(file, "_CLASSIC_TIFF_BYTES", 1)
    path = tmp_path / "wide.tif"
    base = Phantom((4500, 4100), seed=3, n_figures=6, tissue=0.6)
    wide = write_phantom(path, base, block_px=1024, tile_px=128, quality=95)
    assert wide.block_px == 1024
    assert len(wide.truth) == 16 * len(replace(base, size_wh=(1024, 1024)).truth)
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((4500, 4100), (1125, 1025), (281, 256))
        for x, y in ((0, 0), (3000, 2050), (4000, 3900)):
            seen = np.array(slide.read_region((x, y), 0, (400, 150)))[..., :3].astype(int)
            assert np.abs(seen - wide.render(x, y, 400, 150)).mean() < 4
        low = np.array(slide.read_region((0, 0), 2, (281, 256)))[..., :3].astype(float)
    whole = wide.render(0, 0, 4496, 4096).reshape(256, 16, 281, 16, 3).mean((1, 3))
    assert np.abs(low - whole).mean() < 4
    with tifffile.TiffFile(path) as tif:
        assert tif.is_bigtiff


def test_small_slide_is_one_level(tmp_path: Path) -> None:
    """A slide below 1024 px has one level, and odd sizes are kept."""
    path = tmp_path / "small.svs"
    write_phantom(path, Phantom((301, 77), tissue=1.0, n_figures=0))
    with openslide.OpenSlide(path) as slide:
        assert slide.level_dimensions == ((301, 77),)


def test_write_failures_leave_nothing(tmp_path: Path) -> None:
    """Bad settings and places are refused with one line, and no part of a file stays."""
    slide = Phantom((64, 64))
    with pytest.raises(ConfigError, match="tile_px"):
        write_phantom(tmp_path / "a.svs", slide, tile_px=100)
    with pytest.raises(ConfigError, match="quality"):
        write_phantom(tmp_path / "a.svs", slide, quality=0)
    with pytest.raises(ResultError, match=r"a\.svs"):
        write_phantom(tmp_path / "missing" / "a.svs", slide)
    assert not list(tmp_path.iterdir())


@settings(max_examples=40)
@given(st.integers(0, 2**32 - 1), st.integers(1, 20))
def test_oracle_finds_every_disc_once(seed: int, count: int) -> None:
    """Discs that do not touch are found one for one, within half a px."""
    centers = random_centers(np.random.default_rng(seed), (300, 260), count, apart_px=19, margin_px=12)
    found = OracleDetector().detect(disc_image((300, 260), centers, 8, ground=TISSUE_GROUND)[None], 0.5)[0]
    assert len(found) == count
    away = np.hypot(*(found.centers[:, None] - centers[None]).transpose(2, 0, 1))
    assert sorted(away.argmin(1)) == list(range(count))
    assert away.min(1).max() <= 0.75


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(0, 60))
def test_oracle_score_is_the_blob_s_own(dx: int, dy: int) -> None:
    """A disc seen whole has one score and size wherever it lies; jitter is bounded and repeatable."""
    image = disc_image((200, 200), [(100.3, 99.6)], 9)
    plain, jittered = OracleDetector(), OracleDetector(jitter_px=1.5)
    base = plain.detect(image[None], 0.0)[0]
    tile = image[dy : dy + 140, dx : dx + 140][None]
    moved = plain.detect(tile, 0.0)[0]
    assert moved.score == base.score
    assert np.array_equal(moved.moved(1.0, dx, dy).xyxy, base.xyxy)
    shaken = pickle.loads(pickle.dumps(jittered)).detect(tile, 0.0)[0]
    assert np.array_equal(shaken.xyxy, jittered.detect(tile, 0.0)[0].xyxy)
    assert 0 < np.abs(shaken.xyxy - moved.xyxy).max() <= 1.5
    assert shaken.score == base.score


def test_oracle_cuts_and_caps() -> None:
    """A disc cut by the tile gives a cut box that ends at the edge; the best are kept when the tile is full."""
    image = disc_image((64, 64), [(2, 30), (40, 30)], 6, ink=0)
    assert OracleDetector(jitter_px=1.0).detect(image[None], 0.0)[0].xyxy[:, 0].min() == 0
    grey = np.minimum(image, disc_image((64, 64), [(40, 50)], 6, ink=INK))
    best = OracleDetector(max_per_tile=2).detect(grey[None], 0.0)[0]
    assert len(best) == 2
    assert best.score.min() > 0.9
    assert len(OracleDetector().detect(np.full((1, 8, 8, 3), 240, np.uint8), 0.0)[0]) == 0
    assert not len(OracleDetector().detect(disc_image((40, 40), [(20, 20)], 5, ink=100)[None], 0.9)[0])


def test_oracle_is_a_detector() -> None:
    """It satisfies the protocol and its digest follows its settings."""
    oracle = OracleDetector(mpp=0.5)
    assert isinstance(oracle, Detector)
    assert oracle.at(2.0, allow_coarse=True) is oracle
    assert oracle.sha256 == OracleDetector(mpp=0.5).sha256 != OracleDetector().sha256


def test_random_centers_refuse_to_overlap() -> None:
    """More places than fit are refused."""
    with pytest.raises(ConfigError, match="ask for fewer"):
        random_centers(np.random.default_rng(0), (50, 50), 30, apart_px=20)


def test_a_seed_may_be_numpys() -> None:
    seed = np.random.default_rng(0).integers(100)
    ours, theirs = (Phantom((600, 600), tissue=1.0, seed=n).render(0, 0, 64, 64) for n in (int(seed), seed))
    np.testing.assert_array_equal(ours, theirs)
