"""`detect_image`: objects on one picture of any size, in its own px.

A picture that fits the model's tile is scored whole; a larger one takes the path of a slide, so that an object on the
seam of two tiles is found once. Where the model's unit is the px objects may have any size: those that no tile holds
are looked for on the whole picture made small.
"""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from slidescan.config import ScanConfig
from slidescan.detections import Detections, Detector, iou_pairs
from slidescan.errors import ConfigError, SlideReadError, SlideWarning
from slidescan.geometry import Frame
from slidescan.prepare import halo_px
from slidescan.region import is_full
from slidescan.scan_slide import scan
from slidescan.slides import Slide, memory_slide, open_slide

__all__ = ["detect_image"]

_SIDE_PX = 32  # sides are padded to a multiple of it: the coarsest stride of a detector
_LEAST_PX, _MOST_PX = 128, 8192  # of a tile: what a scan takes
_HALO = 0.25  # of the tile, where the detector wants none: an object of up to half a tile is whole in one of them
# Of a box of a tile and one of the small picture, where a px is several: that they say one object, for they overlap by
# so much and the former is no smaller than so much of the latter; or that so much of the former is inside.
_SAME_IOU, _SAME_AREA, _INSIDE = 0.5, 0.7, 0.8
_MAP_UM = 256.0  # of a map that nobody looks at, as coarse as one may be
_SLACK = 0.02  # of the tile: how far two tiles may disagree on the centre of one object


def detect_image(
    image: str | Path | NDArray[np.uint8] | Slide,
    detector: Detector | str | Path = "mitosis",
    *,
    min_score: float | None = None,
    tile_px: int | None = None,
    mpp: float | None = None,
    allow_coarse: bool = False,
) -> Detections:
    """Detect objects on one image.

    Parameters
    ----------
    image : str, Path, ndarray of uint8 (H, W, 3), or Slide
        A PNG or JPEG (to 67 MP), a slide, or an array of any size; RGB. A model that names no µm/px also looks at the
        whole made as small as a tile, for objects larger than half of one.
    detector : Detector, str or Path
        A detector, or a name or directory for `load_detector`; a px is the unit of a model that names no µm/px.
    min_score : float, optional
        In (0, 1]; default: the detector's operating threshold.
    tile_px : int, optional
        Edge of a tile, a multiple of 32 from 128 to 8192; default: the detector's own. An image no larger is scored
        whole.
    mpp : float, optional
        µm/px of the image; default: what its file says, and for a PNG, JPEG or array, or a model that names no µm/px,
        the detector's, that is, it is read as it is. A Slide has its own; with a model that names no µm/px there is
        nothing to give.
    allow_coarse : bool
        Look at an image coarser than the detector was trained for.

    Returns
    -------
    Detections
        In px of the image, best first.

    Raises
    ------
    SlideError
        If the image cannot be read, or parts of it cannot be decoded.
    ConfigError
        If `tile_px`, `min_score` or `mpp` is out of range, or `mpp` is given with a Slide or a model of px.
    ResolutionError
        If the image is more than 1.25 times coarser than the detector, unless `allow_coarse`.

    Examples
    --------
    >>> import numpy as np
    >>> import slidescan as ss
    >>> blank = np.full((100, 150, 3), 240, np.uint8)
    >>> len(ss.detect_image(blank, ss.load_detector("mitosis")))
    0
    """
    if tile_px is not None and (tile_px % _SIDE_PX or not _LEAST_PX <= tile_px <= _MOST_PX):
        raise ConfigError(f"tile_px: expected a multiple of {_SIDE_PX} from {_LEAST_PX} to {_MOST_PX}, got {tile_px}")
    if min_score is not None and not 0 < min_score <= 1:
        raise ConfigError(f"min_score: expected a number in (0, 1], got {min_score}")
    if isinstance(detector, str | Path):
        from slidescan.detect import load_detector

        detector = load_detector(detector, mpp="px")
    if mpp is not None and getattr(detector, "knows_px_only", False):
        raise ConfigError(
            f"mpp: expected none with a model that names no µm/px, got {mpp}: it reads a picture as it is"
        )
    if isinstance(image, Slide):
        if mpp is not None:
            raise ConfigError(f"mpp: expected none beside an open slide, which has its own, got {mpp}")
        slide = image
    else:
        slide = _opened(image, mpp)
        plain = slide.mpp is None and slide.backend in ("image", "memory")
        if plain or (mpp is None and getattr(detector, "knows_px_only", False)):
            slide = _opened(image, detector.mpp)
    variant = detector.at(slide.frame.mpp, allow_coarse=allow_coarse)
    min_score = variant.threshold if min_score is None else min_score
    slide = slide.colored(variant.color)
    plane = slide.plane(variant.mpp)
    edge = tile_px or variant.input_px
    if max(plane.size_wh) <= edge:
        # Smaller ones are filled up with white, too: they have fewer places than a detector has queries.
        width, height = (max(_LEAST_PX, -(-n // _SIDE_PX) * _SIDE_PX) for n in plane.size_wh)
        pixels = slide.read(0, 0, width, height, plane)
        _whole(slide, len(pixels.holes))
        found = variant.detect(pixels.rgb[None], min_score)[0]
        _warn_if_full(slide, int(is_full(found, variant)), min_score >= variant.threshold)
        return found.moved(plane.factor_to(slide.frame), 0.0, 0.0).inside(slide.size_wh)
    settings = {
        "tissue.enabled": False,
        "tiling.tile_px": tile_px,
        "detect.min_score": min_score,
        "detect.threshold": min_score,
        "map.um_per_px": min(_MAP_UM, max(16, edge // 8) * plane.mpp),
    }
    slack_um, share_um = _SLACK * edge * plane.mpp, _HALO * edge * plane.mpp
    own_um = halo_px(variant, plane, edge, ScanConfig()) * plane.mpp
    if variant.halo_um is None or own_um > share_um:  # nothing is known of its objects, or the tile is small
        settings["stitch.slack_um"] = slack_um
        settings["tiling.halo_um"] = max(share_um, variant.object_um / 2 + slack_um)
    result = scan(slide, variant, config=ScanConfig.load({}, settings), allow_coarse=True)
    _whole(slide, result.provenance["tiles"]["read_failed_boxes"])
    _warn_if_full(slide, result.provenance["tiles"]["saturated"], min_score >= variant.threshold)
    if not getattr(variant, "knows_px_only", False):
        return result.detections
    both = _with_large(result.detections, slide, variant, plane, edge, min_score)
    return both[np.argsort(-both.score, kind="stable")]


def _with_large(
    tiled: Detections, slide: Slide, variant: Detector, plane: Frame, edge: int, min_score: float
) -> Detections:
    """Add what is too large for a tile, seen on the whole picture made as small as one; take its parts away.

    An object that a tile saw whole is not added, for it was seen more finely there. Of one that it did not, some tile
    may have taken what it saw for all: where a model's edges are off by some px, it does not seem cut. With its centre
    in the tile's core such a part is at least as large as what is looked for here.
    """
    small = slide.plane(plane.mpp * max(plane.size_wh) / edge)
    width, height = (max(_LEAST_PX, -(-n // _SIDE_PX) * _SIDE_PX) for n in small.size_wh)
    found = variant.detect(slide.read(0, 0, width, height, small).rgb[None], min_score)[0]
    found = found.moved(small.factor_to(slide.frame), 0.0, 0.0).inside(slide.size_wh)
    least = 2 * (_HALO - _SLACK) * edge * plane.factor_to(slide.frame)
    large = found[_side(found) > least]
    part, added = np.zeros(len(tiled), bool), []
    for box, label in zip(large.xyxy, large.label, strict=True):
        same = (tiled.label == label) & ~part
        overlaps = iou_pairs(np.broadcast_to(box, tiled.xyxy.shape), tiled.xyxy) > _SAME_IOU
        is_whole = _area(tiled.xyxy) > _SAME_AREA * _area(box[None])
        added.append(not (same & overlaps & is_whole).any())
        if added[-1]:
            inside = tiled.xyxy.clip((*box[:2], *box[:2]), (*box[2:], *box[2:]))
            part |= same & (_side(tiled) > least) & (_area(inside) > _INSIDE * _area(tiled.xyxy))
    return Detections.concat([tiled[~part], large[np.array(added, bool)]])


def _side(found: Detections) -> NDArray[np.float64]:
    return np.asarray(np.ptp(found.xyxy.reshape(-1, 2, 2), axis=1).max(1))


def _area(xyxy: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray((xyxy[:, 2:] - xyxy[:, :2]).prod(1))


def _opened(image: str | Path | NDArray[np.uint8], mpp: float | None) -> Slide:
    return memory_slide(image, mpp) if isinstance(image, np.ndarray) else open_slide(image, mpp=mpp)


def _whole(slide: Slide, n_holes: int) -> None:
    """Refuse a picture with holes: a table of boxes could not say where nothing was looked for."""
    if n_holes:
        raise SlideReadError(
            f"{slide.path.name}: {n_holes} parts cannot be decoded; copy it again, or scan it, which maps its holes"
        )


def _warn_if_full(slide: Slide, n_tiles: int, is_sure: bool) -> None:
    """Warn of tiles whose detector has no queries left; below its threshold all of them say something."""
    if n_tiles and is_sure:
        warnings.warn(
            f"{slide.path.name}: {n_tiles} tiles hold more than the detector can report; a smaller tile_px finds more",
            SlideWarning,
            stacklevel=3,
        )
