"""What became of a slide: one small file each, written when it is known, and the tables made of them.

Invariants: a record is whole or not there; it names no path, only the slide's id; the reasons are a closed list, each
transient (the next run tries again) or not (only another file, other settings or `--retry-failed` do).
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from slidescan.region import commit

__all__ = ["REASONS", "TRANSIENT", "Record", "read_records", "write_tables"]

# Reason: what it means, and whether the same file may do better next time.
REASONS = {
    "not_found": ("no slide at this place", True),
    "read_error": ("opened, but its pixels could not be had", True),
    "killed": ("its worker died more than once, most likely out of memory", True),
    "wrong_digest": ("the file is not the one the list names", False),
    "open_error": ("not a slide, damaged, or of a kind that is not read", False),
    "no_mpp": ("the file does not say its µm/px", False),
    "implausible_mpp": ("its µm/px cannot be true", False),
    "too_coarse": ("scanned more coarsely than the detector was trained for", False),
    "model_error": ("the detector failed on it", False),
    "internal_error": ("a fault of slidescan; please report it", False),
}
TRANSIENT = frozenset(reason for reason, (_, again) in REASONS.items() if again)


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
    """One of `REASONS`, None where it is done."""
    message: str = ""
    attempts: int = 1
    finished_s: float = 0.0
    """When, seconds since 1970."""
    told: dict[str, Any] = field(default_factory=dict)
    """Counts, tissue, coverage, seconds by stage, memory."""

    def save(self, folder: Path) -> None:
        """Write it."""
        text = json.dumps(asdict(self), ensure_ascii=False, indent=1, allow_nan=False)
        commit(folder / f"{self.slide_id}.json", lambda partial: _write(partial, text))


def read_records(folder: Path) -> dict[str, Record]:
    """Return all records by slide id; one that cannot be read is as none."""
    found = {}
    for file in sorted(folder.glob("*.json")):
        try:
            record = Record(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        found[record.slide_id] = record
    return found


def write_tables(out: Path, records: Iterable[Record]) -> None:
    """Write index.parquet, a row a slide, and failures.csv, those that failed."""
    rows = sorted(records, key=lambda record: record.slide_id)
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(record, name) for record in rows], pa.string())
        for name in ("slide_id", "group", "state", "reason", "message")
    }
    columns["attempts"] = pa.array([record.attempts for record in rows], pa.int32())
    for name, kind in _TOLD.items():
        columns[name] = pa.array([record.told.get(name) for record in rows], kind)
    table = pa.table(columns)
    commit(out / "index.parquet", lambda partial: pq.write_table(table, partial, compression="zstd"))
    failed = [record for record in rows if record.state == "failed"]
    commit(out / "failures.csv", lambda partial: _write_failures(partial, failed))


# Columns of index.parquet that come from a result.
_TOLD: Mapping[str, pa.DataType] = {
    "found": pa.int64(),
    "detections": pa.int64(),
    "flagged_regions": pa.int64(),
    "hotspot_count": pa.int64(),
    "tissue_mm2": pa.float64(),
    "analysed_fraction": pa.float64(),
    "tiles": pa.int64(),
    "read_failed_boxes": pa.int64(),
    "saturated_tiles": pa.int64(),
    "crashed_regions": pa.int64(),
    "megapixels": pa.float64(),
    "seconds": pa.float64(),
    "peak_rss_mb": pa.int64(),
    "mpp": pa.float64(),
    "detector": pa.string(),
    "fingerprint": pa.string(),
}


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")


def _write_failures(path: Path, failed: list[Record]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["slide_id", "group", "reason", "attempts", "message"])
        for record in failed:
            told = (record.slide_id, record.group, record.reason or "", str(record.attempts), record.message)
            # A spreadsheet runs what begins so.
            writer.writerow([f"'{cell}" if cell[:1] in ("=", "+", "-", "@", "\t") else cell for cell in told])
