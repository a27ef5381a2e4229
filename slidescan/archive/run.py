"""One run over an archive's output directory: what is on record there, what is to be done, and what is written.

Hides by what a slide counts as done, and the files of an archive but for its results.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slidescan.archive.listing import Entry, stamped, tag_of
from slidescan.archive.record import Record, read_record, read_records, write_tables
from slidescan.archive.report import write_report
from slidescan.archive.slide import SlideTask
from slidescan.archive.unfinished import UNFINISHED
from slidescan.commit import disk_error, made, sweep
from slidescan.config import ScanConfig
from slidescan.detect import Family, Model
from slidescan.detections import Detector
from slidescan.prepare import operating_point
from slidescan.processes import processes
from slidescan.region import scored_at_once
from slidescan.slides.fingerprint import stamp
from slidescan.slides.remote import locate

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["VERSION", "Run", "Tables"]

VERSION = importlib.metadata.version("slidescan")
# Between two writings of the tables while a run is on: seconds, and how many times longer than one takes.
_TABLES_EVERY_S, _TABLES_SHARE = 60, 30
_WRITINGS = 3  # of them, while other jobs add to the records: of many jobs the last one to end writes them all
# Modules that worker processes import: transformers takes them seconds.
_NEEDED_BY_ALL = ("slidescan.archive.slide",)
_NEEDED_BY_OURS = ("slidescan.detect.network", "transformers.models.d_fine.modeling_d_fine")


class Run:
    """One run over an output directory: what is on record, and what goes there."""

    def __init__(
        self,
        out: Path | None,
        detector: Detector | str | Path,
        config: ScanConfig,
        allow_coarse: bool,
        timeout_s: float | None = None,
    ) -> None:
        if isinstance(detector, str | Path):
            from slidescan.detect import load_detector

            detector = load_detector(detector)
        for variant in detector.variants if isinstance(detector, Family) else (detector,):
            operating_point(variant, config)  # now, and not when the first slide comes that needs this one
        self.detector, self._config, self._coarse, self._timeout_s = detector, config, allow_coarse, timeout_s
        identity = detector.sha256, detector.mpp, detector.runs_on
        settings = [VERSION, *identity, config.model_dump(mode="json"), allow_coarse]
        self._settings = json.dumps(settings, sort_keys=True)
        self.out, self._is_dry = (Path(), True) if out is None else (out, False)
        self.records: dict[str, Record] = {} if out is None else read_records(out / "records")
        self._former: dict[str, Record] = {}

    def open(self) -> None:
        """Make the output directory, or see that it can be written to, and tidy up after what was killed."""
        for name in ("slides", "records", UNFINISHED):
            made(self.out / name)
        for folder in (self.out, self.out / "records", self.out / UNFINISHED):
            sweep(folder)

    def processes(self, client: Client | None, workers: int | None) -> AbstractContextManager[tuple[Client, int]]:
        """Give the cluster, and how many processes it has."""
        # A process that sees one GPU has no cuda:1.
        gpus: list[str] | None = [] if self.detector.runs_on.startswith("cuda:") else None
        on_gpu = scored_at_once(self.detector) > 1
        is_ours = isinstance(self.detector, Model | Family)
        preload = (*_NEEDED_BY_ALL, *(_NEEDED_BY_OURS if is_ours else ()))
        return processes(client, workers, gpu=on_gpu, gpus=gpus, preload=preload)

    def unwritable(self, entry: Entry) -> dict[str, str]:
        """Return why the result of a slide, alone, could not be written to; nothing if it can."""
        place = self.out / "slides" / entry.slide_id
        if self._is_dry or not place.exists() or (place.is_dir() and os.access(place, os.W_OK)):
            return {}
        return {"reason": "unwritable", "message": "its result directory cannot be written to; see who owns it"}

    def new_task(self, entry: Entry) -> SlideTask:
        """Return the task that scans a slide from its beginning or from where it was."""
        result = (self.out / "slides" / entry.slide_id).absolute()
        now = stamp(locate(entry.path))
        key = self._key(entry, now)
        return SlideTask(entry, self.detector, self._config, result, key, self._coarse, self._timeout_s, stamp=now)

    def task(self, entry: Entry, retry_failed: bool | str) -> SlideTask | None:
        """Return the task of a slide, None where it is done or would fail again."""
        task, record = self.new_task(entry), self.records.get(entry.slide_id)
        if record is not None and record.state == "done" and not task.stamp:  # its file was moved away
            task = replace(task, key=f"{_setup(task.key)}{record.key.removeprefix(_setup(record.key))}")
        if record is None or record.key != task.key:
            return task
        if record.state == "done":
            return None if (task.out / "manifest.json").is_file() else task
        if retry_failed is True or retry_failed == record.reason or record.kind in ("retry", "next_run"):
            return task
        # A slide that crashes its workers is not to do so every night.
        again = record.kind == "crash" and not record.quarantined
        return replace(task, attempts=record.attempts) if again else None

    def regroup(self, entries: Iterable[Entry]) -> bool:
        """Put the groups of a list on record, where they are others; return whether any is. No group says nothing."""
        known = ((entry.group, self.records.get(entry.slide_id)) for entry in entries if entry.group)
        moved = [(group, record) for group, record in known if record and record.group != group]
        folder = self.out / "records"
        for group, record in moved:
            now = read_record(folder / f"{record.slide_id}.json") or record  # another run may have done it since
            self.records[record.slide_id] = now = replace(now, group=group)
            now.save(folder)
        return bool(moved)

    def rename(self, entries: Iterable[Entry]) -> None:
        """Note which slides of a list are on record under an id that it has no more; one that is done has that no more.

        A result under the former id stays where it is.
        """
        ids = {tag_of(entry.path): entry.slide_id for entry in entries}
        listed = set(ids.values())
        self._former = {
            each.place: each for each in self.records.values() if each.place in ids and each.slide_id not in listed
        }
        for place in list(self._former):
            if record := self.records.get(ids[place]):
                self._is_renamed(record)

    def keep(self, record: Record) -> None:
        """Put what became of a slide on record; the disk's own troubles end the run."""
        self.records[record.slide_id] = record
        record.save(self.out / "records")
        said = {"slide_id": record.slide_id, "reason": record.reason, "message": record.message}
        self.log(f"slide_{record.state}", attempts=record.attempts, **said, **record.told)
        self._is_renamed(record)

    def _is_renamed(self, record: Record) -> None:
        former = self._former.get(record.place)
        if record.state != "done" or former is None or _differ(former, record):
            return
        del self._former[record.place], self.records[former.slide_id]
        former.remove(self.out / "records")
        self.log("slide_renamed", slide_id=record.slide_id, former=former.slide_id)

    def log(self, event: str, **told: object) -> None:
        """Append a line to the log: one write, so that lines of two runs do not mix."""
        line = json.dumps({"at": round(time.time(), 3), "event": event, **told}, ensure_ascii=False)
        log = self.out / "log.jsonl"
        first = "\n" if event == "run_started" and _is_torn(log) else ""
        try:
            with log.open("a", encoding="utf-8", errors="replace") as file:
                file.write(f"{first}{line}\n")
        except OSError as exc:
            raise disk_error(log, exc) from exc

    def _key(self, entry: Entry, now: tuple[int, ...]) -> str:
        """Name all that a slide's result depends on, without opening it."""
        setup = json.dumps([self._settings, entry.path, entry.mpp, entry.sha256])
        return f"{hashlib.sha256(setup.encode()).hexdigest()}:{stamped(now)}"


def _differ(former: Record, record: Record) -> bool:
    """Return whether two slides that are done are not the same file."""
    return former.state == "done" and former.told.get("fingerprint") != record.told.get("fingerprint")


def _is_torn(log: Path) -> bool:
    """Return whether the last line was cut off, by a full disk or the end of the machine."""
    try:
        with log.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read() != b"\n"
    except OSError:  # there is none, or nothing in it
        return False


def _setup(key: str) -> str:
    """Return the part of a key that does not depend on the file's stamp."""
    return key.partition(":")[0]


class Tables:
    """The tables of an output directory, made of all records there, also those of other runs at the same time."""

    def __init__(self, out: Path) -> None:
        self._out, self._due_s = out, time.monotonic() + _TABLES_EVERY_S

    def write_if_due(self) -> None:
        """Write them once a minute, or more rarely where there are so many records that it takes long."""
        begun = time.monotonic()
        if begun > self._due_s:
            self.write()
            self._due_s = time.monotonic() + max(_TABLES_EVERY_S, _TABLES_SHARE * (time.monotonic() - begun))

    def write(self, *, report: bool = False) -> None:
        """Write them now, and the report if asked for; once more if a job that ended meanwhile put more on record."""
        folder = self._out / "records"
        for _ in range(_WRITINGS):
            known = stamp(folder)
            records = read_records(folder).values()
            write_tables(self._out, records)
            if report:
                write_report(self._out, records)
            if stamp(folder) == known:
                break
