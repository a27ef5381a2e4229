"""`ScanResult` and its directory, saved so that half a result is never taken for a whole one.

::

    <out>/detections.parquet  anomaly.ome.zarr/  flagged.geojson  overview.png  manifest.json

``manifest.json`` is written last and lists size and sha256 of every other file: without it a directory is not a result.
Nothing in the directory names the slide's path or carries text from inside the slide file.
"""

from __future__ import annotations

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
from slidescan.commit import commit, disk_error
from slidescan.config import ScanConfig
from slidescan.contact_sheet import FlaggedRegions
from slidescan.detections import Detections
from slidescan.errors import ConfigError, ResultError, SlidescanError
from slidescan.export import detection_features, detection_ids, region_features, write_geojson
from slidescan.export.stored import attribute_columns, from_table, read_map, to_table, write_map
from slidescan.flagged import FlaggedRegion, Hotspot, flag_regions, mitotic_hotspot
from slidescan.geometry import Frame
from slidescan.legend import counted
from slidescan.manifest import MANIFEST, SCHEMA, check_files, listed, read_manifest, write_manifest
from slidescan.provenance import as_scanned
from slidescan.slides import Slide

if TYPE_CHECKING:
    from PIL.Image import Image

    from slidescan.figure import Plot

__all__ = ["MANIFEST", "ScanResult", "load_result", "read_manifest"]

# Cached properties of a result.
_COMPUTED = ("config", "found", "ids", "regions", "hotspot")


@dataclass(frozen=True, repr=False)
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

    def __repr__(self) -> str:
        where = "not saved" if self.path is None else repr(self.path.name)
        return f"ScanResult({where}, {counted(len(self.found), self.classes, self.threshold)})"

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

    def flagged(self, n: int = 20) -> FlaggedRegions:
        """Return the `n` regions with most evidence, a tuple; ``.plot(slide)`` is their contact sheet."""
        _check_count("n", n)
        fingerprint = self.provenance["slide"]["fingerprint"]
        return FlaggedRegions(self.regions[:n], fingerprint=fingerprint, frame=self.frame)

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
        named: Mapping[str, str] | None = None,
    ) -> int:
        """Write detections and flagged regions for QuPath and other viewers; return the number of objects.

        Parameters
        ----------
        path : str or Path
            ``.geojson``, ``.json``, or either with ``.gz``.
        origin : {"qupath", "level0"}
            The frame of the coordinates: QuPath's (less the slide's bounds offset) or uncropped level 0.
        min_score : float, optional
            Lowest score of a detection written, 0 to 1; default: the threshold. Regions are flagged by the threshold.
        top_k : int, optional
            At most so many detections, best first, and so many regions.
        what : {"all", "detections", "regions"}
            Which objects.
        only : collection of str, optional
            Ids of the detections and regions that may be written; default: any.
        named : mapping of str to str, optional
            By id the class of those whose class is not to be the detector's.
        """
        if what not in ("all", "detections", "regions"):
            raise ConfigError(f"what: expected all, detections or regions, got {what!r}")
        offset = self.origin_l0(origin)
        lowest = self._lowest(min_score)
        _check_count("top_k", top_k)
        found, classes = self._renamed(named)

        def features() -> Iterator[Any]:
            if what != "detections":
                told = zip(self.region_ids, self.regions, strict=True)
                regions = [replace(each, label=(named or {}).get(id_, each.label)) for id_, each in told]
                all_ = region_features(regions, run_namespace=self._namespace, offset_l0=offset, classes=classes)
                yield from islice((each for each in all_ if only is None or each.id in only), top_k)
            if what != "regions":
                at_least = np.flatnonzero(self.detections.score >= lowest).tolist()
                rows = np.array([i for i in at_least if only is None or self.ids[i] in only][:top_k], np.intp)
                ids, more = [self.ids[i] for i in rows], {name: column[rows] for name, column in self._said.items()}
                yield from detection_features(
                    found[rows], classes=classes, ids=ids, offset_l0=offset, measurements=more
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
        named: Mapping[str, str] | None = None,
    ) -> int:
        """Write detections as CSV (level-0 px), best first, as `to_geojson` would; return the number of rows."""
        if Path(path).suffix.lower() != ".csv":
            raise ConfigError(f"{Path(path).name}: expected a name that ends in .csv")
        lowest = self._lowest(min_score)
        _check_count("top_k", top_k)
        # In float32, as everywhere: a score that is the threshold counts.
        rows = self._table(named).filter(
            pc.greater_equal(pc.field("score"), pa.scalar(np.float32(lowest), pa.float32()))
        )
        if only is not None:
            rows = rows.filter(pc.field("id").isin(pa.array(sorted(only), pa.string())))
        rows = rows.slice(0, top_k)
        commit(Path(path), lambda partial: csv.write_csv(rows, partial))
        return int(rows.num_rows)

    def plot(
        self,
        slide: Slide | str | Path | None = None,
        *,
        what: Literal["density", "score", "coverage"] = "density",
        regions: int = 20,
        um: float | None = None,
        width_in: float = 7.0,
    ) -> Plot:
        """Return a figure of the map for a paper, ``.savefig("map.pdf")``; the rest as in `slidescan.figure.draw_map`.

        Parameters
        ----------
        slide : Slide, str or Path, optional
            Shown pale under the map.
        regions : int
            How many of the flagged regions are outlined and numbered, those with most evidence.

        Raises
        ------
        ConfigError
            If the slide is not the one that was scanned, is open at another scale, or a setting cannot be meant.
        SlideError
            If the slide cannot be read.
        """
        from slidescan.figure import THUMBNAIL_PX, draw_map

        if slide is not None:
            slide = as_scanned(slide, self.provenance["slide"]["fingerprint"], self.frame)
        _check_count("regions", regions)
        return draw_map(
            self.anomaly,
            self.frame,
            what=what,
            title=counted(len(self.found), self.classes, self.threshold),
            regions=self.flagged(regions),
            hotspot=self.hotspot,
            thumbnail=None if slide is None else slide.thumbnail(THUMBNAIL_PX)[0].rgb,
            um=um,
            width_in=width_in,
        )

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
            write_map(out / "anomaly.ome.zarr", self.anomaly, self.frame)
            self.to_geojson(out / "flagged.geojson", what="regions")
            commit(out / "overview.png", lambda partial: draw().save(partial, format="PNG"))
            files = listed(out)
            write_s, seconds = round(time.perf_counter() - started, 3), self.provenance["seconds"]
            seconds = {**seconds, "write": write_s, "total": round(seconds["total"] + write_s, 3)}
            saved = replace(self, path=out, provenance={**self.provenance, "seconds": seconds})
            manifest = {
                "schema": SCHEMA,
                "classes": list(self.classes),
                "frame": {"size_wh": list(self.frame.size_wh), "mpp": self.frame.mpp},
                "summary": self.summary(),
                **saved.provenance,
                "files": files,
            }
            write_manifest(out, manifest)
        except OSError as exc:
            if isinstance(exc, ResultError):
                raise
            raise disk_error(out, exc) from exc
        # What was computed stays computed: a slide of half a million detections is clustered once.
        saved.__dict__.update({name: self.__dict__[name] for name in _COMPUTED if name in self.__dict__})
        return saved

    def _lowest(self, min_score: float | None) -> float:
        if min_score is not None and not 0 <= min_score <= 1:
            raise ConfigError(f"min_score: expected a number from 0 to 1, got {min_score}")
        return self.threshold if min_score is None else float(min_score)

    @property
    def _namespace(self) -> str:
        return f"{self.provenance['slide']['fingerprint']}:{self.provenance['detector']['sha256']}"

    @property
    def _said(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """Return the attributes by name."""
        return attribute_columns(self.detections, self.attributes)

    def _renamed(self, named: Mapping[str, str] | None) -> tuple[Detections, tuple[str, ...]]:
        """Return the detections with the classes that `named` gives some by id, and the names of all classes."""
        if not named:
            return self.detections, self.classes
        classes = {name: i for i, name in enumerate(dict.fromkeys((*self.classes, *named.values())))}
        label = self.detections.label.copy()
        for row, id_ in enumerate(self.ids):
            if id_ in named:
                label[row] = classes[named[id_]]
        return replace(self.detections, label=label), tuple(classes)

    def _table(self, named: Mapping[str, str] | None = None) -> pa.Table:
        """Return the detections as an Arrow table, best first."""
        found, classes = self._renamed(named)
        return to_table(found, self.ids, classes, self._said)


def _check_count(name: str, count: int | None) -> None:
    if count is not None and count < 0:
        raise ConfigError(f"{name}: expected a number of regions or detections, got {count}")


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
    if out.name == MANIFEST and out.is_file():
        out = out.parent
    manifest = read_manifest(out)
    if manifest is None:
        below = sorted(each.parent for each in (*out.glob(f"*/{MANIFEST}"), *out.glob(f"slides/*/{MANIFEST}")))
        state = (
            f"there are {len(below)} below it, such as {below[0]}: name one"
            if below
            else "the scan has not finished; run the same command to continue"
            if any(out.glob("parts-*"))
            else "no scan has finished there"
            if out.is_dir()
            else "no such directory"
        )
        raise ResultError(f"{out}: expected a result directory with {MANIFEST}; {state}")
    try:
        check_files(out, manifest, verify=verify)
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
    table = pq.read_table(out / "detections.parquet")
    detections = from_table(table, classes, manifest["detector"].get("attributes", ()))
    provenance = {k: v for k, v in manifest.items() if k not in ("schema", "classes", "frame", "summary", "files")}
    anomaly = read_map(out / "anomaly.ome.zarr", frame.at(float(manifest["config"]["map"]["um_per_px"])))
    return ScanResult(frame, classes, detections, anomaly, provenance, out)
