"""How a result's detections and map lie on the disk: columns of a Parquet table, channels of an OME-Zarr."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from slidescan.anomaly import MOST_DENSITY_STEPS, AnomalyMap
from slidescan.commit import commit
from slidescan.detections import COLUMNS, Detections
from slidescan.export.ngff import Channel, read_ngff, write_ngff
from slidescan.geometry import Frame

__all__ = ["attribute_columns", "from_table", "read_map", "read_table", "to_table", "write_map", "write_table"]

_EDGES = COLUMNS[1:5]
_STEPS = "density_steps_per_mm2"
_DENSITY_END_PER_MM2 = 20  # shown as full colour: a high mitotic count
# Windows in stored steps: score 0 to 1, density, coverage by state.
_CHANNELS = (
    Channel("score", "FF4000", 1, 10_001, 0, 10_001),
    Channel("density per mm²", "FFB000", 1, 201, 0, 65_535, active=False),
    Channel("coverage", "00A0FF", 0, 4, 0, 4, active=False),
)


def attribute_columns(detections: Detections, names: Sequence[str]) -> dict[str, NDArray[np.float32]]:
    """Return the attributes by name; without detections there are no columns to take them from."""
    columns = detections.attributes.T if len(detections) else np.empty((len(names), 0), np.float32)
    return dict(zip(names, columns, strict=True))


def to_table(
    detections: Detections, ids: Sequence[str], classes: Sequence[str], attributes: Mapping[str, NDArray[np.float32]]
) -> pa.Table:
    """Return detections as an Arrow table, in their order."""
    label = pa.DictionaryArray.from_arrays(pa.array(detections.label.astype(np.int32)), pa.array(classes))
    boxes = {name: detections.xyxy[:, i] for i, name in enumerate(_EDGES)}
    return pa.table(
        {"id": pa.array(ids, pa.string()), **boxes, "score": detections.score, "label": label, **attributes}
    )


def from_table(table: pa.Table, classes: Sequence[str], attributes: Sequence[str]) -> Detections:
    """Return the detections of such a table."""
    label = table["label"].combine_chunks()
    to_class = np.array([classes.index(name) for name in label.dictionary.to_pylist()] or [0], np.int16)
    return Detections.build(
        np.column_stack([table[c].to_numpy() for c in _EDGES]),
        table["score"].to_numpy(),
        to_class[label.indices.to_numpy()] if len(table) else np.empty(0),
        np.stack([table[name].to_numpy() for name in attributes], -1) if attributes else None,
    )


def write_table(path: Path, table: pa.Table) -> None:
    """Write a Parquet file, in one step."""

    def write(partial: Path) -> None:
        with partial.open("wb") as file:  # some names of files pyarrow takes for URLs, and others it cannot take
            pq.write_table(table, file, compression="zstd")

    commit(path, write)


def read_table(path: Path) -> pa.Table:
    """Read a Parquet file."""
    with path.open("rb") as file:
        return pq.read_table(file)


def write_map(path: Path, anomaly: AnomalyMap, frame: Frame) -> None:
    """Write the map of a slide whose level 0 is `frame`, with its pyramid."""
    steps = anomaly.density_steps_per_mm2
    score, density, coverage = _CHANNELS
    density = replace(density, end=1 + max(1, round(_DENSITY_END_PER_MM2 * steps)))
    write_ngff(
        path,
        AnomalyMap.pyramid(anomaly.encode()),
        um_per_px=anomaly.frame.mpp,
        slide_mpp=frame.mpp,
        name="anomaly",
        channels=(score, density, coverage),
        downsampling="maximum of score and coverage, mean of density",
        attributes={
            "score": "(value - 1) / 10000; 0 not evaluated",
            "density_per_mm2": f"(value - 1) / {steps:g}; 0 not evaluated",
            _STEPS: steps,
            "coverage": "0 outside, 1 background, 2 analysed, 3 saturated, 4 read-failed",
        },
    )


def read_map(path: Path, frame: Frame) -> AnomalyMap:
    """Read a map; `frame` is the map's own plane."""
    levels, told = read_ngff(path)
    return AnomalyMap.decode(levels[0], frame, float(told.get(_STEPS, MOST_DENSITY_STEPS)))
