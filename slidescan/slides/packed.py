"""Packed bytes of a chunk: how far they unpack, before a decoder does it.

Hides what each format says of its own size, and where. What says nothing is unpacked here first, no further than is
safe, and dropped.
"""

from __future__ import annotations

import bz2
import lzma
import math
import zlib
from collections.abc import Callable
from typing import Any

import imagecodecs

from slidescan.slides.codecs import jpeg2000_size, jpeg_size

__all__ = ["check_packed"]

_GZIP = b"\x1f\x8b\x08"  # begins a part of gzip data (RFC 1952)
_ZSTD = b"\x28\xb5\x2f\xfd"  # begins a frame (RFC 8878)
_LZMA_BYTES = 256 << 20  # its decoder asks for a dictionary of up to 4 GB; xz -9 has 64 MB
_STREAMS: dict[str, Callable[[], Any]] = {
    "zlib": lambda: zlib.decompressobj(zlib.MAX_WBITS | 32),  # or gzip
    "imagecodecs_deflate": lambda: zlib.decompressobj(zlib.MAX_WBITS | 32),
    "bz2": bz2.BZ2Decompressor,
    "lzma": lambda: lzma.LZMADecompressor(memlimit=_LZMA_BYTES),
}


def check_packed(coder: str, data: memoryview, most_bytes: int) -> None:
    """Make sure that packed data unpacks to no more than `most_bytes`, and is not cut off where that shows.

    Raises
    ------
    ValueError
        If it does not. For data of no such format what its library raises.

    Examples
    --------
    >>> check_packed("zlib", memoryview(zlib.compress(bytes(1000))), 1000)
    >>> check_packed("zlib", memoryview(zlib.compress(bytes(1001))), 1000)
    Traceback (most recent call last):
    ValueError: unpacks to 1001 bytes or more
    """
    size = 0
    if coder == "blosc":  # whose decoder takes these numbers for true, and reads on behind the end
        size, packed = _number(data[4:8]), _number(data[12:16])
        if len(data) < 16 or packed > len(data):
            raise ValueError("cut off")
    elif coder == "lz4":
        size = _number(data[:4])
    elif coder == "gzip":
        size = _number(data[-4:])
        if bytes(data).rfind(_GZIP) > 0:  # which is the size of the last of several parts
            size = max(size, _streamed("zlib", data, most_bytes))
    elif coder == "zstd" and bytes(data[:4]) == _ZSTD:
        size = _zstd(data, most_bytes)
    elif coder == "imagecodecs_jpeg2k":
        size = 3 * math.prod(jpeg2000_size(bytes(data)))
    elif coder.startswith("imagecodecs_jpeg") and bytes(data[:2]) == b"\xff\xd8":
        stream = bytes(data)
        size = 3 * math.prod(jpeg_size(stream))
        if stream.rfind(b"\xff\xd9") < 0:  # a decoder would fill the rest with grey
            raise ValueError("cut off")
    elif coder in _STREAMS:  # which do not say it
        size = _streamed(coder, data, most_bytes)
    if size > most_bytes:
        raise ValueError(f"unpacks to {size} bytes or more")


def _streamed(coder: str, data: memoryview, most_bytes: int) -> int:
    """Return how many bytes the streams in `data` unpack to, or one more than `most_bytes` if they are more."""
    size, left = 0, bytes(data)
    while left and size <= most_bytes:
        part = _STREAMS[coder]()
        size += len(part.decompress(left, most_bytes + 1 - size))
        left = part.unused_data if part.eof else b""
    return size


def _zstd(data: memoryview, most_bytes: int) -> int:
    """Return what a frame says of its size (RFC 8878, 3.1.1.1), or else how far it unpacks."""
    flags = data[4]
    at = 5 + (not flags & 32) + (0, 1, 2, 4)[flags & 3]  # behind window and dictionary
    if flags < 64 and not flags & 32:  # it says nothing
        return len(imagecodecs.zstd_decode(bytes(data), out=most_bytes))
    return _number(data[at : at + (1, 2, 4, 8)[flags >> 6]])


def _number(data: memoryview) -> int:
    return int.from_bytes(data, "little")
