"""What is reviewed: a slide of twelve discs, each a flagged region of its own, scanned once a module."""

from __future__ import annotations

from pathlib import Path

import pytest

from slidescan.slides import Slide
from tests.discs import discs
from tests.reviewed import copied, scan_apart


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=12, size_wh=(900, 700))[0]


@pytest.fixture(scope="module")
def scanned(slide: Slide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scan_apart(slide, tmp_path_factory.mktemp("runs"))


@pytest.fixture
def case(scanned: Path, tmp_path: Path) -> Path:
    """Give a result to decide on."""
    return copied(scanned, tmp_path)
