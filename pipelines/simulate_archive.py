"""Measure what an archive costs beside its pixels, and whether a slide is as cheap among 100,000 as among ten.

python pipelines/simulate_archive.py                  10,000 slides of one tile, and 100,000 that are not scanned
python pipelines/simulate_archive.py --slides 2000    fewer; --unscanned for the second part
python pipelines/simulate_archive.py --smoke          a few of both, for tests

The first part scans with a detector that takes no time, so that what is left is opening, planning, committing, and the
scheduler. The second part leaves out the worker's part, too: tasks come back at once with a record, which is written as
in a run. Everything lies in a directory for temporary files (TMPDIR) and is gone at the end. Exit code 1 if the process
that hands out the slides takes more than 2 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

import slidescan as ss
from slidescan.archive import ArchiveProgress, Entry, archive_status, read_listing
from slidescan.archive.record import Record, read_records, write_tables
from slidescan.archive.slide import SlideTask
from slidescan.cluster import in_flight
from slidescan.processes import processes
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image

_MOST_BYTES = 2 << 30
_EXTRAPOLATED = 100_000
_SIZE_PX, _MPP = 160, 0.5  # one core of a tile of 256 px
_MEMORY_EVERY = 20  # slides
_FILES = 4  # that all slides are links to
_SETTINGS = {"tissue.thumbnail_px": 256}
_DETECTOR = OracleDetector(mpp=_MPP, input_px=256, object_um=20.0)


class Course:
    """When each slide ended, and the memory of this process then."""

    def __init__(self) -> None:
        self.ended: list[tuple[float, int]] = []

    def note(self) -> None:
        """Note that one more has ended; the memory is looked at now and then, which takes its time."""
        seldom = self.ended and len(self.ended) % _MEMORY_EVERY
        self.ended.append((time.perf_counter(), self.ended[-1][1] if seldom else memory()))

    def lines(self) -> Iterator[str]:
        """Yield a row for each tenth, and what the slope comes to."""
        middles, each = [], []
        for tenth in np.array_split(np.arange(len(self.ended)), 10):
            (begun, _), (end, used) = self.ended[max(0, tenth[0] - 1)], self.ended[tenth[-1]]
            seconds = (end - begun) / (len(tenth) - (tenth[0] == 0))  # none ended before the first
            middles.append(float(tenth.mean()))
            each.append(seconds)
            yield f"slides to {tenth[-1] + 1:,} | {1 / seconds:,.1f} /s, {1000 * seconds:.2f} ms each; {mb(used)}"
        slope, first = np.polyfit(middles, each, 1)
        last = first + slope * _EXTRAPOLATED
        (first_s, first_bytes), (last_s, last_bytes) = self.ended[len(self.ended) // 10], self.ended[-1]
        grown = (last_bytes - first_bytes) / (len(self.ended) * 0.9)
        yield f"line through the tenths | {1000 * first:.2f} ms at first, {1000 * last:.2f} ms at {_EXTRAPOLATED:,}"
        yield f"memory after the first tenth | {grown / 1000:+.2f} kB a slide in {last_s - first_s:.0f} s"


def memory() -> int:
    """Return what this process has in memory, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))


def mb(n_bytes: int) -> str:
    """Return a size in words."""
    return f"{n_bytes / 1e6:,.0f} MB"


def row(name: str, value: str) -> None:
    """Print a row of the table."""
    print(f"{name} | {value}", flush=True)


@contextmanager
def timed(name: str, n: int) -> Iterator[None]:
    """Print what something takes for `n` slides."""
    begun = time.perf_counter()
    yield
    seconds = time.perf_counter() - begun
    row(name, f"{seconds:.2f} s, {1e6 * seconds / n:,.0f} µs a slide")


def write_slides(folder: Path, n: int) -> None:
    """Make `n` slides of a tile each."""
    folder.mkdir()
    scale = {"resolution": (1e4 / _MPP, 1e4 / _MPP), "resolutionunit": "CENTIMETER"}
    for i in range(_FILES):
        pixels = disc_image((_SIZE_PX, _SIZE_PX), [(40.0 + 20 * i, 80.0)], 11, ground=TISSUE_GROUND)
        file = folder.with_name(f"tile-{i}.tiff")
        tifffile.imwrite(file, pixels, tile=(128, 128), photometric="rgb", compression="zlib", metadata=None, **scale)
    for i in range(n):
        (folder / f"{i:06d}.tiff").symlink_to(folder.with_name(f"tile-{i % _FILES}.tiff"))


def scanned(scratch: Path, n: int, workers: int | None) -> dict[str, Any]:
    """Scan `n` slides, look at what there is then, and return what a record tells of one."""
    slides, out = scratch / "slides", scratch / "runs"
    write_slides(slides, n)
    row(f"{n:,} slides of a tile", "")
    with timed("list", n):
        entries = read_listing(slides)
    course = Course()

    def run(on_slide: Callable[[ArchiveProgress], None]) -> list[Record]:
        config = ss.ScanConfig.load({}, _SETTINGS)
        return ss.scan_archive(entries, _DETECTOR, out=out, config=config, workers=workers, on_slide=on_slide)

    with timed("run", n):
        records = run(lambda _: course.note())
    assert all(record.state == "done" for record in records)
    for line in course.lines():
        row(*line.split(" | "))
    again: list[ArchiveProgress] = []
    with timed("run with nothing to do", n):
        run(again.append)
    assert not again
    looked_at(out, n)
    n_files = n_bytes = on_disk = 0
    for folder, _, files in os.walk(out / "slides"):
        told = [Path(folder, name).stat() for name in files]
        n_files += len(told)
        n_bytes += sum(each.st_size for each in told)
        on_disk += 512 * sum(each.st_blocks for each in told)
    row("results", f"{n_files / n:.1f} files a slide, {n_bytes / n / 1e3:.1f} kB, on disk {on_disk / n / 1e3:.1f} kB")
    return records[0].told


def looked_at(out: Path, n: int) -> None:
    """Time what reads all records."""
    with timed("read_records", n):
        records = read_records(out / "records")
    assert len(records) == n
    with timed("write_tables", n):
        write_tables(out, records.values())
    with timed("archive_status", n):
        archive_status(out)


def unscanned(scratch: Path, n: int, told: dict[str, Any]) -> None:
    """Hand out `n` slides that nobody scans, and keep their records."""
    out = scratch / "unscanned"
    (out / "records").mkdir(parents=True)
    entries = (Entry(f"{i:06d}", f"/nowhere/{i:06d}.tiff") for i in range(n))
    config, course, kept = ss.ScanConfig.load({}, _SETTINGS), Course(), dict[str, Record]()

    def todo() -> SlideTask | None:
        if (entry := next(entries, None)) is None:
            return None
        return SlideTask(entry, _DETECTOR, config, out / "slides" / entry.slide_id, "0" * 64)

    def at_once(task: SlideTask) -> Record:
        return task.done(told)

    row(f"{n:,} slides not scanned", "")
    at = n // 10
    with processes(None, 2, gpu=False) as (client, workers), timed("hand out", n):
        for _, record in in_flight(client, at_once, todo, workers + 1, at_once):
            kept[record.slide_id] = record
            course.note()
    for line in course.lines():
        row(*line.split(" | "))
    with (out / "log.jsonl").open("w", encoding="utf-8") as log:
        log.write(json.dumps({"at": time.time(), "event": "run_started", "slides": n, "to_do": n}) + "\n")
        for record in kept.values():
            log.write(json.dumps({"at": time.time(), "event": "slide_done", **record.told}) + "\n")
    saved = iter(kept.values())
    for more, so_far in ((at, at), (n - at, n)):
        with timed(f"write {more:,} records", more):
            for _ in range(more):
                next(saved).save(out / "records")
        row(f"with {so_far:,} records", "")
        looked_at(out, so_far)


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slides", type=int, default=10_000)
    parser.add_argument("--unscanned", type=int, default=100_000)
    parser.add_argument("--workers", type=int)
    parser.add_argument("--smoke", action="store_true", help="a few of both, for tests")
    arguments = parser.parse_args()
    n, n_unscanned = (20, 500) if arguments.smoke else (arguments.slides, arguments.unscanned)
    print("what | measured\n-|-")
    with tempfile.TemporaryDirectory() as scratch:
        told = scanned(Path(scratch), n, arguments.workers)
        unscanned(Path(scratch), n_unscanned, told)
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    most = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    row("highest memory of this process", mb(most))
    raise SystemExit(most > _MOST_BYTES)


if __name__ == "__main__":  # the workers are processes that import this file
    main()
