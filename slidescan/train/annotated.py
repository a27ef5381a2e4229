"""Slides and pictures of the user's own with what is annotated on them: COCO, and QuPath's GeoJSON.

Hides both formats. After this module an object is a box in level-0 px of the uncropped slide, a label and what is known
of its attributes, and what must count neither way is an ignored box. Invariants: nothing is dropped silently (what has
no class, or a class nobody asked for, is an error); of pictures only headers are read here, and at most `_CACHE_BYTES`
of decoded ones are held in a process; slides are closed again and open on first use.
"""

from __future__ import annotations

import csv
import itertools
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, SlideFormatError, SlideReadError
from slidescan.export.jsonstream import JsonStream, Unreadable, open_text
from slidescan.export.rules import class_of, kind_of
from slidescan.geometry import Box
from slidescan.slides import Facts, Slide, open_slide
from slidescan.slides.codecs import jpeg_size
from slidescan.slides.memory import MemorySource, image_source, is_image
from slidescan.slides.resolution import MAX_MPP, MIN_MPP, NOTHING, number
from slidescan.slides.source import pyramid

__all__ = ["Annotated", "load_coco", "load_slides", "refuse_leaks", "split"]

_COCO_NAMES = ("annotations.json", "annotations.coco.json", "_annotations.coco.json", "instances_*.json")
_GEOJSON = (".geojson", ".geojson.gz")
_CACHE_BYTES = 1 << 29  # of decoded pictures a process keeps: 4,000 of 200 px, or a dozen of 14 megapixels
_LARGE_PX = 1 << 25  # px from which a picture is opened once when it is loaded: it may be more than can be read whole
_HEAD_BYTES = 1 << 20  # a JPEG's size stands after its metadata segments, of 64 KB each
_REGION_KEYS = {"rank", "evidence"}  # measurements by which a flagged region that slidescan exported is known


@dataclass(frozen=True, slots=True, eq=False)
class Annotated:
    """A slide or picture and what is annotated on it; all boxes in level-0 px.

    Parameters
    ----------
    slide : Slide
    xyxy_l0 : ndarray of float64, shape (n, 4)
        One box an object. Its centre lies on the slide, its edges may not.
    label : ndarray of int64, shape (n,)
    attributes : ndarray of float64, shape (n, A)
        1 yes, 0 no, NaN unknown.
    ignored_xyxy_l0 : ndarray of float64, shape (m, 4)
        Where nothing is right or wrong.
    patient : str
        Whose tissue; splits never part a patient.
    scanner : str
    """

    slide: Slide
    xyxy_l0: NDArray[np.float64]
    label: NDArray[np.int64]
    attributes: NDArray[np.float64]
    ignored_xyxy_l0: NDArray[np.float64]
    patient: str
    scanner: str = ""


def load_coco(
    path: str | Path, classes: Sequence[str], *, mpp: float, attributes: Sequence[str] = ()
) -> list[Annotated]:
    """Load pictures annotated in COCO's format.

    Categories must be `classes`; boxes of a category whose name begins with "ignore" or ends with "*", of a crowd
    (``iscrowd``) or ``difficult`` are ignored regions. An image may say its ``mpp``, ``patient`` (or ``case``, or
    ``slide``; else its name is taken for one) and ``scanner``; an annotation its attributes, as ``{"attributes":
    {"atypical": true}}`` or ``{"atypical": true}``.

    Parameters
    ----------
    path : path
        The JSON, or the directory of one named annotations.json, annotations.coco.json, _annotations.coco.json or
        instances_*.json. Pictures lie beside it or in ``images``.
    classes : sequence of str
    mpp : float
        µm/px of images that do not say theirs.
    attributes : sequence of str

    Raises
    ------
    ConfigError
        If something in it is missing, damaged or unknown; the message names the file and the annotation.
    SlideError
        If a picture cannot be opened.

    Examples
    --------
    >>> import json, tempfile
    >>> from PIL import Image
    >>> folder = tempfile.TemporaryDirectory()
    >>> Image.new("RGB", (64, 48)).save(Path(folder.name, "a.png"))
    >>> table = {"images": [{"id": 1, "file_name": "a.png"}], "categories": [{"id": 1, "name": "cell"}]}
    >>> table["annotations"] = [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [10, 20, 8, 8]}]
    >>> _ = Path(folder.name, "annotations.json").write_text(json.dumps(table))
    >>> load_coco(folder.name, ["cell"], mpp=0.25)[0].xyxy_l0.tolist()
    [[10.0, 20.0, 18.0, 28.0]]
    >>> folder.cleanup()
    """
    index = _coco_file(Path(path))
    table = _read_json(index)
    images, annotations, categories = (_rows(index, table, key) for key in ("images", "annotations", "categories"))
    names = {_id(index, row, "id", "category"): row.get("name") for row in categories}
    of_image: dict[int | str, list[dict[str, Any]]] = {}
    for row in images:
        if (key := _id(index, row, "id", "image")) in of_image:
            raise ConfigError(f"{index.name}: image {key!r} is there twice; give each image an id of its own")
        of_image[key] = []
    for row in annotations:
        where, key = f"{index.name}: annotation {row.get('id')!r}", _id(index, row, "image_id", "annotation")
        if key not in of_image:
            raise ConfigError(f"{where}: expected the image_id of an image in the file, got {key!r}; export it again")
        if (category := _id(index, row, "category_id", "annotation")) not in names:
            raise ConfigError(f"{where}: expected the id of a category in the file, got {category!r}; export it again")
        of_image[key].append(row)

    found = []
    for row in images:
        slide = _coco_slide(index, row, mpp)
        objects = _Objects(slide, tuple(classes), tuple(attributes))
        for item in of_image[row["id"]]:
            where = f"{index.name}: annotation {item.get('id')!r}"
            inner = item.get("attributes")
            said = item | (inner if isinstance(inner, dict) else {})
            try:
                x, y, width, height = (float(n) for n in item["bbox"])
            except (KeyError, TypeError, ValueError, OverflowError) as exc:
                raise ConfigError(
                    f"{where}: expected bbox as four numbers [x, y, width, height] in px, got {item.get('bbox')!r}"
                ) from exc
            ignored = bool(said.get("iscrowd") or said.get("difficult"))
            box = np.array([[x, y, x + width, y + height]])
            objects.add(where, str(names[item["category_id"]]), box, said, ignored=ignored)
        patient = next((str(row[k]) for k in ("patient", "case", "slide") if row.get(k)), slide.path.stem)
        found.append(objects.annotated(patient, str(row.get("scanner") or "")))
    return found


def load_slides(
    path: str | Path,
    classes: Sequence[str],
    *,
    object_um: float,
    attributes: Sequence[str] = (),
    mpp: float | None = None,
) -> list[Annotated]:
    """Load slides with the annotations that QuPath exported of them.

    Beside each slide, or in ``annotations``, lies ``<its stem>.geojson`` or ``.geojson.gz``. Points become boxes of
    `object_um`, outlines the boxes around them. Classes must be `classes`, or derived from one ("Mitosis: atypical");
    those whose name begins with "ignore" or ends with "*" are ignored regions. An attribute is a measurement of its
    name. Coordinates count from the slide's scanned bounds, as QuPath's do, unless slidescan wrote the file, which then
    says from where; the flagged regions it wrote are left out.

    ``patients.csv`` in the directory says with the columns slide, patient and perhaps scanner whose slides they are;
    without it each is a patient of its own, but for names of TCGA, which begin with the patient's.

    Parameters
    ----------
    path : path
        The directory.
    classes : sequence of str
        If there is just one, objects without a class are of it.
    object_um : float
        Edge of the box around an annotated point, µm.
    attributes : sequence of str
    mpp : float, optional
        µm per level-0 px of all the slides; default: what their files say.

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
    geojson, known = _geojson_files(root), _patients(root)
    slides: dict[str, Slide] = {}
    refused: dict[str, SlideFormatError] = {}
    for file in sorted(root.iterdir()):
        if file.name.startswith(".") or file.name in ("annotations", "patients.csv") or _is_geojson(file):
            continue
        stem = next((name for name in _names(file) if name in geojson), None)
        try:
            slide = open_slide(file, mpp=mpp)
        except SlideFormatError as exc:  # a text, or the folder of an MRXS: no slide, unless something is written of it
            if stem is not None:
                refused[stem] = exc
            continue
        slide.close()
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
        objects = _Objects(slide, tuple(classes), tuple(attributes))
        _add_features(objects, geojson[stem], object_um / slide.frame.mpp / 2)
        patient, scanner = _tcga_patient(slide.name), ""
        if known is not None:
            try:
                patient, scanner = next(known[name] for name in _names(slide.path) if name in known)
            except StopIteration:
                raise ConfigError(f"patients.csv: expected a row for the slide {slide.path.name}, found none") from None
        found.append(objects.annotated(patient, scanner))
    if not found:
        raise ConfigError(f"{root}: expected slides with GeoJSON beside them, found none; check the path")
    return found


def split(annotated: Sequence[Annotated], share: float, seed: int) -> tuple[list[Annotated], list[Annotated]]:
    """Set about `share` of the patients apart: the others', and theirs; at least one patient each.

    Raises
    ------
    ConfigError
        If `share` is not between 0 and 1, or there are fewer than two patients.

    Examples
    --------
    >>> from slidescan.slides import memory_slide
    >>> none, slide = np.empty((0, 4)), memory_slide(np.zeros((8, 8, 3), np.uint8), 0.25)
    >>> ten = [Annotated(slide, none, np.empty(0, np.int64), np.empty((0, 0)), none, f"p{i}") for i in range(10)]
    >>> [len(part) for part in split(ten, 0.2, seed=0)]
    [8, 2]
    """
    if not 0 < share < 1:
        raise ConfigError(f"split: expected a share between 0 and 1, got {share!r}")
    patients = sorted({one.patient for one in annotated})
    if len(patients) < 2:
        raise ConfigError(
            f"training data: expected at least two patients to set some apart for validation, got {len(patients)}; "
            f"add slides of another patient, or say whose they are (patients.csv, or patient in the JSON)"
        )
    count = min(max(1, round(share * len(patients))), len(patients) - 1)
    chosen = {patients[i] for i in np.random.default_rng(seed).permutation(len(patients))[:count].tolist()}
    return [one for one in annotated if one.patient not in chosen], [one for one in annotated if one.patient in chosen]


def refuse_leaks(**splits: Sequence[Annotated]) -> None:
    """Refuse splits that share a patient: a detector recognises tissue it was trained on.

    Raises
    ------
    ConfigError
        If there is such a patient.

    Examples
    --------
    >>> refuse_leaks(train=[], test=[])
    """
    patients = {name: {one.patient for one in members} for name, members in splits.items()}
    for one, other in itertools.combinations(patients, 2):
        if shared := sorted(patients[one] & patients[other]):
            raise ConfigError(
                f"{one} and {other}: expected no patient in both, found {len(shared)}, the first {shared[0]!r}; "
                f"move all slides of a patient into one of them"
            )


@dataclass(frozen=True, slots=True)
class _Objects:
    """Collects and checks what is annotated on one slide."""

    slide: Slide
    classes: tuple[str, ...]
    attributes: tuple[str, ...]
    boxes: list[NDArray[np.float64]] = field(default_factory=lambda: [np.empty((0, 4))])
    labels: list[int] = field(default_factory=list)
    answers: list[list[float]] = field(default_factory=list)
    ignored: list[NDArray[np.float64]] = field(default_factory=lambda: [np.empty((0, 4))])

    def add(
        self, where: str, name: str, xyxy_l0: NDArray[np.float64], said: Mapping[str, Any], *, ignored: bool = False
    ) -> None:
        """Add boxes (k, 4) of the class `name`; `said` may hold attributes; `where` begins what is raised."""
        label = self._label(where, name)
        if not np.isfinite(xyxy_l0).all() or (xyxy_l0[:, 2:] <= xyxy_l0[:, :2]).any():
            raise ConfigError(
                f"{where}: expected a box with finite edges and an area, got another; correct or delete it"
            )
        if ignored or label is None:
            self.ignored.append(xyxy_l0)
            return
        centres = (xyxy_l0[:, :2] + xyxy_l0[:, 2:]) / 2
        if (outside := ((centres < 0) | (centres > self.slide.size_wh)).any(1)).any():
            x, y = centres[outside][0].tolist()
            width, height = self.slide.size_wh
            raise ConfigError(
                f"{where}: expected an object on the {width} × {height} px of {self.slide.path.name}, got one around "
                f"({x:g}, {y:g}); check that it belongs to this image and counts in its px"
            )
        self.boxes.append(xyxy_l0)
        self.labels.extend([label] * len(xyxy_l0))
        answers = [_answer(f"{where}: {key}", said.get(key)) for key in self.attributes]
        self.answers.extend([answers] * len(xyxy_l0))

    def annotated(self, patient: str, scanner: str) -> Annotated:
        """Return all of it."""
        answers = np.array(self.answers, np.float64).reshape(len(self.labels), len(self.attributes))
        boxes, ignored = np.concatenate(self.boxes), np.concatenate(self.ignored)
        return Annotated(self.slide, boxes, np.array(self.labels, np.int64), answers, ignored, patient, scanner)

    def _label(self, where: str, name: str) -> int | None:
        """Return the index of a class, None for one whose objects are ignored."""
        if name not in self.classes:
            if name.lower().startswith("ignore") or name.endswith("*"):
                return None
            first = name.partition(":")[0].strip()
            if first not in self.classes:
                raise ConfigError(
                    f"{where}: expected one of the classes {', '.join(self.classes)}, got {name!r}; "
                    f"add it to `classes`, or end its name with * to ignore its objects"
                )
            name = first
        return self.classes.index(name)


def _answer(where: str, value: Any) -> float:
    if value is None or value != value:
        return math.nan
    if isinstance(value, bool | int | float) and 0 <= value <= 1:
        return float(value)
    raise ConfigError(f"{where}: expected true, false, or a number from 0 (no) to 1 (yes), got {value!r}")


def _read_json(path: Path) -> Any:
    try:
        with open_text(path) as stream:
            text = JsonStream(stream)
            value = text.value()
            if text.peek():
                raise Unreadable("json", text.line, "there is more after the end")
    except Unreadable as exc:
        raise ConfigError(f"{path.name}: expected JSON, but at line {exc.line} {exc.detail}; export it again") from exc
    except OSError as exc:
        raise ConfigError(f"{path}: expected a readable file of annotations, {exc.strerror or exc}") from exc
    return value


def _coco_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted({file for name in _COCO_NAMES for file in path.glob(name)})
    if len(found) != 1:
        what = ", ".join(file.name for file in found) or "none"
        raise ConfigError(f"{path}: expected one of {', '.join(_COCO_NAMES)}, found {what}; name the file itself")
    return found[0]


def _rows(index: Path, table: Any, key: str) -> list[dict[str, Any]]:
    rows = table.get(key) if isinstance(table, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{index.name}: expected {key!r} as a list of objects, found none; export COCO detections")
    return rows


def _id(index: Path, row: Mapping[str, Any], key: str, kind: str) -> int | str:
    value = row.get(key)
    if not isinstance(value, int | str):
        raise ConfigError(f"{index.name}: {kind} {row.get('id')!r}: expected a number as {key}, got {value!r}")
    return value


def _coco_slide(index: Path, row: Mapping[str, Any], mpp: float) -> Slide:
    """Open the picture of an image, and check what is said of it."""
    where, name = f"{index.name}: image {row['id']!r}", row.get("file_name")
    folders = (index.parent, index.parent / "images")
    file = next((f / name for f in folders if (f / name).is_file()), None) if isinstance(name, str) and name else None
    if file is None:
        raise ConfigError(f"{where}: expected its file_name beside {index.name} or in images/, found no {name!r}")
    own = number(row.get("mpp", mpp))
    if own is None or not MIN_MPP <= own <= MAX_MPP:
        raise ConfigError(f"{where}: expected mpp from {MIN_MPP:g} to {MAX_MPP:g} µm/px, got {row.get('mpp', mpp)!r}")
    slide = _picture(file, own)
    for key, size in zip(("width", "height"), slide.size_wh, strict=True):
        if row.get(key, size) != size:
            raise ConfigError(
                f"{where}: expected the {key} of {file.name}, {size} px, got {row[key]!r}; annotate the file as it is"
            )
    return slide


def _picture(path: Path, mpp: float) -> Slide:
    """Return a slide whose pixels are decoded when they are read, and soon forgotten."""
    path = path.absolute()
    with path.open("rb") as file:
        head = file.read(_HEAD_BYTES)
    if is_image(head):
        try:
            is_png = head.startswith(b"\x89PNG")
            width, height = (
                (int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")) if is_png else jpeg_size(head)
            )
        except (ValueError, IndexError) as exc:
            raise SlideFormatError(f"{path.name}: a damaged PNG or JPEG image; export it again") from exc
        if 0 < width * height < _LARGE_PX:
            return Slide(path, _Picture(path, (width, height)), mpp=mpp)
    slide = open_slide(path, mpp=mpp)
    slide.close()
    return Slide(path, _Picture(path, slide.size_wh), mpp=mpp) if slide.backend == "image" else slide


@dataclass(frozen=True, slots=True)
class _Picture:
    """A PNG or JPEG that is decoded when it is read; its own opener, for there is nothing to open."""

    path: Path
    size_wh: tuple[int, int]

    def __call__(self) -> _Picture:
        return self

    @property
    def facts(self) -> Facts:
        return Facts("image", None, pyramid([self.size_wh], [self.size_wh]), NOTHING)

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        source = _decoded(self.path)
        if source.facts.levels[0].size_wh != self.size_wh:
            raise SlideReadError(f"{self.path.name}: the file changed since it was opened; start again")
        return source.read_level(level, x, y, out)


_pictures: OrderedDict[Path, MemorySource] = OrderedDict()
_pictures_lock = threading.Lock()


def _decoded(path: Path) -> MemorySource:
    with _pictures_lock:
        _pictures[path] = source = _pictures.pop(path, None) or image_source(path)
        while len(_pictures) > 1 and sum(held.arrays[0].nbytes for held in _pictures.values()) > _CACHE_BYTES:
            _pictures.popitem(last=False)
    return source


def _is_geojson(file: Path) -> bool:
    return file.name.lower().endswith(_GEOJSON)


def _geojson_files(root: Path) -> dict[str, Path]:
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


def _names(file: Path) -> tuple[str, ...]:
    """Return what a slide may be called where something is written of it."""
    return file.stem, file.stem.removesuffix(".ome"), file.name


def _tcga_patient(stem: str) -> str:
    """Return the patient that a name of TCGA begins with (TCGA-<site>-<participant>-<sample>…), or the name."""
    found = re.match(r"TCGA-\w+-\w+(?=[-.]|$)", stem)
    return found[0] if found else stem


def _patients(root: Path) -> dict[str, tuple[str, str]] | None:
    """Return patient and scanner by slide, None where there is no table."""
    path = root / "patients.csv"
    if not path.exists():
        return None
    found: dict[str, tuple[str, str]] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                slide, patient = ((row.get(key) or "").strip() for key in ("slide", "patient"))
                if not slide or not patient:
                    raise ConfigError("patients.csv: expected columns slide and patient, filled in every row; add them")
                said = (patient, (row.get("scanner") or "").strip())
                if found.setdefault(slide, said) != said:
                    raise ConfigError(f"patients.csv: expected one row for the slide {slide}, found two that differ")
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{path}: expected a CSV table in UTF-8, {exc}") from exc
    return found


def _add_features(objects: _Objects, path: Path, half_px: float) -> None:
    """Add what a GeoJSON file holds; a point's box reaches `half_px` level-0 px to each side."""
    document = _read_json(path)
    bounds = objects.slide.bounds_l0
    origin = (0.0, 0.0) if bounds is None else (bounds.x0, bounds.y0)
    foreign = document.get("slidescan") if isinstance(document, dict) else None
    if isinstance(foreign, dict) and "offset_l0" in foreign:
        try:
            x, y = foreign["offset_l0"]
            origin = float(x), float(y)
        except (TypeError, ValueError) as exc:
            raise ConfigError(f"{path.name}: expected slidescan.offset_l0 as two numbers; export it again") from exc
    unnamed = 0
    for i, feature in enumerate(_features(path, document)):
        where = f"{path.name}: feature {i}"
        properties = feature.get("properties")
        measured = properties.get("measurements") if isinstance(properties, dict) else None
        if isinstance(measured, list):  # before QuPath 0.4
            measured = {str(item.get("name")): item.get("value") for item in measured if isinstance(item, dict)}
        measured = measured if isinstance(measured, dict) else {}
        if kind_of(feature) == "root" or measured.keys() >= _REGION_KEYS:
            continue
        name = class_of(feature)
        if not name and len(objects.classes) != 1:
            unnamed += 1
            continue
        boxes = _boxes(where, feature.get("geometry"), half_px) + np.array(origin * 2)
        objects.add(where, name or objects.classes[0], boxes, measured)
    if unnamed:
        raise ConfigError(
            f"{path.name}: expected a class for every object, found {unnamed} without; set it in QuPath to one of "
            f"{', '.join(objects.classes)}, or delete them"
        )


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
            inner = properties.get("childObjects", []) if isinstance(properties, dict) else []
        if not isinstance(inner, list):
            raise ConfigError(
                f"{path.name}: expected a FeatureCollection, a list of features or one; export it as GeoJSON"
            )
        waiting += reversed(inner)


def _boxes(where: str, geometry: Any, half_px: float) -> NDArray[np.float64]:
    """Return the boxes (k, 4) of a geometry, in its own px: one an outline, one a point."""
    kind = geometry.get("type") if isinstance(geometry, dict) else None
    try:
        if kind in ("Point", "MultiPoint"):
            points = _points([geometry["coordinates"]] if kind == "Point" else geometry["coordinates"])
            return np.concatenate((points - half_px, points + half_px), 1)
        if kind in ("Polygon", "MultiPolygon"):
            parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
            outline = np.concatenate([_points(part[0]) for part in parts])
            return np.concatenate((outline.min(0), outline.max(0)))[None]
    except (KeyError, IndexError, TypeError, ValueError, OverflowError) as exc:
        raise ConfigError(
            f"{where}: expected the coordinates of a {kind}, got something else; export it again"
        ) from exc
    raise ConfigError(
        f"{where}: expected a Point, MultiPoint, Polygon or MultiPolygon, got {kind}; draw it anew or delete it"
    )


def _points(positions: Any) -> NDArray[np.float64]:
    return np.array([(float(x), float(y)) for x, y, *_ in positions], np.float64).reshape(-1, 2)
