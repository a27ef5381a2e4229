"""The review's page in a browser's tab: opened, read and pressed."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import slidescan as ss
from slidescan.reviews import Review
from slidescan.reviews.desk import Desk
from slidescan.slides import Slide
from tests.chromium import Tab
from tests.reviewed import running

N = 30
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><b>&amp;{{x}}"
REVIEW = "document.getElementById('review')?.review"
READY = "document.getElementById('review')?.dataset.ready"
SEEN = f"{REVIEW}?.panel?.seen && !{REVIEW}?.busy"


@contextmanager
def pages(case: Path, slide: Slide, tab: Tab) -> Iterator[Callable[..., Desk]]:
    """Open the page of a review, and check at the end that it asked nobody else and complained of nothing."""
    with ExitStack() as stack:

        def open_page(review: Review | None = None, *, change: Callable[[Desk], Any] = id, **options: Any) -> Desk:
            result = ss.load_result(case, verify=False)
            desk = Desk(review or ss.review(result, slides=slide, reviewer="ann", **options))
            change(desk)
            server = stack.enter_context(running(desk))
            tab.said.clear()
            tab.thrown.clear()
            tab.asked.clear()
            tab.open(server.url)
            tab.wait(READY)
            tab.wait(SEEN)
            return desk

        yield open_page
        assert tab.thrown == []
        assert {re.sub(r":\d+/.*", "", url) for url in tab.asked} <= {"http://127.0.0.1", "blob:http://127.0.0.1"}
        tab.open("about:blank")
    gc.collect()  # here, where asyncio's complaints of what the browser held open are expected


def decided(case: Path) -> list[tuple[str, str]]:
    log = case / "decisions.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return [(line["event"], line.get("decision", "")) for line in lines]


def number(tab: Tab) -> str:
    return str(tab.run("document.querySelector('.ss-panel h2').textContent"))


def press(tab: Tab, key: str, **how: bool) -> None:
    tab.wait(SEEN)
    tab.press(key, **how)


def at(tab: Tab, n: int, total: int = N) -> None:
    tab.wait(f"{SEEN} && document.querySelector('.ss-panel h2').textContent === '{n} of {total}'")
