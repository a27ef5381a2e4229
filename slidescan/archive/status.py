"""How an archive stands, from its records alone: while a run is on, after it, from another machine."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from slidescan.archive.record import REASONS, TRANSIENT, read_records
from slidescan.errors import ResultError

__all__ = ["ArchiveStatus", "archive_status"]


@dataclass(frozen=True, slots=True)
class ArchiveStatus:
    """Counts and rates of an archive's output directory."""

    slides: int
    """In the list of the last run."""
    done: int
    failed: dict[str, int] = field(default_factory=dict)
    """Failures by reason."""
    running: bool = False
    """Whether the last run has not said that it ended: it is on, or was killed."""
    found: int = 0
    tissue_mm2: float = 0.0
    analysed_fraction: float | None = None
    """Of all tissue."""
    slides_per_h: float | None = None
    """Since the last run began."""
    megapixels_per_s: float | None = None
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
        for reason, n in sorted(self.failed.items(), key=lambda item: -item[1]):
            again = "; the next run tries again" if reason in TRANSIENT else ""
            lines.append(f"  {reason:<16} {n:,}: {REASONS[reason][0]}{again}")
        if self.analysed_fraction is not None:
            lines.append(
                f"looked at   {self.analysed_fraction:.2%} of {self.tissue_mm2:,.1f} mm² tissue; {self.found:,} found"
            )
        if self.slides_per_h:
            rate = f"{self.slides_per_h:,.1f} slides/h, {self.megapixels_per_s or 0:,.1f} MP/s"
            lines.append(
                f"rate        {rate}" + (f"; about {(self.seconds_left or 0) / 3600:.1f} h left" if left else "")
            )
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
    if not (folder / "records").is_dir():
        raise ResultError(f"{folder}: expected the output directory of an archive, found no records there")
    records = list(read_records(folder / "records").values())
    begun, ended = _last_run(folder / "log.jsonl")
    done = [record for record in records if record.state == "done"]
    tissue = sum(record.told.get("tissue_mm2") or 0.0 for record in done)
    seen = sum(
        (record.told.get("tissue_mm2") or 0.0) * (record.told.get("analysed_fraction") or 0.0) for record in done
    )
    slides = max(int(begun.get("slides", 0)), len(records))
    rates: dict[str, float] = {}
    now = [record for record in records if begun and record.finished_s >= begun["at"]]
    if now:
        seconds = max(1e-3, max(record.finished_s for record in now) - begun["at"])
        rates["slides_per_h"] = 3600 * len(now) / seconds
        rates["megapixels_per_s"] = sum(record.told.get("megapixels", 0.0) for record in now) / seconds
        rates["seconds_left"] = seconds / len(now) * (slides - len(records))
    return ArchiveStatus(
        slides=slides,
        done=len(done),
        failed=dict(Counter(record.reason or "" for record in records if record.state == "failed")),
        running=bool(begun) and not ended,
        found=sum(record.told.get("found", 0) for record in done),
        tissue_mm2=round(tissue, 3),
        analysed_fraction=round(seen / tissue, 5) if tissue else None,
        **rates,
    )


def _last_run(log: Path) -> tuple[dict[str, Any], bool]:
    """Return the line with which the last run began, and whether there is one with which it ended."""
    begun: dict[str, Any] = {}
    ended = False
    try:
        with log.open(encoding="utf-8") as file:
            for line in file:
                if '"event": "run_' not in line:
                    continue
                told = json.loads(line)
                begun, ended = (told, False) if told["event"] == "run_started" else (begun, True)
    except (OSError, ValueError, KeyError):
        return begun, ended
    return begun, ended
