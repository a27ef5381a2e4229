"""Training and test images made of crops: realistic fields, mosaics and empty glass.

Hides how a picture with a figure in a random place and no tell-tale seam is put together. Every crop has its figure in
the middle, so a network shown crops learns the middle; every border between crops must therefore be as likely around
nothing as around a figure: fields paste figures and figure-free discs with the same masks, and the tissue below is laid
from crops whose own figures are covered.

All lengths are px at the maker's `mpp` unless the name says otherwise. The same state of the `numpy.random.Generator`
gives the same image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage
from scipy.spatial import cKDTree

from slidescan.train.augment import Rgb
from slidescan.train.crops import FIGURE_RADIUS_UM, NO_FIGURES, Crop, Figures, blend, cover, density, disc

__all__ = ["FieldMaker", "Sample"]

F32 = NDArray[np.float32]
Sample = tuple[Rgb, Figures]  # image and the figures of which something is seen in it

# Of the discs without a figure: were all cut out anywhere, a nucleus in the middle of a disc would be a figure.
_SHARE_NUCLEI = 0.5
_NEIGHBOURS = 24  # crops of similar stain a field is laid from: about one field of 512 px at 0.25 µm/px


class FieldMaker:
    """Makes images from one split's crops.

    Parameters
    ----------
    crops : sequence of Crop
        All at one mpp; at least a few with a figure.
    seed : int
        For the covered versions, which are made once.
    """

    def __init__(self, crops: Sequence[Crop], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.mpp = crops[0].mpp
        self.crops = list(crops)
        self._edge = crops[0].image.shape[0]
        covered = [cover(rng, crop) for crop in crops]
        self._tissue = [image for image in covered if image is not None]
        self._tissue_of = [crop for crop, image in zip(crops, covered, strict=True) if image is not None]
        self._with_figure = [i for i, crop in enumerate(crops) if len(crop.figures)]
        self._nuclei = [_nuclei(image, self.mpp) for image in self._tissue]
        # Crops of like stain, by mean and spread of colour; each figure's neighbours are found through the same tree.
        tissue_stain = _stain(self._tissue)
        k = min(_NEIGHBOURS, len(self._tissue))
        tree = cKDTree(tissue_stain)
        self._near_tissue = tree.query(tissue_stain, k)[1].reshape(-1, k)
        figure_stain = _stain([crops[i].image for i in self._with_figure])
        k = min(_NEIGHBOURS, len(self._with_figure))
        self._near_figures = cKDTree(figure_stain).query(tissue_stain, k)[1].reshape(-1, k)

    def field(self, rng: np.random.Generator, size: int, n_figures: int, n_decoys: int | None = None) -> Sample:
        """Return tissue of one stain with `n_figures` figures in it and as many discs (or `n_decoys`) without.

        Fewer come where there is no room for so many.
        """
        start = int(rng.integers(len(self._tissue)))
        near = self._near_figures[start]
        figures = [self.crops[self._with_figure[int(near[rng.integers(len(near))])]] for _ in range(n_figures)]
        return self._field(rng, size, start, figures, n_figures if n_decoys is None else n_decoys)

    def survey(
        self, rng: np.random.Generator, size: int, per_mm2: float, share: float = 1.0
    ) -> Iterator[tuple[Callable[[np.random.Generator], Sample], Crop]]:
        """Yield what makes a field, and a crop of its patient, until the figures of every crop were shown once.

        A field is of one patient: all its figures, and the stain of its tissue. There are `per_mm2` figures on average.
        Of each patient a random `share` of the figures is shown, one at least.
        """
        expected = per_mm2 * (size * self.mpp * 1e-3) ** 2
        for patient in sorted({crop.patient for crop in self.crops}):
            own = [crop for crop in self.crops if crop.patient == patient]
            starts = [i for i, crop in enumerate(self._tissue_of) if crop.patient == patient]
            left = [own[i] for i in rng.permutation(len(own)) if len(own[i].figures)]
            left = left[: max(1, round(share * len(left)))]
            while left and starts:
                n, start = int(rng.poisson(expected)), starts[int(rng.integers(len(starts)))]
                yield partial(self._field, size=size, start=start, shown=left[:n], decoys=n), own[0]
                left = left[n:]

    def _field(self, rng: np.random.Generator, size: int, start: int, shown: Sequence[Crop], decoys: int) -> Sample:
        canvas = self._lay_tissue(rng, size, self._near_tissue[start])
        figure_px = FIGURE_RADIUS_UM / self.mpp
        spots: list[NDArray[np.float64]] = []
        figures: list[NDArray[np.float64]] = []
        for i in rng.permutation(len(shown) + decoys):
            spot = rng.uniform(0, size, 2)
            # A disc must not reach over a figure that is already there.
            room = min((float(np.hypot(*(spot - other))) - figure_px for other in spots), default=np.inf)
            if i < len(shown):
                aside = np.linalg.norm(shown[i].figures[:, :2] - self._edge / 2, axis=1)
                middle, *others = shown[i].figures[aside.argsort()]
                for other in others:
                    room = min(room, float(np.hypot(*(other - middle)[:2])) - figure_px * 0.6)
                if self._paste(rng, canvas, shown[i].image, middle[:2], spot, room):
                    figures.append(np.array([*spot, middle[2]]))
                    spots.append(spot)
            else:
                k = int(rng.choice(self._near_tissue[start]))
                nuclei = self._nuclei[k]
                around = rng.choice(nuclei) if len(nuclei) and rng.random() < _SHARE_NUCLEI else None
                if self._paste(rng, canvas, self._tissue[k], around, spot, room):
                    spots.append(spot)
        return (canvas + 0.5).astype(np.uint8), np.array(figures, np.float64).reshape(-1, 3)

    def mosaic(self, rng: np.random.Generator, size: int, empty: float = 0.4, *, roll: bool = False) -> Sample:
        """Return crops side by side, a share `empty` of them figure-free, shifted by a random offset.

        With `roll` the mosaic has just the size wanted (a multiple of the crop's edge) and wraps around; a figure on
        the seam is then cut in two. Without, a window is cut from a larger one.
        """
        edge = self._edge
        cells = size // edge if roll else -(-size // edge) + 1
        canvas = np.empty((cells * edge, cells * edge, 3), np.uint8)
        figures = []
        for y in range(cells):
            for x in range(cells):
                if rng.random() < empty:
                    image, inside = self._tissue[int(rng.integers(len(self._tissue)))], NO_FIGURES
                else:
                    crop = self.crops[self._with_figure[int(rng.integers(len(self._with_figure)))]]
                    image, inside = crop.image, crop.figures
                image, inside = _turn(rng, image, inside)
                canvas[y * edge : (y + 1) * edge, x * edge : (x + 1) * edge] = image
                figures.append(inside + np.array((x * edge, y * edge, 0)))
        centres = np.concatenate(figures)
        dx, dy = (int(v) for v in rng.integers(0, edge, 2))
        if roll:
            canvas = np.roll(canvas, (-dy, -dx), (0, 1))
            centres = centres - (dx, dy, 0)
            centres[:, :2] %= cells * edge
        else:
            canvas = canvas[dy : dy + size, dx : dx + size]
            centres = centres - (dx, dy, 0)
            reach = FIGURE_RADIUS_UM / self.mpp
            centres = centres[((centres > -reach) & (centres < size + reach))[:, :2].all(1)]
        return np.ascontiguousarray(canvas), centres

    def covered(self, rng: np.random.Generator, size: int, n: int, *, nucleus: bool) -> Sample:
        """Return a field in which figures were covered in another way than any that is trained on.

        What is returned as its figures are the `n` places where one was: a network that finds something there has
        learned the cover, the seam or the crop's surroundings and not the figure.

        Parameters
        ----------
        rng, size, n
            As for `field`.
        nucleus : bool
            Cover with a nucleus of the crop's own margin in the middle; else with the tissue of another crop.
        """
        start = int(rng.integers(len(self._tissue)))
        near = self._near_tissue[start]
        covers = []
        for _ in range(n):
            crop = self._tissue_of[int(near[rng.integers(len(near))])]
            if not len(crop.figures):
                continue
            other = self._tissue[int(near[rng.integers(len(near))])]
            radius = round((4.0 if nucleus else 8.0) / self.mpp)  # µm: a nucleus with its rim; a figure with its cell
            source = self._tissue[self._tissue_of.index(crop)] if nucleus else other
            spot = _darkest(source, radius) if nucleus else rng.integers(radius, self._edge - radius + 1, 2)
            patch = source[spot[1] - radius : spot[1] + radius, spot[0] - radius : spot[0] + radius]
            canvas = source.astype(np.float32) if nucleus else crop.image.astype(np.float32)
            for figure in crop.figures:
                blend(canvas, np.rot90(patch, int(rng.integers(1, 4))), disc(radius, 1.5 / self.mpp), figure[:2])
            covers.append(replace(crop, image=(canvas + 0.5).astype(np.uint8)))
        return self._field(rng, size, start, covers, 0)

    def bare(self, rng: np.random.Generator, size: int) -> Sample:
        """Return what is on a slide besides tissue: glass, dirt, pen, plain colours."""
        return (_bare(rng, size) + 0.5).astype(np.uint8), NO_FIGURES

    def edge_of_tissue(self, rng: np.random.Generator, sample: Sample) -> Sample:
        """Return the sample with a part of it replaced by glass along a smooth random border."""
        image, figures = sample
        size = image.shape[0]
        coarse = rng.normal(size=(4, 4)).astype(np.float32)
        wave = np.asarray(Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC))
        soft = rng.uniform(0.01, 0.2)
        keep = np.clip((wave - rng.uniform(-0.8, 0.3)) / soft, 0, 1)
        glass = _bare(rng, size, light=True)
        mixed = glass + keep[..., None] * (image.astype(np.float32) - glass)
        at = np.clip(figures[:, :2].astype(int), 0, size - 1)
        reach = max(1, int(2.5 / self.mpp))  # µm: where most of the chromatin is
        visible = ndimage.minimum_filter(keep, reach)[at[:, 1], at[:, 0]] > 0.7
        hidden = ndimage.maximum_filter(keep, 2 * reach)[at[:, 1], at[:, 0]] < 0.05
        if (~visible & ~hidden).any():  # a figure half faded is neither: keep the tissue whole
            return sample
        return (mixed + 0.5).astype(np.uint8), figures[visible]

    def _lay_tissue(self, rng: np.random.Generator, size: int, near: NDArray[np.intp]) -> F32:
        edge = self._edge
        pitch = edge * rng.uniform(0.7, 0.9)
        canvas = np.empty((size, size, 3), np.float32)
        canvas[:] = self._tissue[int(near[0])].mean((0, 1))
        alpha = _soft_square(edge, rng.uniform(0.03, 0.12) * edge)
        steps = np.arange(-rng.uniform(0, pitch), size + edge / 2, pitch)
        for y in steps:
            for x in steps:
                image, _ = _turn(rng, self._tissue[int(near[rng.integers(len(near))])], NO_FIGURES)
                spot = np.array([x, y]) + rng.uniform(-0.08, 0.08, 2) * edge
                blend(canvas, image, alpha, spot)
        return canvas

    def _paste(
        self,
        rng: np.random.Generator,
        canvas: F32,
        image: Rgb,
        middle: NDArray[np.float64] | None,
        spot: NDArray[np.float64],
        room: float,
    ) -> bool:
        """Paste a turned disc of `image` around `middle` (or any place of it), at most `room` in radius.

        Return False, having done nothing, where a disc that holds a whole figure does not fit.
        """
        soft = rng.uniform(1.0, 3.0) / self.mpp
        low = FIGURE_RADIUS_UM / self.mpp + soft
        if middle is None:
            middle = rng.uniform(low, self._edge - low, 2)
        high = min(middle.min(), self._edge - middle.max(), 15.0 / self.mpp, room)
        if high < low:
            return False
        radius = int(rng.uniform(low, high))
        left, top = (round(float(v)) - radius for v in middle)
        square = Image.fromarray(image).crop((left, top, left + 2 * radius, top + 2 * radius))
        around = (float(middle[0]) - left, float(middle[1]) - top)
        patch = np.asarray(square.rotate(rng.uniform(0, 360), Image.Resampling.BICUBIC, center=around))
        if rng.random() < 0.5:
            patch = patch[:, ::-1]
        blend(canvas, patch, disc(radius, soft), spot)
        return True


def _stain(images: Sequence[Rgb]) -> NDArray[np.float64]:
    """Return mean and spread of each channel, (N, 6)."""
    return np.array([np.concatenate((image.mean((0, 1)), image.std((0, 1)))) for image in images])


def _nuclei(image: Rgb, mpp: float) -> NDArray[np.float64]:
    """Return x, y of the middles of what is dark and of nuclear size, (n, 2)."""
    dark = ndimage.gaussian_filter(density(image, mpp), 1.5 / mpp)  # µm: the smallest nuclei have such a radius
    peaks = (dark == ndimage.maximum_filter(dark, round(4.0 / mpp) + 1)) & (dark > dark.mean() + dark.std() / 2)
    return np.argwhere(peaks)[:, ::-1].astype(np.float64) + 0.5


def _darkest(image: Rgb, radius: int) -> NDArray[np.intp]:
    """Return x, y of the middle of the darkest spot of nuclear size, at least `radius` from the edge."""
    dark = ndimage.gaussian_filter(image.sum(2, dtype=np.float64), radius / 2)[radius:-radius, radius:-radius]
    y, x = np.unravel_index(int(dark.argmin()), dark.shape)
    return np.array([x + radius, y + radius])


def _turn(rng: np.random.Generator, image: Rgb, figures: Figures) -> Sample:
    """Return one of the eight rotations and reflections of a square, figures with it."""
    edge = image.shape[0]
    if rng.random() < 0.5:
        image, figures = image[:, ::-1], figures * (-1, 1, 1) + (edge, 0, 0)
    for _ in range(int(rng.integers(4))):  # 90° counter-clockwise: (x, y) goes to (y, edge - x)
        image, figures = np.rot90(image), figures[:, [1, 0, 2]] * (1, -1, 1) + (0, edge, 0)
    return image, figures


def _soft_square(edge: int, soft: float) -> F32:
    axis = np.minimum(np.arange(edge) + 0.5, np.arange(edge)[::-1] + 0.5)
    ramp = np.clip(axis / soft, 0, 1)
    square: F32 = np.minimum(ramp[:, None], ramp).astype(np.float32)
    return square


def _bare(rng: np.random.Generator, size: int, *, light: bool = False) -> F32:
    """Return glass (`light`) or any plain colour, with shading, specks and strokes, float32 in [0, 255]."""
    base = rng.uniform(215, 255) + rng.normal(0, 3, 3) if light or rng.random() < 0.6 else rng.uniform(0, 255, 3)
    slope = rng.normal(0, 6, (2, 2, 1)).astype(np.float32)
    shade = np.asarray(Image.fromarray(slope[..., 0]).resize((size, size), Image.Resampling.BILINEAR))
    canvas = np.clip(base + shade[..., None], 0, 255).astype(np.float32)
    if not light and rng.random() < 0.5:
        for _ in range(int(rng.integers(1, 12))):  # dirt, bubbles, pen: soft dark or coloured ellipses and strokes
            radius = int(rng.uniform(2, 40))
            alpha = disc(radius, rng.uniform(1, radius)) * rng.uniform(0.2, 0.9)
            alpha = alpha * (np.hypot(*np.mgrid[-1 : 1 : 2j * radius, -1 : 1 : 2j * radius]) > rng.choice([0.0, 0.8]))
            patch = np.broadcast_to(rng.uniform(0, 255, 3), (2 * radius, 2 * radius, 3))
            spot, step = rng.uniform(0, size, 2), rng.normal(0, radius, 2)
            for k in range(int(rng.choice([1, 1, 30]))):
                blend(canvas, patch.astype(np.float32), alpha.astype(np.float32), spot + k * step)
    if rng.random() < 0.7:
        canvas = canvas + rng.normal(0, rng.uniform(0.5, 4), (size, size, 1)).astype(np.float32)
    bare: F32 = np.clip(canvas, 0, 254.5).astype(np.float32)
    return bare
