"""How an archive stands, from its records alone: while a run is on, after it, from another machine."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slidescan.archive.record import REASONS, Record, records_of
from slidescan.stages import SCORING

__all__ = ["ArchiveStatus", "archive_status", "standing"]

_AGAIN = {"retry": "; the next run tries again", "next_run": "; the next run tries again"}


@dataclass(frozen=True, slots=True)
class ArchiveStatus:
    """Counts and rates of an archive's output directory."""

    slides: int
    """In the list of the last run."""
    done: int
    failed: dict[str, int] = field(default_factory=dict)
    """Failures by reason."""
    caveats: dict[str, int] = field(default_factory=dict)
    """Slides that are done but for something, by reason."""
    quarantined: int = 0
    """Failures that are not tried again because they crashed too often."""
    running: bool = False
    """Whether a run has not said that it ended: it is on, or was killed."""
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
    """At that rate, for what has no record yet."""

    def told(self) -> dict[str, Any]:
        """Return it as JSON would have it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """Return what a person reads."""
        n_failed = sum(self.failed.values())
        left = max(0, self.slides - self.done - n_failed)
        lines = [f"slides      {self.slides:,}: {self.done:,} done, {n_failed:,} failed, {left:,} to do"]
        for reason, n in sorted([*self.failed.items(), *self.caveats.items()], key=lambda item: -item[1]):
            kind, meaning = REASONS.get(reason, ("stays", "a reason of another slidescan"))
            lines.append(f"  {reason:<16} {n:,}: {meaning}{_AGAIN.get(kind, '')}")
        if self.quarantined:
            lines.append(f"  {self.quarantined:,} crashed too often and are left alone until --retry-failed")
        if self.analysed_fraction is not None:
            lines.append(
                f"looked at   {self.analysed_fraction:.2%} of {self.tissue_mm2:,.1f} mm² tissue; {self.found:,} found"
            )
        if self.slides_per_h:
            rate = f"{self.slides_per_h:,.1f} slides/h, {self.megapixels_per_s or 0:,.1f} MP/s"
            busy = "" if self.busy is None else f", models busy {self.busy:.0%} of the time"
            to_go = f"; about {(self.seconds_left or 0) / 3600:.1f} h left" if left else ""
            lines.append(f"rate        {rate}{busy}{to_go}")
        if self.running:
            lines.append("run         on, or killed before its end: run the same command to continue")
        return lines


def archive_status(out: str | Path) -> ArchiveStatus:
    """Read how an archive stands.

    Raises
    ------
    ResultError
        If `out` holds no archive.
    """
    folder = Path(out)
    return standing(records_of(folder).values(), folder / "log.jsonl")


def standing(records: Iterable[Record], log: Path) -> ArchiveStatus:
    """Tell how an archive stands from its records and its log."""
    records = list(records)
    runs = _runs(log)
    done = [record for record in records if record.state == "done"]
    failed = [record for record in records if record.state == "failed"]
    tissue = sum(record.told.get("tissue_mm2") or 0.0 for record in done)
    seen = sum(
        (record.told.get("tissue_mm2") or 0.0) * (record.told.get("analysed_fraction") or 0.0) for record in done
    )
    slides = max(int(runs[-1]["slides"]) if runs else 0, len(records))
    rates: dict[str, float] = {}
    begun_s = min((run["at"] for run in runs), default=0.0)
    now = [record for record in records if runs and record.finished_s >= begun_s]
    # What a run does anew, under other settings say, is not done until it has done it.
    waiting = max(0, sum(run.get("to_do", 0) for run in runs) - len(now))
    again = min(waiting, sum(run.get("again", 0) for run in runs))
    if any(record.state == "done" for record in now):  # a run in which all failed at once has no rate
        seconds = max(1e-3, max(record.finished_s for record in now) - begun_s)
        rates["slides_per_h"] = 3600 * len(now) / seconds
        rates["megapixels_per_s"] = sum(record.told.get("megapixels") or 0.0 for record in now) / seconds
        rates["seconds_left"] = seconds / len(now) * max(slides - len(records), waiting)
        if scoring := sum(run.get("scoring", 0) for run in runs):
            rates["busy"] = min(1.0, sum(map(_model_s, now)) / (seconds * scoring))
    return ArchiveStatus(
        slides=slides,
        done=max(0, len(done) - again),
        failed=dict(Counter(record.reason or "" for record in failed)),
        caveats=dict(Counter(record.reason for record in done if record.reason)),
        quarantined=sum(record.quarantined for record in failed),
        running=any(not run["ended"] for run in runs),
        found=sum(record.told.get("found") or 0 for record in done),
        tissue_mm2=round(tissue, 3),
        analysed_fraction=round(seen / tissue, 5) if tissue else None,
        **rates,
    )


def _model_s(record: Record) -> float:
    stages: dict[str, float] = record.told.get("stages_s") or {}
    return sum(stages.get(name, 0.0) for name in SCORING)


def _runs(log: Path) -> list[dict[str, Any]]:
    """Return the runs that are on, each of its share of the list, or the last one; a later run takes up an earlier."""
    last: dict[str, dict[str, Any]] = {}
    for event in _events(log):
        share = event.get("share", "")
        if event["event"] == "run_started":
            # Also a job of another number of jobs: it was killed, and its slides are shared anew.
            for earlier in list(last):
                if not share or earlier == share or earlier.partition("/")[2] != share.partition("/")[2]:
                    del last[earlier]
            last[share] = {**event, "ended": False}
        elif share in last:
            last[share]["ended"] = True
    runs = list(last.values())
    return [run for run in runs if not run["ended"]] or runs[-1:]


def _events(log: Path) -> Iterator[dict[str, Any]]:
    """Yield what the log says of runs; a line cut off by the end of a process is none."""
    try:
        with log.open(encoding="utf-8", errors="replace") as file:  # it may be cut off within a letter
            for line in file:
                if '"event": "run_' in line:
                    try:
                        yield json.loads(line)
                    except ValueError:
                        continue
    except OSError:
        return
