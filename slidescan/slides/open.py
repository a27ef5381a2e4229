"""Choosing the reader for a path, and keeping a few slides open in each process.

Hides detection by content (by suffix only MIRAX, whose named file is a preview) and the pool. Invariants: "auto" reads
a TIFF itself where it is sure of the layout and asks OpenSlide otherwise; what is damaged or unsafe for one reader is
not tried on another; the pool never closes a slide under a reader: an evicted slide lives until its last user lets go.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import (
    ConfigError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
    SlideReadError,
    SlideUnsupportedError,
    SlideWarning,
)
from slidescan.geometry import Box
from slidescan.slides.fingerprint import stamp
from slidescan.slides.ifd import is_tiff
from slidescan.slides.memory import MemorySource, image_source, is_image
from slidescan.slides.remote import Remote, Where, locate
from slidescan.slides.resolution import NOTHING, override
from slidescan.slides.slide import Color, Slide
from slidescan.slides.source import Declined, Source

__all__ = ["Backend", "memory_slide", "open_slide", "pooled", "revive"]

Backend = Literal["auto", "tiff", "openslide", "zarr"]

_POOL_SLIDES = (
    8  # open slides a process; a worker has one or two in flight, and each OpenSlide handle costs descriptors
)
_pool: OrderedDict[tuple[object, ...], Slide] = OrderedDict()
_pool_lock = threading.Lock()


def open_slide(
    path: str | PathLike[str],
    *,
    mpp: float | None = None,
    backend: Backend = "auto",
    color: Color = "raw",
    verify: bool = False,
) -> Slide:
    """Open a whole-slide image.

    Parameters
    ----------
    path : path
        A slide file (SVS, TIFF, OME-TIFF, NDPI, MRXS, DICOM, …), an OME-Zarr directory, or a small PNG or JPEG; or the
        URL of a TIFF file or an OME-Zarr directory (https, s3 and what else fsspec knows), read in parts.
    mpp : float, optional
        µm per level-0 px; wins over what the file says.
    backend : {"auto", "tiff", "openslide", "zarr"}
        The reader. "auto" takes the fastest that reads the file faithfully; pixels are the same.
    color : {"raw", "srgb"}
        "srgb" converts with the slide's ICC profile, where it has one.
    verify : bool
        Compare a few tiles of a TIFF file with OpenSlide's. Where they differ OpenSlide reads the slide, with a
        `SlideWarning`, as where there was nothing to compare with.

    Raises
    ------
    SlideNotFoundError
        If nothing is there.
    SlideFormatError
        If it is not a slide, damaged, or unsafe to open. A missing µm/px is no error here: `Slide.frame` raises.
    SlideReadError
        If it cannot be read at all.
    ConfigError
        If an option is out of range.

    Warns
    -----
    SlideWarning
        If the file holds further images that may be slides, too: only one is read.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend: expected one of {', '.join(get_args(Backend))}, got {backend!r}")
    where = locate(path)
    slide = Slide(where, _FileOpener(where, backend), mpp=mpp, color=color).opened()
    if verify and slide.backend == "tiff" and not _agrees(where, backend):
        slide = Slide(where, _FileOpener(where, "openslide"), mpp=mpp, color=color).opened()
    if slide.others:
        more = f"{slide.others} more image{'s' * (slide.others > 1)}"
        warnings.warn(
            f"{where.name}: holds {more}, not read; export each as a file of its own", SlideWarning, stacklevel=2
        )
    return slide


def _agrees(where: Where, backend: Backend) -> bool:
    """Return whether OpenSlide sees the same or cannot be asked; warn where not."""
    from slidescan.slides.verify import difference

    said = None
    try:
        if isinstance(where, Path):
            said = difference(_FileOpener(where, backend)(), where)
        else:
            warnings.warn(f"{where.name}: not verified: OpenSlide reads no URL", SlideWarning, stacklevel=3)
    except SlideError:
        warnings.warn(f"{where.name}: not verified: OpenSlide cannot open it", SlideWarning, stacklevel=3)
    if said is not None:
        warnings.warn(
            f"{where.name}: the fast reader differs from OpenSlide {said}; OpenSlide reads it, slower; "
            "please report the scanner and its software",
            SlideWarning,
            stacklevel=3,
        )
    return said is None


def memory_slide(
    pixels: NDArray[np.uint8] | Sequence[NDArray[np.uint8]],
    mpp: float | None,
    *,
    name: str = "memory",
    bounds_l0: Box | None = None,
    holes: Sequence[Box] = (),
) -> Slide:
    """Make a slide of arrays: uint8 (H, W, 3), or (H, W, 4) with straight alpha; a list is a pyramid.

    `holes` are boxes in level-0 px that read as undecodable. The slide pickles with its pixels.

    Examples
    --------
    >>> import numpy as np
    >>> slide = memory_slide(np.zeros((64, 64, 3), np.uint8), 0.25, holes=[Box(0, 0, 8, 8)])
    >>> slide.read(4, 4, 10, 10, slide.frame).holes
    (Box(x0=4, y0=4, x1=8, y1=8),)
    """
    levels = [pixels] if isinstance(pixels, np.ndarray) else list(pixels)
    resolution = NOTHING if mpp is None else replace(override(mpp), source="memory")
    source = MemorySource(levels, resolution, name=name, bounds_l0=bounds_l0, holes_l0=holes)
    return Slide(Path(name), _Held(source))


def pooled(
    path: str | PathLike[str], *, mpp: float | None = None, backend: Backend = "auto", color: Color = "raw"
) -> Slide:
    """Return this process's slide for a path and options, opened once and shared; a file replaced on disk opens anew.

    Meant for workers that get a path with every task. Do not close it; the pool keeps the 8 used last.
    """
    where = locate(path)
    return revive(where, _FileOpener(where, backend), mpp, color).opened()


def revive(
    path: Where, opener: Callable[[], Source], mpp: float | None, color: Color, known: str | None = None
) -> Slide:
    """Rebuild a pickled slide: from the pool, unopened where it is not there yet; `known` tells it from one before."""
    if not isinstance(opener, _FileOpener):
        return Slide(path, opener, mpp=mpp, color=color)
    key = (opener, mpp, color, stamp(path), _inode(path), known)
    with _pool_lock:
        slide = _pool.pop(key, None) or Slide(path, opener, mpp=mpp, color=color)
        _pool[key] = slide
        while len(_pool) > _POOL_SLIDES:
            _pool.popitem(last=False)
    return slide


def _inode(path: Where) -> int:
    with contextlib.suppress(OSError):  # gone: opening will say so
        return path.stat().st_ino if isinstance(path, Path) else 0
    return 0


@dataclass(frozen=True, slots=True)
class _Held:
    """Gives back a source that lives in memory."""

    source: Source

    def __call__(self) -> Source:
        return self.source


@dataclass(frozen=True, slots=True)
class _FileOpener:
    """Opens a path with a backend; what travels in place of handles."""

    path: Where
    backend: Backend

    def __call__(self) -> Source:
        return self._remote(self.path) if isinstance(self.path, Remote) else self._local(self.path)

    def _local(self, path: Path) -> Source:
        name = path.name
        try:
            if path.is_dir():
                return self._directory(path)
            with path.open("rb") as file:
                head = file.read(16)
        except SlideError:
            raise
        except FileNotFoundError as exc:
            raise SlideNotFoundError(f"{path}: no such slide; check the path") from exc
        except OSError as exc:
            raise SlideReadError(f"{name}: cannot be opened ({exc.strerror})") from exc
        if not head:
            raise SlideFormatError(f"{name}: expected a slide, the file is empty; copy it again")
        if self.backend == "zarr":
            raise SlideFormatError(f'{name}: expected an OME-Zarr directory, this is a file; use backend="auto"')
        if self.backend == "tiff":
            return self._tiff(path)
        if self.backend == "openslide":
            return self._openslide(path)
        if path.suffix.lower() == ".mrxs":
            if not path.with_suffix("").is_dir():
                raise SlideFormatError(
                    f"{name}: expected the folder of a MIRAX slide beside it, {path.stem}/, found none; this file is "
                    "only a preview: copy both"
                )
            return self._openslide(path)
        if is_image(head):
            return image_source(path)
        if not is_tiff(head):
            return self._openslide(path)
        try:
            return self._tiff(path)
        except Declined as declined:
            try:
                return self._openslide(path)
            except SlideFormatError as refused:
                # Each says "name: reason": the name once is enough.
                reasons = [str(error).removeprefix(f"{name}: ") for error in (declined, refused)]
                raise SlideFormatError(f"{name}: no reader can open it: {'; '.join(reasons)}") from refused

    def _remote(self, path: Remote) -> Source:
        from slidescan.slides.zarr import ZarrSource

        if self.backend == "openslide":
            raise ConfigError(f'{path!r}: OpenSlide reads no URL; copy the slide to this machine or use backend="auto"')
        if self.backend == "zarr" or (self.backend == "auto" and path.in_zarr):
            return ZarrSource(path)
        try:
            return self._tiff(path)
        except Declined as declined:
            raise SlideUnsupportedError(
                f"{declined}; only TIFF files and OME-Zarr (.zarr) are read from a URL; copy the slide to this machine"
            ) from declined

    def _directory(self, path: Path) -> Source:
        from slidescan.slides.ngff import is_zarr
        from slidescan.slides.zarr import ZarrSource

        name = path.name
        if is_zarr(path) and self.backend in ("auto", "zarr"):
            return ZarrSource(path)
        if any(path.glob("*.dcm")):
            raise SlideFormatError(f"{name}: a directory of DICOM files; name one .dcm file of the slide in it")
        raise SlideFormatError(f"{name}: expected a slide, this is a directory; name a slide file in it")

    def _tiff(self, path: Where) -> Source:
        from slidescan.slides.tiff import TiffSource

        return TiffSource(path)

    def _openslide(self, path: Path) -> Source:
        from slidescan.slides.openslide import OpenSlideSource

        return OpenSlideSource(path)
