"""Metrics, training images, settings, and the training pipeline from crops to a model directory."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from PIL import Image as Picture
from scipy import ndimage

from slidescan.detect import Family, load_detector
from slidescan.detections import Detections
from slidescan.errors import ConfigError, ModelError
from slidescan.slides import memory_slide
from slidescan.testing import OracleDetector, disc_image
from slidescan.train import metrics
from slidescan.train.agreement import grid_shift_agreement
from slidescan.train.augment import augment, jitter_stain
from slidescan.train.crops import Crop, cover, load_crops
from slidescan.train.evaluate import balanced_accuracy, best_cut
from slidescan.train.fields import FieldMaker
from slidescan.train.run import train_detector
from slidescan.train.settings import TrainSettings, VariantSettings, load_settings

ROOT = Path(__file__).resolve().parents[1]
POINTS = hnp.arrays(np.float64, st.tuples(st.integers(0, 5), st.just(2)), elements=st.floats(0, 20))
GREEN = np.array([0, 255, 0])


def boxes_at(xy: NDArray[np.float64], score: NDArray[np.float64]) -> Detections:
    """Small boxes centred at `xy`."""
    return Detections.build(np.concatenate((xy - 1, xy + 1), 1), score)


def marked_crops(n: int = 12, edge: int = 128, *, off_centre: bool = False) -> list[Crop]:
    """Pink noise with a green dot of 9 px where the figure is, so that pixels say where figures went."""
    rng = np.random.default_rng(0)
    crops = []
    for i in range(n):
        image = rng.normal((210, 150, 190), 12, (edge, edge, 3)).clip(0, 255).astype(np.uint8)
        centre = np.full(2, edge / 2) + (rng.uniform(-8, 8, 2).round() if off_centre else 0)
        y, x = np.mgrid[:edge, :edge] + 0.5
        image[np.hypot(x - centre[0], y - centre[1]) <= 4.5] = GREEN
        crops.append(Crop(image, 0.25, np.array([[*centre, i % 2]]), f"p{i % 4}"))
    return crops


def dots(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Centres (x, y) of the green dots of an image."""
    green = (image[..., 1].astype(int) - image[..., 0] > 90) & (image[..., 2] < 130)
    labels, count = ndimage.label(green, np.ones((3, 3)))
    found = ndimage.center_of_mass(green, labels, range(1, count + 1))
    return np.array(found, np.float64).reshape(-1, 2)[:, ::-1] + 0.5


@pytest.fixture(scope="module")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory laid out like the real crops, with green dots for figures."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "midog21" / "images"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i, crop in enumerate(marked_crops(24)):
        Picture.fromarray(crop.image).save(folder / f"MIDOG21_{i}.png")
        split = "test" if i % 4 == 0 else "train"
        row = {"id": i, "file_name": f"MIDOG21_{i}.png", "slide": f"{i % 12}", "benchmark_split": split}
        images.append(
            {**row, "x0": 1000.0 * i, "y0": 0.0, "majority": ("Normal", "Atypical")[i % 3 == 0], "scanner": "s"}
        )
        annotations.append({"image_id": i, "category_id": 1, "bbox": [39, 39, 50, 50], "source": f"MIDOG++ #{i}"})
    table = {"images": images, "annotations": annotations}
    (root / "midog21" / "annotations.coco.json").write_text(json.dumps(table))
    return root


# --- metrics ---------------------------------------------------------------------------------------------------------


@given(found=POINTS, truth=POINTS, radius=st.floats(0.1, 15))
def test_matching_agrees_with_trying_everything(
    found: NDArray[np.float64], truth: NDArray[np.float64], radius: float
) -> None:
    """As many pairs as any assignment has, and among those the least total distance."""
    pairs = metrics.match(found, truth, radius)
    distance = np.linalg.norm(found[:, None] - truth, axis=-1)
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    assert (distance[pairs[:, 0], pairs[:, 1]] <= radius).all()
    best = (0, 0.0)
    short, long = (distance, len(truth)) if len(found) <= len(truth) else (distance.T, len(found))
    for columns in itertools.permutations(range(long), len(short)):
        reached = [short[i, j] for i, j in enumerate(columns) if short[i, j] <= radius]
        best = min(best, (-len(reached), float(sum(reached))))
    assert len(pairs) == -best[0]
    assert distance[pairs[:, 0], pairs[:, 1]].sum() == pytest.approx(best[1], abs=1e-9)


@given(found=POINTS, truth=POINTS, data=st.data())
def test_counts_add_up(found: NDArray[np.float64], truth: NDArray[np.float64], data: st.DataObject) -> None:
    """Without a margin every truth is found or missed, every kept detection right or false; F1 follows."""
    score = data.draw(hnp.arrays(np.float64, len(found), elements=st.floats(0, 1)))
    at = metrics.score([metrics.Image(boxes_at(found, score), truth, 5.0, 20)], 0.5)
    kept = int((score.astype(np.float32) >= 0.5).sum())
    assert (at.found + at.missed, at.found + at.false) == (len(truth), kept)
    if at.found:
        assert at.f1 == pytest.approx(2 / (1 / at.precision + 1 / at.recall))


def test_a_border_counts_neither_way() -> None:
    """In the margin, misses and false detections vanish, and a pair across its line is no error."""
    truth = np.array([[2.0, 50.0], [50.0, 50.0], [9.5, 80.0]])
    found = boxes_at(np.array([[50.0, 51.0], [3.0, 10.0], [10.5, 80.0]]), np.ones(3))
    at = metrics.score([metrics.Image(found, truth, 5.0, 100, margin=10.0)], 0.5)
    assert (at.found, at.missed, at.false) == (1, 0, 0)


def test_average_precision_of_known_lists() -> None:
    """Right, wrong, right among three truths: 1/3·1 + 1/3·2/3; perfect is 1 and nothing is 0."""
    truth = np.array([[10.0, 10.0], [50.0, 50.0], [90.0, 90.0]])
    found = boxes_at(np.array([[10.0, 10.0], [30.0, 30.0], [50.0, 50.0]]), np.array([0.9, 0.8, 0.7]))
    assert metrics.average_precision([metrics.Image(found, truth, 5.0, 100)]) == pytest.approx(1 / 3 + 2 / 9)
    perfect = boxes_at(truth, np.ones(3))
    assert metrics.average_precision([metrics.Image(perfect, truth, 5.0, 100)]) == 1.0
    assert metrics.average_precision([metrics.Image(Detections.empty(), truth, 5.0, 100)]) == 0.0


def test_a_second_detection_of_one_truth_is_false() -> None:
    """Two boxes on one figure are one found and one false."""
    found = boxes_at(np.array([[10.0, 10.0], [11.0, 10.0]]), np.array([0.9, 0.8]))
    at = metrics.score([metrics.Image(found, np.array([[10.0, 10.0]]), 5.0, 100)], 0.5)
    assert (at.found, at.false) == (1, 1)


def test_threshold_and_calibration_are_recovered() -> None:
    """Scores too sure by a factor of two and shifted are set right, and the threshold parts right from wrong."""
    rng = np.random.default_rng(0)
    logit = rng.normal(0, 1.5, (40, 100))
    right = rng.random((40, 100)) < 1 / (1 + np.exp(-logit))
    xy = np.stack((np.arange(100) * 10.0, np.zeros(100)), 1)
    sure = 1 / (1 + np.exp(-2 * (logit + 0.5)))
    images = [metrics.Image(boxes_at(xy, p), xy[hit], 1.0, 1000) for p, hit in zip(sure, right, strict=True)]
    assert metrics.fit_calibration(images) == pytest.approx((2.0, -0.5), abs=0.2)
    clear = metrics.Image(boxes_at(xy, np.where(right[0], 0.7, 0.4)), xy[right[0]], 1.0, 1000)
    assert 0.4 < metrics.best_threshold([clear]) <= 0.7


# --- images ----------------------------------------------------------------------------------------------------------


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


# --- settings and pipeline -------------------------------------------------------------------------------------------


def test_the_shipped_settings_are_valid() -> None:
    """The file in configs/ loads, and its smoke version is a valid run too."""
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml")
    assert [v.mpp for v in settings.variants] == [0.25, 0.5]
    assert TrainSettings.model_validate(settings.smoke().model_dump()).crops


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "learning_rate"),
        ("variants: [{mpp: -1}]", r"variants\.0\.mpp"),
        ("variants: [{tile_px: [100]}]", "tile_px"),
        ("a: [", "YAML"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    """Unknown keys, values out of range and broken YAML say where."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)
    with pytest.raises(ConfigError, match="expected a YAML file"):
        load_settings(tmp_path / "missing.yaml")


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


def run(fake_data: Path, out: Path, **changes: object) -> list[str]:
    """Train the smoke version of the shipped settings; return what was said."""
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke()
    said: list[str] = []
    train_detector(settings.model_copy(update={"data": fake_data, **changes}), out, said.append)
    return said


def weights(path: Path) -> dict[str, NDArray[np.generic]]:
    """The weights of a model directory."""
    return safetensors.numpy.load_file(path / "model.safetensors")


@pytest.fixture(scope="module")
def trained(fake_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole smoke run."""
    out = tmp_path_factory.mktemp("runs") / "train"
    run(fake_data, out)
    return out


def test_a_run_is_a_detector_with_its_numbers(trained: Path) -> None:
    """Both resolutions load as one family from the run's directory; logs, curves and metrics lie beside them."""
    family = load_detector(trained)
    assert isinstance(family, Family)
    assert [v.mpp for v in family.variants] == [0.25, 0.5]
    assert family.attributes == ("atypical",)
    found = family.at(0.5).detect(np.zeros((1, 96, 96, 3), np.uint8), 0.0)[0]
    assert len(found) == family.max_per_tile
    assert found.attributes.shape == (len(found), 1)
    report = json.loads((trained / "0.25" / "metrics.json").read_text())
    assert {
        "field",
        "sparse",
        "mosaic",
        "bare",
        "covered by a nucleus",
        "covered by other tissue",
        "grid_shift",
    } <= set(report)
    for name in ("0.25/pr.png", "0.25/froc.png", "0.25/reliability.png", "0.25/worst.png", "losses-0.5.png"):
        with Picture.open(trained / name) as picture:
            picture.verify()
    assert (trained / "losses-0.25.csv").read_text().startswith("step,minutes,lr,loss")


def test_a_run_that_ended_is_not_done_again(fake_data: Path, trained: Path) -> None:
    """Run again, it changes no weight."""
    before = weights(trained / "0.25")
    run(fake_data, trained)
    after = weights(trained / "0.25")
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_killed_run_goes_on_to_the_same_weights(
    fake_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the third of four steps, with a checkpoint after the second: nothing tells it afterwards."""
    from slidescan.train import loop

    average, steps = loop._average, 0

    def stop(*arguments: object) -> None:
        nonlocal steps
        steps += 1
        if steps == 3:
            raise KeyboardInterrupt
        average(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(loop, "_average", stop)
    with pytest.raises(KeyboardInterrupt):
        run(fake_data, tmp_path)
    assert not (tmp_path / "0.25").exists()
    monkeypatch.undo()
    run(fake_data, tmp_path)
    for variant in ("0.25", "0.5"):
        whole, resumed = weights(trained / variant), weights(tmp_path / variant)
        assert all(np.array_equal(whole[key], resumed[key]) for key in whole)


def test_a_broken_checkpoint_is_named(fake_data: Path, tmp_path: Path) -> None:
    """It is not read as far as it goes."""
    (tmp_path / "losses-0.25.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="expected a checkpoint"):
        run(fake_data, tmp_path)


def test_start_weights_must_exist(fake_data: Path, tmp_path: Path) -> None:
    """A variant that starts from one not trained yet is an error that says so."""
    with pytest.raises(ModelError, match="start from"):
        run(fake_data, tmp_path, variants=[VariantSettings(mpp=0.5, start_mpp=0.25, steps=1)])


def test_what_is_found_on_empty_tissue_is_unlearned(
    fake_data: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows around false alarms are kept and trained on, and the card says how many."""
    monkeypatch.setattr(metrics, "best_threshold", lambda *kinds: 0.01)  # what learned nothing scores nothing higher
    shutil.copytree(trained, tmp_path / "run")
    before = weights(tmp_path / "run" / "0.5")
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml").smoke().model_copy(update={"data": fake_data})
    tissue = np.random.default_rng(0).normal(180, 30, (256, 320, 3)).clip(0, 255).astype(np.uint8)
    said: list[str] = []
    train_detector(settings, tmp_path / "run", said.append, mine_slides=[memory_slide(tissue, 0.5)])
    count = len(list((tmp_path / "run" / "mined-0.5").glob("*.png")))
    assert count > 0
    assert any(f"mined {count} false alarms on 1 slides" in line for line in said)
    card = json.loads((tmp_path / "run" / "0.5" / "slidescan.json").read_text())
    assert (card["training"]["mined"], card["training"]["mined_slides"]) == (count, 1)
    after = weights(tmp_path / "run" / "0.5")
    assert any(not np.array_equal(before[key], after[key]) for key in before)


# --- agreement and attributes ----------------------------------------------------------------------------------------


def test_a_grid_that_does_not_matter_agrees_wholly() -> None:
    """An oracle sees discs wherever the tiles lie; one that shakes its boxes by more than 2 px does not agree."""
    spots = [(x + 0.5, y + 0.5) for x in range(60, 760, 70) for y in range(60, 760, 70)]
    slide = memory_slide(disc_image((800, 800), spots, 5), 1.0)
    steady = grid_shift_agreement(slide, OracleDetector(), shifts=3)
    assert steady.compared > 100
    assert steady.share == 1.0
    shaken = grid_shift_agreement(slide, OracleDetector(jitter_px=6.0), shifts=3)
    assert shaken.share < 0.7
    assert shaken.moved_px > 2


def test_balanced_accuracy_of_a_known_table() -> None:
    """Two of three atypical and one of two typical ones are said right; the one nobody judged is left out."""
    xy = np.arange(6)[:, None] * np.array([10.0, 0.0])
    said = np.array([0.9, 0.8, 0.2, 0.1, 0.7, 0.9])[:, None]
    true = np.array([1, 1, 1, 0, 0, np.nan])[:, None]
    found = Detections.build(np.concatenate((xy - 1, xy + 1), 1), np.ones(6), attributes=said)
    nothing = metrics.Image(Detections.empty(), xy, 2.0, 100, attributes=true)
    images = [metrics.Image(found, xy, 2.0, 100, attributes=true), nothing]
    assert balanced_accuracy(images, 0.5, 0) == (round((2 / 3 + 1 / 2) / 2, 4), 5)
    assert balanced_accuracy([metrics.Image(found, xy[:0], 2.0, 100)], 0.5, 0) is None
    assert balanced_accuracy(images, 0.5, 0, best_cut(images, 0.5, 0)) == (round((2 / 3 + 1) / 2, 4), 5)
