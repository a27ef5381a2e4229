"""Where the tissue is, from a thumbnail: stained pixels, without pen, padding and dirt.

Hides how stain is told from everything else. Stain is *coloured* optical density relative to the slide's own glass;
shadows, cover-slip edges and dust are grey, so brightness alone decides nothing. Missing a figure is worse than reading
a tile for nothing: thresholds are low, holes are filled, a margin is added, ink that lies on tissue or close to it
stays, and where the result is not plausible everything that is not blank is kept, which the note says.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.measure import label
from skimage.morphology import isotropic_dilation, remove_small_objects
from skimage.segmentation import clear_border

from slidescan.errors import ConfigError

__all__ = ["TissueMask", "tissue_mask"]

F32 = NDArray[np.float32]
Mask = NDArray[np.bool_]

# Grey levels are 0..255, densities are natural-log optical density; both after averaging to the working resolution.
_WORK_UM = 8.0  # µm/px: nothing smaller decides whether a place is tissue
_WORK_PX = 2048  # longest side worked on: bounds time and memory for any thumbnail
_STRIP_PX = 256  # rows worked on at a time where a step needs many bytes a px
_FILL = 253.5  # grey above which a px is the scanner's own filling, not glass
_BLACK = 14.0  # grey below which (all channels) a px is padding or nothing
_DARK_GROUND = 60.0  # grey of a fifth of the px, where nothing is glass: padding, or the ground of fluorescence
_LIT, _LIT_LOWEST = 128.0, 40.0  # grey of stained tissue at least: of its brightest channel, and of its darkest
_GLASS_DARKEST = 160.0  # grey: no scanner leaves its glass darker
_GLASS_TINT = 0.12  # density between channels: glass may be as yellow as this, pink tissue is beyond it
_WHITE_SHARE = 0.05  # of px that are pure white: from here on that may be the glass, of a scanner that balances it so
_NEUTRAL = 5.0  # grey levels between channels of glass beside pure white; a paler stain than that has no tissue
_WHITE = 245.0  # grey taken for glass where the slide shows none
_STAIN = (0.024, 0.06)  # colour density from which a px is stained: floor (faint eosin) and ceiling (noisy scanner)
_NEAR_GLASS = 0.02  # density within which a px may be glass: 5 grey levels
_RIM_UM = 150.0  # width of the blurred, pale border of a pen stroke
_STROKE_UM = 2500.0  # width of a marker's stroke at most; what is wider has the colour of its stain, or is melanin
_DENSE = 0.07  # density from which a px is not blank: about 16 grey levels below the glass
_SURE_UM2 = 20_000.0  # bits below this area must be stained twice as strongly as large ones
_ANCHOR_UM2 = 50_000.0  # tissue below this area says nothing about the ink beside it
_IMPLAUSIBLE = 1e-3  # share of the area: less tissue than this asks for a second look
_NEARLY_ALL = 0.98  # share of the area: more tissue than this means a crop, or tinted glass


@dataclass(frozen=True, slots=True, eq=False)
class TissueMask:
    """Which px of a thumbnail hold tissue, and how that was decided.

    `mask` is bool (H, W) as the thumbnail; `method` is "tissue", or "not-blank" where stain could not be relied on, or
    "empty"; `fraction` is the share of true px; `note` is one line for a person, empty where there is nothing to say.
    `is_fluorescent` says that the slide shines on a dark ground, which is no picture in transmitted light.
    """

    mask: Mask
    method: Literal["tissue", "not-blank", "empty"]
    fraction: float
    note: str
    is_fluorescent: bool = False


def tissue_mask(
    rgb: NDArray[np.uint8],
    *,
    mpp: float,
    margin_um: float = 60.0,
    min_area_um2: float = 2500.0,
    max_hole_um2: float = 200_000.0,
    ink_reach_um: float = 250.0,
) -> TissueMask:
    """Find the tissue on a thumbnail.

    A px is tissue where it is stained and no ink. Then small bits go, small holes and ink on or near tissue are added,
    and a margin is grown. Where that leaves next to nothing though the slide is not blank, or the image is dark-field,
    everything that is not blank is taken instead.

    Parameters
    ----------
    rgb : ndarray of uint8, shape (H, W, 3)
        The whole slide, small. Transparent areas already white.
    mpp : float
        µm per px of `rgb`.
    margin_um : float
        How far the tissue is grown, µm.
    min_area_um2 : float
        Smaller bits are dirt, µm².
    max_hole_um2 : float
        Holes up to this area are filled, µm².
    ink_reach_um : float
        Ink this near to tissue is kept, as there may be tissue under it, µm.

    Returns
    -------
    TissueMask

    Raises
    ------
    ConfigError
        If `rgb` is not such an array or `mpp` is not positive.

    Examples
    --------
    >>> slide = np.full((100, 100, 3), 243, np.uint8)
    >>> tissue_mask(slide, mpp=16.0).note
    'no tissue'
    >>> slide[30:70, 30:70] = (225, 160, 200)
    >>> found = tissue_mask(slide, mpp=16.0, margin_um=0)
    >>> found.method, round(found.fraction, 2)
    ('tissue', 0.18)
    """
    if rgb.ndim != 3 or rgb.shape[2] != 3 or rgb.dtype != np.uint8 or not rgb.size:
        raise ConfigError(f"tissue_mask rgb: expected uint8 (H, W, 3), got {rgb.dtype} {rgb.shape}")
    if not mpp > 0:
        raise ConfigError(f"tissue_mask mpp: expected µm/px above 0, got {mpp}")
    height, width = rgb.shape[:2]
    step = max(1, int(_WORK_UM / mpp), -(-max(height, width) // _WORK_PX))
    small = _averaged(rgb, step)
    work_um = mpp * step
    min_px, hole_px = min_area_um2 / work_um**2, max_hole_um2 / work_um**2

    low, high = _range(small)
    black = high < _BLACK
    has_glass = float((low > _GLASS_DARKEST).mean()) >= 0.005
    dark_field = not has_glass and float(np.percentile(high, 20)) < _DARK_GROUND
    lit = ~black
    # Stained tissue between black padding is neither so dark, nor without one of the three colours.
    fluorescent = (
        dark_field and bool(lit.any()) and bool(np.median(high[lit]) < _LIT or np.median(low[lit]) < _LIT_LOWEST)
    )
    density = _density(small, _glass(small, low, high))
    del low, high
    # Padding has no colour, and the px next to it is a mixture.
    density[_grown(black, 1)] = 0
    for channel in range(3):
        density[..., channel] = ndimage.uniform_filter(density[..., channel], 3)
    mean, (least, most) = (density[..., 0] + density[..., 1] + density[..., 2]) / np.float32(3), _range(density)
    colour = most - least
    level = _stain_level(mean, colour)
    stained, shown = colour > level, (colour > level) | (mean > _DENSE)

    method: Literal["tissue", "not-blank", "empty"] = "tissue"
    note, ink = "", np.zeros_like(shown)
    if dark_field:
        found, method = _filled(_without_small(~black, min_px), hole_px), "not-blank"
        note = "dark ground without glass (fluorescence or padding): everything that is not black is kept"
    else:
        ink = _ink(density, mean, colour, shown, max(2.0, _RIM_UM / work_um), _STROKE_UM / work_um)
        bits = _without_small(stained & ~ink, min_px)
        tissue = _filled(_strong(bits, colour, 2 * level, _SURE_UM2 / work_um**2), hole_px)
        anchor = _without_small(tissue, _ANCHOR_UM2 / work_um**2)
        found = _filled(tissue | _ink_on_tissue(ink, anchor, ink_reach_um / work_um), hole_px)
        if found.mean() < _IMPLAUSIBLE:
            not_blank = _filled(_without_small(shown, min_px), hole_px)
            if not_blank.mean() > found.mean():
                found, method = found | not_blank, "not-blank"
                note = "hardly any stained tissue (faint, or ink only): everything that is not blank is kept"
    if not found.any():
        return TissueMask(np.zeros((height, width), np.bool_), "empty", 0.0, "no tissue")
    found = _grown(found, margin_um / work_um)
    mask = np.repeat(np.repeat(found, step, 0), step, 1)[:height, :width]
    fraction = float(mask.mean())
    left_out_um2 = float((ink & ~found).sum()) * work_um**2
    if left_out_um2 >= _SURE_UM2 and not note:
        note = f"{left_out_um2 * 1e-6:.2g} mm² have the colour of pen and are left out"
    if fraction > _NEARLY_ALL and not note:
        note = "nearly everything counts as tissue: a crop, or glass too tinted to tell"
    return TissueMask(mask, method, fraction, note, fluorescent)


def _averaged(rgb: NDArray[np.uint8], step: int) -> F32:
    """Average squares of `step` px; the last row and column are continued where they do not fill one."""
    if step == 1:
        return rgb.astype(np.float32)
    height, width = rgb.shape[:2]
    if height % step or width % step:
        rgb = np.pad(rgb, ((0, -height % step), (0, -width % step), (0, 0)), mode="edge")
    total = np.zeros((rgb.shape[0] // step, rgb.shape[1] // step, 3), np.float32)  # exact: below 2^24 up to step 256
    for row in range(step):
        for column in range(step):
            total += rgb[row::step, column::step]
    total /= step * step
    return total


def _density(small: F32, glass: F32) -> F32:
    """Turn grey levels into optical density relative to `glass`, in place: it is the largest array here."""
    small += 1
    np.divide(glass + 1, small, out=small)
    return np.log(small, out=small)


def _range(planes: F32) -> tuple[F32, F32]:
    """Lowest and highest of three channels; far quicker than reducing an axis of three."""
    first, second, third = planes[..., 0], planes[..., 1], planes[..., 2]
    return np.minimum(np.minimum(first, second), third), np.maximum(np.maximum(first, second), third)


def _glass(small: F32, low: F32, high: F32) -> F32:
    """Colour of clear glass, grey levels (3,): the brightest level that a fair share of nearly grey px has."""
    candidate = (low > _GLASS_DARKEST) & (low < _FILL) & (high + 1 < np.exp(_GLASS_TINT) * (low + 1))
    if candidate.sum() < 0.002 * max(1, (high >= _BLACK).sum()):
        return np.full(3, _WHITE, np.float32)
    levels = small[..., 1][candidate]
    counts = np.bincount(levels.astype(np.intp), minlength=256)
    # 5 neighbouring levels: glass is never one level only. A tenth of the best: the brightest of several, no stray px.
    share = np.convolve(counts, np.ones(5), mode="same")
    peak = int(np.flatnonzero(share >= 0.1 * share.max())[-1])
    near = small[candidate][np.abs(levels - (peak - 1)) <= 3]
    glass = np.asarray(np.median(near, axis=0) if len(near) else np.full(3, _WHITE), np.float32)
    is_white = float((low >= _FILL).mean()) > _WHITE_SHARE
    return np.full(3, 255, np.float32) if is_white and _is_stained(glass) else glass


def _is_stained(glass: F32) -> bool:
    """Return whether what is brightest beside pure white has a dye's colour; glass may be yellow."""
    red, green, blue = (float(level) for level in glass)
    is_yellow = red >= green > blue and green - blue > 2 * (red - green)
    return max(red, green, blue) - min(red, green, blue) > _NEUTRAL and not is_yellow


def _stain_level(mean: F32, colour: F32) -> float:
    """Colour density from which a px counts as stained: well above what the glass itself scatters, within `_STAIN`."""
    glass = colour[np.abs(mean) < _NEAR_GLASS]
    if not len(glass):
        return _STAIN[0]
    middle = float(np.median(glass))
    spread = 1.48 * float(np.median(np.abs(glass - middle)))  # 1.48: from median deviation to standard deviation
    return float(np.clip(middle + 5 * spread, *_STAIN))


def _ink(density: F32, mean: F32, colour: F32, shown: Mask, rim_px: float, stroke_px: float) -> Mask:
    """Pen of the usual colours, by what dyes of tissue rarely absorb, with the pale border of its strokes.

    Haematoxylin and eosin take most from green light. Blue and green ink take far more from red; red ink takes nearly
    as much from blue as from green and hardly anything from red; black ink takes much from all alike.
    """
    red, green, blue = density[..., 0], density[..., 1], density[..., 2]
    cold = (red > 1.35 * green) & (red - green > 0.12)
    warm = (blue - red > 0.54 * green) & (green > 0.6) & (green > blue)
    strong = shown & (colour > 0.15) & ~cold
    if strong.any() and float(np.median((blue - red)[strong] / np.maximum(green[strong], 0.01))) > 0.4:
        warm &= False  # the stain of this slide is that red itself
    black = (mean > 1.2) & (colour < 0.35 * mean)
    core = _without_small(shown & (cold | warm | black), 4)
    if not core.any():
        return np.asarray(core, np.bool_)
    # Beside a stroke a px is tissue only if it is clearly of tissue's own hue.
    tissue_hue = (green > 1.15 * red) & (blue < 0.62 * green) & (colour > 0.1)
    ink = core | (_grown(core, rim_px) & shown & ~tissue_hue)
    return np.asarray(ink & ~_thick(core, stroke_px, rim_px), np.bool_)


def _thick(core: Mask, width_px: float, gap_px: float) -> Mask:
    """Return where a mask, its gaps closed, is wider than `width_px`, and what is within `gap_px` of that."""
    radius = width_px / 2
    if core.sum() < np.pi * radius**2 / 50:  # so few that none of it is, however many the gaps
        return np.zeros_like(core)
    padded = np.pad(core, ceil(gap_px))  # no gap closes against the edge of the image
    closed = ~_grown(~_grown(padded, gap_px), gap_px)
    wide = ~_grown(~closed, radius)
    grown = _grown(wide, radius + gap_px) if wide.any() else wide
    return grown[ceil(gap_px) : -ceil(gap_px), ceil(gap_px) : -ceil(gap_px)]


def _ink_on_tissue(ink: Mask, tissue: Mask, reach_px: float) -> Mask:
    """Ink that has tissue around it, or near enough to have some under it."""
    if not ink.any() or not tissue.any():
        return np.zeros_like(ink)
    labels, count = ndimage.label(ink)
    rim = ndimage.maximum_filter(labels, size=3) * ~ink
    sides = np.bincount(rim.ravel(), minlength=count + 1)
    on_tissue = np.bincount(rim.ravel(), weights=tissue.ravel(), minlength=count + 1)
    enclosed = on_tissue > 0.5 * np.maximum(sides, 1)
    enclosed[0] = False
    return np.asarray(ink & (enclosed[labels] | _grown(tissue, reach_px)), np.bool_)


def _strong(mask: Mask, colour: F32, level: float, sure_px: float) -> Mask:
    """Keep parts of at least `sure_px`, and smaller ones whose mean colour reaches `level`."""
    labels, count = ndimage.label(mask)
    area = np.maximum(np.bincount(labels.ravel(), minlength=count + 1), 1)
    keep = (area >= sure_px) | (np.bincount(labels.ravel(), weights=colour.ravel()) >= level * area)
    keep[0] = False
    return np.asarray(keep[labels], np.bool_)


def _without_small(mask: Mask, min_px: float) -> Mask:
    """Keep the connected parts of at least `min_px`."""
    return np.asarray(remove_small_objects(mask, max_size=max(0, ceil(min_px) - 1)), np.bool_)


def _filled(mask: Mask, hole_px: float) -> Mask:
    """Fill holes up to `hole_px`; what reaches the edge of the image is no hole."""
    holes = clear_border(label(~mask, connectivity=1)) > 0
    return np.asarray(mask | (holes & ~remove_small_objects(holes, max_size=int(hole_px))), np.bool_)


def _grown(mask: Mask, radius_px: float) -> Mask:
    """Grow by `radius_px` in every direction; in strips, for a distance takes 50 bytes a px."""
    radius = round(radius_px)
    if not radius:
        return mask
    grown = np.empty_like(mask)
    for top in range(0, len(mask), _STRIP_PX):
        low = max(0, top - radius)
        strip = isotropic_dilation(mask[low : top + _STRIP_PX + radius], radius)
        grown[top : top + _STRIP_PX] = strip[top - low :][:_STRIP_PX]
    return grown
