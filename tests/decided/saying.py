"""Deciding on a result, and reading back what that teaches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import slidescan as ss
from slidescan.slides import Slide
from slidescan.train.annotated import Annotated
from slidescan.train.decided import Decided, load_decided
from slidescan.train.settings import TrainSettings

SETTINGS = TrainSettings(classes=["disc"])
NOTHING = np.empty((0, 4))


def decide(run: Path, *verdicts: str, who: str = "ann", of: str = "regions", label: str | None = None) -> list[Any]:
    """Decide on the first items, best first; return all items."""
    looked = ss.review(ss.load_result(run, verify=False), reviewer=who, of=of)
    items = looked.items()
    for item, verdict in zip(items, verdicts, strict=False):
        if verdict:
            looked.decide(item.id, verdict, label=label)
    return items


def load(run: Path, slide: Slide, **changed: Any) -> tuple[Annotated, Decided]:
    """Return what was decided on the one slide, and all of it."""
    decided = load_decided(run, slide, SETTINGS.model_copy(update=changed))
    (one,) = decided.annotated
    return one, decided


def centres(xyxy: Any) -> set[tuple[int, int]]:
    """Where boxes are, to compare sets of them."""
    boxes = np.asarray(xyxy, np.float64).reshape(-1, 4)
    return {(round(x0 + x1), round(y0 + y1)) for x0, y0, x1, y1 in boxes.tolist()}


def boxes_of(items: Sequence[Any]) -> set[tuple[int, int]]:
    return {(round(i.box_l0.x0 + i.box_l0.x1), round(i.box_l0.y0 + i.box_l0.y1)) for i in items}


def old(run: Path, *fields: str) -> None:
    """Take fields from the log, as if it was written before they were kept."""
    path = run / "decisions.jsonl"
    told = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({k: v for k, v in line.items() if k not in fields}) + "\n" for line in told))
