"""Training of the bundled detector: images from annotated crops, loop, metrics."""

from __future__ import annotations
