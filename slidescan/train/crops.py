"""The annotated crops on disk: reading them, splitting them by patient, and covering their figures.

Hides the COCO file and the nominal boxes. After this module a figure is a centre; its box is the nominal one around it.
The crops' own split is by patient; the validation part is taken from train, by patient again, so that no patient of
train, validation and test is shared.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slidescan.errors import ConfigError
from slidescan.train.augment import Rgb

__all__ = ["CROP_MPP", "NO_FIGURES", "OBJECT_UM", "Crop", "Figures", "blend", "cover", "disc", "load_crops"]

F32 = NDArray[np.float32]
Figures = NDArray[np.float64]  # (n, 3): centre x and y in px; atypical 1, typical 0, NaN where nobody said

NO_FIGURES: Figures = np.empty((0, 3))

CROP_MPP = 0.25  # µm/px of the crops, from their scanners
OBJECT_UM = 12.5  # edge of the annotators' nominal box: 50 px of 0.25 µm
# A figure with its cytoplasm, measured on the crops: chromatin rarely reaches beyond 5 µm of the centre.
FIGURE_RADIUS_UM = 5.0
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


def load_crops(data: Path, split: str, *, mpp: float = CROP_MPP, limit: int | None = None) -> list[Crop]:
    """Read the crops of one split at `mpp`.

    Parameters
    ----------
    data : Path
        Directory that holds ``midog21``.
    split : {"train", "validation", "test"}
        Validation is every seventh of the train patients; train is the rest of them.
    mpp : float
        µm/px wanted, a whole multiple of 0.25: crops are averaged down.
    limit : int, optional
        Read only so many, spread over the patients.

    Raises
    ------
    ConfigError
        If the data are not there.
    """
    root = data / "midog21"
    index = root / "annotations.coco.json"
    if not index.is_file():
        raise ConfigError(f"{data}: expected the folder midog21 with annotations.coco.json in it; set --data")
    table = json.loads(index.read_text(encoding="utf-8"))
    figures, on_slide = _figures(table)
    rows = [row for row in table["images"] if (row["benchmark_split"] == "test") == (split == "test")]
    if split != "test":
        patients = sorted({row["slide"] for row in rows})
        held_out = set(patients[3::7])
        rows = [row for row in rows if (row["slide"] in held_out) == (split == "validation")]
    if limit is not None:
        rows = rows[:: max(1, len(rows) // limit)][:limit]
    factor = round(mpp / CROP_MPP)
    size, reach = _CROP_PX, FIGURE_RADIUS_UM / CROP_MPP
    crops = []
    for row in rows:
        with Image.open(root / "images" / row["file_name"]) as picture:
            image = _without_padding(np.asarray(picture.convert("RGB")))
        inside = np.array(figures.get(row["id"], []), np.float64).reshape(-1, 3)
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
    """Return the crop's image with every figure hidden under tissue of its own margin, or None if there is no room."""
    size = crop.image.shape[0]
    figure_px = FIGURE_RADIUS_UM / crop.mpp
    radius = round(7.0 / crop.mpp)  # µm: hides a figure of 5 µm and leaves 2 µm to blend
    image = crop.image
    grid = np.arange(radius, size - radius + 1, max(1, radius // 4), dtype=np.float64)
    spots = np.stack(np.meshgrid(grid, grid), -1).reshape(-1, 2)
    shown = np.concatenate((crop.figures, crop.cut))[:, :2]
    away = np.linalg.norm(spots[:, None] - shown, axis=-1).min(1, initial=np.inf)
    free = spots[away >= radius + figure_px - 1]
    if len(free) == 0:
        return None if len(shown) else image
    canvas = image.astype(np.float32)
    alpha = disc(radius, 2.0 / crop.mpp)
    for centre in shown:
        x, y = free[rng.integers(len(free))].astype(int)
        patch = crop.image[y - radius : y + radius, x - radius : x + radius]
        patch = np.rot90(patch, int(rng.integers(4)))
        blend(canvas, patch, alpha, centre)
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


def _without_padding(image: Rgb) -> Rgb:
    """Fill the black rows and columns beyond the slide's edge with a mirror image of the tissue."""
    dark_x, dark_y = (image.max(axis=(axis, 2)) == 0 for axis in (0, 1))
    if not (dark_x.any() or dark_y.any()):
        return image
    inner = image[~dark_y][:, ~dark_x]
    pads = []
    for dark in (dark_y, dark_x):
        before = int(np.argmin(dark))
        pads.append((before, int(dark.sum()) - before))
    return np.pad(inner, (*pads, (0, 0)), mode="symmetric")
