"""The review page in a notebook: `Desk` over the messages of a widget, with no port and no proxy.

What a notebook may keep of a widget is its state and its outputs, so neither holds anything of the review: everything
is a message, and pictures are its buffers. Threads of the widget's own read the pictures, so that a slide far away does
not keep the next cell waiting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from threading import Lock
from typing import Any

import anywidget

from slidescan.reviews.desk import Desk, Picture
from slidescan.reviews.page import asset, module, style
from slidescan.reviews.refusals import MOST_ASKED_BYTES, Refusal, answered

__all__ = ["ReviewWidget"]

_THREADS = 4  # pictures at once: one that is near takes ms, one that is far mostly waits
_PICTURES = frozenset({"crop", "slide", "tile", "heat", "coverage", "boxes"})  # what reads files; the rest waits not
_MOST_NAME = 100  # characters of what a view calls itself; it takes some 30


def _front_end() -> str:
    """Return all of it as one ES module.

    OpenSeadragon looks for a loader of modules, or leaves a global; in a notebook neither is ours.
    """
    found = asset("openseadragon.min.js")
    assert found is not None
    viewer = f"(function (define, module) {{\n{found[0].decode()}\nreturn OpenSeadragon;\n}}).call({{}})"
    return f"const OpenSeadragon = {viewer};\n{module('widget')}"


class ReviewWidget(anywidget.AnyWidget):
    """A review in a notebook's output; shown twice it is two views of the same. Made by `Review.widget`."""

    _esm = _front_end()
    _css = style("widget")

    def __init__(self, desk: Desk, *, told: Callable[[], str]) -> None:
        """Take what answers, and what is said where a widget cannot be shown."""
        self._desk = desk
        self._told = told
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="slidescan-review")
        self._quick = ThreadPoolExecutor(1, thread_name_prefix="slidescan-review-quick")
        self._waiting: dict[tuple[str, int], Future[None]] = {}
        self._sending = Lock()
        super().__init__()
        self.on_msg(self._asked)

    def __repr__(self) -> str:
        return self._told()

    def close(self) -> None:
        """End every view; what was decided stays."""
        super().close()
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._quick.shutdown(wait=False)  # a decision that was made is saved

    def _asked(self, _: object, content: Any, buffers: Sequence[object]) -> None:
        """Have a message answered: ``{view, n, kind, values}``; or ``{view, n, drop}``, which nobody waits for now."""
        if not isinstance(content, dict):
            return
        view, n = content.get("view"), content.get("n")
        if not isinstance(view, str) or len(view) > _MOST_NAME or not isinstance(n, int):
            return  # there is nobody to tell
        if "drop" in content:
            if waiting := self._waiting.get((view, n)):
                waiting.cancel()
            return
        if buffers or _too_long(content):
            self._answer(view, n, Refusal(f"request: expected at most {MOST_ASKED_BYTES} bytes, got more", 413))
            return
        # With the context goes which message this is, for the kernel to name in the answers.
        run, kind = copy_context().run, content.get("kind")
        threads = self._threads if isinstance(kind, str) and kind in _PICTURES else self._quick
        future = threads.submit(run, self._work, view, n, kind, content.get("values"))
        self._waiting[view, n] = future
        future.add_done_callback(lambda _: self._waiting.pop((view, n), None))

    def _work(self, view: str, n: int, kind: Any, values: Any) -> None:
        # Not to stderr, which a kernel puts into the notebook: to the log, which is in the terminal.
        said = self.log.warning
        self._answer(view, n, answered(self._desk, kind if isinstance(kind, str) else "", values, said))

    def _answer(self, view: str, n: int, answer: dict[str, Any] | Picture | Refusal) -> None:
        head: dict[str, Any] = {"view": view, "n": n}
        with self._sending:  # one message at a time: their numbers are the kernel's
            if isinstance(answer, Refusal):
                self.send(head | {"error": answer.why})
            elif isinstance(answer, Picture):
                self.send(head | {"media_type": answer.media_type}, [answer.data])
            else:
                self.send(head | {"answer": answer})


def _too_long(content: dict[str, Any]) -> bool:
    try:
        return len(json.dumps(content)) > MOST_ASKED_BYTES
    except (TypeError, ValueError, RecursionError):
        return True
