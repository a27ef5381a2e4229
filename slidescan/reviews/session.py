"""`Review`: rank, look, decide, go on; every act is a call, and a front end needs no others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
from numpy.typing import NDArray

from slidescan.contact_sheet import contact_sheet, corners, field_of_view, middle_of_field
from slidescan.errors import ConfigError, MissingExtraError
from slidescan.geometry import Box
from slidescan.reviews.agreement import Kappa, cohen_kappa
from slidescan.reviews.case import Case
from slidescan.reviews.chosen import Choice, Sort
from slidescan.reviews.decisions import Decision, Verdict
from slidescan.reviews.figure import views
from slidescan.reviews.items import ReviewItem
from slidescan.reviews.words import check_name, check_note, person

if TYPE_CHECKING:
    import pandas as pd

    from slidescan.figure import Plot
    from slidescan.reviews.widget import ReviewWidget

__all__ = ["Review"]


class Review:
    """What one reviewer looks through and decides on; make it with `review`.

    Earlier decisions on the same results are there at once; those that others make meanwhile after `refresh`, and after
    each decision on that slide. Use it from one thread; any number of reviews, in any number of processes, may write to
    the same results at once.
    """

    def __init__(self, cases: Sequence[Case], shown: Sequence[ReviewItem], *, reviewer: str, blinded: bool) -> None:
        self.reviewer = reviewer
        self.blinded = blinded
        self._cases = {case.slide_id: case for case in cases}
        if len(self._cases) < len(cases):
            twice = [case.slide_id for case in cases if self._cases[case.slide_id] is not case]
            raise ConfigError(
                f"review: expected one result a slide, got two of {twice[0]!r}; review one after the other"
            )
        self._items: dict[str, ReviewItem] = {}
        for item in shown:  # a slide that is in an archive twice, under two names, is reviewed once
            if blinded:  # rows, too, are by rank
                item = replace(item, score=None, evidence=None, rank=None, rows=np.empty(0, np.intp))
            self._items.setdefault(item.id, item)
        self._on_slide: dict[str, list[str]] = defaultdict(list)
        for item in self._items.values():
            self._on_slide[item.slide_id].append(item.id)
        self._labels = {name for case in cases for name in case.classes} | {item.label for item in shown}
        self._left: dict[str, tuple[int, int]] = {}
        """By slide how many events its log had when they were counted, and how many items were not decided."""
        self._sorted: dict[Sort, list[ReviewItem]] = {}
        self._passed: dict[Choice, int] = {}
        """By choice how many items were passed by `next`, decided or not chosen, when the logs had `_told` events."""
        self._told = -1
        self._widget: ReviewWidget | None = None
        self._made: dict[str, int] = {}
        """The reviewer's decisions of this session, numbered: which was last must not depend on clocks."""

    def __len__(self) -> int:
        return len(self._items)

    @property
    def cases(self) -> Mapping[str, Case]:
        """The results in review, by slide id."""
        return MappingProxyType(self._cases)

    def __repr__(self) -> str:
        blinded = ", blinded" if self.blinded else ""
        return f"Review({self.reviewer!r}, {len(self):,} items, {self.left:,} left{blinded})"

    def _repr_mimebundle_(self, **_: object) -> tuple[dict[str, Any], dict[str, Any]]:
        """Give a notebook the page where it can be shown, else what it is in words."""
        try:
            shown = self.widget()._repr_mimebundle_()
        except MissingExtraError:
            shown = None
        hint = 'In a notebook, pip install "slidescan[notebook]" gives the page.'
        return shown or ({"text/plain": f"{self!r}\n{hint}"}, {})

    def widget(self) -> ReviewWidget:
        """Return the page as a widget: what a notebook shows where a review is the last line of a cell.

        Each call returns the same one. Decide on the page or in a cell, not in both at the same moment.

        Raises
        ------
        MissingExtraError
            If anywidget is not installed.
        """
        if self._widget is None or self._widget.comm is None:  # one that was closed cannot be shown again
            try:
                from slidescan.reviews.widget import ReviewWidget
            except ImportError as exc:
                raise MissingExtraError(f'widget: needs anywidget ({exc}); pip install "slidescan[notebook]"') from exc
            from slidescan.reviews.desk import Desk

            self._widget = ReviewWidget(Desk(self), told=self.__repr__)
        return self._widget

    def items(
        self,
        sort: Sort | None = None,
        *,
        slide: str | None = None,
        label: str | None = None,
        decision: str | None = None,
        min_score: float | None = None,
    ) -> list[ReviewItem]:
        """Return what is to be reviewed, in order.

        Parameters
        ----------
        sort : {"evidence", "score", "uncertainty", "slide", "shuffled"}, optional
            By falling evidence or highest score; by how near the highest score is to 0.5, where a calibrated detector
            is least certain; by slide id and rank; or in an order that has nothing to do with scores. Default:
            evidence, in a blinded review shuffled.
        slide, label : str, optional
            Only of this slide id, of this class of the detector's.
        decision : {"accept", "reject", "unsure", "decided", "undecided", "disputed"}, optional
            Only what this reviewer decided so; or, disputed, what reviewers decided differently.
        min_score : float, optional
            Only what has at least this highest score.

        Raises
        ------
        ConfigError
            If a setting is not one of these, or would tell in a blinded review scores or what others decided.
        """
        choice = self._choice(sort, slide, label, decision, min_score)
        return [item for item in self._in_order(choice) if choice.fits(item, self.reviewer, self.decisions)]

    def next(
        self,
        sort: Sort | None = None,
        *,
        slide: str | None = None,
        label: str | None = None,
        min_score: float | None = None,
    ) -> ReviewItem | None:
        """Return the first item that this reviewer has not decided on; None if there is none left."""
        choice = self._choice(sort, slide, label, "undecided", min_score)
        events = sum(case.log.events for case in self._cases.values())
        if events != self._told:
            self._told, self._passed = events, {}
        items = self._in_order(choice)
        for place in range(self._passed.get(choice, 0), len(items)):
            if choice.fits(items[place], self.reviewer, self.decisions):
                self._passed[choice] = place
                return items[place]
        return None

    @property
    def left(self) -> int:
        """How many items this reviewer has not decided on; of a slide counted again where others wrote in its log."""
        for slide_id, ids in self._on_slide.items():
            events = self._cases[slide_id].log.events
            if self._left.get(slide_id, (-1, 0))[0] != events:
                self._left[slide_id] = events, sum(self.decision(id_) is None for id_ in ids)
        return sum(n for _, n in self._left.values())

    def _wrote(self, slide_id: str, before: int, change: int) -> None:
        """Keep what `left` and `next` know after an event of this review, if no other came with it."""
        if change <= 0 and self._cases[slide_id].log.events == before + 1:
            self._told += 1  # what was passed stays so
        events, n = self._left.get(slide_id, (-1, 0))
        if events == before == self._cases[slide_id].log.events - 1:
            self._left[slide_id] = before + 1, n + change

    def decide(self, item_id: str, decision: Verdict, *, label: str | None = None, note: str = "") -> Decision:
        """Decide on an item; it is on the disk when this returns.

        Parameters
        ----------
        item_id : str
            `ReviewItem.id`.
        decision : {"accept", "reject", "unsure"}
            Deciding again overrules; nothing is lost.
        label : str, optional
            The class, where it is not the detector's: one of its classes or one of your own.
        note : str
            Anything; it is kept as typed, so leave patients out of it.

        Raises
        ------
        ConfigError
            If there is no such item or decision.
        ResultError
            If it cannot be written; then nothing is decided.
        """
        item = self.item(item_id)
        if decision not in get_args(Verdict):
            raise ConfigError(f"decision: expected accept, reject or unsure, got {decision!r}")
        if label is not None:
            check_name("label", label, "the name of a class, or None for the detector's")
        check_note(note)
        case = self._cases[item.slide_id]
        before, undecided = case.log.events, self.decision(item_id) is None
        decided = case.decide(item, decision, reviewer=self.reviewer, label=label, note=note)
        self._made[decided.event_id] = len(self._made)
        self._wrote(item.slide_id, before, -undecided)
        return decided

    def undo(self) -> str | None:
        """Take back this reviewer's last decision on these items; return the item's id, None if there is none.

        Again: the one before. What was decided on the item earlier stands again.
        """
        taken_back = self.take_back()
        return None if taken_back is None else taken_back[0]

    def take_back(self) -> tuple[str, Decision] | None:
        """Undo, and return the decision, too."""
        lasts = []
        for case in self._cases.values():
            shown = [(item_id, made) for item_id, made in case.made_by(self.reviewer) if item_id in self._items]
            # Of this review first: another window of the same reviewer may have decided since.
            here = ((item_id, made) for item_id, made in shown if made.event_id in self._made)
            if last := next(here, next(iter(shown), None)):
                lasts.append((self._made.get(last[1].event_id, -1), last[1].at, case.slide_id, *last))
        if not lasts:
            return None
        *_, slide_id, item_id, decision = max(lasts, key=lambda last: last[:3])
        before = self._cases[slide_id].log.events
        self._cases[slide_id].undo(decision)
        self._wrote(slide_id, before, int(self.decision(item_id) is None))
        return item_id, decision

    def decision(self, item_id: str, reviewer: str | None = None) -> Decision | None:
        """Return what stands for an item by this reviewer or another; None if nothing."""
        return self.decisions(item_id).get(person(reviewer or self.reviewer))

    def decisions(self, item_id: str) -> dict[str, Decision]:
        """Return what stands for an item by reviewer, who decided last at the end.

        A blinded review tells what others said of what this reviewer has decided on, and of nothing else.
        """
        said = self._cases[self.item(item_id).slide_id].decisions(item_id)
        if self.blinded and self.reviewer not in said:
            return {}
        if self.blinded:  # what another was shown, or the same reviewer before
            said = {name: replace(decision, score=None, evidence=None) for name, decision in said.items()}
        return said

    def ratings(self) -> dict[str, dict[str, Verdict]]:
        """Return by item and reviewer what was decided; items nobody decided on are left out."""
        # In the order of a blinded review's items: the other is by rank.
        said = {item_id: self.decisions(item_id) for item_id in (sorted(self._items) if self.blinded else self._items)}
        return {
            item_id: {name: made.decision for name, made in by_name.items()}
            for item_id, by_name in said.items()
            if by_name
        }

    def agreement(self) -> tuple[Kappa, ...]:
        """Return Cohen's kappa of each pair of reviewers."""
        return cohen_kappa(self.ratings())

    def refresh(self) -> None:
        """See what others decided since."""
        for case in self._cases.values():
            case.refresh()

    @property
    def reattached(self) -> int:
        """Decisions on these results that were made on another scan, and found their place by where they are."""
        return sum(case.reattached for case in self._cases.values())

    @property
    def orphaned(self) -> int:
        """Decisions on these results that found no place: nothing, or more than there was, is there now. They stay."""
        return sum(case.orphaned for case in self._cases.values())

    @property
    def unreadable(self) -> int:
        """Lines of the logs that are no decision: cut off by a power failure or a full disk, or edited by hand."""
        return sum(case.log.unreadable for case in self._cases.values())

    def table(self, *, everyone: bool = False) -> pd.DataFrame:
        """Return a row an item with what this reviewer decided.

        Without `everyone` an item nobody decided on has a row, too; with it a row is an item and a reviewer. A blinded
        review has no columns of scores.
        """
        items = self.items()
        said = [self.decisions(item.id) for item in items]
        rows = (
            [(item, made) for item, by_name in zip(items, said, strict=True) for made in by_name.values()]
            if everyone
            else [(item, by_name.get(self.reviewer)) for item, by_name in zip(items, said, strict=True)]
        )
        from slidescan.reviews.table import table_of

        return table_of(rows, blinded=self.blinded)

    def crop(self, item_id: str, fov_um: float = 64.0, px: int = 256) -> NDArray[np.uint8]:
        """Return a square field of view of an item, uint8 (px, px, 3) RGB; white outside the slide.

        It shows the item's middle; of a region larger than the field its best detection, in a blinded review the one
        nearest to the middle.

        Parameters
        ----------
        item_id : str
        fov_um : float
            Edge, µm: the same for all, so that sizes can be compared.
        px : int
            Edge, px. Where that is finer than the slide its pixels are enlarged.

        Raises
        ------
        ConfigError
            If the slide was not given or is another one.
        SlideError
            If it cannot be opened or read.
        """
        item = self.item(item_id)
        return field_of_view(self._cases[item.slide_id].slide(), self._middle_l0(item, fov_um), fov_um, px)

    def box_um(self, item_id: str, fov_um: float = 64.0) -> tuple[float, float, float, float]:
        """Return the item's box in its field of view: x0, y0, x1, y1 in µm from the upper left corner."""
        item = self.item(item_id)
        (x0, y0), _, (x1, y1), _ = self._in_field([corners(item.box_l0)], item, fov_um)[0].tolist()
        return x0, y0, x1, y1

    def outlines_um(self, item_id: str, fov_um: float = 64.0) -> list[NDArray[np.float64]]:
        """Return the corners (4, 2) of the item's box and of each detection in it, as `box_um`."""
        item = self.item(item_id)
        parts = [Box(*part) for part in self._cases[item.slide_id].parts(item).tolist()]
        boxes = [item.box_l0, *(parts if len(parts) > 1 else ())]
        return self._in_field([corners(box) for box in boxes], item, fov_um)

    def _middle_l0(self, item: ReviewItem, fov_um: float) -> tuple[float, float]:
        case = self._cases[item.slide_id]
        return middle_of_field(item.box_l0, case.focus(item), case.frame.px(fov_um))

    def _in_field(
        self, outlines_l0: Sequence[NDArray[np.float64]], item: ReviewItem, fov_um: float
    ) -> list[NDArray[np.float64]]:
        middle_l0, mpp = self._middle_l0(item, fov_um), self._cases[item.slide_id].frame.mpp
        return [(outline - middle_l0) * mpp + fov_um / 2 for outline in outlines_l0]

    def plot(self, n: int = 24, *, columns: int = 6, fov_um: float = 64.0, px: int = 192) -> Plot:
        """Return a contact sheet of the first `n` items with what was decided, a matplotlib figure.

        The rest is as in `FlaggedRegions.plot`; a blinded review shows a running number in place of rank and score.
        """
        if n < 0:
            raise ConfigError(f"n: expected a number of items, got {n}")
        return contact_sheet(views(self, self.items()[:n], fov_um, px), columns=columns, fov_um=fov_um)

    def item(self, item_id: str) -> ReviewItem:
        """Return the item of an id."""
        item = self._items.get(item_id)
        if item is None:
            raise ConfigError(f"item_id: expected the id of an item of this review, got {item_id!r}; see items()")
        return item

    def _choice(
        self, sort: Sort | None, slide: str | None, label: str | None, decision: str | None, min_score: float | None
    ) -> Choice:
        order: Sort = sort or ("shuffled" if self.blinded else "evidence")
        choice = Choice(order, slide, label, decision, min_score, self.blinded)
        if slide is not None and slide not in self._cases:
            raise ConfigError(f"slide: expected one of this review, got {slide!r}; see cases")
        if label is not None and label not in self._labels:
            raise ConfigError(f"label: expected one of {', '.join(sorted(self._labels))}, got {label!r}")
        return choice

    def _in_order(self, choice: Choice) -> list[ReviewItem]:
        if choice.sort not in self._sorted:
            self._sorted[choice.sort] = sorted(self._items.values(), key=choice.key)
        return self._sorted[choice.sort]
