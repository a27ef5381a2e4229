"""One region, from pixels to a committed part: what a single Dask task does.

A task receives where to look, never pixels; it opens the slide itself, reads the region once, scores its tiles in
batches, keeps what each tile owns, and commits one file atomically. So memory is bounded by regions in flight, and
a killed run loses at most the regions in flight.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from slidescan.commit import commit
from slidescan.detections import Detections, Detector
from slidescan.endings import lost_device
from slidescan.errors import ModelError
from slidescan.geometry import Box, Frame
from slidescan.heap import give_back_freed, keep_freed
from slidescan.plan import Region, Tile
from slidescan.slides import Slide
from slidescan.slides.fingerprint import unchanged
from slidescan.stages import stage, taken
from slidescan.stitch import owned
from slidescan.suspects import being_read
from slidescan.timeouts import start_anew, within

__all__ = ["RegionPart", "RegionTask", "batches", "cut", "is_full", "scored_at_once", "wanted"]

# Share of a detector's queries in use from which a tile counts as full: RF-DETR users report cells lost from 0.8 on.
_SATURATED_SHARE = 0.8
_IN_USE_SCORE = 0.05  # below it, and below the detector's threshold, every query says something
# A full tile is quartered, and its quarters once more: 16 times the queries for the same tissue.
_MOST_SPLITS = 2
# Steps to which boxes (per px), scores and attributes are rounded: finer than any detector's jitter, and coarser by far
# than the float noise (1e-8) between numbers of threads, so that it does not show in the result.
_BOX_STEPS_PER_PX = 64
_SCORE_STEPS = 10_000
# On a CPU scoring uses every core by itself: two regions scored at once in one process would only fight for them. A GPU
# idles while a region's tiles are cut and its detections sorted out: the second region fills the gaps. The reading of
# the next ones runs beside it.
_ON_CPU, _ON_GPU = 1, 2
_SCORING = {slots: threading.BoundedSemaphore(slots) for slots in (_ON_CPU, _ON_GPU)}
# Directories of parts that this process has stopped waiting for.
_UNWANTED: set[Path] = set()


class _UnwantedError(Exception):
    """Nobody waits for this region any more."""


@contextmanager
def wanted(parts: Path, *, here: bool) -> Iterator[None]:
    """Have regions of a directory that threads of this process are at end with their batch, uncommitted, on failure.

    A thread cannot be ended from outside, and who pressed Ctrl-C would wait half a minute for what is lost anyway. Not
    `here`: they are on a cluster, where this process may be one of those that do them for the next scan.
    """
    _UNWANTED.discard(parts)
    try:
        yield
    except BaseException:
        if here:
            _UNWANTED.add(parts)
        raise


@dataclass(frozen=True, slots=True, eq=False)
class RegionPart:
    """What one region found, in px of the model's plane, before stitching."""

    detections: Detections
    tile: NDArray[np.intp]
    """Row of `cores` each detection came from, (N,)."""
    cores: NDArray[np.float64]
    """Core of every tile that was scored, (T, 4)."""
    failed: NDArray[np.float64]
    """Boxes that could not be read, (H, 4)."""
    saturated: NDArray[np.float64]
    """Cores that stayed full after re-tiling, (U, 4)."""
    n_retiled: int
    crashed: bool = False
    """Whether reading it kills the process; then none of it was scored."""
    runs_on: str = ""
    """Device and precision it was scored with; empty where none of it was."""

    @classmethod
    def given_up(cls, region: Region) -> RegionPart:
        """Return what is left of a region whose reading kills the process: nothing but where it is."""
        cores = _rows([tile.core for tile in region.tiles])
        return cls(Detections.empty(), np.empty(0, np.intp), cores[:0], cores, cores[:0], 0, crashed=True)

    def save(self, path: Path) -> None:
        """Commit to `path` atomically: a reader sees the whole part or none."""

        def write(partial: Path) -> None:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    xyxy=self.detections.xyxy,
                    score=self.detections.score,
                    label=self.detections.label,
                    attributes=self.detections.attributes,
                    tile=self.tile,
                    cores=self.cores,
                    failed=self.failed,
                    saturated=self.saturated,
                    n_retiled=np.array(self.n_retiled),
                    crashed=np.array(self.crashed),
                    runs_on=np.array(self.runs_on),
                )

        commit(path, write)

    @classmethod
    def load(cls, path: Path) -> RegionPart | None:
        """Read a committed part; None if it is damaged (the region is then done again)."""
        try:
            # np.load leaves a damaged file open when given its path.
            with path.open("rb") as file, np.load(file, allow_pickle=False) as data:
                return cls(
                    Detections(data["xyxy"], data["score"], data["label"], data["attributes"]),
                    data["tile"],
                    data["cores"],
                    data["failed"],
                    data["saturated"],
                    int(data["n_retiled"]),
                    bool(data["crashed"]),
                    str(data["runs_on"]) if "runs_on" in data else "",
                )
        except (OSError, ValueError, KeyError, EOFError, BadZipFile, RuntimeError):  # "encrypted" is a RuntimeError
            return None


@dataclass(frozen=True, slots=True)
class RegionTask:
    """Everything a worker needs to do one region; pickles small (a path, boxes, a model's name)."""

    slide: Slide
    detector: Detector
    region: Region
    plane: Frame
    halo_px: int
    slack_px: float
    batch_tiles: int
    min_score: float
    part: Path
    stamp: tuple[int, ...] = ()
    """Of the slide's file when the scan began."""
    limit_s: float | None = None
    """Longest its reading, and its scoring, may each take before the worker process is ended."""

    @property
    def late(self) -> Path:
        """The mark of a region that took too long."""
        return self.part.with_suffix(".late")

    @property
    def lost(self) -> Path:
        """The mark of a region that lost its device, with what the driver said."""
        return self.part.with_suffix(".lost")

    @property
    def block(self) -> tuple[int, int, int, int]:
        """What is read: x, y, width and height, px of the plane."""
        x0, y0, x1, y1 = self.region.read.round_out()
        return x0, y0, x1 - x0, y1 - y0

    def run(self) -> dict[str, float]:
        """Score the region, commit its part, and return seconds by stage."""
        keep_freed()
        taken()  # what a region before this one left that failed
        if RegionPart.load(self.part) is not None:  # by a worker that died before it could say so
            return taken()
        try:
            part = self.score()
        except _UnwantedError:
            return taken()
        with stage("write"):
            part.save(self.part)
            self.lost.unlink(missing_ok=True)
            give_back_freed()
        return taken()

    def score(self) -> RegionPart:
        """Read and score the region without committing anything."""
        self._ask_if_wanted()
        x0, y0, _, _ = block = self.block
        with within(self.limit_s, self.late), being_read(self.part), stage("assemble"):
            pixels = self.slide.read(*block, self.plane)
        unchanged(self.slide.path, self.stamp)  # or what a file has lost meanwhile would be taken for holes of this one

        cores: list[Box] = []
        saturated: list[Box] = []
        kept: list[Detections] = []
        n_retiled = 0
        tiles, splits = list(self.region.tiles), 0
        limit = within(self.limit_s, self.late)
        with stage("wait"), _SCORING[scored_at_once(self.detector)], limit, stage("model"):
            # One generation after the other: whole tiles, then the quarters of the full ones, then theirs.
            while tiles:
                smaller: list[Tile] = []
                for tile, found in self._detect(tiles, pixels.rgb, x0, y0):
                    full = is_full(found, self.detector)
                    quarters = tile.quarters(self.halo_px) if full and splits < _MOST_SPLITS else ()
                    if quarters:
                        n_retiled += 1
                        smaller += quarters
                        continue
                    if full:
                        saturated.append(tile.core)
                    kept.append(self._own(tile, found))
                    cores.append(tile.core)
                tiles, splits = smaller, splits + 1
        return RegionPart(
            Detections.concat(kept),
            np.repeat(np.arange(len(kept)), [len(k) for k in kept]),
            _rows(cores),
            _rows([hole.clip(self.plane.bounds) for hole in pixels.holes]),
            _rows(saturated),
            n_retiled,
            runs_on=self.detector.runs_on,
        )

    def _ask_if_wanted(self) -> None:
        if self.part.parent in _UNWANTED:
            raise _UnwantedError

    def _detect(self, tiles: list[Tile], rgb: NDArray[np.uint8], x0: int, y0: int) -> Iterator[tuple[Tile, Detections]]:
        """Score tiles of one size in batches; `rgb` starts at plane px (`x0`, `y0`)."""
        for batch in batches(tiles, self.batch_tiles, by_row=scored_at_once(self.detector) == _ON_CPU):
            self._ask_if_wanted()
            with stage("batch"):
                windows = cut(rgb, batch, x0, y0)
            try:
                found = self.detector.detect(windows, self.min_score)
            except Exception as exc:
                if not (said := lost_device(exc)):
                    raise
                start_anew(self.lost, said)
                told = f"{self.detector.runs_on}: the device failed ({said}); run the same command again"
                raise ModelError(told) from exc
            numbers = [column for each in found for column in (each.xyxy, each.score)]
            if len(found) != len(batch) or not all(np.isfinite(column).all() for column in numbers):
                raise ModelError(f"{self.detector.name}: expected finite boxes and scores, a table of them a tile")
            yield from zip(batch, found, strict=True)

    def _own(self, tile: Tile, found: Detections) -> Detections:
        """Return what the tile keeps, in plane px and rounded; what has its centre on the slide, whole.

        Cut at the slide's edge, the copies of two tiles would have their centres elsewhere than they were judged by.
        """
        placed = found.moved(1.0, tile.read.x0, tile.read.y0)
        bounds = self.plane.bounds
        kept = placed[owned(placed, tile.core, tile.read, bounds, slack=self.slack_px)]
        x, y = kept.centers.T
        kept = kept[np.asarray((x >= 0) & (y >= 0) & (x < bounds.x1) & (y < bounds.y1))]
        score, attributes = (
            np.round(column.astype(np.float64) * _SCORE_STEPS).astype(np.float32) / np.float32(_SCORE_STEPS)
            for column in (kept.score, kept.attributes)
        )
        return Detections(np.round(kept.xyxy * _BOX_STEPS_PER_PX) / _BOX_STEPS_PER_PX, score, kept.label, attributes)


def is_full(found: Detections, detector: Detector) -> bool:
    """Return whether a tile uses so many of a detector's queries that it may hold more than was found."""
    in_use = np.count_nonzero(found.score >= min(_IN_USE_SCORE, detector.threshold))
    return bool(in_use >= _SATURATED_SHARE * detector.max_per_tile)


def scored_at_once(detector: Detector) -> int:
    """Return how many regions one process scores at a time."""
    return _ON_CPU if detector.runs_on.startswith("cpu") else _ON_GPU


def batches(tiles: Sequence[Tile], size: int, *, by_row: bool) -> Iterator[Sequence[Tile]]:
    """Yield tiles in order, at most `size` at a time, and with `by_row` only those of one row.

    A CPU scores tiles one by one, so it has the batches that cost nothing to cut; a GPU wants them full.
    """
    rows = [list(row) for _, row in groupby(tiles, key=lambda tile: tile.row)] if by_row else [tiles]
    for row in rows:
        for first in range(0, len(row), size):
            yield row[first : first + size]


def cut(rgb: NDArray[np.uint8], tiles: Sequence[Tile], x0: int, y0: int) -> NDArray[np.uint8]:
    """Return the windows of tiles of one size as an array (B, H, W, 3) that cannot be written to.

    Nothing is copied where each window begins as far from the one before it, as in a row of the grid: then they overlap
    in memory as they do on the slide.

    Parameters
    ----------
    rgb : ndarray of uint8, shape (H, W, 3)
        A region's px, contiguous; it begins at plane px (`x0`, `y0`).
    tiles : sequence of Tile
        All of them inside the region.
    x0, y0 : int
    """
    boxes = [tile.read.translate(-x0, -y0).round_out() for tile in tiles]
    left, top, right, bottom = boxes[0]
    row, px, _ = rgb.strides
    begins = [y * row + x * px for x, y, _, _ in boxes]
    steps = {after - before for before, after in pairwise(begins)} or {0}
    if len(steps) == 1:
        shape, strides = (len(boxes), bottom - top, right - left, 3), (steps.pop(), *rgb.strides)
        return as_strided(rgb[top:, left:], shape, strides, writeable=False)
    windows = np.stack([rgb[y:below, x:beside] for x, y, beside, below in boxes])
    windows.flags.writeable = False
    return windows


def _rows(boxes: list[Box]) -> NDArray[np.float64]:
    """Return boxes as rows (N, 4)."""
    return np.array([(b.x0, b.y0, b.x1, b.y1) for b in boxes], np.float64).reshape(-1, 4)
