"""Whole-slide images as planes of RGB pixels: `open_slide`, `Slide` and what a read returns."""

from __future__ import annotations

from slidescan.slides.open import Backend, memory_slide, open_slide, pooled
from slidescan.slides.slide import Color, Slide
from slidescan.slides.source import Facts, Level, Pixels, Source

__all__ = [
    "Backend",
    "Color",
    "Facts",
    "Level",
    "Pixels",
    "Slide",
    "Source",
    "memory_slide",
    "open_slide",
    "pooled",
]
