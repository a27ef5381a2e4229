"""Crops of mitotic figures as a source: fields, mosaics, glass, phantoms and tissue from elsewhere.

Hides what the training images are mixed of. A crop's scene is 32 µm wide with a figure in its middle; nothing here
shows a network that: see `slidescan.train.fields`.

What is measured on, of patients that nothing was trained on then:

- ``field``: realistic fields of 25 figures per mm² (a dense hotspot), ``sparse``: of 10 per mm². Each figure is shown
  once (of the sparse ones a part), at a random place and angle, blended into figure-free tissue of its patient's stain.
- ``mosaic``: crops side by side, rolled by a random offset, 40 % of them without a figure.
- ``covered``: fields whose figures were covered in two ways that no training image knows; nothing is to be found there.
- ``bare`` and ``phantom``: glass, dirt and plain colours; slidescan's own slides with look-alikes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from slidescan.detections import Detector
from slidescan.errors import ConfigError
from slidescan.phantom import Phantom
from slidescan.train.annotated import Annotated
from slidescan.train.augment import Rgb
from slidescan.train.crops import (
    CROP_MPP,
    FIGURE_RADIUS_UM,
    NO_FIGURES,
    OBJECT_UM,
    Crop,
    Figures,
    index_digest,
    load_crops,
)
from slidescan.train.fields import FieldMaker, Sample
from slidescan.train.metrics import RADIUS_UM, Image
from slidescan.train.negatives import load_negatives, show
from slidescan.train.settings import TrainSettings, VariantSettings
from slidescan.train.source import LEAST_SCORE, Split
from slidescan.train.windows import Example

__all__ = ["CropSource", "ShownImage"]

# Seeds of the phantoms trained on and measured on; demonstrations and tests use small ones.
_PHANTOM_SEEDS, _PHANTOM_TEST_SEED = range(9000, 9012), 8000
_DENSE_PER_MM2, _SPARSE_PER_MM2 = 25.0, 10.0  # figures: a dense hotspot, and a proliferating tumour
_COVERED_PER_FIELD = 4
_ASSEMBLED_PER_MM2 = 100.0  # dense, for the number of comparisons
# Of training images: in either direction alike, and logarithm of how much more in each. Patients nothing was trained on
# (every third), 1,300 steps, with this and a stain jitter of 0.35 against 0 and 0.25: F1 on mosaics 0.90 to 0.93, AP on
# fields 0.71 to 0.73.
_ZOOM, _STRETCH = (0.8, 1.25), 0.2
_WHOLE = ("train", "validation")  # what is trained on when all is chosen
# Of a training image: nearer to its edge about half a figure is seen, and whether it is one nobody can say.
_SEEN_UM = 2.0
_MARGIN_UM = 4.0  # of an image in which nothing counts: of a figure there, half may be cut off


@dataclass(frozen=True)
class ShownImage:
    """An image no larger than a tile, made anew whenever it is needed: hundreds would fill the memory.

    Parameters
    ----------
    kind : str
    make : callable
        Returns the image and its figures, the same every time.
    mpp : float
    patient, scanner : str
    """

    kind: str
    make: Callable[[], Sample]
    mpp: float
    patient: str = ""
    scanner: str = ""

    def find(self, detector: Detector) -> Image:
        """Return what the detector finds on the whole image at once."""
        image, figures = self.make()
        found = detector.detect(image[None], LEAST_SCORE)[0]
        return Image(
            found,
            figures[:, :2],
            RADIUS_UM / self.mpp,
            len(image),
            _MARGIN_UM / self.mpp,
            patient=self.patient,
            scanner=self.scanner,
            mpp=self.mpp,
            attributes=figures[:, 2:],
        )

    def patch(self, x: float, y: float, edge_px: int) -> Rgb:
        """Return a square of the image, its edge repeated beyond."""
        image, _ = self.make()
        pad = edge_px // 2 + 1
        padded = np.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        left, top = round(x) + pad - edge_px // 2, round(y) + pad - edge_px // 2
        return padded[top : top + edge_px, left : left + edge_px]


class CropSource:
    """Draws images made of the crops below a directory.

    Parameters
    ----------
    data : Path
        Holds ``midog21`` and maybe ``dsb2018_he``.
    settings, variant : TrainSettings, VariantSettings
    trained : sequence of str
        Splits that training images are made of.
    half : int, optional
        0 or 1: show every second of the validation patients alone, and train on the others at most.

    Raises
    ------
    ConfigError
        If the crops are not there.
    """

    def __init__(
        self,
        data: Path,
        settings: TrainSettings,
        variant: VariantSettings,
        trained: Sequence[str] = ("train",),
        half: int | None = None,
    ) -> None:
        if not math.isclose(variant.mpp / CROP_MPP, max(1, round(variant.mpp / CROP_MPP))):
            raise ConfigError(f"mpp: expected a multiple of {CROP_MPP} µm/px for midog21, got {variant.mpp:g}")
        self._data, self._settings, self._variant, self._trained = data, settings, variant, trained
        self._half = half
        self._training: _Mix | None = None

    @property
    def identity(self) -> str:
        """Digest of the crops' index; how it is split, the settings say."""
        return index_digest(self._data)

    def told(self) -> list[str]:
        """Return nothing: the crops are always the same."""
        return []

    def example(self, rng: np.random.Generator, size: int) -> Example:
        """Draw one training image: a field, a mosaic, glass, a phantom or tissue from elsewhere."""
        if self._training is None:  # made when first needed: measuring does without
            others = None if self._half is None else 1 - self._half
            self._training = _Mix(self._maker(*self._trained, half=others), self._data, self._settings)
        scale_xy = np.exp(rng.uniform(np.log(_ZOOM[0]), np.log(_ZOOM[1])) + rng.uniform(-_STRETCH, _STRETCH, 2))
        width, height = (max(1, round(n)) for n in size / scale_xy)
        scene, figures = self._training.scene(rng, max(width, height))
        x, y = (int(rng.integers(0, max(0, len(scene) - n) + 1)) for n in (width, height))
        scene = scene[y : y + height, x : x + width]
        scale_xy = size / np.array(scene.shape[1::-1])
        figures = (figures - (x, y, 0)) * (*scale_xy, 1)
        px_per_um = float(np.sqrt(scale_xy.prod())) / self._variant.mpp
        half, seen, reach = (um * px_per_um for um in (OBJECT_UM / 2, _SEEN_UM, FIGURE_RADIUS_UM))
        xyxy = np.concatenate((figures[:, :2] - half, figures[:, :2] + half), 1).clip(0, size)
        whole, shown = (((figures >= inset) & (figures < size - inset))[:, :2].all(1) for inset in (seen, -reach))
        image = np.asarray(Picture.fromarray(scene).resize((size, size), Picture.Resampling.BILINEAR))
        answers = figures[whole, 2 : 2 + len(self._settings.attributes)]
        return Example(image, xyxy[whole], np.zeros(whole.sum(), np.int64), answers, xyxy[shown & ~whole])

    def whole(self) -> CropSource:
        """Return the source whose training images show the validation patients as well."""
        return CropSource(self._data, self._settings, self._variant, _WHOLE)

    def halves(self) -> Sequence[CropSource]:
        """Return two sources that train on one half of the validation patients too and show the other."""
        return [CropSource(self._data, self._settings, self._variant, _WHOLE, half) for half in (0, 1)]

    def shown(self, split: Split) -> Iterator[ShownImage]:
        """Yield what is measured on; for validation, what the threshold is chosen by, and by its fields calibration."""
        maker, mpp, size = self._maker(split, half=self._half), self._variant.mpp, self._variant.input_px
        seed, n = self._settings.seed + (1 if split == "validation" else 2), self._settings.eval_images
        edge = 3 * len(maker.crops[0].image)

        def seeded(kind: int, i: int, make: Callable[..., Sample], **more: Any) -> Callable[[], Sample]:
            return lambda: make(np.random.default_rng((seed, kind, i)), **more)

        for k, (kind, density) in enumerate({"field": _DENSE_PER_MM2, "sparse": _SPARSE_PER_MM2}.items()):
            # As many fields of either kind.
            survey = maker.survey(np.random.default_rng((seed, k)), size, density, density / _DENSE_PER_MM2)
            for i, (make, crop) in enumerate(islice(survey, n if self._settings.crops else None)):
                yield ShownImage(kind, seeded(k, i, make), mpp, crop.patient, crop.scanner)
        for i in range(n if split == "validation" else 3 * n):
            yield ShownImage("mosaic", seeded(2, i, maker.mosaic, size=edge, roll=True), mpp)
        if split == "validation":
            return
        for i in range(n):
            kind, nucleus = (("covered by other tissue", False), ("covered by a nucleus", True))[i % 2]
            covered = seeded(3, i, maker.covered, size=size, n=_COVERED_PER_FIELD, nucleus=nucleus)
            yield ShownImage(kind, covered, mpp)
        for i in range(n // 2):
            yield ShownImage("bare", seeded(4, i, maker.bare, size=size), mpp)
        for i in range(n // 8):
            image, figures = _phantom(_PHANTOM_TEST_SEED + i, mpp, 2 * size)
            yield ShownImage("phantom", seeded(5, i, _window, image=image, figures=figures, size=size), mpp)

    def assembled(self, split: Split) -> Iterator[Rgb]:
        """Yield fields of three by three tiles and more; of few crops one, and smaller."""
        maker, few = self._maker(split, half=self._half), self._settings.crops is not None
        size = (2 if few else 4) * self._variant.input_px
        figures = round(_ASSEMBLED_PER_MM2 * (size * self._variant.mpp * 1e-3) ** 2)
        for i in range(1 if few else 4):
            yield maker.field(np.random.default_rng((self._settings.seed, 6, i)), size, figures)[0]

    def annotated(self, split: Literal["train"] | Split) -> tuple[Annotated, ...]:
        """Return nothing: crops are of no slide that could have been scanned."""
        return ()

    def _maker(self, *splits: str, half: int | None) -> FieldMaker:
        s, mpp, made_of = self._settings, self._variant.mpp, list[Crop]()
        for split in splits:
            crops = load_crops(self._data, split, mpp=mpp, validation_share=s.validation_share, limit=s.crops)
            if split == "validation" and half is not None:
                patients = sorted({crop.patient for crop in crops})[half::2]
                crops = [crop for crop in crops if crop.patient in patients]
            made_of += crops
        return FieldMaker(made_of, s.seed)


class _Mix:
    """Draws the scenes of training images, in the shares of the settings."""

    def __init__(self, maker: FieldMaker, data: Path, settings: TrainSettings) -> None:
        self._maker, self._settings = maker, settings
        self._negatives = load_negatives(data)
        edge = round(512 / maker.mpp)  # 0.26 mm² of phantom a seed
        seeds = _PHANTOM_SEEDS if settings.share_phantom else []
        if settings.crops:
            seeds, edge = seeds[:1], round(128 / maker.mpp)
        self._phantoms = [_phantom(seed, maker.mpp, edge) for seed in seeds]

    def scene(self, rng: np.random.Generator, size: int) -> Sample:
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
            return show(rng, negative, like, self._maker.mpp, size), NO_FIGURES
        if limits[2] <= kind < limits[3] and self._phantoms:
            return _window(rng, *self._phantoms[int(rng.integers(len(self._phantoms)))], size)
        figures = int(rng.poisson(expected)) if rng.random() < 0.85 else 0
        sample = self._maker.field(rng, size, figures, int(rng.poisson(expected)))
        return self._maker.edge_of_tissue(rng, sample) if rng.random() < 0.2 else sample


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
    unknown = np.full((len(slide.truth), 1), np.nan)
    return slide.render(0, 0, size, size), np.concatenate((slide.truth.centers, unknown), 1)


def _window(rng: np.random.Generator, image: NDArray[np.uint8], figures: Figures, size: int) -> Sample:
    size = min(size, image.shape[0])
    x, y = (int(v) for v in rng.integers(0, image.shape[0] - size + 1, 2))
    inside = ((figures[:, :2] >= (x, y)) & (figures[:, :2] < (x + size, y + size))).all(1)
    return image[y : y + size, x : x + size], figures[inside] - (x, y, 0)
