"""Fast, slow and careful hands on the review page, in a real browser: keys, focus and what was typed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slidescan.reviews.desk import Desk
from slidescan.slides import Slide
from tests.chromium import CHROMIUM, WHY, Tab
from tests.discs import discs
from tests.paged import REVIEW, N, at, decided, press

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason=WHY),
    # A connection that a browser holds open ends with the server's loop, of which asyncio complains.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
PER_PAGE = 24
HELD = "new Promise((go) => { window.answer = () => { window.answer = null; go(ask(kind, ...rest)); }; })"
NOTE = "document.querySelector('textarea').value"


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=N, size_wh=(1600, 1200))[0]


def write_note(tab: Tab, text: str) -> None:
    press(tab, "n")
    for letter in text:
        tab.press(letter)
    tab.press("Escape")


def test_escape_leaves_a_note_while_the_slide_is_shown(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    opened()
    press(tab, "f")
    write_note(tab, "odd")
    press(tab, "a")
    at(tab, 2)
    (line,) = (json.loads(text) for text in (case / "decisions.jsonl").read_text().splitlines())
    assert (line["decision"], line["note"]) == ("accept", "odd")


def test_a_note_is_there_when_one_comes_back(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """What was typed and not decided with is kept with its item, and goes with its decision."""
    opened()
    write_note(tab, "odd")
    press(tab, "ArrowRight")
    at(tab, 2)
    assert tab.run(NOTE) == ""
    press(tab, "a")
    at(tab, 3)
    for n in (2, 1):
        press(tab, "ArrowLeft")
        at(tab, n)
    assert tab.run(NOTE) == "odd"
    press(tab, "r")
    at(tab, 3)
    lines = [json.loads(text) for text in (case / "decisions.jsonl").read_text().splitlines()]
    assert [(line["decision"], line["note"]) for line in lines] == [("accept", ""), ("reject", "odd")]


def test_enter_held_down_on_a_button_decides_once(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    opened()
    tab.run("document.querySelector('.ss-verdict').focus()")
    press(tab, "Enter")
    at(tab, 2)
    for _ in range(3):
        press(tab, "Enter", repeats=True)
    press(tab, "Enter")
    at(tab, 3)
    assert decided(case) == [("decide", "accept")] * 2


def test_the_filter_chosen_last_is_what_is_listed(opened: Callable[..., Desk], tab: Tab) -> None:
    """Whichever answer comes first; and a decision under way does not lead on in the new list."""
    opened()
    tab.run(
        f"""(() => {{
          const review = {REVIEW}, ask = review.transport.request.bind(review.transport);
          review.transport.request = (kind, values, ...rest) => kind === 'items' && values.sort === 'score'
            ? new Promise((answer) => {{ review.answerFirst = () => answer(ask(kind, values, ...rest)); }})
            : ask(kind, values, ...rest);
          review.filters.sort.value = 'score';
          review.first = review.list();
          review.filters.sort.value = 'slide';
          review.filters.decision.value = 'undecided';
        }})()"""
    )
    tab.run(f"{REVIEW}.list()")
    tab.wait(f"{REVIEW}.values.sort === 'slide'")
    tab.run(f"{REVIEW}.answerFirst(); {REVIEW}.first.then(() => null)")
    assert tab.run(f"[{REVIEW}.values.sort, {REVIEW}.values.decision]") == ["slide", "undecided"]
    tab.run(f"{{ document.querySelector('.ss-verdict').click(); {REVIEW}.list(); }}")
    tab.wait(f"document.querySelector('.ss-panel h2').textContent === '1 of {N - 1}'")
    at(tab, 1, N - 1)


def test_the_keys_stay_where_a_page_is_the_last(opened: Callable[..., Desk], tab: Tab) -> None:
    """The button that was pressed can be pressed no more; in a notebook the keys would go to the notebook."""
    opened()
    tab.click("[aria-label='Last page']")
    at(tab, 25)
    assert tab.run("document.activeElement.className") == "ss-card"


def test_a_key_after_a_choice_is_the_reviews(opened: Callable[..., Desk], tab: Tab) -> None:
    """With the focus on a class a decision takes it to the next item, where arrows would change the class."""
    desk = opened(change=lambda desk: setattr(desk, "_classes", ["disc", "other"]))
    tab.run("document.querySelector('.ss-panel [type=radio]').focus()")
    assert tab.run("document.activeElement.type") == "radio"
    press(tab, "a")
    at(tab, 2)
    assert tab.run("document.activeElement.className") == "ss-card"
    assert desk.answer("state", {})["left"] == N - 1


def test_a_key_after_a_choice_is_the_reviews_beside_the_slide_too(opened: Callable[..., Desk], tab: Tab) -> None:
    """There no card can take the focus, and an arrow would change the class of the item that came."""
    opened(change=lambda desk: setattr(desk, "_classes", ["disc", "other"]))
    press(tab, "f")
    tab.run("document.querySelector('.ss-panel [type=radio]').focus()")
    press(tab, "a")
    at(tab, 2)
    assert tab.run("document.activeElement.type ?? null") is None
    press(tab, "ArrowRight")
    at(tab, 3)


def second_page(tab: Tab, request: str) -> None:
    """Make another review in the page, `early`, over a transport whose requests are answered by `request`."""
    tab.run(
        f"""(() => {{
          const {{ transport, state, constructor }} = {REVIEW}, root = document.createElement('div');
          const ask = transport.request.bind(transport);
          document.body.append(root);
          window.early = new constructor(root, {{ request: {request} }}, state, {{ OpenSeadragon, keysFrom: root }});
          window.listed = window.early.list();
        }})()"""
    )


@pytest.mark.parametrize("key", ["a", "z", "f", "ArrowRight"])
def test_a_key_before_there_is_a_list(opened: Callable[..., Desk], tab: Tab, case: Path, key: str) -> None:
    """Nothing is decided or undone, and the list comes all the same."""
    opened()
    press(tab, "a")
    at(tab, 2)
    held = "new Promise((go) => { window.answer = () => go(ask(kind, ...rest)); })"
    second_page(tab, f"(kind, ...rest) => kind === 'items' && !window.answer ? {held} : ask(kind, ...rest)")
    tab.wait("window.answer !== undefined")
    tab.run(f"early.root.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{key}' }}))")
    tab.run("answer()")
    tab.wait(f"early.total === {N} && early.panel.seen && !early.busy")
    assert tab.run("early.panel.alert.textContent") == ""
    assert decided(case) == [("decide", "accept")]


def test_a_key_while_the_next_page_comes_decides_nothing(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """The one that is shown is not the one that was asked for."""
    opened()
    second_page(tab, f"(kind, ...rest) => kind === 'items' && rest[0].page > 0 ? {HELD} : ask(kind, ...rest)")
    pressed = "early.root.dispatchEvent(new KeyboardEvent('keydown', {{ key: '{}' }}))".format
    tab.wait("early.panel?.seen && !early.busy")
    tab.run("early.turn('last')")
    tab.wait("!!window.answer")
    tab.run(pressed("a"))
    assert decided(case) == []
    tab.run("answer()")
    tab.wait(f"early.index === {PER_PAGE} && early.panel.seen && !early.busy")


def test_keys_of_a_layout_without_latin_letters(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """By where they are: on a Russian keyboard the key that says ф is that of a."""
    opened()
    tab.wait(f"{REVIEW}.panel.seen")
    tab.run(f"{REVIEW}.root.dispatchEvent(new KeyboardEvent('keydown', {{ key: 'ф', code: 'KeyA', bubbles: true }}))")
    at(tab, 2)
    assert decided(case) == [("decide", "accept")]


def test_a_note_of_another_systems_lines_is_saved(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """A text area has other ends of lines than were written from Python."""
    desk = opened()
    desk._review.decide(desk._review.items()[0].id, "accept", note="one\r\ntwo")
    tab.run("location.reload()")
    tab.wait(f"{REVIEW}?.panel?.seen")
    tab.run(f"{REVIEW}.go(0)")
    at(tab, 1)
    assert tab.run(NOTE) == "one\ntwo"
    assert tab.run(f"{REVIEW}.panel.unsaved") is False


def test_a_double_click_decides_once(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """The second one comes when the next picture is there, which nobody has seen; a click in one's own time counts."""
    opened()
    field = "document.getElementById('review').review.panel.field"
    click = "document.querySelector('.ss-verdict').dispatchEvent(new MouseEvent('click', {{ detail: {} }}))"
    tab.run(click.format(1))
    at(tab, 2)
    tab.run(f"{field}.shownAt = performance.now(); {click.format(2)}")
    at(tab, 2)
    assert decided(case) == [("decide", "accept")]
    tab.run(f"{field}.shownAt -= 1000; {click.format(2)}")
    at(tab, 3)
    assert decided(case) == [("decide", "accept")] * 2


def test_what_another_window_decided_is_told(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """It stands until it was seen; what was typed here stays, to be decided with."""
    desk = opened()
    write_note(tab, "odd")
    desk._review.decide(desk._review.items()[0].id, "reject", note="theirs")
    press(tab, "a")
    tab.wait(
        "document.querySelector('[role=alert]').textContent.startsWith('Not saved: meanwhile it is rejected, by you')"
    )
    assert decided(case) == [("decide", "reject")]
    assert tab.run(f"[{NOTE}, {REVIEW}.panel.unsaved]") == ["odd", True]
    assert tab.run("document.querySelector('.ss-card').dataset.decision") == "reject"
    press(tab, "a")
    at(tab, 2)
    assert decided(case) == [("decide", "reject"), ("decide", "accept")]
    assert tab.run(f"{REVIEW}.panel.unsaved") is False
    desk._review.decide(desk._review.items()[1].id, "reject", note="theirs")
    press(tab, "a")
    tab.wait("document.querySelector('[role=alert]').textContent !== ''")
    assert tab.run(f"[{NOTE}, {REVIEW}.panel.unsaved]") == ["theirs", False]  # nothing was typed here


def decisions_held(tab: Tab) -> Callable[[str], None]:
    """Make such a review whose decisions wait for `answer()`; return what puts a note into its field."""
    second_page(tab, f"(kind, ...rest) => kind === 'decide' ? {HELD} : ask(kind, ...rest)")
    tab.wait("early.panel?.seen && !early.busy")

    def typed(note: str) -> None:
        tab.run(f"early.panel.note.value = '{note}'; early.panel.note.dispatchEvent(new InputEvent('input'))")

    return typed


def test_a_note_that_is_typed_while_a_decision_is_saved(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """It is one note, of the item it was begun on."""
    opened()
    typed = decisions_held(tab)
    tab.run("early.root.dispatchEvent(new KeyboardEvent('keydown', { key: 'a' }))")
    tab.wait("!!window.answer")
    typed("half")
    tab.run("answer()")
    tab.wait("early.panel.status.textContent.startsWith('Accepted') && !early.busy")
    typed("half and half")
    tab.run("early.root.dispatchEvent(new KeyboardEvent('keydown', { key: 'u' }))")
    tab.wait("!!window.answer")
    tab.run("answer()")
    tab.wait("early.index === 1 && early.panel.seen && !early.busy")
    lines = [json.loads(text) for text in (case / "decisions.jsonl").read_text().splitlines()]
    assert [(line["decision"], line["note"]) for line in lines] == [("accept", ""), ("unsure", "half and half")]
    assert lines[0]["region"] == lines[1]["region"]
    assert tab.run("[early.panel.note.value, early.panel.unsaved]") == ["", False]


def test_a_note_that_is_taken_back_while_a_decision_is_saved(opened: Callable[..., Desk], tab: Tab) -> None:
    """It was saved with it, and what is wanted now is not: the page says so and stays."""
    opened()
    typed = decisions_held(tab)
    typed("wrong")
    tab.run("early.root.dispatchEvent(new KeyboardEvent('keydown', { key: 'a' }))")
    tab.wait("!!window.answer")
    typed("")
    tab.run("answer()")
    tab.wait("early.panel.status.textContent.startsWith('Accepted') && !early.busy")
    assert tab.run("[early.panel.note.value, early.panel.unsaved, early.index]") == ["", True, 0]


def test_what_is_undone_is_what_was_decided_last(opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
    """In another window, twice: the page knows of neither, and has the note of the one that is taken back."""
    desk = opened()
    id_ = desk._review.items()[0].id
    press(tab, "ArrowRight")
    at(tab, 2)
    desk._review.decide(id_, "accept", note="important")
    desk._review.decide(id_, "reject", note="second")
    press(tab, "z")
    at(tab, 1)
    assert tab.run(f"[{NOTE}, {REVIEW}.panel.unsaved]") == ["second", True]
    assert tab.run("document.querySelector('[aria-pressed=true]').dataset.verdict") == "accept"


def test_a_note_comes_back_with_an_item_that_is_not_listed(opened: Callable[..., Desk], tab: Tab) -> None:
    opened()
    write_note(tab, "odd")
    press(tab, "a")
    at(tab, 2)
    tab.run(f"document.querySelector('[name=decision]').value = 'undecided'; {REVIEW}.list()")
    at(tab, 1, N - 1)
    press(tab, "z")
    tab.wait("document.querySelector('[role=status]').textContent.startsWith('Undone')")
    tab.run(f"document.querySelector('[name=decision]').value = ''; {REVIEW}.list()")
    at(tab, 1)
    assert tab.run(NOTE) == "odd"


def test_an_arrow_held_down_fetches_few_pictures(opened: Callable[..., Desk], tab: Tab) -> None:
    """Those passed by are not asked for, and the last is shown."""
    opened()
    tab.run("window.crops = []")
    later = "new Promise((go) => { crops.push({ id: rest[0].id, answer: () => go(ask(kind, ...rest)) }); })"
    second_page(tab, f"(kind, ...rest) => kind === 'crop' ? {later} : ask(kind, ...rest)")
    tab.wait("early.shownPage === 0 && crops.length >= 4")
    for n in range(1, 21):
        tab.run("early.root.dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight', repeat: true }))")
        tab.wait(f"early.index === {n}")
    assert tab.run("crops.length") <= 5  # three of the page, two that were looked at
    tab.wait("early.panel.seen || (crops.forEach((each) => each.answer()), false)")
    assert tab.run("early.panel.field.root.dataset.item === early.at(20).id")
    assert tab.run("early.panel.field.state") == "shown"


def test_pictures_of_a_page_leave_room_for_a_decision(opened: Callable[..., Desk], tab: Tab) -> None:
    """A browser asks a server six things at once; what is wanted of a page that was left is not fetched any more."""
    opened()
    tab.run("window.crops = []")
    later = "new Promise((go) => { crops.push({ id: rest[0].id, answer: () => go(ask(kind, ...rest)) }); })"
    second_page(tab, f"(kind, ...rest) => kind === 'crop' ? {later} : ask(kind, ...rest)")
    tab.wait("early.shownPage === 0")
    first = tab.run("crops.length")
    assert 0 < first <= 4
    tab.run("early.turn('last')")
    tab.wait("early.shownPage === 1")
    assert tab.run("crops.length") <= first + 1  # the one in question
    tab.wait("early.panel.seen && early.crops.running === 0 || (crops.forEach((each) => each.answer()), false)")
    assert tab.run("crops.length") <= first + 1 + 6  # of the second page
