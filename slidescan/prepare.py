"""What a scan will do, known before the first tile is scored: variant, plane, tissue, plan and time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import ConfigError, SlideUnsupportedError
from slidescan.geometry import Frame
from slidescan.plan import Plan, plan
from slidescan.region import scored_at_once
from slidescan.slides import Slide
from slidescan.slides.tissue import TissueMask, tissue_mask

__all__ = ["Prepared", "estimate_s", "halo_px", "operating_point", "prepare", "slack_px"]

# Tiles that are timed on a CPU, which scores one after the other.
_PROBED_ON_CPU = 2
# How far a detection's centre may move from tile to tile: 3 µm are 0.19 of the largest figure that the bundled detector
# looks for (15.6 µm), and with objects of 160 µm at 2 µm/px, jittered by 4 px, they lost 11 of 1,400 and doubled 41.
_SLACK_UM, _SLACK_SHARE, _SLACK_PX = 3.0, 0.19, 2.0
_MOST_MAP_PX = 200_000_000  # of the anomaly map, which takes about 40 bytes a px while it is laid


@dataclass(frozen=True, slots=True, eq=False)
class Prepared:
    """What a scan will do, known before the first tile is scored."""

    detector: Detector
    plane: Frame
    """The plane the model reads."""
    tissue: TissueMask | None
    thumbnail: np.ndarray[Any, np.dtype[np.uint8]]
    plan: Plan
    seconds: dict[str, float] = field(default_factory=dict)


def prepare(slide: Slide, detector: Detector, config: ScanConfig, *, allow_coarse: bool = False) -> Prepared:
    """Choose the detector's variant, find the tissue and plan the regions.

    Raises
    ------
    ResolutionError
        If the slide's µm/px is unknown, implausible, or too coarse for the detector.
    ConfigError
        If its anomaly map would have more px than there is room for, or as `operating_point`.
    SlideUnsupportedError
        If it shines on a dark ground, and tissue is looked for.
    """
    started = time.perf_counter()
    _refuse_large_map(slide.frame, config.map.um_per_px)
    variant = detector.at(slide.frame.mpp, allow_coarse=allow_coarse)
    operating_point(variant, config)
    plane = slide.plane(variant.mpp)
    thumbnail, thumbnail_frame = slide.thumbnail(config.tissue.thumbnail_px)
    tissue = tissue_mask(thumbnail.rgb, mpp=thumbnail_frame.mpp) if config.tissue.enabled else None
    if tissue is not None and tissue.is_fluorescent:
        raise SlideUnsupportedError(
            f"{slide.path.name}: expected a slide in transmitted light, this one shines on a dark ground "
            "(fluorescence?); export its brightfield image, or scan all of it with --set tissue.enabled=false"
        )
    if tissue is not None and thumbnail.holes:
        # What the thumbnail could not read is white there, but nobody knows that it is glass.
        for hole in thumbnail.holes:
            x0, y0, x1, y1 = hole.round_out()
            tissue.mask[y0:y1, x0:x1] = True
        tissue = replace(tissue, fraction=float(tissue.mask.mean()))
    tile_px = config.tiling.tile_px or variant.input_px
    planned = plan(
        plane,
        None if tissue is None else tissue.mask,
        tile_px=tile_px,
        halo_px=halo_px(variant, plane, tile_px, config),
        region_px=config.tiling.region_px,
        shift_px=config.tiling.shift_px,
    )
    return Prepared(variant, plane, tissue, thumbnail.rgb, planned, {"tissue": time.perf_counter() - started})


def _refuse_large_map(frame: Frame, um_per_px: float) -> None:
    n_px = frame.area_mm2 * 1e6 / um_per_px**2
    if n_px > _MOST_MAP_PX:
        least = math.ceil(math.sqrt(frame.area_mm2 * 1e6 / _MOST_MAP_PX) * 10) / 10
        raise ConfigError(f"map.um_per_px: expected {least:g} µm or more for a slide of this size, got {um_per_px:g}")


def operating_point(detector: Detector, config: ScanConfig) -> tuple[float, NDArray[np.bool_]]:
    """Return the score from which a detection counts, and of each of the detector's classes whether it is kept.

    Raises
    ------
    ConfigError
        If nothing is kept that is not above that score, or a class is not one of the detector's.
    """
    wanted = detector.classes if config.detect.classes is None else config.detect.classes
    if unknown := [name for name in wanted if name not in detector.classes]:
        raise ConfigError(f"detect.classes: expected some of {', '.join(detector.classes)}, got {unknown[0]!r}")
    threshold = detector.threshold if config.detect.threshold is None else config.detect.threshold
    if config.detect.min_score > threshold:
        raise ConfigError(
            f"detect.min_score must not exceed the threshold {threshold:g}, below which nothing counts, got "
            f"{config.detect.min_score:g}"
        )
    return threshold, np.isin(np.array(detector.classes), wanted)


def slack_px(detector: Detector, plane: Frame, config: ScanConfig) -> float:
    """Return how far the centre of one object may move between two tiles that see it, px of `plane`."""
    if config.stitch.slack_um is not None:
        return plane.px(config.stitch.slack_um)
    return max(plane.px(max(_SLACK_UM, _SLACK_SHARE * detector.object_um)), _SLACK_PX)


def halo_px(detector: Detector, plane: Frame, tile_px: int, config: ScanConfig) -> int:
    """Return the margin a tile sees beyond its core, px of `plane`, a multiple of 16 px where the tile has room for it.

    Cores are then a multiple of 32 px: every tile lies on the same phase of a network's strides.

    Raises
    ------
    ConfigError
        If `config.tiling.halo_um` could not hold half an object and the slack.
    """
    # DETR-type models have no anchors in the outer 1 % of a tile.
    for_an_object_um = detector.object_um + 0.01 * tile_px * plane.mpp
    # What the detector wants would leave little of a small tile.
    wanted_um = min(detector.halo_um or 0.0, tile_px / 6 * plane.mpp)
    least_um = detector.object_um / 2 + plane.um(slack_px(detector, plane, config))
    halo_um = config.tiling.halo_um or max(for_an_object_um, wanted_um, least_um)
    if halo_um < least_um:
        raise ConfigError(
            f"tiling.halo_um must be at least {least_um:g} (half the largest object plus stitch.slack_um), "
            f"got {halo_um:g}"
        )
    least_px = int(np.ceil(plane.px(halo_um)))
    even_px = 16 * -(-least_px // 16)
    return even_px if tile_px - 2 * even_px >= 32 else least_px


def estimate_s(slide: Slide, prepared: Prepared, settings: ScanConfig) -> float:
    """Estimate the seconds a scan takes here, from reading and scoring a few of its tiles."""
    at_once = settings.detect.batch_tiles if scored_at_once(prepared.detector) > 1 else _PROBED_ON_CPU
    tiles = prepared.plan.regions[len(prepared.plan.regions) // 2].tiles[:at_once]

    def probe() -> None:
        windows = []
        for tile in tiles:
            x0, y0, x1, y1 = tile.read.round_out()
            windows.append(slide.read(x0, y0, x1 - x0, y1 - y0, prepared.plane).rgb)
        prepared.detector.detect(np.stack(windows), settings.detect.min_score)

    probe()  # loads the weights
    started = time.perf_counter()
    probe()
    return (time.perf_counter() - started) / len(tiles) * prepared.plan.n_tiles
