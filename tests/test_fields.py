"""Images made of crops: figures are where they say, covers hide them, and splits part no patient."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given
from numpy.typing import NDArray
from PIL import Image

from slidescan.errors import ConfigError
from slidescan.train.augment import augment, jitter_stain
from slidescan.train.crops import cover, load_crops
from slidescan.train.fields import FieldMaker
from tests.marked import GREEN, dots, marked_crops


def test_covering_hides_the_figure_and_nothing_else() -> None:
    """No dot is left, and tissue 8 µm from the figure is untouched."""
    rng = np.random.default_rng(1)
    for crop in marked_crops(4, off_centre=True):
        covered = cover(rng, crop)
        assert covered is not None
        assert len(dots(covered)) == 0
        y, x = np.mgrid[:128, :128] + 0.5
        far = np.hypot(x - crop.figures[0, 0], y - crop.figures[0, 1]) > 32
        np.testing.assert_array_equal(covered[far], crop.image[far])


@pytest.mark.parametrize("apart_px", [28, 36, 40])
def test_covering_hides_both_plates_of_a_late_figure(apart_px: int) -> None:
    """They lie beside the annotated centre, at the rim of the disc that hides a compact figure."""
    y, x = np.mgrid[:128, :128] + 0.5
    for crop in marked_crops(4):
        image = crop.image.copy()
        image[np.hypot(x - 64, y - 64) <= 6] = (210, 150, 190)
        for side in (-apart_px / 2, apart_px / 2):  # on the diagonal: beside it there is most room
            image[np.hypot(x - 64 - side * 0.7, y - 64 - side * 0.7) <= 6] = (0, 255, 0)
        covered = cover(np.random.default_rng(2), replace(crop, image=image))
        assert covered is not None
        assert len(dots(covered)) == 0


@given(seed=st.integers(0, 10_000))
def test_a_covered_crop_has_nothing_as_dark_left(seed: int) -> None:
    """Chromosomes scattered around the centre are covered, or the crop is not used."""
    rng = np.random.default_rng(seed)
    (crop,) = marked_crops(1)
    image = crop.image.copy()
    y, x = np.mgrid[:128, :128] + 0.5
    # Apart and of one size: of what is smaller than the largest, or than two that touch, a part may stay.
    for angle, px in zip(np.arange(4) * np.pi / 2 + rng.uniform(-0.35, 0.35, 4), rng.uniform(16, 32, 4), strict=True):
        speck = np.hypot(x - 64 - px * np.cos(angle), y - 64 - px * np.sin(angle)) <= rng.uniform(5.5, 6)
        image[speck] = GREEN
    covered = cover(rng, replace(crop, image=image))
    assert covered is None or len(dots(covered)) == 0


def test_nothing_dark_is_laid_where_a_figure_was() -> None:
    """In a clear cell a dark cover would look like a figure: it is pale tissue, or the crop is not used."""
    (crop,) = marked_crops(1)
    y, x = np.mgrid[:128, :128] + 0.5
    dark = crop.image.copy()
    dark[np.hypot(x - 64, y - 64) > 24] = (130, 100, 150)
    assert cover(np.random.default_rng(0), replace(crop, image=dark)) is None
    dark[:56, :56] = crop.image[:56, :56]
    for seed in range(5):
        covered = cover(np.random.default_rng(seed), replace(crop, image=dark))
        assert covered is not None
        assert covered[60:68, 60:68].mean() > 170


def test_a_figure_mirrored_at_the_edge_of_its_slide_is_a_figure(tmp_path: Path) -> None:
    """A crop's black part, beyond the slide, is filled with a mirror image of its tissue, and so of its figure."""
    (crop,) = marked_crops(1)
    image = crop.image.copy()
    image[:, :40] = 0
    folder = tmp_path / "midog21"
    (folder / "images").mkdir(parents=True)
    Image.fromarray(image).save(folder / "images" / "MIDOG21_1.png")
    row = {
        "id": 1,
        "file_name": "MIDOG21_1.png",
        "benchmark_split": "test",
        "slide": "s",
        "x0": 0,
        "y0": 0,
        "majority": 1,
    }
    figure = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [39, 39, 50, 50]}
    table = json.dumps({"images": [row], "annotations": [figure]})
    (folder / "annotations.coco.json").write_text(table, encoding="utf-8")
    (loaded,) = load_crops(tmp_path, "test")
    np.testing.assert_allclose(np.sort(loaded.figures[:, 0]), [16, 64])
    np.testing.assert_allclose(np.sort(dots(loaded.image)[:, 0]), [16, 64], atol=1)


@given(seed=st.integers(0, 500), size=st.sampled_from([160, 256, 300]), n=st.integers(0, 5))
def test_fields_put_figures_where_they_say(seed: int, size: int, n: int) -> None:
    """Each figure of the truth has its dot within 1.5 px, and no dot is without truth."""
    image, figures = MAKER.field(np.random.default_rng(seed), size, n)
    assert image.shape == (size, size, 3)
    assert len(figures) <= n
    assert_dots_match(image, figures, size)
    assert set(figures[:, 2]) <= {0.0, 1.0}


@given(seed=st.integers(0, 500), roll=st.booleans())
def test_mosaics_put_figures_where_they_say(seed: int, roll: bool) -> None:
    """Turned, shifted and rolled, centres stay on their dots."""
    image, figures = MAKER.mosaic(np.random.default_rng(seed), 256, roll=roll)
    assert image.shape == (256, 256, 3)
    assert_dots_match(image, figures, 256)


def assert_dots_match(image: NDArray[np.uint8], figures: NDArray[np.float64], size: int) -> None:
    """Compare dots and truth, leaving out those cut by the border."""
    border = 7.0
    figures = figures[:, :2]
    whole = figures[((figures > border) & (figures < size - border)).all(1)]
    seen = dots(image)
    for centre in whole:
        assert np.linalg.norm(seen - centre, axis=1).min() < 1.5
    for dot in seen[((seen > border) & (seen < size - border)).all(1)]:
        assert np.linalg.norm(figures - dot, axis=1).min() < 1.5


MAKER = FieldMaker(marked_crops(off_centre=True))


def test_nuclei_are_pasted_like_figures() -> None:
    """Discs without a figure show more nuclei than the tissue they lie on."""
    crops = []
    for crop in marked_crops(off_centre=True):
        image = crop.image.copy()
        y, x = np.mgrid[:128, :128] + 0.5
        image[np.hypot(x - 64, y - 36) <= 8] = (60, 60, 160)
        crops.append(replace(crop, image=image))
    maker = FieldMaker(crops)
    blue = [
        np.mean([(maker.field(np.random.default_rng(seed), 256, 0, n)[0][..., 0] < 90).mean() for seed in range(12)])
        for n in (0, 40)
    ]
    assert blue[1] > 1.2 * blue[0]


def test_figures_faded_by_the_tissue_edge_are_no_truth() -> None:
    """Where glass replaces tissue, truth and dots still agree."""
    for seed in range(6):
        rng = np.random.default_rng(seed)
        image, figures = MAKER.edge_of_tissue(rng, MAKER.field(rng, 256, 5))
        assert_dots_match(image, figures, 256)


def test_bare_glass_has_no_figure() -> None:
    """Images without tissue come with an empty truth."""
    image, figures = MAKER.bare(np.random.default_rng(0), 128)
    assert image.dtype == np.uint8
    assert image.shape == (128, 128, 3)
    assert figures.shape == (0, 3)


@given(seed=st.integers(0, 100))
def test_augmentation_is_a_function_of_its_generator(seed: int) -> None:
    """The same generator state gives the same image, of the same shape and type."""
    image = marked_crops(1)[0].image
    first, again = (augment(np.random.default_rng(seed), image) for _ in range(2))
    assert first.shape == image.shape
    assert first.dtype == np.uint8
    np.testing.assert_array_equal(first, again)
    assert jitter_stain(np.random.default_rng(seed), np.full((1, 1, 3), 255, np.uint8), 0.2).min() > 150


@pytest.mark.data
def test_no_patient_is_in_two_splits(shared: Path) -> None:
    """Train, validation and test share no patient, and every crop is in one of them."""
    splits = [load_crops(shared / "data", split, limit=2000) for split in ("train", "validation", "test")]
    patients = [{crop.patient for crop in crops} for crops in splits]
    assert sum(len(crops) for crops in splits) == 1721
    assert len(set.union(*patients)) == sum(len(p) for p in patients)


def test_missing_crops_are_named(tmp_path: Path) -> None:
    """Without the data the error says which folder was expected."""
    with pytest.raises(ConfigError, match="midog21"):
        load_crops(tmp_path, "train")


@pytest.mark.data
def test_figures_beyond_the_edge_of_a_crop_are_known(shared: Path) -> None:
    """A figure that another crop of the slide shows whole is no tissue here; experts judged all but a few."""
    crops = load_crops(shared / "data", "train", limit=2000) + load_crops(shared / "data", "validation", limit=2000)
    cut = np.concatenate([crop.cut for crop in crops])[:, :2]
    assert len(cut) > 20
    assert ((cut < 0) | (cut >= 128)).any(1).all()
    assert ((cut > -20) & (cut < 148)).all()
    said = np.concatenate([crop.figures[:, 2] for crop in crops])
    assert np.isnan(said).mean() < 0.05
    assert 0.15 < np.nanmean(said) < 0.35


def test_a_survey_shows_every_figure_once() -> None:
    """Over the fields of all patients each figure comes once, and fields are of one patient."""
    shown: dict[str, int] = {}
    for i, (make, crop) in enumerate(MAKER.survey(np.random.default_rng(0), 256, 500.0)):
        image, figures = make(np.random.default_rng(i))
        assert_dots_match(image, figures, 256)
        shown[crop.patient] = shown.get(crop.patient, 0) + len(figures)
    assert set(shown) == {"p0", "p1", "p2", "p3"}
    # A figure is left out only where there is no room for it.
    assert 9 <= sum(shown.values()) <= 12
    assert max(shown.values()) <= 3


@pytest.mark.parametrize("nucleus", [False, True])
def test_covered_figures_are_gone(nucleus: bool) -> None:
    """Whatever covers them, no dot is left, and the places are told."""
    for seed in range(4):
        image, places = MAKER.covered(np.random.default_rng(seed), 256, 3, nucleus=nucleus)
        assert len(dots(image)) == 0
        assert 1 <= len(places) <= 3
