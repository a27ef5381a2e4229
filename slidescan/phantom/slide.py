"""The phantom itself: what it is made of, its truth, and any box of it.

Invariants: truth is exact (a figure is drawn within half a px of its box's centre), and the same pixel has the same
value in every box it is asked for in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slidescan.detections import Detections
from slidescan.errors import ConfigError
from slidescan.geometry import Frame
from slidescan.phantom.layout import OBJECT_UM, interpolate, layout_of
from slidescan.phantom.pixels import CELL_PX, GLASS, cell

__all__ = ["Phantom"]


@dataclass(frozen=True)
class Phantom:
    """A procedural H&E slide; every box renders on its own and every figure's place is known.

    Parameters
    ----------
    size_wh : tuple of int
        Level-0 width and height, px.
    mpp : float
        µm per level-0 px, 0.1 to 4.
    seed : int
        Another seed is another slide, stain included.
    n_figures : int
        Mitotic figures to scatter; fewer where they would come closer than 30 µm.
    plant_l0 : sequence of (float, float)
        Centres (x, y), level-0 px, of further figures; tissue is grown around them. With `block_px` they lie in the
        block and repeat with it.
    tissue : float
        Share of the slide that is tissue, 0 to 1; at 1 there is no glass.
    n_look_alikes : int
        Dark things that are no mitosis, scattered likewise.
    block_px : int, optional
        Repeat the first `block_px` square over the slide; where no whole block fits there is glass.

    Raises
    ------
    ConfigError
        If a value is out of range.

    Examples
    --------
    >>> slide = Phantom((1024, 1024), tissue=1.0, n_figures=3, plant_l0=((512, 512),))
    >>> len(slide.truth), slide.render(500, 500, 64, 32).shape
    (4, (32, 64, 3))
    """

    size_wh: tuple[int, int] = (12288, 12288)
    mpp: float = 0.25
    seed: int = 0
    n_figures: int = 60
    plant_l0: Sequence[tuple[float, float]] = ()
    tissue: float = 0.3
    n_look_alikes: int = 120
    block_px: int | None = None

    def __post_init__(self) -> None:
        # Plain tuples of plain numbers, so that the phantom hashes (its pixels are cached by it) and pickles small.
        width, height = (int(n) for n in self.size_wh)
        object.__setattr__(self, "size_wh", (width, height))
        object.__setattr__(self, "seed", int(self.seed))
        object.__setattr__(self, "plant_l0", tuple((float(x), float(y)) for x, y in self.plant_l0))
        if min(self.size_wh) < 1:
            raise ConfigError(f"phantom size_wh: expected two sizes of at least 1 px, got {self.size_wh}")
        if not 0.1 <= self.mpp <= 4:
            raise ConfigError(f"phantom mpp: expected 0.1 to 4 µm/px, got {self.mpp}")
        if not 0 <= self.tissue <= 1:
            raise ConfigError(f"phantom tissue: expected a share from 0 to 1, got {self.tissue}")
        if min(self.seed, self.n_figures, self.n_look_alikes) < 0:
            raise ConfigError("phantom seed, n_figures, n_look_alikes: expected 0 or more, got a negative number")
        if self.block_px is not None:
            if not 1 <= self.block_px <= min(width, height):
                raise ConfigError(f"phantom block_px: expected 1 to {min(width, height)} px, got {self.block_px}")
            width = height = self.block_px
        for x, y in self.plant_l0:
            if not (0 <= x < width and 0 <= y < height):
                raise ConfigError(f"phantom plant_l0: expected centres inside {width}×{height} px, got ({x:g}, {y:g})")

    @property
    def frame(self) -> Frame:
        """The level-0 plane."""
        return Frame(self.size_wh, self.mpp)

    @property
    def truth(self) -> Detections:
        """Every mitotic figure: 12.5 µm squares, level-0 px, label 0, score 1; planted ones first."""
        return self._boxes(look_alikes=False)

    @property
    def look_alikes(self) -> Detections:
        """Everything planted to mislead, boxed as the truth is."""
        return self._boxes(look_alikes=True)

    def render(self, x: int, y: int, w: int, h: int) -> NDArray[np.uint8]:
        """Return the pixels of one level-0 box.

        The same pixel has the same value whatever box it is asked for in. Outside the slide is plain glass.

        Parameters
        ----------
        x, y, w, h : int
            Left, top, width and height, level-0 px.

        Returns
        -------
        ndarray of uint8, shape (h, w, 3)
            RGB.
        """
        if w < 1 or h < 1:
            raise ConfigError(f"phantom box: expected at least 1×1 px, got {w}×{h}")
        out = np.full((h, w, 3), round(GLASS), np.uint8)
        block = self._block
        for ox, oy in self._origins(x, y, x + w, y + h):
            left, top = max(x, ox), max(y, oy)
            right, bottom = min(x + w, ox + block.size_wh[0]), min(y + h, oy + block.size_wh[1])
            for cy in range((top - oy) // CELL_PX, -((oy - bottom) // CELL_PX)):
                for cx in range((left - ox) // CELL_PX, -((ox - right) // CELL_PX)):
                    x0, y0 = ox + cx * CELL_PX, oy + cy * CELL_PX
                    x1, y1 = min(right, x0 + CELL_PX), min(bottom, y0 + CELL_PX)
                    xa, ya = max(left, x0), max(top, y0)
                    out[ya - y : y1 - y, xa - x : x1 - x] = cell(block, cx, cy)[ya - y0 : y1 - y0, xa - x0 : x1 - x0]
        return out

    def tissue_map(self, mpp: float) -> NDArray[np.bool_]:
        """Return where tissue was laid, lumens and fat included.

        Parameters
        ----------
        mpp : float
            µm/px of the map.

        Returns
        -------
        ndarray of bool, shape (H, W)
            The rendered edge is soft and wanders by about 15 µm around it.
        """
        frame = self.frame.at(mpp)
        out = np.zeros(frame.size_wh[::-1], np.bool_)
        edge = layout_of(self._block).maps["edge"]
        step = mpp / self.mpp
        x_l0, y_l0 = ((np.arange(n, dtype=np.float64) + 0.5) * step for n in frame.size_wh)
        for ox, oy in self._origins(0, 0, *self.size_wh):
            cols = np.flatnonzero((x_l0 >= ox) & (x_l0 < ox + self._block.size_wh[0]))
            rows = np.flatnonzero((y_l0 >= oy) & (y_l0 < oy + self._block.size_wh[1]))
            out[np.ix_(rows, cols)] = interpolate(edge, (y_l0[rows] - oy) * self.mpp, (x_l0[cols] - ox) * self.mpp) > 0
        return out

    @property
    def _block(self) -> Phantom:
        if self.block_px is None:
            return self
        return dataclasses.replace(self, size_wh=(self.block_px, self.block_px), block_px=None)

    def _origins(self, x0: int, y0: int, x1: int, y1: int) -> list[tuple[int, int]]:
        """Origins (level-0 px) of the blocks that meet a box; one at (0, 0) where nothing repeats."""
        axes = []
        for low, high, size in ((x0, x1, self.size_wh[0]), (y0, y1, self.size_wh[1])):
            step, count = (size, 1) if self.block_px is None else (self.block_px, size // self.block_px)
            axes.append([i * step for i in range(max(0, low // step), min(count, -(-high // step)))])
        return [(ox, oy) for oy in axes[1] for ox in axes[0]]

    def _boxes(self, *, look_alikes: bool) -> Detections:
        layout = layout_of(self._block)
        centers = layout.centers_um[layout.is_figure != look_alikes] / self.mpp
        shifts = np.array(self._origins(0, 0, *self.size_wh), np.float64)
        centers = (shifts[:, None, :] + centers[None, :, :]).reshape(-1, 2)
        half = OBJECT_UM / self.mpp / 2
        return Detections.build(np.hstack([centers - half, centers + half]), np.ones(len(centers)))
