"""`Slide`: any whole-slide image as one plane of RGB pixels at the µm/px asked for.

Hides level choice, padding, colour, holes, and the life of file handles. Invariants: outside the slide is white; what
cannot be decoded is white and reported, and costs nothing else; a label or macro image is never touched. Handles never
travel: a slide pickles as its path and options, and opens on first use, once a process.
"""

from __future__ import annotations

import hashlib
import math
import operator
import os
import threading
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from slidescan.errors import ConfigError, ResolutionError, SlideReadError
from slidescan.geometry import Box, Frame
from slidescan.heap import pixels
from slidescan.slides.colour import ToSrgb
from slidescan.slides.fingerprint import fingerprint
from slidescan.slides.remote import Remote, Where
from slidescan.slides.resample import Block, resample
from slidescan.slides.resolution import Resolution, override
from slidescan.slides.source import WHITE, Facts, Level, Pixels, Source
from slidescan.slides.zarr import ZarrSource

__all__ = ["Color", "Slide"]

Color = Literal["raw", "srgb"]

_TOLERANCE = (
    0.03  # relative µm/px; scanners of one model differ by this much, and resampling blurs more than it corrects
)
_SAME = 1e-9  # relative; two µm/px closer than this are one number with float round-off


class Slide:
    """One whole-slide image; make it with `open_slide` or `memory_slide`.

    Reading is safe from many threads. `close` (or leaving a ``with`` block) drops the file handles once running reads
    are done; a later read opens them again.

    Examples
    --------
    >>> import numpy as np
    >>> from slidescan.slides import memory_slide
    >>> slide = memory_slide(np.zeros((100, 200, 3), np.uint8), mpp=0.25)
    >>> slide
    Slide('memory', 200 × 100 px, 0.25 µm/px, memory)
    >>> plane = slide.plane(0.5)
    >>> plane
    Frame(size_wh=(100, 50), mpp=0.5)
    >>> slide.read(90, 40, 20, 20, plane).rgb[0, :, 0].tolist() == [0] * 10 + [255] * 10
    True
    """

    def __init__(
        self, path: Where, opener: Callable[[], Source], *, mpp: float | None = None, color: Color = "raw"
    ) -> None:
        if color not in ("raw", "srgb"):
            raise ConfigError(f'color: expected "raw" or "srgb", got {color!r}')
        self.path = path
        self._opener, self._mpp, self._color = opener, mpp, color
        self._override: Resolution | None = None if mpp is None else override(mpp)
        self._lock = threading.RLock()
        self._source: Source | None = None
        self._pid = os.getpid()

    @property
    def name(self) -> str:
        """The file's stem; of ``x.ome.zarr``, ``x``."""
        stem = self.path.stem
        return stem.removesuffix(".ome") if self.path.suffix.lower() in (".zarr", ".tif", ".tiff") else stem

    @property
    def backend(self) -> str:
        """Which reader: tiff, openslide, zarr, image or memory."""
        return self._facts.backend

    @property
    def color(self) -> Color:
        """Whether pixels come raw or converted to sRGB by the slide's ICC profile."""
        return self._color

    @property
    def vendor(self) -> str | None:
        """Scanner vendor or format family, where known."""
        return self._facts.vendor

    @property
    def levels(self) -> tuple[Level, ...]:
        """The pyramid, largest first."""
        return self._facts.levels

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height, level-0 px."""
        return self.levels[0].size_wh

    @property
    def others(self) -> int:
        """Further images in the file that may be slides, too, and are not read."""
        return self._facts.others

    @property
    def bounds_l0(self) -> Box | None:
        """The scanned rectangle in level-0 px where the file names one; viewers may crop to it, slidescan does not."""
        return self._facts.bounds_l0

    @property
    def mpp(self) -> float | None:
        """µm per level-0 px, or None where it is missing or implausible (`frame` says why)."""
        return self._resolution.mpp

    @property
    def mpp_source(self) -> str:
        """Who said the µm/px: override, aperio, ome-xml, tiff-resolution, openslide, dicom, ngff, memory or none."""
        return self._resolution.source

    @property
    def mpp_problem(self) -> str | None:
        """Why `mpp` is None, in words; None where it is known."""
        return self._resolution.problem

    @property
    def frame(self) -> Frame:
        """The level-0 plane.

        Raises
        ------
        ResolutionError
            If the µm/px is missing or implausible; the message says how to give it.
        """
        if self.mpp is None:
            raise ResolutionError(
                f"{self.path.name}: its µm/px must be known to scan at the right scale, but {self.mpp_problem}; "
                f"give the scanner's own, such as --mpp 0.25 for 40x or --mpp 0.5 for 20x (mpp=0.25 in Python)"
            )
        return Frame(self.size_wh, self.mpp)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 that identifies the slide's content, whatever its path."""
        source = self._opened()
        arrays = getattr(source, "arrays", None)  # in memory, or of a picture that is decoded when it is read
        if arrays is not None:
            digest = hashlib.sha256()
            for pixels in arrays:
                digest.update(repr(pixels.shape).encode())
                digest.update(np.ascontiguousarray(pixels).data)
            return digest.hexdigest()
        if isinstance(self.path, Path) and not self.path.exists():
            raise SlideReadError(f"{self.path.name}: the file is gone")
        pieces = source.pieces() if isinstance(source, ZarrSource) and isinstance(self.path, Remote) else None
        return fingerprint(self.path, self.size_wh, pieces)

    def plane(self, mpp: float, tolerance: float = _TOLERANCE) -> Frame:
        """Return the plane a model trained at `mpp` reads.

        A level whose own µm/px is within `tolerance` (relative) is taken as it is, so the plane's `mpp` may differ a
        little from the one asked for: convert with the plane's. Otherwise the plane has exactly `mpp` and is resampled
        from the nearest finer level (from level 0 when the slide itself is coarser).

        Raises
        ------
        ResolutionError
            If the slide's µm/px is not known.
        ConfigError
            If `mpp` is not a positive number.
        """
        if not (math.isfinite(mpp) and mpp > 0):
            raise ConfigError(f"mpp: expected a positive number of µm/px, got {mpp!r}")
        frame = self.frame
        closest = min(self.levels, key=lambda level: abs(math.log(frame.mpp * level.downsample / mpp)))
        own = frame.mpp * closest.downsample
        return Frame(closest.size_wh, own) if abs(own / mpp - 1) <= tolerance else frame.at(mpp)

    def read(self, x: int, y: int, width: int, height: int, plane: Frame) -> Pixels:
        """Read a block of `plane`.

        Parameters
        ----------
        x, y, width, height : int
            Plane px; the block may reach outside the slide, where it is white.
        plane : Frame
            From `plane` (or `frame.at`): the same extent as this slide.

        Returns
        -------
        Pixels
            ``rgb`` (height, width, 3); ``holes`` in plane px.

        Raises
        ------
        SlideReadError
            If the file is gone. A tile that cannot be decoded is a hole, never an error.
        ConfigError
            If `plane` is not a plane of this slide.
        """
        x, y, width, height = (operator.index(n) for n in (x, y, width, height))
        if width <= 0 or height <= 0:
            raise ConfigError(f"{self.path.name}: a block must have a size, got {width} × {height} px")
        scale = plane.mpp / self.frame.mpp
        if not self._fits(plane.size_wh, scale):
            raise ConfigError(f"{self.path.name}: {plane} is not a plane of this slide ({self.frame}); use plane(mpp)")
        for index, level in enumerate(self.levels):
            if level.size_wh == plane.size_wh and abs(scale / level.downsample - 1) <= _SAME:
                return self.read_level(index, x, y, width, height)
        return self._padded(x, y, width, height, plane.size_wh, partial(self._resampled, scale))

    def read_level(self, level: int, x: int, y: int, width: int, height: int) -> Pixels:
        """Read a block of a pyramid level as stored: needs no µm/px; x, y, width and height in level px."""
        return self._padded(x, y, width, height, self.levels[level].size_wh, partial(self._fill, level))

    def thumbnail(self, max_px: int) -> tuple[Pixels, Frame]:
        """Return the whole slide with at most `max_px` on the longer side, and the plane those px are in.

        Level-0 px = thumbnail px × ``plane.factor_to(slide.frame)``. Never larger than level 0. A level of the slide is
        taken as it is where one has half as many px or more: to read a finer one takes up to sixteen times as long. A
        slide without smaller levels is streamed: memory stays bounded.
        """
        frame = self.frame
        for level in self.levels:
            if max_px / 2 <= max(level.size_wh) <= max_px and self._fits(level.size_wh, level.downsample):
                plane = Frame(level.size_wh, frame.mpp * level.downsample)
                return self.read(0, 0, *plane.size_wh, plane), plane
        shrink = max(frame.size_wh) / max(1, max_px)
        plane = frame if shrink <= 1 else frame.at(frame.mpp * shrink)
        return self.read(0, 0, *plane.size_wh, plane), plane

    def _fits(self, size_wh: tuple[int, int], scale: float) -> bool:
        """Return whether so many px of `scale` level-0 px each are the whole slide."""
        return all(abs(n * scale - n0) <= 2 * scale + 1 for n, n0 in zip(size_wh, self.size_wh, strict=True))

    def close(self) -> None:
        """Let go of the file handles; running reads finish first, a later read opens them again."""
        with self._lock:
            self._source = None

    def __enter__(self) -> Slide:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        width, height = self.size_wh
        scale = "µm/px unknown" if self.mpp is None else f"{self.mpp:.6g} µm/px"
        return f"Slide({self.name!r}, {width} × {height} px, {scale}, {self.backend})"

    def __reduce__(self) -> tuple[Any, ...]:
        from slidescan.slides.open import revive

        # A file behind a URL has no stamp: one that was replaced since is known by this.
        known = vars(self).get("fingerprint") if isinstance(self.path, Remote) else None
        return revive, (self.path, self._opener, self._mpp, self._color, known)

    def colored(self, color: Color) -> Slide:
        """Return the slide with its pixels in `color`: itself if they are so already."""
        return self if color == self._color else Slide(self.path, self._opener, mpp=self._mpp, color=color)

    def anew(self) -> Slide:
        """Return the slide that lies at its place now."""
        return Slide(self.path, self._opener, mpp=self._mpp, color=self._color)

    def opened(self) -> Slide:
        """Open the file now, so that what is wrong with it is said here; return self."""
        self._opened()
        _ = self._to_srgb  # a damaged ICC profile is said now, too
        return self

    def _opened(self) -> Source:
        """Return the source, opened on first use and anew in a forked process."""
        source = self._source
        if source is not None and self._pid == os.getpid():
            return source
        with self._lock:
            if self._source is None or self._pid != os.getpid():
                source = self._opener()
                known = self.__dict__.get("_facts", source.facts)
                if known != source.facts:
                    raise SlideReadError(f"{self.path.name}: the file changed since it was opened; open it again")
                self._source, self._pid = source, os.getpid()
            return self._source

    @cached_property
    def _facts(self) -> Facts:
        return self._opened().facts

    @property
    def _resolution(self) -> Resolution:
        return self._override or self._facts.resolution

    @cached_property
    def _to_srgb(self) -> ToSrgb | None:
        icc = self._facts.icc
        return ToSrgb(self.path.name, icc) if self._color == "srgb" and icc else None

    def _padded(
        self,
        x: int,
        y: int,
        width: int,
        height: int,
        size_wh: tuple[int, int],
        inside: Callable[[NDArray[np.uint8], int, int, int, int], list[Box]],
    ) -> Pixels:
        """Put the part inside the slide on white, in the slide's colour, holes clipped and painted."""
        out = pixels(height, width)
        x0, y0, x1, y1 = Box(x, y, x + width, y + height).clip(Box(0, 0, *size_wh)).round_out()
        if x0 >= x1 or y0 >= y1:
            out[...] = WHITE
            return Pixels(out)
        rows = out[y0 - y : y1 - y]
        part = rows[:, x0 - x : x1 - x]
        for outside in (out[: y0 - y], out[y1 - y :], rows[:, : x0 - x], rows[:, x1 - x :]):
            outside[...] = WHITE
        failed = inside(part, x0, y0, x1, y1)
        if self._to_srgb is not None:
            part[...] = self._to_srgb(part)
        holes = [hole.clip(Box(x0, y0, x1, y1)) for hole in failed]
        holes = [Box(*hole.round_out()) for hole in holes if not hole.is_empty]
        for hole in holes:
            left, top, right, bottom = hole.round_out()
            out[top - y : bottom - y, left - x : right - x] = WHITE
        return Pixels(out, tuple(sorted(set(holes))))

    def _fill(self, level: int, out: NDArray[np.uint8], x0: int, y0: int, x1: int, y1: int) -> list[Box]:
        """Put level px where they belong."""
        return self._opened().read_level(level, x0, y0, out)

    def _resampled(self, scale: float, out: NDArray[np.uint8], x0: int, y0: int, x1: int, y1: int) -> list[Box]:
        """Put plane px of `scale` level-0 px where they belong."""
        out[...], failed = resample(self._stored, self.levels, scale, x0, y0, x1, y1)
        return failed

    def _stored(self, level: int, x0: int, y0: int, x1: int, y1: int) -> Block:
        out = pixels(y1 - y0, x1 - x0)
        return out, self._opened().read_level(level, x0, y0, out)
