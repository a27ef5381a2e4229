"""The map as an OME-NGFF 0.5 image: one zarr v3 group, axes c, y, x, one array a pyramid level.

Where a map pixel lies: NGFF coordinates are those of pixel *centres*. With `s` = `um_per_px` the pixel (row, column) of
level k has its centre at ::

    y = row · s·2^k + t,   x = column · s·2^k + t,   t = (s·2^k - slide_mpp) / 2        (µm)

because that level's pixel (0, 0) covers the square from the slide's corner to s·2^k. With `slide_mpp` = 0 the world's
origin is the slide's top-left corner: the map's own first centre lies at s/2 and each coarser level is shifted by
s·(2^k - 1)/2 against it. With the slide's µm per level-0 px it is the centre of the slide's first pixel, where an NGFF
copy of the slide itself (translation 0) has it, and the two lie exactly on each other.

Invariants: 0 means "not evaluated" and is the fill value; one process writes; no shards (a map is a few hundred chunks,
and a shard shared by two writers loses data); nothing in the bytes depends on time, machine or number of threads.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BytesCodec, ZstdCodec

from slidescan.commit import aside, disk_error, flush, sweep
from slidescan.errors import ConfigError, ResultError

__all__ = ["Channel", "read_ngff", "write_ngff"]

_CHUNK_CYX = (1, 256, 256)  # 128 KiB: what browsers fetch at once, and one channel at a time
_ZSTD_LEVEL = 5  # maps are mostly zeros: higher levels gain under 2 %
_U16_MAX = 65535
_COLOR = re.compile(r"[0-9A-Fa-f]{6}")


@dataclass(frozen=True, slots=True)
class Channel:
    """How viewers label and show one channel of the map.

    Parameters
    ----------
    label : str
        Name shown.
    color : str
        Six hex digits, no ``#``: the colour of `end`.
    start, end : int
        Values shown as black and as full colour.
    minimum, maximum : int
        Limits of the viewer's slider.
    active : bool
        Whether it is shown on opening.
    """

    label: str
    color: str = "FF0000"
    start: int = 0
    end: int = _U16_MAX
    minimum: int = 0
    maximum: int = _U16_MAX
    active: bool = True

    def __post_init__(self) -> None:
        if not _COLOR.fullmatch(self.color):
            raise ConfigError(f"channel {self.label!r}: color must be six hex digits like 'FF0000', got {self.color!r}")
        if not self.minimum <= self.start < self.end <= self.maximum:
            raise ConfigError(
                f"channel {self.label!r}: expected minimum <= start < end <= maximum, "
                f"got {self.minimum}, {self.start}, {self.end}, {self.maximum}"
            )

    def _omero(self) -> dict[str, Any]:
        window = {"min": self.minimum, "max": self.maximum, "start": self.start, "end": self.end}
        return {"label": self.label, "color": self.color.upper(), "active": self.active, "window": window}


def write_ngff(
    path: str | os.PathLike[str],
    levels: Sequence[NDArray[np.uint16]],
    *,
    um_per_px: float,
    channels: Sequence[Channel],
    name: str,
    attributes: Mapping[str, Any] | None = None,
    slide_mpp: float = 0.0,
    downsampling: str = "",
) -> None:
    """Write a pyramid as an OME-NGFF 0.5 image; the same input gives the same bytes.

    The group appears complete or not at all; an image already at `path` is replaced. The module says where its pixels
    lie in µm.

    Parameters
    ----------
    path : path-like
        A directory, usually named ``*.ome.zarr``.
    levels : sequence of uint16 ndarray, shape (C, Y, X)
        Full map first, each next one half the size (rounded up or down). 0 is "not evaluated".
    um_per_px : float
        µm per px of the full map.
    channels : sequence of Channel
        One for each of C.
    name : str
        Name of the image.
    attributes : mapping, optional
        JSON values of our own, under ``slidescan``.
    slide_mpp : float
        µm per level-0 px of the slide, to put the world's origin on the centre of its first pixel; 0 puts it on the
        slide's corner.
    downsampling : str
        How the levels were made, such as ``max``; empty to leave it unsaid.

    Raises
    ------
    ConfigError
        If levels, channels, scale or attributes do not fit the format.
    ResultError
        If the file system refuses, or something that is no zarr group is in the way.

    Examples
    --------
    >>> import tempfile
    >>> full = np.arange(16, dtype=np.uint16).reshape(1, 4, 4)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     path = Path(folder) / "map.ome.zarr"
    ...     write_ngff(path, [full, full[:, ::2, ::2]], um_per_px=8.0, channels=[Channel("score")], name="map")
    ...     levels, _ = read_ngff(path)
    >>> [level.shape for level in levels]
    [(1, 4, 4), (1, 2, 2)]
    """
    target = Path(path)
    _check(target.name, levels, channels, um_per_px, slide_mpp)
    metadata = _metadata(len(levels), um_per_px, slide_mpp, channels, name, downsampling)
    try:
        own = json.loads(json.dumps(dict(attributes or {}), allow_nan=False))
    except (TypeError, ValueError) as exc:
        raise ConfigError(f"{target.name}: expected attributes that JSON can hold, got {exc}; convert them") from exc
    if target.exists() and not (target / "zarr.json").is_file():
        raise ResultError(
            f"{target.name}: expected a zarr group or nothing at the path, got something else; move it away"
        )
    sweep(target.parent)
    part = aside(target)
    try:
        shutil.rmtree(part, ignore_errors=True)
        group = zarr.create_group(part, zarr_format=3, attributes={"ome": metadata, "slidescan": own})
        for k, level in enumerate(levels):
            array = group.create_array(
                str(k),
                shape=level.shape,
                dtype="uint16",
                chunks=_CHUNK_CYX,
                filters=None,
                serializer=BytesCodec(endian="little"),
                compressors=ZstdCodec(level=_ZSTD_LEVEL, checksum=False),
                fill_value=0,
                dimension_names=("c", "y", "x"),
                config={"write_empty_chunks": False},
            )
            array[...] = level
        flush(part)
        _swap(part, target)
    except OSError as exc:
        raise disk_error(target, exc) from exc
    finally:
        shutil.rmtree(part, ignore_errors=True)


def read_ngff(path: str | os.PathLike[str]) -> tuple[list[NDArray[np.uint16]], dict[str, Any]]:
    """Read back what `write_ngff` wrote.

    Parameters
    ----------
    path : path-like
        The group's directory.

    Returns
    -------
    levels : list of uint16 ndarray, shape (C, Y, X)
        Full map first.
    attributes : dict
        Our own attributes.

    Raises
    ------
    ResultError
        If it is missing, damaged, or not such an image.
    """
    source = Path(path)
    if not (source / "zarr.json").is_file():
        raise ResultError(f"{source.name}: expected an OME-NGFF 0.5 group in {source.parent}, got none; scan again")
    try:
        group = zarr.open_group(source, mode="r", zarr_format=3)
        ome = group.attrs["ome"]
        levels = [np.asarray(group[d["path"]][...]) for d in ome["multiscales"][0]["datasets"]]
        attributes = dict(group.attrs["slidescan"])
    # What zarr and its codecs raise on damaged metadata and chunks.
    except (OSError, KeyError, IndexError, TypeError, ValueError, RuntimeError) as exc:
        raise ResultError(
            f"{source.name}: expected an OME-NGFF 0.5 image by slidescan, got {type(exc).__name__}; scan again"
        ) from exc
    if not levels or any(level.ndim != 3 or level.dtype != np.uint16 for level in levels):
        raise ResultError(f"{source.name}: expected uint16 levels with axes c, y, x, got others; scan again")
    return levels, attributes


def _swap(part: Path, target: Path) -> None:
    # A directory cannot be replaced in one step: the old one steps aside, so that at no time is half a map at the path.
    old = target.with_name(part.name + ".old")
    if target.exists():
        target.rename(old)
    part.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def _check(
    name: str, levels: Sequence[NDArray[Any]], channels: Sequence[Channel], um_per_px: float, slide_mpp: float
) -> None:
    if not levels or any(level.ndim != 3 or level.dtype != np.uint16 or not level.size for level in levels):
        raise ConfigError(f"{name}: expected one or more uint16 levels (C, Y, X), got other shapes or types")
    if any(len(level) != len(channels) for level in levels):
        raise ConfigError(f"{name}: expected {len(channels)} channels in each level, got {[len(v) for v in levels]}")
    for fine, coarse in pairwise(levels):
        for n, half in zip(fine.shape[1:], coarse.shape[1:], strict=True):
            if half not in (max(1, n // 2), (n + 1) // 2):
                raise ConfigError(
                    f"{name}: expected each level half the one before, got {fine.shape[1:]} then {coarse.shape[1:]}"
                )
    if not (np.isfinite(um_per_px) and um_per_px > 0 and np.isfinite(slide_mpp) and slide_mpp >= 0):
        raise ConfigError(f"{name}: expected um_per_px > 0 and slide_mpp >= 0, got {um_per_px} and {slide_mpp}")


def _metadata(
    n_levels: int, um_per_px: float, slide_mpp: float, channels: Sequence[Channel], name: str, downsampling: str
) -> dict[str, Any]:
    axes: list[dict[str, str]] = [{"name": "c", "type": "channel"}]
    axes += [{"name": axis, "type": "space", "unit": "micrometer"} for axis in ("y", "x")]
    datasets = []
    for k in range(n_levels):
        scale = float(um_per_px) * 2**k
        shift = (scale - float(slide_mpp)) / 2
        transforms = [
            {"type": "scale", "scale": [1.0, scale, scale]},
            {"type": "translation", "translation": [0.0, shift, shift]},
        ]
        datasets.append({"path": str(k), "coordinateTransformations": transforms})
    multiscale = {"name": name, "axes": axes, "datasets": datasets}
    if downsampling:
        multiscale["type"] = downsampling
    shown = {"channels": [channel._omero() for channel in channels], "rdefs": {"model": "color"}}
    return {"version": "0.5", "multiscales": [multiscale], "omero": shown}
