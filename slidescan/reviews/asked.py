"""What a front end asks for, checked before anything is done: values have types and ranges, and there are no others."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from slidescan.errors import ConfigError

__all__ = ["Asked", "NotThereError"]


class NotThereError(ConfigError):
    """What was asked for is not there, or not any more."""


class Asked:
    """The named values of a request; every one must be taken before `nothing_else`.

    Examples
    --------
    >>> asked = Asked({"level": 3, "x": -1})
    >>> asked.whole("level", 0, 9)
    3
    >>> asked.whole("x", 0, 7)
    Traceback (most recent call last):
    slidescan.errors.ConfigError: x: expected a whole number from 0 to 7, got -1
    """

    def __init__(self, values: Any) -> None:
        if not isinstance(values, Mapping):
            raise ConfigError(f"request: expected named values, got {type(values).__name__}")
        self._values: Mapping[str, Any] = values
        self._taken: set[str] = set()

    def _take(self, name: str) -> Any:
        self._taken.add(name)
        return self._values.get(name)

    def whole(self, name: str, low: int, high: int, default: int | None = None) -> int:
        """Return a whole number of a range, both ends included."""
        value = self._take(name)
        if value is None and default is not None:
            return default
        # A bool is an int to Python, and True is no coordinate.
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(f"{name}: expected a whole number from {low} to {high}, got {_short(value)}")
        return value

    def number(self, name: str, low: float, high: float) -> float:
        """Return a finite number of a range, both ends included."""
        value = self._take(name)
        good = isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high
        if not good or not math.isfinite(value):
            raise ConfigError(f"{name}: expected a number from {low:g} to {high:g}, got {_short(value)}")
        return float(value)

    def number_or_none(self, name: str, low: float, high: float) -> float | None:
        """Return such a number, None where there is none."""
        return None if self._take(name) is None else self.number(name, low, high)

    def text(self, name: str, most: int, default: str | None = None) -> str:
        """Return a text of at most so many characters."""
        value = self._take(name)
        if value is None and default is not None:
            return default
        if not isinstance(value, str) or len(value) > most:
            raise ConfigError(f"{name}: expected text of at most {most} characters, got {_short(value)}")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise ConfigError(f"{name}: expected text, got half a character")
        return value

    def text_or_none(self, name: str, most: int) -> str | None:
        """Return such a text, None where there is none."""
        return None if self._take(name) is None else self.text(name, most)

    def one_of(self, name: str, choices: Collection[str]) -> str:
        """Return one of these words."""
        value = self._take(name)
        if not isinstance(value, str) or value not in choices:
            raise ConfigError(f"{name}: expected one of {', '.join(choices)}, got {_short(value)}")
        return value

    def one_of_or_none(self, name: str, choices: Collection[str]) -> str | None:
        """Return one of these words, None where there is none."""
        return None if self._take(name) is None else self.one_of(name, choices)

    def nothing_else(self) -> None:
        """Refuse what was not asked for by name."""
        if unknown := sorted(map(str, set(self._values) - self._taken)):
            raise ConfigError(f"request: expected {', '.join(sorted(self._taken)) or 'nothing'}, got {_short(unknown)}")


def _short(value: object) -> str:
    """Say a value in at most a few words; a list of a million numbers is not written out."""
    if isinstance(value, int) and abs(value) >= 10**20:
        return "a number far too large"
    text = repr(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return text if len(text) <= 60 else f"{text[:60]}…"
