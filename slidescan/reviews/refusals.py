"""What a front end is told when a request fails: the same over every carrier, and never a path or a traceback."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from slidescan.errors import ConfigError, ResultError, SlideError, SlidescanError
from slidescan.reviews.asked import NotThereError
from slidescan.reviews.desk import Desk, Picture

__all__ = ["MOST_ASKED_BYTES", "Refusal", "answered"]

MOST_ASKED_BYTES = 256 * 1024  # of a request: a note of 10,000 characters, each written as two \\uXXXX, and room
_OURS = "failed; the terminal says why"


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there is no answer, in words for a person."""

    why: str
    status: int
    """As HTTP counts: 404 it is not there, 400 it was asked wrongly, 500 it failed."""


def answered(desk: Desk, kind: str, values: Any, say: Callable[[str], object]) -> dict[str, Any] | Picture | Refusal:
    """Return the desk's answer, or what may be told of why there is none.

    What is not for the page, since it may name a path, goes to `say` as one line.
    """
    try:
        return desk.answer(kind, values)
    except NotThereError as exc:
        return _refusal(str(exc), 404)
    except ConfigError as exc:
        return _refusal(str(exc), 400)
    except (SlideError, ResultError) as exc:
        say(_line(exc.__cause__ or exc))
        # The desk's own are of these very types; the text of others is for the terminal.
        return _refusal(str(exc) if type(exc) in (SlideError, ResultError) else _OURS, 500)
    except Exception as exc:  # noqa: BLE001  # a fault of ours must reach who waits for the answer, and is reported
        say(_line(exc))
        return _refusal(_OURS, 500)


def _refusal(why: str, status: int) -> Refusal:
    return Refusal(" ".join(why.split()), status)


def _line(error: BaseException) -> str:
    text = str(error) if isinstance(error, SlidescanError) else f"{type(error).__name__}: {error}"
    return re.sub(r"[^ -~µ]+", " ", f"slidescan: {text}")
