"""Decoded tiles that the next read will want, for all slides of this process; and which tiles these are.

Neighbouring regions overlap, and a storage tile on their border belongs to both: decoded for each, a fifth of all tiles
of 240 px is decoded twice. Only tiles near a block's edge come here; the many in its middle are wanted once.
Invariants: a tile is decoded once while it is here, however many threads want it, and no lock but its own is held
meanwhile; the bytes kept are bounded: a tile goes when as many reads have had it as were to want it, and where there is
no room the longest unused go first; a tile is never written to.
"""

from __future__ import annotations

import itertools
import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

__all__ = ["MOST_TILE_BYTES", "Span", "TilePool", "owners", "pool", "spans"]

Rgb = NDArray[np.uint8]
Key = TypeVar("Key", bound=Hashable)

# Of one process. A border of two regions of 4096² px is 6 MB of tiles of 240 px; those below are wanted at most two
# regions later, those at the right after a strip of the slide (`slidescan.plan`): of one 24,000 px high, 35 MB.
_BUDGET_BYTES = 64 << 20
MOST_TILE_BYTES = _BUDGET_BYTES // 16  # 1,182² px: of larger ones too few would stay until the next block wants them
# px: tiles that reach so near a block's edge are kept for the next block. Neighbouring regions overlap by two halos, of
# 112 px each with the bundled detector. Read from a finer level they overlap by more, and some tiles are decoded twice.
_SHARED_PX = 256

owners = itertools.count()  # one a source of this process: no tile is taken for that of another file of the same name


class Span(NamedTuple):
    """Tiles of one number along one side of a block.

    Parameters
    ----------
    number : int
    low, high : int
        Where it begins and ends in the image, px; the rest of it is padding that an encoder may have left out.
    start, stop : int
        What of that is in the block, px.
    reads : float
        How many blocks will want it: one, or more where it is near an edge of the block that is not the image's.
    """

    number: int
    low: int
    high: int
    start: int
    stop: int
    reads: float


def spans(start: int, stop: int, tile_px: int, size_px: int) -> Iterator[Span]:
    """Yield the tiles along one side of a block from `start` to `stop` of an image of `size_px`.

    Examples
    --------
    >>> [(span.number, span.start, span.stop, span.reads) for span in spans(0, 1000, 400, 2000)]
    [(0, 0, 400, 1), (1, 400, 800, 2), (2, 800, 1000, 2)]
    """
    neighbours = 2 if 2 * tile_px <= stop - start else math.inf  # who can tell how many share a strip of the slide
    for number in range(start // tile_px, -(-stop // tile_px)):
        low, high = number * tile_px, min((number + 1) * tile_px, size_px)
        shared = 0 < start > low - _SHARED_PX or size_px > stop < high + _SHARED_PX
        yield Span(number, low, high, max(low, start), min(high, stop), neighbours if shared else 1)


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
        return self.get_all({key: reads}, lambda _: [decode()])[0]

    def get_all(self, reads: Mapping[Key, float], decode: Callable[[Sequence[Key]], Sequence[Rgb]]) -> list[Rgb]:
        """Return the tiles of many keys, as `get` would; those that nobody has are decoded together."""
        mine: dict[Key, _Entry] = {}
        theirs: dict[Key, _Entry] = {}
        with self._lock:
            for key, count in reads.items():
                entry = self._tiles.get(key)
                if entry is None:
                    mine[key] = self._tiles[key] = _Entry(count)
                    continue
                theirs[key] = entry
                self._tiles.move_to_end(key)
                entry.reads -= 1
                if entry.reads <= 0 and entry.kept_bytes:
                    del self._tiles[key]
                    self.kept_bytes -= entry.kept_bytes
        tiles = self._fill(mine, decode) if mine else {}
        for key, entry in theirs.items():  # with its own done: two threads may each wait for what the other decodes
            with entry.decoding:
                tile = entry.tile
            tiles[key] = decode([key])[0] if tile is None else tile
        return [tiles[key] for key in reads]

    def forget(self, key: Hashable) -> None:
        """Keep the tile of `key` no longer."""
        with self._lock:
            entry = self._tiles.get(key)
            if entry is not None and entry.kept_bytes:
                del self._tiles[key]
                self.kept_bytes -= entry.kept_bytes

    def _fill(self, entries: Mapping[Key, _Entry], decode: Callable[[Sequence[Key]], Sequence[Rgb]]) -> dict[Key, Rgb]:
        try:
            tiles = dict(zip(entries, decode(list(entries)), strict=True))
            for key, entry in entries.items():
                entry.tile = tiles[key]
        except BaseException:
            with self._lock:
                for key in entries:
                    self._tiles.pop(key, None)
            raise
        finally:
            for entry in entries.values():
                entry.decoding.release()
        with self._lock:
            self.decoded += len(entries)
            for key, entry in entries.items():
                if entry.reads <= 0:  # all who wanted it have come meanwhile
                    del self._tiles[key]
                else:
                    entry.kept_bytes = tiles[key].nbytes
                    self.kept_bytes += entry.kept_bytes
            self._shrink()
        return tiles

    def _shrink(self) -> None:
        while self.kept_bytes > self._budget:
            oldest, left = self._tiles.popitem(last=False)
            if left.kept_bytes:
                self.kept_bytes -= left.kept_bytes
            else:  # on its way, and somebody waits for it
                self._tiles[oldest] = left


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
