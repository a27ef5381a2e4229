"""What a detector learns from and is measured on, whatever it was made of.

A `Source` draws training images and lists what to measure, by split; there are two: crops that are made into fields
(`slidescan.train.mitosis`) and annotated slides or pictures of one's own (`slidescan.train.own`). `Batches` puts their
images together, and those of decided slides and mined windows: one size a batch, changed as scanners and stainers
would, and packed for the loss.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal, Protocol

import numpy as np
import torch

from slidescan.detections import Detector
from slidescan.train.annotated import Annotated
from slidescan.train.augment import Rgb, augment
from slidescan.train.loop import Batch
from slidescan.train.loss import Target
from slidescan.train.metrics import Image
from slidescan.train.settings import TrainSettings, VariantSettings
from slidescan.train.windows import Example, Windows

__all__ = ["LEAST_SCORE", "Batches", "Shown", "Source", "Split", "pack"]

Split = Literal["validation", "test"]
LEAST_SCORE = 0.01  # from which on detections are measured: precision at the end of a curve is next to nothing there


class Shown(Protocol):
    """One image to measure a detector on."""

    @property
    def kind(self) -> str:
        """What it is, such as ``field``; each kind has its own numbers."""
        ...

    def find(self, detector: Detector) -> Image:
        """Return what the detector finds there, from the lowest scores on, beside what is there."""
        ...

    def patch(self, x: float, y: float, edge_px: int) -> Rgb:
        """Return the square of `edge_px` px around a point of the image that `find` spoke of."""
        ...


class Source(Protocol):
    """Training images and what to measure."""

    @property
    def identity(self) -> str:
        """Digest of what is trained on and of what is chosen by."""
        ...

    def told(self) -> list[str]:
        """Return what was read, a line each split."""
        ...

    def example(self, rng: np.random.Generator, size: int) -> Example:
        """Draw one training image of `size` px at the variant's µm/px."""
        ...

    def whole(self) -> Source:
        """Return the source whose training images show the validation patients as well."""
        ...

    def halves(self) -> Sequence[Source]:
        """Return two sources that train on one half of the validation patients too and show the other; or none."""
        ...

    def shown(self, split: Split) -> Iterator[Shown]:
        """Yield what to measure on; nothing of it is trained on, but of validation at last by `whole`."""
        ...

    def assembled(self, split: Split) -> Iterator[Rgb]:
        """Yield images of many tiles, at the variant's µm/px, to shift the grid of tiles on."""
        ...

    def annotated(self, split: Literal["train"] | Split) -> Sequence[Annotated]:
        """Return the slides of a split: those measured on nothing else may teach; none where images are composed."""
        ...


class Batches:
    """Draws the training batches of a source.

    Parameters
    ----------
    source : Source
    settings, variant : TrainSettings, VariantSettings
    mined : sequence of ndarray
        Windows without objects that the detector took for some; a share of the images is cut from them.
    decided : Windows, optional
        Of slides that reviewers decided on; a share of the images.
    """

    def __init__(
        self,
        source: Source,
        settings: TrainSettings,
        variant: VariantSettings,
        mined: Sequence[Rgb] = (),
        decided: Windows | None = None,
    ) -> None:
        self._source, self._settings, self._tile_px, self._mined = source, settings, variant.tile_px, mined
        self._decided = decided

    def __call__(self, rng: np.random.Generator) -> Batch:
        """Return one batch: images (B, N, N, 3) and their targets."""
        size = int(rng.choice(self._tile_px))
        count = max(1, round(self._settings.batch_mpx * 1e6 / size**2))
        examples = []
        for _ in range(count):
            example = self._example(rng, size)
            examples.append(replace(example, image=augment(rng, example.image, self._settings.stain_jitter)))
        return pack(examples)

    def of(self, source: Source) -> Batches:
        """Return the same with another source."""
        other = copy.copy(self)
        other._source = source
        return other

    def _example(self, rng: np.random.Generator, size: int) -> Example:
        kind, share_decided = rng.random(), self._settings.share_decided if self._decided else 0.0
        if self._decided and kind < share_decided:
            return self._decided.window(rng, size)
        if self._mined and kind < share_decided + self._settings.share_mined:
            return self._of_mined(rng, size)
        return self._source.example(rng, size)

    def _of_mined(self, rng: np.random.Generator, size: int) -> Example:
        rows = []
        edge = len(self._mined[0])
        for _ in range(-(-size // edge)):  # side by side: their own joints are in every batch, around nothing
            row = [self._mined[int(i)] for i in rng.integers(len(self._mined), size=-(-size // edge))]
            rows.append(np.concatenate([np.rot90(window, int(rng.integers(4))) for window in row], 1))
        image = np.ascontiguousarray(np.concatenate(rows)[:size, :size])
        nothing = np.empty((0, 4))
        return Example(image, nothing, np.empty(0, np.int64), np.empty((0, len(self._settings.attributes))), nothing)


def pack(examples: Sequence[Example]) -> Batch:
    """Stack examples of one size; boxes become cxcywh shares of the image."""
    images = np.stack([example.image for example in examples])
    height, width = images.shape[1:3]
    targets = []
    for example in examples:
        boxes, ignored = (
            torch.from_numpy(np.concatenate(((xyxy[:, :2] + xyxy[:, 2:]) / 2, xyxy[:, 2:] - xyxy[:, :2]), 1)).float()
            / torch.tensor([width, height, width, height])
            for xyxy in (example.xyxy_px, example.ignored_xyxy_px)
        )
        attributes = torch.from_numpy(example.attributes).float()
        targets.append(Target(boxes, torch.from_numpy(example.label), ignored, attributes))
    return images, targets
