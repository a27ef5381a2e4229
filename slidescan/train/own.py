"""Annotated slides and pictures of one's own as a source.

Measured is what a user gets: whole slides go through `scan`, stitching included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import shapely
from numpy.typing import NDArray

from slidescan.anomaly import TISSUE
from slidescan.config import ScanConfig
from slidescan.detections import Detections, Detector
from slidescan.errors import ConfigError
from slidescan.picture import detect_image
from slidescan.scan_slide import scan
from slidescan.train.annotated import Annotated, described, refuse_leaks, split
from slidescan.train.augment import Rgb
from slidescan.train.begun import digest_of
from slidescan.train.coco import load_coco
from slidescan.train.crops import OBJECT_UM
from slidescan.train.metrics import RADIUS_UM, Image
from slidescan.train.qupath import geojson_files, load_slides
from slidescan.train.settings import TrainSettings, VariantSettings
from slidescan.train.source import LEAST_SCORE, Split
from slidescan.train.windows import Example, Windows

__all__ = ["OwnSource", "ShownSlide", "kind_of", "load_annotated"]

_ASSEMBLED = 4  # slides to shift the grid on
_CROPS_ONLY = ("share_bare", "share_phantom", "share_negative", "figures_per_mpx")  # settings that say nothing here
_OTHER_SIZE = 3.0  # times `object_um`, or less: nuclei of 6 to 25 µm go with the default
_REACH = RADIUS_UM / OBJECT_UM  # how near a detection must be, in edges of an object: MIDOG's for figures


@dataclass(frozen=True)
class ShownSlide:
    """An annotated slide or picture, scanned whole."""

    annotated: Annotated
    kind: str
    radius_um: float = RADIUS_UM

    def find(self, detector: Detector) -> Image:
        """Return what a scan finds, in level-0 px; what lies in an ignored box and is no object counts neither way."""
        one = self.annotated
        frame = one.slide.frame
        if self.kind == "pictures":  # of tissue alone: no mask
            found = detect_image(one.slide, detector, min_score=LEAST_SCORE, allow_coarse=True)
            ignored = shapely.union_all(shapely.box(*one.ignored_xyxy_l0.T)) & shapely.box(0, 0, *frame.size_wh)
            area_mm2 = frame.area_mm2 - ignored.area * frame.mm2_per_px
        else:
            found, area_mm2 = self._scanned(detector)
        return Image(
            found,
            (one.xyxy_l0[:, :2] + one.xyxy_l0[:, 2:]) / 2,
            self.radius_um / frame.mpp,
            max(frame.size_wh),
            patient=one.patient,
            scanner=one.scanner,
            mpp=frame.mpp,
            attributes=one.attributes,
            area_mm2=area_mm2,
            label=one.label,
            excused=_within(found.centers, one.ignored_xyxy_l0),
        )

    def _scanned(self, detector: Detector) -> tuple[Detections, float]:
        settings = ScanConfig.load({}, {"detect.min_score": LEAST_SCORE, "detect.threshold": LEAST_SCORE})
        one = self.annotated
        result = scan(one.slide, detector, config=settings, allow_coarse=True)
        at = result.anomaly.frame
        looked_at = np.isin(result.anomaly.coverage, TISSUE)
        corners = np.rint(one.ignored_xyxy_l0 * one.slide.frame.factor_to(at)).clip(0)
        # Of the map's last px the middle may be beyond the slide.
        corners[:, 2:][one.ignored_xyxy_l0[:, 2:] >= one.slide.size_wh] += 1
        for x0, y0, x1, y1 in corners.astype(np.intp).tolist():
            looked_at[y0:y1, x0:x1] = False
        return result.detections, float(looked_at.sum() * at.mm2_per_px)

    def patch(self, x: float, y: float, edge_px: int) -> Rgb:
        """Return a square of the slide at level 0."""
        slide = self.annotated.slide
        return slide.read(round(x) - edge_px // 2, round(y) - edge_px // 2, edge_px, edge_px, slide.frame).rgb


class OwnSource:
    """Draws windows of annotated slides and pictures.

    Parameters
    ----------
    splits : mapping of str to list of Annotated
        ``train``, ``validation`` and ``test``; what is not there is empty.
    variant : VariantSettings
    kinds : mapping of str to str
        ``pictures`` or ``slides``, of each split. Pictures are taken to be tissue all over.
    settings : TrainSettings, optional
        A detection within 0.6 of their `object_um` finds an object, within 7.5 µm a figure.

    Raises
    ------
    ConfigError
        If a patient is in two splits.
    """

    def __init__(
        self,
        splits: Mapping[str, list[Annotated]],
        variant: VariantSettings,
        *,
        kinds: Mapping[str, str],
        settings: TrainSettings | None = None,
    ) -> None:
        refuse_leaks(**splits)
        # In one order, whatever the files': a run that goes on must draw the same.
        splits = {name: sorted(members, key=lambda one: one.slide.path.name) for name, members in splits.items()}
        self._splits, self._variant, self._kinds = splits, variant, kinds
        self._settings = settings or TrainSettings()

    @classmethod
    def open(cls, settings: TrainSettings, variant: VariantSettings) -> OwnSource:
        """Load what the settings name; without validation data a share of the patients is set apart.

        Raises
        ------
        ConfigError
            If data are missing or damaged, or a patient is in two splits.
        """
        for key in _CROPS_ONLY:
            if key in settings.model_fields_set:
                raise ConfigError(f"{key}: expected only with the crops of midog21, got it with other data; remove it")
        own = variant.mpp if len(settings.variants) == 1 else None  # of several, one would learn at a wrong scale
        train = load_annotated(settings.data, settings, own)
        if settings.validation is None:
            train, validation = split(train, settings.validation_share, settings.seed)
        else:
            validation = load_annotated(settings.validation, settings, own)
        test = load_annotated(settings.test, settings, own) if settings.test else []
        if not any(len(one.label) for one in validation):
            raise ConfigError(
                f"validation: expected annotated objects to choose the threshold by, got none on {len(validation)} "
                "slides; set slides with objects apart, of at least two patients"
            )
        splits = {"train": train, "validation": validation, "test": test}
        places = {"train": None, "validation": settings.validation, "test": settings.test}
        kinds = {name: kind_of(path or settings.data) for name, path in places.items()}
        _refuse_size(train, settings, variant)
        return cls(splits, variant, kinds=kinds, settings=settings)

    def told(self) -> list[str]:
        """Return what was read, a line each split."""
        said = self._settings.classes, self._settings.attributes
        what = {name: self._kinds.get(name, "slides").removesuffix("s") for name in self._splits}
        return [f"{name}: {described(members, what[name], *said)}" for name, members in self._splits.items()]

    @property
    def identity(self) -> str:
        """Digest of the slides trained on and of those chosen by."""
        return " ".join(digest_of(self._splits.get(name, ())) for name in ("train", "validation"))

    @cached_property
    def _windows(self) -> Windows:
        return Windows(self._splits["train"], self._variant.mpp, seed=self._settings.seed)

    def example(self, rng: np.random.Generator, size: int) -> Example:
        """Draw one window, or four side by side."""
        is_mosaic = rng.random() < self._settings.share_mosaic
        return self._windows.mosaic(rng, size) if is_mosaic else self._windows.window(rng, size)

    def whole(self) -> OwnSource:
        """Return the source whose windows show the validation patients as well."""
        return self._with(self._splits.get("validation", []), [])

    def halves(self) -> Sequence[OwnSource]:
        """Return two sources that train on one half of the validation patients too and show the other.

        None where objects are of one patient alone.
        """
        validation = self._splits.get("validation", [])
        if len({one.patient for one in validation if len(one.label)}) < 2:
            return ()
        some, others = split(validation, 0.5, self._settings.seed)
        return self._with(some, others), self._with(others, some)

    def _with(self, trained: list[Annotated], shown: list[Annotated]) -> OwnSource:
        """Return the source that trains on a part of the validation slides too and shows another."""
        splits = {
            "train": [*self._splits.get("train", []), *trained],
            "validation": shown,
            "test": self._splits.get("test", []),
        }
        return OwnSource(splits, self._variant, kinds=self._kinds, settings=self._settings)

    def assembled(self, split: Split) -> Iterator[Rgb]:
        """Yield a square around an object of the first few slides."""
        mpp, edge = self._variant.mpp, 4 * self._variant.input_px
        for one in [one for one in self._splits.get(split, ()) if len(one.xyxy_l0)][:_ASSEMBLED]:
            plane = one.slide.frame.at(mpp)
            x, y = np.rint(one.xyxy_l0[0, :2] * one.slide.frame.mpp / mpp).astype(int).tolist()
            width, height = (min(edge, n) for n in plane.size_wh)
            left, top = (
                min(max(0, at - n // 2), whole - n)
                for at, n, whole in zip((x, y), (width, height), plane.size_wh, strict=True)
            )
            yield one.slide.read(left, top, width, height, plane).rgb

    def shown(self, split: Split) -> Iterator[ShownSlide]:
        """Yield the slides and pictures of a split."""
        radius_um = _REACH * self._settings.object_um
        return (ShownSlide(one, self._kinds[split], radius_um) for one in self._splits.get(split, ()))

    def annotated(self, split: Literal["train"] | Split) -> Sequence[Annotated]:
        """Return the slides of a split, which `shown` scans."""
        return self._splits.get(split, ())


def load_annotated(path: Path, settings: TrainSettings, mpp: float | None) -> list[Annotated]:
    """Load a COCO directory (or its JSON), or a directory of slides with QuPath's GeoJSON beside them.

    Parameters
    ----------
    path : Path
    settings : TrainSettings
    mpp : float, optional
        µm/px of pictures of which neither they nor the settings say it.

    Raises
    ------
    ConfigError
        If it is neither, or something in it is damaged.
    """
    if not path.exists():
        raise ConfigError(f"{path}: expected a directory of training data, found none; check `data` or --data")
    asked: dict[str, Any] = {key: getattr(settings, key) for key in ("classes", "attributes", "skip")}
    asked["mpp"] = settings.slide_mpp
    if kind_of(path) == "pictures":
        return load_coco(path, **asked, assumed_mpp=mpp, crowds=settings.crowds)
    return load_slides(path, **asked, object_um=settings.object_um)


def kind_of(path: Path) -> str:
    """Say whether a directory (or file) holds annotated pictures or slides."""
    if path.suffix.lower() == ".json":
        return "pictures"
    # Beside annotated slides a .json is something else.
    any_json = any(path.glob("*.json")) or any(path.glob("annotations/*.json"))
    return "pictures" if any_json and not geojson_files(path) else "slides"


def _within(points: NDArray[np.float64], boxes: NDArray[np.float64]) -> NDArray[np.bool_]:
    inside = np.zeros(len(points), np.bool_)
    if len(boxes):
        inside[shapely.STRtree(shapely.box(*boxes.T)).query(shapely.points(points), "intersects")[0]] = True
    return inside


def _refuse_size(train: Sequence[Annotated], settings: TrainSettings, variant: VariantSettings) -> None:
    """Refuse objects of which most are seen whole in no tile, or that are not what all lengths are chosen for."""
    edges_um = [np.ptp(one.xyxy_l0.reshape(-1, 2, 2), axis=1).max(1) * one.slide.frame.mpp for one in train]
    if not sum(map(len, edges_um)):
        return
    um = float(np.median(np.concatenate(edges_um)))
    if um / variant.mpp > max(variant.tile_px):
        raise ConfigError(
            f"tile_px: expected tiles that objects fit into, got {max(variant.tile_px)} px, where half of the objects "
            f"have {um / variant.mpp:.0f} px or more at {variant.mpp:g} µm/px; give larger tile_px, or a coarser mpp"
        )
    share = um / settings.object_um
    if "object_um" not in settings.model_fields_set and not 1 / _OTHER_SIZE <= share <= _OTHER_SIZE:
        raise ConfigError(
            f"object_um: expected about the size of the objects, of which half have {um:.3g} µm or more, got its "
            f"default {settings.object_um:g}; set it, or correct the µm/px (slide_mpp)"
        )
