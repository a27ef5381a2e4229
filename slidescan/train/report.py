"""Pictures of how good a detector is and of what it gets wrong: curves, the worst mistakes, and the course of training.

Draws only; `metrics` judges. Pictures hold neither file nor patient names: they are made to be shown.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from numpy.typing import NDArray
from PIL import Image as Picture

from slidescan.train.metrics import Image, calibration_error, curve, mistakes, reliability, score

__all__ = ["draw_curves", "draw_losses", "draw_worst"]

_DPI = 100  # px per inch; with sizes in inches below it only sets the scale of text, which is in points
_WIDTH_PX, _HEIGHT_PX = 800, 600  # of a chart
# Colours that the colour-blind tell apart (Okabe and Ito 2008); each line has a dash of its own besides.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
_DASHES = ("-", "--", "-.", ":")
_INK, _FAINT = "#1e1e24", "#b8b8c0"
_ISO_F1 = (0.2, 0.4, 0.6, 0.8, 0.9)
_FROC_PER_MM2 = (0.1, 100.0)  # from one false alarm on a biopsy of 10 mm² to more than a dense hotspot has figures
_FEW_POINTS = 20  # of a loss: fewer are marked, for a line through one of them is nothing
_MOST_POINTS = 300  # of a loss: more of them are averaged, and the curve can still be read

_COLUMNS, _PATCH_PX, _GAP_PX, _MARGIN_PX = 6, 126, 6, 7  # of the page of mistakes: 800 px wide with its margins
_HEADING_PX, _SCORE_PX = 40, 24


def draw_curves(kinds: Mapping[str, Sequence[Image]], threshold: float, directory: Path) -> None:
    """Write ``pr.png``, ``froc.png`` and ``reliability.png`` into `directory`, one line a kind of image.

    Kinds without truths have no recall and are left out of the first two.

    Parameters
    ----------
    kinds : mapping of str to sequence of Image
        By the name to show.
    threshold : float
        The operating point, marked with a disc.
    directory : Path
        Must exist.
    """
    _draw_recall(kinds, threshold, directory / "pr.png", froc=False)
    _draw_recall(kinds, threshold, directory / "froc.png", froc=True)
    _draw_reliability(kinds, directory / "reliability.png")


def draw_worst(
    patches: Sequence[Callable[[float, float, int], NDArray[np.uint8]]],
    images: Sequence[Image],
    threshold: float,
    path: Path,
    *,
    window_um: float = 25.0,
    most: int = 24,
) -> None:
    """Write one page of the worst mistakes, each in the middle of its patch, its score below.

    Above the false detections, highest score first; below the missed truths, the best score within the radius under
    each, lowest first.

    Parameters
    ----------
    patches : sequence of callable
        One for each of `images`: returns the RGB square of so many px around x, y.
    images : sequence of Image
    threshold : float
    path : Path
        PNG to write.
    window_um : float
        Edge of a patch, µm.
    most : int
        Patches of either half.
    """
    false, missed = (half[:most] for half in mistakes(images, threshold))
    rows = [max(1, -(-len(half) // _COLUMNS)) for half in (false, missed)]
    pitch_px = _PATCH_PX + _GAP_PX, _PATCH_PX + _SCORE_PX
    width_px = 2 * _MARGIN_PX + _COLUMNS * pitch_px[0] - _GAP_PX
    height_px = 2 * _HEADING_PX + sum(rows) * pitch_px[1] + _MARGIN_PX
    figure = _figure(width_px, height_px)
    top_px = 0
    titles = "false, highest first (score below", "missed, lowest first (best score nearby below"
    for title, half, n in zip(titles, (false, missed), rows, strict=True):
        title = f"{title}; {window_um:g} µm wide)"
        _write(figure, _MARGIN_PX, top_px + _HEADING_PX / 2, title, size=13, weight="bold", ha="left")
        top_px += _HEADING_PX
        if not half:
            _write(figure, width_px / 2, top_px + pitch_px[1] / 2, "none", size=13)
        for k, mistake in enumerate(half):
            x_px = _MARGIN_PX + k % _COLUMNS * pitch_px[0]
            y_px = top_px + k // _COLUMNS * pitch_px[1]
            edge_px = max(1, round(window_um / images[mistake.image].mpp))
            cut = Picture.fromarray(patches[mistake.image](mistake.x_px, mistake.y_px, edge_px))
            patch = np.asarray(cut.resize((_PATCH_PX, _PATCH_PX), Picture.Resampling.BICUBIC))
            figure.figimage(patch, x_px, height_px - y_px - _PATCH_PX, origin="upper")
            _write(figure, x_px + _PATCH_PX / 2, y_px + _PATCH_PX + _SCORE_PX / 2, f"{mistake.score:.2f}", size=10)
        top_px += n * pitch_px[1]
    _save(figure, path)


def draw_losses(csv_path: Path, png_path: Path) -> None:
    """Draw loss, its terms and the learning rate over the steps of a training run.

    Parameters
    ----------
    csv_path : Path
        Columns step, minutes, lr, loss and one a term. A run that went on from a checkpoint repeats steps, and the
        later row holds; a row still being written is left out.
    png_path : Path
        PNG to write.
    """
    steps, columns = _read_losses(csv_path)
    figure = _figure(_WIDTH_PX, _HEIGHT_PX)
    axes = figure.add_subplot()
    rate = axes.twinx()
    terms = [name for name in columns if name not in ("minutes", "lr", "loss")]
    mark = "o" if len(steps) < _FEW_POINTS else ""
    for k, name in enumerate(["loss", *terms] if len(steps) else []):
        colour, width = (_INK, 2.2) if name == "loss" else (_COLOURS[(k - 1) % len(_COLOURS)], 1.2)
        dash = "-" if name == "loss" else _DASHES[(k - 1) // len(_COLOURS) % len(_DASHES)]
        values = columns[name]
        above = values > 0  # a term that is off is 0, which a log axis has not
        if above.any():
            values = np.where(above, values, np.nan)
            axes.plot(steps, values, dash, color=colour, linewidth=width, marker=mark, markersize=4, label=name)
    if len(steps):
        rate.plot(steps, columns["lr"], color=_FAINT, linewidth=1.5, linestyle="--", label="learning rate")
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
        handles = axes.get_legend_handles_labels()[0] + rate.get_legend_handles_labels()[0]
        axes.legend(handles=handles, loc="upper right", framealpha=0.9)
    else:
        axes.text(0.5, 0.5, "no steps yet", transform=axes.transAxes, ha="center", size=13)
    axes.set(xlabel="step", ylabel="loss and its terms, weighted")
    rate.set_ylabel("learning rate")
    rate.set_ylim(bottom=0)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    # Losses before the rate, which is only context.
    axes.set_zorder(rate.get_zorder() + 1)
    axes.patch.set_visible(False)
    axes.grid(color=_FAINT, alpha=0.4, linewidth=0.6)
    _save(figure, png_path)


def _draw_recall(kinds: Mapping[str, Sequence[Image]], threshold: float, path: Path, *, froc: bool) -> None:
    figure = _figure(_WIDTH_PX, _HEIGHT_PX)
    axes = figure.add_subplot()
    low, high = _FROC_PER_MM2
    if not froc:
        _iso_f1(axes)
    for k, (name, images) in enumerate(kinds.items()):
        line, at = curve(images), score(images, threshold)
        if line.truths == 0:
            continue
        colour, dash = _COLOURS[k % len(_COLOURS)], _DASHES[k % len(_DASHES)]
        if froc:
            # What comes at fewer false detections than the axis shows enters from its left end.
            x = np.append(low, np.maximum(line.false_per_mm2, low))
            y = np.append(line.recall_at(low), np.maximum(line.recall, line.recall_at(low)))
            point = (max(low, at.false / line.mm2 if line.mm2 else 0.0), at.recall)
            high = max(high, 10 ** math.ceil(math.log10(point[0])))  # of nuclei there are thousands
            label = f"{name}: {line.recall_at(1.0):.2f} at 1 per mm²"
            axes.plot(x, y, dash, color=colour, linewidth=2, label=label, drawstyle="steps-post")
        else:
            label, point = f"{name}: AP {line.average_precision:.2f}, F1 {at.f1:.2f}", (at.recall, at.precision)
            axes.plot(line.recall, line.precision, dash, color=colour, linewidth=2, label=label)
        axes.plot(*point, "o", color=colour, markersize=10, markeredgecolor="white", clip_on=False, zorder=4)
    if axes.get_legend_handles_labels()[0]:
        axes.plot([], [], "o", color="#606068", markersize=9, label=f"at score ≥ {threshold:.2f}")
        axes.legend(loc="lower right" if froc else "lower left", framealpha=0.9)
    else:
        axes.text(0.5, 0.5, "no figures", transform=axes.transAxes, ha="center", size=13)
    if froc:
        axes.set(xscale="log", xlim=(low, high), xlabel="false detections per mm²", ylabel="recall (share of figures)")
        ticks = [10.0**power for power in range(-1, round(math.log10(high)) + 1)]
        axes.set_xticks(ticks, [f"{tick:,g}" for tick in ticks])
    else:
        axes.set(xlim=(0, 1), xlabel="recall (share of figures)", ylabel="precision (share of detections)")
    axes.set_ylim(0, 1)
    axes.grid(color=_FAINT, alpha=0.4, linewidth=0.6)
    _save(figure, path)


def _draw_reliability(kinds: Mapping[str, Sequence[Image]], path: Path) -> None:
    figure = _figure(_WIDTH_PX, _HEIGHT_PX)
    axes = figure.add_subplot()
    axes.plot([0, 1], [0, 1], color=_FAINT, linewidth=1.5, label="perfect")
    bins = {name: reliability(images) for name, images in kinds.items()}
    for k, (name, (mean, share, count)) in enumerate(bins.items()):
        if len(count) == 0:
            continue
        colour, dash = _COLOURS[k % len(_COLOURS)], _DASHES[k % len(_DASHES)]
        label = f"{name}: ECE {calibration_error(kinds[name]):.3f}, {count.sum():,} detections"
        axes.plot(mean, share, dash, color=colour, linewidth=1.2, label=label)
        # Area by count, within the kind: 400 pt² the fullest bin, and 9 the least that is seen.
        area_pt2 = np.maximum(400 * count / count.max(), 9)
        axes.scatter(mean, share, area_pt2, color=colour, alpha=0.55, linewidths=0, clip_on=False, zorder=3)
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="score (mean of bin)", ylabel="share of detections that are right")
    axes.legend(loc="lower right", framealpha=0.9)
    axes.grid(color=_FAINT, alpha=0.4, linewidth=0.6)
    _save(figure, path)


def _iso_f1(axes: Axes) -> None:
    """Draw faint lines of equal F1, named where they leave at the right."""
    for f1 in _ISO_F1:
        recall = np.linspace(f1 / (2 - f1), 1, 100)  # where precision is 1, to where recall is
        axes.plot(recall, f1 * recall / (2 * recall - f1), color=_FAINT, linewidth=0.8, zorder=1)
        axes.text(1.01, f1 / (2 - f1), f"F1 {f1:g}", color="#70707a", size=9, va="center")


def _read_losses(path: Path) -> tuple[NDArray[np.float64], dict[str, NDArray[np.float64]]]:
    """Return steps and the other columns, averaged over equal runs of steps if there are many."""
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        names = [name for name in reader.fieldnames or [] if name != "step"]
        rows: dict[int, list[float]] = {}
        for row in reader:
            try:
                rows[int(row["step"])] = [float(row[name]) for name in names]
            except (TypeError, ValueError):
                continue
    table = np.array([[step, *rows[step]] for step in sorted(rows)]).reshape(-1, 1 + len(names))
    parts = np.array_split(table, min(len(table), _MOST_POINTS)) if len(table) else []
    table = np.array([part.mean(0) for part in parts]).reshape(-1, 1 + len(names))
    return table[:, 0], {name: table[:, 1 + k] for k, name in enumerate(names)}


def _figure(width_px: int, height_px: int) -> Figure:
    """Return an empty page; without pyplot, which keeps every figure and chooses a screen."""
    figure = Figure((width_px / _DPI, height_px / _DPI), _DPI, facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(
    figure: Figure, x_px: float, y_px: float, text: str, *, size: float, weight: str = "normal", ha: str = "center"
) -> None:
    """Write text at px from the top left."""
    x, y = x_px / figure.bbox.width, 1 - y_px / figure.bbox.height
    figure.text(x, y, text, size=size, weight=weight, ha=ha, va="center", color=_INK)


def _save(figure: Figure, path: Path) -> None:
    figure.savefig(path, dpi=_DPI, format="png", metadata={"Software": None})
