"""One TIFF tile's bytes to RGB.

Hides compression, JPEG tables, colour models, planes and predictors. Invariants: the size a stream claims is read from
its header and compared with the tile before a decoder runs, so a stream cannot unpack to more than its tile; a JPEG
without its end marker is bad even though decoders would fill the missing part with grey; the decoders release the GIL.
Limit: a flipped bit inside JPEG entropy data usually still decodes, to wrong colours, and nothing here can tell. Of
fewer than half of such tiles libjpeg warns, which OpenSlide heeds and imagecodecs does not pass on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from slidescan.slides.ifd import Directory
from slidescan.slides.source import Declined, composite

__all__ = ["DECODER_ERRORS", "Codec", "jpeg2000_size", "jpeg_size"]

# What imagecodecs raises for bad data: its own errors are RuntimeErrors, argument checks are the others.
DECODER_ERRORS = (RuntimeError, ValueError, TypeError, IndexError)

_JPEG = 7
_JPEG2000 = (33003, 33004, 33005, 34712)
_SEPARATE = 2  # PlanarConfiguration: each colour has tiles of its own
_APERIO_YCBCR = 33003  # in Aperio files: components are YCbCr although the codestream does not say so
_RAW = {
    1: None,
    5: imagecodecs.lzw_decode,
    8: imagecodecs.zlib_decode,
    32946: imagecodecs.zlib_decode,
    32773: imagecodecs.packbits_decode,
    50000: imagecodecs.zstd_decode,
}
_RGB, _YCBCR = 2, 6  # PhotometricInterpretation
_ALPHA = (1, 2)  # ExtraSamples: associated, unassociated

# JPEG markers that open a frame (ITU T.81 table B.1): C0 to CF without DHT, JPG and DAC.
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_WITHOUT_LENGTH = frozenset((0x01, *range(0xD0, 0xDA)))  # TEM, RST, SOI, EOI
_MOST_SCANS = 64  # progressive encoders make about ten, and a preview has some; decoding takes its time for each
_SOC_SIZ = b"\xff\x4f\xff\x51"  # how a JPEG 2000 codestream begins (ITU T.800, annex A)


@dataclass(frozen=True, slots=True)
class Codec:
    """Decodes the tiles of one directory; make it with `Codec.of`."""

    compression: int
    photometric: int
    samples: int
    planes: int
    predictor: int
    tables: bytes | None
    aperio: bool
    tile_wh: tuple[int, int]
    alpha: int

    @classmethod
    def of(cls, directory: Directory, aperio: bool = False) -> Codec:
        """Return the codec of a directory.

        Raises
        ------
        Declined
            If the pixels are compressed in a way not known here.
        SlideFormatError
            If they are not 8-bit RGB.
        """
        samples, photometric = directory.first(277, 1), directory.first(262, -1)
        bits = set(directory.values(258)) or {1}
        compression, extra = directory.first(259, 1), directory.first(338, 0)
        name = directory.file.name
        if bits != {8} or directory.first(339, 1) != 1:
            directory.refuse(f"expected 8-bit colour, found {'/'.join(map(str, sorted(bits)))} bits a sample")
        if samples not in (3, 4) or (samples == 4 and extra not in _ALPHA):
            directory.refuse(f"expected RGB, found {samples} channels")
        planes = samples if directory.first(284, 1) == _SEPARATE else 1
        if photometric not in (_RGB, _YCBCR) or (planes > 1 and photometric != _RGB):
            raise Declined(f"{name}: unknown colour model {photometric}")
        if compression not in _RAW and compression != _JPEG and compression not in _JPEG2000:
            raise Declined(f"{name}: unknown compression {compression}")
        predictor = directory.first(317, 1)
        if compression in _RAW and (photometric != _RGB or predictor not in (1, 2)):
            raise Declined(f"{name}: colour model {photometric} with predictor {predictor} is not known here")
        if compression not in _RAW and samples != 3:
            raise Declined(f"{name}: {samples} channels in a JPEG stream are not known here")
        tables = directory.blob(347) or None
        samples //= planes
        return cls(compression, photometric, samples, planes, predictor, tables, aperio, directory.tile_wh, extra)

    @property
    def max_bytes(self) -> int:
        """Most bytes a part of a tile can honestly have: a bad length must not be read into memory."""
        return 2 * self.tile_wh[0] * self.tile_wh[1] * self.samples + 65536

    def decode(self, parts: Sequence[bytes], need_wh: tuple[int, int]) -> NDArray[np.uint8]:
        """Return RGB (H, W, 3) of at least `need_wh` px from a tile's one part, or one a plane.

        Raises one of `DECODER_ERRORS` for bad data.
        """
        planes = [self._part(data, need_wh) for data in parts]
        pixels = planes[0] if len(planes) == 1 else np.concatenate(planes, 2)
        return pixels if pixels.shape[2] == 3 else self._over_white(pixels)

    def _part(self, data: bytes, need_wh: tuple[int, int]) -> NDArray[np.uint8]:
        """Return (H, W, samples)."""
        if self.compression == _JPEG:
            pixels = self._jpeg(data, need_wh)
        elif self.compression in _JPEG2000:
            pixels = self._jpeg2000(data, need_wh)
        else:
            pixels = self._raw(data, need_wh)
        if pixels.ndim == 2:
            pixels = pixels[..., None]
        if pixels.dtype != np.uint8 or pixels.shape[2:] != (self.samples,):
            raise ValueError("16 bits, or not the channels that the directory says")
        self._fits(pixels.shape[1], pixels.shape[0], need_wh)
        return pixels

    def _fits(self, width: int, height: int, need_wh: tuple[int, int]) -> None:
        if not (need_wh[0] <= width <= self.tile_wh[0] and need_wh[1] <= height <= self.tile_wh[1]):
            raise ValueError("the stream's size is not the tile's")

    def _jpeg(self, data: bytes, need_wh: tuple[int, int]) -> NDArray[np.uint8]:
        self._fits(*jpeg_size(data), need_wh)
        if data.rfind(b"\xff\xd9") < 0:
            raise ValueError("the stream has no end")
        wanted = "RGB" if self.samples == 3 else "GRAYSCALE"
        if self.photometric == _YCBCR:
            coded: str | None = "YCBCR"
        else:
            # Aperio stores RGB as RGB; a JFIF header means YCbCr whatever the tag says (Bio-Formats writes that).
            coded = None if b"JFIF\0" in data[:32] and not self.aperio else wanted
        return np.asarray(imagecodecs.jpeg8_decode(data, tables=self.tables, colorspace=coded, outcolorspace=wanted))

    def _jpeg2000(self, data: bytes, need_wh: tuple[int, int]) -> NDArray[np.uint8]:
        self._fits(*jpeg2000_size(data), need_wh)
        pixels = np.asarray(imagecodecs.jpeg2k_decode(data))
        ycbcr = self.photometric == _YCBCR or (self.aperio and self.compression == _APERIO_YCBCR)
        if not ycbcr or pixels.dtype != np.uint8 or pixels.shape[2:] != (3,):
            return pixels
        return pixels if _is_transformed(data) else _ycbcr_to_rgb(pixels)

    def _raw(self, data: bytes, need_wh: tuple[int, int]) -> NDArray[np.uint8]:
        width = self.tile_wh[0]
        row = width * self.samples
        unpack = _RAW[self.compression]
        # Room for one whole tile: a stream that holds more stops there.
        flat = np.frombuffer(data if unpack is None else unpack(data, out=self.tile_wh[1] * row), np.uint8)
        rows = min(flat.size // row, self.tile_wh[1])
        self._fits(width, rows, need_wh)
        pixels = flat[: rows * row].reshape(rows, width, self.samples)
        return np.cumsum(pixels, axis=1, dtype=np.uint8) if self.predictor == 2 else pixels

    def _over_white(self, rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self.alpha != _ALPHA[0]:
            return composite(rgba)
        # Colours are already multiplied by alpha: only the white behind is missing.
        behind = 255 - rgba[..., 3:].astype(np.uint16)
        over: NDArray[np.uint8] = np.minimum(rgba[..., :3] + behind, 255).astype(np.uint8)
        return over


def _ycbcr_to_rgb(ycbcr: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Full-range BT.601, as JPEG and TIFF define it."""
    return np.asarray(Image.frombuffer("YCbCr", ycbcr.shape[1::-1], ycbcr).convert("RGB"))


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Width and height in the frame header of a JPEG stream, as a decoder will find it."""
    at = 2
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG stream")
    if data.count(b"\xff\xda") > _MOST_SCANS:  # of some bytes each, over all px
        raise ValueError("more scans than a writer makes")
    while data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:
            at += 1
        elif marker in _SOF:
            return int.from_bytes(data[at + 7 : at + 9], "big"), int.from_bytes(data[at + 5 : at + 7], "big")
        elif marker in _WITHOUT_LENGTH:  # nothing of the kind comes before a frame
            break
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    raise ValueError("no frame in the JPEG stream")


def jpeg2000_size(data: bytes) -> tuple[int, int]:
    """Width and height in the SIZ segment of the codestream that a decoder will take."""
    at = _codestream(data)
    x1, y1, x0, y0 = (int.from_bytes(data[at + 8 + 4 * i : at + 12 + 4 * i], "big") for i in range(4))
    return x1 - x0, y1 - y0


def _codestream(data: bytes) -> int:
    """Return where the codestream begins: at once, or in the box of a JP2 file that is for it (ITU T.800, annex I)."""
    at = 0
    while data[at : at + 4] != _SOC_SIZ:
        length, kind, header = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8], 8
        if length == 1:
            length, header = int.from_bytes(data[at + 8 : at + 16], "big"), 16
        if kind == b"jp2c" and data[at + header : at + header + 4] == _SOC_SIZ:
            return at + header
        if kind == b"jp2c" or length < header or at + length >= len(data):
            raise ValueError("not a JPEG 2000 stream")
        at += length
    return at


def _is_transformed(data: bytes) -> bool:
    """Return whether the codestream says that its components were made of RGB, which a decoder makes of them again."""
    at = _codestream(data) + 2
    while data[at] == 0xFF and data[at + 1] not in (0x90, 0xD9):  # SOT, EOC: the main header ends
        if data[at + 1] == 0x52:  # COD
            return data[at + 8] == 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False
