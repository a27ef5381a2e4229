"""All regions of a plan, scored and committed: what is left to do, who does it, and what cannot be read.

Invariants: a committed part is never done again; a region whose reading kills the process is given up, committed as not
analysed; the parts come back in the order of the plan.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from slidescan.cluster import cluster, cores, in_flight, readers_beside_gpu
from slidescan.commit import disk_error
from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import ResultError, WorkerError, WorkerTimeoutError
from slidescan.prepare import Prepared, slack_px
from slidescan.region import RegionPart, RegionTask, scored_at_once, wanted
from slidescan.slides import Slide
from slidescan.stages import Profile
from slidescan.suspects import is_suspect, kills_its_reader
from slidescan.timeouts import what_ended

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["Progress", "score_regions"]

# Regions handed to the cluster per thread: one being done and one waiting, so that no thread idles between two.
_QUEUED_PER_THREAD = 2
# Threads of the local cluster on a CPU: one reads while another scores, on the same cores, and each holds a region.
_MOST_ON_CPU = 4
_MOST_DEATHS_BESIDE = 3  # times a region is handed out again that waited beside one which killed its worker, twice each


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a scan is; handed to `on_progress` after each region."""

    regions_done: int
    regions: int
    megapixels_done: float
    """Megapixels of the model's plane scored in this run."""
    megapixels: float


def score_regions(
    slide: Slide,
    known: tuple[int, ...],
    prepared: Prepared,
    config: ScanConfig,
    parts_dir: Path,
    client: Client | None,
    workers: int | None,
    on_progress: Callable[[Progress], None] | None,
    limit_s: float | None = None,
) -> tuple[list[RegionPart], Profile]:
    """Score every region that has no committed part yet; return all parts in plan order, and what took the time.

    `known` is the stamp of the slide's file when the scan began.
    """
    regions = prepared.plan.regions
    grid = prepared.plan.grid
    files = [parts_dir / f"{region.name}.npz" for region in regions]
    parts = {file: part for file in files if (part := RegionPart.load(file)) is not None}
    try:
        parts_dir.mkdir(exist_ok=True)
    except OSError as exc:
        raise disk_error(parts_dir, exc) from exc
    tasks = [
        RegionTask(
            slide=slide,
            detector=prepared.detector,
            region=region,
            plane=prepared.plane,
            halo_px=grid.halo_px,
            slack_px=slack_px(prepared.detector, prepared.plane, config),
            batch_tiles=config.detect.batch_tiles,
            min_score=config.detect.min_score,
            part=file,
            stamp=known,
            limit_s=limit_s,
        )
        for region, file in zip(regions, files, strict=True)
        if file not in parts
    ]
    tasks = _survivors(tasks)
    core_mp = grid.core_px**2 / 1e6
    n_before = len(regions) - len(tasks)
    total_mp = core_mp * sum(len(t.region.tiles) for t in tasks)
    threads = workers or _threads(prepared.detector)
    profile = Profile(threads, scored_at_once(prepared.detector))
    if tasks:
        waits = wanted(parts_dir, here=client is None)
        with cluster(client, threads) as (running, all_threads, processes), waits:
            profile.threads, profile.scoring = all_threads, processes * profile.scoring
            started = time.perf_counter()
            waiting = deque(tasks)
            todo = lambda: waiting.popleft() if waiting else None  # noqa: E731
            limit = _QUEUED_PER_THREAD * all_threads
            for task, seconds in in_flight(running, RegionTask.run, todo, limit, _Killed(waiting)):
                if seconds is None:  # it will be done again
                    continue
                profile.add(core_mp * len(task.region.tiles), seconds)
                profile.wall_s = time.perf_counter() - started
                if on_progress:
                    on_progress(Progress(n_before + profile.regions, len(regions), profile.megapixels, total_mp))
    for file in files:
        if file not in parts:
            part = RegionPart.load(file)
            if part is None:
                raise ResultError(f"{file}: a committed region cannot be read back; run the same command again")
            parts[file] = part
    return [parts[file] for file in files], profile


def _survivors(tasks: list[RegionTask]) -> list[RegionTask]:
    """Return the tasks but those whose reading kills the process, as it did an earlier one; these are given up."""
    given_up = [task for task in tasks if _gives_up(task)]
    # The tile that did it may lie where regions overlap.
    near = [task for task in tasks if any(task.region.read.intersects(bad.region.read) for bad in given_up)]
    given_up += [task for task in near if task not in given_up and _gives_up(task, suspect=True)]
    return [task for task in tasks if task not in given_up]


def _gives_up(task: RegionTask, *, suspect: bool = False) -> bool:
    """Commit the region as not analysed and return True, if it is a suspect and reading it kills the process."""
    suspect = suspect or is_suspect(task.part)
    if not suspect or not kills_its_reader(task.part, task.slide.read, *task.block, task.plane):
        return False
    RegionPart.given_up(task.region).save(task.part)
    return True


class _Killed:
    """Says what becomes of a region that was on a worker when it died, more than once."""

    def __init__(self, waiting: deque[RegionTask]) -> None:
        self._waiting = waiting
        self._again: Counter[Path] = Counter()

    def __call__(self, task: RegionTask) -> dict[str, float] | None:
        """Give up the region if reading it killed the workers; try it again, None, if it may only have waited there.

        Raises
        ------
        WorkerTimeoutError
            If its scoring took too long.
        WorkerError
            If its scoring killed them or lost their device, or dead workers keep it from being done.
        """
        ended, reading = what_ended(task.late), is_suspect(task.part)
        if task.lost.exists():
            said = task.lost.read_text(encoding="utf-8")
            task.lost.unlink()
            raise WorkerError(f"the device failed, and with it its worker, more than once ({said})")
        if ended == "late" and reading:  # twice in vain: a third try would only wait as long
            RegionPart.given_up(task.region).save(task.part)
        elif ended == "late":
            raise WorkerTimeoutError(
                f"scoring a region took longer than {task.limit_s:g} s, twice; a longer --timeout or a smaller "
                "tiling.region_px may help"
            )
        elif not ended and not reading and self._again[task.part] < _MOST_DEATHS_BESIDE:
            self._again[task.part] += 1
            self._waiting.append(task)
            return None
        elif not _gives_up(task):
            raise WorkerError(
                "a worker process died while scoring a region, most likely out of memory; run the same command to "
                "continue, with a smaller tiling.region_px or fewer --workers"
            )
        return {}


def _threads(detector: Detector) -> int:
    """Return how many regions are in flight on this machine."""
    at_once = scored_at_once(detector)
    return at_once + readers_beside_gpu() if at_once > 1 else max(2, min(_MOST_ON_CPU, cores()))
