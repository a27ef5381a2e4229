"""slidescan finds what matters on gigapixel pathology slides.

The one path::

    open_slide → plan → (region: read → tiles → detect → commit) → stitch → anomaly map → flagged regions → export
                         └── Dask: many at once ──┘

========================  ===============================================================
`open_slide`              Open a whole-slide image (SVS, OME-TIFF, NDPI, DICOM, OME-Zarr, …)
`load_detector`           Load a detector: ``"mitosis"``, a directory, or a Hugging Face id
`scan`                    Scan one slide at full resolution
`scan_archive`            Scan all slides of a list, a folder or a pattern, and go on after anything
`open_archive`            All results of such a run as one: a row a slide, the best regions of all
`detect_image`            Detect on one picture, sliced like a slide where it is large
`accelerate`              Put the fast deformable attention into a transformers model
`ops`                     The deformable-attention op itself
`load_result`             Read a result directory back
`review`                  Look at what was flagged, decide, and keep every decision
`ScanConfig`              Every setting, with its default and unit
`SlidescanError`          What every foreseen failure is an instance of
`ScanResult`              Detections, anomaly map, coverage, flagged regions, exports
`Slide`, `Detector`       What a scan reads from and what it scores with
`Box`, `Frame`            Geometry: rectangles and physical scale
`Detections`              The table of boxes, scores and labels
`Phantom`                 A synthetic slide with known truth
========================  ===============================================================

Importing slidescan loads neither torch nor dask: names are fetched on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from slidescan import ops as ops
    from slidescan.archive import open_archive as open_archive
    from slidescan.archive import scan_archive as scan_archive
    from slidescan.config import ScanConfig as ScanConfig
    from slidescan.detect import load_detector as load_detector
    from slidescan.detections import Detections as Detections
    from slidescan.detections import Detector as Detector
    from slidescan.errors import SlidescanError as SlidescanError
    from slidescan.geometry import Box as Box
    from slidescan.geometry import Frame as Frame
    from slidescan.ops import accelerate as accelerate
    from slidescan.phantom import Phantom as Phantom
    from slidescan.picture import detect_image as detect_image
    from slidescan.result import ScanResult as ScanResult
    from slidescan.reviews import review as review
    from slidescan.saved import load_result as load_result
    from slidescan.scan_slide import scan as scan
    from slidescan.slides import Slide as Slide
    from slidescan.slides import open_slide as open_slide

_HOME = {
    "Box": "geometry",
    "Detections": "detections",
    "Detector": "detections",
    "Frame": "geometry",
    "Phantom": "phantom",
    "ScanConfig": "config",
    "ScanResult": "result",
    "Slide": "slides",
    "SlidescanError": "errors",
    "accelerate": "ops",
    "detect_image": "picture",
    "load_detector": "detect",
    "load_result": "saved",
    "open_archive": "archive",
    "open_slide": "slides",
    "review": "reviews",
    "scan": "scan_slide",
    "scan_archive": "archive",
}

__all__ = [
    "Box",
    "Detections",
    "Detector",
    "Frame",
    "Phantom",
    "ScanConfig",
    "ScanResult",
    "Slide",
    "SlidescanError",
    "accelerate",
    "detect_image",
    "load_detector",
    "load_result",
    "open_archive",
    "open_slide",
    "ops",
    "review",
    "scan",
    "scan_archive",
]


def __getattr__(name: str) -> Any:
    """Fetch a public name from its module on first use."""
    if name == "ops":
        return importlib.import_module("slidescan.ops")
    if name not in _HOME:
        raise AttributeError(f"module 'slidescan' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"slidescan.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
