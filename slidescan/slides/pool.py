"""Decoded tiles that the next read will want, for all slides of this process.

Neighbouring regions overlap, and a storage tile on their border belongs to both: decoded for each, a fifth of all tiles
of 240 px is decoded twice. Only tiles near a block's edge come here; the many in its middle are wanted once.
Invariants: a tile is decoded once while it is here, however many threads want it, and no lock is held meanwhile; the
bytes kept are bounded, the longest unused go first; a tile is never written to.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable

import numpy as np
from numpy.typing import NDArray

__all__ = ["TilePool", "pool"]

Rgb = NDArray[np.uint8]

# Of one process. A region of 4096² px leaves 18 MB of tiles of 240 px, and those below it are wanted at most two
# regions later (`slidescan.plan`).
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

    def get(self, key: Hashable, decode: Callable[[], Rgb]) -> Rgb:
        """Return the tile of `key`, decoded here if nobody has it; what `decode` raises is raised, and not kept."""
        with self._lock:
            entry = self._tiles.get(key)
            first = entry is None
            if entry is None:
                entry = self._tiles[key] = _Entry()
            else:
                self._tiles.move_to_end(key)
        if first:
            return self._fill(key, entry, decode)
        entry.done.wait()
        return decode() if entry.tile is None else entry.tile

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
            entry.done.set()
        with self._lock:
            self.decoded += 1
            self.kept_bytes += tile.nbytes
            while self.kept_bytes > self._budget:
                oldest, left = self._tiles.popitem(last=False)
                if left.tile is None:  # on its way, and somebody waits for it
                    self._tiles[oldest] = left
                else:
                    self.kept_bytes -= left.tile.nbytes
        return tile


class _Entry:
    __slots__ = ("done", "tile")

    def __init__(self) -> None:
        self.done = threading.Event()
        self.tile: Rgb | None = None


pool = TilePool()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=pool.clear)
