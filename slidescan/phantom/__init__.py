"""A slide that does not exist: procedural tissue with exact truth, for tests, demonstrations and training.

`Phantom` renders any box of itself; `write_phantom` makes a file of it that OpenSlide and tifffile read as Aperio's.
"""

from __future__ import annotations

from slidescan.phantom.file import write_phantom
from slidescan.phantom.layout import OBJECT_UM
from slidescan.phantom.slide import Phantom

__all__ = ["OBJECT_UM", "Phantom", "write_phantom"]
