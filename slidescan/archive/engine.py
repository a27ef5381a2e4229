"""`scan_archive`: many slides on one Dask cluster, each scanned as `scan` does, and what became of each on record.

A slide is one task, which opens it, finds its tissue and stitches; its regions are tasks of their own on the same
cluster, so that one slide's reading and another's scoring overlap and a large last slide has all workers. Nothing is
decoded in the process that hands out the tasks. A worker that dies takes the regions in flight with it: the slide's
task runs again elsewhere and continues from the committed ones.
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidescan.archive.listing import Entry, as_recorded, named, read_listing, tag_of
from slidescan.archive.record import FAILURES, MOST_ATTEMPTS, Record
from slidescan.archive.run import VERSION, Run, Tables
from slidescan.archive.slide import SlideTask, estimate_slide, killed, scan_slide
from slidescan.archive.unfinished import begin, end
from slidescan.archive.worklist import Worklist
from slidescan.cluster import in_flight
from slidescan.commit import can_be_made, local
from slidescan.config import ScanConfig, checked
from slidescan.detections import Detector
from slidescan.errors import ConfigError, ResultError
from slidescan.region import scored_at_once
from slidescan.timeouts import LONGEST_S
from slidescan.whereabouts import noted

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["ArchiveProgress", "estimate_archive", "scan_archive"]

# Seconds before a slide is tried again, and how they grow: a mount that is restarted is back after some, and three
# attempts cost no night.
_BACKOFF_S, _BACKOFF_GROWTH = 5.0, 4.0
# Slides in flight for each region that is scored at once: of small slides one is scored, one opened, masked and read,
# one stitched and written. With two each, of 14 slides of one region, two processes took a seventh longer.
_SLIDES_EACH = 3


@dataclass(frozen=True, slots=True)
class ArchiveProgress:
    """How far an archive is; handed to `on_slide` after each slide."""

    record: Record
    """The slide that ended."""
    done: int
    failed: int
    slides: int
    """In this run's share of the list."""
    megapixels: float
    """Scored in this run, megapixels of the model's plane."""
    seconds: float


def scan_archive(
    listing: str | Path | list[Entry],
    detector: Detector | str | Path = "mitosis",
    *,
    out: str | Path,
    config: ScanConfig | None = None,
    client: Client | None = None,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    allow_coarse: bool = False,
    retry_failed: bool | str = False,
    max_failures: int | None = None,
    timeout_s: float | None = LONGEST_S,
    remember: bool = True,
    on_slide: Callable[[ArchiveProgress], None] | None = None,
) -> list[Record]:
    """Scan all slides of a list; run it again after anything, and it continues.

    A slide is done when its result's manifest is there and its file, settings, detector and slidescan are still those
    it was made with; any other is scanned, from its committed regions where there are some. A failure is recorded with
    its reason and costs its slide only.

    Parameters
    ----------
    listing : str, Path or list of Entry
        What `read_listing` reads.
    detector : Detector, str or Path
        A detector, or a name or path for `load_detector`.
    out : str or Path
        Directory for ``slides/<slide id>/`` (results), ``records/``, ``index.parquet``, ``failures.csv``,
        ``report.html`` (at the end of a run) and ``log.jsonl``.
    config : ScanConfig, optional
        Settings; default: `ScanConfig()`.
    client : distributed.Client, optional
        A Dask cluster; its workers must see the slides and `out`. Default: processes of this machine, which is why a
        script that calls this needs ``if __name__ == "__main__":``.
    workers : int, optional
        Processes of the local cluster; default: one a core, or one a GPU. No result depends on it.
    shard : tuple of int, optional
        (i, n): only every n-th slide, from the i-th on, i from 1 to n. For job arrays without a scheduler.
    allow_coarse : bool
        Scan slides coarser than the detector was trained for.
    retry_failed : bool or str
        Try again what failed for a reason that does not pass by itself: all, or those of one reason.
    max_failures : int, optional
        Stop after so many failures in this run.
    timeout_s : float, optional
        Seconds that opening a slide, reading a region, or scoring it may take before its worker process is ended and
        started again; None: for ever.
    remember : bool
        Note in your own state directory where the slides are, so that a review finds their pixels again
        (`slidescan.whereabouts`).
    on_slide : callable, optional
        Called after each slide.

    Returns
    -------
    list of Record
        Of every slide of the list (or the shard), as it is now, but for those that another run is at.

    Raises
    ------
    ConfigError
        If the list or a setting cannot be meant.
    ModelError
        If the detector cannot be loaded.
    ResultError
        If `out` cannot be written, or `max_failures` was reached.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"workers: expected 1 or more, got {workers}")
    if isinstance(retry_failed, str) and retry_failed not in FAILURES:
        raise ConfigError(f"retry_failed: expected True or one of {', '.join(FAILURES)}, got {retry_failed!r}")
    listed = named(listing) if isinstance(listing, list) else read_listing(listing)
    run = Run(local(out), detector, checked(config), allow_coarse, timeout_s)
    run.open()
    listed = as_recorded(listed, run.records)
    regrouped = run.regroup(listed)
    run.rename(listed)
    entries = _share(listed, shard)
    if remember:
        noted(run.out, {entry.slide_id: entry.path for entry in listed})
    todo = Worklist(task for entry in entries if (task := run.task(entry, retry_failed)) is not None)
    states = Counter(run.records[entry.slide_id].state for entry in entries if entry.slide_id in run.records)
    anew = Counter(run.records[task.entry.slide_id].state for task in todo if task.entry.slide_id in run.records)
    states.subtract(anew)
    started, failures, megapixels, to_do = time.time(), 0, 0.0, len(todo)
    tables, with_others = Tables(run.out), set[str]()
    stopped = False
    begun: Path | None = None
    because, share = "finished", "" if shard is None else f"{shard[0]}/{shard[1]}"
    try:
        with contextlib.ExitStack() as held:
            scoring = scored_at_once(run.detector)
            running, n = held.enter_context(run.processes(client, workers)) if todo else (None, 0)
            begun = begin(
                run.out,
                {each.slide_id: tag_of(each.path) for each in entries},
                [task.entry.slide_id for task in todo],
                n * scoring,
            )
            counts = {"slides": len(listed), "to_do": to_do, "again": anew["done"], "scoring": n * scoring}
            run.log("run_started", share=share, version=VERSION, **counts)
            while running is not None and todo:
                todo.wait()
                take, limit = (todo.suspect, 1) if todo.only_suspects else (todo.due, _SLIDES_EACH * n * scoring)
                ended = in_flight(running, scan_slide, take, limit, killed)
                for task, record in held.enter_context(contextlib.closing(ended)):  # type: ignore[type-var]
                    if record.state == "busy":
                        run.log("slide_busy", slide_id=record.slide_id)
                        if task.waited:  # a run that is on will put it on record
                            with_others.add(record.slide_id)
                        else:  # or a process was at it that died since
                            todo.later(replace(task, waited=True), record.told["again_s"])
                        continue
                    run.keep(record)
                    if record.kind in ("retry", "crash") and record.attempts < MOST_ATTEMPTS:
                        following = run.new_task(task.entry)
                        if not following.stamp:  # what was there when it was listed may come back
                            following = task
                        _put_back(todo, replace(following, attempts=record.attempts), record)
                        continue
                    states[record.state] += 1
                    failures += record.state == "failed"
                    megapixels += record.told.get("megapixels", 0.0)
                    if on_slide:
                        so_far = states["done"], states["failed"], len(entries), megapixels, time.time() - started
                        on_slide(ArchiveProgress(record, *so_far))
                    if max_failures is not None and failures >= max_failures:
                        stopped = True
                        raise ResultError(f"{run.out}: stopped after {failures} failures; see report.html")
                    tables.write_if_due()
    except BaseException as exc:
        because = type(exc).__name__
        raise
    finally:
        if begun is not None:
            end(begun, finished=because == "finished")
        seconds = round(time.time() - started, 3)
        done, failed = states["done"], states["failed"]
        run.log("run_ended", share=share, because=because, done=done, failed=failed, seconds=seconds)
        tables.write(report=stopped)
    if to_do or regrouped or not (run.out / "report.html").exists():
        tables.write(report=True)
    kept = run.records.keys() - with_others
    return [run.records[entry.slide_id] for entry in entries if entry.slide_id in kept]


def estimate_archive(
    listing: str | Path | list[Entry],
    detector: Detector | str | Path = "mitosis",
    *,
    out: str | Path | None = None,
    config: ScanConfig | None = None,
    client: Client | None = None,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    allow_coarse: bool = False,
    retry_failed: bool | str = False,
    timeout_s: float | None = None,
) -> Iterator[tuple[Entry, dict[str, Any]]]:
    """Open the slides that a run would scan and yield what it would do with each, or why it would fail.

    Nothing is written. With `out`, slides that are on record there and would not be scanned are left out.

    Raises
    ------
    ConfigError, ModelError, ResultError
        As `scan_archive`, before the first slide is opened.
    """
    run = Run(None if out is None else can_be_made(local(out)), detector, checked(config), allow_coarse, timeout_s)
    listed = named(listing) if isinstance(listing, list) else read_listing(listing)
    todo = [
        task
        for entry in _share(as_recorded(listed, run.records), shard)
        if (task := run.task(entry, retry_failed)) is not None
    ]
    return _estimated(run, todo, client, workers)


def _estimated(
    run: Run, tasks: list[SlideTask], client: Client | None, workers: int | None
) -> Iterator[tuple[Entry, dict[str, Any]]]:
    if not tasks:
        return
    with tempfile.TemporaryDirectory(prefix="slidescan-") as scratch:  # for marks of what does not open in time
        todo = Worklist(replace(task, out=Path(scratch, task.entry.slide_id)) for task in tasks)
        with run.processes(client, workers) as (running, n):
            suspects = []
            for task, told in in_flight(running, estimate_slide, todo.due, 2 * n, lambda _: {}):
                if told:
                    yield task.entry, run.unwritable(task.entry) or told
                else:
                    suspects.append(task)
            alone = iter(suspects)  # one by one it is seen which of them ended the worker of all
            for task, told in in_flight(running, estimate_slide, lambda: next(alone, None), 1, _would_be_killed):
                yield task.entry, told


def _would_be_killed(task: SlideTask) -> dict[str, Any]:
    record = killed(task)
    return {"reason": record.reason, "message": record.message}


def _put_back(todo: Worklist, task: SlideTask, record: Record) -> None:
    """Have a slide tried again: alone if it crashed, else later, the longer the more often it failed."""
    if record.kind == "crash":
        todo.alone(task)
    else:
        todo.later(task, _BACKOFF_S * _BACKOFF_GROWTH ** (record.attempts - 1))


def _share(entries: list[Entry], shard: tuple[int, int] | None) -> list[Entry]:
    if shard is None:
        return entries
    i, n = shard
    if not 1 <= i <= n:
        raise ConfigError(f"shard: expected i/n with i from 1 to n, got {i}/{n}")
    return entries[i - 1 :: n]
