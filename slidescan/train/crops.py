"""The annotated crops on disk: reading them, splitting them by patient, and covering their figures.

Hides the COCO file and the nominal boxes. After this module a figure is a centre; its box is the nominal one around it.
The crops' own split is by patient; the validation part is taken from train, by patient again, so that no patient of
train, validation and test is shared.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from slidescan.errors import ConfigError
from slidescan.train.augment import Rgb

__all__ = ["CROP_MPP", "NO_FIGURES", "OBJECT_UM", "Crop", "Figures", "blend", "cover", "density", "disc", "load_crops"]

F32 = NDArray[np.float32]
Figures = NDArray[np.float64]  # (n, 3): centre x and y in px; atypical 1, typical 0, NaN where nobody said

NO_FIGURES: Figures = np.empty((0, 3))

CROP_MPP = 0.25  # µm/px of the crops, from their scanners
OBJECT_UM = 12.5  # edge of the annotators' nominal box: 50 px of 0.25 µm
# A figure with its cytoplasm, measured on the crops: chromatin rarely reaches beyond 5 µm of the centre.
FIGURE_RADIUS_UM = 5.0
# The second plate of a late figure and chromosomes that strayed: how far from the annotated centre they lie, µm, and
# how dark they are next to the darkest there, both smoothed.
_PART_UM, _PART_SHARE, _PART_RADIUS_UM = 10.0, 0.75, 3.0
_PLATE_UM = 3.5  # from the centre on, what is dark is not under the middle of the figure's own cover
_SMOOTH_UM = 0.75  # standard deviation: of a dark speck little is left
_CROP_PX = 128


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """A square of tissue with the figures in it.

    Parameters
    ----------
    image : ndarray of uint8, shape (N, N, 3)
    mpp : float
        µm/px of `image`.
    figures : Figures, shape (n, 3)
        Centres x, y of the mitotic figures, px, and whether each is atypical.
    patient : str
        Whose tissue; splits never part a patient.
    scanner : str
    """

    image: Rgb
    mpp: float
    figures: Figures
    patient: str
    scanner: str = ""
    cut: Figures = field(default_factory=lambda: NO_FIGURES)
    """Figures of the same slide whose centre lies beyond the edge and of which a part is seen."""


def index_digest(data: Path) -> str:
    """Return the sha256 of the file that lists the crops."""
    return hashlib.sha256(_index(data).read_bytes()).hexdigest()


def _index(data: Path) -> Path:
    index = data / "midog21" / "annotations.coco.json"
    if not index.is_file():
        raise ConfigError(f"{data}: expected the folder midog21 with annotations.coco.json in it; set --data")
    return index


def load_crops(
    data: Path, split: str, *, mpp: float = CROP_MPP, validation_share: float = 0.2, limit: int | None = None
) -> list[Crop]:
    """Read the crops of one split at `mpp`.

    Parameters
    ----------
    data : Path
        Directory that holds ``midog21``.
    split : {"train", "validation", "test"}
        By patient: test is the benchmark's own, validation a part of its train, train the rest of that.
    mpp : float
        µm/px wanted, a whole multiple of 0.25: crops are averaged down.
    validation_share : float
        Share of the patients, a half at most: every second, third, ... of them.
    limit : int, optional
        Read only so many, spread over the patients.

    Raises
    ------
    ConfigError
        If the data are not there.
    """
    index = _index(data)
    root, table = index.parent, json.loads(index.read_text(encoding="utf-8"))
    figures, on_slide = _figures(table)
    rows = [row for row in table["images"] if (row["benchmark_split"] == "test") == (split == "test")]
    if split != "test":
        patients = sorted({row["slide"] for row in rows})
        held_out = set(patients[1 :: max(2, round(1 / validation_share))])
        rows = [row for row in rows if (row["slide"] in held_out) == (split == "validation")]
    if limit is not None:
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    factor = round(mpp / CROP_MPP)
    size, reach = _CROP_PX, FIGURE_RADIUS_UM / CROP_MPP
    crops = []
    for row in rows:
        with Image.open(root / "images" / row["file_name"]) as picture:
            image, pads = _without_padding(np.asarray(picture.convert("RGB")))
        inside = _mirrored(np.array(figures.get(row["id"], []), np.float64).reshape(-1, 3), pads)
        around = on_slide[row["slide"]] - (row["x0"], row["y0"], 0)
        beyond = ((around < 0) | (around >= size))[:, :2].any(1)
        near = ((around > -reach) & (around < size + reach))[:, :2].all(1)
        if factor > 1:
            image = np.asarray(Image.fromarray(image).reduce(factor))
        scale = (factor, factor, 1)
        crops.append(
            Crop(image, mpp, inside / scale, row["slide"], row.get("scanner", ""), around[beyond & near] / scale)
        )
    return crops


def cover(rng: np.random.Generator, crop: Crop) -> Rgb | None:
    """Return the crop's image with every figure hidden under tissue of its own margin, or None where none is hidden.

    The figure is a disc around its centre, and what is as dark beside it: the plates of a late figure lie up to 10 µm
    from there, and half a plate left over is a figure that nobody annotated. So is a dark nucleus in the clear
    cytoplasm of a figure: what is laid over it is paler than the crop, and where something as dark is left the crop
    is not used.
    """
    shown = np.concatenate((crop.figures, crop.cut))[:, :2]
    dense = density(crop.image, crop.mpp)
    away_um = _away_px(crop.figures[:, :2], len(dense)) * crop.mpp
    # From this density on it may be a part of the figure, (n, 1, 1).
    part = _PART_SHARE * np.where(away_um < FIGURE_RADIUS_UM, dense, 0).max((1, 2), initial=0, keepdims=True)
    peaks = dense == ndimage.maximum_filter(dense, round(4.0 / crop.mpp) + 1)
    beside = (away_um > _PLATE_UM) & (away_um < _PART_UM) & (dense >= part)
    rests = np.argwhere(peaks & beside.any(0))[:, ::-1] + 0.5
    canvas = crop.image.astype(np.float32)
    figure_px, rest_px = FIGURE_RADIUS_UM / crop.mpp, _PART_RADIUS_UM / crop.mpp
    # µm: hides a figure of 5 µm, or a plate, and leaves 2 µm to blend.
    for centres, radius_um in ((shown, 7.0), (rests, 5.5)):
        radius = round(radius_um / crop.mpp)
        grid = np.arange(radius, len(canvas) - radius + 1, max(1, radius // 4))
        spots = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
        far, aside = (np.linalg.norm(spots[:, None] - xy, axis=-1).min(1, initial=np.inf) for xy in (shown, rests))
        darkest, dark = (
            smooth(dense, 2 * radius)[spots[:, 1], spots[:, 0]]
            for smooth in (ndimage.maximum_filter, ndimage.uniform_filter)
        )
        free = (far >= radius + figure_px - 1) & (aside >= radius + rest_px - 1)
        free &= (darkest < part.min(initial=np.inf)) & (dark <= dense.mean())
        spots = spots[free][np.argsort(dark[free])[: -(-free.sum() // 4)]]  # the palest quarter
        alpha = disc(radius, 2.0 / crop.mpp)
        for centre in centres:
            if len(spots) == 0:
                return None
            x, y = spots[rng.integers(len(spots))]
            patch = crop.image[y - radius : y + radius, x - radius : x + radius]
            patch = np.rot90(patch, int(rng.integers(4)))
            blend(canvas, patch, alpha, centre)
    if ((away_um < _PART_UM) & (density(canvas, crop.mpp) >= part)).any():
        return None
    return (canvas + 0.5).astype(np.uint8)


def disc(radius: int, soft: float) -> F32:
    """Return a (2r, 2r) mask, 1 in the middle and falling to 0 over the last `soft` px of the radius.

    Examples
    --------
    >>> disc(4, 2.0).shape, float(disc(4, 2.0)[4, 4]), float(disc(4, 2.0)[0, 0])
    ((8, 8), 1.0, 0.0)
    """
    axis = np.arange(2 * radius) - radius + 0.5
    distance = np.hypot(axis[:, None], axis)
    mask: F32 = np.clip((radius - distance) / max(soft, 1e-3), 0, 1).astype(np.float32)
    return mask


def blend(canvas: F32, patch: Rgb | F32, alpha: F32, centre: NDArray[np.float64]) -> None:
    """Lay `patch` over `canvas` with its middle at `centre` (x, y); what sticks out is cut."""
    height, width = alpha.shape
    x0, y0 = round(float(centre[0]) - width / 2), round(float(centre[1]) - height / 2)
    top, left = max(0, -y0), max(0, -x0)
    bottom, right = min(height, canvas.shape[0] - y0), min(width, canvas.shape[1] - x0)
    if top >= bottom or left >= right:
        return
    under = canvas[y0 + top : y0 + bottom, x0 + left : x0 + right]
    under += alpha[top:bottom, left:right, None] * (patch[top:bottom, left:right] - under)


def density(image: Rgb | F32, mpp: float) -> F32:
    """Return the optical density of all colours together, smoothed."""
    dense: F32 = -np.log((image.astype(np.float32) + 1) / 256).sum(2)
    return ndimage.gaussian_filter(dense, _SMOOTH_UM / mpp)  # type: ignore[no-any-return]


def _away_px(centres: NDArray[np.float64], edge: int) -> NDArray[np.float64]:
    """Return how far each px of a square is from each centre (x, y), shape (n, edge, edge)."""
    y, x = np.mgrid[:edge, :edge] + 0.5
    away: NDArray[np.float64] = np.hypot(x - centres[:, 0, None, None], y - centres[:, 1, None, None])
    return away


def _mirrored(figures: Figures, pads: Sequence[tuple[int, int]]) -> Figures:
    """Return the figures and their mirror images where the crop reaches beyond its slide."""
    for axis, (before, after) in zip((1, 0), pads, strict=True):
        for seam in {before, _CROP_PX - after} - {0, _CROP_PX}:
            image = figures.copy()
            image[:, axis] = 2 * seam - image[:, axis]
            inside = (image[:, axis] >= 0) & (image[:, axis] < _CROP_PX)
            figures = np.concatenate((figures, image[inside]))
    return figures


def _figures(table: dict[str, Any]) -> tuple[dict[int, list[tuple[float, float, float]]], dict[str, Figures]]:
    """Return the figures of each image, in its own px, and those of each slide, in the slide's px.

    The experts judged the figure a crop was made for; where another crop shows it too, its number tells.
    """
    images = {row["id"]: row for row in table["images"]}
    verdict = {
        name.removeprefix("MIDOG21_"): row["majority"]
        for row in images.values()
        if (name := Path(row["file_name"]).stem)
    }
    by_image: dict[int, list[tuple[float, float, float]]] = {}
    by_slide: dict[str, set[tuple[float, float, float]]] = {row["slide"]: set() for row in images.values()}
    for item in table["annotations"]:
        if item["category_id"] != 1:  # 2 is an imposter: it stays, as a negative
            continue
        row = images[item["image_id"]]
        x, y = _centre(item["bbox"])
        said = verdict.get(str(item.get("source", "")).rpartition("#")[2])
        atypical = float("nan") if said is None else float(said == "Atypical")
        by_image.setdefault(row["id"], []).append((x, y, atypical))
        by_slide[row["slide"]].add((x + row["x0"], y + row["y0"], atypical))
    return by_image, {slide: np.array(sorted(found)).reshape(-1, 3) for slide, found in by_slide.items()}


def _centre(xywh: list[float]) -> tuple[float, float]:
    """Return the centre of a nominal 50 px box of which the crop's border may have cut a part."""
    size, nominal = _CROP_PX, OBJECT_UM / CROP_MPP
    centre = []
    for low, extent in ((xywh[0], xywh[2]), (xywh[1], xywh[3])):
        high = low + extent
        if extent < nominal - 2 and low <= 0:
            centre.append(high - nominal / 2)
        elif extent < nominal - 2 and high >= size:
            centre.append(low + nominal / 2)
        else:
            centre.append((low + high) / 2)
    return centre[0], centre[1]


def _without_padding(image: Rgb) -> tuple[Rgb, list[tuple[int, int]]]:
    """Fill the black rows and columns beyond the slide's edge with a mirror image of the tissue.

    Return how many they are as well: above and below, left and right.
    """
    dark_x, dark_y = (image.max(axis=(axis, 2)) == 0 for axis in (0, 1))
    pads = [(int(np.argmin(dark)), int(np.argmin(dark[::-1]))) for dark in (dark_y, dark_x)]
    inner = image[~dark_y][:, ~dark_x]
    return np.pad(inner, (*pads, (0, 0)), mode="symmetric"), pads
