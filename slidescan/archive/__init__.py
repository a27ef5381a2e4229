"""Many slides, one after the other and several at once: `scan_archive`, and what became of each."""

from __future__ import annotations

from slidescan.archive.engine import ArchiveProgress, scan_archive
from slidescan.archive.listing import Entry, read_listing
from slidescan.archive.status import ArchiveStatus, archive_status

__all__ = ["ArchiveProgress", "ArchiveStatus", "Entry", "archive_status", "read_listing", "scan_archive"]
