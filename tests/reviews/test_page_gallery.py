"""The review page's gallery, and what others decided, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import slidescan as ss
from slidescan.reviews import Review
from slidescan.reviews.case import Case
from slidescan.reviews.desk import Desk
from slidescan.slides import Slide
from tests.chromium import CHROMIUM, WHY, Tab
from tests.discs import MPP, ORACLE, config, discs
from tests.paged import HOSTILE, READY, REVIEW, SEEN, N, at, decided, press

# A connection that a browser holds open ends with the server's loop, of which asyncio complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=N, size_wh=(1600, 1200))[0]


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
            tab.wait(f"{SEEN} && {REVIEW}.panel.field.wanted.fovUm === {fov_um}")
            box, bar, text = tab.run(script)
            assert box == pytest.approx(item.box_l0.width * desk._review.cases["case"].frame.mpp / fov_um, abs=0.01)
            assert (bar, text) == (pytest.approx(bar_um / fov_um, abs=0.01), f"{bar_um} µm")

    def test_of_a_region_larger_than_the_field_a_detection_is_seen(
        self, opened: Callable[..., Desk], slide: Slide, tmp_path: Path, tab: Tab
    ) -> None:
        """Its box is where the picture has the detection, in the middle."""
        result = ss.scan(slide, ORACLE, out=tmp_path / "large", config=config(flagged__link_um=400.0))
        desk = opened(ss.review(result, slides=slide, reviewer="ann"))
        (item,) = desk._review.items()
        assert item.box_l0.width * MPP > 128
        middles = tab.run(
            "(() => { const f = document.querySelector('.ss-large').getBoundingClientRect();"
            " return [...document.querySelectorAll('.ss-large .ss-parts .ss-box')].map((box) => {"
            " const b = box.getBoundingClientRect();"
            " return [(b.left + b.right - f.left - f.right) / f.width,"
            " (b.top + b.bottom - f.top - f.bottom) / f.height];"
            " }); })()"
        )
        assert len(middles) == item.n
        assert any(abs(x) < 0.01 and abs(y) < 0.01 for x, y in middles)
        assert desk._review.crop(item.id, 128.0, 128)[60:68, 60:68].mean() < 100

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
