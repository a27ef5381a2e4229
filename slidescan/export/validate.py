"""Tells, before QuPath does, whether a GeoJSON file imports as it was meant.

Walks the file object by object (memory: one object and 16 bytes an id) and applies `slidescan.export.rules`, so a file
of hundreds of megabytes is checked without loading it. Invariants: content never raises, it becomes a `Problem`; only a
file that cannot be opened at all is a `ResultError`. Of each rule the first hundred breaches are listed and the rest
counted, because a generator's slip is repeated in every one of a million objects.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from slidescan.errors import ResultError
from slidescan.export.jsonstream import JsonStream, Unreadable, open_text
from slidescan.export.outlines import Outline, check_geometry, check_outlines, is_geometry
from slidescan.export.rules import RULES, Severity, check_feature, class_of, kind_of, objects_in

__all__ = ["GeojsonReport", "Problem", "inspect_geojson", "validate_geojson"]

_SUFFIXES = (".json", ".geojson", ".json.gz", ".geojson.gz", ".zip")
_LISTED_PER_RULE = 100  # enough to see the pattern; a million lines help nobody
_AT_ONCE, _POINTS_AT_ONCE = 1000, 100_000  # objects whose outlines are checked together: a few MB


@dataclass(frozen=True, slots=True, order=True)
class Problem:
    """One breach of QuPath's reading rules.

    Parameters
    ----------
    line : int
        1-based line where the object (or, for broken JSON, the fault) begins.
    feature : int or None
        0-based place of the object in the file; None for the file itself.
    severity : {"error", "warning"}
        "error": QuPath refuses the file or reads something else; "warning": it loads, but not as meant.
    rule : str
        The rule's name in `slidescan.export.rules.RULES`.
    message : str
        What QuPath does with it and how to fix it.
    """

    line: int
    feature: int | None
    severity: Severity
    rule: str
    message: str

    def __str__(self) -> str:
        where = "" if self.feature is None else f", feature {self.feature}"
        return f"line {self.line}{where}: {self.severity}: {self.message} [{self.rule}]"


@dataclass(slots=True)
class GeojsonReport:
    """What is in a GeoJSON file and what is wrong with it.

    Parameters
    ----------
    problems : list of Problem
        In the order of the file.
    counts : Counter of (str, str)
        Objects by object type, as QuPath takes it, and class name; the name is empty where there is none.
    """

    problems: list[Problem] = field(default_factory=list)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def is_importable(self) -> bool:
        """Whether QuPath takes the file as it stands; warnings do not count."""
        return all(p.severity != "error" for p in self.problems)

    @property
    def summary(self) -> dict[str, dict[str, int]]:
        """Objects by object type and, within it, class name, most frequent first."""
        table: dict[str, dict[str, int]] = {}
        for (kind, name), n in sorted(self.counts.items(), key=lambda item: (-item[1], item[0])):
            table.setdefault(kind, {})[name or "unclassified"] = n
        return table


def validate_geojson(path: str | os.PathLike[str]) -> list[Problem]:
    """List what QuPath 0.5 to 0.8 would refuse or misread in a GeoJSON file.

    Parameters
    ----------
    path : path-like
        Plain, gzip or zip, as the suffix says.

    Returns
    -------
    list of Problem
        In the order of the file; empty if it imports as meant.

    Raises
    ------
    ResultError
        If the file cannot be opened or read at all.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder, "case.geojson")
    ...     _ = path.write_text('{"type": "Point", "coordinates": [1, 2')
    ...     print(*validate_geojson(path))
    line 1: error: the text ends in the middle; QuPath stops reading here and imports nothing; export it again [json]
    """
    return inspect_geojson(path).problems


def inspect_geojson(path: str | os.PathLike[str]) -> GeojsonReport:
    """Check a GeoJSON file like `validate_geojson` and count what is in it.

    Parameters
    ----------
    path : path-like
        Plain, gzip or zip, as the suffix says.

    Returns
    -------
    GeojsonReport

    Raises
    ------
    ResultError
        If the file cannot be opened or read at all.
    """
    source = Path(path)
    walk = _Walk()
    if not source.name.lower().endswith(_SUFFIXES):
        walk.report_rule("suffix", 1)
    if source.name.lower().endswith(".zip"):
        walk.report_rule("zip", 1)
    try:
        with open_text(source) as stream:
            walk.document(JsonStream(stream))
    except Unreadable as exc:
        walk.report_rule(exc.rule, exc.line, exc.detail)
    except OSError as exc:
        reason = exc.strerror or "a read error"
        raise ResultError(f"{source.name}: expected a readable GeoJSON file, got {reason!r}; check the path") from exc
    return walk.finish()


class _Walk:
    """Goes once through a document and collects the report."""

    def __init__(self) -> None:
        self._report = GeojsonReport()
        self._breaches: Counter[str] = Counter()
        self._ids: set[bytes] = set()
        self._n_features = 0
        # Line, number, rules broken and outlines yet to check of the last objects; then each is reported, in order.
        self._last: list[tuple[int, int, list[str], list[Outline]]] = []
        self._n_points = 0

    def document(self, text: JsonStream) -> None:
        first = text.peek()
        if text.has_mark:
            self.report_rule("byte-order-mark", 1)
        if not first:
            self.report_rule("empty", 1)
            return
        if first == "[":
            for line in text.elements():
                self._member_of_array(text.value(), line, text)
        elif first == "{":
            self._top_object(text)
        else:
            # Text that is no JSON at all gets the parser's word for it, other values the rule's.
            text.value()
            self.report_rule("top-level", 1)
        if text.peek():
            self.report_rule("json", text.line, "there is more after the end")

    def report_rule(self, rule: str, line: int, detail: str = "") -> None:
        self._report_last()
        self._report_of(None, rule, line, detail)

    def _report_spelling(self, text: JsonStream, line: int) -> None:
        for rule in _spelling(text):
            self.report_rule(rule, line)

    def _report_last(self) -> None:
        outlines = [outline for _, _, _, some in self._last for outline in some]
        found = iter(check_outlines(outlines))
        for line, feature, rules, some in self._last:
            broken = [rule for _ in some if (rule := next(found))]
            for rule in dict.fromkeys(rules + broken):
                self._report_of(feature, rule, line)
        self._last.clear()
        self._n_points = 0

    def _report_of(self, feature: int | None, rule: str, line: int, detail: str = "") -> None:
        self._breaches[rule] += 1
        if self._breaches[rule] <= _LISTED_PER_RULE:
            severity, text = RULES[rule]
            self._report.problems.append(
                Problem(line, feature, severity, rule, f"{detail}; {text}" if detail else text)
            )

    def finish(self) -> GeojsonReport:
        self._report_last()
        for rule, n in self._breaches.items():
            if n > _LISTED_PER_RULE:
                last = max(i for i, p in enumerate(self._report.problems) if p.rule == rule)
                shown = self._report.problems[last]
                more = f"{shown.message} (and {n - _LISTED_PER_RULE:,} more of these)"
                self._report.problems[last] = Problem(shown.line, shown.feature, shown.severity, rule, more)
        return self._report

    def _top_object(self, text: JsonStream) -> None:
        """Read an object whose kind may be known only at its end, taking features as they come."""
        start = text.line
        members: dict[str, Any] = {}
        for key in text.members():
            if key in members:
                self.report_rule("repeated-key", text.line)
            if key == "features" and text.peek() == "[":
                members[key] = []
                for line in text.elements():
                    self._feature(text.value(), line, _spelling(text))
            else:
                members[key] = text.value()
                self._report_spelling(text, start)
        kind = members.get("type")
        if kind == "FeatureCollection":
            if members.get("features") != []:
                self.report_rule("top-level", start, "features is not an array")
        elif kind == "Feature" and "features" not in members:
            self._feature(members, start, [])
        elif is_geometry(members):
            self._bare_geometry(members, start, [])
        else:
            self.report_rule("top-level", start)

    def _member_of_array(self, value: Any, line: int, text: JsonStream) -> None:
        if isinstance(value, dict) and value.get("type") == "FeatureCollection":
            self._report_spelling(text, line)
            features = value.get("features")
            if not isinstance(features, list):
                self.report_rule("top-level", line, "features is not an array")
                return
            for feature in features:
                self._feature(feature, line, [])
        elif is_geometry(value):
            self._bare_geometry(value, line, _spelling(text))
        else:
            self._feature(value, line, _spelling(text))

    def _bare_geometry(self, geometry: dict[str, Any], line: int, spelling: list[str]) -> None:
        self._report.counts["annotation", ""] += 1
        outlines: list[Outline] = []
        self._look_at(line, [*spelling, *check_geometry(geometry, outlines)], outlines)

    def _feature(self, value: Any, line: int, spelling: list[str]) -> None:
        outlines: list[Outline] = []
        rules = [*spelling, *check_feature(value, outlines=outlines)]
        if isinstance(value, dict):
            for each in objects_in(value):
                self._report.counts[kind_of(each), class_of(each)] += 1
            if self._is_repeated(value.get("id")):
                rules.append("repeated-id")
        self._look_at(line, rules, outlines)

    def _look_at(self, line: int, rules: list[str], outlines: list[Outline]) -> None:
        self._last.append((line, self._n_features, rules, outlines))
        self._n_features += 1
        self._n_points += sum(len(ring) for polygons in outlines for polygon in polygons for ring in polygon)
        if len(self._last) >= _AT_ONCE or self._n_points >= _POINTS_AT_ONCE:
            self._report_last()

    def _is_repeated(self, id_: Any) -> bool:
        try:
            octets = bytes.fromhex(id_.replace("-", "")) if isinstance(id_, str) else b""
        except ValueError:
            return False
        if len(octets) != 16:
            return False
        is_repeated = octets in self._ids
        self._ids.add(octets)
        return is_repeated


def _spelling(text: JsonStream) -> list[str]:
    """Return what rules the spelling of the value that was read last breaks."""
    # QuPath itself writes "metadata" twice, with the same content.
    rules = ["repeated-key"] if any(key != "metadata" for key in text.repeated_keys) else []
    return [*rules, "bare-nan"] if text.bare_numbers else rules
