"""What became of a slide: one small file each, written when it is known, and the tables made of them.

Invariants: a record is whole or not there; it names no path, only the slide's id; the reasons are a closed list, each
of one kind, which says whether a slide is tried again.
"""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from slidescan.commit import commit, disk_error
from slidescan.errors import ResultError
from slidescan.export.stored import write_table

__all__ = [
    "FAILURES",
    "MOST_ATTEMPTS",
    "REASONS",
    "SCORE_BINS",
    "Record",
    "read_records",
    "records_of",
    "table_of",
    "write_tables",
]

Kind = Literal["retry", "next_run", "crash", "stays", "caveat"]

# Reason: its kind and what it means. "retry": tried again in this run, each time later, and by every run after it.
# "next_run": only by those. "crash": again, but not more often than `MOST_ATTEMPTS` in all; then the slide is left
# alone. "stays": only with another file, other settings or --retry-failed. "caveat": of a slide that is done.
REASONS: Mapping[str, tuple[Kind, str]] = {
    "not_found": ("next_run", "no slide at this place"),
    "missing_package": ("next_run", "reading it needs a package that is not installed"),
    "read_error": ("retry", "its bytes or pixels could not be had"),
    "unwritable": ("next_run", "its result directory, alone, cannot be written to"),
    "out_of_memory": ("retry", "the model did not fit into memory"),
    "killed": ("crash", "its worker died more than once, most likely out of memory"),
    "timeout": ("crash", "opening it, or scoring a region, took too long more than once"),
    "wrong_digest": ("stays", "the file is not the one the list names"),
    "open_error": ("stays", "not a slide, damaged, or unsafe to open"),
    "unsupported": ("stays", "a slide of a kind that is not read"),
    "no_mpp": ("stays", "the file does not say its µm/px"),
    "implausible_mpp": ("stays", "its µm/px cannot be true"),
    "too_coarse": ("stays", "scanned more coarsely than the detector was trained for"),
    "model_error": ("stays", "the detector failed on it"),
    "internal_error": ("stays", "a fault of slidescan; please report it"),
    "no_tissue": ("caveat", "done, but no tissue was found on it"),
    "decode_holes": ("caveat", "done, but parts of its tissue could not be read"),
    "more_images": ("caveat", "done, but its file holds further images, which were not looked at"),
}
FAILURES = tuple(reason for reason, (kind, _) in REASONS.items() if kind != "caveat")
SCORE_BINS = 20  # of [0, 1], in `Record.told["scores"]`
MOST_ATTEMPTS = 3  # of one run; of all runs at what crashes


@dataclass(frozen=True, slots=True)
class Record:
    """What became of one slide."""

    slide_id: str
    group: str
    key: str
    """Digest of file stamp, settings, detector and version: a record of another key is out of date."""
    state: str
    """done or failed."""
    reason: str | None = None
    """One of `REASONS`; None where it is done and nothing is amiss."""
    message: str = ""
    attempts: int = 1
    finished_s: float = 0.0
    """When, seconds since 1970."""
    place: str = ""
    """What tells the slide from others of its name (`slidescan.archive.listing.tag_of`)."""
    told: dict[str, Any] = field(default_factory=dict)
    """Counts, tissue, coverage, seconds by stage, memory."""

    @property
    def kind(self) -> Kind | None:
        """Of the reason; a reason of another slidescan stays."""
        return None if self.reason is None else REASONS.get(self.reason, ("stays", ""))[0]

    @property
    def quarantined(self) -> bool:
        """Whether it crashed so often that only `--retry-failed` tries it again."""
        return self.kind == "crash" and self.attempts >= MOST_ATTEMPTS

    def save(self, folder: Path) -> None:
        """Write it."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1, allow_nan=False) + "\n"
        # A file name that is no text, from another system, is told with question marks.
        data = text.encode(errors="replace")
        commit(folder / f"{self.slide_id}.json", lambda partial: partial.write_bytes(data))

    def remove(self, folder: Path) -> None:
        """Have no record of it."""
        try:
            (folder / f"{self.slide_id}.json").unlink(missing_ok=True)
        except OSError as exc:
            raise disk_error(folder, exc) from exc

    @property
    def outdated(self) -> Record:
        """The same, of a result that is about to be replaced: until there is a new record, the slide is to be done."""
        return replace(self, key="")


def read_records(folder: Path) -> dict[str, Record]:
    """Return all records by slide id; one that cannot be read is as none."""
    read = map(read_record, sorted(folder.glob("*.json")))
    return {record.slide_id: record for record in read if record is not None}


def read_record(file: Path) -> Record | None:
    """Return one record, None where there is none that can be read."""
    try:
        return Record(**json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def records_of(out: Path) -> dict[str, Record]:
    """Return the records of an archive's output directory.

    Raises
    ------
    ResultError
        If it is none.
    """
    if not os.path.isdir(out / "records"):  # noqa: PTH112  # a Path raises where it may not look
        raise ResultError(f"{out}: expected the output directory of an archive, found no records there")
    return read_records(out / "records")


def table_of(records: Iterable[Record]) -> pa.Table:
    """Return a row a slide, sorted by id."""
    rows = sorted(records, key=lambda record: record.slide_id)
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(record, name) for record in rows], pa.string())
        for name in ("slide_id", "group", "state", "reason", "message")
    }
    columns["attempts"] = pa.array([record.attempts for record in rows], pa.int32())
    for name, kind in _TOLD.items():
        columns[name] = pa.array([record.told.get(name) for record in rows], kind)
    return pa.table(columns)


def write_tables(out: Path, records: Iterable[Record]) -> None:
    """Write index.parquet, a row a slide, and failures.csv, those that failed."""
    rows = sorted(records, key=lambda record: record.slide_id)
    table = table_of(rows)
    write_table(out / "index.parquet", table)
    failed = [record for record in rows if record.state == "failed"]
    commit(out / "failures.csv", lambda partial: _write_failures(partial, failed))


# Columns of index.parquet that come from a result.
_TOLD: Mapping[str, pa.DataType] = {
    "found": pa.int64(),
    "detections": pa.int64(),
    "flagged_regions": pa.int64(),
    "hotspot_count": pa.int64(),
    "best_evidence": pa.float64(),
    "tissue_mm2": pa.float64(),
    "analysed_fraction": pa.float64(),
    "tiles": pa.int64(),
    "read_failed_boxes": pa.int64(),
    "saturated_tiles": pa.int64(),
    "crashed_regions": pa.int64(),
    "megapixels": pa.float64(),
    "seconds": pa.float64(),
    "peak_rss_mb": pa.int64(),
    "peak_gpu_mb": pa.int64(),
    "mpp": pa.float64(),
    "detector": pa.string(),
    "fingerprint": pa.string(),
}


def _write_failures(path: Path, failed: list[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "group", "reason", "attempts", "message"])
        for record in failed:
            told = (record.slide_id, record.group, record.reason or "", str(record.attempts), record.message)
            # A spreadsheet runs what begins so.
            writer.writerow([f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t") else cell for cell in told])
