"""Training windows drawn from annotated slides and pictures.

Hides where a window lies and what of the annotations falls into it. Invariants: a window's objects are where its pixels
show them, whatever it was scaled, cut, turned and joined from; an object is as likely in one place of the window as in
any other, for a network shown objects in the middle learns the middle; what a window shows only in part, or mirrored
beyond the slide's edge, or could not be decoded, is ignored and never background.

The same state of the `numpy.random.Generator` gives the same example.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError
from slidescan.slides import Slide
from slidescan.slides.tissue import tissue_mask
from slidescan.train.annotated import Annotated
from slidescan.train.augment import Rgb

__all__ = ["Example", "Windows"]

F64 = NDArray[np.float64]

_SHOWN = 0.5  # share of the windows drawn around a place, where other tissue is background
_REJECTED = -1  # stands for a class of objects
_AS_IS = 0.5  # share of them in the slide's own plane, not resampled where a scan would not resample either
_SCALE = 1.25  # most by which others are larger or smaller: cells of one kind differ so between tissues and species
_VISIBLE = 0.5  # share of a box from which a cut object is one still
_JOINT = 0.25  # share of a mosaic that each of its parts is at least wide and high
_PICTURE_MM2 = 4.0  # up to it any place is background: a picked field is 2 mm², and too small to find glass on
_THUMBNAIL_PX = 1024  # longer side; 25 µm/px of a slide of 25 mm, finer than the margin around tissue
_PLACES = 1 << 16  # px of tissue remembered a slide: 0.5 MB
_OPEN = 32  # slides open at once; each costs file descriptors


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One training image and what is in it; boxes in its px.

    Parameters
    ----------
    image : ndarray of uint8, shape (N, N, 3)
    xyxy_px : ndarray of float64, shape (n, 4)
        Cut at the image's edge.
    label : ndarray of int64, shape (n,)
    attributes : ndarray of float64, shape (n, A)
        1 yes, 0 no, NaN unknown.
    ignored_xyxy_px : ndarray of float64, shape (m, 4)
        Where nothing is right or wrong.
    """

    image: Rgb
    xyxy_px: F64
    label: NDArray[np.int64]
    attributes: F64
    ignored_xyxy_px: F64


@dataclass(frozen=True, slots=True, eq=False)
class _Places:
    """Tissue of one slide."""

    xy: NDArray[np.int64]
    """Px of a thumbnail, (k, 2)."""
    px_l0: float
    """Edge of such a px, level-0 px."""
    share: float
    """Of the slide."""


class Windows:
    """Draws windows at the µm/px a model is trained at; one thread at a time.

    Parameters
    ----------
    annotated : sequence of Annotated
        With at least one object or rejected place.
    mpp : float
        µm/px of the windows.
    seed : int
        For which places of a slide's tissue are remembered.

    Raises
    ------
    ConfigError
        If nothing is annotated.
    ResolutionError
        If a slide's µm/px is not known.

    Examples
    --------
    >>> from slidescan.slides import memory_slide
    >>> box, nothing = np.array([[40.0, 40, 60, 60]]), np.empty((0, 4))
    >>> slide = memory_slide(np.full((256, 256, 3), 200, np.uint8), 0.25)
    >>> one = Annotated(slide, box, np.zeros(1, np.int64), np.empty((1, 0)), nothing, "p")
    >>> Windows([one], 0.25).window(np.random.default_rng(0), 128).image.shape
    (128, 128, 3)
    """

    def __init__(self, annotated: Sequence[Annotated], mpp: float, *, seed: int = 0) -> None:
        self._annotated, self._mpp = list(annotated), mpp
        self._open: OrderedDict[int, None] = OrderedDict()
        rejected = (np.full(len(one.rejected_xyxy_l0), _REJECTED) for one in self._annotated)
        labels = [np.concatenate(both) for both in zip((one.label for one in self._annotated), rejected, strict=True)]
        shown = np.concatenate([np.empty(0, np.int64), *labels])
        if not len(shown):
            raise ConfigError("training data: expected at least one annotated object to learn, got none")
        rows = np.concatenate([np.stack((np.full(len(of), i), np.arange(len(of))), 1) for i, of in enumerate(labels)])
        self._of_class = [rows[shown == label] for label in np.unique(shown)]  # (k, 2): slide, object or place after
        self._shown = _SHOWN if any(one.whole for one in self._annotated) else 1.0
        rng = np.random.default_rng(seed)
        self._places: list[_Places | None] = []
        area_mm2 = []
        for i, one in enumerate(self._annotated):
            mm2 = one.slide.frame.area_mm2 if one.whole else 0.0
            places = None
            if mm2 > _PICTURE_MM2:
                places = _tissue(self._slide(i), one.ignored_xyxy_l0, rng)
                mm2 *= places.share
            self._places.append(places)
            area_mm2.append(mm2)
        if not sum(area_mm2):  # no tissue found anywhere: any place will do
            self._places = [None] * len(area_mm2)
            area_mm2 = [one.slide.frame.area_mm2 if one.whole else 0.0 for one in self._annotated]
        self._share = np.array(area_mm2) / (sum(area_mm2) or 1.0)

    def window(self, rng: np.random.Generator, size: int) -> Example:
        """Draw one window of `size` px.

        A half of them show the centre of an object, which may be anywhere in the window; classes are equally likely,
        and so are the objects of a class. Rejected places are one class more. The others lie on tissue of slides that
        are annotated as a whole, of which each mm² is equally likely; where there is no such slide, there are none.
        """
        return self._part(rng, size, size)

    def mosaic(self, rng: np.random.Generator, size: int) -> Example:
        """Draw four windows side by side that meet in a random place, together of `size` px."""
        low = max(1, round(_JOINT * size))
        x, y = rng.integers(low, size - low + 1, 2).tolist()
        image = np.empty((size, size, 3), np.uint8)
        parts = []
        for left, top, right, bottom in ((0, 0, x, y), (x, 0, size, y), (0, y, x, size), (x, y, size, size)):
            part = self._part(rng, right - left, bottom - top)
            image[top:bottom, left:right] = part.image
            shift = np.array([left, top, left, top])
            parts.append((part.xyxy_px + shift, part.label, part.attributes, part.ignored_xyxy_px + shift))
        xyxy, label, attributes, ignored = (np.concatenate(column) for column in zip(*parts, strict=True))
        return Example(image, xyxy, label, attributes, ignored)

    def _part(self, rng: np.random.Generator, width: int, height: int) -> Example:
        """Draw a window of any shape."""
        shows = rng.random() < self._shown
        if shows:
            members = self._of_class[int(rng.integers(len(self._of_class)))]
            i, j = members[int(rng.integers(len(members)))].tolist()
            n = len(self._annotated[i].label)
            box = self._annotated[i].xyxy_l0[j] if j < n else self._annotated[i].rejected_xyxy_l0[j - n]
            at_l0 = (box[:2] + box[2:]) / 2
        else:
            i = int(rng.choice(len(self._share), p=self._share))
            at_l0 = self._place(rng, i)
        slide = self._slide(i)
        if rng.random() < _AS_IS:
            plane = slide.plane(self._mpp)
        else:
            plane = slide.frame.at(self._mpp * float(np.exp(rng.uniform(-1, 1) * np.log(_SCALE))))
        flip, quarters = bool(rng.random() < 0.5), int(rng.integers(4))
        wh = np.array([height, width] if quarters % 2 else [width, height])
        whole = np.array(plane.size_wh)
        factor = slide.frame.factor_to(plane)
        at = np.clip(np.floor(at_l0 * factor).astype(int), 0, whole - 1)
        corner = at - rng.integers(0, wh)
        if not shows:  # as much of the slide as fits: nothing is to be seen beyond it
            corner = np.clip(corner, np.minimum(0, whole - wh), np.maximum(0, whole - wh))

        low, high = np.maximum(corner, 0), np.minimum(corner + wh, whole)
        (left, top), (across, down) = low.tolist(), (high - low).tolist()
        pixels = slide.read(left, top, across, down, plane)
        before, after = low - corner, corner + wh - high
        image = np.pad(pixels.rgb, ((before[1], after[1]), (before[0], after[0]), (0, 0)), mode="symmetric")
        (x0, y0), (x1, y1), (w, h) = before.tolist(), (wh - after).tolist(), wh.tolist()
        beyond = np.array([[0, 0, x0, h], [x1, 0, w, h], [x0, 0, x1, y0], [x0, y1, x1, h]], np.float64)
        shift = np.tile(corner, 2)
        holes = np.array([(b.x0, b.y0, b.x1, b.y1) for b in pixels.holes], np.float64).reshape(-1, 4) - shift

        one = self._annotated[i]
        xyxy, label, attributes, ignored = _seen(one, factor, corner, wh)
        centres = (xyxy[:, None, :2] + xyxy[:, None, 2:]) / 2
        kept = ~((centres >= holes[:, :2]) & (centres <= holes[:, 2:])).all(-1).any(1)  # white is no object
        others = _cut(np.concatenate((beyond, holes, one.ignored_xyxy_l0 * factor - shift)), wh)
        ignored = np.concatenate((ignored, others[_area(others) > 0]))
        return _turned(Example(image, xyxy[kept], label[kept], attributes[kept], ignored), flip, quarters)

    def _place(self, rng: np.random.Generator, i: int) -> F64:
        """Return a random point of a slide's tissue, level-0 px."""
        size, places = np.array(self._annotated[i].slide.size_wh, np.float64), self._places[i]
        if places is None:
            return rng.uniform(0, size)
        at_l0: F64 = (places.xy[int(rng.integers(len(places.xy)))] + rng.random(2)) * places.px_l0
        return np.minimum(at_l0, size)

    def _slide(self, i: int) -> Slide:
        """Return a slide; of those read last a few stay open."""
        self._open[i] = None
        self._open.move_to_end(i)
        if len(self._open) > _OPEN:
            oldest, _ = self._open.popitem(last=False)
            self._annotated[oldest].slide.close()
        return self._annotated[i].slide


def _tissue(slide: Slide, ignored_xyxy_l0: F64, rng: np.random.Generator) -> _Places:
    """Return where tissue is that counts: of a slide with a small annotated region, all else would be drawn in vain."""
    pixels, frame = slide.thumbnail(_THUMBNAIL_PX)
    mask = tissue_mask(pixels.rgb, mpp=frame.mpp).mask.copy()
    for x0, y0, x1, y1 in np.rint(ignored_xyxy_l0 * slide.frame.factor_to(frame)).clip(0).astype(np.intp).tolist():
        mask[y0:y1, x0:x1] = False
    y, x = np.nonzero(mask)
    chosen = rng.permutation(len(x))[:_PLACES]
    return _Places(np.stack((x, y), 1)[chosen], frame.factor_to(slide.frame), float(mask.mean()))


def _area(xyxy: F64) -> F64:
    sides = np.maximum(xyxy[:, 2:] - xyxy[:, :2], 0)
    area: F64 = sides[:, 0] * sides[:, 1]
    return area


def _cut(xyxy: F64, wh: NDArray[np.int64]) -> F64:
    cut: F64 = np.clip(xyxy, 0, np.tile(wh, 2))
    return cut


def _seen(
    one: Annotated, factor: float, corner: NDArray[np.int64], wh: NDArray[np.int64]
) -> tuple[F64, NDArray[np.int64], F64, F64]:
    """Return the objects of which a window shows enough, cut at its edge, and the boxes of those it hints at."""
    low_l0, high_l0 = corner / factor, (corner + wh) / factor  # first: a slide may have a million
    near = ((one.xyxy_l0[:, 2:] > low_l0) & (one.xyxy_l0[:, :2] < high_l0)).all(1)
    xyxy = one.xyxy_l0[near] * factor - np.tile(corner, 2)
    cut = _cut(xyxy, wh)
    share = _area(cut) / _area(xyxy)
    kept = share >= _VISIBLE
    return cut[kept], one.label[near][kept], one.attributes[near][kept], cut[(share > 0) & ~kept]


def _turned(example: Example, flip: bool, quarters: int) -> Example:
    """Mirror left to right, then turn counter-clockwise, boxes with the image."""
    image = example.image
    corners = [xyxy.reshape(-1, 2, 2) for xyxy in (example.xyxy_px, example.ignored_xyxy_px)]
    if flip:
        width = image.shape[1]
        image, corners = image[:, ::-1], [xy * (-1, 1) + (width, 0) for xy in corners]
    for _ in range(quarters):  # (x, y) goes to (y, width - x)
        width = image.shape[1]
        image, corners = np.rot90(image), [xy[..., ::-1] * (1, -1) + (0, width) for xy in corners]
    xyxy, ignored = (np.concatenate((xy.min(1), xy.max(1)), 1) for xy in corners)
    return Example(np.ascontiguousarray(image), xyxy, example.label, example.attributes, ignored)
