"""A contact sheet for papers and talks: fields of view in order, all at one scale, with what was decided."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.patches import Rectangle

from slidescan.errors import ConfigError
from slidescan.figure import Plot, scale_bar
from slidescan.legend import MARK
from slidescan.reviews.items import ReviewItem

if TYPE_CHECKING:
    from slidescan.reviews.session import Review

__all__ = ["contact_sheet"]

# Okabe and Ito (2008): told apart by colour-blind readers; the word stands beside the colour all the same.
_COLORS = {"accept": "#009E73", "reject": "#D55E00", "unsure": "#E69F00"}
_UNDECIDED = "#6E6E76"
_TILE_IN, _HEADING_IN = 1.7, 0.3  # inches of a field of view, and of the line above it


def contact_sheet(
    review: Review, items: Sequence[ReviewItem], *, columns: int = 6, fov_um: float = 64.0, px: int = 192
) -> Plot:
    """Draw fields of view with box, scale bar, rank, score and this reviewer's decision.

    A blinded review shows a running number in place of rank and score. Save it with ``.savefig("sheet.png")``: no
    display is needed.

    Parameters
    ----------
    review : Review
        Made with `slides`, for their pixels.
    items : sequence of ReviewItem
        Which, in order.
    columns : int
    fov_um : float
        Edge of a field, µm.
    px : int
        Edge of a field, px.
    """
    if columns < 1:
        raise ConfigError(f"columns: expected 1 or more, got {columns}")
    columns = min(columns, max(1, len(items)))
    rows = max(1, math.ceil(len(items) / columns))
    width_in, height_in = columns * (_TILE_IN + 0.1), rows * (_TILE_IN + _HEADING_IN)
    figure = Plot(figsize=(width_in, height_in))
    share = _HEADING_IN / (_TILE_IN + _HEADING_IN)
    grid = figure.add_gridspec(rows, columns, left=0, right=1, bottom=0.1 / height_in, top=1 - _HEADING_IN / height_in)
    grid.update(wspace=0.06, hspace=share / (1 - share))
    mark = [part / 255 for part in MARK]
    several = len({item.slide_id for item in items}) > 1
    for place, item in enumerate(items):
        axes = figure.add_subplot(grid[divmod(place, columns)])
        # Axes in µm, whatever the pixels.
        axes.imshow(review.crop(item.id, fov_um, px), extent=(0, fov_um, fov_um, 0))
        x0, y0, x1, y1 = review.box_um(item.id, fov_um)
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=mark, linewidth=1))
        axes.set(xlim=(0, fov_um), ylim=(fov_um, 0), xticks=[], yticks=[])
        made = review.decision(item.id)
        color = _UNDECIDED if made is None else _COLORS[made.decision]
        for spine in axes.spines.values():
            spine.set(color=color, linewidth=2.5)
        said = [str(place + 1) if item.rank is None else f"{item.rank}"]
        if several and not review.blinded:  # a rank is one of its slide
            said = [f"{item.slide_id} {item.rank}"]
        if item.score is not None:
            said.append(f"{item.score:.2f}")
        if made is not None:
            said.append(made.decision)
        axes.set_title(" · ".join(said), fontsize=8, color=color, pad=4)
        scale_bar(axes, fov_um, fov_um, um_per_unit=1)
    if not items:
        figure.text(0.5, 0.5, "nothing to show", ha="center", va="center")
    return figure
