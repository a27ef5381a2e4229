"""Detectors: find one by name, load its weights when the first tile comes, score tiles.

`load_detector` is the door; `slidescan.detect.network` (torch, transformers) is imported with the first tile only, and
ultralytics (AGPL-3.0) by `slidescan.detect.yolo` alone, for a name that begins with ``ultralytics:``.
"""

from __future__ import annotations

from slidescan.detect.card import Card, write_model
from slidescan.detect.load import load_detector
from slidescan.detect.model import Family, Model
from slidescan.detect.yolo import Yolo, convert_yolo

__all__ = ["Card", "Family", "Model", "Yolo", "convert_yolo", "load_detector", "write_model"]
