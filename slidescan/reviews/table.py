"""The items of a review with what was decided, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from slidescan.reviews.decisions import Decision
from slidescan.reviews.items import ReviewItem

__all__ = ["table_of"]


def table_of(rows: Sequence[tuple[ReviewItem, Decision | None]], *, blinded: bool) -> pa.Table:
    """Return a row an item and decision; without a decision its columns are null. Boxes are in level-0 px."""
    items, made = [item for item, _ in rows], [decision for _, decision in rows]

    def of_item(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([getattr(item, name) for item in items], kind)

    def of_decision(name: str, kind: pa.DataType) -> pa.Array:
        return pa.array([None if each is None else getattr(each, name) for each in made], kind)

    columns = {name: of_item(name, pa.string()) for name in ("id", "what", "slide_id", "group", "label")}
    if not blinded:
        columns |= {"score": of_item("score", pa.float64()), "evidence": of_item("evidence", pa.float64())}
        columns["rank"] = of_item("rank", pa.int64())
    columns["n"] = of_item("n", pa.int64())
    for edge in ("x0", "y0", "x1", "y1"):
        columns[edge] = pa.array([getattr(item.box_l0, edge) for item in items], pa.float64())
    columns |= {name: of_decision(name, pa.string()) for name in ("reviewer", "decision")}
    columns["decided_label"] = of_decision("label", pa.string())
    columns["note"] = of_decision("note", pa.string())
    microseconds = [None if each is None else round(each.at * 1e6) for each in made]
    columns["decided_at"] = pa.array(microseconds, pa.timestamp("us", "UTC"))
    again = [None if each is None else each.region != item.id for item, each in rows]
    columns["reattached"] = pa.array(again, pa.bool_())
    return pa.table(columns)
