"""Reads a JSON document value by value, from plain, gzip or zip files, in memory bounded by its largest value.

The standard library parses whole documents only; a GeoJSON of a million nuclei is hundreds of megabytes and several
times that as Python objects. Here a window slides over the decoded text and the standard decoder is pointed at one
array element or one member after the other. Invariants: `line` is the 1-based line of what comes next; whatever is
wrong with the file arrives as one `Unreadable` with a rule, a line and a sentence, never with any of the file's text in
it.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

__all__ = ["JsonStream", "Unreadable", "open_text"]

_CHUNK = 1 << 20  # characters read at once: about 3,000 boxes
# A value that is cut off makes the decoder stop at the end of what it was given, at most one literal ("-Infinity") or
# escape ("\uXXXX") before it; an error further from the end is the document's own.
_NEAR_END = 16
_LIMIT = 1 << 28  # characters of one value (256 Mi): beyond it the file is a decompression bomb, or nothing can open it
_SPACE = " \t\n\r"
_GZIP_MAGIC = b"\x1f\x8b"
_ZIP_MAGIC = b"PK\x03\x04"


class Unreadable(ValueError):
    """The text cannot be parsed further; `rule` and `line` say why and where."""

    def __init__(self, rule: str, line: int, detail: str) -> None:
        super().__init__(detail)
        self.rule, self.line, self.detail = rule, line, detail


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[bytes]]:
    """Open a JSON file's bytes, unpacked as its suffix says.

    Raises
    ------
    Unreadable
        If the content is packed otherwise than the suffix says, or a zip holds no one readable JSON.
    OSError
        If the file system refuses.
    """
    name = path.name.lower()
    with path.open("rb") as raw:
        magic = raw.read(4)
        raw.seek(0)
        packing = "gz" if magic.startswith(_GZIP_MAGIC) else "zip" if magic == _ZIP_MAGIC else ""
        claimed = "gz" if name.endswith(".gz") else "zip" if name.endswith(".zip") else ""
        if magic and packing != claimed:
            found = {"gz": "gzip", "zip": "zip", "": "not packed"}[packing]
            raise Unreadable("packing", 1, f"the name says otherwise but the content is {found}")
        if packing == "gz":
            with gzip.GzipFile(fileobj=raw, mode="rb") as stream:
                yield stream  # type: ignore[misc]
        elif packing == "zip":
            with _only_member(raw) as stream:
                yield stream
        else:
            yield raw


def _only_member(raw: IO[bytes]) -> IO[bytes]:
    try:
        archive = zipfile.ZipFile(raw)
        named = [m for m in archive.infolist() if m.filename.lower().endswith((".json", ".geojson"))]
        members = [m for m in named if not m.filename.rpartition("/")[2].startswith("._")]  # macOS adds such
        if len(members) == 1:
            return archive.open(members[0])
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as exc:
        raise Unreadable("packing", 1, "the zip is damaged or packed in an unknown way") from exc
    except RuntimeError as exc:  # what zipfile raises for encrypted members
        raise Unreadable("packing", 1, "the zip is encrypted") from exc
    raise Unreadable("packing", 1, f"the zip holds {len(members)} JSON files instead of one")


class JsonStream:
    """Pulls values, array elements and object members out of JSON bytes.

    Parameters
    ----------
    stream : binary file
        UTF-8 text, with or without a byte-order mark.

    Examples
    --------
    >>> text = JsonStream(io.BytesIO(b'{"type": "x", "features": [1, 2]}'))
    >>> [(key, text.value()) for key in text.members()]
    [('type', 'x'), ('features', [1, 2])]
    """

    def __init__(self, stream: IO[bytes]) -> None:
        self._text = io.TextIOWrapper(stream, encoding="utf-8", errors="strict", newline="")
        self._window = ""
        self._at = 0
        self._is_last = False
        self._lines_before = 0  # line ends in text already dropped from the window
        self._counted_to = 0  # and in the window up to here
        self.repeated_keys: list[str] = []
        """Keys that occurred twice in one object of the value last read."""
        self.bare_numbers = 0
        """NaN and Infinity literals, which JSON does not know, in the value last read."""
        self._decoder = json.JSONDecoder(object_pairs_hook=self._object, parse_constant=self._constant)
        if self.peek() == "\ufeff":
            self._at += 1
            self.has_mark = True
        else:
            self.has_mark = False

    @property
    def line(self) -> int:
        """1-based line of the next character."""
        return self._line_at(self._at)

    def peek(self) -> str:
        """Return the next character that is not white space, without taking it; empty at the end."""
        while True:
            window, at = self._window, self._at
            while at < len(window) and window[at] in _SPACE:
                at += 1
            self._at = at
            if at < len(window):
                return window[at]
            if not self._grow():
                return ""

    def value(self) -> Any:
        """Return the next value, whole."""
        self.repeated_keys.clear()
        self.bare_numbers = 0
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._window, self._at)
            except json.JSONDecodeError as exc:
                is_cut = exc.pos >= len(self._window) - _NEAR_END or exc.msg.startswith("Unterminated string")
                if not (is_cut and self._grow()):
                    raise self._syntax(exc.msg, exc.pos) from exc
            except RecursionError as exc:
                raise Unreadable("json", self.line, "values are nested too deeply") from exc
            except ValueError as exc:  # a number of thousands of digits
                raise Unreadable("json", self.line, "a number has too many digits") from exc
            else:
                # A value that ends with the window may go on behind it (12 of 123).
                if end < len(self._window) or not self._grow():
                    self._at = end
                    return value
            self.repeated_keys.clear()
            self.bare_numbers = 0

    def elements(self) -> Iterator[int]:
        """Walk the array that comes next: yields the line of each element, which the caller must take."""
        yield from self._walk("[", "]")

    def members(self) -> Iterator[str]:
        """Walk the object that comes next: yields each key, whose value the caller must take."""
        for _ in self._walk("{", "}"):
            if self.peek() != '"':
                raise self._syntax("Expecting a key in double quotes", self._at)
            key = self.value()
            self._take(":")
            self.peek()
            yield key

    def _walk(self, opening: str, closing: str) -> Iterator[int]:
        self._take(opening)
        if self.peek() == closing:
            self._at += 1
            return
        while True:
            if self.peek() in ("", closing):
                raise self._syntax("Expecting value", self._at)
            yield self.line
            if self.peek() != ",":
                self._take(closing)
                return
            self._at += 1

    def _take(self, character: str) -> None:
        if self.peek() != character:
            raise self._syntax(f"Expecting '{character}'", self._at)
        self._at += 1

    def _grow(self) -> bool:
        """Drop what was taken and read as much again as is left, so that a long value costs twice its length."""
        if self._is_last:
            return False
        self._lines_before = self.line - 1
        rest = self._window[self._at :]
        if len(rest) > _LIMIT:
            raise Unreadable("json", self.line, f"one value has more than {_LIMIT:,} characters")
        try:
            more = self._text.read(max(_CHUNK, len(rest)))
        except UnicodeDecodeError as exc:
            raise Unreadable("encoding", self.line, "the text is not UTF-8") from exc
        except (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile) as exc:
            raise Unreadable("packing", self.line, "the compressed data is damaged or cut off") from exc
        self._window, self._at, self._counted_to = rest + more, 0, 0
        self._is_last = not more
        return bool(more)

    def _line_at(self, at: int) -> int:
        # Counting goes on from where it stopped; it never goes back behind what was taken.
        if at < self._counted_to:
            return 1 + self._lines_before - self._window.count("\n", at, self._counted_to)
        self._lines_before += self._window.count("\n", self._counted_to, at)
        self._counted_to = at
        return 1 + self._lines_before

    def _syntax(self, message: str, at: int) -> Unreadable:
        if at >= len(self._window) and self._is_last:
            return Unreadable("json", self._line_at(at), "the text ends in the middle")
        return Unreadable("json", self._line_at(at), message[0].lower() + message[1:])

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            seen: set[str] = set()
            self.repeated_keys += [k for k, _ in pairs if k in seen or seen.add(k)]  # type: ignore[func-returns-value]
        return members

    def _constant(self, literal: str) -> float:
        self.bare_numbers += 1
        return float(literal)
