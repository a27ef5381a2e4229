"""In-memory twins for tests: a detector that finds dark discs exactly, and images made of such discs.

`OracleDetector` is a `Detector` like any other, except that its answer is known beforehand. A disc
cut by a tile's edge gives a cut box, and jitter moves a box differently in every tile, as a trained model does.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from slidescan.detections import Detections
from slidescan.errors import ConfigError

__all__ = ["INK", "TISSUE_GROUND", "OracleDetector", "disc_image", "random_centers"]

INK = (60, 30, 90)  # RGB of a disc: as dark as a mitotic figure
TISSUE_GROUND = (225, 190, 210)  # RGB of eosin-stained stroma: a tissue mask keeps it
_DARK = 128  # grey level, 0..255: a disc's pixel lies below it


@dataclass(frozen=True, slots=True)
class OracleDetector:
    """Finds every connected dark blob of a tile and reports its exact bounding box.

    The score is the blob's mean darkness and depends on its own pixels alone, so two tiles that see a blob whole agree.

    Parameters
    ----------
    mpp : float
        µm/px it asks to be fed at.
    input_px : int
        Tile edge, px.
    object_um : float
        Edge of the largest object, µm.
    max_per_tile : int
        Most detections a tile returns: the best scored.
    jitter_px : float
        Boxes that touch no edge of the tile are moved by up to this much in x and in y, px; the shift depends on the
        blob and its place in the tile, never on chance.
    threshold : float
        Operating score.
    halo_um : float, optional
        Margin a tile needs beyond its core, µm; a blob's place in a tile changes nothing, so none but for its size.

    Examples
    --------
    >>> image = disc_image((64, 64), [(20.5, 30.5)], 5)
    >>> OracleDetector().detect(image[None], 0.5)[0].xyxy
    array([[16., 26., 25., 35.]])
    """

    mpp: float = 1.0
    input_px: int = 256
    object_um: float = 24.0
    max_per_tile: int = 300
    jitter_px: float = 0.0
    threshold: float = 0.5
    halo_um: float | None = None

    @property
    def attributes(self) -> tuple[str, ...]:
        """It says nothing of an object but its class."""
        return ()

    @property
    def name(self) -> str:
        """Name for people."""
        return f"oracle-{self.mpp:g}"

    @property
    def sha256(self) -> str:
        """Digest of the settings, which are all there is to it."""
        return hashlib.sha256(repr(self).encode()).hexdigest()

    @property
    def classes(self) -> Sequence[str]:
        """One class."""
        return ("disc",)

    @property
    def runs_on(self) -> str:
        """Counts pixels, wherever it is."""
        return "cpu"

    @property
    def color(self) -> Literal["raw", "srgb"]:
        """Takes pixels as they come."""
        return "raw"

    def at(self, slide_mpp: float, *, allow_coarse: bool = False) -> OracleDetector:
        """Return itself: discs look the same at any resolution."""
        return self

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        """Return the blobs of each tile (B, H, W, 3) in tile px, best first, scores >= `min_score`."""
        return [self._blobs(tile, min_score) for tile in tiles]

    def _blobs(self, tile: NDArray[np.uint8], min_score: float) -> Detections:
        # Integer sums: the score must not depend on where in the tile the blob lies.
        grey3 = tile.astype(np.int64).sum(2)
        labels, count = ndimage.label(grey3 < 3 * _DARK, np.ones((3, 3), np.int64))
        if not count:
            return Detections.empty()
        index = np.arange(1, count + 1)
        total = ndimage.sum_labels(grey3, labels, index)
        area = np.bincount(labels.ravel(), minlength=count + 1)[1:]
        score = np.clip(1 - total / (3 * 255 * area), 0, 1)
        height, width = tile.shape[:2]
        boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(labels)], np.float64)
        if self.jitter_px:
            whole = (boxes[:, :2] > 0).all(1) & (boxes[:, 2] < width) & (boxes[:, 3] < height)
            for row in np.flatnonzero(whole):
                shift = self._shift(boxes[row].tolist(), int(total[row]))
                boxes[row] = np.clip(boxes[row] + [*shift, *shift], 0, [width, height, width, height])
        order = np.lexsort((boxes[:, 1], boxes[:, 0], -score))[: self.max_per_tile]
        return Detections.build(boxes[order], score[order])[np.asarray(score[order] >= min_score)]

    def _shift(self, box: list[float], total: int) -> tuple[float, float]:
        digest = hashlib.blake2b(repr((box, total)).encode(), digest_size=8).digest()
        x, y = (int.from_bytes(part, "little") / (2**32 - 1) for part in (digest[:4], digest[4:]))
        return (2 * x - 1) * self.jitter_px, (2 * y - 1) * self.jitter_px


def disc_image(
    size_wh: tuple[int, int],
    centers: Sequence[tuple[float, float]] | NDArray[np.float64],
    radius_px: float,
    *,
    ground: int | tuple[int, int, int] = 235,
    ink: int | tuple[int, int, int] = INK,
) -> NDArray[np.uint8]:
    """Draw soft-edged dark discs on plain ground.

    The default ground is clear glass; with `TISSUE_GROUND` a tissue mask keeps all of it.

    Parameters
    ----------
    size_wh : tuple of int
        Width and height, px.
    centers : sequence of (float, float)
        Disc centres (x, y), px; a pixel's own centre is at +0.5. Discs may lie partly or wholly outside.
    radius_px : float
        Radius of every disc, px.
    ground, ink : int or tuple of int
        Grey level or RGB, 0 to 255.

    Returns
    -------
    ndarray of uint8, shape (H, W, 3)

    Examples
    --------
    >>> disc_image((8, 6), [(4, 3)], 2)[3, 4].tolist()
    [60, 30, 90]
    """
    width, height = size_wh
    image = np.empty((height, width, 3), np.uint8)
    image[:] = ground
    under, over = (np.broadcast_to(np.asarray(colour, np.float64), 3) for colour in (ground, ink))
    for x, y in np.asarray(centers, np.float64).reshape(-1, 2):
        reach = radius_px + 1
        left, right = max(0, int(np.floor(x - reach))), min(width, int(np.ceil(x + reach)))
        top, bottom = max(0, int(np.floor(y - reach))), min(height, int(np.ceil(y + reach)))
        if left >= right or top >= bottom:
            continue
        away = np.hypot(np.arange(left, right) + 0.5 - x, np.arange(top, bottom)[:, None] + 0.5 - y)
        cover = np.clip(radius_px - away + 0.5, 0, 1)[..., None]
        part = image[top:bottom, left:right]
        # The darker one wins where two discs touch, so the order of the centres does not matter.
        np.minimum(part, np.rint(under + cover * (over - under)).astype(np.uint8), out=part)
    return image


def random_centers(
    rng: np.random.Generator, size_wh: tuple[int, int], count: int, *, apart_px: float, margin_px: float = 0.0
) -> NDArray[np.float64]:
    """Draw `count` places, no two nearer than `apart_px` and none within `margin_px` of the edge.

    Parameters
    ----------
    rng : numpy.random.Generator
        Where the numbers come from.
    size_wh : tuple of int
        Width and height of the plane, px.
    count : int
        How many.
    apart_px, margin_px : float
        Smallest distances, px; discs of radius r do not touch when `apart_px` is 2r + 3.

    Returns
    -------
    ndarray of float64, shape (count, 2)
        x and y, px.

    Raises
    ------
    ConfigError
        If they do not fit.

    Examples
    --------
    >>> random_centers(np.random.default_rng(0), (100, 80), 5, apart_px=20, margin_px=10).shape
    (5, 2)
    """
    free = np.asarray(size_wh, np.float64) - 2 * margin_px
    out = np.empty((0, 2))
    # 200 tries each: far beyond what a plane less than a third full needs.
    for _ in range(200 * count if (free > 0).all() else 0):
        if len(out) == count:
            break
        place = margin_px + rng.uniform(size=2) * free
        if (np.hypot(*(out - place).T) >= apart_px).all():
            out = np.vstack([out, place])
    if len(out) < count:
        wide, high = size_wh
        raise ConfigError(
            f"random_centers: expected room for {count} places {apart_px:g} px apart in {wide}×{high} px, "
            f"found {len(out)}; ask for fewer"
        )
    return out
