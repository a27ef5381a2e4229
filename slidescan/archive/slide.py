"""One slide of an archive, on a worker: scanned or explained, never an error that ends the run."""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from slidescan.archive.listing import Entry
from slidescan.archive.record import Record
from slidescan.cluster import from_within
from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import (
    ConfigError,
    ModelError,
    ResolutionError,
    ResultBusyError,
    ResultError,
    ResultInTheWayError,
    SlideError,
    SlideNotFoundError,
    SlideReadError,
    WorkerError,
)
from slidescan.prepare import prepare
from slidescan.provenance import peak_rss_mb
from slidescan.result import ScanResult
from slidescan.scan_slide import scan
from slidescan.slides import Slide, open_slide
from slidescan.slides.remote import locate

__all__ = ["SlideTask", "estimate_slide", "scan_slide"]

T = TypeVar("T")
_SUMMARY = ("found", "detections", "flagged_regions", "tissue_mm2", "analysed_fraction")
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
    attempts: int = 0

    def done(self, told: dict[str, Any]) -> Record:
        """Return the record of a slide that is done."""
        return self._record("done", None, "", told)

    def failed(self, reason: str, message: str) -> Record:
        """Return the record of a slide that failed."""
        return self._record("failed", reason, message, {})

    def busy(self) -> Record:
        """Return what is said of a slide that another run is at; it is not kept."""
        return self._record("busy", None, "", {})

    def _record(self, state: str, reason: str | None, message: str, told: dict[str, Any]) -> Record:
        attempts, now = self.attempts + 1, round(time.time(), 3)
        return Record(self.entry.slide_id, self.entry.group, self.key, state, reason, message, attempts, now, told)


def scan_slide(task: SlideTask) -> Record:
    """Scan a slide; whatever is wrong with it is in the record.

    Raises
    ------
    ResultError, ConfigError
        If the output cannot be written or a setting cannot be meant: that concerns all slides.
    """
    try:
        return _explained(task, lambda: task.done(_told(_scanned(task))), task.failed)
    except ResultBusyError:
        return task.busy()


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
        }

    return _explained(task, look, lambda reason, message: {"reason": reason, "message": message})


def _explained(task: SlideTask, do: Callable[[], T], failed: Callable[[str, str], T]) -> T:
    try:
        return do()
    except (ConfigError, ResultError):  # of all slides
        raise
    except SlideNotFoundError as exc:
        return failed("not_found", _without_paths(exc, task))
    except _ExplainedError as exc:
        return failed(exc.reason, str(exc))
    except SlideReadError as exc:
        return failed("read_error", _without_paths(exc, task))
    except SlideError as exc:
        return failed("open_error", _without_paths(exc, task))
    except WorkerError as exc:
        return failed("killed", str(exc))
    except ModelError as exc:
        return failed("model_error", str(exc))
    except Exception as exc:  # noqa: BLE001  # a fault of ours must not end a night's run, and is reported
        return failed("internal_error", f"{type(exc).__name__} in {_place(exc)}")


class _ExplainedError(Exception):
    """A slide cannot be scanned, for a reason that its error alone would not tell."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def _opened(task: SlideTask) -> Slide:
    """Open the slide and make sure that it can be scanned."""
    entry = task.entry
    where = locate(entry.path)
    if entry.sha256 is not None and _sha256(where) != entry.sha256:
        raise _ExplainedError("wrong_digest", f"{where.name}: expected the file of the list's sha256; copy it again")
    slide = open_slide(entry.path, mpp=entry.mpp)
    if slide.mpp is None:
        reason = "no_mpp" if slide.mpp_source == "none" else "implausible_mpp"
        raise _ExplainedError(reason, f"{where.name}: µm/px: {slide.mpp_problem}; give it in the list's column mpp")
    try:
        task.detector.at(slide.mpp, allow_coarse=task.allow_coarse)
    except ResolutionError as exc:
        raise _ExplainedError("too_coarse", str(exc)) from exc
    return slide


def _sha256(where: Any) -> str:
    if not isinstance(where, Path) or not where.is_file():
        raise _ExplainedError("wrong_digest", f"{where.name}: only a file on a disk can be compared with a sha256")
    digest = hashlib.sha256()
    with where.open("rb") as file:
        while piece := file.read(_PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


def _scanned(task: SlideTask) -> ScanResult:
    slide = _opened(task)

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
            )

    try:
        return run(overwrite=False)
    except ResultInTheWayError:  # of other settings, another file, an older slidescan
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
        "tiles": tiles["planned"],
        "read_failed_boxes": tiles["read_failed_boxes"],
        "saturated_tiles": tiles["saturated"],
        "crashed_regions": tiles["crashed_regions"],
        "megapixels": provenance["profile"]["megapixels"],
        "seconds": provenance["seconds"]["total"],
        "stages_s": provenance["profile"]["thread_s"],
        "peak_rss_mb": peak_rss_mb(),
        "mpp": provenance["slide"]["mpp"],
        "detector": provenance["detector"]["name"],
        "fingerprint": provenance["slide"]["fingerprint"],
    }


def _without_paths(error: Exception, task: SlideTask) -> str:
    """Return an error's text with the slide's path cut to its name: where an archive lies is nobody's business."""
    return str(error).replace(task.entry.path, locate(task.entry.path).name)


def _place(error: BaseException) -> str:
    """Name the function an unforeseen error came from: a person can report it, and it tells nothing of the slide."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if f"{os.sep}slidescan{os.sep}" in frame.filename]
    last = (ours or frames)[-1]
    return f"{Path(last.filename).stem}.{last.name}, line {last.lineno}"
