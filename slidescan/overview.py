"""The overview picture: the slide, its heat map, numbered flagged regions and a legend with units.

What a pathologist sees first, so it says what was *not* looked at as clearly as what was found. Drawn from level
pixels only: label and macro images never come near it.
"""

from __future__ import annotations

import importlib.util
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from slidescan.anomaly import Coverage
from slidescan.geometry import Box
from slidescan.legend import (
    COVER_TINT,
    HOTSPOT,
    MARK,
    RAMP_END_PER_MM2,
    area_text,
    counted,
    length_text,
    many,
    ramp_rgb,
    round_length_um,
    share_text,
)

if TYPE_CHECKING:
    from slidescan.result import ScanResult

__all__ = ["draw_overview", "heat_panel"]

# px of the picture. One panel fits a laptop screen; two side by side a printed page.
_PANEL_PX = 1100
_MARGIN_PX = 28
_HEADER_PX = 92
_LEGEND_PX = 150
_LEAST_COLUMN_PX = 620  # a narrow slide still needs room for its heading and legend
_ROUNDING_PX = 10  # of the page: two columns, each off by up to one px of the smallest thumbnail, which has 256
_MOST_NUMBERS, _MOST_OUTLINES = 20, 200  # regions: more outlines would hide the slide
_NUMBER_PX = 23  # height of a region's number

_INK, _GREY, _PAPER = (30, 30, 36), (110, 110, 118), (255, 255, 255)


def draw_overview(thumbnail: NDArray[np.uint8], result: ScanResult, title: str) -> Image.Image:
    """Draw the overview of a result.

    Parameters
    ----------
    thumbnail : ndarray of uint8, shape (H, W, 3)
        The whole slide, any size.
    result : ScanResult
        What was found.
    title : str
        Heading, such as the slide's id.

    Returns
    -------
    PIL.Image.Image
        RGB: slide with numbered regions on the left, density of figures and coverage on the right, legend below.
    """
    height, width = thumbnail.shape[:2]
    panel_wh, page_wh, right = _layout((width, height))
    slide = Image.fromarray(thumbnail).resize(panel_wh, Image.Resampling.LANCZOS)
    page = Image.new("RGB", page_wh, _PAPER)
    draw = ImageDraw.Draw(page)
    left, top = _MARGIN_PX, _HEADER_PX

    page.paste(slide, (left, top))
    page.paste(_heat(slide, result), (right, top))
    px_per_l0 = max(panel_wh) / max(result.frame.size_wh)  # the shorter side is rounded to few px
    for x in (left, right):
        draw.rectangle((x - 1, top - 1, x + panel_wh[0], top + panel_wh[1]), outline=(200, 200, 205))
    _hotspot(draw, result, (left, top), px_per_l0)
    _numbers(draw, result, (left, top), px_per_l0)
    _heading(draw, result, title, left, right)
    below = top + panel_wh[1] + 18
    _scale_bar(draw, result, left, below, px_per_l0)
    _legend(draw, left, below + 48, many(result.classes))
    _ramp(draw, result, right, below)
    return page


def heat_panel(picture: Image.Image, size_wh: tuple[int, int]) -> Image.Image:
    """Cut the right panel, density and coverage on the pale slide, out of a saved overview.

    Parameters
    ----------
    picture : PIL.Image.Image
        What `draw_overview` drew.
    size_wh : tuple of int
        Size of the slide's frame, px.

    Raises
    ------
    ValueError
        If the picture cannot be the overview of such a slide.
    """
    if min(size_wh) < 1:
        raise ValueError(f"expected a frame of at least 1 px, got {size_wh}")
    panel_wh, page_wh, right = _layout(size_wh)
    # The picture was laid out for a thumbnail, whose sides are rounded to px.
    if max(abs(picture.width - page_wh[0]), abs(picture.height - page_wh[1])) > _ROUNDING_PX:
        raise ValueError(f"expected an overview of {page_wh[0]} x {page_wh[1]} px, got {picture.size}")
    return picture.crop((right, _HEADER_PX, right + panel_wh[0], _HEADER_PX + panel_wh[1]))


def _layout(size_wh: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int], int]:
    """Return the sizes of a panel and of the page, and where the right panel begins, all px."""
    shrink = _PANEL_PX / max(size_wh)
    panel_w, panel_h = (max(1, round(side * shrink)) for side in size_wh)
    column_px = max(panel_w, _LEAST_COLUMN_PX)
    page_wh = 2 * column_px + 3 * _MARGIN_PX, _HEADER_PX + panel_h + _LEGEND_PX
    return (panel_w, panel_h), page_wh, column_px + 2 * _MARGIN_PX


@lru_cache
def _font(px: int) -> ImageFont.FreeTypeFont:
    """Return matplotlib's own font: on every machine the same, and it has µ, ² and ≥, which Pillow's lacks."""
    package = importlib.util.find_spec("matplotlib")
    assert package is not None
    assert package.origin is not None
    return ImageFont.truetype(Path(package.origin).parent / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf", px)


def _heat(slide: Image.Image, result: ScanResult) -> Image.Image:
    """Return the pale slide under the density ramp and coverage tints."""
    # No finer than twice the panel: of the map of a large slide, in colours, 1 GB.
    anomaly = result.anomaly.fitted(2 * _PANEL_PX)
    density, coverage = anomaly.density, anomaly.coverage
    pale = np.asarray(slide.convert("L").convert("RGB"), float) * 0.45 + 255 * 0.55
    tint = np.full((*coverage.shape, 4), 255.0)
    tint[..., 3] = 0
    for state, rgb in COVER_TINT.items():
        tint[coverage == state, :3] = rgb
    tint[coverage == Coverage.ANALYSED, 3] = 0.35
    tint[(coverage == Coverage.SATURATED) | (coverage == Coverage.READ_FAILED), 3] = 0.85
    strength = np.clip(np.nan_to_num(density) / RAMP_END_PER_MM2, 0, 1)
    ramp = ramp_rgb(strength)
    # Below a twentieth of the ramp nothing is worth colour.
    alpha = np.clip((strength - 0.05) * 4, 0, 0.85)[..., None]
    tint[..., :3] = tint[..., :3] * (1 - alpha) + ramp * alpha
    tint[..., 3:] = np.maximum(tint[..., 3:], alpha)
    layer = Image.fromarray((tint * [1, 1, 1, 255]).round().astype(np.uint8), "RGBA")
    # The map's last px may reach beyond the slide: cut exactly at the slide's edge instead of stretching. A slide that
    # reaches beyond it by a rounding error has no px for that.
    factor = result.frame.factor_to(anomaly.frame)
    right, bottom = (min(n * factor, of) for n, of in zip(result.frame.size_wh, layer.size, strict=True))
    layer = layer.resize(slide.size, Image.Resampling.BILINEAR, box=(0, 0, right, bottom))
    base = Image.fromarray(pale.round().astype(np.uint8)).convert("RGBA")
    return Image.alpha_composite(base, layer).convert("RGB")


def _numbers(draw: ImageDraw.ImageDraw, result: ScanResult, origin: tuple[int, int], px_per_l0: float) -> None:
    """Draw the outlines of the flagged regions, and the numbers of the first of them, as far as they have room."""
    font = _font(18)
    boxes = []
    for region in result.regions[:_MOST_OUTLINES]:
        box = region.box_l0.scale(px_per_l0).translate(*origin)
        # A region of a few px would vanish: 7 px around its middle is the least that is seen.
        boxes.append(box.grow(max(0.0, 7 - min(box.width, box.height) / 2)))
    for box in reversed(boxes):
        draw.rounded_rectangle((box.x0, box.y0, box.x1, box.y1), 4, outline=MARK, width=2)
    panel = Box(0, 0, *result.frame.size_wh).scale(px_per_l0).translate(*origin)
    taken: list[Box] = []
    for number, box in enumerate(boxes[:_MOST_NUMBERS], 1):
        room = _beside(box, draw.textlength(str(number), font=font) + 10, panel, taken)
        if room is not None:  # one half covered would read as another
            taken.append(room)
            draw.rounded_rectangle((room.x0, room.y0, room.x1, room.y1), 5, fill=MARK)
            draw.text((room.x0 + 5, room.y0 + 1), str(number), font=font, fill=_PAPER)


def _beside(box: Box, width_px: float, panel: Box, taken: list[Box]) -> Box | None:
    """Return room for a number at a corner of a box, on the panel and free of others; None where there is none."""
    for x, y in product((box.x1 + 3, box.x0 - 3 - width_px), (box.y0 - 6, box.y1 + 6 - _NUMBER_PX)):
        # A slide narrower than a number has it beside itself: the margin is as wide.
        x = min(max(x, panel.x0), max(panel.x0, panel.x1 - width_px))
        y = min(max(y, panel.y0), max(panel.y0, panel.y1 - _NUMBER_PX))
        room = Box(x, y, x + width_px, y + _NUMBER_PX)
        if not any(room.intersects(other) for other in taken):
            return room
    return None


def _hotspot(draw: ImageDraw.ImageDraw, result: ScanResult, origin: tuple[int, int], px_per_l0: float) -> None:
    """Draw the square with most figures."""
    if result.hotspot is not None:
        box = result.hotspot.box_l0.scale(px_per_l0).translate(*origin)
        draw.rectangle((box.x0, box.y0, box.x1, box.y1), outline=HOTSPOT, width=3)


def _heading(draw: ImageDraw.ImageDraw, result: ScanResult, title: str, left: int, right: int) -> None:
    """Write what was scanned and what was found."""
    found = counted(len(result.found), result.classes, result.threshold)
    n, column_px = len(result.regions), right - left - _MARGIN_PX
    _line(draw, (left, 14), (title,), column_px, 30, _INK)
    of_which = f", {_MOST_OUTLINES} outlined" if n > _MOST_OUTLINES else ""
    _line(draw, (left, 54), (found, f" · {n:,} flagged region{'' if n == 1 else 's'}{of_which}"), column_px, 20, _INK)
    fraction = result.anomaly.analysed_fraction
    looked = (
        "no tissue"
        if np.isnan(fraction)
        else f"{share_text(fraction, 1)} of {area_text(result.anomaly.tissue_mm2)} tissue analysed"
    )
    name, mpp = result.provenance["detector"]["name"], result.provenance["detector"]["plane_mpp"]
    draw.text((right, 22), looked, font=_font(22), fill=_INK)
    _line(draw, (right, 56), (f"detector {name}", f" at {mpp:.3g} µm/px · research use only"), column_px, 18, _GREY)


def _line(
    draw: ImageDraw.ImageDraw,
    xy: tuple[int, int],
    parts: tuple[str, ...],
    width_px: int,
    height_px: int,
    ink: tuple[int, int, int],
) -> None:
    """Write a line without what cannot be drawn; where it is too long the middle of its first part is left out."""
    font, rest = _font(height_px), "".join(parts[1:])
    first = "".join(letter if letter.isprintable() else "?" for letter in parts[0])
    kept, said = len(first), first
    while kept > 2 and draw.textlength(said + rest, font=font) > width_px:
        kept -= 1
        said = f"{first[: -(-kept // 2)]}…{first[len(first) - kept // 2 :]}"
    draw.text(xy, said + rest, font=font, fill=ink)


def _scale_bar(draw: ImageDraw.ImageDraw, result: ScanResult, x: int, y: int, px_per_l0: float) -> None:
    """Draw a bar of a round length, about a fifth of the panel."""
    um_per_px = result.frame.mpp / px_per_l0
    wanted = 0.2 * result.frame.size_wh[0] * px_per_l0 * um_per_px
    length_um = round_length_um(wanted)
    bar_px = length_um / um_per_px
    draw.rectangle((x, y + 4, x + bar_px, y + 9), fill=_INK)
    draw.text((x + bar_px + 10, y - 5), length_text(length_um), font=_font(18), fill=_INK)


def _legend(draw: ImageDraw.ImageDraw, x: int, y: int, objects: str) -> None:
    """Explain the marks on the left panel."""
    draw.rounded_rectangle((x, y + 2, x + 26, y + 20), 4, outline=MARK, width=2)
    draw.text((x + 36, y), "flagged region, numbered by evidence", font=_font(17), fill=_INK)
    draw.rectangle((x, y + 34, x + 26, y + 52), outline=HOTSPOT, width=3)
    draw.text((x + 36, y + 32), f"hotspot: the square with most {objects}", font=_font(17), fill=_INK)


def _ramp(draw: ImageDraw.ImageDraw, result: ScanResult, x: int, y: int) -> None:
    """Explain the density ramp, the coverage tints and the hotspot's count."""
    length, font = 260, _font(17)
    for i in range(length):
        red, green, blue = ramp_rgb(np.float64(i / (length - 1))).round().astype(int).tolist()
        draw.line((x + i, y, x + i, y + 16), fill=(red, green, blue))
    for value in (0, 10, 20):
        at = x + length * value / RAMP_END_PER_MM2
        draw.text((at, y + 20), f"{value}{'+' if value == 20 else ''}", font=font, fill=_INK, anchor="ma")
    draw.text((x + length + 24, y - 3), f"{many(result.classes)} per mm²", font=font, fill=_INK)
    states = (
        (Coverage.ANALYSED, "analysed"),
        (Coverage.SATURATED, "detector saturated"),
        (Coverage.READ_FAILED, "could not be read"),
    )
    at = x
    for state, text in states:
        draw.rectangle((at, y + 50, at + 22, y + 68), fill=COVER_TINT[state], outline=(170, 170, 175))
        draw.text((at + 30, y + 48), text, font=font, fill=_INK)
        at += 30 + int(draw.textlength(text, font=font)) + 24
    hotspot = result.hotspot
    if hotspot is not None:
        text = f"hotspot: {hotspot.count:,} {many(result.classes)} in {area_text(hotspot.area_mm2)}"
        draw.text((x, y + 82), text, font=font, fill=HOTSPOT)
