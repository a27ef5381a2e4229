"""What is reviewed: twelve discs, each a flagged region of its own, scanned once a module; its server, and its page."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import slidescan as ss
from slidescan.reviews.desk import Desk
from slidescan.slides import Slide
from tests.callers import Caller, looked_at
from tests.chromium import Tab
from tests.discs import discs
from tests.paged import pages
from tests.reviewed import copied, running, scan_apart


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


@pytest.fixture
def result(case: Path) -> ss.ScanResult:
    return ss.load_result(case, verify=False)


@pytest.fixture
def desk(case: Path, slide: Slide) -> Desk:
    return Desk(looked_at(case, slide))


@pytest.fixture
def call(desk: Desk) -> Iterator[Caller]:
    with running(desk) as server:
        yield Caller(server.url)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with Tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(case: Path, slide: Slide, tab: Tab) -> Iterator[Callable[..., Desk]]:
    with pages(case, slide, tab) as open_page:
        yield open_page
