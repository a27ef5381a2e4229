"""ICC profile to sRGB, the same for every reader.

Hides ImageCms. Invariants: raw pixels are the default (models are trained on them); the transform depends only on the
profile's bytes, so TIFF, OpenSlide and plain images give one colour; each thread has its own transform because a
little-CMS transform keeps a mutable cache.
"""

from __future__ import annotations

import io
import threading

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from slidescan.errors import SlideFormatError
from slidescan.slides.source import MAX_BLOB_BYTES

__all__ = ["ToSrgb"]


class ToSrgb:
    """Converts RGB blocks with one slide's ICC profile and the profile's own rendering intent.

    Raises
    ------
    SlideFormatError
        If the profile is too large, damaged or not for RGB.
    """

    def __init__(self, name: str, icc: bytes) -> None:
        self._name, self._icc = name, icc
        self._local = threading.local()
        self._transform()

    def __call__(self, rgb: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return `rgb` (H, W, 3) in sRGB."""
        image = Image.fromarray(np.ascontiguousarray(rgb))
        ImageCms.applyTransform(image, self._transform(), inPlace=True)
        return np.asarray(image)

    def _transform(self) -> ImageCms.ImageCmsTransform:
        made: ImageCms.ImageCmsTransform | None = getattr(self._local, "transform", None)
        if made is None:
            made = self._local.transform = self._build()
        return made

    def _build(self) -> ImageCms.ImageCmsTransform:
        advice = 'open it with color="raw"'
        if len(self._icc) > MAX_BLOB_BYTES:
            raise SlideFormatError(f"{self._name}: its ICC profile has {len(self._icc)} bytes, too many; {advice}")
        try:
            profile = ImageCms.ImageCmsProfile(io.BytesIO(self._icc))
            intent = ImageCms.Intent(ImageCms.getDefaultIntent(profile))
            return ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), "RGB", "RGB", intent)
        except (OSError, ValueError, ImageCms.PyCMSError) as exc:
            raise SlideFormatError(f"{self._name}: its ICC profile is damaged or not for RGB; {advice}") from exc
