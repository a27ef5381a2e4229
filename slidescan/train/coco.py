"""Pictures annotated in COCO's format.

Hides the format and its spellings. Of pictures only headers are read at first, and at most `_CACHE_BYTES` of decoded
ones are held in a process.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, SlideFormatError, SlideReadError
from slidescan.geometry import Box
from slidescan.slides import Facts, Slide, open_slide
from slidescan.slides.codecs import jpeg_size
from slidescan.slides.memory import MemorySource, image_source, is_image
from slidescan.slides.resolution import MAX_MPP, MIN_MPP, NOTHING, number
from slidescan.slides.source import pyramid
from slidescan.train.annotated import Annotated, Objects, patient_in, read_json

__all__ = ["load_coco"]

_COCO_NAMES = ("annotations.json", "annotations.coco.json", "_annotations.coco.json", "instances_*.json")
_CACHE_BYTES = 1 << 29  # of decoded pictures a process keeps: 4,000 of 200 px, or a dozen of 14 megapixels
_LARGE_PX = 1 << 25  # px from which a picture is opened once when it is loaded: it may be more than can be read whole
_HEAD_BYTES = 1 << 20  # a JPEG's size stands after its metadata segments, of 64 KB each


def load_coco(
    path: str | Path, classes: Sequence[str], *, mpp: float | None, attributes: Sequence[str] = ()
) -> list[Annotated]:
    """Load pictures annotated in COCO's format.

    Categories must be `classes`; boxes of a category whose name begins with "ignore" or ends with "*", of a crowd
    (``iscrowd``) or ``difficult`` are ignored regions. An image may say its ``mpp``, ``patient`` (or ``case``, or
    ``slide``; else its name is taken for one, or what a name of TCGA begins with) and ``scanner``; an annotation its
    attributes, as ``{"attributes": {"atypical": true}}`` or ``{"atypical": true}``.

    Parameters
    ----------
    path : path
        The JSON, or the directory of one named annotations.json, annotations.coco.json, _annotations.coco.json or
        instances_*.json. Pictures lie beside it or in ``images``.
    classes : sequence of str
    mpp : float, optional
        µm/px of images that do not say theirs; None: all must.
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
    table = read_json(index)
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
        objects = Objects(slide, tuple(classes), tuple(attributes))
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
        patient = next(
            (str(row[k]) for k in ("patient", "case", "slide") if row.get(k) not in (None, "")),
            patient_in(slide.path.stem),
        )
        found.append(objects.annotated(patient, str(row.get("scanner") or "")))
    return found


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


def _coco_slide(index: Path, row: Mapping[str, Any], mpp: float | None) -> Slide:
    """Open the picture of an image, and check what is said of it."""
    where, name = f"{index.name}: image {row['id']!r}", row.get("file_name")
    folders = (index.parent, index.parent / "images")
    file = next((f / name for f in folders if (f / name).is_file()), None) if isinstance(name, str) and name else None
    if file is None:
        raise ConfigError(f"{where}: expected its file_name beside {index.name} or in images/, found no {name!r}")
    if row.get("mpp", mpp) is None:
        raise ConfigError(f"{where}: expected its mpp, for detectors of several µm/px; write it there, or as slide_mpp")
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
