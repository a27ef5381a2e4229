"""Slides that are arrays: for tests, notebooks and plain images.

Invariant: a memory slide behaves as a file does, through the same `Slide`: levels, transparency, holes and bounds
included, and it pickles (with its pixels).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from PIL.ExifTags import Base

from slidescan.errors import SlideFormatError, SlideReadError, SlideUnsupportedError
from slidescan.geometry import Box
from slidescan.slides.codecs import jpeg_size
from slidescan.slides.resolution import NOTHING, Resolution
from slidescan.slides.source import WHITE, Facts, check_levels, composite, pyramid

__all__ = ["MemorySource", "image_size", "image_source", "is_image"]

_TILE_PX = 256  # px; what a file would use
# Below Pillow's own warning size (89 MP), and too small for a slide: such files are fields of view.
_MAX_IMAGE_PX = 1 << 26

# By EXIF orientation, what makes a picture upright; of the last four it lies on its side.
_TURNS: dict[object, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
# What Pillow raises for damaged files, and for damaged EXIF data in them.
_DAMAGED = (ValueError, IndexError, SyntaxError, EOFError, TypeError, OverflowError, struct.error)
_PNG, _JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"


class MemorySource:
    """Levels as uint8 arrays (H, W, 3) or (H, W, 4), largest first; `holes` in level-0 px read as failed."""

    def __init__(
        self,
        levels: Sequence[NDArray[np.uint8]],
        resolution: Resolution,
        *,
        name: str,
        bounds_l0: Box | None = None,
        holes_l0: Sequence[Box] = (),
        icc: bytes | None = None,
        backend: str = "memory",
    ) -> None:
        for pixels in levels:
            if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (3, 4) or not pixels.size:
                raise SlideFormatError(
                    f"{name}: expected uint8 arrays (H, W, 3) or (H, W, 4), got {pixels.dtype} {pixels.shape}"
                )
        self._levels = list(levels)
        self._holes_l0 = tuple(holes_l0)
        sizes = [(pixels.shape[1], pixels.shape[0]) for pixels in levels]
        tiles = [(min(_TILE_PX, width), min(_TILE_PX, height)) for width, height in sizes]
        if not sizes or any(a[0] <= b[0] or a[1] < b[1] for a, b in pairwise(sizes)):
            raise SlideFormatError(f"{name}: expected levels from the largest to the smallest, got {sizes}")
        check_levels(name, pyramid(sizes, tiles))
        self.facts = Facts(backend, None, pyramid(sizes, tiles), resolution, bounds_l0, icc)

    @property
    def arrays(self) -> list[NDArray[np.uint8]]:
        """The level arrays."""
        return self._levels

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        """Fill `out` from (x, y) level px; return the marked holes inside it, in level px."""
        height, width = out.shape[:2]
        block = self._levels[level][y : y + height, x : x + width]
        out[...] = block if block.shape[2] == 3 else composite(block)
        holes: list[Box] = []
        for hole in self._holes_l0:
            inside = hole.scale(1 / self.facts.levels[level].downsample).clip(Box(x, y, x + width, y + height))
            if not inside.is_empty:
                x0, y0, x1, y1 = inside.round_out()
                out[y0 - y : y1 - y, x0 - x : x1 - x] = WHITE
                holes.append(Box(x0, y0, x1, y1))
        return holes


def is_image(head: bytes) -> bool:
    """Return whether a file that begins so is a PNG or JPEG."""
    return head.startswith((_PNG, _JPEG))


def image_source(path: Path) -> MemorySource:
    """Read a plain PNG or JPEG whole, turned upright as its EXIF data say.

    Raises
    ------
    SlideFormatError
        If it is too large, damaged, or not 8-bit colour.
    """
    with _opened(path) as image:
        turn = _TURNS.get(_orientation(image))
        upright = image if turn is None else image.transpose(turn)
        pixels = np.array(upright.convert("RGBA") if upright.mode == "P" else upright)
        # The dpi of a plain image is a screen's or a printer's, so the file does not say its µm/px.
        return MemorySource([pixels], NOTHING, name=path.name, icc=image.info.get("icc_profile"), backend="image")


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height in px of what `image_source` returns, from the file's header.

    Raises
    ------
    SlideFormatError
        As `image_source`, but for pixels that are damaged.
    """
    with _opened(path) as image:
        return image.size[::-1] if _orientation(image) in _ON_ITS_SIDE else image.size


def _orientation(image: Image.Image) -> object:
    exif = Image.Exif()
    exif.load(image.info.get("exif") or b"")  # not Pillow's getexif, which decodes a PNG
    return exif.get(Base.Orientation, 1)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open a plain image that may be read whole; what is wrong with it, here or inside, is one line."""
    try:
        with path.open("rb") as file:
            # A frame header comes after the metadata segments, of 64 KB each: ICC profiles, previews.
            head = file.read(1 << 20)
            # The size is taken from the header here because Pillow only warns, on stderr.
            width, height = _png_size(head) if head.startswith(_PNG) else jpeg_size(head)
            if width * height > _MAX_IMAGE_PX:
                raise SlideUnsupportedError(
                    f"{path.name}: a plain image of {width} × {height} px is too large to read whole "
                    f"(at most {_MAX_IMAGE_PX} px); convert it to a tiled pyramidal TIFF"
                )
            file.seek(0)
            with Image.open(file, formats=("PNG", "JPEG")) as image:
                if image.mode not in ("RGB", "RGBA", "P"):
                    raise SlideUnsupportedError(
                        f"{path.name}: expected an 8-bit colour image, found mode {image.mode}; export it as 8-bit RGB"
                    )
                yield image
    except (*_DAMAGED, UnidentifiedImageError) as exc:
        if isinstance(exc, SlideFormatError):
            raise
        raise SlideFormatError(f"{path.name}: a damaged PNG or JPEG image; export it again") from exc
    except OSError as exc:
        if exc.errno is None:  # Pillow reports a truncated image so
            raise SlideFormatError(f"{path.name}: a damaged PNG or JPEG image; export it again") from exc
        raise SlideReadError(f"{path.name}: cannot be read ({exc.strerror})") from exc


def _png_size(head: bytes) -> tuple[int, int]:
    return int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")
