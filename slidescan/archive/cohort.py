"""All results of an archive as one: `open_archive`, a row a slide, and the regions most worth a look on any of them."""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pyarrow as pa

from slidescan.archive.record import Record, records_of, table_of
from slidescan.archive.status import ArchiveStatus, standing
from slidescan.errors import ConfigError, ResultError
from slidescan.flagged import FlaggedRegion
from slidescan.manifest import MANIFEST
from slidescan.result import ScanResult
from slidescan.saved import load_result

__all__ = ["Archive", "ArchiveRegion", "open_archive"]


@dataclass(frozen=True, slots=True, eq=False)
class ArchiveRegion:
    """A flagged region of one of many slides."""

    slide_id: str
    group: str
    region: FlaggedRegion
    result_path: Path
    """The result directory of its slide."""


class Archive:
    """The results of an archive, read when they are asked for; make it with `open_archive`.

    What is there now is there: a run may go on meanwhile, and another `open_archive` sees more.
    """

    def __init__(self, out: Path, records: dict[str, Record]) -> None:
        self.path = out
        """The output directory."""
        self.records = records
        """By slide id: what became of each slide that has been done or has failed."""

    def __len__(self) -> int:
        return len(self.records)

    def __iter__(self) -> Iterator[str]:
        """Yield the ids of the slides that are done."""
        return (slide_id for slide_id, record in self.records.items() if record.state == "done")

    def __repr__(self) -> str:
        return f"Archive({self.path.name!r}, {sum(1 for _ in self):,} of {len(self):,} slides done)"

    @cached_property
    def table(self) -> pa.Table:
        """A row a slide, failed ones too, as in ``index.parquet``; ``table.to_pandas()`` is a DataFrame."""
        return table_of(self.records.values())

    @property
    def status(self) -> ArchiveStatus:
        """Counts and rates."""
        return standing(self.records.values(), self.path)

    def result(self, slide_id: str) -> ScanResult:
        """Return the result of a slide.

        Raises
        ------
        ConfigError
            If no slide of that id is done.
        ResultError
            If its result is damaged.
        """
        record = self.records.get(slide_id)
        if record is None or record.state != "done":
            state = "no such slide" if record is None else f"it failed: {record.message}"
            raise ConfigError(f"slide_id: expected a slide that is done, got {slide_id!r}: {state}")
        return load_result(self.path / "slides" / slide_id, verify=False)

    def under_way(self, slide_id: str) -> bool:
        """Return whether a slide that was done is being scanned anew, so that there is no result of it just now."""
        return not (self.path / "slides" / slide_id / MANIFEST).is_file()

    def top(self, k: int, *, group: str | None = None) -> list[ArchiveRegion]:
        """Return the `k` flagged regions with most evidence on all slides, of one group if you like.

        Slides are opened by falling best evidence, which their records tell, and no more of them than hold one of the
        `k`. Equal evidence is ordered by slide id and rank. A slide that is being scanned anew has none.
        """
        if k < 0:
            raise ConfigError(f"k: expected a number of regions, got {k}")
        waiting = [
            (-record.told["best_evidence"], slide_id, 0)
            for slide_id in self
            if (record := self.records[slide_id]).told["flagged_regions"] and (group is None or record.group == group)
        ]
        heapq.heapify(waiting)
        opened: dict[str, tuple[FlaggedRegion, ...]] = {}
        best: list[ArchiveRegion] = []
        while waiting and len(best) < k:
            _, slide_id, i = heapq.heappop(waiting)
            if slide_id not in opened:
                try:
                    opened[slide_id] = () if self.under_way(slide_id) else self.result(slide_id).regions
                except ResultError as exc:
                    place = self.path / "slides" / slide_id
                    raise ResultError(
                        f"{place}: damaged; remove its manifest.json and run the archive again: decisions stay"
                    ) from exc
            if i >= len(opened[slide_id]):
                continue
            regions = opened[slide_id]
            best.append(
                ArchiveRegion(slide_id, self.records[slide_id].group, regions[i], self.path / "slides" / slide_id)
            )
            if i + 1 < len(regions):
                heapq.heappush(waiting, (-regions[i + 1].evidence, slide_id, i + 1))
        return best


def open_archive(out: str | Path) -> Archive:
    """Open the output directory of `scan_archive` as one cohort; no result is read before it is asked for.

    Raises
    ------
    ResultError
        If `out` holds no archive.

    Examples
    --------
    >>> archive = open_archive("runs")  # doctest: +SKIP
    >>> [(each.slide_id, each.region.rank) for each in archive.top(3)]  # doctest: +SKIP
    """
    return Archive(Path(out), records_of(Path(out)))
