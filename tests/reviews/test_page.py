"""The review page in a real browser: its parts, and keys that decide."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import slidescan as ss
from slidescan.reviews.desk import Desk
from slidescan.reviews.page import MODULES, _asset, asset, module
from slidescan.slides import Slide
from tests.chromium import CHROMIUM, WHY, Tab
from tests.discs import discs
from tests.paged import HOSTILE, READY, REVIEW, SEEN, N, at, decided, number, press

# A connection that a browser holds open ends with the server's loop, of which asyncio complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ASSETS = Path(ss.__file__).parent / "reviews" / "assets"


class TestFiles:
    def test_one_module(self) -> None:
        """The parts make one module that imports nothing and exports `mount`; all of them are named."""
        text = module()
        assert not re.search(r"^\s*import\b", text, re.MULTILINE)
        assert text.count("async function mount(") == 1
        assert {path.stem for path in ASSETS.glob("*.js")} == {*MODULES, "start", "widget", "openseadragon.min"}
        for name in MODULES:
            for needed in re.findall(r'from "\./(\w+)\.js"', (ASSETS / f"{name}.js").read_text()):
                assert MODULES.index(needed) < MODULES.index(name)
        names = re.findall(r"^(?:export )?(?:async )?(?:const|let|class|function) (\w+)", text, re.MULTILINE)
        assert len(names) == len(set(names))

    def test_nothing_comes_from_elsewhere(self) -> None:
        """No part of the page names another server, makes markup of text, or is long."""
        for path in ASSETS.iterdir():
            if path.name.startswith("openseadragon"):
                continue
            text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
            assert not re.search(
                r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|\son\w+=\"", text
            )
            assert text.count("\n") < 350, path.name

    def test_what_is_no_file_is_not_kept(self) -> None:
        """Anybody on this machine may ask for names without end."""
        before = _asset.cache_info().currsize
        assert asset("x" * 1000) is None
        assert asset("../server.py") is None
        assert _asset.cache_info().currsize == before

    def test_openseadragon_has_its_licence(self) -> None:
        assert b"openseadragon 6.1.1" in (ASSETS / "openseadragon.min.js").read_bytes()[:100]
        assert "CodePlex Foundation" in (ASSETS / "openseadragon.LICENSE.txt").read_text()
        assert asset("openseadragon.LICENSE.txt") is not None


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=N, size_wh=(1600, 1200))[0]


def two_classes(desk: Desk) -> None:
    desk._classes = ["disc", HOSTILE]


def type_note_and_class(tab: Tab) -> None:
    """Type "arz", whose letters are keys, and choose the second class."""
    press(tab, "n")
    for letter in "arz":
        tab.press(letter)
    tab.press("Escape")
    tab.press("2")


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
class TestDeciding:
    def test_by_keys_and_again(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """Keys decide and lead on; after loading the page again all is there, and it goes on where it was left."""
        opened()
        for n, key in enumerate("aru", 1):
            at(tab, n)
            press(tab, key)
        at(tab, 4)
        assert decided(case) == [("decide", "accept"), ("decide", "reject"), ("decide", "unsure")]
        press(tab, "ArrowLeft")
        at(tab, 3)
        assert tab.run("document.querySelector('[aria-pressed=true]').dataset.verdict") == "unsure"
        press(tab, "ArrowRight")
        at(tab, 4)
        press(tab, "z")
        at(tab, 3)
        assert decided(case)[-1] == ("undo", "")
        press(tab, "a")
        at(tab, 4)
        assert tab.run("document.querySelector('.ss-left').textContent") == f"{N - 3} left of {N}"
        tab.send("Page.reload")
        tab.wait(f"!{READY}")
        tab.wait(READY)
        at(tab, 4)
        marks = tab.run("[...document.querySelectorAll('.ss-card')].slice(0, 4).map((card) => card.dataset.decision)")
        assert marks == ["accept", "reject", "accept", "none"]
        assert tab.run("document.querySelector('.ss-card').getAttribute('aria-label')").endswith(", case, Accepted")
        assert tab.said == []
        assert "#" not in tab.run("location.href")

    def test_note_and_class(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """Letters in a note are letters; a digit chooses the class; both go with the decision."""
        opened(change=two_classes)
        type_note_and_class(tab)
        press(tab, "a")
        at(tab, 2)
        (line,) = (json.loads(text) for text in (case / "decisions.jsonl").read_text().splitlines())
        assert (line["note"], line["label"], line["decision"]) == ("arz", HOSTILE, "accept")
        press(tab, "r")
        at(tab, 3)
        assert json.loads((case / "decisions.jsonl").read_text().splitlines()[1])["label"] is None
        assert HOSTILE in tab.run("document.querySelector('.ss-card').textContent")

    def test_what_was_typed_stays_with_its_item(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """A larger field, or a click on the item's own card, shows it again: note and class are as they were."""
        opened(change=two_classes)
        type_note_and_class(tab)
        tab.run("document.getElementById('review').review.resize(256)")
        tab.run("document.querySelector('.ss-card').click()")
        press(tab, "a")
        at(tab, 2)
        (line,) = (json.loads(text) for text in (case / "decisions.jsonl").read_text().splitlines())
        assert (line["note"], line["label"]) == ("arz", HOSTILE)

    def test_what_is_not_saved_is_marked(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """Also typed after a decision; and who closes the page is asked."""
        hint = "document.querySelector('.ss-unsaved').hidden"
        opened(change=two_classes)
        assert tab.run(hint)
        press(tab, "a")
        at(tab, 2)
        press(tab, "ArrowLeft")
        at(tab, 1)
        press(tab, "n")
        tab.press("x")
        assert not tab.run(hint)
        tab.press("Escape")
        press(tab, "ArrowRight")
        at(tab, 2)
        assert tab.run(hint)
        tab.press("2")  # a class chosen, and the first again
        assert not tab.run(hint)
        tab.press("1")
        assert tab.run(hint)
        press(tab, "ArrowLeft")
        at(tab, 1)
        assert not tab.run(hint)
        tab.dialogs.clear()
        tab.send("Page.reload")
        tab.wait(f"!{READY}")
        tab.wait(READY)
        tab.wait(SEEN)
        assert tab.dialogs == ["beforeunload"]
        press(tab, "ArrowLeft")
        at(tab, 1)
        press(tab, "n")
        tab.press("y")
        tab.press("Escape")
        press(tab, "a")
        at(tab, 2)
        assert json.loads((case / "decisions.jsonl").read_text().splitlines()[-1])["note"] == "y"
        tab.dialogs.clear()
        tab.send("Page.reload")
        tab.wait(f"!{READY}")
        tab.wait(READY)
        tab.wait(SEEN)
        assert tab.dialogs == []

    def test_a_list_that_is_kept_no_more_is_made_anew(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """When others, or this page in other windows, were asked for since."""
        desk = opened()
        for _ in range(9):
            desk.answer("items", {"page": 0, "size": 24})
        tab.run("document.getElementById('review').review.go(24)")
        tab.wait("document.querySelector('[role=status]').textContent === 'This list was made anew.'")
        tab.run("document.getElementById('review').review.go(24)")
        at(tab, 25)

    @pytest.mark.parametrize("n", [1, N])
    def test_undone_is_as_it_was(self, opened: Callable[..., Desk], tab: Tab, case: Path, n: int) -> None:
        """Before it was decided: with its note in the field, for the right key. Of the last of a list, which stays in
        view, and of one that was left."""
        opened()
        tab.run(f"document.getElementById('review').review.go({n - 1})")
        at(tab, n)
        press(tab, "n")
        tab.press("x")
        tab.press("Escape")
        press(tab, "a")
        tab.wait("/^Accepted|End of this list/.test(document.querySelector('[role=status]').textContent)")
        press(tab, "z")
        tab.wait("document.querySelector('[role=status]').textContent.startsWith('Undone')")
        at(tab, n)
        assert tab.run("document.querySelector('textarea').value") == "x"
        assert tab.run("document.querySelector('.ss-unsaved').hidden") is False
        press(tab, "r")
        tab.wait("/^Rejected|End of this list/.test(document.querySelector('[role=status]').textContent)")
        lines = [json.loads(line) for line in (case / "decisions.jsonl").read_text().splitlines()]
        assert [(line.get("decision"), line.get("note")) for line in lines] == [
            ("accept", "x"), (None, None), ("reject", "x")]  # fmt: skip
        assert tab.run(f"{REVIEW}.panel.unsaved") is False

    def test_nothing_is_decided_that_is_not_shown(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """While a new list is there and its first item is not yet: the picture is of the old one."""
        opened()
        tab.run(
            """(() => {
              const { review } = document.getElementById('review');
              const ask = review.transport.request.bind(review.transport);
              review.transport.request = (kind, ...rest) => {
                if (kind === 'next') return new Promise((answer) => { review.answerNext = answer; });
                return kind === 'items' ? ask(kind, ...rest).then((told) => ({ ...told, items: told.items.reverse() }))
                  : ask(kind, ...rest);
              };
              review.list();
            })()"""
        )
        tab.wait("document.getElementById('review').review.answerNext !== undefined")
        press(tab, "a")
        assert "Wait for the picture" in tab.run("document.querySelector('[role=status]').textContent")
        assert not (case / "decisions.jsonl").exists()
        tab.run("document.getElementById('review').review.answerNext({ index: 0 })")

    def test_a_key_held_down_decides_once(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        opened()
        press(tab, "a")
        at(tab, 2)
        for _ in range(3):
            press(tab, "a", repeats=True)
        press(tab, "ArrowRight", repeats=True)
        at(tab, 3)
        assert len(decided(case)) == 1

    def test_what_is_not_saved_is_said_and_stays(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        opened()
        (case / "decisions.jsonl").mkdir()
        press(tab, "a")
        said = tab.wait("document.querySelector('[role=alert]').textContent")
        assert said.startswith("Not saved: cannot be read (Is a directory)")
        assert str(case) not in said
        assert number(tab) == f"1 of {N}"
        assert tab.run("document.querySelector('.ss-left').textContent") == f"{N} left of {N}"
        (case / "decisions.jsonl").rmdir()
        press(tab, "a")
        at(tab, 2)
        assert tab.run("document.querySelector('[role=alert]').textContent") == ""
        assert decided(case) == [("decide", "accept")]

    def test_nothing_is_decided_unseen(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """A key before the picture is there decides nothing."""
        go = threading.Event()

        def slow(desk: Desk) -> None:
            crop, ids = desk._kinds["crop"], [item.id for item in desk._review.items()]

            def wait(asked: Any) -> Any:
                if asked._values["id"] == ids[1]:
                    assert go.wait(30)
                return crop(asked)

            desk._kinds = {**desk._kinds, "crop": wait}

        try:
            opened(change=slow)
            press(tab, "a")
            tab.wait("document.querySelector('.ss-panel h2').textContent.startsWith('2 ')")
            tab.press("a")
            tab.wait("document.querySelector('[role=status]').textContent.startsWith('Wait')")
            assert len(decided(case)) == 1
        finally:
            go.set()
        press(tab, "a")
        at(tab, 3)
        assert len(decided(case)) == 2

    def test_to_the_end(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """Over the pages of the gallery to the last; the pictures to come are there before they are needed."""
        opened(of="detections", top=26)
        before = sum("/api/crop" in url for url in tab.asked)
        assert before <= 26
        for n in range(1, 26):
            at(tab, n, 26)
            press(tab, "r" if n % 3 else "a")
        at(tab, 26, 26)
        assert tab.run("document.querySelector('.ss-pages output').textContent") == "25–26 of 26"
        press(tab, "a")
        tab.wait("document.querySelector('[role=status]').textContent === 'All are decided.'")
        assert len(decided(case)) == 26
        assert sum("/api/crop" in url for url in tab.asked) == 26  # each once
