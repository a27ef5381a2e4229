"""The review page in a real browser: keys decide, the slide is there at full resolution, nothing breaks out of text."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import slidescan as ss
from slidescan.reviews import Review
from slidescan.reviews.case import Case
from slidescan.reviews.desk import Desk, Picture
from slidescan.reviews.page import MODULES, asset, module
from slidescan.slides import Slide
from tests.chromium import CHROMIUM, WHY, Tab
from tests.discs import ORACLE, discs
from tests.reviewed import APART, running

# A connection that a browser holds open ends with the server's loop, of which asyncio complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ASSETS = Path(ss.__file__).parent / "reviews" / "assets"
N = 30
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><b>&amp;{{x}}"
REVIEW = "document.getElementById('review')?.review"
READY = "document.getElementById('review')?.dataset.ready"
SEEN = f"{REVIEW}?.panel?.seen && !{REVIEW}?.busy"


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

    def test_openseadragon_has_its_licence(self) -> None:
        assert b"openseadragon 6.1.1" in (ASSETS / "openseadragon.min.js").read_bytes()[:100]
        assert "CodePlex Foundation" in (ASSETS / "openseadragon.LICENSE.txt").read_text()
        assert asset("openseadragon.LICENSE.txt") is not None


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=N, size_wh=(1600, 1200))[0]


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with Tab(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@pytest.fixture
def opened(case: Path, slide: Slide, tab: Tab) -> Iterator[Callable[..., Desk]]:
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

        def two_classes(desk: Desk) -> None:
            desk._labels = ["disc", HOSTILE]

        opened(change=two_classes)
        press(tab, "n")
        for letter in "arz":
            tab.press(letter)
        tab.press("Escape")
        tab.press("2")
        press(tab, "a")
        at(tab, 2)
        (line,) = (json.loads(text) for text in (case / "decisions.jsonl").read_text().splitlines())
        assert (line["note"], line["label"], line["decision"]) == ("arz", HOSTILE, "accept")
        press(tab, "r")
        at(tab, 3)
        assert json.loads((case / "decisions.jsonl").read_text().splitlines()[1])["label"] is None
        assert HOSTILE in tab.run("document.querySelector('.ss-card').textContent")

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
        assert said.startswith("Not saved: the decision was not saved")
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


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
class TestGallery:
    def choose(self, tab: Tab, name: str, value: str) -> None:
        old = tab.run(READY)
        tab.run(
            f"(() => {{ const c = document.querySelector('[name={name}]'); c.value = '{value}';"
            " c.dispatchEvent(new Event('change')); })()"
        )
        tab.wait(f"{READY} !== '{old}'")

    def test_filters_sorts_and_pages(self, opened: Callable[..., Desk], tab: Tab) -> None:
        desk = opened()
        first = "document.querySelector('.ss-field.ss-small').dataset.item"
        where = "document.querySelector('.ss-pages output').textContent"
        assert tab.run(where) == f"1–24 of {N}"
        review = desk._review
        for sort in ("score", "uncertainty", "slide"):
            self.choose(tab, "sort", sort)
            tab.wait(f"{first} === '{review.items(sort)[0].id}'")
        tab.run("document.querySelector('[aria-label=\"Next page\"]').click()")
        tab.wait(f"{where} === '25–{N} of {N}'")
        at(tab, 25)
        press(tab, "ArrowLeft")
        tab.wait(f"{where} === '1–24 of {N}'")
        press(tab, "a")
        at(tab, 25)
        self.choose(tab, "decision", "accept")
        tab.wait(f"{where} === '1–1 of 1'")
        self.choose(tab, "decision", "reject")
        tab.wait(f"{where} === 'nothing to show'")
        tab.press("a")
        self.choose(tab, "decision", "")
        score = review.items("score")[3].score
        self.choose(tab, "min_score", str(score))
        tab.wait(f"{where} === '1–4 of 4'")

    def test_box_and_bar(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """The box is where the region is, the bar as long as it says, in each field of view."""
        desk = opened()
        item = desk._review.items()[0]
        script = (
            "(() => { const f = document.querySelector('.ss-large').getBoundingClientRect(), side = f.width - 6;"
            " const of = (name) => document.querySelector(`.ss-large ${name}`).getBoundingClientRect();"
            " return [of('> .ss-box').width / side, of('.ss-bar').width / side,"
            " document.querySelector('.ss-large .ss-bar').textContent]; })()"
        )
        for fov_um, bar_um in ((128, 20), (64, 10)):
            tab.run(
                "(() => { const c = document.querySelector('[name=field]');"
                f" c.value = '{fov_um}'; c.dispatchEvent(new Event('change')); }})()"
            )
            tab.wait(f"{SEEN} && {REVIEW}.panel.field.wanted.endsWith(' {fov_um}')")
            box, bar, text = tab.run(script)
            assert box == pytest.approx(item.box_l0.width * desk._review.cases["case"].frame.mpp / fov_um, abs=0.01)
            assert (bar, text) == (pytest.approx(bar_um / fov_um, abs=0.01), f"{bar_um} µm")

    def test_hostile_names_are_text(self, opened: Callable[..., Desk], case: Path, slide: Slide, tab: Tab) -> None:
        of_case = Case(ss.load_result(case), "region", slide_id=HOSTILE, group=HOSTILE)
        of_case.read_from(slide)
        items = [replace(item, label=HOSTILE) for item in of_case.items.values()]
        review = Review([of_case], items, reviewer=HOSTILE, blinded=False)
        review.decide(items[0].id, "accept", label="<i>x</i>", note=HOSTILE)
        opened(review)
        tab.wait(f"{REVIEW}.index === 1")
        press(tab, "ArrowLeft")
        at(tab, 1)
        assert tab.run("document.querySelector('textarea').value") == HOSTILE
        tab.press("f")
        tab.wait("document.querySelector('.ss-context').dataset.layers")
        assert tab.run("document.body.textContent").count(HOSTILE) >= 4
        assert tab.run("document.querySelectorAll('b, i, img[src=x], #review script').length") == tab.run(
            "document.querySelectorAll('.ss-caption > b').length"
        )
        assert tab.run("document.title") == "slidescan review"

    def test_blinded(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """No score, evidence or rank is in the page, nor a control that would tell it."""
        opened(blinded=True)
        text = tab.run("document.body.textContent") + tab.run("document.getElementById('review').outerHTML")
        for word in ("Score", "score ", "Evidence", "Rank", "min_score", "disputed"):
            assert word not in text
        tab.press("h")
        tab.wait("document.querySelector('[role=status]').textContent.includes('blinded')")
        tab.press("f")
        tab.wait("document.querySelector('.ss-context').dataset.layers")
        assert "heat" not in " ".join(tab.asked)

    def test_everything_has_a_name(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """A screen reader has a name for each control, and each can be reached by the Tab key."""
        opened()
        tree = tab.send("Accessibility.getFullAXTree")["nodes"]
        controls = {"button", "combobox", "spinbutton", "textbox", "progressbar", "checkbox", "slider", "radio"}
        named = [
            (node["role"]["value"], node["name"]["value"])
            for node in tree
            if not node["ignored"] and node["role"]["value"] in controls
        ]
        assert len(named) > 35
        assert all(name for _, name in named), named
        tab.press("?")
        assert tab.run("document.querySelector('dialog').open")
        tab.press("a")
        tab.press("Escape")
        tab.wait("!document.querySelector('dialog').open")
        seen = set()
        for _ in range(40):
            tab.press("Tab")
            seen.add(tab.run("document.activeElement.name || document.activeElement.textContent.trim()"))
        assert {"sort", "decision", "Accept a", "Undo z", "Slide f", "Summary i", "Help ?"} <= seen

    def test_the_help_has_all_keys(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """Each key that a button shows is in the help."""
        opened()
        shown = "(where) => [...document.querySelectorAll(where + ' kbd')].map((key) => key.textContent)"
        on_buttons = set(tab.run(f"({shown})('.ss-panel button')"))
        assert on_buttons == {"a", "r", "u", "←", "→", "z", "f", "i", "?"}
        assert on_buttons <= set(tab.run(f"({shown})('dialog')"))

    def test_a_wrong_token(self, opened: Callable[..., Desk], tab: Tab) -> None:
        opened()
        url = tab.run("location.href")
        tab.open(f"{url}#{'x' * 43}")
        tab.wait("document.getElementById('review')?.textContent.startsWith('open the page by the URL')")


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
class TestOthers:
    OTHERS = "[...document.querySelectorAll('.ss-panel dl:last-of-type:not([hidden]) dd')].map((dd) => dd.textContent)"

    def others(self, case: Path) -> list[str]:
        """Let ben and cy decide on the first items; return their ids."""
        result = ss.load_result(case, verify=False)
        ids = [item.id for item in ss.review(result, reviewer="ben").items()]
        for name, verdicts in (("ben", ("accept", "reject")), ("cy", ("unsure",))):
            for id_, verdict in zip(ids, verdicts, strict=False):
                ss.review(result, reviewer=name).decide(id_, verdict, note=HOSTILE if name == "cy" else "")
        return ids

    def test_what_others_decided(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """Beside the item in question; none where nobody did. Those that are disputed can be listed."""
        self.others(case)
        opened()
        assert tab.run(self.OTHERS) == ["ben accept", f"cy unsure: {HOSTILE}"]
        press(tab, "ArrowRight")
        at(tab, 2)
        assert tab.run(self.OTHERS) == ["ben reject"]
        press(tab, "ArrowRight")
        at(tab, 3)
        assert tab.run(self.OTHERS) == []
        TestGallery().choose(tab, "decision", "disputed")
        at(tab, 1, 1)
        assert tab.run("document.title") == "slidescan review"

    def test_summary(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """By its key and by its button; tables have names; the keys wait; focus goes in and comes back."""
        self.others(case)
        opened()
        press(tab, "r")
        at(tab, 2)
        tab.press("i")
        tab.wait("document.querySelector('.ss-summary').open")
        rows = tab.run(
            "[...document.querySelectorAll('.ss-summary tr')].map((row) => [...row.cells].map((c) => c.textContent))"
        )
        assert rows == [
            ["Reviewer", "Accept", "Reject", "Unsure", "Left"],
            ["ann", "0", "1", "0", f"{N - 1}"],
            ["ben", "1", "1", "0", f"{N - 2}"],
            ["cy", "0", "0", "1", f"{N - 1}"],
            ["Reviewers", "Decided by both", "Cohen's kappa"],
            ["ann, ben", "1", "0.00"],
            ["ann, cy", "1", "0.00"],
            ["ben, cy", "1", "0.00"],
        ]
        nodes = [node for node in tab.send("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        named = {(node["role"]["value"], node["name"]["value"]) for node in nodes}
        assert {("table", "Agreement beyond chance"), ("table", f"Decisions on {N} regions")} <= named
        assert {("dialog", "Summary"), ("rowheader", "ann, ben"), ("columnheader", "Cohen's kappa")} <= named
        assert tab.run("document.activeElement.closest('dialog').className").endswith("ss-summary")
        tab.press("a")
        tab.press("Escape")
        tab.wait("!document.querySelector('.ss-summary').open")
        assert tab.run("document.activeElement.matches('.ss-card[aria-current]')")
        assert len(decided(case)) == 4
        tab.run("[...document.querySelectorAll('.ss-moves button')].find((b) => b.textContent === 'Summary i').click()")
        tab.wait("document.querySelector('.ss-summary').open")

    def test_blinded_it_tells_nothing_of_others(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        self.others(case)
        opened(blinded=True)
        tab.press("i")
        tab.wait("document.querySelector('.ss-summary').open")
        text = tab.run("document.body.textContent")
        assert "ann" in text
        assert "This review is blinded: what others decided is not told." in text
        for word in ("ben", "cy unsure", HOSTILE, "kappa", "Others"):
            assert word not in text

    def test_decisions_of_an_earlier_scan(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """It is said when the page opens, and gone once something else is to be said."""
        self.others(case)
        log = case / "decisions.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for line in lines:
            line["region"] = f"old {line['region']}"
        lines[1]["box_l0"] = [0.0, 0.0, 1.0, 1.0]
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        opened()
        status = "document.querySelector('[role=status]').textContent"
        assert tab.run(status) == "2 decisions of an earlier scan were re-attached, 1 found no place."
        press(tab, "a")
        at(tab, 2)
        assert tab.run(status).startswith("Accepted")


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
class TestSlide:
    PIXELS = (  # of a canvas; read from a copy, which is read alone
        "(() => {{ const c = document.querySelector('{}'), o = new OffscreenCanvas(c.width, c.height);"
        " const x = o.getContext('2d', {{willReadFrequently: true}}); x.drawImage(c, 0, 0);"
        " const d = x.getImageData(0, 0, c.width, c.height).data;"
        " let n = 0; {} }})()"
    )
    PAINTED = PIXELS.format(
        ".openseadragon-canvas canvas",
        "for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n / (d.length / 4);",
    )
    DIGEST = PIXELS.format(".ss-overlay", "for (const v of d) n = (31 * n + v) | 0; return String(n);")
    STILL = (
        "(() => { const v = document.getElementById('review').review.context.viewer.viewport;"
        " return Math.abs(v.getZoom(true) / v.getZoom() - 1) < 1e-9"
        " && v.getCenter(true).distanceTo(v.getCenter()) < 1e-9; })()"
    )
    SCALE = f"{REVIEW}.context.view().scale"
    LOADED = f"document.querySelector('.ss-context').dataset.layers && {REVIEW}.context.image?.getFullyLoaded()"

    def test_it_is_there_at_full_resolution(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """Tiles are painted; keys zoom and move; the layers come and go; a decision leads to the next place."""
        opened()
        press(tab, "f")
        tab.wait(self.LOADED)
        tab.wait(f"{self.PAINTED} > 0.5")
        assert any("/api/tile" in url for url in tab.asked)
        tab.press("0")
        tab.wait(f"{self.STILL} && {self.SCALE} < 0.62")  # all 1600 px in about 950
        for layer in ("h", "b"):
            full = tab.wait(self.DIGEST)
            tab.press(layer)
            tab.wait(f"{self.DIGEST} !== '{full}'")
            tab.press(layer)
            tab.wait(f"{self.DIGEST} === '{full}'")
        # A screen px a slide's px is the finest level.
        for _ in range(4):
            tab.press("+")
        tab.wait(f"{self.SCALE} > 2")
        tab.wait(self.LOADED)
        levels = {int(n) for url in tab.asked for n in re.findall(r"level%22%3A(\d+)", url)}
        assert max(levels) == 11
        left = f"{REVIEW}.context.view().left"
        before = tab.run(left)
        tab.press("ArrowRight", shift=True)
        tab.wait(f"{left} < {before - 20}")
        press(tab, "a")
        at(tab, 2)
        assert decided(case) == [("decide", "accept")]
        middle = (
            f"(() => {{ const v = {REVIEW}.context.view(), b = {REVIEW}.current.box_l0;"
            " return Math.hypot((b[0] + b[2]) / 2 * v.scale + v.left - v.width / 2,"
            " (b[1] + b[3]) / 2 * v.scale + v.top - v.height / 2); })()"
        )
        tab.wait(f"{middle} < 3")
        press(tab, "f")
        tab.wait("document.activeElement.matches('.ss-card[aria-current]')")
        assert tab.said == []

    def test_from_slide_to_slide(self, opened: Callable[..., Desk], tab: Tab, case: Path, slide: Slide) -> None:
        """The next item's slide is opened, and the one before again."""
        other, _ = discs(n=3, size_wh=(900, 700), seed=7)
        result = ss.scan(other, ORACLE, out=case.parent / "other", config=APART)
        cases = [Case(ss.load_result(case), "region", slide_id="a"), Case(result, "region", slide_id="b")]
        for each, pixels in zip(cases, (slide, other), strict=True):
            each.read_from(pixels)
        items = [item for each in cases for item in list(each.items.values())[:2]]
        review = Review(cases, items, reviewer="ann", blinded=False)
        names = [item.slide_id for item in review.items()]
        assert names == ["b", "a", "a", "b"]
        opened(review)
        press(tab, "f")
        for key, n in (("ArrowRight", 2), ("a", 3), ("ArrowRight", 4), ("ArrowLeft", 3), ("z", 2), ("ArrowLeft", 1)):
            press(tab, key)
            at(tab, n, 4)
            tab.wait(f"document.querySelector('.ss-context').dataset.layers === '{names[n - 1]}' && {self.LOADED}")
            tab.wait(f"document.querySelector('.ss-legend').textContent.includes('boxes on {names[n - 1]};')")
        tab.wait(f"{self.PAINTED} > 0.05")  # a small slide
        # OpenSeadragon says of a tile that arrives for the slide just left that it does not paint it.
        assert [said for said in tab.said if not said.startswith("Ignoring tile %s loaded before reset")] == []

    def test_the_mouse_moves_it(self, opened: Callable[..., Desk], tab: Tab) -> None:
        opened()
        press(tab, "f")
        tab.wait(self.LOADED)
        before = tab.run(f"{REVIEW}.context.view()")
        for kind, x, buttons in (("mousePressed", 600, 1), ("mouseMoved", 500, 1), ("mouseReleased", 500, 0)):
            tab.send("Input.dispatchMouseEvent", type=kind, x=x, y=450, button="left", buttons=buttons, clickCount=1)
        tab.wait(f"{REVIEW}.context.view().left < {before['left'] - 50}")
        tab.send("Input.dispatchMouseEvent", type="mouseWheel", x=500, y=450, deltaX=0, deltaY=-200)
        tab.wait(f"{self.SCALE} > {before['scale'] * 1.1}")
        tab.press("a")  # the keys are still ours
        at(tab, 2)

    def test_a_click_on_an_item_goes_to_it(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """On its outline or some px beside it; the view stays. A drag and a click on nothing go nowhere."""
        desk = opened()
        boxes = [item.box_l0 for item in desk._review.items()]
        press(tab, "f")
        tab.wait(self.LOADED)
        tab.press("0")
        tab.wait(f"{self.STILL} && {self.SCALE} < 0.62")
        stage = tab.run(
            "(() => { const r = document.querySelector('.ss-stage').getBoundingClientRect(); return [r.x, r.y]; })()"
        )

        def click(x_l0: float, y_l0: float, *, by: float = 0, to: float = 0) -> dict[str, float]:
            """Press `by` px right of a place, release `to` px farther; return the view before."""
            view: dict[str, float] = tab.run(f"{REVIEW}.context.view()")
            x, y = x_l0 * view["scale"] + view["left"] + stage[0] + by, y_l0 * view["scale"] + view["top"] + stage[1]
            for kind, at_x, buttons in (("Pressed", x, 1), ("Moved", x + to, 1), ("Released", x + to, 0)):
                how = {"button": "left", "buttons": buttons, "clickCount": 1}
                tab.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=at_x, y=y, **how)
            return view

        middle = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
        view = click(*middle[7])
        at(tab, 8)
        assert tab.run(f"{REVIEW}.context.view()") == pytest.approx(view)
        inner = [n for n in range(1, N) if n != 7 and boxes[n].x1 < 1500]
        lonely = max(inner, key=lambda n: sorted(np.hypot(*np.subtract(middle[n], m)) for m in middle)[1])
        click(boxes[lonely].x1, middle[lonely][1], by=8)
        at(tab, lonely + 1)
        asked = sum("/api/find" in url for url in tab.asked)
        click(*middle[0], to=60)
        click(boxes[lonely].x1, middle[lonely][1], by=12)
        tab.wait(f"{self.STILL}")
        press(tab, "a")  # of the one that was gone to
        tab.wait("document.querySelector('[role=status]').textContent.startsWith('Accepted')")
        assert desk._review.decision(desk._review.items()[lonely].id) is not None
        assert sum("/api/find" in url for url in tab.asked) == asked + 1

    def test_two_hundred_thousand_boxes(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """All are found by place, and a view of any part is painted within a frame or two."""
        side, n = 100_000, 200_000
        rng = np.random.default_rng(0)
        corner = rng.uniform(0, side - 60, (n, 2))
        score = np.sort(rng.uniform(0.1, 1, n))[::-1]
        boxes = np.column_stack([corner, corner + rng.uniform(30, 60, (n, 2)), score, np.zeros(n)]).astype("<f4")

        desk = opened()
        press(tab, "f")
        tab.wait(self.LOADED)
        desk._kinds = {**desk._kinds, "boxes": lambda asked: Picture(boxes.tobytes(), "application/octet-stream")}
        built = (
            f"(async () => {{ const c = {REVIEW}.context, blob = await c.transport.request('boxes', {{slide: 0}}),"
            " values = new Float32Array(await blob.arrayBuffer()), t = performance.now();"
            f" window.index = new c.layers.index.constructor(values, [{side}, {side}]);"
            " return performance.now() - t; })()"
        )
        assert tab.run(built) < 3000
        for x0, y0, x1, y1 in ((0, 0, 500, 500), (42_000, 61_000, 45_000, 62_000), (99_000, 0, side, side)):
            found = tab.run(
                f"(() => {{ const f = []; index.each({x0}, {y0}, {x1}, {y1}, (i) => f.push(i)); return f; }})()"
            )
            meets = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
            assert sorted(found) == np.flatnonzero(meets).tolist()
        paint = (
            "((scale) => {{ const c = {review}.context, o = c.overlay;"
            " const layers = {{...c.layers, masks: null, heat: null, index}};"
            " const times = [], drawn = [];"
            " for (let k = 0; k < 9; k += 1) {{ const t = performance.now();"
            " const left = -k * 40 - 20000 * scale * (scale > 0.02), view = {{left, top: -k * 30, scale}};"
            " o.paint({{...view, width: 1000, height: 800}}, layers,"
            " {{boxes: true, minScore: 0.17}}); o.context.getImageData(0, 0, 1, 1);"
            " times.push(performance.now() - t); drawn.push(o.drawn); }}"
            " times.sort((a, b) => a - b); return [times[4], Math.max(...drawn)]; }})({scale})"
        )
        told = {scale: tab.run(paint.format(review=REVIEW, scale=scale)) for scale in (0.008, 0.02, 0.05, 0.1, 1)}
        assert all(drawn > 0 for _, drawn in told.values())
        assert max(drawn for _, drawn in told.values()) < n / 3
        assert max(ms for ms, _ in told.values()) < 150  # on a core that does other things, too
