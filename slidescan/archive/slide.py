"""One slide of an archive, on a worker: scanned or explained, never an error that ends the run."""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from slidescan.archive.explained import ExplainedError, explained
from slidescan.archive.listing import Entry, tag_of
from slidescan.archive.record import SCORE_BINS, Record, read_record
from slidescan.cluster import from_within
from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import (
    ConfigError,
    MissingExtraError,
    ResolutionError,
    ResultBusyError,
    ResultInTheWayError,
    ResultLeasedError,
    SlideNotFoundError,
    SlideReadError,
    SlideWarning,
)
from slidescan.lease import LASTS_S
from slidescan.legend import share_text
from slidescan.prepare import Prepared, estimate_s, prepare
from slidescan.provenance import peak_gpu_mb, peak_rss_mb
from slidescan.result import ScanResult
from slidescan.scan_slide import scan
from slidescan.slides import Slide, open_slide
from slidescan.slides.fingerprint import stamp
from slidescan.slides.remote import locate
from slidescan.timeouts import what_ended, within

__all__ = ["SlideTask", "estimate_slide", "killed", "scan_slide"]

T = TypeVar("T")
# Seconds until a worker that was told to go has let go of its slide, which the cluster gave to another at once.
_UNLOCKED_S = 5
_PIECE_BYTES = 1 << 22  # read at a time for a digest


@dataclass(frozen=True, slots=True)
class SlideTask:
    """Everything a worker needs to do one slide."""

    entry: Entry
    detector: Detector
    config: ScanConfig
    out: Path
    key: str
    allow_coarse: bool = False
    timeout_s: float | None = None
    attempts: int = 0
    waited: bool = False
    """Whether it was another process's once before."""
    stamp: tuple[int, ...] = ()
    """Of the file when `key` was made."""

    @property
    def late(self) -> Path:
        """The mark of a slide that could not be opened in time."""
        return self.out / "late"

    def done(self, told: dict[str, Any]) -> Record:
        """Return the record of a slide that is done."""
        reason, message = None, ""
        if told["analysed_fraction"] is None:
            reason = "no_tissue"
        elif holes := told["read_failed_boxes"]:
            reason = "decode_holes"
            parts = "1 part" if holes == 1 else f"{holes:,} parts"
            message = (
                f"{parts} could not be read; {share_text(told['analysed_fraction'], 2)} of the tissue was analysed"
            )
        elif others := told["other_images"]:
            reason = "more_images"
            message = (
                f"{others} more image{'s' * (others > 1)} in its file, not looked at; export each as a file of its own"
            )
        return self._record("done", reason, message, told)

    def failed(self, reason: str, message: str) -> Record:
        """Return the record of a slide that failed."""
        return self._record("failed", reason, message, {})

    def busy(self, again_s: float) -> Record:
        """Return what is said of a slide that another process is at, and when to look again; it is not kept."""
        return self._record("busy", None, "", {"again_s": again_s})

    def _record(self, state: str, reason: str | None, message: str, told: dict[str, Any]) -> Record:
        entry, attempts, now = self.entry, self.attempts + 1, round(time.time(), 3)
        place = tag_of(entry.path)
        return Record(entry.slide_id, entry.group, self.key, state, reason, message, attempts, now, place, told)


def killed(task: SlideTask) -> Record:
    """Return the record of a slide whose opening or stitching ended its workers."""
    if what_ended(task.late) == "late":
        return task.failed("timeout", f"opening it and finding its tissue took longer than {task.timeout_s:g} s, twice")
    for mark in task.out.glob("parts-*/*.lost"):
        with suppress(OSError):
            said = f"its device failed, and with it its worker, more than once ({mark.read_text(encoding='utf-8')})"
            return task.failed("killed", said)
    message = "its worker died more than once; more memory or a smaller tiling.region_px may help"
    return task.failed("killed", message)


def scan_slide(task: SlideTask) -> Record:
    """Scan a slide; whatever is wrong with it is in the record.

    Raises
    ------
    ResultError, ConfigError
        If the output cannot be written or a setting cannot be meant: that concerns all slides.
    """
    try:
        return explained(task.entry, task.out, lambda: task.done(_scanned(task)), task.failed)
    except ResultBusyError as exc:
        return task.busy(again_s=LASTS_S + 1 if isinstance(exc, ResultLeasedError) else _UNLOCKED_S)


def estimate_slide(task: SlideTask) -> dict[str, Any]:
    """Return what a scan would do: bytes, tissue, tiles; or the reason it would fail."""

    def look() -> dict[str, Any]:
        slide = _opened(task)
        prepared = prepare(slide, task.detector, task.config, allow_coarse=task.allow_coarse)
        where = locate(task.entry.path)
        size = where.stat().st_size if isinstance(where, Path) and where.is_file() else None
        tissue = prepared.tissue
        return {
            "bytes": size,
            "mpp": slide.frame.mpp,
            "tissue_mm2": None if tissue is None else round(tissue.fraction * slide.frame.area_mm2, 3),
            "tiles": prepared.plan.n_tiles,
            "megapixels": round(prepared.plan.core_megapixels, 3),
            "seconds": round(estimate_s(slide, prepared, task.config), 2) if prepared.plan.n_tiles else 0.0,
        }

    with _in_time(task):
        told = explained(task.entry, task.out, look, lambda reason, message: {"reason": reason, "message": message})
    with suppress(OSError):
        task.out.rmdir()
    return told


def _opened(task: SlideTask) -> Slide:
    """Open the slide and make sure that it can be scanned."""
    entry = task.entry
    where = locate(entry.path)
    now = stamp(where)
    if now != task.stamp:
        said = "the file changed since it was listed" if now else "its worker finds no slide where there was one"
        raise ExplainedError("read_error", f"{where.name}: {said}; it is tried again")
    if entry.sha256 is not None and _sha256(where) != entry.sha256:
        raise ExplainedError("wrong_digest", f"{where.name}: expected the file of the list's sha256; copy it again")
    try:
        with warnings.catch_warnings():  # of further images: a caveat on record, where a warning names the file
            warnings.simplefilter("ignore", SlideWarning)
            slide = open_slide(entry.path, mpp=entry.mpp)
    except ConfigError as exc:  # of this row, such as a URL of no known kind
        raise ExplainedError("unsupported", str(exc)) from exc
    except MissingExtraError as exc:
        raise ExplainedError("missing_package", str(exc)) from exc
    if slide.mpp is None:
        reason = "no_mpp" if slide.mpp_source == "none" else "implausible_mpp"
        raise ExplainedError(reason, f"{where.name}: µm/px: {slide.mpp_problem}; give it in the list's column mpp")
    try:
        task.detector.at(slide.mpp, allow_coarse=task.allow_coarse)
    except ResolutionError as exc:
        raise ExplainedError("too_coarse", str(exc)) from exc
    return slide


def _sha256(where: Any) -> str:
    digest = hashlib.sha256()
    try:
        if isinstance(where, Path) and not where.exists():
            raise SlideNotFoundError(f"{where.name}: no such slide")
        if not isinstance(where, Path) or not where.is_file():
            raise ExplainedError("wrong_digest", f"{where.name}: only a file on a disk can be compared with a sha256")
        with where.open("rb") as file:
            while piece := file.read(_PIECE_BYTES):
                digest.update(piece)
    except SlideNotFoundError:  # which is an OSError
        raise
    except OSError as exc:
        raise SlideReadError(f"{where.name}: cannot be read for its sha256 ({exc.strerror})") from exc
    return digest.hexdigest()


def _scanned(task: SlideTask) -> dict[str, Any]:
    with ExitStack() as opening:
        opening.enter_context(_in_time(task))
        slide = _opened(task)
        result = _scan(task, slide, lambda _: opening.close())
        return {**_told(result), "other_images": slide.others}


@contextmanager
def _in_time(task: SlideTask) -> Iterator[None]:
    """End this process if the block, which opens the slide, takes too long."""
    with suppress(OSError):  # is said when the scan begins to write
        task.out.mkdir(parents=True, exist_ok=True)
    with within(task.timeout_s, task.late):
        yield


def _scan(task: SlideTask, slide: Slide, on_prepared: Callable[[Prepared], None]) -> ScanResult:
    def run(overwrite: bool) -> ScanResult:
        with from_within() as client:
            return scan(
                slide,
                task.detector,
                out=task.out,
                config=task.config,
                client=client,
                allow_coarse=task.allow_coarse,
                overwrite=overwrite,
                title=task.entry.slide_id,
                timeout_s=task.timeout_s,
                remember=False,  # the archive does, once for all
                on_prepared=on_prepared,
            )

    try:
        return run(overwrite=False)
    except ResultInTheWayError:  # of other settings, another file, an older slidescan
        records = task.out.parents[1] / "records"
        if old := read_record(records / f"{task.entry.slide_id}.json"):  # a run that ends now leaves no false record
            old.outdated.save(records)
        return run(overwrite=True)


def _told(result: ScanResult) -> dict[str, Any]:
    """Return what operations want to see of a slide that is done."""
    summary, provenance = result.summary(), result.provenance
    hotspot, tiles = summary["hotspot"], provenance["tiles"]
    return {
        **{
            name: summary[name]
            for name in ("found", "detections", "flagged_regions", "tissue_mm2", "analysed_fraction")
        },
        "hotspot_count": 0 if hotspot is None else hotspot["count"],
        "best_evidence": result.regions[0].evidence if result.regions else 0.0,
        "scores": np.histogram(result.detections.score, SCORE_BINS, (0.0, 1.0))[0].tolist(),
        "tiles": tiles["planned"],
        "read_failed_boxes": tiles["read_failed_boxes"],
        "saturated_tiles": tiles["saturated"],
        "crashed_regions": tiles["crashed_regions"],
        "megapixels": provenance["profile"]["megapixels"],
        "seconds": provenance["seconds"]["total"],
        "stages_s": provenance["profile"]["thread_s"],
        "peak_rss_mb": peak_rss_mb(),
        "peak_gpu_mb": peak_gpu_mb(),
        "mpp": provenance["slide"]["mpp"],
        "detector": provenance["detector"]["name"],
        "fingerprint": provenance["slide"]["fingerprint"],
        "size_wh": provenance["slide"]["size_wh"],
    }
