"""Fields of view side by side for papers and talks: in order, all at one scale, each with a line above it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex, overload

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError
from slidescan.flagged import FlaggedRegion
from slidescan.geometry import Box, Frame
from slidescan.legend import MARK
from slidescan.provenance import as_scanned
from slidescan.slides import Slide

if TYPE_CHECKING:
    from slidescan.figure import Plot

__all__ = ["FlaggedRegions", "View", "contact_sheet", "corners", "field_of_view", "middle_of_field"]

_GREY = "#6E6E76"
_TILE_IN, _HEADING_IN = 1.7, 0.3  # inches of a field of view, and of the line above it
_LINE_IN, _MOST_CHARACTERS = 0.13, 27  # of 7 points: the height of one more line, and what a field is wide
_MOST_PX = 4096  # edge of a field: 50 MB of RGB, more than any screen shows


class FlaggedRegions(tuple[FlaggedRegion, ...]):  # noqa: SLOT001  # a tuple's own slots must be empty
    """Flagged regions by falling evidence: a tuple, which can be seen.

    Examples
    --------
    >>> result.flagged(24).plot(slide).savefig("sheet.png")  # doctest: +SKIP
    """

    _fingerprint: str
    _frame: Frame

    def __new__(cls, regions: Iterable[FlaggedRegion], *, fingerprint: str, frame: Frame) -> FlaggedRegions:
        """Hold regions of the slide that `fingerprint` tells, whose level 0 is `frame`."""
        self = super().__new__(cls, regions)
        self._fingerprint, self._frame = fingerprint, frame
        return self

    @overload
    def __getitem__(self, key: SupportsIndex) -> FlaggedRegion: ...
    @overload
    def __getitem__(self, key: slice) -> FlaggedRegions: ...
    def __getitem__(self, key: SupportsIndex | slice) -> FlaggedRegion | FlaggedRegions:
        """Return one, or some that can be seen, too."""
        if isinstance(key, slice):
            return FlaggedRegions(super().__getitem__(key), fingerprint=self._fingerprint, frame=self._frame)
        return super().__getitem__(key)

    def __getnewargs_ex__(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (tuple(self),), {"fingerprint": self._fingerprint, "frame": self._frame}

    def plot(self, slide: Slide | str | Path, *, columns: int = 6, fov_um: float = 64.0, px: int = 192) -> Plot:
        """Return a contact sheet: a field of view of each region, its outline, rank, highest score and class.

        The field shows the middle of the region; of one that is larger, its best detection, which has an outline, too.

        Parameters
        ----------
        slide : Slide, str or Path
            The one that was scanned.
        columns : int
        fov_um : float
            Edge of a field, µm.
        px : int
            Edge of a field, px.

        Raises
        ------
        ConfigError
            If the slide is not the one that was scanned, is open at another scale, or a setting cannot be meant.
        SlideError
            If the slide cannot be read.
        """
        slide = as_scanned(slide, self._fingerprint, self._frame)
        frame, views = slide.frame, []
        for region in self:
            middle_l0 = middle_of_field(region.box_l0, region.peak_box_l0, frame.px(fov_um))
            outlines_l0 = [region.polygon_l0]
            if region.n > 1:
                outlines_l0.append(corners(region.peak_box_l0))
            views.append(
                View(
                    field_of_view(slide, middle_l0, fov_um, px),
                    [(outline - middle_l0) * frame.mpp + fov_um / 2 for outline in outlines_l0],
                    f"{region.rank} · {region.peak:.2f} · {region.label}",
                )
            )
        return contact_sheet(views, columns=columns, fov_um=fov_um)


class View(NamedTuple):
    """A field of view."""

    rgb: NDArray[np.uint8]
    """(px, px, 3)"""
    outlines_um: Sequence[NDArray[np.float64]]
    """What it is about: (N, 2) each, not closed, µm from the upper left corner."""
    said: str
    """The line above it."""
    color: str = _GREY
    """Of that line, and of the frame."""


def corners(box: Box) -> NDArray[np.float64]:
    """Return the corners of a box, (4, 2)."""
    return np.array([(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1)])


def middle_of_field(box_l0: Box, within_l0: Box, fov_l0: float) -> tuple[float, float]:
    """Return where a field of view is centred: on a box, or where it is larger than the field, on one within it.

    Examples
    --------
    >>> middle_of_field(Box(0, 0, 100, 60), Box(0, 0, 10, 10), 256)
    (50.0, 30.0)
    >>> middle_of_field(Box(0, 0, 900, 60), Box(0, 0, 10, 10), 256)
    (5.0, 5.0)
    """
    shown = box_l0 if max(box_l0.width, box_l0.height) <= fov_l0 else within_l0
    return (shown.x0 + shown.x1) / 2, (shown.y0 + shown.y1) / 2


def field_of_view(slide: Slide, middle_l0: tuple[float, float], fov_um: float, px: int) -> NDArray[np.uint8]:
    """Return a square of the slide, uint8 (px, px, 3) RGB; white outside the slide.

    Parameters
    ----------
    slide : Slide
    middle_l0 : tuple of float
        x, y, level-0 px.
    fov_um : float
        Edge, µm.
    px : int
        Edge, px. Where that is finer than the slide its pixels are enlarged.

    Raises
    ------
    ConfigError
        If `fov_um` or `px` cannot be meant.
    SlideError
        If the slide cannot be read.
    """
    if not (math.isfinite(fov_um) and fov_um > 0):
        raise ConfigError(f"fov_um: expected a positive number of µm, got {fov_um!r}")
    if not 1 <= px <= _MOST_PX:
        raise ConfigError(f"px: expected 1 to {_MOST_PX} px, got {px!r}")
    plane = slide.frame.at(fov_um / px)
    x, y = (round(at * slide.frame.factor_to(plane) - px / 2) for at in middle_l0)
    return slide.read(x, y, px, px, plane).rgb


def contact_sheet(views: Sequence[View], *, columns: int = 6, fov_um: float = 64.0) -> Plot:
    """Draw fields of view with outline and scale bar; ``.savefig("sheet.png")`` needs no display.

    Parameters
    ----------
    views : sequence of View
    columns : int
    fov_um : float
        Edge of each, µm.

    Raises
    ------
    ConfigError
        If there are no columns.
    """
    from matplotlib.patches import Polygon

    from slidescan.figure import Plot, scale_bar

    if columns < 1:
        raise ConfigError(f"columns: expected 1 or more, got {columns}")
    columns = min(columns, max(1, len(views)))
    rows = max(1, math.ceil(len(views) / columns))
    heading_in = _HEADING_IN + _LINE_IN * max((view.said.count("\n") for view in views), default=0)
    width_in, height_in = columns * (_TILE_IN + 0.1), rows * (_TILE_IN + heading_in)
    figure = Plot(figsize=(width_in, height_in))
    share = heading_in / (_TILE_IN + heading_in)
    grid = figure.add_gridspec(rows, columns, left=0, right=1, bottom=0.1 / height_in, top=1 - heading_in / height_in)
    grid.update(wspace=0.06, hspace=share / (1 - share))
    mark = [part / 255 for part in MARK]
    for place, view in enumerate(views):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        # Axes in µm, whatever the pixels.
        axes.imshow(view.rgb, extent=(0, fov_um, fov_um, 0))
        for outline_um in view.outlines_um:
            axes.add_patch(Polygon(outline_um, fill=False, edgecolor=mark, linewidth=1))
        axes.set(xlim=(0, fov_um), ylim=(fov_um, 0), xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set(color=view.color, linewidth=2.5)
        axes.set_title(
            "\n".join(map(_fitting, view.said.splitlines())), fontsize=7, color=view.color, pad=4, parse_math=False
        )
        scale_bar(axes, fov_um, fov_um, um_per_unit=1)
    if not views:
        figure.text(0.5, 0.5, "nothing to show", ha="center", va="center")
    return figure


def _fitting(line: str) -> str:
    """Cut the middle out of a line that would run over its neighbours'."""
    if len(line) <= _MOST_CHARACTERS:
        return line
    half = _MOST_CHARACTERS // 2
    return f"{line[:half]}…{line[-half:]}"
