"""Detectors: find one by name, load its weights when the first tile comes, score tiles.

`load_detector` is the door; `slidescan.detect.network` (torch, transformers) is imported with the first tile only.
"""

from __future__ import annotations

from slidescan.detect.card import Card, write_model
from slidescan.detect.load import Family, Model, load_detector

__all__ = ["Card", "Family", "Model", "load_detector", "write_model"]
