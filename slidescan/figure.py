"""A figure of one slide for papers: its map in mm, with what was flagged, what was not analysed, and a scale bar.

Made without pyplot: no display is needed, and nothing of the caller's is touched. Lines and text stay vectors; only the
slide and the map are pixels. Nothing in it names the slide.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Patch, Rectangle
from matplotlib.patheffects import withStroke
from numpy.typing import NDArray

from slidescan.anomaly import AnomalyMap, Coverage
from slidescan.errors import ConfigError
from slidescan.flagged import FlaggedRegion
from slidescan.geometry import Box, Frame
from slidescan.hotspot import Hotspot
from slidescan.legend import (
    COVER_TINT,
    HOTSPOT,
    MARK,
    RAMP_END_PER_MM2,
    area_text,
    length_text,
    ramp_rgb,
    round_length_um,
)

__all__ = ["THUMBNAIL_PX", "Plot", "Shown", "draw_map", "scale_bar"]

Shown = Literal["density", "score", "coverage"]

THUMBNAIL_PX = 2048  # longer side of the slide under the map, px: 300 a printed inch on a page
_WIDTH_IN = (2.5, 40.0)  # of a figure: below, its text does not fit; above is a poster
_MOST_HEIGHT_IN = 9.0  # a printed page less its caption
_LEFT_IN, _RIGHT_IN, _TOP_IN = 0.5, 0.1, 0.3  # inches around the map: ticks and their label; the last tick; title
_BAR_IN = 0.65  # more at the right, where there is a colour bar
_TICKS_IN, _ROW_IN = 0.42, 0.17  # below the map: ticks and their label; a row of the legend
_ENTRY_IN = 1.45  # a legend's entry
_TEXT_PT, _SMALL_PT = 8.0, 7.0  # what journals print at least
_NUMBER_PT, _DIGIT = 6.0, 0.65  # of a region's number; how wide a digit of DejaVu Sans is, of its size
_DOTS_PER_IN = 300  # what journals ask of pictures
_SCREEN_DOTS_PER_IN = 110  # 770 px for a page's width: that of a notebook's cell
_LINE_PT, _HATCH_PT, _BAR_PT = 1.0, 0.35, 2.5
_LEAST_OUTLINE_PT = 5.0  # edge of an outline: a smaller one would be a speck
_MOST_BAR = 0.35  # of the field, so that the bar hides little
_PALE = 0.55  # share of white over the slide: the map is what is to be seen
_INK, _GREY = "#1E1E24", "#6E6E76"
_LEAST, _STRONGEST = 0.05, 0.85  # of the ramp, as in the overview: where colour begins; the alpha it reaches
_ON_SLIDE = 0.65  # the alpha it reaches where there is a slide to be seen through it
_STEPS = 256  # of a colour bar
_RGB = NDArray[np.uint8]

# What was not analysed: how it is hatched, and what the legend says of it.
_UNSEEN = {
    Coverage.BACKGROUND: ("////", _GREY, "not analysed: no tissue"),
    Coverage.READ_FAILED: ("xxxxx", "#8C1414", "could not be read"),
}
_SEEN = {Coverage.ANALYSED: "analysed", Coverage.SATURATED: "detector saturated"}


class Plot(Figure):
    """A figure that is shown as the last line of a notebook's cell, too, which otherwise pyplot sees to."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png", dpi=_SCREEN_DOTS_PER_IN)
        return file.getvalue()


def draw_map(
    anomaly: AnomalyMap,
    frame: Frame,
    *,
    what: Shown,
    title: str,
    regions: Sequence[FlaggedRegion] = (),
    hotspot: Hotspot | None = None,
    thumbnail: _RGB | None = None,
    objects: str = "figures",
    um: float | None = None,
    width_in: float = 7.0,
) -> Plot:
    """Draw the map of a slide.

    Parameters
    ----------
    anomaly : AnomalyMap
    frame : Frame
        Level 0 of the slide.
    what : {"density", "score", "coverage"}
        Figures per mm², highest score, or only what was analysed.
    title : str
        A line above it.
    regions : sequence of FlaggedRegion
        Outlined and numbered by rank, as far as numbers have room; one too small to be seen gets a square.
    hotspot : Hotspot, optional
        Its square.
    thumbnail : ndarray of uint8, shape (H, W, 3), optional
        The whole slide, any size, shown pale and grey; without it the map is on white.
    objects : str
        What is counted.
    um : float, optional
        Length of the scale bar, µm; default: a round one.
    width_in : float
        Width, inches: 7 is a page's, 3.5 a column's.

    Raises
    ------
    ConfigError
        If `what`, `um` or `width_in` cannot be meant.
    """
    if what not in ("density", "score", "coverage"):
        raise ConfigError(f"what: expected density, score or coverage, got {what!r}")
    if not _WIDTH_IN[0] <= width_in <= _WIDTH_IN[1]:
        raise ConfigError(f"width_in: expected {_WIDTH_IN[0]:g} to {_WIDTH_IN[1]:g} inches, got {width_in!r}")
    width_mm, height_mm = (frame.um(px) / 1000 for px in frame.size_wh)
    anomaly = anomaly.fitted(round(width_in * _DOTS_PER_IN))  # more than can be printed takes gigabytes
    with rc_context({"hatch.linewidth": _HATCH_PT}):  # which a patch and a collection take when they are made
        handles = _handles(anomaly, what, marked=bool(regions), hotspot=hotspot)
        figure, axes = _laid_out(width_mm, height_mm, width_in, handles, bar=what != "coverage")
        _hatches(axes, anomaly)
    if thumbnail is not None:
        grey = thumbnail @ np.array([0.299, 0.587, 0.114])  # luma of ITU-R BT.601
        extent = (0, width_mm, height_mm, 0)
        axes.imshow(grey * (1 - _PALE) + 255 * _PALE, cmap="gray", vmin=0, vmax=255, extent=extent, rasterized=True)
    _tints(axes, anomaly, on_slide=thumbnail is not None)
    if what != "coverage":
        image = _heat(axes, anomaly, what, _STRONGEST if thumbnail is None else _ON_SLIDE)
        _colour_bar(figure, axes, image, what, objects)
    _outlines(figure, axes, regions, frame)
    if hotspot is not None:
        box = hotspot.box_l0.scale(frame.mpp / 1000)
        edge = _share(HOTSPOT)
        axes.add_patch(Rectangle((box.x0, box.y0), box.width, box.height, fill=False, edgecolor=edge, linewidth=1.4))
    axes.set(xlim=(0, width_mm), ylim=(height_mm, 0), xlabel="mm", ylabel="mm")
    axes.set_title(title, fontsize=_TEXT_PT, color=_INK, loc="left", pad=4, parse_math=False)
    scale_bar(axes, width_mm, height_mm, um_per_unit=1000, um=um)
    return figure


def scale_bar(axes: Axes, width: float, height: float, *, um_per_unit: float, um: float | None = None) -> None:
    """Draw a bar and its length in the lower left corner of axes that begin at 0 and have y down.

    Parameters
    ----------
    axes : Axes
    width, height : float
        Extent of the axes, in their unit.
    um_per_unit : float
        µm per unit of the axes.
    um : float, optional
        Length of the bar, µm; default: a round one of about a third of the width.

    Raises
    ------
    ConfigError
        If the bar would not fit.
    """
    if um is not None and not 0 < um <= 0.9 * width * um_per_unit:
        raise ConfigError(f"um: expected a scale bar of up to {0.9 * width * um_per_unit:.3g} µm, got {um!r}")
    bar_um = round_length_um(_MOST_BAR * width * um_per_unit) if um is None else um
    x, y = 0.05 * width, 0.94 * height
    axes.plot(
        [x, x + bar_um / um_per_unit], [y, y], color="black", linewidth=_BAR_PT, solid_capstyle="butt",
        path_effects=[withStroke(linewidth=_BAR_PT + 1.4, foreground="white")], zorder=5,
    )  # fmt: skip
    axes.annotate(
        length_text(bar_um), (x, y), (0, _BAR_PT), textcoords="offset points", fontsize=6, color="black", va="bottom",
        path_effects=[withStroke(linewidth=1.5, foreground="white")], zorder=5,
    )  # fmt: skip


def _laid_out(
    width_mm: float, height_mm: float, width_in: float, handles: list[Patch], *, bar: bool
) -> tuple[Plot, Axes]:
    """Return a figure with axes of the slide's shape, and the legend below them."""
    columns = max(1, int((width_in - _LEFT_IN) / _ENTRY_IN))
    below_in = _TICKS_IN + _ROW_IN * -(-len(handles) // columns) + 0.05 * bool(handles)
    map_w_in = width_in - _LEFT_IN - _RIGHT_IN - _BAR_IN * bar
    map_h_in = map_w_in * height_mm / width_mm
    if map_h_in > _MOST_HEIGHT_IN - _TOP_IN - below_in:  # a tall slide
        map_h_in = _MOST_HEIGHT_IN - _TOP_IN - below_in
        map_w_in = map_h_in * width_mm / height_mm
    height_in = _TOP_IN + map_h_in + below_in
    figure = Plot(figsize=(width_in, height_in), dpi=_DOTS_PER_IN)
    axes = figure.add_axes(
        (_LEFT_IN / width_in, below_in / height_in, map_w_in / width_in, map_h_in / height_in), aspect="equal"
    )
    axes.tick_params(labelsize=_SMALL_PT, color=_GREY, labelcolor=_INK)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(fontsize=_SMALL_PT, color=_INK)
    for spine in axes.spines.values():
        spine.set(color=_GREY, linewidth=0.6)
    if handles:
        figure.legend(
            handles=handles, loc="lower left", bbox_to_anchor=(_LEFT_IN / width_in, 0), ncols=columns,
            fontsize=_SMALL_PT, frameon=False, handlelength=1.4, handleheight=0.9, borderaxespad=0.2, borderpad=0,
            columnspacing=1.2, labelspacing=0.35,
        )  # fmt: skip
    return figure, axes


def _heat(axes: Axes, anomaly: AnomalyMap, what: Shown, strongest: float) -> AxesImage:
    """Lay density or score over the axes; transparent where there is nothing, and where nothing was analysed."""
    strength = np.linspace(0, 1, _STEPS)
    alpha = np.clip((strength - _LEAST) * 4, 0, strongest)
    colours = ListedColormap(np.column_stack([ramp_rgb(strength) / 255, alpha]).tolist())
    end = RAMP_END_PER_MM2 if what == "density" else 1.0
    plane = anomaly.density if what == "density" else anomaly.score
    return axes.imshow(
        np.ma.masked_invalid(plane), cmap=colours, norm=Normalize(0, end), extent=_extent(anomaly),
        interpolation="nearest", rasterized=True,
    )  # fmt: skip


def _colour_bar(figure: Plot, axes: Axes, image: AxesImage, what: Shown, objects: str) -> None:
    """Explain the colours, at the right of the axes."""
    place, (width_in, height_in) = axes.get_position(), figure.get_size_inches()
    tall = min(place.height, 2.4 / height_in)
    beside = figure.add_axes((place.x1 + 0.12 / width_in, place.y1 - tall, 0.12 / width_in, tall))
    bar = figure.colorbar(image, cax=beside, extend="max" if what == "density" else "neither", extendfrac=0.06)
    bar.set_ticks(np.linspace(*bar.mappable.get_clim(), 5).tolist())
    bar.set_label(f"{objects} per mm²" if what == "density" else "highest score", fontsize=_SMALL_PT, color=_INK)
    bar.ax.tick_params(labelsize=_SMALL_PT, color=_GREY, labelcolor=_INK)
    bar.outline.set(edgecolor=_GREY, linewidth=0.6)
    bar.solids.set(rasterized=True)  # type: ignore[union-attr]  # as vectors its steps have seams


def _tints(axes: Axes, anomaly: AnomalyMap, *, on_slide: bool) -> None:
    """Colour what was analysed; over the slide so lightly that it is seen."""
    tint = np.zeros((*anomaly.coverage.shape, 4), np.uint8)
    for state in _SEEN:
        tint[anomaly.coverage == state] = (*COVER_TINT[state], 90 if on_slide and state == Coverage.ANALYSED else 215)
    axes.imshow(tint, extent=_extent(anomaly), interpolation="nearest", rasterized=True)


def _hatches(axes: Axes, anomaly: AnomalyMap) -> None:
    """Hatch what was not analysed, in lines and not in px."""
    height, width = anomaly.coverage.shape
    x, y = (_with_edges(n) * anomaly.frame.mpp / 1000 for n in (width, height))
    for state, (hatch, colour, _) in _UNSEEN.items():
        inside = _in_state(anomaly, state)
        if inside.any():
            padded = np.pad(inside.astype(float), 1, mode="edge")
            drawn = axes.contourf(x, y, padded, levels=[0.5, 1.5], colors="none", hatches=[hatch])
            drawn.set(edgecolor=colour, linewidth=0)


def _outlines(figure: Plot, axes: Axes, regions: Sequence[FlaggedRegion], frame: Frame) -> None:
    """Outline and number regions, the best on top."""
    if not regions:
        return
    inches = axes.get_position().width * figure.get_size_inches()[0]
    mm_per_pt = frame.um(frame.size_wh[0]) / 1000 / (72 * inches)
    least_mm = _LEAST_OUTLINE_PT * mm_per_pt
    outlines, numbers = [], []
    for region in regions:
        box = region.box_l0.scale(frame.mpp / 1000)
        outline = region.polygon_l0 * (frame.mpp / 1000)
        if max(box.width, box.height) < least_mm:
            box = box.grow((least_mm - max(box.width, box.height)) / 2)
            outline = np.array([[box.x0, box.y0], [box.x1, box.y0], [box.x1, box.y1], [box.x0, box.y1]])
        outlines.append(outline)
        numbers.append((str(region.rank), box))
    for number, (x, y) in _placed(numbers, frame.bounds.scale(frame.mpp / 1000), mm_per_pt):
        axes.annotate(
            number, (x, y), fontsize=_NUMBER_PT, color=_share(MARK), ha="center", va="center",
            path_effects=[withStroke(linewidth=1.5, foreground="white")], annotation_clip=True,
        )  # fmt: skip
    halo = [withStroke(linewidth=_LINE_PT + 1.2, foreground="white")]  # blue on dark red is hard to see
    axes.add_collection(
        PolyCollection(
            outlines[::-1], facecolors="none", edgecolors=_share(MARK), linewidths=_LINE_PT, path_effects=halo
        )
    )


def _placed(
    numbers: Sequence[tuple[str, Box]], slide: Box, mm_per_pt: float
) -> Iterator[tuple[str, tuple[float, float]]]:
    """Yield each number and where its middle is, mm: on the slide, at a corner of its box, not on one before it."""
    taken: list[Box] = []
    for number, box in numbers:
        width, height = (_NUMBER_PT * mm_per_pt * share for share in (_DIGIT * len(number), 1.0))
        for x, y in product((box.x1 + width / 2, box.x0 - width / 2), (box.y0, box.y1)):
            room = Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)
            if slide.x0 <= x <= slide.x1 and not any(room.intersects(other) for other in taken):
                taken.append(room)
                yield number, (x, y)
                break


def _handles(anomaly: AnomalyMap, what: Shown, *, marked: bool, hotspot: Hotspot | None) -> list[Patch]:
    """Explain what is in the figure, and nothing that is not."""
    handles = []
    if marked:
        handles.append(Patch(facecolor="none", edgecolor=_share(MARK), linewidth=_LINE_PT, label="flagged region"))
    if hotspot is not None:
        said = f"hotspot: {hotspot.count} in {area_text(hotspot.area_mm2)}"
        handles.append(Patch(facecolor="none", edgecolor=_share(HOTSPOT), linewidth=1.4, label=said))
    for state, said in _SEEN.items():
        if (anomaly.coverage == state).any() and (what == "coverage" or state != Coverage.ANALYSED):
            handles.append(Patch(facecolor=_share(COVER_TINT[state]), edgecolor=_GREY, linewidth=0.4, label=said))
    for state, (hatch, colour, said) in _UNSEEN.items():
        if _in_state(anomaly, state).any():
            handles.append(Patch(facecolor="none", edgecolor=colour, hatch=hatch, linewidth=0.4, label=said))
    return handles


def _in_state(anomaly: AnomalyMap, state: Coverage) -> NDArray[np.bool_]:
    """Return where the map is in a state; what is outside is background to a reader."""
    inside: NDArray[np.bool_] = anomaly.coverage == state
    return inside | (anomaly.coverage == Coverage.OUTSIDE) if state == Coverage.BACKGROUND else inside


def _with_edges(n: int) -> NDArray[np.float64]:
    """Return the places of n px along an axis, their middles, with the two edges around them; px."""
    return np.concatenate([[0.0], np.arange(n) + 0.5, [float(n)]])


def _extent(anomaly: AnomalyMap) -> tuple[float, float, float, float]:
    """Return what the map covers, mm: its last px may reach beyond the slide."""
    height, width = anomaly.coverage.shape
    return 0, width * anomaly.frame.mpp / 1000, height * anomaly.frame.mpp / 1000, 0


def _share(rgb: tuple[int, int, int]) -> tuple[float, float, float]:
    """Return a colour as matplotlib takes it."""
    red, green, blue = rgb
    return red / 255, green / 255, blue / 255
