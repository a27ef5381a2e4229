"""Decoded tiles that the next read will want, for all slides of this process.

Neighbouring regions overlap, and a storage tile on their border belongs to both: decoded for each, a fifth of all tiles
of 240 px is decoded twice. Only tiles near a block's edge come here; the many in its middle are wanted once.
Invariants: a tile is decoded once while it is here, however many threads want it, and no lock but its own is held
meanwhile; the bytes kept are bounded: a tile goes when as many reads have had it as were to want it, and where there is
no room the longest unused go first; a tile is never written to.
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

__all__ = ["TilePool", "pool"]

Rgb = NDArray[np.uint8]

# Of one process. A border of two regions of 4096² px is 6 MB of tiles of 240 px; those below are wanted at most two
# regions later, those at the right after a strip of the slide (`slidescan.plan`): of one 24,000 px high, 35 MB.
_BUDGET_BYTES = 64 << 20


class TilePool:
    """Tiles by key, at most `budget_bytes` of them.

    Examples
    --------
    >>> tiles = TilePool(budget_bytes=100)
    >>> for name in "abaca":
    ...     _ = tiles.get(name, lambda: np.zeros((4, 4, 3), np.uint8))
    >>> tiles.decoded, tiles.kept_bytes
    (3, 96)
    """

    def __init__(self, budget_bytes: int = _BUDGET_BYTES) -> None:
        self._budget = budget_bytes
        self.clear()

    def clear(self) -> None:
        """Forget everything; a forked process does, for a thread it has not may have been decoding."""
        self._lock = threading.Lock()
        self._tiles: OrderedDict[Hashable, _Entry] = OrderedDict()
        self.kept_bytes = 0
        self.decoded = 0

    def get(self, key: Hashable, decode: Callable[[], Rgb], reads: float = math.inf) -> Rgb:
        """Return the tile of `key`, decoded here if nobody has it; what `decode` raises is raised, and not kept.

        After the last of the `reads` that will want it, this one included, it is kept no longer.
        """
        with self._lock:
            entry = self._tiles.get(key)
            first = entry is None
            if entry is None:
                entry = self._tiles[key] = _Entry(reads)
            else:
                self._tiles.move_to_end(key)
                entry.reads -= 1
                if entry.reads <= 0 and entry.kept_bytes:
                    del self._tiles[key]
                    self.kept_bytes -= entry.kept_bytes
        if first:
            return self._fill(key, entry, decode)
        with entry.decoding:
            tile = entry.tile
        return decode() if tile is None else tile

    def peek(self, key: Hashable) -> Rgb | None:
        """Return the tile of `key` if it is here."""
        with self._lock:
            entry = self._tiles.get(key)
            if entry is None:
                return None
            self._tiles.move_to_end(key)
            return entry.tile

    def keep(self, key: Hashable, tile: Rgb) -> None:
        """Take a tile that was got elsewhere."""
        self.get(key, lambda: tile)

    def _fill(self, key: Hashable, entry: _Entry, decode: Callable[[], Rgb]) -> Rgb:
        try:
            tile = entry.tile = decode()
        except BaseException:
            with self._lock:
                self._tiles.pop(key, None)
            raise
        finally:
            entry.decoding.release()
        with self._lock:
            self.decoded += 1
            if entry.reads <= 0:  # all who wanted it have come meanwhile
                del self._tiles[key]
                return tile
            entry.kept_bytes = tile.nbytes
            self.kept_bytes += tile.nbytes
            while self.kept_bytes > self._budget:
                oldest, left = self._tiles.popitem(last=False)
                if left.kept_bytes:
                    self.kept_bytes -= left.kept_bytes
                else:  # on its way, and somebody waits for it
                    self._tiles[oldest] = left
        return tile


class _Entry:
    __slots__ = ("decoding", "kept_bytes", "reads", "tile")

    def __init__(self, reads: float) -> None:
        self.reads = reads - 1  # that will come yet
        self.tile: Rgb | None = None
        self.kept_bytes = 0  # none until it is decoded
        self.decoding = threading.Lock()
        self.decoding.acquire()


pool = TilePool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.clear)
