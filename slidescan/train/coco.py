"""Pictures annotated in COCO's format.

Hides the format and its spellings. Of pictures only headers are read at first, and at most `_CACHE_BYTES` of decoded
ones are held in a process.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, SlideReadError
from slidescan.geometry import Box
from slidescan.slides import Facts, Slide, open_slide
from slidescan.slides.memory import MemorySource, image_size, image_source, is_image
from slidescan.slides.resolution import MAX_MPP, MIN_MPP, NOTHING, number
from slidescan.slides.source import pyramid
from slidescan.train.annotated import Annotated, Objects, read_json
from slidescan.train.patients import Whose, patient_in, read_patients, whose

__all__ = ["load_coco"]

_COCO_NAMES = ("annotations.json", "annotations.coco.json", "_annotations.coco.json", "instances_*.json")
_CACHE_BYTES = 1 << 29  # of decoded pictures a process keeps: 4,000 of 200 px, or a dozen of 14 megapixels
_FOLDER = "annotations"  # where CVAT puts the JSON, beside ``images``
_MAGIC_BYTES = 16
_NO = (None, False, 0, "", "0", "false", "no")  # of a flag: tables and XML of others know texts alone
_YES = (True, 1, "1", "true", "yes")


def load_coco(
    path: str | Path,
    classes: Sequence[str],
    *,
    mpp: float | None,
    attributes: Sequence[str] = (),
    assumed_mpp: float | None = None,
    skip: Sequence[str] = (),
    crowds: Literal["ignored", "objects"] = "ignored",
) -> list[Annotated]:
    """Load pictures annotated in COCO's format.

    Categories must be `classes`, or of `skip`; boxes of a category whose name begins with "ignore" or ends with "*", of
    a crowd (``iscrowd``), ``ignore`` or ``difficult`` are ignored regions. An annotation may say its attributes, as
    ``{"attributes": {"atypical": true}}`` or ``{"atypical": true}``, an image its ``mpp``, ``scanner`` and ``patient``
    (or ``case``, or ``slide``). Else ``patients.csv`` beside the JSON, or in the directory, says whose it is, with the
    columns slide, patient and perhaps scanner. Without it a patient is what a name of TCGA begins with, or the folder
    in file_name, the outermost by which pictures differ, or the picture.

    Parameters
    ----------
    path : path
        The JSON, or the directory of one named annotations.json, annotations.coco.json, _annotations.coco.json or
        instances_*.json, or of ``annotations`` with it. Pictures lie beside it, or in ``images``; of
        instances_train.json also in ``images/train`` or ``train``.
    classes : sequence of str
    mpp : float, optional
        µm/px of images of which neither the JSON nor the file says it.
    attributes : sequence of str
    assumed_mpp : float, optional
        What else is taken for it; None: all must say it.
    skip : sequence of str
        As of `slidescan.train.qupath.load_slides`.
    crowds : {"ignored", "objects"}
        What an annotation of a crowd is: CVAT writes every mask as one.

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
    table = read_json(index)
    images, annotations, categories = (_rows(index, table, key) for key in ("images", "annotations", "categories"))
    names: dict[int | str, Any] = {}
    for row in categories:
        if names.setdefault(key := _id(index, row, "id", "category"), row.get("name")) != row.get("name"):
            raise ConfigError(f"{index.name}: category {key!r} is there twice; give each category an id of its own")
    of_image: dict[int | str, list[dict[str, Any]]] = {}
    for row in images:
        if (key := _id(index, row, "id", "image")) in of_image:
            raise ConfigError(f"{index.name}: image {key!r} is there twice; give each image an id of its own")
        of_image[key] = []
    listed = set[Any]()
    for row in annotations:
        if isinstance(own := row.get("id"), int | str):
            if (own, str(row.get("image_id"))) in listed:  # there are exporters that number each image's from 0
                raise ConfigError(f"{index.name}: annotation {own!r} is there twice; export it again")
            listed.add((own, str(row.get("image_id"))))
        where, key = f"{index.name}: annotation {row.get('id')!r}", _id(index, row, "image_id", "annotation")
        if key not in of_image:
            raise ConfigError(f"{where}: expected the image_id of an image in the file, got {key!r}; export it again")
        if (category := _id(index, row, "category_id", "annotation")) not in names:
            raise ConfigError(f"{where}: expected the id of a category in the file, got {category!r}; export it again")
        of_image[key].append(row)

    known, found, files = read_patients(index.parent), [], dict[Any, Any]()
    known = read_patients(Path(path)) if known is None and Path(path).is_dir() else known
    flags = ("difficult", "ignore") if crowds == "objects" else ("difficult", "ignore", "iscrowd")
    folders = _apart(images)
    for row in images:
        slide, is_assumed = _coco_slide(index, row, mpp, assumed_mpp)
        if (first := files.setdefault(slide.path, row["id"])) != row["id"]:
            raise ConfigError(
                f"{index.name}: images {first!r} and {row['id']!r} are one file, {row['file_name']}; each would take "
                "the other's objects for background: merge them"
            )
        objects = Objects(slide, tuple(classes), tuple(attributes), tuple(skip))
        for item in of_image[row["id"]]:
            where = f"{index.name}: annotation {item.get('id')!r}"
            inner = item.get("attributes")
            said = item | (inner if isinstance(inner, dict) else {})
            ignored = True in [_flag(where, said, key) for key in flags]  # all are looked at
            objects.add(where, str(names[item["category_id"]]), _box(where, item), said, ignored=ignored)
        patient, scanner = _whose(row, known, folders.get(row["file_name"], ""))
        found.append(replace(objects.annotated(patient, scanner), mpp_assumed=is_assumed))
    return found


def _coco_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    found = sorted({file for name in _COCO_NAMES for file in path.glob(name)})
    found = found or sorted({file for name in _COCO_NAMES for file in (path / _FOLDER).glob(name)})
    if len(found) != 1:
        what = ", ".join(file.name for file in found) or "none"
        raise ConfigError(f"{path}: expected one of {', '.join(_COCO_NAMES)}, found {what}; name the file itself")
    return found[0]


def _rows(index: Path, table: Any, key: str) -> list[dict[str, Any]]:
    rows = table.get(key) if isinstance(table, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(f"{index.name}: expected {key!r} as a list of objects, found none; export COCO detections")
    return rows


def _box(where: str, item: Mapping[str, Any]) -> NDArray[np.float64]:
    try:
        x, y, width, height = (float(n) for n in item["bbox"])
    except (KeyError, TypeError, ValueError, OverflowError) as exc:
        raise ConfigError(
            f"{where}: expected bbox as four numbers [x, y, width, height] in px, got {item.get('bbox')!r}"
        ) from exc
    return np.array([[x, y, x + width, y + height]])


def _whose(row: Mapping[str, Any], known: Mapping[str, Whose] | None, folder: str) -> Whose:
    """Return patient and scanner of an image; without any other word the folder is the patient."""
    told = {key: _text(row.get(key)) for key in ("patient", "case", "slide", "scanner")}
    patient, scanner = told["patient"] or told["case"], told["scanner"]
    if known is not None and not (patient and scanner):
        try:
            of_table = whose(known, told["slide"] if told["slide"] in known else row["file_name"])
        except ConfigError:  # says whose it is, and not where it was scanned
            if not patient:
                raise
            of_table = patient, ""
        patient, scanner = patient or of_table[0], scanner or of_table[1]
    if patient:
        return patient, scanner
    if told["slide"]:
        return patient_in(told["slide"]), scanner
    stem = Path(row["file_name"]).stem
    named = patient_in(stem)
    return (folder or stem if named == stem else named), scanner


def _text(said: Any) -> str:
    """Return what is said as text; of a table with gaps 7.0 is 7, and NaN is nothing."""
    if said is None or (isinstance(said, float) and math.isnan(said)):
        return ""
    return str(int(said) if isinstance(said, float) and said.is_integer() else said).strip()


def _apart(images: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Return of each file_name in a folder the outermost one by which they differ: that is the patient's, if any is."""
    folders = {
        name: [part for part in name.split("/")[:-1] if part not in ("", ".", "images")]
        for row in images
        if isinstance(name := row.get("file_name"), str)
    }
    inner = [parts for parts in folders.values() if parts]
    for level in range(max(map(len, inner), default=0)):
        if len({parts[level] if level < len(parts) else "" for parts in inner}) > 1:
            return {name: parts[min(level, len(parts) - 1)] for name, parts in folders.items() if parts}
    return {}


def _flag(where: str, said: Mapping[str, Any], key: str) -> bool:
    value = said.get(key)
    value = value.strip().lower() if isinstance(value, str) else value
    if value in _NO:
        return False
    if value in _YES:
        return True
    raise ConfigError(f"{where}: expected {key} as true or false, got {value!r}")


def _id(index: Path, row: Mapping[str, Any], key: str, kind: str) -> int | str:
    value = row.get(key)
    if isinstance(value, float) and value.is_integer():  # as tables with a gap have them
        value = int(value)
    if not isinstance(value, int | str):
        raise ConfigError(f"{index.name}: {kind} {row.get('id')!r}: expected a number as {key}, got {value!r}")
    return value


def _coco_slide(
    index: Path, row: Mapping[str, Any], mpp: float | None, assumed_mpp: float | None
) -> tuple[Slide, bool]:
    """Open the picture of an image, and check what is said of it; return whether its µm/px is assumed, too."""
    where, name = f"{index.name}: image {row['id']!r}", row.get("file_name")
    roots = [index.parent, index.parent.parent] if index.parent.name == _FOLDER else [index.parent]
    subset = index.stem.partition("_")[2] if index.stem.startswith("instances_") else ""
    within = ["", "images", *([f"images/{subset}", subset] if subset else [])]
    folders = [root / folder for root in roots for folder in within]
    paths = [folder / name for folder in folders] if isinstance(name, str) and name else []
    file = next((path for path in paths if os.path.isfile(path)), None)  # noqa: PTH113  # also of a name too long
    if file is None:
        raise ConfigError(f"{where}: expected its file_name beside {index.name} or in images/, found no {name!r}")
    slide = _picture(file, None if row.get("mpp") is None else _mpp(where, row["mpp"]))
    is_assumed = slide.mpp is None and mpp is None
    if slide.mpp is None:
        if (known := assumed_mpp if mpp is None else mpp) is None:
            raise ConfigError(
                f"{where}: expected its mpp, for detectors of several µm/px; write it there, or as slide_mpp (--mpp)"
            )
        slide = _picture(file, _mpp(where, known))
    for key, size in zip(("width", "height"), slide.size_wh, strict=True):
        if row.get(key) not in (None, size):
            raise ConfigError(
                f"{where}: expected the {key} of {file.name}, {size} px, got {row[key]!r}; annotate the file as it is"
            )
    return slide, is_assumed


def _mpp(where: str, said: Any) -> float:
    value = number(said)
    if value is None or not MIN_MPP <= value <= MAX_MPP:
        raise ConfigError(f"{where}: expected mpp from {MIN_MPP:g} to {MAX_MPP:g} µm/px, got {said!r}")
    return value


def _picture(path: Path, mpp: float | None) -> Slide:
    """Return a slide whose pixels are decoded when they are read, and soon forgotten; without `mpp`, at its own."""
    path = path.absolute()
    with path.open("rb") as file:
        head = file.read(_MAGIC_BYTES)
    if not is_image(head):
        slide = open_slide(path, mpp=mpp)
        slide.close()
        return slide
    return Slide(path, _Picture(path, image_size(path)), mpp=mpp)


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

    @property
    def arrays(self) -> list[NDArray[np.uint8]]:
        """The pixels, by which it is known wherever it is opened."""
        return _decoded(self.path).arrays

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
