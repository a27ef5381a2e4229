"""The C library's heap, told what it is used for: a network that asks for the same blocks with every batch.

glibc gives large blocks back to the system when they are freed, and the system clears each page anew when it is asked
again. With blocks kept the bundled detector is 1.5 times as fast on two cores (`python pipelines/benchmark.py heap`),
with the memory it takes under glibc's defaults. What the heap keeps is given back between regions, and arrays of 32 MB
and more, such as a region's pixels, have pages of their own. Another C library is left as it is.
"""

from __future__ import annotations

import contextlib
import ctypes

__all__ = ["give_back_freed", "keep_freed"]

# mallopt(3): its numbers, and bytes. The first is the most that glibc takes.
_MMAP_THRESHOLD, _APART_BYTES = -3, 32 << 20
_TRIM_THRESHOLD, _KEPT_BYTES = -1, 1 << 30
_TOP_PAD, _GROWS_BY_BYTES = -2, 64 << 20


def keep_freed() -> None:
    """Keep what is freed for what is asked for next; said again it changes nothing."""
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _APART_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_TOP_PAD, _GROWS_BY_BYTES)


def give_back_freed() -> None:
    """Return freed memory to the system: over 256 regions a scan grew by 230 MB without."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)
