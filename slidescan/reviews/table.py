"""The items of a review with what was decided, as a table."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from slidescan.reviews.decisions import Decision
from slidescan.reviews.items import ReviewItem

__all__ = ["table_of"]


def table_of(rows: Sequence[tuple[ReviewItem, Decision | None]], *, blinded: bool) -> pd.DataFrame:
    """Return a row an item and decision; without a decision its columns are missing. Boxes are in level-0 px."""
    items, made = [item for item, _ in rows], [decision for _, decision in rows]

    def of_item(name: str, dtype: str) -> pd.Series:
        return pd.Series([getattr(item, name) for item in items], dtype=dtype)

    def of_decision(name: str) -> pd.Series:
        return pd.Series([None if each is None else getattr(each, name) for each in made], dtype="string")

    columns = {name: of_item(name, "string") for name in ("id", "what", "slide_id", "group", "label")}
    if not blinded:
        columns |= {"score": of_item("score", "float64"), "evidence": of_item("evidence", "float64")}
        columns["rank"] = of_item("rank", "int64")
    columns["n"] = of_item("n", "int64")
    for edge in ("x0", "y0", "x1", "y1"):
        columns[edge] = pd.Series([getattr(item.box_l0, edge) for item in items], dtype="float64")
    columns |= {"reviewer": of_decision("reviewer"), "decision": of_decision("decision")}
    columns |= {"decided_label": of_decision("label"), "note": of_decision("note")}
    microseconds = pd.Series([None if each is None else round(each.at * 1e6) for each in made], dtype="Int64")
    columns["decided_at"] = pd.to_datetime(microseconds, unit="us", utc=True).astype("datetime64[us, UTC]")
    again = [None if each is None else each.region != item.id for item, each in rows]
    columns["reattached"] = pd.Series(again, dtype="boolean")
    return pd.DataFrame(columns)
