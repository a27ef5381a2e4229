"""Memory that is used again: networks and regions of pixels ask for the same blocks all the time.

The system clears each page it hands out, and threads that ask for pages wait for one another. glibc gives large blocks
back when they are freed, so a network would have its pages cleared with every batch: with blocks kept the bundled
detector is 1.5 times as fast on two cores (`python pipelines/benchmark.py heap`), with the memory it takes under
glibc's defaults. What the heap keeps is given back between regions. Blocks of 32 MB and more, such as a region's
pixels, glibc always maps apart: `pixels` uses those again itself. Another C library is left as it is. And while a large
library is loaded, Python looks for no garbage.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import weakref
from collections import deque
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

__all__ = ["give_back_freed", "give_back_pixels", "keep_freed", "pixels", "without_collecting"]

# mallopt(3): its numbers, and bytes. The first is the most that glibc takes.
_MMAP_THRESHOLD, _APART_BYTES = -3, 32 << 20
_TRIM_THRESHOLD, _KEPT_BYTES = -1, 1 << 30
_TOP_PAD, _GROWS_BY_BYTES = -2, 64 << 20

_LEAST_BYTES = 4 << 20  # of a block that is used again: smaller ones are glibc's business
_LARGEST_BYTES = 128 << 20  # twice a region: nobody reads larger ones by the hundred
_MOST_BYTES = 1 << 30  # kept free: twenty regions of 4,224 px, one for each thread that reads
_free: deque[NDArray[np.uint8]] = deque()
_keeping = False


def keep_freed() -> None:
    """Keep what is freed for what is asked for next; said again it changes nothing."""
    global _keeping
    _keeping = True
    with contextlib.suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, _APART_BYTES)
        libc.mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        libc.mallopt(_TOP_PAD, _GROWS_BY_BYTES)


def give_back_freed() -> None:
    """Return freed memory to the system: over 256 regions a scan grew by 230 MB without."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def without_collecting() -> Iterator[None]:
    """Let Python not look for garbage while a large library is loaded, of which nothing is: a tenth of that time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    """Return an array (height, width, 3) of any values, in the memory of an earlier one where nothing refers to that.

    Memory is kept from `keep_freed` on, until `give_back_pixels`.

    Examples
    --------
    >>> pixels(2, 3).shape
    (2, 3, 3)
    """
    size = height * width * 3
    if not (_keeping and _LEAST_BYTES <= size <= _LARGEST_BYTES):
        return np.empty((height, width, 3), np.uint8)
    block = _left(size)
    lease = (ctypes.c_uint8 * size).from_buffer(block.data)  # what every view of the array refers to
    weakref.finalize(lease, _keep, block).atexit = False
    return np.frombuffer(memoryview(lease), np.uint8).reshape(height, width, 3)


def give_back_pixels() -> None:
    """Return to the system the blocks that nothing refers to, and keep no more of them."""
    global _keeping
    _keeping = False
    _free.clear()


def _left(size: int) -> NDArray[np.uint8]:
    """Return a block of at least `size` bytes."""
    with contextlib.suppress(IndexError):  # another thread took the last one
        for _ in range(len(_free)):
            block = _free.popleft()
            if size <= block.size <= 2 * size:
                return block
            _free.append(block)
    return np.empty(size, np.uint8)


def _keep(block: NDArray[np.uint8]) -> None:
    """Keep a block; takes no lock, for it can be called anywhere in any thread."""
    if not _keeping:
        return
    _free.append(block)
    with contextlib.suppress(IndexError):
        while sum(each.size for each in tuple(_free)) > _MOST_BYTES:
            _free.popleft()
