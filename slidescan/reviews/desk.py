"""`Desk`: a review as named requests, whatever carries them: HTTP, or the messages of a notebook's widget.

Invariants: a request names a kind and gives plain values; every value is checked before anything is read or written;
an answer is plain values or bytes; no answer holds a path, and a blinded review's none that tells scores. A decision is
on the disk before its answer is there.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any, get_args

from slidescan.errors import ConfigError, ResultError, SlideError
from slidescan.legend import RAMP_END_PER_MM2
from slidescan.reviews.asked import Asked, NotThereError
from slidescan.reviews.case import MOST_PARTS, Case
from slidescan.reviews.chosen import STATES, TELL_SCORES, Sort, nearest
from slidescan.reviews.decisions import Decision, Verdict
from slidescan.reviews.items import ReviewItem
from slidescan.reviews.layers import Layers, layers_of
from slidescan.reviews.session import Review
from slidescan.reviews.summary import notice, summary_of
from slidescan.reviews.tiles import TILE_PX, Tiling, as_jpeg
from slidescan.reviews.words import MOST_TEXT
from slidescan.slides import Slide

__all__ = ["WRITES", "Desk", "Picture"]

_OF_SLIDES = "slides: "  # begins what a review says of them, which names neither path nor file
WRITES = frozenset({"decide", "undo"})  # kinds that change something
_MOST_ON_PAGE = 100  # items: as many pictures as a screen holds, several times
_MOST_NAME = 1000  # characters of a class or an id
_FOV_UM = (8.0, 2048.0)  # field of view: of one nucleus; of two flagged regions
_MOST_CROP_PX = 640  # edge of a crop: 1.2 MB of RGB
_LISTINGS, _LAYERS = 8, 4  # kept: lists that pages are turned of, one a window; layers of slides looked at last


@dataclass(frozen=True, slots=True)
class Picture:
    """Bytes, and what they are."""

    data: bytes
    media_type: str


class Desk:
    """Answers the requests of a review's front ends; safe to use from many threads."""

    def __init__(self, review: Review) -> None:
        self._review = review
        self._lock = threading.Lock()  # a `Review` is for one thread
        self._layers_lock = threading.Lock()  # of a large slide they take long, and no decision waits for them
        self._slides = list(review.cases)
        self._number = {name: n for n, name in enumerate(self._slides)}
        self._listings: OrderedDict[int, list[ReviewItem]] = OrderedDict()
        self._listed = 0
        self._layers: OrderedDict[int, Layers] = OrderedDict()
        self._tilings: dict[int, Tiling] = {}
        items = review.items()
        self._labels = sorted({item.label for item in items})  # what can be listed
        # What can be said: the majority of a region has one class, a detection in it perhaps another.
        self._classes = sorted({*self._labels, *(name for case in review.cases.values() for name in case.classes)})
        self._on_slide = {item.slide_id for item in items}
        self._kinds: Mapping[str, Callable[[Asked], dict[str, Any] | Picture]] = {
            "state": self._state,
            "items": self._items,
            "next": self._next,
            "find": self._find,
            "summary": self._summary,
            "decide": self._decide,
            "undo": self._undo,
            "crop": self._crop,
            "slide": self._slide,
            "tile": self._tile,
            "heat": self._heat,
            "coverage": self._coverage,
            "boxes": self._boxes,
        }

    @property
    def kinds(self) -> frozenset[str]:
        """What can be asked for."""
        return frozenset(self._kinds)

    def answer(self, kind: str, values: Any) -> dict[str, Any] | Picture:
        """Answer a request.

        Parameters
        ----------
        kind : str
            One of `kinds`.
        values : mapping
            What that kind takes; anything else is refused.

        Raises
        ------
        NotThereError
            If there is no such kind, item, slide or list.
        ConfigError
            If a value is not of its type or range, or the review is blinded to what is asked for.
        ResultError
            If a decision cannot be saved, or a result cannot be read.
        SlideError
            If pixels cannot be read.
        """
        if kind not in self._kinds:
            raise NotThereError(f"kind: expected one of {', '.join(self._kinds)}")
        return self._kinds[kind](Asked(values))

    def _state(self, asked: Asked) -> dict[str, Any]:
        asked.nothing_else()
        review = self._review
        with self._lock:
            self._refresh()
            left = review.left
        sorts = [sort for sort in get_args(Sort) if not (review.blinded and sort in TELL_SCORES)]
        slides = [{"n": n, "name": name} for n, name in enumerate(self._slides) if name in self._on_slide]
        of = next(iter(review.cases.values())).what if review.cases else "region"
        return {
            "reviewer": review.reviewer,
            "blinded": review.blinded,
            "of": of,
            "total": len(review),
            "left": left,
            "labels": self._labels,
            "classes": self._classes,
            "slides": slides,
            "sorts": sorts[::-1] if review.blinded else sorts,
            "notice": notice(review),
        }

    def _summary(self, asked: Asked) -> dict[str, Any]:
        asked.nothing_else()
        with self._lock:
            self._refresh()
            return summary_of(self._review)

    def _items(self, asked: Asked) -> dict[str, Any]:
        """Turn a page of a list; a list stays as it was made, whatever is decided meanwhile, so that pages fit."""
        size = asked.whole("size", 1, _MOST_ON_PAGE)
        page = asked.whole("page", 0, 10**9)
        kept = asked.whole("listing", -1, 10**9, default=-1)
        sort = asked.one_of_or_none("sort", get_args(Sort))
        slide_n = asked.whole("slide", -1, len(self._slides) - 1, default=-1)
        label = asked.text_or_none("label", _MOST_NAME)
        decision = asked.one_of_or_none("decision", STATES)
        min_score = asked.number_or_none("min_score", 0.0, 1.0)
        asked.nothing_else()
        with self._lock:
            if kept < 0:
                self._refresh()
                self._listed = kept = self._listed + 1
                self._listings[kept] = self._review.items(
                    sort,  # type: ignore[arg-type]  # one of them
                    slide=None if slide_n < 0 else self._slides[slide_n],
                    label=label,
                    decision=decision,
                    min_score=min_score,
                )
                while len(self._listings) > _LISTINGS:
                    self._listings.popitem(last=False)
            listing = self._listing(kept)
            told = [self._told(item) for item in listing[page * size : (page + 1) * size]]
        return {"listing": kept, "total": len(listing), "page": page, "items": told}

    def _next(self, asked: Asked) -> dict[str, Any]:
        """Find the first item of a list from an index on that is not decided."""
        kept, start = asked.whole("listing", 0, 10**9), asked.whole("start", 0, 10**9)
        asked.nothing_else()
        with self._lock:
            rest = enumerate(self._listing(kept)[start:], start)
            return {"index": next((i for i, item in rest if self._review.decision(item.id) is None), None)}

    def _find(self, asked: Asked) -> dict[str, Any]:
        """Find the item of a list that is at a place of a slide."""
        kept = asked.whole("listing", 0, 10**9)
        _, case = self._case(asked)
        width, height = case.frame.size_wh
        x, y = asked.number("x_l0", 0, width), asked.number("y_l0", 0, height)
        reach = asked.number("reach_l0", 0, max(width, height))
        asked.nothing_else()
        with self._lock:
            return {"index": nearest(self._listing(kept), case.slide_id, (x, y), reach)}

    def _listing(self, kept: int) -> list[ReviewItem]:
        if kept not in self._listings:
            raise NotThereError("listing: expected one that is kept, got an old one; list anew")
        self._listings.move_to_end(kept)
        return self._listings[kept]

    def _decide(self, asked: Asked) -> dict[str, Any]:
        """Decide, unless the reviewer decided meanwhile in another window, and `over` is not what stands any more.

        What stands already is not written again, so that a request may be sent again that got no answer.
        """
        item = self._item(asked)
        decision: Verdict = asked.one_of("decision", get_args(Verdict))  # type: ignore[assignment]
        label = asked.text_or_none("label", _MOST_NAME)
        note = asked.text("note", MOST_TEXT, default="")
        over = asked.text_or_none("over", _MOST_NAME)  # the `event_id` that was shown; none: undecided
        asked.nothing_else()
        with self._lock:
            try:
                self._review.cases[item.slide_id].refresh()
                stands = self._review.decision(item.id)
                saved = over == (None if stands is None else stands.event_id)
                if saved:
                    self._review.decide(item.id, decision, label=label, note=note)
                elif stands is not None:
                    saved = (stands.decision, stands.label, stands.note) == (decision, label, note)
            except ResultError as exc:
                raise self._without_path(exc, item.slide_id) from exc
            return {"saved": saved, "left": self._review.left, "item": self._told(item)}

    def _undo(self, asked: Asked) -> dict[str, Any]:
        asked.nothing_else()
        with self._lock:
            try:
                undone = self._review.take_back()
            except ResultError as exc:
                raise ResultError("the undo was not saved; the terminal says why") from exc
            if undone is None:
                return {"left": self._review.left, "item": None}
            item = self._told(self._review.item(undone[0]))
            return {"left": self._review.left, "item": item, "undone": _said(undone[1])}

    def _crop(self, asked: Asked) -> Picture:
        item = self._item(asked)
        fov_um = asked.number("fov_um", *_FOV_UM)
        asked.nothing_else()
        case = self._review.cases[item.slide_id]
        # No finer than the slide: what enlarges can be done where it is shown.
        px = max(1, min(_MOST_CROP_PX, round(case.frame.px(fov_um))))
        self._opened(case)
        return Picture(as_jpeg(self._review.crop(item.id, fov_um, px)), "image/jpeg")

    def _slide(self, asked: Asked) -> dict[str, Any]:
        n, case = self._case(asked)
        asked.nothing_else()
        tiling, layers = self._tiling(n, case), self._layer(n, case)
        return {
            "name": case.slide_id,
            "size_wh": list(case.frame.size_wh),
            "mpp": case.frame.mpp,
            "tile_px": TILE_PX,
            "least": tiling.least,
            "most": tiling.most,
            "map_wh_l0": list(layers.map_wh_l0),
            "boxes": layers.n,
            "classes": list(layers.classes),
            "threshold": layers.threshold,
            "ramp_end_per_mm2": RAMP_END_PER_MM2,
        }

    def _tile(self, asked: Asked) -> Picture:
        n, case = self._case(asked)
        tiling = self._tiling(n, case)
        level = asked.whole("level", tiling.least, tiling.most)
        across, down = tiling.tiles_wh(level)
        x, y = asked.whole("x", 0, across - 1), asked.whole("y", 0, down - 1)
        asked.nothing_else()
        return Picture(as_jpeg(tiling.read(self._opened(case), level, x, y)), "image/jpeg")

    def _heat(self, asked: Asked) -> Picture:
        n, case = self._case(asked)
        asked.nothing_else()
        if self._review.blinded:
            raise ConfigError("heat: would tell scores, and this review is blinded")
        return Picture(self._layer(n, case).heat_png, "image/png")

    def _coverage(self, asked: Asked) -> Picture:
        n, case = self._case(asked)
        asked.nothing_else()
        return Picture(self._layer(n, case).coverage_png, "image/png")

    def _boxes(self, asked: Asked) -> Picture:
        n, case = self._case(asked)
        asked.nothing_else()
        return Picture(self._layer(n, case).boxes, "application/octet-stream")

    def _item(self, asked: Asked) -> ReviewItem:
        id_ = asked.text("id", _MOST_NAME)
        try:
            return self._review.item(id_)
        except ConfigError as exc:
            raise NotThereError("id: expected that of an item of this review") from exc

    def _case(self, asked: Asked) -> tuple[int, Case]:
        n = asked.whole("slide", 0, len(self._slides) - 1)
        return n, self._review.cases[self._slides[n]]

    def _opened(self, case: Case) -> Slide:
        try:
            return case.slide()
        except (SlideError, ConfigError) as exc:  # whose text may name a path, or the file
            if str(exc).startswith(_OF_SLIDES):
                raise
            raise SlideError(f"{case.slide_id}: its slide cannot be opened; the terminal says why") from exc

    def _tiling(self, n: int, case: Case) -> Tiling:
        if n not in self._tilings:
            self._tilings[n] = Tiling.of(self._opened(case))
        return self._tilings[n]

    def _layer(self, n: int, case: Case) -> Layers:
        with self._layers_lock:
            if n not in self._layers:
                try:
                    self._layers[n] = layers_of(case.path, blinded=self._review.blinded)
                except ResultError as exc:
                    raise ResultError(f"{case.slide_id}: its result cannot be read; the terminal says why") from exc
                while len(self._layers) > _LAYERS:
                    self._layers.popitem(last=False)
            self._layers.move_to_end(n)
            return self._layers[n]

    def _refresh(self) -> None:
        try:
            self._review.refresh()
        except ResultError as exc:
            raise ResultError("what was decided cannot be read; the terminal says why") from exc

    def _without_path(self, error: ResultError, slide_id: str) -> ResultError:
        return ResultError(str(error).removeprefix(f"{self._review.cases[slide_id].log.path}: "))

    def _told(self, item: ReviewItem) -> dict[str, Any]:
        """Say of an item what may be shown; nothing else leaves."""
        box, said = item.box_l0, self._review.decisions(item.id)
        case = self._review.cases[item.slide_id]
        parts, focus = case.parts(item)[:MOST_PARTS].tolist(), list(astuple(case.focus(item)))
        if parts and focus not in parts:  # of very many
            parts.append(focus)
        polygon = None if item.polygon_l0 is None else item.polygon_l0.round(1).tolist()
        return {
            "id": item.id,
            "slide": self._number[item.slide_id],
            "slide_name": item.slide_id,
            "group": item.group,
            "label": item.label,
            "score": item.score,
            "evidence": item.evidence,
            "n": item.n,
            "rank": item.rank,
            "mpp": case.frame.mpp,
            "box_l0": [box.x0, box.y0, box.x1, box.y1],
            "focus_l0": focus,
            "polygon_l0": polygon,
            "parts_l0": parts,
            "decided": _said(said.get(self._review.reviewer)),
            "others": [] if self._review.blinded else _others(said, self._review.reviewer),
        }


def _said(decision: Decision | None) -> dict[str, Any] | None:
    if decision is None:
        return None
    said = {"event_id": decision.event_id, "decision": decision.decision}
    return said | {"label": decision.label, "note": decision.note}


def _others(said: Mapping[str, Decision], reviewer: str) -> list[dict[str, str]]:
    """Say what others decided, who decided last at the end."""
    others = [(name, made) for name, made in said.items() if name != reviewer]
    return [{"reviewer": name, "decision": made.decision, "note": made.note} for name, made in others]
