"""What QuPath 0.5 to 0.8 makes of one GeoJSON object, rule by rule.

QuPath's reader is part strict and part silent: some slips end the import of the whole file, others turn a million
detections into a million annotations. Every rule is one entry of `RULES`: its severity ("error": the file is refused or
read as something else; "warning": it loads, but not as meant) and what happens and how to fix it. `check_feature` looks
at one parsed object and yields the rules it breaks. Messages never repeat the file's text, which may name a patient.
Invariant: pure; no value, however odd, raises.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any, Final, Literal

from slidescan.export.outlines import Outline, check_geometry, is_number

__all__ = ["RULES", "Severity", "check_feature", "class_of", "kind_of", "objects_in"]

Severity = Literal["error", "warning"]

RULES: Final[dict[str, tuple[Severity, str]]] = {
    # The file
    "suffix": ("error", "QuPath opens only .json, .geojson, these with .gz, and .zip; rename or convert the file"),
    "packing": ("error", "QuPath cannot unpack it; export it again, as .geojson.gz"),
    "zip": ("warning", "QuPath hides every error inside a zip behind 'no objects found'; use .geojson.gz"),
    "encoding": ("error", "QuPath reads UTF-8; convert the file to UTF-8"),
    "byte-order-mark": ("warning", "QuPath skips a byte-order mark, other readers refuse it; save without one"),
    "empty": ("error", "QuPath finds no JSON in it; export it again"),
    "json": ("error", "QuPath stops reading here and imports nothing; export it again"),
    "bare-nan": ("warning", "NaN and Infinity are not JSON and most readers refuse the file; leave the number out"),
    "repeated-key": ("warning", "of keys that occur twice QuPath keeps the last; write each key once"),
    "top-level": ("error", "QuPath expects a FeatureCollection, a Feature, an array of these or a geometry"),
    # The object
    "feature": ("error", 'QuPath expects an object with "type": "Feature" here and cannot read anything else'),
    "id": ("warning", "QuPath ignores an id that is not a UUID and draws a new one; write a UUID or none"),
    "id-form": ("error", "an id that is null, an array or an object ends the import; write a UUID or none"),
    "repeated-id": ("warning", "two objects have one id and QuPath asks which to keep; give each its own"),
    "properties": ("error", "properties must be an object: null or anything else ends the import; write {}"),
    "object-type-missing": ("warning", "without objectType it becomes an annotation; write it into properties"),
    "object-type-place": ("warning", "QuPath reads objectType only inside properties; move it there"),
    "object-type-unknown": ("warning", "unknown objectType (case matters): it becomes an annotation; write detection"),
    "object-type-text": ("error", "objectType must be text: null and structures end the import"),
    "tma-core": ("warning", "QuPath drops TMA cores of an imported file; import the grid separately"),
    "name": ("error", "name must be text: null and others end the import; leave it out"),
    "locked": ("error", "isLocked must be true or false: null and structures end the import"),
    "locked-text": ("warning", "QuPath takes any isLocked but true and false for false; write true or false"),
    "stray-number": ("warning", "QuPath ignores numbers in properties outside measurements; move them there"),
    # Its class
    "class-form": ("error", "classification must be text, null, or an object with name (or names) and color"),
    "class-color": ("error", "a classification without color ends the import; add color as [red, green, blue]"),
    "class-old": ("warning", "colorRGB is the form before QuPath 0.4; write color as [red, green, blue]"),
    "class-json": ("warning", "classification is JSON packed into text and becomes the class's name; unpack it"),
    "class-colon": ("warning", "a colon in a class name splits it into derived classes; replace it"),
    "class-newline": ("error", "QuPath refuses a class name with a line end; replace it"),
    "color-form": ("error", "a colour must be an array of 3 or 4 numbers, not text; write [red, green, blue]"),
    "color-range": ("warning", "colour values are whole numbers from 0 to 255; others come out as another colour"),
    # Its numbers
    "measurements": ("error", "measurements must be an object of numbers"),
    "measurements-list": ("warning", "a list of measurements is the form before QuPath 0.4; write an object"),
    "measurement-text": ("error", "text that is not a number ends the import; write a number or leave it out"),
    "measurement-null": ("warning", "QuPath skips a measurement that is null, true or false; write a number"),
    "measurement-nested": ("error", "a measurement must be a number, not an array or object"),
    "metadata": ("warning", "metadata must be an object of text and numbers; QuPath drops the rest"),
    "children": ("error", "childObjects must be an array of features, not too deeply nested"),
    # Its shape
    "geometry-missing": ("error", "an object needs a geometry; leave out what has none"),
    "geometry-collection": ("error", "QuPath cannot read a GeometryCollection; write a MultiPolygon"),
    "geometry-type": ("error", "QuPath reads Point, LineString, Polygon and their Multi forms only"),
    "geometry-coordinates": (
        "error",
        "coordinates must be nested arrays of numbers below 1e9, as deep as the type says",
    ),
    "line-short": ("error", "a line needs at least 2 points; one such ends the import of the whole file"),
    "ring-short": ("error", "a ring needs at least 4 points; one such outline ends the import of the whole file"),
    "ring-open": ("error", "a ring must end where it starts; one open ring ends the import of the whole file"),
    "polygon-invalid": (
        "error",
        "the outline crosses or touches itself: since 0.6 one such ends the whole import; use shapely.make_valid",
    ),
    "polygon-collapses": ("warning", "nothing is left after QuPath rounds to 0.01 px; leave it out"),
}

_KINDS = ("annotation", "detection", "cell", "tile", "tmaCore", "root")
# What QuPath 0.2 and 0.3 wrote for an id, and later ones still read, in either place.
_OLD_KINDS = {
    "PathAnnotationObject": "annotation",
    "PathDetectionObject": "detection",
    "PathCellObject": "cell",
    "PathTileObject": "tile",
    "TMACoreObject": "tmaCore",
    "PathRootObject": "root",
}
_READ_KEYS = frozenset(
    {"objectType", "object_type", "type", "name", "color", "colorRGB", "classification", "isLocked", "measurements"}
    | {"metadata", "childObjects", "children"}
)
# Decimal forms of java.lang.Double.parseDouble, and QuPath's own two words.
_JAVA_NUMBER = re.compile(r"\s*([+-]?(NaN|Infinity|(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?[fFdD]?)|-?inf)\s*", re.ASCII)
_UUID = re.compile(r"[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}")
_LINE_END = re.compile(r"[\n\r]")
_DEEPEST = 50  # childObjects inside childObjects: a hierarchy has 3 or 4 levels, Python's stack about 400


def kind_of(feature: dict[str, Any]) -> str:
    """Return the object type QuPath gives the feature; an annotation wherever it cannot tell."""
    found = _declared_kind(feature.get("properties")) or feature.get("id")
    found = _OLD_KINDS.get(found, found) if isinstance(found, str) else ""
    return found if found in _KINDS else "annotation"


def class_of(feature: dict[str, Any]) -> str:
    """Return the feature's class name as QuPath shows it; empty for none."""
    properties = feature.get("properties")
    found = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(found, dict):
        names = found.get("names", found.get("name"))
        found = ": ".join(n for n in names if isinstance(n, str)) if isinstance(names, list) else names
    return found if isinstance(found, str) else ""


def check_feature(feature: Any, *, depth: int = 0, outlines: list[Outline] | None = None) -> Iterator[str]:
    """Yield the rules that an object and the objects inside it break; `depth` counts the objects it lies in.

    For `outlines` see `slidescan.export.outlines.check_geometry`.

    Examples
    --------
    >>> list(check_feature({"type": "Feature", "geometry": {"type": "Point", "coordinates": [1, 2]}, "properties": {}}))
    ['object-type-missing']
    """
    if not isinstance(feature, dict) or feature.get("type") != "Feature":
        yield "feature"
        return
    id_ = feature.get("id")
    if "id" in feature and (id_ is None or isinstance(id_, dict | list)):
        yield "id-form"
    elif "id" in feature and not (isinstance(id_, str) and _UUID.fullmatch(id_)):
        yield "id"
    properties = feature.get("properties", {})
    kind = kind_of(feature)
    if not isinstance(properties, dict):
        yield "properties"
    else:
        if "objectType" in feature or "object_type" in feature:
            yield "object-type-place"
        yield from _check_properties(properties, depth, outlines)
    if kind != "root" or feature.get("geometry") is not None:
        yield from check_geometry(feature.get("geometry"), outlines)
    if kind == "cell" and feature.get("nucleusGeometry") is not None:
        yield from check_geometry(feature["nucleusGeometry"], outlines)


def _declared_kind(properties: Any) -> Any:
    if isinstance(properties, dict):
        for key in ("objectType", "object_type", "type"):
            if key in properties:
                return properties[key]
    return ""


def _check_properties(properties: dict[str, Any], depth: int, outlines: list[Outline] | None) -> Iterator[str]:
    kind = _declared_kind(properties)
    if kind is None or isinstance(kind, dict | list):
        yield "object-type-text"
    elif kind == "":
        yield "object-type-missing"
    elif kind == "tmaCore":
        yield "tma-core"
    elif kind not in _KINDS:
        yield "object-type-unknown"
    if not isinstance(properties.get("name", ""), str):
        yield "name"
    locked = properties.get("isLocked", False)
    if locked is None or isinstance(locked, dict | list):
        yield "locked"
    elif not isinstance(locked, bool) and locked not in ("true", "false"):
        yield "locked-text"
    if any(
        isinstance(v, int | float) and not isinstance(v, bool) for k, v in properties.items() if k not in _READ_KEYS
    ):
        yield "stray-number"
    color = properties.get("color")
    if color is not None and (isinstance(color, bool) or not isinstance(color, int)):  # packed into one number
        yield from _check_color(color)
    yield from _check_class(properties.get("classification"))
    yield from _check_measurements(properties.get("measurements", {}))
    metadata = properties.get("metadata", {})
    if not isinstance(metadata, dict) or any(v is None or isinstance(v, dict | list) for v in metadata.values()):
        yield "metadata"
    children = _children(properties)
    if not isinstance(children, list) or depth > _DEEPEST:
        yield "children"
    else:
        for child in children:
            yield from check_feature(child, depth=depth + 1, outlines=outlines)


def _children(properties: dict[str, Any]) -> Any:
    """Return what QuPath takes for the objects inside an object; null is none."""
    found = properties["childObjects"] if "childObjects" in properties else properties.get("children")
    return [] if found is None else found


def objects_in(feature: Any, depth: int = 0) -> Iterator[dict[str, Any]]:
    """Yield an object and, after it, all objects inside it."""
    if not isinstance(feature, dict) or depth > _DEEPEST:
        return
    yield feature
    properties = feature.get("properties")
    children = _children(properties) if isinstance(properties, dict) else []
    for child in children if isinstance(children, list) else []:
        yield from objects_in(child, depth + 1)


def _check_class(found: Any) -> Iterator[str]:
    if found is None or found == {}:
        return
    if isinstance(found, str):
        if found.lstrip().startswith("{"):
            yield "class-json"
        else:
            yield from _check_class_name(found)
        return
    names = (found.get("names") or [found.get("name")]) if isinstance(found, dict) else [None]
    if not isinstance(names, list) or not all(isinstance(n, str) for n in names):
        yield "class-form"
        return
    for name in names:
        yield from _check_class_name(name)
    if "colorRGB" in found or "parentClass" in found:
        yield "class-old"
    elif "color" not in found:
        yield "class-color"
    else:
        yield from _check_color(found["color"])


def _check_class_name(name: str) -> Iterator[str]:
    if ":" in name:
        yield "class-colon"
    if _LINE_END.search(name):
        yield "class-newline"


def _check_color(color: Any) -> Iterator[str]:
    if not isinstance(color, list) or len(color) not in (3, 4) or not all(is_number(c) for c in color):
        yield "color-form"
    elif not all(isinstance(c, int) and 0 <= c <= 255 for c in color):
        yield "color-range"


def _check_measurements(found: Any) -> Iterator[str]:
    if isinstance(found, list):
        yield "measurements-list"
        return
    if not isinstance(found, dict):
        yield "measurements"
        return
    for value in found.values():
        if is_number(value):
            continue
        if isinstance(value, str):
            if not _JAVA_NUMBER.fullmatch(value):
                yield "measurement-text"
        elif isinstance(value, dict | list):
            yield "measurement-nested"
        else:
            yield "measurement-null"
