"""What people may write into a log of decisions: names on one line, and notes that can be read again."""

from __future__ import annotations

from slidescan.errors import ConfigError

__all__ = ["MOST_TEXT", "check_name", "check_note"]

MOST_TEXT = 10_000  # characters of a note: some pages, and a line that is still written in one piece


def check_name(name: str, value: object, expected: str) -> None:
    """Refuse what is no text on one line."""
    if not isinstance(value, str) or not value.strip() or not value.isprintable() or len(value) > MOST_TEXT:
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def check_note(note: object) -> None:
    """Refuse what is no text, or holds half of a surrogate pair, which no file does."""
    if not isinstance(note, str) or any("\ud800" <= character <= "\udfff" for character in note):
        raise ConfigError(f"note: expected text, got {note!r}; leave it out where there is none")
    if len(note) > MOST_TEXT:
        raise ConfigError(f"note: expected at most {MOST_TEXT:,} characters, got {len(note):,}; shorten it")
