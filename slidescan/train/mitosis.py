"""The training of `mitosis`, from crops on disk to a model directory with its numbers.

Hides the order of things: network, images, loop, threshold and calibration on the validation patients, and the report
on the test patients, which nothing is chosen by.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image as Picture

from slidescan.detect.card import Card, write_model
from slidescan.detect.load import load_detector
from slidescan.detect.network import channels_last, lower_precision, set_anchors
from slidescan.detections import Detector
from slidescan.errors import ModelError
from slidescan.ops import accelerate
from slidescan.phantom import Phantom
from slidescan.train import metrics
from slidescan.train.augment import augment
from slidescan.train.crops import CROP_MPP, OBJECT_UM, load_crops
from slidescan.train.fields import FieldMaker, Sample
from slidescan.train.loop import Batch, pack, train
from slidescan.train.negatives import load_negatives, show
from slidescan.train.network import build_network
from slidescan.train.settings import TrainSettings, VariantSettings

__all__ = ["evaluate", "settle", "train_mitosis"]

# Seeds of the phantoms trained on; demonstrations and tests use small ones.
_PHANTOM_SEEDS = range(9000, 9012)
_FIELD_PER_MM2 = 25.0  # figures on a realistic field: a dense hotspot


def train_mitosis(settings: TrainSettings, out: Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Train every variant and write ``out/<name>/<mpp>/`` with config.json, model.safetensors and slidescan.json.

    A run that was stopped goes on from its checkpoints in `out`.

    Returns
    -------
    dict
        Metrics by variant, as written to ``out/metrics.json``.

    Raises
    ------
    ConfigError
        If the data are missing.
    ModelError
        If training diverges.
    """
    torch.set_num_threads(settings.threads)
    out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    for variant in settings.variants:
        directory = out / settings.name / f"{variant.mpp:g}"
        log(f"{variant.mpp:g} µm/px")
        torch.manual_seed(settings.seed)
        network = build_network(settings.classes, width=settings.width)
        accelerate(network)
        set_anchors(network, OBJECT_UM / variant.mpp)
        if settings.precision == "bf16":
            lower_precision(network, "cpu")
        network = channels_last(network)
        if variant.start_mpp is not None:
            _start_from(network, out / settings.name / f"{variant.start_mpp:g}")
        maker = FieldMaker(load_crops(settings.data, "train", mpp=variant.mpp, limit=settings.crops), settings.seed)
        batches = _Batches(maker, settings, variant)
        checkpoint = out / f"checkpoint-{variant.mpp:g}.safetensors"
        average = train(network, batches, settings, variant, checkpoint=checkpoint, log=log)

        card = Card(
            f"{settings.name}-{variant.mpp:g}",
            tuple(settings.classes),
            variant.mpp,
            input_px=variant.input_px,
            object_um=OBJECT_UM * 1.25,  # the nominal box, with a quarter for figures that are larger
            anchor_px=OBJECT_UM / variant.mpp,
        )
        log(f"validation: {settle(average, card, directory, settings, variant)}")
        report[f"{variant.mpp:g}"] = evaluate(load_detector(directory), settings, variant)
        log(json.dumps(report[f"{variant.mpp:g}"]))
        (out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def settle(
    network: torch.nn.Module, card: Card, directory: Path, settings: TrainSettings, variant: VariantSettings
) -> dict[str, float]:
    """Write the model with its calibration and threshold, both from images of the validation patients.

    As many realistic fields, where figures are rare, as mosaics, where they are many.

    Returns
    -------
    dict
        F1, precision, recall and AP there.
    """
    crops = load_crops(settings.data, "validation", mpp=variant.mpp, limit=settings.crops)
    maker, rng = FieldMaker(crops, settings.seed), np.random.default_rng(settings.seed + 1)
    edge = 3 * crops[0].image.shape[0]
    mosaics = [maker.mosaic(rng, edge, roll=True) for _ in range(settings.eval_images)]
    choose = [*_fields(settings, variant, "validation", settings.seed + 1), *mosaics]
    write_model(network, card, directory)
    images = _detect(load_detector(directory), choose, margin_um=4.0)
    temperature, offset = metrics.fit_calibration(images)
    images = metrics.calibrate(images, temperature, offset)
    threshold = round(metrics.best_threshold(images), 2)
    card = dataclasses.replace(card, temperature=temperature, offset=offset, threshold=threshold)
    write_model(network, card, directory)
    return _summary(images, threshold)


def evaluate(detector: Detector, settings: TrainSettings, variant: VariantSettings) -> dict[str, Any]:
    """Measure a detector at its own threshold on images of the test patients, on glass and on phantoms.

    Returns
    -------
    dict
        Precision, recall, F1, AP on mosaics and fields; false positives per mm² on figure-free fields, glass.
    """
    rng = np.random.default_rng(settings.seed + 2)
    crops = load_crops(settings.data, "test", mpp=variant.mpp, limit=settings.crops)
    maker = FieldMaker(crops, settings.seed)
    size = 3 * crops[0].image.shape[0]
    field = variant.input_px
    n = settings.eval_images
    kinds: dict[str, list[Sample]] = {
        "mosaic": [maker.mosaic(rng, size, roll=True) for _ in range(3 * n)],
        "field": list(_fields(settings, variant, "test", settings.seed + 3)),
        "empty_field": [maker.field(rng, field, 0) for _ in range(max(1, n // 2))],
        "bare": [maker.bare(rng, field) for _ in range(max(1, n // 2))],
        "phantom": [
            _window(rng, *_phantom(seed, variant.mpp, 2 * field), field) for seed in range(8000, 8000 + n // 8)
        ],
    }
    report: dict[str, Any] = {"threshold": detector.threshold}
    for kind, samples in kinds.items():
        if samples:
            images = _detect(detector, samples, margin_um=4.0)
            report[kind] = _summary(images, detector.threshold, variant.mpp)
    return report


class _Batches:
    """Draws training batches; a callable with the images' makers inside."""

    def __init__(self, maker: FieldMaker, settings: TrainSettings, variant: VariantSettings) -> None:
        self._maker, self._settings, self._tile_px = maker, settings, variant.tile_px
        self._negatives = load_negatives(settings.data)
        edge = round(512 / maker.mpp)  # 0.26 mm² of phantom a seed
        seeds = _PHANTOM_SEEDS if settings.share_phantom else []
        if settings.crops:
            seeds, edge = seeds[:1], round(128 / maker.mpp)
        self._phantoms = [_phantom(seed, maker.mpp, edge) for seed in seeds]

    def __call__(self, rng: np.random.Generator) -> Batch:
        size = int(rng.choice(self._tile_px))
        count = max(1, round(self._settings.batch_mpx * 1e6 / size**2))
        samples, object_px = [], []
        for _ in range(count):
            zoom = float(np.exp(rng.uniform(np.log(0.8), np.log(1.25))))
            sample = self._sample(rng, round(size / zoom))
            image, figures = _resize(sample, size)
            inside = ((figures >= 4) & (figures < size - 4)).all(1)  # px: less than a hint of it is visible
            samples.append((augment(rng, image, self._settings.stain_jitter), figures[inside]))
            object_px.append(OBJECT_UM / self._maker.mpp * size / image_edge(sample))
        return pack(samples, object_px)

    def _sample(self, rng: np.random.Generator, size: int) -> Sample:
        s, kind = self._settings, rng.random()
        # At 0.5 µm/px the same tissue is a quarter of the pixels: figures per px must not vanish in the batch.
        expected = s.figures_per_mpx * size**2 * 1e-6 * self._maker.mpp / CROP_MPP
        limits = np.cumsum([s.share_mosaic, s.share_bare, s.share_negative, s.share_phantom])
        if kind < limits[0]:
            return self._maker.mosaic(rng, size, empty=rng.uniform(0.2, 0.8))
        if kind < limits[1]:
            return self._maker.bare(rng, size)
        if kind < limits[2] and self._negatives:
            like = self._maker.crops[int(rng.integers(len(self._maker.crops)))].image
            negative = self._negatives[int(rng.integers(len(self._negatives)))]
            return show(rng, negative, like, self._maker.mpp, size), np.empty((0, 2))
        if limits[2] <= kind < limits[3] and self._phantoms:
            return _window(rng, *self._phantoms[int(rng.integers(len(self._phantoms)))], size)
        figures = int(rng.poisson(expected)) if rng.random() < 0.85 else 0
        sample = self._maker.field(rng, size, figures, int(rng.poisson(expected)))
        return self._maker.edge_of_tissue(rng, sample) if rng.random() < 0.2 else sample


def image_edge(sample: Sample) -> int:
    """Return the edge of a square sample, px."""
    return len(sample[0])


def _resize(sample: Sample, size: int) -> Sample:
    image, figures = sample
    if image.shape[0] == size:
        return sample
    small = Picture.fromarray(image).resize((size, size), Picture.Resampling.BILINEAR)
    return np.asarray(small), figures * (size / image.shape[0])


def _phantom(seed: int, mpp: float, size: int) -> Sample:
    """Return a phantom of `size` px with many figures and look-alikes."""
    area_mm2 = (size * mpp * 1e-3) ** 2
    slide = Phantom(
        (size, size),
        mpp=mpp,
        seed=seed,
        n_figures=max(2, round(150 * area_mm2)),
        n_look_alikes=max(4, round(300 * area_mm2)),
        tissue=0.7,
    )
    return slide.render(0, 0, size, size), slide.truth.centers


def _window(rng: np.random.Generator, image: NDArray[np.uint8], figures: NDArray[np.float64], size: int) -> Sample:
    size = min(size, image.shape[0])
    x, y = (int(v) for v in rng.integers(0, image.shape[0] - size + 1, 2))
    inside = ((figures >= (x, y)) & (figures < (x + size, y + size))).all(1)
    return image[y : y + size, x : x + size], figures[inside] - (x, y)


def _fields(settings: TrainSettings, variant: VariantSettings, split: str, seed: int) -> Iterator[Sample]:
    rng = np.random.default_rng(seed)
    maker = FieldMaker(load_crops(settings.data, split, mpp=variant.mpp, limit=settings.crops), settings.seed)
    size = variant.input_px  # as a scan feeds it: on larger tiles than it was trained on the network scores lower
    expected = _FIELD_PER_MM2 * (size * variant.mpp * 1e-3) ** 2
    for _ in range(settings.eval_images):
        yield maker.field(rng, size, int(rng.poisson(expected)))


def _detect(detector: Detector, samples: list[Sample], margin_um: float) -> list[metrics.Image]:
    images = []
    for image, figures in samples:
        found = detector.detect(image[None], 0.01)[0]
        px = 1 / detector.mpp
        images.append(metrics.Image(found, figures, metrics.RADIUS_UM * px, image.shape[0], margin_um * px))
    return images


def _summary(images: list[metrics.Image], threshold: float, mpp: float | None = None) -> dict[str, float]:
    at = metrics.score(images, threshold)
    row = {"f1": at.f1, "precision": at.precision, "recall": at.recall, "ap": metrics.average_precision(images)}
    if mpp is not None:
        row["figures"] = at.found + at.missed
        row["false_per_mm2"] = at.false / sum(((i.size - 2 * i.margin) * mpp * 1e-3) ** 2 for i in images)
    return {key: round(value, 4) for key, value in row.items()}


def _start_from(network: torch.nn.Module, directory: Path) -> None:
    from transformers import DFineForObjectDetection

    if not (directory / "model.safetensors").is_file():
        raise ModelError(f"{directory.name}: expected trained weights to start from; list that variant first")
    trained = DFineForObjectDetection.from_pretrained(directory, dtype=torch.float32)
    network.load_state_dict(trained.state_dict())
