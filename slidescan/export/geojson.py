"""Streams objects into a GeoJSON file that every QuPath from 0.5 on imports.

Hides QuPath's reading rules: one invalid outline, a null, or a class without colour makes it refuse a whole file of a
million objects, so none can be written here, whatever comes in. Invariants: coordinates have at most 2 decimals (QuPath
rounds to 0.01 px and checks what is left) and outlines are valid *after* that rounding; what has no area left is
skipped and counted; numbers are finite; no key is null. The file appears complete or not at all, holds one object a
line, and its bytes depend on the objects only (no date, no file name in the gzip header).
Memory is that of one block of objects, never of the file.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import shapely
from numpy.typing import NDArray

from slidescan.commit import aside, disk_error, sweep
from slidescan.errors import ConfigError
from slidescan.export.features import Feature

__all__ = ["write_geojson"]

_SUFFIXES = (".geojson", ".json", ".geojson.gz", ".json.gz")
_STEPS_PER_PX = 100  # 0.01 px: what QuPath 0.6 reduces every outline to on import
_LIMIT_PX = 1e9  # 20 times the edge of the widest slide that a 32-bit viewer can address; beyond it the input is broken
_BLOCK = 4096  # objects formatted at once: a few MB
_GZIP_LEVEL = 5  # 1e6 boxes: a third faster than 6 for 2 % more bytes
_UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_FORBIDDEN_IN_CLASS = re.compile(r"[:\x00-\x1f\x7f\x85\u2028\u2029]")  # ":" derives a class, line ends are refused

_BYTES = frozenset(range(256))  # values of one colour channel

_Geometries = NDArray[np.object_]


def write_geojson(
    path: str | os.PathLike[str], features: Iterable[Feature], *, properties: Mapping[str, Any] | None = None
) -> int:
    """Write objects as one FeatureCollection, streaming, and return how many were written.

    Outlines are rounded to 0.01 px and repaired where that leaves them invalid; an object without area (or with
    coordinates that are not finite) is skipped. Both counts stand in the collection's member ``slidescan``, which
    QuPath ignores, with the package's version and `properties`. An existing file is replaced once the new one is
    complete.

    Parameters
    ----------
    path : path-like
        Ends in ``.geojson``, ``.json``, or one of these with ``.gz``.
    features : iterable of Feature
        Consumed once, in blocks; coordinates in px of the viewer's frame.
    properties : mapping, optional
        Provenance for the ``slidescan`` member; ``origin`` ("level0" or "qupath") and ``offset_l0`` say where the frame
        starts and default to the slide's own corner. Values must be JSON; None and numbers that are not finite are
        dropped.

    Returns
    -------
    int
        Objects in the file.

    Raises
    ------
    ConfigError
        If the suffix, a kind, colour or id, or `properties` is not writable.
    ResultError
        If the file system refuses.

    Examples
    --------
    >>> import tempfile
    >>> boxes = [Feature("detection", (0, 0, 10, 10), "mitotic figure"), Feature("detection", (5, 5, 5, 9), "empty")]
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_geojson(Path(folder) / "case.geojson.gz", boxes)
    1
    """
    target = Path(path)
    if not target.name.lower().endswith(_SUFFIXES):
        raise ConfigError(f"{target.name}: expected a name that ends in {', '.join(_SUFFIXES)}; rename the output")
    foreign = {"version": _package_version(), "origin": "level0", "offset_l0": [0, 0], **(properties or {})}
    _dump_clean(foreign)  # fails now and not after an hour of writing
    written = skipped = 0
    source = iter(features)
    with _replacing(target) as put:
        put('{"type":"FeatureCollection","features":[')
        while block := list(islice(source, _BLOCK)):
            texts = _feature_texts(block)
            skipped += len(block) - len(texts)
            if texts:
                put((",\n" if written else "\n") + ",\n".join(texts))
            written += len(texts)
        put('\n],"slidescan":' + _dump_clean({**foreign, "features": written, "skipped": skipped}) + "}\n")
    return written


class _Put:
    """Writes text to a file that gets its name only when complete."""

    def __init__(self, target: Path, part: Path) -> None:
        self.target, self.part = target, part
        # gzip writes its tail to `raw` and leaves it open, so that it can be flushed to disk before the rename.
        self.raw: IO[bytes] = part.open("wb")
        is_gzip = target.name.lower().endswith(".gz")
        # No name and no time in the header: the same objects must give the same bytes.
        self.sink: Any = (
            gzip.GzipFile(filename="", mode="wb", compresslevel=_GZIP_LEVEL, fileobj=self.raw, mtime=0)
            if is_gzip
            else self.raw
        )

    def __call__(self, text: str) -> None:
        try:
            self.sink.write(text.encode("ascii"))
        except OSError as exc:
            raise disk_error(self.target, exc) from exc

    def finish(self) -> None:
        if self.sink is not self.raw:
            self.sink.close()
        self.raw.flush()
        os.fsync(self.raw.fileno())
        self.raw.close()
        self.part.replace(self.target)


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[_Put]:
    """Yield a writer to a file beside `target` that takes its place on success and vanishes on failure."""
    sweep(target.parent)
    part = aside(target)
    try:
        put = _Put(target, part)
    except OSError as exc:
        raise disk_error(target, exc) from exc
    try:
        yield put
        try:
            put.finish()
        except OSError as exc:
            raise disk_error(target, exc) from exc
    finally:
        # After a failure gzip may still want to write its tail, to a full disk.
        with contextlib.suppress(OSError, ValueError):
            put.sink.close()
        with contextlib.suppress(OSError):
            put.raw.close()
        part.unlink(missing_ok=True)


def _package_version() -> str:
    try:
        return version("slidescan")
    except PackageNotFoundError:
        return "unknown"


def _dump_clean(members: Mapping[str, Any]) -> str:
    try:
        return json.dumps(_without_nulls(members), allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError, RecursionError) as exc:
        raise ConfigError(f"GeoJSON properties: expected values that JSON can hold, got {exc}; convert them") from exc


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _without_nulls(v) for k, v in value.items() if not _is_null(v)}
    if isinstance(value, list | tuple):
        return [_without_nulls(v) for v in value if not _is_null(v)]
    return value


def _is_null(value: Any) -> bool:
    return value is None or (isinstance(value, float) and not math.isfinite(value))


def _feature_texts(block: Sequence[Feature]) -> list[str]:
    texts: list[str] = []
    for feature, geometry in zip(block, _geometry_texts([f.geometry for f in block]), strict=True):
        if not geometry:
            continue
        id_ = feature.id.lower()
        if id_ and not _UUID.fullmatch(id_):
            raise ConfigError("Feature.id: expected a UUID of 36 characters, got something else; use detection_ids")
        parts = ['{"type":"Feature",', f'"id":"{id_}",' if id_ else "", f'"geometry":{geometry},"properties":']
        parts.append(_class_text(feature.kind, feature.class_name, feature.color))
        if feature.name:
            parts.append(f',"name":{json.dumps(feature.name)}')
        if feature.locked:
            parts.append(',"isLocked":true')
        numbers = [f"{_key_text(k)}:{_number_text(v)}" for k, v in feature.measurements.items() if math.isfinite(v)]
        if numbers:
            parts.append(f',"measurements":{{{",".join(numbers)}}}')
        parts.append("}}")
        texts.append("".join(parts))
    return texts


@lru_cache(maxsize=1024)
def _class_text(kind: str, class_name: str, color: tuple[int, ...]) -> str:
    if kind not in ("detection", "annotation", "tile"):
        raise ConfigError(f"Feature.kind: expected 'detection', 'annotation' or 'tile', got {kind!r}")
    if len(color) != 3 or not set(color) <= _BYTES:
        raise ConfigError(f"Feature.color: expected three whole numbers from 0 to 255, got {color!r}")
    name = _FORBIDDEN_IN_CLASS.sub("_", class_name).strip() or "unnamed"
    red, green, blue = color
    return f'{{"objectType":"{kind}","classification":{{"name":{json.dumps(name)},"color":[{red},{green},{blue}]}}'


@lru_cache(maxsize=1024)
def _key_text(name: str) -> str:
    return json.dumps(name)


def _number_text(value: float) -> str:
    """Write 4 decimals from 1 upwards and 4 significant digits below, so that a tiny score does not become 0."""
    text = f"{value:.4f}".rstrip("0").rstrip(".") if abs(value) >= 1 else f"{value:.4g}"
    return "0" if text == "-0" else text


def _geometry_texts(geometries: Sequence[Any]) -> list[str]:
    """Return the GeoJSON of each box or outline, empty for those without area."""
    texts = [""] * len(geometries)
    boxes = [i for i, g in enumerate(geometries) if isinstance(g, tuple)]
    outlines = [i for i, g in enumerate(geometries) if isinstance(g, shapely.Geometry)]
    if len(boxes) + len(outlines) < len(geometries):
        raise ConfigError("Feature.geometry: expected (x0, y0, x1, y1) or a shapely polygon, got another type")
    for rows, write in ((boxes, _box_texts), (outlines, _outline_texts)):
        if rows:
            for row, text in zip(rows, write([geometries[i] for i in rows]), strict=True):
                texts[row] = text
    return texts


def _round(points: NDArray[np.float64]) -> NDArray[np.float64]:
    # + 0.0 turns -0.0, which would print as "-0", into 0.0.
    rounded: NDArray[np.float64] = np.rint(points * _STEPS_PER_PX) / _STEPS_PER_PX + 0.0
    return rounded


def _box_texts(boxes: Sequence[tuple[float, float, float, float]]) -> Iterator[str]:
    edges = np.asarray(boxes, np.float64)
    edges[~(np.abs(edges) < _LIMIT_PX).all(axis=1)] = 0.0
    edges = _round(edges)
    has_area = ((edges[:, 2] > edges[:, 0]) & (edges[:, 3] > edges[:, 1])).tolist()
    for keep, row in zip(has_area, edges.tolist(), strict=True):
        # 14 digits hold 0.01 px up to the limit without an exponent and drop trailing zeros.
        x0, y0, x1, y1 = (f"{v:.14g}" for v in row)
        ring = f"[{x0},{y0}],[{x1},{y0}],[{x1},{y1}],[{x0},{y1}],[{x0},{y0}]"
        yield f'{{"type":"Polygon","coordinates":[[{ring}]]}}' if keep else ""


def _outline_texts(geometries: Sequence[Any]) -> Iterator[str]:
    for outline in shapely.orient_polygons(_valid_outlines(np.array(geometries, object))):
        if outline is None:
            yield ""
        elif outline.geom_type == "Polygon":
            yield f'{{"type":"Polygon","coordinates":{_polygon_text(outline)}}}'
        else:
            parts = ",".join(_polygon_text(part) for part in outline.geoms)
            yield f'{{"type":"MultiPolygon","coordinates":[{parts}]}}'


def _polygon_text(polygon: Any) -> str:
    return "[" + ",".join(_ring_text(ring) for ring in (polygon.exterior, *polygon.interiors)) + "]"


def _ring_text(ring: Any) -> str:
    numbers = shapely.get_coordinates(ring).ravel().tolist()
    return "[" + ",".join(["[%.14g,%.14g]"] * (len(numbers) // 2)) % tuple(numbers) + "]"


# GEOS leaves floating-point flags behind on odd outlines, which NumPy reports as warnings; the results are checked.
@np.errstate(all="ignore")
def _valid_outlines(outlines: _Geometries) -> _Geometries:
    """Return polygons valid on the 0.01 px grid, None where nothing with an area is left."""
    outlines = np.asarray(shapely.force_2d(outlines), object)
    points, owner = shapely.get_coordinates(outlines, return_index=True)
    outlines[owner[~(np.abs(points) < _LIMIT_PX).all(axis=1)]] = None
    rounded: _Geometries = shapely.transform(outlines, _round)
    # Rounding alone serves nearly all real outlines, in a twentieth of the time of the full repair. Not thin ones:
    # there the reduction on import snaps edges to near-by points and may leave nothing.
    is_thin = shapely.area(rounded) < 2 * shapely.length(rounded) / _STEPS_PER_PX
    for row in np.flatnonzero(~_is_outline(rounded) | is_thin).tolist():
        rounded[row] = _repaired(outlines[row])
    rounded[~_is_outline(rounded)] = None
    return rounded


def _repaired(outline: Any) -> Any:
    grid_px = 1 / _STEPS_PER_PX
    try:
        valid = _polygons_of(shapely.make_valid(outline, method="structure", keep_collapsed=False))
        on_grid = shapely.transform(_polygons_of(shapely.set_precision(valid, grid_px)), _round)
        return None if shapely.is_empty(shapely.set_precision(on_grid, grid_px)) else on_grid
    except shapely.errors.GEOSException:
        return None  # counted as skipped: one outline beyond repair must not cost the other million


def _polygons_of(geometry: Any) -> Any:
    """Return the parts that have an area: make_valid may return a GeometryCollection, which QuPath cannot read."""
    if geometry is None or geometry.geom_type != "GeometryCollection":
        return geometry
    return shapely.union_all([g for g in geometry.geoms if g.geom_type in ("Polygon", "MultiPolygon")])


def _is_outline(outlines: _Geometries) -> NDArray[np.bool_]:
    kind = shapely.get_type_id(outlines)  # 3 Polygon, 6 MultiPolygon, -1 None
    good: NDArray[np.bool_] = np.isin(kind, (3, 6)) & ~shapely.is_empty(outlines) & shapely.is_valid(outlines)
    return good
