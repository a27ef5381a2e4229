"""What the tests of reviews share: a scan whose regions are single discs, copies of it, and a server of it."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import slidescan as ss
from slidescan.reviews.desk import Desk
from slidescan.reviews.server import ReviewServer
from slidescan.slides import Slide
from tests.discs import ORACLE, config

APART = config(flagged__link_um=10.0, flagged__margin_um=5.0)  # each disc is a region of its own


def scan_apart(slide: Slide, folder: Path) -> Path:
    """Scan the slide and return its result directory, for many tests to copy."""
    ss.scan(slide, ORACLE, out=folder / "case", config=APART)
    return folder / "case"


def copied(scanned: Path, folder: Path) -> Path:
    """Return a copy of the result, for one test to decide on."""
    return Path(shutil.copytree(scanned, folder / "case"))


@contextmanager
def running(desk: Desk) -> Iterator[ReviewServer]:
    """Run a server in a thread."""
    server = ReviewServer(desk)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)
        assert not thread.is_alive()


def lines(result: ss.ScanResult) -> list[dict[str, object]]:
    """Return the decisions that are on disk."""
    assert result.path is not None
    return [json.loads(line) for line in (result.path / "decisions.jsonl").read_text().splitlines()]
