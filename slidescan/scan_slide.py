"""`scan`: from a slide and a detector to a result.

The path: choose the detector's variant by the slide's µm/px → mask the tissue → plan regions → one Dask task a
region → stitch → map → save. Each region commits one file under ``<out>/parts``; running the same scan again takes
the committed ones as they are, so a kill costs the regions in flight, and the detections are byte-identical however
often it was killed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from slidescan.anomaly import anomaly_map, coverage_map
from slidescan.commit import local, sweep
from slidescan.config import ScanConfig, checked
from slidescan.detections import Detections, Detector
from slidescan.errors import ConfigError, ResultError, ResultInTheWayError, SlideReadError
from slidescan.geometry import Box, Frame
from slidescan.heap import give_back_freed, give_back_pixels, keep_freed
from slidescan.lease import claimed
from slidescan.manifest import read_manifest
from slidescan.overview import draw_overview
from slidescan.prepare import Prepared, operating_point, prepare, slack_px
from slidescan.provenance import describe_slide, peak_rss_mb, run_key, versions
from slidescan.region import RegionPart
from slidescan.result import ScanResult
from slidescan.saved import load_result, save_result
from slidescan.score_regions import Progress, score_regions
from slidescan.slides import Slide, open_slide
from slidescan.slides.fingerprint import changed, stamp
from slidescan.slides.remote import Remote
from slidescan.stages import Profile
from slidescan.stitch import stitch
from slidescan.suspects import being_read, is_suspect, kills_its_reader
from slidescan.whereabouts import noted

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Progress", "scan"]

_PARTS = "parts"
_HEX = "[0-9a-f]"


def scan(
    slide: Slide | str | Path,
    detector: Detector | str | Path = "mitosis",
    *,
    out: str | Path | None = None,
    config: ScanConfig | None = None,
    client: Client | None = None,
    workers: int | None = None,
    allow_coarse: bool = False,
    overwrite: bool = False,
    title: str | None = None,
    timeout_s: float | None = None,
    remember: bool = True,
    on_progress: Callable[[Progress], None] | None = None,
    on_prepared: Callable[[Prepared], None] | None = None,
) -> ScanResult:
    """Scan one slide at full resolution.

    Parameters
    ----------
    slide : Slide, str or Path
        An open slide, or a path to open with its own µm/px.
    detector : Detector, str or Path
        A detector, or a name or path for `load_detector`.
    out : str or Path, optional
        The result directory. One that holds this very scan, finished or begun, is continued. Without it nothing is kept
        on disk.
    config : ScanConfig, optional
        Settings; default: `ScanConfig()`.
    client : distributed.Client, optional
        A Dask cluster to run on; its workers must see the slide and `out`. Default: threads of this process.
    workers : int, optional
        Threads of the local cluster: regions in flight; with two or more one is read while another is scored. The
        result does not depend on it.
    allow_coarse : bool
        Scan a slide coarser than the detector was trained for.
    overwrite : bool
        Replace another scan's result in `out`.
    title : str, optional
        Heading of the overview picture; default: the name of `out`.
    timeout_s : float, optional
        On a cluster: seconds that reading a region, and scoring it, may each take before its worker process is ended. A
        region that cannot be read in time, twice, counts as not analysed; one that cannot be scored ends the scan.
    remember : bool
        Note in your own state directory where the slide of `out` is, so that a review finds its pixels again
        (`slidescan.whereabouts`).
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
    config = checked(config)
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: expected 1 or more, got {workers}")
    if isinstance(detector, str | Path):
        from slidescan.detect import load_detector

        detector = load_detector(detector)
    opened = slide if isinstance(slide, Slide) else open_slide(slide)
    known = () if opened.backend == "memory" else stamp(opened.path)  # whose name may be that of some file here
    variant = detector.at(opened.frame.mpp, allow_coarse=allow_coarse)
    opened = opened.colored(config.color or variant.color)
    operating_point(variant, config)  # before what it is to replace is gone
    key = run_key(opened, variant, config)
    with contextlib.ExitStack() as held:
        # Regions are committed to disk even where nothing is to be kept: that is what bounds the memory.
        if out is None:
            directory = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="slidescan-")), "result")
        else:
            directory = local(out)
        held.enter_context(claimed(directory))
        done = _is_done(directory, key, opened, variant, config, overwrite=overwrite)
        if out is not None and remember:
            noted(directory, {directory.resolve().name: None if opened.backend == "memory" else opened.path})
        if done:
            _sweep(directory)
            try:
                return load_result(directory)
            except ResultError as exc:
                raise ResultInTheWayError(str(exc)) from exc
        started = time.perf_counter()
        keep_freed()
        prepared = _prepare(opened, variant, config, directory / "thumbnail")
        give_back_freed()
        if on_prepared:
            on_prepared(prepared)
        # The key in the name keeps the regions of another scan, stopped or still ending, out of this one; the stamp
        # those of the file as it was when it was cut off or half copied.
        begun = hashlib.sha256(f"{key} {known}".encode()).hexdigest()
        parts_dir = (directory / f"{_PARTS}-{begun[:16]}").absolute()
        parts, profile = score_regions(
            opened, known, prepared, config, parts_dir, client, workers, on_progress, timeout_s
        )
        give_back_pixels()
        is_changed = known and stamp(opened.path) != known
        if isinstance(opened.path, Remote):
            is_changed = opened.anew().fingerprint != opened.fingerprint
        if is_changed:
            shutil.rmtree(parts_dir, ignore_errors=True)  # nothing tells which are of which files
            raise changed(opened.path)
        result = _assemble(opened, prepared, config, parts, profile, key, started)
        if out is not None:
            drawn = result
            result = save_result(
                result, directory, lambda: draw_overview(prepared.thumbnail, drawn, title or directory.resolve().name)
            )
            _sweep(directory)
    return result


def _prepare(slide: Slide, variant: Detector, config: ScanConfig, thumbnail: Path) -> Prepared:
    """Prepare the scan, unless that killed an earlier one; `thumbnail` is where the mark of that is."""
    if is_suspect(thumbnail) and kills_its_reader(thumbnail, slide.thumbnail, config.tissue.thumbnail_px):
        raise SlideReadError(
            f"{slide.path.name}: its decoder crashes where the whole slide is read at low resolution; the slide is "
            "damaged, copy it again or export it anew"
        )
    with being_read(thumbnail):
        return prepare(slide, variant, config, allow_coarse=True)


def _assemble(
    slide: Slide,
    prepared: Prepared,
    config: ScanConfig,
    parts: list[RegionPart],
    profile: Profile,
    key: str,
    started: float,
) -> ScanResult:
    """Stitch the regions' parts, lay the map, and say how it came about."""
    stitching = time.perf_counter()
    detector, plane, frame = prepared.detector, prepared.plane, slide.frame
    slack, (threshold, is_kept) = slack_px(detector, plane, config), operating_point(detector, config)
    detections, failed, saturated = _stitch_parts(parts, plane, frame, slack=slack, iou=config.stitch.iou)
    detections = detections[is_kept[detections.label]]
    detections = dataclasses.replace(detections, label=(is_kept.cumsum() - 1).astype(np.int16)[detections.label])
    classes = tuple(name for name, kept in zip(detector.classes, is_kept, strict=True) if kept)
    map_frame = frame.at(config.map.um_per_px)
    tissue = None if prepared.tissue is None else prepared.tissue.mask
    coverage = coverage_map(map_frame, prepared.plan.grid, prepared.plan.has_tissue, failed, saturated, tissue)
    sigma_um = config.map.density_sigma_um
    anomaly = anomaly_map(detections, frame, coverage, map_frame, threshold=threshold, density_sigma_um=sigma_um)
    if anomaly.tissue_mm2 and not anomaly.analysed_fraction:
        raise SlideReadError(f"{slide.path.name}: none of its {prepared.plan.n_tiles} tissue tiles could be read")
    now = time.perf_counter()
    seconds = {**prepared.seconds, "regions": profile.wall_s, "stitch": now - stitching, "total": now - started}
    provenance = {
        "run_key": key,
        "threshold": threshold,
        "slide": describe_slide(slide),
        "detector": {
            "name": detector.name,
            "sha256": detector.sha256,
            "mpp": detector.mpp,
            "attributes": list(detector.attributes),
            "plane_mpp": plane.mpp,
            "object_um": detector.object_um,
        },
        "config": config.model_dump(mode="json"),
        "tissue": None if prepared.tissue is None else {"method": prepared.tissue.method, "note": prepared.tissue.note},
        "tiles": {
            "planned": prepared.plan.n_tiles,
            "slack_um": round(plane.um(slack), 4),
            "regions": len(prepared.plan.regions),
            "retiled": sum(p.n_retiled for p in parts),
            "saturated": prepared.plan.grid.n_touched(saturated),
            "read_failed_boxes": len(failed),
            "crashed_regions": sum(p.crashed for p in parts),
        },
        "versions": versions(),
        # Each worker of a cluster finds its own.
        "device": " and ".join(sorted({part.runs_on for part in parts} - {""})) or detector.runs_on,
        "seconds": {k: round(v, 3) for k, v in seconds.items()},
        "profile": profile.told(),
        "peak_rss_mb": peak_rss_mb(),
    }
    return ScanResult(frame, classes, detections, anomaly, provenance)


def _is_done(out: Path, key: str, slide: Slide, detector: Detector, config: ScanConfig, *, overwrite: bool) -> bool:
    """Return whether `out` holds this very scan, finished; what is to be overwritten stays until that is sure."""
    manifest = None if overwrite else read_manifest(out)
    if manifest is not None:
        if manifest["run_key"] == key:
            return True
        raise ResultInTheWayError(
            f"{out}: holds the result of another {_what_differs(manifest, slide, detector, config)}; choose another "
            "output directory or pass --overwrite (overwrite=True)"
        )
    return False


def _what_differs(manifest: Mapping[str, Any], slide: Slide, detector: Detector, config: ScanConfig) -> str:
    """Say in what a result differs from a scan, the first that a person would ask for."""
    other = {
        "slide": manifest["slide"]["fingerprint"] != slide.fingerprint,
        "µm/px of the slide": manifest["slide"]["mpp"] != slide.frame.mpp,
        "reader": manifest["slide"]["backend"] != slide.backend,
        "µm/px of the detector": manifest["detector"]["mpp"] != detector.mpp,
        "detector": manifest["detector"]["sha256"] != detector.sha256,
        "set of settings": manifest["config"] != config.model_dump(mode="json"),
        "slidescan": manifest["versions"]["slidescan"] != versions()["slidescan"],
    }
    return next((name for name, differs in other.items() if differs), "device or precision")


def _sweep(out: Path) -> None:
    """Remove what scans left that were stopped: parts of regions and files half written."""
    for parts in out.glob(f"{_PARTS}-{_HEX * 16}"):
        shutil.rmtree(parts, ignore_errors=True)
    for lease in out.glob(".lease.*.partial"):  # nobody else holds one here now
        lease.unlink(missing_ok=True)
    sweep(out, held=True)


def _stitch_parts(
    parts: list[RegionPart], plane: Frame, slide: Frame, *, slack: float, iou: float
) -> tuple[Detections, list[Box], list[Box]]:
    """Merge the regions' detections; return them in level-0 px with the failed and saturated boxes of the plane."""
    first_core = np.cumsum([0] + [len(p.cores) for p in parts])
    tile = [p.tile + start for p, start in zip(parts, first_core, strict=False)]
    merged = stitch(
        Detections.concat(p.detections for p in parts),
        np.concatenate([*tile, np.empty(0, np.intp)]),
        np.concatenate([*(p.cores for p in parts), np.empty((0, 4))]),
        slack=slack,
        iou=iou,
    )
    failed = sorted({Box(*row) for p in parts for row in p.failed.tolist()})
    saturated = [Box(*row) for p in parts for row in p.saturated.tolist()]
    # The last px of the plane may reach beyond the slide.
    return merged.moved(plane.factor_to(slide), 0.0, 0.0).inside(slide.size_wh), failed, saturated
