"""What goes out as GeoJSON: one `Feature` an object, made from detections, flagged regions or polygons.

Invariants: coordinates inside slidescan are level-0 px of the uncropped slide; `offset_l0` is subtracted here and
nowhere else, because only a viewer knows its own origin (QuPath crops to `openslide.bounds-*`). Numerous things are
`detection` objects and the few that people edit are `annotation` objects: QuPath crawls on 1e5 annotations and is at
ease with 1e6 detections. Ids are name-based UUIDs, so exporting the same run twice gives the same objects, not copies.
Builders are generators: nothing here holds more than one block of geometries.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import shapely
from numpy.typing import ArrayLike

from slidescan.detections import Detections
from slidescan.errors import ConfigError

if TYPE_CHECKING:
    from slidescan.flagged import FlaggedRegion

__all__ = [
    "PALETTE",
    "Color",
    "Feature",
    "Kind",
    "detection_features",
    "detection_ids",
    "polygon_features",
    "region_features",
]

Kind = Literal["detection", "annotation", "tile"]
Color = tuple[int, int, int]

# sRGB 0-255; the colours of Okabe and Ito (2008), which colour-blind readers can tell apart, without black (unseen on
# dark nuclei) and starting with the two farthest from the blues and pinks of H&E.
PALETTE: tuple[Color, ...] = (
    (213, 94, 0),
    (0, 158, 115),
    (240, 228, 66),
    (86, 180, 233),
    (230, 159, 0),
    (0, 114, 178),
    (204, 121, 167),
)

# A random (version 4) UUID drawn once: the root under which every id of this package is named.
_ROOT = uuid.UUID("6d0f5e6c-54d5-4a4e-9a6f-2b1c9d7e8f30")
_BOX_STEPS_PER_PX = 64  # 1/64 px: finer than any detector's jitter, coarser than float noise between machines
_BLOCK = 4096  # geometries shifted at once: large enough for NumPy speed, a few MB at most


@dataclass(frozen=True, slots=True)
class Feature:
    """One object for QuPath: where it is, what it is, and its numbers.

    Parameters
    ----------
    kind : {"detection", "annotation", "tile"}
        The QuPath object type.
    geometry : tuple of 4 float, or shapely Polygon or MultiPolygon
        Box edges x0, y0, x1, y1, or an outline; px in the viewer's frame (level-0 px less the export's offset).
    class_name : str
        Name of the class; what QuPath forbids in it is replaced on writing.
    color : tuple of 3 int
        The class's colour, sRGB 0-255.
    name : str
        Shown beside the object; empty for none.
    measurements : mapping of str to float
        Numbers of the object; those that are not finite are not written.
    locked : bool
        Whether QuPath refuses to move or edit it until unlocked.
    id : str
        UUID in its usual 36-character form; empty lets the viewer draw one.

    Examples
    --------
    >>> Feature("detection", (0, 0, 10, 10), "mitotic figure").class_name
    'mitotic figure'
    """

    kind: Kind
    geometry: Any
    class_name: str
    color: Color = PALETTE[0]
    name: str = ""
    measurements: Mapping[str, float] = field(default_factory=dict)
    locked: bool = False
    id: str = ""


def detection_ids(run_namespace: str, xyxy_l0: ArrayLike, label: ArrayLike) -> list[str]:
    """Name each detection by what it is, so that a re-run or re-export gives it the same id.

    The id is uuid5 of the namespace, the box rounded to 1/64 px and the label. Rows alike in all of these (no stitched
    table has any) are told apart by a running number, so the ids of one table are always unique.

    Parameters
    ----------
    run_namespace : str
        What the detections are of: the slide's fingerprint and the model's sha256.
    xyxy_l0 : array-like, shape (N, 4)
        Box edges, finite, level-0 px (uncropped).
    label : array-like of int, shape (N,)
        Class indices.

    Returns
    -------
    list of str
        N UUIDs in their 36-character form.

    Examples
    --------
    >>> detection_ids("slide:model", [[0, 0, 8, 8]], [0]) == detection_ids("slide:model", [[0, 0, 8, 8.001]], [0])
    True
    """
    boxes = np.rint(np.asarray(xyxy_l0, np.float64).reshape(-1, 4) * _BOX_STEPS_PER_PX).astype(np.int64)
    keys = np.column_stack([boxes, np.asarray(label, np.int64).reshape(-1)])
    names = [b"%d,%d,%d,%d,%d" % tuple(row) for row in keys.tolist()]
    if len(set(names)) < len(names):
        seen: dict[bytes, int] = {}
        for i, name in enumerate(names):
            seen[name] = copies = seen.get(name, -1) + 1
            if copies:
                names[i] = name + b",%d" % copies
    return _uuid5_all(run_namespace, names)


def _uuid5_all(run_namespace: str, names: Sequence[bytes]) -> list[str]:
    """Return uuid5 of every name; the same values as `uuid.uuid5`, about four times as fast."""
    prefix = hashlib.sha1(uuid.uuid5(_ROOT, run_namespace).bytes, usedforsecurity=False)
    digests = bytearray()
    for name in names:
        sha1 = prefix.copy()
        sha1.update(name)
        digests += sha1.digest()[:16]
    octets = np.frombuffer(digests, np.uint8).reshape(-1, 16).copy()
    octets[:, 6] = octets[:, 6] & 0x0F | 0x50  # RFC 9562: version 5
    octets[:, 8] = octets[:, 8] & 0x3F | 0x80  # and variant 10
    text = octets.tobytes().hex()
    ids = (text[i : i + 32] for i in range(0, len(text), 32))
    return [f"{t[:8]}-{t[8:12]}-{t[12:16]}-{t[16:20]}-{t[20:]}" for t in ids]


def detection_features(
    detections: Detections,
    *,
    classes: Sequence[str],
    ids: Sequence[str],
    offset_l0: tuple[float, float] = (0.0, 0.0),
    measurements: Mapping[str, ArrayLike] | None = None,
    colors: Sequence[Color] = PALETTE,
) -> Iterator[Feature]:
    """Make one `detection` object of every row, in the table's order.

    Parameters
    ----------
    detections : Detections
        Boxes in level-0 px.
    classes : sequence of str
        Class names, indexed by label.
    ids : sequence of str
        One UUID a row, from `detection_ids`.
    offset_l0 : tuple of float
        Position of the viewer's origin, level-0 px: (bounds-x, bounds-y) for QuPath, else (0, 0).
    measurements : mapping of str to array-like of shape (N,), optional
        More columns to write beside the score.
    colors : sequence of Color
        Colour of each class, indexed by label and repeated where there are more classes.

    Yields
    ------
    Feature

    Raises
    ------
    ConfigError
        If a column's length differs from the table's, or a label has no class.

    Examples
    --------
    >>> table = Detections.build([[10, 10, 20, 20]], [0.9])
    >>> ids = detection_ids("slide:model", table.xyxy, table.label)
    >>> [f.geometry for f in detection_features(table, classes=["mitotic figure"], ids=ids, offset_l0=(4, 0))]
    [(6.0, 10.0, 16.0, 20.0)]
    """
    columns = {"score": detections.score} | {k: np.asarray(v, np.float64) for k, v in (measurements or {}).items()}
    for name, column in [("ids", ids), *columns.items()]:
        if len(column) != len(detections):
            raise ConfigError(
                f"column {name!r}: expected {len(detections)} rows like the detections, got {len(column)}"
            )
    if len(detections) and not 0 <= int(detections.label.min()) <= int(detections.label.max()) < len(classes):
        raise ConfigError(
            f"classes: expected a name for labels {detections.label.min()} to {detections.label.max()}, "
            f"got {len(classes)} names; pass the classes of the detector that made the table"
        )
    keys = tuple(columns)
    for start in range(0, len(detections), _BLOCK):
        rows = slice(start, start + _BLOCK)
        boxes = (detections.xyxy[rows] - np.array([*offset_l0, *offset_l0])).tolist()
        numbers = zip(*(columns[k][rows].tolist() for k in keys), strict=True)
        for box, label, values, id_ in zip(boxes, detections.label[rows].tolist(), numbers, ids[rows], strict=True):
            yield Feature(
                "detection",
                tuple(box),
                classes[label],
                colors[label % len(colors)],
                measurements=dict(zip(keys, values, strict=True)),
                id=id_,
            )


def region_features(
    regions: Iterable[FlaggedRegion],
    *,
    run_namespace: str,
    offset_l0: tuple[float, float] = (0.0, 0.0),
    classes: Sequence[str] = (),
) -> Iterator[Feature]:
    """Make one locked `annotation` of every flagged region, named like ``1: mitotic figure ×7``, or ``×2 of 7``.

    Parameters
    ----------
    regions : iterable of FlaggedRegion
        Ranked regions; outlines in level-0 px.
    run_namespace : str
        As for `detection_ids`; with rank and outline it makes the id.
    offset_l0 : tuple of float
        Position of the viewer's origin, level-0 px.
    classes : sequence of str
        The detector's: each has the colour that its detections have.

    Yields
    ------
    Feature

    Raises
    ------
    ConfigError
        If an outline has fewer than 3 points.
    """
    colors = {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(classes)}
    for region in regions:
        outline = np.asarray(region.polygon_l0, np.float64)
        if outline.ndim != 2 or outline.shape[1] != 2 or len(outline) < 3:
            raise ConfigError(f"flagged region {region.rank}: expected an (N, 2) outline, N >= 3, got {outline.shape}")
        corners = ",".join(str(v) for v in np.rint(outline * _BOX_STEPS_PER_PX).astype(np.int64).ravel().tolist())
        of_all = f"{region.n_label} of {region.n}" if 0 < region.n_label < region.n else f"{region.n}"
        yield Feature(
            "annotation",
            shapely.Polygon(outline - np.asarray(offset_l0)),
            region.label,
            colors.get(region.label, PALETTE[0]),
            name=f"{region.rank}: {region.label} ×{of_all}",
            measurements={
                "rank": region.rank,
                "detections": region.n,
                "peak score": region.peak,
                "mean score": region.mean,
                "evidence": region.evidence,
                "area mm^2": region.area_mm2,
            },
            locked=True,
            id=_uuid5_all(run_namespace, [f"region {region.rank} {corners}".encode()])[0],
        )


def polygon_features(
    geometries: Iterable[Any],
    *,
    class_names: Iterable[str],
    run_namespace: str,
    kind: Kind = "detection",
    offset_l0: tuple[float, float] = (0.0, 0.0),
    colors: Mapping[str, Color] | None = None,
) -> Iterator[Feature]:
    """Make one object of every outline, lazily: any number of them passes through one block of memory.

    Parameters
    ----------
    geometries : iterable of shapely geometry
        Outlines in level-0 px, valid or not; `write_geojson` repairs them.
    class_names : iterable of str
        The class of each geometry, in step with `geometries`.
    run_namespace : str
        As for `detection_ids`; with the running number it makes the id.
    kind : {"detection", "annotation", "tile"}
        The QuPath object type.
    offset_l0 : tuple of float
        Position of the viewer's origin, level-0 px.
    colors : mapping of str to Color, optional
        Colour of a class; classes without one get those of `PALETTE` in order of appearance.

    Yields
    ------
    Feature

    Raises
    ------
    ConfigError
        If there are fewer classes than geometries, or more.

    Examples
    --------
    >>> nucleus = shapely.box(0, 0, 8, 8)
    >>> [f.kind for f in polygon_features([nucleus], class_names=["neoplastic"], run_namespace="slide:model")]
    ['detection']
    """
    palette = dict(colors or {})
    geometry_source, class_source = iter(geometries), iter(class_names)
    shift = np.asarray(offset_l0, np.float64)
    n = 0
    while True:
        block = list(islice(geometry_source, _BLOCK))
        names = list(islice(class_source, len(block) or 1))
        if len(names) != len(block):
            raise ConfigError(f"class_names: expected one class for each geometry, the two part after {n + len(names)}")
        if not block:
            return
        if shift.any():
            block = list(shapely.transform(np.array(block, object), lambda points: points - shift))
        ids = _uuid5_all(run_namespace, [b"polygon %d" % i for i in range(n, n + len(block))])
        for geometry, class_name, id_ in zip(block, names, ids, strict=True):
            color = palette.setdefault(class_name, PALETTE[len(palette) % len(PALETTE)])
            yield Feature(kind, geometry, class_name, color, id=id_)
        n += len(block)
