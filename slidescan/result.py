"""`ScanResult`: what one scan found on one slide, and what is asked of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv

from slidescan.anomaly import AnomalyMap
from slidescan.commit import commit
from slidescan.config import ScanConfig
from slidescan.contact_sheet import FlaggedRegions
from slidescan.detections import Detections
from slidescan.errors import ConfigError
from slidescan.export import detection_features, detection_ids, region_features, write_geojson
from slidescan.export.stored import attribute_columns, to_table
from slidescan.flagged import FlaggedRegion, flag_regions
from slidescan.geometry import Frame
from slidescan.hotspot import Hotspot, mitotic_hotspot
from slidescan.legend import counted, many
from slidescan.manifest import refuse_own
from slidescan.provenance import as_scanned
from slidescan.slides import Slide

if TYPE_CHECKING:
    from slidescan.figure import Plot

__all__ = ["COMPUTED", "ScanResult"]

# Its cached properties.
COMPUTED = ("config", "found", "ids", "regions", "hotspot")


@dataclass(frozen=True, repr=False)
class ScanResult:
    """Everything one scan found on one slide; level-0 px throughout.

    Examples
    --------
    >>> result = ss.load_result("runs/case")  # doctest: +SKIP
    >>> result.summary()  # doctest: +SKIP
    """

    frame: Frame
    """Level 0: size in px and µm/px."""
    classes: tuple[str, ...]
    """The detector's, those that are kept; a detection's label is the number of one."""
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
            Lowest score of a detection written, 0 to 1; default: the threshold. Regions are flagged by the threshold,
            and below the scan's ``detect.min_score`` nothing was kept.
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
        refuse_own(Path(path))
        found, classes = self._renamed(named)

        def features() -> Iterator[Any]:
            if what != "detections":
                told = zip(self.region_ids, self.regions, strict=True)
                regions = [_named(region, named.get(id_)) if named else region for id_, region in told]
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
        origin: Literal["qupath", "level0"] = "level0",
        min_score: float | None = None,
        top_k: int | None = None,
        only: Collection[str] | None = None,
        named: Mapping[str, str] | None = None,
    ) -> int:
        """Write detections as CSV, best first, as `to_geojson` would; return the number of rows."""
        if Path(path).suffix.lower() != ".csv":
            raise ConfigError(f"{Path(path).name}: expected a name that ends in .csv")
        offset, lowest = self.origin_l0(origin), self._lowest(min_score)
        _check_count("top_k", top_k)
        refuse_own(Path(path))
        # In float32, as everywhere: a score that is the threshold counts.
        rows = self.table(named).filter(
            pc.greater_equal(pc.field("score"), pa.scalar(np.float32(lowest), pa.float32()))
        )
        if only is not None:
            rows = rows.filter(pc.field("id").isin(pa.array(sorted(only), pa.string())))
        rows = rows.slice(0, top_k)
        for name, shift in zip(("x0", "y0", "x1", "y1"), offset * 2, strict=True):
            if shift:
                rows = rows.set_column(rows.schema.get_field_index(name), name, pc.subtract(rows[name], shift))

        def write(partial: Path) -> None:
            with partial.open("wb") as file:  # pyarrow takes some names for URLs
                csv.write_csv(rows, file)

        commit(Path(path), write)
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
            objects=many(self.classes),
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

    def _lowest(self, min_score: float | None) -> float:
        if min_score is not None and not 0 <= min_score <= 1:
            raise ConfigError(f"min_score: expected a number from 0 to 1, got {min_score}")
        return self.threshold if min_score is None else max(float(min_score), self.config.detect.min_score)

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

    def table(self, named: Mapping[str, str] | None = None) -> pa.Table:
        """Return the detections as in ``detections.parquet``, best first; `named` as in `to_geojson`."""
        found, classes = self._renamed(named)
        return to_table(found, self.ids, classes, self._said)


def _named(region: FlaggedRegion, label: str | None) -> FlaggedRegion:
    """Return a region with the class that a person gave it, which is that of all in it."""
    return region if label is None else replace(region, label=label, n_label=region.n)


def _check_count(name: str, count: int | None) -> None:
    if count is not None and count < 0:
        raise ConfigError(f"{name}: expected a number of regions or detections, got {count}")
