"""Results in other programs' formats: GeoJSON for QuPath, OME-NGFF for image viewers.

`slidescan.export.ngff` is imported on its own, since it needs zarr.
"""

from __future__ import annotations

from slidescan.export.features import Feature, detection_features, detection_ids, polygon_features, region_features
from slidescan.export.geojson import write_geojson
from slidescan.export.validate import GeojsonReport, Problem, inspect_geojson, validate_geojson

__all__ = [
    "Feature",
    "GeojsonReport",
    "Problem",
    "detection_features",
    "detection_ids",
    "inspect_geojson",
    "polygon_features",
    "region_features",
    "validate_geojson",
    "write_geojson",
]
