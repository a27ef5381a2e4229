"""Slides annotated in QuPath, as it exports them.

Hides GeoJSON, QuPath's origin and the names of files. Slides are closed again and open on first use.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import shapely
from numpy.typing import NDArray

from slidescan.errors import ConfigError, SlideFormatError
from slidescan.export.rules import class_of, kind_of
from slidescan.slides import Slide, open_slide
from slidescan.train.annotated import Annotated, Objects, read_json
from slidescan.train.patients import names_of, patient_in, read_patients, whose

__all__ = ["geojson_files", "load_slides"]

_GEOJSON = (".geojson", ".geojson.gz")
_NO_OBJECTS = ("root", "tmaCore")  # the slide, and its cores
_FOUND = ("detection", "cell", "tile")  # by a program: without a class, every nucleus of the slide
_FULL, _MOST_STRIPS = 0.98, 256  # share of its box that a rectangle fills; boxes that any other outline becomes
_HUGE = 8  # times the edge of an object: what is larger and has no class is a tumour's outline, say
_REGION = "region*"  # QuPath's class of what is to be annotated, in lower case
_REGION_KEYS = {"rank", "evidence"}  # measurements by which a flagged region that slidescan exported is known


def load_slides(
    path: str | Path,
    classes: Sequence[str],
    *,
    object_um: float,
    attributes: Sequence[str] = (),
    mpp: float | None = None,
    skip: Sequence[str] = (),
) -> list[Annotated]:
    """Load slides with the annotations that QuPath exported of them.

    Beside each slide, or in ``annotations``, lies ``<its stem>.geojson`` or ``.geojson.gz``. Points become boxes of
    `object_um`, outlines the boxes around them. Classes must be `classes`, or derived from one by an attribute
    ("Mitosis: atypical"), or of `skip`. An attribute is a measurement of its name, or what a class is derived by: on a
    slide where one is, others of that attribute are not.

    Of a slide with outlines of the class "Region*" only what is inside of them was annotated: all else is ignored. So
    is what lies in outlines of any other class whose name begins with "ignore" or ends with "*", but for holes in them.
    Coordinates count from the slide's scanned bounds, as QuPath's do, unless slidescan wrote the file, which then
    says from where; the flagged regions it wrote are left out.

    ``patients.csv`` in the directory says with the columns slide, patient and perhaps scanner whose slides they are;
    without it each is a patient of its own, but for names of TCGA, which begin with the patient's.

    Parameters
    ----------
    path : path
        The directory.
    classes : sequence of str
        If there is just one, annotations without a class are of it; detections and cells must say theirs.
    object_um : float
        Edge of the box around an annotated point, µm.
    attributes : sequence of str
    mpp : float, optional
        µm per level-0 px of all the slides; default: what their files say.
    skip : sequence of str
        Classes, such as of a tumour's outline, or what classes are derived by, that say nothing of objects.

    Raises
    ------
    ConfigError
        If a slide has no GeoJSON or a GeoJSON no slide, or something in one is damaged or unknown.
    SlideError
        If a slide cannot be opened, or its µm/px is not known.

    Examples
    --------
    >>> import json, tempfile
    >>> from PIL import Image
    >>> folder = tempfile.TemporaryDirectory()
    >>> Image.new("RGB", (64, 48)).save(Path(folder.name, "a.png"))
    >>> point = {"type": "Feature", "geometry": {"type": "Point", "coordinates": [30, 20]}, "properties": {}}
    >>> _ = Path(folder.name, "a.geojson").write_text(json.dumps(point))
    >>> load_slides(folder.name, ["cell"], object_um=5, mpp=0.5)[0].xyxy_l0.tolist()
    [[25.0, 15.0, 35.0, 25.0]]
    >>> folder.cleanup()
    """
    root = Path(path)
    if not root.is_dir():
        raise ConfigError(f"{root}: expected a directory of slides with GeoJSON, found none; check the path")
    if not (math.isfinite(object_um) and object_um > 0):
        raise ConfigError(f"object_um: expected the edge of an object's box in µm, above 0, got {object_um!r}")
    geojson, known = geojson_files(root), read_patients(root)
    slides: dict[str, Slide] = {}
    refused: dict[str, SlideFormatError] = {}
    for file in sorted(root.iterdir()):
        if file.name.startswith(".") or file.name in ("annotations", "patients.csv") or _is_geojson(file):
            continue
        stem = next((name for name in names_of(file.name) if name in geojson), None)
        try:
            slide = open_slide(file, mpp=mpp)
        except SlideFormatError as exc:  # a text, or the folder of an MRXS: no slide, unless something is written of it
            if stem is not None:
                refused[stem] = exc
            continue
        slide.close()
        if slide.mpp is None:
            raise ConfigError(f"{file.name}: µm/px: {slide.mpp_problem}; give it as slide_mpp (evaluate: --mpp)")
        if stem is None:
            raise ConfigError(
                f"{file.name}: expected {file.stem}.geojson beside the slide or in annotations/, found none; "
                f"export its annotations, or for a slide without objects an empty list"
            )
        if stem in slides:
            raise ConfigError(f"{geojson[stem].name}: two slides have this name; move one of them elsewhere")
        slides[stem] = slide
    for stem in geojson.keys() - slides.keys():
        raise refused.get(stem) or ConfigError(f"{geojson[stem].name}: expected a slide {stem} in {root}, found none")

    found = []
    for stem, slide in slides.items():
        objects = Objects(slide, tuple(classes), tuple(attributes), tuple(skip))
        _add_features(objects, geojson[stem], object_um / slide.frame.mpp / 2)
        patient, scanner = (patient_in(slide.name), "") if known is None else whose(known, slide.path.name)
        found.append(objects.annotated(patient, scanner))
    if not found:
        raise ConfigError(f"{root}: expected slides with GeoJSON beside them, found none; check the path")
    return found


def _is_geojson(file: Path) -> bool:
    return file.name.lower().endswith(_GEOJSON)


def geojson_files(root: Path) -> dict[str, Path]:
    """Return the GeoJSON files by what is left of their names."""
    found: dict[str, Path] = {}
    for folder in (root, root / "annotations"):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.name.startswith(".") or not _is_geojson(file):
                continue
            stem = re.sub(r"\.geojson(\.gz)?$", "", file.name, flags=re.IGNORECASE)
            if stem in found:
                raise ConfigError(f"{file.name}: expected one GeoJSON for {stem}, found two; delete the older")
            found[stem] = file
    return found


def _add_features(objects: Objects, path: Path, half_px: float) -> None:
    """Add what a GeoJSON file holds; a point's box reaches `half_px` level-0 px to each side."""
    document = read_json(path)
    bounds = objects.slide.bounds_l0
    origin = (0.0, 0.0) if bounds is None else (bounds.x0, bounds.y0)
    foreign = document.get("slidescan") if isinstance(document, dict) else None
    if isinstance(foreign, dict) and "offset_l0" in foreign:
        try:
            x, y = foreign["offset_l0"]
            origin = float(x), float(y)
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"{path.name}: expected slidescan.offset_l0 as two numbers; export it again") from exc
    unnamed, regions = 0, list[shapely.Geometry]()
    for i, feature in enumerate(_features(path, document)):
        where = f"{path.name}: feature {i}"
        properties = feature.get("properties")
        measured = properties.get("measurements") if isinstance(properties, dict) else None
        if isinstance(measured, list):  # before QuPath 0.4
            measured = {str(item.get("name")): item.get("value") for item in measured if isinstance(item, dict)}
        measured = measured if isinstance(measured, dict) else {}
        if kind_of(feature) in _NO_OBJECTS or measured.keys() >= _REGION_KEYS:
            continue
        name = class_of(feature)
        if not name and (len(objects.classes) != 1 or kind_of(feature) in _FOUND):
            unnamed += 1
            continue
        if name and objects.skips(name):
            continue
        geometry = feature.get("geometry")
        if name.lower() == _REGION and name not in objects.classes and not _is_points(geometry):
            regions.append(shapely.transform(_outline(where, geometry), lambda xy: xy + origin))
            continue
        of = _strips if name and objects.ignores(where, name) else _boxes
        boxes = of(where, geometry, half_px) + np.array(origin * 2)
        if not name and len(boxes) and (boxes[:, 2:] - boxes[:, :2]).max() > _HUGE * 2 * half_px:
            raise ConfigError(
                f"{where}: expected a class, or an object, got an outline without class {_HUGE} times as large as one; "
                "give it a class, Region* where all objects in it are annotated, Ignore* where none are, or delete it"
            )
        objects.add(where, name or objects.classes[0], boxes, measured)
    if unnamed:
        raise ConfigError(
            f"{path.name}: expected a class for every object, found {unnamed} without; set it in QuPath to one of "
            f"{', '.join(objects.classes)}, or delete them"
        )
    if regions:
        objects.ignored.append(_outside(path.name, shapely.union_all(regions), objects.slide.size_wh, half_px))


def _features(path: Path, document: Any) -> Iterator[dict[str, Any]]:
    """Yield the features of a collection, a list or a single one, and those inside them."""
    waiting = [document]
    while waiting:
        item = waiting.pop()
        kind = item.get("type") if isinstance(item, dict) else None
        inner: Any = item
        if kind == "FeatureCollection":
            inner = item.get("features")
        elif kind == "Feature":
            yield item
            properties = item.get("properties")
            inner = (properties.get("childObjects") or []) if isinstance(properties, dict) else []
        if not isinstance(inner, list):
            raise ConfigError(
                f"{path.name}: expected a FeatureCollection, a list of features or one; export it as GeoJSON"
            )
        waiting += reversed(inner)


def _boxes(where: str, geometry: Any, half_px: float) -> NDArray[np.float64]:
    """Return the boxes (k, 4) of a geometry, in its own px: one an outline, one a point."""
    with _coordinates(where, geometry) as (kind, parts):
        if kind in ("Point", "MultiPoint"):
            points = _points(parts)
            return np.concatenate((points - half_px, points + half_px), 1)
        outline = np.concatenate([_points(part[0]) for part in parts])
        return np.concatenate((outline.min(0), outline.max(0)))[None]


def _strips(where: str, geometry: Any, half_px: float) -> NDArray[np.float64]:
    """Return boxes (k, 4) that together are the outline less its holes, to `half_px`; of points those of `_boxes`."""
    return _boxes(where, geometry, half_px) if _is_points(geometry) else _cut(_outline(where, geometry), half_px)


def _is_points(geometry: Any) -> bool:
    return isinstance(geometry, dict) and str(geometry.get("type")).endswith("Point")


def _outline(where: str, geometry: Any) -> shapely.Geometry:
    """Return the area of a geometry, in its own px."""
    with _coordinates(where, geometry) as (_, parts):
        outlines = [shapely.Polygon(_points(part[0]), [_points(hole) for hole in part[1:]]) for part in parts]
        return shapely.union_all(shapely.make_valid(np.array(outlines, object)))


def _outside(where: str, regions: shapely.Geometry, size_wh: tuple[int, int], half_px: float) -> NDArray[np.float64]:
    """Return boxes (k, 4) that together are a slide less its regions."""
    around = shapely.union_all(shapely.box(*shapely.bounds(shapely.get_parts(regions)).T))
    slide = shapely.box(0, 0, *size_wh)
    if not (regions & slide).area:
        raise ConfigError(f"{where}: expected Region* on the slide, got none; check that it belongs to this image")
    # First what is exact: the strips of a whole slide would be higher than a region.
    return np.concatenate((_cut(slide - around, half_px), _cut((around & slide) - regions, half_px)))


def _cut(area: shapely.Geometry, half_px: float) -> NDArray[np.float64]:
    """Return boxes (k, 4) that together are an area: exactly, if its sides are upright and level, or to `half_px`."""
    found = [np.empty((0, 4))]
    for outline in shapely.get_parts(area):
        if not outline.area:  # a line, where two only touch
            continue
        x0, y0, x1, y1 = outline.bounds
        if outline.area >= _FULL * (x1 - x0) * (y1 - y0) and not shapely.get_num_interior_rings(outline):
            found.append(np.array([[x0, y0, x1, y1]]))
            continue
        sides = np.concatenate([np.diff(shapely.get_coordinates(ring), axis=0) for ring in shapely.get_rings(outline)])
        if (sides == 0).any(1).all():
            edges = np.unique(shapely.get_coordinates(outline)[:, 1])
        else:
            edges = np.linspace(y0, y1, 1 + min(_MOST_STRIPS, max(1, math.ceil((y1 - y0) / half_px))))
        middles = (edges[:-1] + edges[1:]) / 2
        lines = shapely.linestrings([[(x0, y), (x1, y)] for y in middles])
        crossed, row = shapely.get_parts(shapely.intersection(outline, lines), return_index=True)
        bounds = shapely.bounds(crossed)
        strips = np.stack((bounds[:, 0], edges[row], bounds[:, 2], edges[row + 1]), 1)
        found.append(strips[strips[:, 2] > strips[:, 0]])
    return np.concatenate(found)


@contextmanager
def _coordinates(where: str, geometry: Any) -> Iterator[tuple[str, Any]]:
    """Give a geometry's type and a list of its points or outlines; what is wrong with them is one line."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    if kind not in ("Point", "MultiPoint", "Polygon", "MultiPolygon"):
        raise ConfigError(
            f"{where}: expected a Point, MultiPoint, Polygon or MultiPolygon, got {kind}; draw it anew or delete it"
        )
    try:
        yield kind, geometry["coordinates"] if kind.startswith("Multi") else [geometry["coordinates"]]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError, shapely.errors.ShapelyError) as exc:
        raise ConfigError(
            f"{where}: expected the coordinates of a {kind}, got something else; export it again"
        ) from exc


def _points(positions: Any) -> NDArray[np.float64]:
    return np.array([(float(x), float(y)) for x, y, *_ in positions], np.float64).reshape(-1, 2)
