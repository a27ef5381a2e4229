"""A slide of twelve discs, scanned into regions of one disc and into regions of many, to decide on."""

from __future__ import annotations

from pathlib import Path

import pytest

import slidescan as ss
from slidescan.slides import Slide
from tests.discs import ORACLE, config, discs
from tests.reviewed import copied, scan_apart

SEVERAL = config(flagged__link_um=1000.0, flagged__margin_um=5.0)  # regions of many discs


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=12, size_wh=(900, 700))[0]


@pytest.fixture(scope="module")
def apart(slide: Slide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return scan_apart(slide, tmp_path_factory.mktemp("apart"))


@pytest.fixture(scope="module")
def together(slide: Slide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(ss.scan(slide, ORACLE, out=tmp_path_factory.mktemp("together") / "case", config=SEVERAL).path or "")


@pytest.fixture
def run(apart: Path, tmp_path: Path) -> Path:
    """A result whose regions are single discs, to decide on."""
    return copied(apart, tmp_path)
