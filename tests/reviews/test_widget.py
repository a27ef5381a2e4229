"""The review in a notebook: what goes over the widget's messages, what a notebook keeps, and its front end."""

from __future__ import annotations

import json
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import slidescan as ss
from slidescan.errors import MissingExtraError
from slidescan.reviews import Review
from slidescan.reviews.desk import Picture
from slidescan.reviews.page import style
from slidescan.reviews.refusals import MOST_ASKED_BYTES
from slidescan.reviews.widget import ReviewWidget
from slidescan.slides import Slide
from tests.chromium import CHROMIUM, WHY, Tab

N = 12


@pytest.fixture
def looked(case: Path, slide: Slide) -> Iterator[Review]:
    review = ss.review(ss.load_result(case), slides=slide, reviewer="ann")
    yield review
    review.widget().close()


class Channel:
    """A widget's comm: what a front end sends is taken, what it would get is kept."""

    comm_id = "a channel"

    def __init__(self, widget: ReviewWidget, log: Path | None = None) -> None:
        self.sent: list[tuple[dict[str, Any], list[bytes]]] = []
        self.on_disk: list[bool] = []
        """Whether there was a log of decisions when a message went out."""
        self._log = log
        self._more = threading.Condition()
        widget.comm = self

    def on_msg(self, callback: Any) -> None:
        self._take = callback

    def send(self, data: dict[str, Any], buffers: list[bytes] | None = None) -> None:
        with self._more:
            if data["method"] == "custom":
                self.on_disk.append(self._log is not None and self._log.is_file())
                self.sent.append((data["content"], buffers or []))
                self._more.notify_all()

    def close(self, *_: object, **__: object) -> None: ...

    def take(self, content: object, *buffers: bytes) -> None:
        self._take({"content": {"data": {"method": "custom", "content": content}}, "buffers": list(buffers)})

    def answers(self, n: int) -> list[tuple[dict[str, Any], list[bytes]]]:
        with self._more:
            assert self._more.wait_for(lambda: len(self.sent) >= n, 30)
            return self.sent

    def ask(self, kind: object, values: object = None, *buffers: bytes) -> tuple[dict[str, Any], list[bytes]]:
        n = len(self.sent) + 1
        self.take({"view": "v", "n": n, "kind": kind, "values": {} if values is None else values}, *buffers)
        told, sent = self.answers(n)[-1]
        assert (told.pop("view"), told.pop("n")) == ("v", n)
        return told, sent


class TestMessages:
    def test_answers(self, looked: Review) -> None:
        """What the desk answers comes back under the request's number; a picture is a buffer, and not in the text."""
        channel = Channel(looked.widget())
        told, _ = channel.ask("items", {"page": 0, "size": 5})
        assert [item["id"] for item in told["answer"]["items"]] == [item.id for item in looked.items()[:5]]
        told, (data,) = channel.ask("crop", {"id": looked.items()[0].id, "fov_um": 64})
        assert told == {"media_type": "image/jpeg"}
        assert data[:3] == b"\xff\xd8\xff"

    def test_a_decision_is_on_the_disk_before_it_is_answered(self, looked: Review, case: Path) -> None:
        channel = Channel(looked.widget(), case / "decisions.jsonl")
        id_ = looked.items()[0].id
        told, _ = channel.ask("decide", {"id": id_, "decision": "accept"})
        assert told["answer"]["left"] == N - 1
        assert channel.on_disk == [True]
        made = looked.decision(id_)
        assert made is not None
        assert made.decision == "accept"

    @pytest.mark.parametrize(
        ("kind", "values", "words"),
        [
            ("close", {}, "kind: expected one of"),
            (["state"], {}, "kind: expected one of"),
            (None, {}, "kind: expected one of"),
            ("state", {"path": "/etc/passwd"}, "request: expected nothing"),
            ("state", ["x"], "request: expected named values"),
            ("crop", {"id": "nobody", "fov_um": 64}, "id: expected that of an item"),
            ("items", {"page": -1, "size": 5}, "page: expected a whole number"),
            ("decide", {"id": "x" * MOST_ASKED_BYTES}, f"request: expected at most {MOST_ASKED_BYTES} bytes"),
        ],
    )
    def test_refused(self, looked: Review, case: Path, kind: object, values: object, words: str) -> None:
        """What cannot be meant is refused in words, and nothing is written."""
        told, sent = Channel(looked.widget()).ask(kind, values)
        assert list(told) == ["error"]
        assert told["error"].startswith(words)
        assert sent == []
        assert not (case / "decisions.jsonl").exists()

    def test_a_request_has_no_buffers(self, looked: Review) -> None:
        told, _ = Channel(looked.widget()).ask("state", {}, b"more")
        assert "error" in told

    def test_nobody_to_answer(self, looked: Review) -> None:
        """What is no request is passed over, and the next one is answered."""
        channel = Channel(looked.widget())
        for content in (
            None,
            [],
            "state",
            {},
            {"view": "v"},
            {"view": 1, "n": 1, "kind": "state", "values": {}},
            {"view": "x" * 1000, "n": 1, "kind": "state", "values": {}},
            {"view": "v", "n": 7, "drop": True},
        ):
            channel.take(content)
        told, _ = channel.ask("state")
        assert told["answer"]["total"] == N

    def test_no_paths(
        self, case: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
    ) -> None:
        """What failed is told without a path and without a trace; the log has it in a line, a notebook's stderr not."""
        review = ss.review(ss.load_result(case), slides=tmp_path / "gone.svs", reviewer="ann")
        widget = review.widget()
        widget.log.propagate = True
        channel = Channel(widget)
        (case / "decisions.jsonl").mkdir()
        id_ = review.items()[0].id

        def broken(_: object) -> Picture:
            raise RuntimeError(f"{tmp_path} fell over\nbadly")

        widget._desk._kinds = {**widget._desk._kinds, "heat": broken}
        told = [channel.ask("crop", {"id": id_, "fov_um": 64})[0], channel.ask("heat", {"slide": 0})[0]]
        told.append(channel.ask("decide", {"id": id_, "decision": "accept"})[0])
        assert all(list(each) == ["error"] for each in told)
        assert str(tmp_path) not in str(told)
        assert "gone.svs" not in str(told)
        assert "Traceback" not in str(told)
        assert capsys.readouterr().err == ""
        lines = [record.getMessage() for record in caplog.records]
        assert len(lines) == 3
        assert "gone.svs" in lines[0]
        assert re.fullmatch(r"slidescan: RuntimeError: \S+ fell over badly", lines[1])
        widget.close()

    def test_many_at_once_and_one_dropped(self, looked: Review) -> None:
        """Slow pictures, however many, keep no decision waiting; one dropped before its turn is never begun."""
        widget = looked.widget()
        channel = Channel(widget)
        go = threading.Event()
        begun: list[object] = []

        def slow(asked: Any) -> dict[str, Any]:
            begun.append(asked.whole("slide", 0, 100))
            assert go.wait(30)
            return {}

        widget._desk._kinds = {**widget._desk._kinds, "heat": slow}
        for n in range(6):
            channel.take({"view": "a", "n": n, "kind": "heat", "values": {"slide": n}})
        decision = {"id": looked.items()[0].id, "decision": "accept"}
        channel.take({"view": "b", "n": 0, "kind": "decide", "values": decision})
        assert channel.answers(1)[0][0]["view"] == "b"
        channel.take({"view": "a", "n": 5, "drop": True})
        go.set()
        assert {told["n"] for told, _ in channel.answers(6)[1:]} == {0, 1, 2, 3, 4}
        assert 5 not in begun


class TestNotebook:
    def kept(self, review: Review) -> str:
        data, metadata = review._repr_mimebundle_()
        widget = review.widget()
        state = {name: value for name, value in widget.get_state().items() if name not in ("_esm", "_css")}
        return json.dumps([data, metadata, state, sorted(widget.traits(sync=True))])

    def test_a_notebook_keeps_nothing_of_the_review(self, looked: Review, case: Path) -> None:
        """State and output are the same whatever is asked and decided, and hold no id, path or decision."""
        code = {name: looked.widget().get_state()[name] for name in ("_esm", "_css")}
        channel = Channel(looked.widget())
        before = self.kept(looked)
        item = looked.items()[0]
        channel.ask("crop", {"id": item.id, "fov_um": 64})
        channel.ask("decide", {"id": item.id, "decision": "unsure", "note": "a patient's name"})
        after = self.kept(looked)
        assert after.replace(f"{N - 1} left", f"{N} left") == before
        for word in (item.id, item.label, str(case), "unsure", "patient", "jpeg", item.slide_id + '"'):
            assert word not in after
        assert code == {name: looked.widget().get_state()[name] for name in ("_esm", "_css")}
        for text in code.values():
            assert item.id not in text
            assert str(case) not in text

    def test_the_output_names_the_widget(self, looked: Review) -> None:
        """A cell's output is a widget's id and a line; shown again it is the same widget, closed it is a new one."""
        data, _ = looked._repr_mimebundle_()
        shown = "application/vnd.jupyter.widget-view+json"
        assert set(data) == {shown, "text/plain"}
        assert data["text/plain"] == repr(looked)
        assert data[shown]["model_id"] == looked.widget().model_id
        assert looked._repr_mimebundle_(include=None, exclude=None)[0] == data
        looked.widget().close()
        assert looked._repr_mimebundle_()[0][shown]["model_id"] != data[shown]["model_id"]

    def test_without_anywidget(self, looked: Review, monkeypatch: pytest.MonkeyPatch) -> None:
        review = Review(list(looked.cases.values()), looked.items(), reviewer="ann", blinded=False)
        monkeypatch.delitem(sys.modules, "slidescan.reviews.widget")
        monkeypatch.setitem(sys.modules, "anywidget", None)
        data, _ = review._repr_mimebundle_()
        assert set(data) == {"text/plain"}
        first, hint = data["text/plain"].splitlines()
        assert first == repr(review)
        assert 'pip install "slidescan[notebook]"' in hint
        with pytest.raises(MissingExtraError, match=r'pip install "slidescan\[notebook\]"'):
            review.widget()

    def test_its_style_is_for_nothing_else(self) -> None:
        """Each rule names the review, or a class that only the review has."""
        text = re.sub(r"/\*.*?\*/", "", style("widget"), flags=re.DOTALL)
        rules = re.findall(r"([^{}]+)\{[^{}]*\}", re.sub(r"@(container|media)[^{]*\{", "", text))
        assert len(rules) > 60
        for rule in rules:
            for selector in re.split(r",(?![^(]*\))", rule):
                assert re.search(r"\.slidescan-review|\.ss-", selector), selector
        assert "@import" not in text
        assert "url(" not in text


FAKE = """(async () => {
  window.define = Object.assign(() => { throw new Error("not ours"); }, { amd: true });
  window.module = { exports: {} };
  const told = new Map();
  window.model = {
    sent: [], on: (name, act) => told.set(name, act), off: (name) => told.delete(name),
    send: (content) => window.model.sent.push(content), widget_manager: { kernel: window.kernel },
  };
  window.tell = (name, ...values) => told.get(name)(...values);
  window.listeners = told;
  const code = URL.createObjectURL(new Blob([CODE], { type: "text/javascript" }));
  window.end = (await import(code)).default.render({ model: window.model, el: document.body });
})()"""


@pytest.fixture
def fake(tmp_path: Path) -> Iterator[Tab]:
    """Give the widget's front end, whose kernel is the test: `model.sent` is what it asks, `tell` what it is told."""
    with Tab(tmp_path) as tab:
        show(tab)
        yield tab


def show(tab: Tab) -> None:
    tab.run(FAKE.replace("CODE", json.dumps(str(ReviewWidget._esm))))
    tab.wait("model.sent.length === 1")


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
class TestFrontEnd:
    ROOT = "document.querySelector('.slidescan-review').textContent"

    def test_answers_of_other_views_are_theirs(self, fake: Tab) -> None:
        """Only an answer under this view's name and a number that waits is taken."""
        for changed in ("view: 'another'", "n: 2"):
            fake.run(f"tell('msg:custom', {{ ...model.sent[0], error: 'not for you', {changed} }}, [])")
        assert fake.run(self.ROOT) == ""
        fake.run("tell('msg:custom', { ...model.sent[0], error: 'for you' }, [])")
        fake.wait(f"{self.ROOT} === 'for you'")
        assert fake.run("[typeof OpenSeadragon, Object.keys(module.exports).length]") == ["undefined", 0]

    @pytest.mark.parametrize("sign", ["comm:close", "comm_live_update", "destroy"])
    def test_a_kernel_that_is_gone_fails_what_waits(self, fake: Tab, sign: str) -> None:
        fake.run(f"tell('{sign}')")
        fake.wait(f"{self.ROOT}.includes('run the cell again')")
        assert fake.run("document.querySelector('.ss-kernel').textContent.includes('run the cell again')")

    def test_a_server_that_is_away_is_told_from_a_busy_kernel(self, tmp_path: Path) -> None:
        """What waits is neither lost nor failed: the notebook sends it when it is connected again."""
        notice = "document.querySelector('.ss-kernel').textContent"
        with Tab(tmp_path) as tab:
            tab.run("window.kernel = { connectionStatus: 'connecting' }; null")
            show(tab)
            tab.wait(f"{notice}.includes('sent when it is back')")
            tab.run("kernel.connectionStatus = 'connected'; null")
            tab.wait(f"{notice}.includes('Waiting for the kernel')")
            tab.run("tell('msg:custom', { ...model.sent[0], error: 'here again' }, [])")
            tab.wait(f"{self.ROOT} === 'here again' && {notice} === ''")

    def test_keys_are_kept_from_the_notebook(self, fake: Tab) -> None:
        """Notebooks listen on the way down, and pass over what is marked, or on the way up; saving is left to them."""
        fake.run(
            "window.seen = []; for (const down of [true, false]) document.addEventListener('keydown', (event) =>"
            " { if (!down || !event.target.closest('[data-lm-suppress-shortcuts]')) seen.push(event.key); }, down);"
            " document.querySelector('.slidescan-review').tabIndex = -1;"
            " document.querySelector('.slidescan-review').focus(); null"
        )
        for key in ("a", "Enter", "Escape"):
            fake.press(key)
        fake.press("b", control=True)
        fake.press("s", control=True)
        fake.press("z")
        assert fake.run("seen") == ["s", "s"]

    def test_the_end_leaves_nothing(self, fake: Tab) -> None:
        assert fake.run("listeners.size") > 0
        fake.run("end(); null")
        assert fake.run("listeners.size") == 0
        fake.wait(f"{self.ROOT} !== ''")
