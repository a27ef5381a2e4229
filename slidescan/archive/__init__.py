"""Many slides, one after the other and several at once: `scan_archive`, and what became of each."""

from __future__ import annotations

from slidescan.archive.cohort import Archive, ArchiveRegion, open_archive
from slidescan.archive.engine import ArchiveProgress, scan_archive
from slidescan.archive.listing import Entry, read_listing
from slidescan.archive.status import ArchiveStatus, archive_status

__all__ = [
    "Archive",
    "ArchiveProgress",
    "ArchiveRegion",
    "ArchiveStatus",
    "Entry",
    "archive_status",
    "open_archive",
    "read_listing",
    "scan_archive",
]
