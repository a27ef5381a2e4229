"""How an archive stands, from its records alone: while a run is on, after it, from another machine."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slidescan.archive.record import REASONS, Record, records_of
from slidescan.archive.unfinished import unfinished
from slidescan.legend import share_text
from slidescan.stages import SCORING

__all__ = ["ArchiveStatus", "archive_status", "standing"]

_AGAIN = {"retry": "; the next run tries again", "next_run": "; the next run tries again"}


@dataclass(frozen=True, slots=True)
class ArchiveStatus:
    """Counts and rates of an archive's output directory."""

    slides: int
    """On record or to do."""
    done: int
    left: int = 0
    """To do, or to be done again."""
    failed: dict[str, int] = field(default_factory=dict)
    """Failures by reason."""
    caveats: dict[str, int] = field(default_factory=dict)
    """Slides that are done but for something, by reason."""
    quarantined: int = 0
    """Failures that are not tried again because they crashed too often."""
    running: bool = False
    """Whether a run has not said that it ends: it is on, or was killed."""
    found: int = 0
    tissue_mm2: float = 0.0
    analysed_fraction: float | None = None
    """Of all tissue."""
    slides_per_h: float | None = None
    """Since the runs that are on began, or the last one."""
    megapixels_per_s: float | None = None
    busy: float | None = None
    """Share of that time in which models scored, of all that could."""
    seconds_left: float | None = None
    """At that rate, for what is left."""

    def told(self) -> dict[str, Any]:
        """Return it as JSON would have it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return what a person reads."""
        n_failed = sum(self.failed.values())
        lines = [f"slides      {self.slides:,}: {self.done:,} done, {n_failed:,} failed, {self.left:,} to do"]
        for reason, n in sorted([*self.failed.items(), *self.caveats.items()], key=lambda item: -item[1]):
            kind, meaning = REASONS.get(reason, ("stays", "a reason of another slidescan"))
            lines.append(f"  {reason:<16} {n:,}: {meaning}{_AGAIN.get(kind, '')}")
        if self.quarantined:
            lines.append(f"  {self.quarantined:,} crashed too often and are left alone until --retry-failed")
        if self.analysed_fraction is not None:
            seen = share_text(self.analysed_fraction, 2)
            lines.append(f"looked at   {seen} of {self.tissue_mm2:,.1f} mm² tissue; {self.found:,} found")
        if self.slides_per_h:
            rate = f"{self.slides_per_h:,.1f} slides/h, {self.megapixels_per_s or 0:,.1f} MP/s"
            busy = "" if self.busy is None else f", models busy {self.busy:.0%} of the time"
            to_go = f"; about {(self.seconds_left or 0) / 3600:.1f} h left" if self.left else ""
            lines.append(f"rate        {rate}{busy}{to_go}")
        if self.running:
            lines.append("run         on, or killed before its end: run the same command to continue")
        elif self.left:
            lines.append("run         none is on: run the same command to continue")
        return lines


def archive_status(out: str | Path) -> ArchiveStatus:
    """Read how an archive stands.

    Raises
    ------
    ResultError
        If `out` holds no archive.
    """
    folder = Path(out)
    return standing(records_of(folder).values(), folder)


def standing(records: Iterable[Record], out: Path) -> ArchiveStatus:
    """Tell how an archive stands from its records, its log, and what its runs have still to do."""
    known = {record.slide_id: record for record in records}
    runs, last = unfinished(out), _last_run(out / "log.jsonl")
    # What is done anew, under other settings or once more, is not done until it is done again.
    again, first = set[str](), set[tuple[str, str]]()
    for run in runs:
        for slide_id in run.to_do:
            record, place = known.get(slide_id), run.places.get(slide_id, "")
            if record is None or (place and record.place and record.place != place):  # or another slide of that name
                first.add((slide_id, place))
            elif record.finished_s < run.at:
                again.add(slide_id)
    done = [record for record in known.values() if record.state == "done"]
    ended = [record for record in known.values() if record.slide_id not in again]
    failed = [record for record in ended if record.state == "failed"]
    n_done = sum(record.state == "done" for record in ended)
    # Jobs of an array that have not begun are to do, too.
    slides = max(len(known) + len(first), int(last.get("slides", 0)))
    left = slides - n_done - len(failed)
    tissue = sum(record.told.get("tissue_mm2") or 0.0 for record in done)
    seen = sum(
        (record.told.get("tissue_mm2") or 0.0) * (record.told.get("analysed_fraction") or 0.0) for record in done
    )
    rates: dict[str, float] = {}
    on = [run for run in runs if not run.stopped]
    latest_s = max((run.at for run in on), default=0.0)
    # One that ended nothing since another began was most likely killed; its rate is no more.
    rated = [run for run in on if run.at == latest_s or any(_ended(known, each, latest_s) for each in run.share)]
    begun_s = min((run.at for run in rated), default=last.get("at", math.inf))
    now = [record for record in known.values() if record.finished_s >= begun_s]
    if any(record.state == "done" for record in now):  # a run in which all failed at once has no rate
        seconds = max(1e-3, max(record.finished_s for record in now) - begun_s)
        rates["slides_per_h"] = 3600 * len(now) / seconds
        rates["megapixels_per_s"] = sum(record.told.get("megapixels") or 0.0 for record in now) / seconds
        rates["seconds_left"] = seconds / len(now) * left
        if scoring := sum(run.scoring for run in rated) or last.get("scoring", 0):
            rates["busy"] = min(1.0, sum(map(_model_s, now)) / (seconds * scoring))
    return ArchiveStatus(
        slides=slides,
        done=n_done,
        left=left,
        failed=dict(Counter(record.reason or "" for record in failed)),
        caveats=dict(Counter(record.reason for record in ended if record.state == "done" and record.reason)),
        quarantined=sum(record.quarantined for record in failed),
        running=bool(on),
        found=sum(record.told.get("found") or 0 for record in done),
        tissue_mm2=round(tissue, 3),
        analysed_fraction=round(seen / tissue, 5) if tissue else None,
        **rates,
    )


def _ended(known: Mapping[str, Record], slide_id: str, since_s: float) -> bool:
    return slide_id in known and known[slide_id].finished_s >= since_s


def _model_s(record: Record) -> float:
    stages: dict[str, float] = record.told.get("stages_s") or {}
    return sum(stages.get(name, 0.0) for name in SCORING)


def _last_run(log: Path) -> dict[str, Any]:
    """Return what the log says of the run that began last; a line cut off by the end of a process is none."""
    last: dict[str, Any] = {}
    with contextlib.suppress(OSError), log.open(encoding="utf-8", errors="replace") as file:  # may be cut in a letter
        for line in file:
            if '"event": "run_started"' in line:
                with contextlib.suppress(ValueError):
                    last = json.loads(line)
    return last
