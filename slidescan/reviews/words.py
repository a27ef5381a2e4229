"""What people may write into a log of decisions: names on one line, and notes that can be read again."""

from __future__ import annotations

import unicodedata

from slidescan.errors import ConfigError

__all__ = ["MOST_TEXT", "check_name", "check_note", "person"]

MOST_TEXT = 10_000  # characters of a note: some pages, and a line that is still written in one piece
_JOINERS = "\u200c\u200d"  # that Persian and the scripts of India are written with


def check_name(name: str, value: object, expected: str) -> None:
    """Refuse what is no text on one line; any space will do, such as the wide one of Japanese."""
    if not isinstance(value, str) or not person(value) or len(value) > MOST_TEXT or not all(map(_is_plain, value)):
        raise ConfigError(f"{name}: expected {expected}, got {value!r}")


def person(name: str) -> str:
    """Return a name as it is compared: composed, for macOS gives an é as two characters, and without what is unseen.

    Examples
    --------
    >>> person("Rene\u0301 ") == "Ren\u00e9"
    True
    """
    return unicodedata.normalize("NFC", name).strip().strip(_JOINERS).strip()


def _is_plain(letter: str) -> bool:
    return letter.isprintable() or letter in _JOINERS or unicodedata.category(letter) == "Zs"


def check_note(note: object) -> None:
    """Refuse what is no text, or holds half of a surrogate pair, which no file does."""
    if not isinstance(note, str) or any("\ud800" <= character <= "\udfff" for character in note):
        raise ConfigError(f"note: expected text, got {note!r}; leave it out where there is none")
    if len(note) > MOST_TEXT:
        raise ConfigError(f"note: expected at most {MOST_TEXT:,} characters, got {len(note):,}; shorten it")
