"""Metadata of an RGB pyramid in a Zarr directory, judged before a Zarr library touches the files.

Hides where OME-NGFF 0.4 (Zarr v2) and 0.5 (Zarr v3) keep things, how axes are ordered, and how chunk files are named.
Invariants: only known codecs pass, because Zarr v2 lets a file name a codec that unpickles; a chunk is bounded before
it is decoded; the image is one uint8 RGB plane, other axes have size 1. Groups without NGFF metadata are accepted where
their arrays can only be an RGB image (y, x, 3).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from slidescan.errors import SlideFormatError, SlideReadError
from slidescan.slides.remote import Remote, Where, read_small
from slidescan.slides.resolution import NOTHING, Resolution, judge, unknown_unit
from slidescan.slides.source import ASIDE, MAX_BLOB_BYTES, MAX_SIDE_PX, MAX_TILE_PX

__all__ = ["META", "Dataset", "ZarrImage", "is_zarr", "read_zarr_image"]

META = ("zarr.json", ".zattrs", ".zgroup", ".zarray")
# Codecs that only ever yield bytes or pixels (`pickle` does not).
_CODECS = frozenset(
    ("blosc", "bytes", "bz2", "crc32c", "delta", "gzip", "lz4", "lzma", "sharding_indexed", "transpose", "zlib", "zstd")
) | {"imagecodecs_jpeg", "imagecodecs_jpeg8", "imagecodecs_jpeg2k", "imagecodecs_deflate"}
_PLAIN = frozenset(("bytes", "crc32c", "delta", "transpose"))  # of these, those that change no size
_UNSAFE = "?"  # a coder of which nothing can be told
_UM = {"micrometer": 1.0, "millimeter": 1e3, "centimeter": 1e4, "meter": 1e6, "nanometer": 1e-3, "angstrom": 1e-4}  # µm
_ROUNDING_PX = 1.5  # a level's side may differ by this from the exact ratio, as in TIFF
_MOST_IMAGES = 100  # of one file that are looked for
_MALFORMED = (KeyError, TypeError, ValueError, IndexError, AttributeError, StopIteration, ArithmeticError)


@dataclass(frozen=True, slots=True)
class Dataset:
    """One level: an array below `path`, stored in `files` sized pieces of `chunks` sized decoding units.

    `coder` packs a unit, "" if nothing does; `sum_bytes` of checksum follow. `index` is the size of a shard's index in
    bytes, negative at the end of its file, 0 without shards.
    """

    path: Where
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    files: tuple[int, ...]
    key_prefix: str
    key_separator: str
    fill: int
    coder: str
    sum_bytes: int = 0
    index: int = 0

    def key(self, index: tuple[int, ...]) -> str:
        """Return the name of one piece's file, below `path`."""
        return self.key_prefix + self.key_separator.join(map(str, index))


@dataclass(frozen=True, slots=True)
class ZarrImage:
    """Levels, largest first, with one order of `axes` (subset of t, c, z, y, x)."""

    datasets: tuple[Dataset, ...]
    axes: tuple[str, ...]
    resolution: Resolution
    is_ngff: bool
    others: int = 0

    def wh(self, sizes: tuple[int, ...]) -> tuple[int, int]:
        """Return the x and y entries of a shape."""
        return sizes[self.axes.index("x")], sizes[self.axes.index("y")]


def is_zarr(path: Where) -> bool:
    """Return whether a directory is a Zarr group or array."""
    found = any(read_small(path / name, 0, absent_if_refused=True) is not None for name in META)
    return found or read_small(path / META[0], 0) is not None  # which says so where all are refused


def read_zarr_image(path: Where) -> ZarrImage:
    """Read and judge the metadata of a Zarr directory.

    Raises
    ------
    SlideFormatError
        If it is not one uint8 RGB image, a chunk is unsafe to decode, a codec is unknown, or the metadata is damaged.
    """
    return _Reader(path).image()


class _Reader:
    def __init__(self, path: Where) -> None:
        self._root, self._name = path, path.name

    def image(self) -> ZarrImage:
        if not is_zarr(self._root):
            hidden = " (or its server refuses)" if isinstance(self._root, Remote) else ""
            self._fail(f"a directory without Zarr metadata{hidden}; give a slide file or an .ome.zarr")
        told, others = self._multiscale(self._root), 0
        if told is None and (images := self._images()):
            named = [image for image in images if not ASIDE.search(str(image[1].get("name", "")))] or images[:1]
            chosen = max(named, key=self._area) if len(named) > 1 else named[0]
            # Those of its scale may be slides, too; label and macro image have another, or none.
            steps = _steps(chosen[1])
            others = sum(steps is not None and _steps(image[1]) == steps for image in named if image is not chosen)
            self._root, told = chosen
        paths, axes = self._plain() if told is None else self._ngff(told)
        datasets = [self._dataset(p, axes) for p in paths]
        largest_first = sorted(range(len(datasets)), key=lambda k: -datasets[k].shape[axes.index("x")])
        datasets = [datasets[k] for k in largest_first]
        resolution = NOTHING if told is None else self._resolution(told, axes, largest_first[0])
        image = ZarrImage(tuple(datasets), axes, resolution, told is not None, others)
        sizes = [image.wh(dataset.shape) for dataset in datasets]
        for width, height in sizes[1:]:
            width0, height0 = sizes[0]
            if abs(width - width0 * height / height0) > _ROUNDING_PX * max(1.0, width0 / height0):
                self._fail(
                    f"{width0} × {height0} px and {width} × {height} px are not one picture at two sizes; "
                    "the slide is damaged, or its arrays must be opened one by one"
                )
        return image

    def _images(self) -> list[tuple[Where, dict[str, Any]]]:
        """Return the numbered groups into which bioformats2raw puts the images of a file."""
        found = []
        for n in range(_MOST_IMAGES):
            group = self._root / str(n)
            if (told := self._multiscale(group)) is None:
                break
            found.append((group, told))
        return found

    def _area(self, image: tuple[Where, dict[str, Any]]) -> int:
        """Return the px of an image's first level; of one that cannot be read, 0."""
        group, told = image
        try:
            paths, axes = self._ngff(told)
            shape = _Reader(group)._dataset(paths[0], axes).shape
        except SlideFormatError:
            return 0
        return shape[axes.index("x")] * shape[axes.index("y")]

    def _multiscale(self, group: Where) -> dict[str, Any] | None:
        told = self._json(group / ".zattrs") or _mapping(self._json(group / "zarr.json").get("attributes"))
        found = _mapping(told.get("ome")).get("multiscales", told.get("multiscales"))
        return found[0] if isinstance(found, list) and found and isinstance(found[0], dict) else None

    def _ngff(self, told: dict[str, Any]) -> tuple[list[str], tuple[str, ...]]:
        """Return the paths of the levels, and the axes."""
        try:
            axes = tuple(str(axis["name"]) for axis in told["axes"])
            paths = [str(dataset["path"]) for dataset in told["datasets"]]
        except _MALFORMED as exc:
            raise self._incomplete() from exc
        if not {"x", "y", "c"} <= set(axes) or len(set(axes)) != len(axes):
            self._fail("expected the axes c, y and x; export one RGB image")
        if not paths:
            raise self._incomplete()
        return paths, axes

    def _resolution(self, told: dict[str, Any], axes: tuple[str, ...], level: int) -> Resolution:
        """Return µm/px of a level, in the order that the metadata list them."""
        try:
            units = {str(axis["name"]): axis.get("unit") for axis in told["axes"]}
            scale = _scale(told["datasets"][level]["coordinateTransformations"])
            if any(step["type"] == "scale" for step in told.get("coordinateTransformations", [])):
                outer = _scale(told["coordinateTransformations"])
                scale = [a * b for a, b in zip(scale, outer, strict=True)]
            size = dict(zip(axes, scale, strict=True))
        except _MALFORMED as exc:
            raise self._incomplete() from exc
        if units["x"] is None and units["y"] is None:
            return NOTHING
        if not {str(units["x"]), str(units["y"])} <= _UM.keys():
            return unknown_unit("ngff")
        return judge(size["x"] * _UM[str(units["x"])], size["y"] * _UM[str(units["y"])], "ngff")

    def _incomplete(self) -> SlideFormatError:
        return SlideFormatError(f"{self._name}: its OME-NGFF metadata is incomplete; write it as version 0.4 or 0.5")

    def _plain(self) -> tuple[list[str], tuple[str, ...]]:
        axes = ("y", "x", "c")
        if "shape" in self._json(self._root / ".zarray") or "shape" in self._json(self._root / "zarr.json"):
            return ["."], axes
        if isinstance(self._root, Remote):
            self._fail("a Zarr group without OME-NGFF metadata, and a URL cannot be listed; name one of its arrays")
        below = sorted(p.name for p in self._root.iterdir() if p.is_dir() and is_zarr(p))
        if not below:
            self._fail("a Zarr group without images; give the directory of one image")
        return below, axes

    def _dataset(self, path: str, axes: tuple[str, ...]) -> Dataset:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            self._fail("its metadata points outside the directory; unsafe to open")
        where = self._root / path
        told = self._json(where / ".zarray")
        try:
            if told:
                dtype, codecs, dataset = _version_2(where, told)
            else:
                dtype, codecs, dataset = _version_3(where, self._json(where / "zarr.json"))
            known = all(_is_known(codec) for codec in codecs)
        except _MALFORMED as exc:
            raise SlideFormatError(f"{self._name}: an array's metadata is missing or damaged") from exc
        if not known:
            self._fail("an unknown codec; rewrite it with blosc, gzip, zstd or JPEG")
        if dataset.coder == _UNSAFE:
            self._fail("chunks that are packed twice, or shards of an unusual kind; rewrite it with one codec")
        sizes = dict(zip(axes, dataset.shape, strict=False))
        whole = {len(axes)} == {len(dataset.shape), len(dataset.chunks), len(dataset.files)}
        others = [n for axis, n in sizes.items() if axis not in "cyx"]
        if not whole or dtype != "uint8" or sizes["c"] != 3 or set(others) - {1}:
            self._fail(
                f"expected one uint8 RGB image with axes {', '.join(axes)}, found {dtype} of shape {dataset.shape}; "
                "export the brightfield image alone"
            )
        if not all(0 < n <= MAX_SIDE_PX for n in dataset.shape):
            self._fail(f"an array of shape {dataset.shape} is not plausible; the slide is damaged")
        if min(*dataset.chunks, *dataset.files) <= 0 or math.prod(dataset.chunks) > 3 * MAX_TILE_PX:
            self._fail(f"one chunk unpacks to {dataset.chunks}, more than the safe {3 * MAX_TILE_PX} values")
        return dataset

    def _json(self, where: Where) -> dict[str, Any]:
        try:
            content = read_small(where, MAX_BLOB_BYTES, absent_if_refused=True)
            if content is None:
                return {}
            if len(content) > MAX_BLOB_BYTES:
                self._fail(f"{where.name} has more than {MAX_BLOB_BYTES} bytes; unsafe to open")
            return _mapping(json.loads(content))
        except (SlideReadError, SlideFormatError):
            raise
        except OSError as exc:
            raise SlideReadError(f"{self._name}: {where.name} cannot be read ({exc.strerror})") from exc
        except (ValueError, RecursionError) as exc:  # a number of thousands of digits is a plain ValueError
            raise SlideFormatError(f"{self._name}: {where.name} is not valid JSON; the slide is damaged") from exc

    def _fail(self, reason: str) -> NoReturn:
        raise SlideFormatError(f"{self._name}: {reason}")


def _version_2(where: Where, told: dict[str, Any]) -> tuple[str, list[Any], Dataset]:
    shape, chunks = _ints(told["shape"]), _ints(told["chunks"])
    separator, fill = str(told.get("dimension_separator") or "."), int(told.get("fill_value") or 0)
    codecs = [codec for codec in (*(told.get("filters") or []), told.get("compressor")) if codec is not None]
    dataset = Dataset(where, shape, chunks, chunks, "", separator, fill, *_coder(codecs))
    return np.dtype(told["dtype"]).name, codecs, dataset


def _version_3(where: Where, told: dict[str, Any]) -> tuple[str, list[Any], Dataset]:
    files = chunks = _ints(told["chunk_grid"]["configuration"]["chunk_shape"])
    codecs = list(told["codecs"])
    packing, index = _coder(codecs), 0
    for codec in codecs:
        if codec["name"] == "sharding_indexed":
            shard = codec["configuration"]
            chunks = _ints(shard["chunk_shape"])
            # Only an index that is coded as every writer does can be looked into.
            names, little = [_name(c) for c in shard["index_codecs"]], "big" not in str(shard["index_codecs"])
            is_plain = names == ["bytes", "crc32c"] and little and codec is codecs[-1]
            packing = _coder(shard["codecs"]) if is_plain else (_UNSAFE, 0)
            index = 16 * math.prod(n // m for n, m in zip(files, chunks, strict=True)) + 4
            index = index if shard.get("index_location") == "start" else -index
    encoding = _mapping(told.get("chunk_key_encoding"))
    plain = encoding.get("name") == "v2"
    separator = str(_mapping(encoding.get("configuration")).get("separator") or ("." if plain else "/"))
    prefix, fill = "" if plain else "c" + separator, int(told.get("fill_value") or 0)
    dataset = Dataset(where, _ints(told["shape"]), chunks, files, prefix, separator, fill, *packing, index)
    return str(told["data_type"]), codecs, dataset


def _coder(codecs: list[dict[str, Any]]) -> tuple[str, int]:
    """Return what packs a unit, "" if nothing does, and the bytes of its checksum.

    `_UNSAFE` where what it unpacks to cannot be told beforehand.
    """
    names = [_name(codec) for codec in codecs]
    packing = [name for name in names if name not in _PLAIN]
    if len(packing) > 1 or "crc32c" in names[:-1] or packing == ["sharding_indexed"]:
        return _UNSAFE, 0
    return "".join(packing), 4 if names[-1:] == ["crc32c"] else 0


def _is_known(codec: dict[str, Any]) -> bool:
    """Return whether a codec, and those inside it, are on the list."""
    inner = _mapping(codec.get("configuration"))
    below = [*inner.get("codecs", []), *inner.get("index_codecs", [])]
    return _name(codec) in _CODECS and all(_is_known(item) for item in below)


def _name(codec: dict[str, Any]) -> str:
    return str(codec.get("id") or codec.get("name")).removeprefix("numcodecs.")


def _scale(steps: list[dict[str, Any]]) -> list[float]:
    return [float(factor) for factor in next(step["scale"] for step in steps if step["type"] == "scale")]


def _ints(values: list[Any]) -> tuple[int, ...]:
    return tuple(int(n) for n in values)


def _steps(told: dict[str, Any]) -> object:
    """Return what an image says of its finest level's scale, None where nothing."""
    try:
        return told["datasets"][0]["coordinateTransformations"]
    except _MALFORMED:
        return None


def _mapping(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
