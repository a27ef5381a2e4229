"""`ScanResult` and its directory, saved so that half a result is never taken for a whole one.

::

    <out>/detections.parquet  anomaly.ome.zarr/  flagged.geojson  overview.png  manifest.json

``manifest.json`` is written last and lists size and sha256 of every other file: without it a directory is not a result.
Nothing in the directory names the slide's path or carries text from inside the slide file.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from slidescan.anomaly import AnomalyMap
from slidescan.config import ScanConfig
from slidescan.detections import Detections
from slidescan.errors import ConfigError, ResultError, ResultInTheWayError, SlidescanError
from slidescan.export import detection_features, detection_ids, region_features, write_geojson
from slidescan.export.ngff import Channel, read_ngff, write_ngff
from slidescan.flagged import FlaggedRegion, Hotspot, flag_regions, mitotic_hotspot
from slidescan.geometry import Frame
from slidescan.region import commit, disk_error

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["ScanResult", "load_result"]

MANIFEST = "manifest.json"
_SCHEMA = 1
_FILES = ("detections.parquet", "anomaly.ome.zarr", "flagged.geojson", "overview.png")
# Cached properties of a result.
_COMPUTED = ("config", "found", "ids", "regions", "hotspot")
_COLUMNS = ("x0", "y0", "x1", "y1")
# Windows in stored steps: score 0 to 1, density 0 to 20 per mm² (a high mitotic count), coverage by state.
_CHANNELS = (
    Channel("score", "FF4000", 1, 10_001, 0, 10_001),
    Channel("density per mm²", "FFB000", 1, 201, 0, 65_535, active=False),
    Channel("coverage", "00A0FF", 0, 4, 0, 4, active=False),
)


@dataclass(frozen=True)
class ScanResult:
    """Everything one scan found on one slide; level-0 px throughout.

    Examples
    --------
    >>> result = load_result("runs/case")  # doctest: +SKIP
    >>> result.summary()  # doctest: +SKIP
    """

    frame: Frame
    """Level 0: size in px and µm/px."""
    classes: tuple[str, ...]
    detections: Detections
    """All detections from the lowest score kept, best first."""
    anomaly: AnomalyMap
    provenance: Mapping[str, Any]
    """Slide fingerprint, µm/px and source, detector digest, resolved settings, versions, device, seconds by stage."""
    path: Path | None = None
    """The result directory; None if it was not saved."""

    @cached_property
    def config(self) -> ScanConfig:
        """The settings it was scanned with."""
        return ScanConfig.load(self.provenance["config"])

    @property
    def threshold(self) -> float:
        """Score from which a detection counts as found."""
        return float(self.provenance["threshold"])

    @property
    def attributes(self) -> tuple[str, ...]:
        """Names of the columns of `detections.attributes`."""
        return tuple(self.provenance["detector"].get("attributes", ()))

    @property
    def coverage(self) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """What was analysed: a `slidescan.anomaly.Coverage` value per map pixel."""
        return self.anomaly.coverage

    @cached_property
    def found(self) -> Detections:
        """Detections at or above the threshold."""
        return self.detections[self.detections.score >= self.threshold]

    @cached_property
    def ids(self) -> list[str]:
        """A UUID for each detection, the same whenever slide, model and box are the same."""
        return detection_ids(self._namespace, self.detections.xyxy, self.detections.label)

    @cached_property
    def regions(self) -> tuple[FlaggedRegion, ...]:
        """All flagged regions by falling evidence."""
        settings = self.config.flagged
        return flag_regions(
            self.detections,
            self.frame,
            self.classes,
            threshold=self.threshold,
            link_um=settings.link_um,
            max_um=settings.max_um,
            margin_um=settings.margin_um,
        )

    @cached_property
    def region_ids(self) -> list[str]:
        """A UUID for each of `regions`, as in flagged.geojson."""
        return [feature.id for feature in region_features(self.regions, run_namespace=self._namespace)]

    @cached_property
    def hotspot(self) -> Hotspot | None:
        """The square of `config.flagged.hotspot_mm2` with most figures; None if nothing was found."""
        area_mm2 = self.config.flagged.hotspot_mm2
        return mitotic_hotspot(self.detections, self.frame, threshold=self.threshold, area_mm2=area_mm2)

    def flagged(self, n: int = 20) -> tuple[FlaggedRegion, ...]:
        """Return the `n` regions with most evidence."""
        return self.regions[:n]

    def origin_l0(self, origin: Literal["qupath", "level0"]) -> tuple[float, float]:
        """Return the level-0 px at which a viewer puts (0, 0); QuPath crops to the slide's scanned bounds."""
        if origin not in ("qupath", "level0"):
            raise ConfigError(f"origin must be 'qupath' or 'level0', got {origin!r}")
        bounds = self.provenance["slide"]["bounds_l0"]
        return (float(bounds[0]), float(bounds[1])) if origin == "qupath" and bounds else (0.0, 0.0)

    def to_geojson(
        self,
        path: str | Path,
        *,
        origin: Literal["qupath", "level0"] = "qupath",
        min_score: float | None = None,
        top_k: int | None = None,
        what: Literal["all", "detections", "regions"] = "all",
        only: Collection[str] | None = None,
    ) -> int:
        """Write detections and flagged regions for QuPath and other viewers; return the number of objects.

        Parameters
        ----------
        path : str or Path
            ``.geojson``, ``.json``, or either with ``.gz``.
        origin : {"qupath", "level0"}
            The frame of the coordinates: QuPath's (less the slide's bounds offset) or uncropped level 0.
        min_score : float, optional
            Lowest score written; default: the threshold.
        top_k : int, optional
            At most so many detections, best first, and so many regions.
        what : {"all", "detections", "regions"}
            Which objects.
        only : collection of str, optional
            Ids of the detections and regions that may be written; default: any.
        """
        offset = self.origin_l0(origin)
        lowest = self.threshold if min_score is None else min_score

        def features() -> Iterator[Any]:
            if what != "detections":
                all_ = region_features(self.regions, run_namespace=self._namespace, offset_l0=offset)
                yield from islice((each for each in all_ if only is None or each.id in only), top_k)
            if what != "regions":
                at_least = np.flatnonzero(self.detections.score >= lowest).tolist()
                rows = np.array([i for i in at_least if only is None or self.ids[i] in only][:top_k], np.intp)
                ids, more = [self.ids[i] for i in rows], {name: column[rows] for name, column in self._said.items()}
                yield from detection_features(
                    self.detections[rows], classes=self.classes, ids=ids, offset_l0=offset, measurements=more
                )

        properties = {"origin": origin, "offset_l0": list(offset), "mpp": self.frame.mpp, "min_score": lowest}
        return write_geojson(Path(path), features(), properties=properties)

    def to_csv(
        self,
        path: str | Path,
        *,
        min_score: float | None = None,
        top_k: int | None = None,
        only: Collection[str] | None = None,
    ) -> int:
        """Write detections as CSV (level-0 px), best first, of `only` these ids; return the number of rows."""
        lowest = self.threshold if min_score is None else min_score
        rows = self._table().filter(pc.greater_equal(pc.field("score"), lowest))
        if only is not None:
            rows = rows.filter(pc.field("id").isin(pa.array(sorted(only), pa.string())))
        rows = rows.slice(0, top_k)
        commit(Path(path), lambda partial: csv.write_csv(rows, partial))
        return int(rows.num_rows)

    def summary(self) -> dict[str, Any]:
        """Return the numbers a person asks for first."""
        hotspot = self.hotspot
        fraction = self.anomaly.analysed_fraction
        return {
            "detections": len(self.detections),
            "found": len(self.found),
            "threshold": self.threshold,
            "flagged_regions": len(self.regions),
            "tissue_mm2": round(self.anomaly.tissue_mm2, 3),
            "analysed_fraction": None if np.isnan(fraction) else round(fraction, 5),
            "hotspot": None
            if hotspot is None
            else {
                "count": hotspot.count,
                "area_mm2": round(hotspot.area_mm2, 4),
                "box_l0": [round(v, 2) for v in astuple(hotspot.box_l0)],
            },
        }

    def save(self, out: Path, draw: Callable[[], Image]) -> ScanResult:
        """Write the result directory, manifest last, and return the result bound to it; `draw` makes the overview."""
        started = time.perf_counter()
        try:
            commit(
                out / "detections.parquet", lambda partial: pq.write_table(self._table(), partial, compression="zstd")
            )
            write_ngff(
                out / "anomaly.ome.zarr",
                AnomalyMap.pyramid(self.anomaly.encode()),
                um_per_px=self.anomaly.frame.mpp,
                slide_mpp=self.frame.mpp,
                name="anomaly",
                channels=_CHANNELS,
                downsampling="maximum of score and coverage, mean of density",
                attributes={
                    "score": "(value - 1) / 10000; 0 not evaluated",
                    "density_per_mm2": "(value - 1) / 10; 0 not evaluated",
                    "coverage": "0 outside, 1 background, 2 analysed, 3 saturated, 4 read-failed",
                },
            )
            self.to_geojson(out / "flagged.geojson", what="regions")
            commit(out / "overview.png", lambda partial: draw().save(partial, format="PNG"))
            files = {name: _digest(out / name) for name in _walk(out)}
            write_s, seconds = round(time.perf_counter() - started, 3), self.provenance["seconds"]
            seconds = {**seconds, "write": write_s, "total": round(seconds["total"] + write_s, 3)}
            saved = replace(self, path=out, provenance={**self.provenance, "seconds": seconds})
            manifest = {
                "schema": _SCHEMA,
                "classes": list(self.classes),
                "frame": {"size_wh": list(self.frame.size_wh), "mpp": self.frame.mpp},
                "summary": self.summary(),
                **saved.provenance,
                "files": files,
            }
            text = json.dumps(manifest, indent=1, allow_nan=False)
            commit(out / MANIFEST, lambda partial: _write_text(partial, text + "\n"))
        except OSError as exc:
            if isinstance(exc, ResultError):
                raise
            raise disk_error(out, exc) from exc
        # What was computed stays computed: a slide of half a million detections is clustered once.
        saved.__dict__.update({name: self.__dict__[name] for name in _COMPUTED if name in self.__dict__})
        return saved

    @property
    def _namespace(self) -> str:
        return f"{self.provenance['slide']['fingerprint']}:{self.provenance['detector']['sha256']}"

    @property
    def _said(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Return the attributes by name; without detections there are no columns to take them from."""
        columns = (
            self.detections.attributes.T if len(self.detections) else np.empty((len(self.attributes), 0), np.float32)
        )
        return dict(zip(self.attributes, columns, strict=True))

    def _table(self) -> pa.Table:
        """Return the detections as an Arrow table, best first."""
        names = pa.DictionaryArray.from_arrays(pa.array(self.detections.label.astype(np.int32)), pa.array(self.classes))
        boxes = {name: self.detections.xyxy[:, i] for i, name in enumerate(_COLUMNS)}
        return pa.table({"id": self.ids, **boxes, "score": self.detections.score, "label": names, **self._said})


def load_result(path: str | Path, *, verify: bool = True) -> ScanResult:
    """Read a result directory.

    Parameters
    ----------
    path : str or Path
        The directory that holds ``manifest.json``.
    verify : bool
        Compare every file's sha256 with the manifest, not only its size.

    Raises
    ------
    ResultError
        If the directory is missing, unfinished, damaged, or of a newer slidescan.
    """
    out = Path(path)
    manifest = read_manifest(out)
    if manifest is None:
        state = "the scan has not finished; run the same command to continue" if out.is_dir() else "no such directory"
        raise ResultError(f"{out}: expected a result directory with {MANIFEST}; {state}")
    try:
        for name, entry in manifest["files"].items():
            file = out / name
            if not file.is_file() or file.stat().st_size != entry["bytes"] or (verify and _digest(file) != entry):
                raise ResultError(f"{out}: {name} is not what the manifest lists; scan again with --overwrite")
        return _load(out, manifest)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        if isinstance(exc, SlidescanError):
            raise
        raise ResultError(f"{out}: damaged ({type(exc).__name__}); scan again with --overwrite") from exc


def _load(out: Path, manifest: dict[str, Any]) -> ScanResult:
    """Build the result from the files the manifest lists."""
    frame = Frame(
        (int(manifest["frame"]["size_wh"][0]), int(manifest["frame"]["size_wh"][1])), manifest["frame"]["mpp"]
    )
    classes = tuple(manifest["classes"])
    attributes = manifest["detector"].get("attributes", ())
    table = pq.read_table(out / "detections.parquet")
    label = table["label"].combine_chunks()
    names = label.dictionary.to_pylist()
    to_class = np.array([classes.index(n) for n in names] or [0], np.int16)
    detections = Detections.build(
        np.column_stack([table[c].to_numpy() for c in _COLUMNS]),
        table["score"].to_numpy(),
        to_class[label.indices.to_numpy()] if len(table) else np.empty(0),
        np.stack([table[name].to_numpy() for name in attributes], -1) if attributes else None,
    )
    levels, _ = read_ngff(out / "anomaly.ome.zarr")
    provenance = {k: v for k, v in manifest.items() if k not in ("schema", "classes", "frame", "summary", "files")}
    map_frame = frame.at(float(manifest["config"]["map"]["um_per_px"]))
    return ScanResult(frame, classes, detections, AnomalyMap.decode(levels[0], map_frame), provenance, out)


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished result, or None where there is none."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as exc:
        raise ResultInTheWayError(f"{out}: {MANIFEST} cannot be read; scan again with --overwrite") from exc
    if not isinstance(manifest, dict) or manifest.get("schema") != _SCHEMA:
        raise ResultInTheWayError(
            f"{out}: expected {MANIFEST} of schema {_SCHEMA}; it was written by another slidescan"
        )
    return manifest


def _walk(out: Path) -> list[str]:
    """Return every file of the result, relative and sorted."""
    files = [f for name in _FILES for f in ([out / name] if (out / name).is_file() else (out / name).rglob("*"))]
    return sorted(f.relative_to(out).as_posix() for f in files if f.is_file())


def _digest(file: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _write_text(path: Path, text: str) -> None:
    """Write UTF-8 text."""
    path.write_text(text, encoding="utf-8")
