"""`scan`: from a slide and a detector to a result.

The path: choose the detector's variant by the slide's µm/px → mask the tissue → plan regions → one Dask task a
region → stitch → map → save. Each region commits one file under ``<out>/parts``; running the same scan again takes
the committed ones as they are, so a kill costs the regions in flight, and the detections are byte-identical however
often it was killed.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidescan.anomaly import AnomalyMap, anomaly_map, coverage_map
from slidescan.cluster import cluster, in_flight
from slidescan.config import ScanConfig
from slidescan.detections import Detections, Detector
from slidescan.errors import ConfigError, ResultError, SlideReadError
from slidescan.geometry import Box, Frame
from slidescan.overview import draw_overview
from slidescan.plan import Plan, plan
from slidescan.provenance import describe_slide, peak_rss_mb, run_key, versions
from slidescan.region import RegionPart, RegionTask, commit, disk_error
from slidescan.result import MANIFEST, ScanResult, load_result, read_manifest
from slidescan.slides import Slide, open_slide
from slidescan.slides.tissue import TissueMask, tissue_mask
from slidescan.stitch import stitch

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Prepared", "Progress", "prepare", "scan"]

_RUN_KEY = "scan.json"
_PARTS = "parts"
# Regions handed to the cluster per thread: one being done and one waiting, so that no thread idles between two.
_QUEUED_PER_THREAD = 2


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a scan is; handed to `on_progress` after each region."""

    regions_done: int
    regions: int
    megapixels_done: float
    """Megapixels of the model's plane scored in this run."""
    megapixels: float


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
    """
    started = time.perf_counter()
    variant = detector.at(slide.frame.mpp, allow_coarse=allow_coarse)
    plane = slide.plane(variant.mpp)
    thumbnail, thumbnail_frame = slide.thumbnail(config.tissue.thumbnail_px)
    tissue = tissue_mask(thumbnail.rgb, mpp=thumbnail_frame.mpp) if config.tissue.enabled else None
    tile_px = config.tiling.tile_px or variant.input_px
    halo_um = config.tiling.halo_um or variant.object_um + 0.01 * tile_px * plane.mpp
    slack_um = config.stitch.slack_um
    if halo_um < variant.object_um / 2 + slack_um:
        raise ConfigError(
            f"tiling.halo_um must be at least {variant.object_um / 2 + slack_um:g} (half the largest object plus "
            f"stitch.slack_um), got {halo_um:g}"
        )
    planned = plan(
        plane,
        None if tissue is None else tissue.mask,
        tile_px=tile_px,
        halo_px=int(np.ceil(plane.px(halo_um))),
        region_px=config.tiling.region_px,
        shift_px=config.tiling.shift_px,
    )
    return Prepared(variant, plane, tissue, thumbnail.rgb, planned, {"tissue": time.perf_counter() - started})


def scan(
    slide: Slide | str | Path,
    detector: Detector | str = "mitosis",
    *,
    out: str | Path | None = None,
    config: ScanConfig | None = None,
    client: Client | None = None,
    workers: int | None = None,
    allow_coarse: bool = False,
    overwrite: bool = False,
    title: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_prepared: Callable[[Prepared], None] | None = None,
) -> ScanResult:
    """Scan one slide at full resolution.

    Parameters
    ----------
    slide : Slide, str or Path
        An open slide, or a path to open with its own µm/px.
    detector : Detector or str
        A detector, or a name or path for `load_detector`.
    out : str or Path, optional
        The result directory. One that holds this very scan, finished or begun, is continued. Without it nothing is kept
        on disk.
    config : ScanConfig, optional
        Settings; default: `ScanConfig()`.
    client : distributed.Client, optional
        A Dask cluster to run on; its workers must see the slide and `out`. Default: threads of this process.
    workers : int, optional
        Threads of the local cluster: regions in flight. The result does not depend on it.
    allow_coarse : bool
        Scan a slide coarser than the detector was trained for.
    overwrite : bool
        Replace another scan's result in `out`.
    title : str, optional
        Heading of the overview picture; default: the slide's name.
    on_progress, on_prepared : callable, optional
        Called after each region, and once before the first.

    Returns
    -------
    ScanResult

    Raises
    ------
    SlideError, ModelError, ConfigError, ResultError
        Each says in one line what is wrong and what to do.

    Examples
    --------
    >>> import slidescan as ss
    >>> result = ss.scan("case.svs", "mitosis", out="runs/case")  # doctest: +SKIP
    """
    config = config or ScanConfig()
    if isinstance(detector, str):
        from slidescan.detect import load_detector

        detector = load_detector(detector)
    opened = slide if isinstance(slide, Slide) else open_slide(slide, color=config.color)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="slidescan-") as scratch:
            result = scan(
                opened,
                detector,
                out=Path(scratch) / "result",
                config=config,
                client=client,
                workers=workers,
                allow_coarse=allow_coarse,
                title=title,
                on_progress=on_progress,
                on_prepared=on_prepared,
            )
            return ScanResult(result.frame, result.classes, result.detections, result.anomaly, result.provenance)

    out = Path(out)
    started = time.perf_counter()
    variant = detector.at(opened.frame.mpp, allow_coarse=allow_coarse)
    key = run_key(opened, variant, config)
    if _claim(out, key, overwrite=overwrite):
        return load_result(out)
    prepared = prepare(opened, variant, config, allow_coarse=True)
    if on_prepared:
        on_prepared(prepared)
    parts = _score_regions(opened, prepared, config, out / _PARTS, client, workers, on_progress)

    stitching = time.perf_counter()
    detections, failed, saturated = _stitch_parts(parts, prepared.plane, opened.frame, config)
    threshold = variant.threshold if config.detect.threshold is None else config.detect.threshold
    anomaly = _map(prepared, opened.frame, detections, failed, saturated, threshold, config)
    if anomaly.tissue_mm2 and not anomaly.analysed_fraction:
        raise SlideReadError(f"{opened.path}: none of its {prepared.plan.n_tiles} tissue tiles could be read")
    seconds = dict(prepared.seconds)
    for part in parts:
        for stage, value in part.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + value
    seconds["stitch"] = time.perf_counter() - stitching
    seconds["total"] = time.perf_counter() - started
    provenance = {
        "run_key": key,
        "threshold": threshold,
        "slide": describe_slide(opened),
        "detector": {
            "name": variant.name,
            "sha256": variant.sha256,
            "mpp": variant.mpp,
            "plane_mpp": prepared.plane.mpp,
            "object_um": variant.object_um,
        },
        "config": config.model_dump(mode="json"),
        "tissue": None if prepared.tissue is None else {"method": prepared.tissue.method, "note": prepared.tissue.note},
        "tiles": {
            "scored": prepared.plan.n_tiles,
            "regions": len(prepared.plan.regions),
            "retiled": sum(p.n_retiled for p in parts),
            "saturated": len(saturated),
            "read_failed_boxes": len(failed),
        },
        "versions": versions(),
        "device": str(getattr(variant, "device", "cpu")),
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "peak_rss_mb": peak_rss_mb(),
    }
    result = ScanResult(opened.frame, tuple(variant.classes), detections, anomaly, provenance)
    saved = result.save(out, draw_overview(prepared.thumbnail, result, title or opened.name))
    shutil.rmtree(out / _PARTS, ignore_errors=True)
    (out / _RUN_KEY).unlink(missing_ok=True)
    return saved


def _claim(out: Path, key: str, *, overwrite: bool) -> bool:
    """Make `out` ours; return whether it already holds this very scan, finished."""
    try:
        manifest = None if overwrite else read_manifest(out)
        if manifest is not None:
            if manifest["run_key"] == key:
                return True
            raise ResultError(
                f"{out}: holds the result of another slide, detector or settings; "
                "choose another output directory or pass --overwrite (overwrite=True)"
            )
        begun = out / _RUN_KEY
        if overwrite or (begun.is_file() and begun.read_text(encoding="utf-8").strip() != key):
            (out / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(out / _PARTS, ignore_errors=True)
        (out / _PARTS).mkdir(parents=True, exist_ok=True)
        commit(begun, lambda partial: _write(partial, key))
    except OSError as exc:
        if isinstance(exc, ResultError):
            raise
        raise disk_error(out, exc) from exc
    return False


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _score_regions(
    slide: Slide,
    prepared: Prepared,
    config: ScanConfig,
    parts_dir: Path,
    client: Client | None,
    workers: int | None,
    on_progress: Callable[[Progress], None] | None,
) -> list[RegionPart]:
    """Score every region that has no committed part yet, and return all parts in plan order."""
    regions = prepared.plan.regions
    grid = prepared.plan.grid
    files = [parts_dir / f"{region.name}.npz" for region in regions]
    parts = {file: part for file in files if (part := RegionPart.load(file)) is not None}
    tasks = [
        RegionTask(
            slide=slide,
            detector=prepared.detector,
            region=region,
            plane=prepared.plane,
            halo_px=grid.halo_px,
            slack_px=prepared.plane.px(config.stitch.slack_um),
            batch_tiles=config.detect.batch_tiles,
            min_score=config.detect.min_score,
            part=file,
        )
        for region, file in zip(regions, files, strict=True)
        if file not in parts
    ]
    core_mp = grid.core_px**2 / 1e6
    done_mp, n_done = 0.0, len(parts)
    total_mp = core_mp * sum(len(t.region.tiles) for t in tasks)
    if tasks:
        with cluster(client, workers) as (running, threads):
            for task, _ in in_flight(running, tasks, _QUEUED_PER_THREAD * threads):
                n_done += 1
                done_mp += core_mp * len(task.region.tiles)
                if on_progress:
                    on_progress(Progress(n_done, len(regions), done_mp, total_mp))
    for file in files:
        if file not in parts:
            part = RegionPart.load(file)
            if part is None:
                raise ResultError(f"{file}: a committed region cannot be read back; run the same command again")
            parts[file] = part
    return [parts[file] for file in files]


def _stitch_parts(
    parts: list[RegionPart], plane: Frame, slide: Frame, config: ScanConfig
) -> tuple[Detections, list[Box], list[Box]]:
    """Merge the regions' detections; return them in level-0 px with the failed and saturated boxes of the plane."""
    first_core = np.cumsum([0] + [len(p.cores) for p in parts])
    tile = [p.tile + start for p, start in zip(parts, first_core, strict=False)]
    merged = stitch(
        Detections.concat(p.detections for p in parts),
        np.concatenate([*tile, np.empty(0, np.intp)]),
        np.concatenate([*(p.cores for p in parts), np.empty((0, 4))]),
        slack=plane.px(config.stitch.slack_um),
        iou=config.stitch.iou,
    )
    failed = sorted({Box(*row) for p in parts for row in p.failed.tolist()})
    saturated = [Box(*row) for p in parts for row in p.saturated.tolist()]
    return merged.moved(plane.factor_to(slide), 0.0, 0.0), failed, saturated


def _map(
    prepared: Prepared,
    slide: Frame,
    detections: Detections,
    failed: list[Box],
    saturated: list[Box],
    threshold: float,
    config: ScanConfig,
) -> AnomalyMap:
    """Lay detections and coverage on the map's plane."""
    frame = slide.at(config.map.um_per_px)
    coverage = coverage_map(frame, prepared.plan.grid, prepared.plan.has_tissue, failed, saturated)
    return anomaly_map(
        detections,
        slide,
        coverage,
        frame,
        threshold=threshold,
        density_sigma_um=config.map.density_sigma_um,
    )
