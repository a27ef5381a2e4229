"""A Zarr store behind a URL, for zarr-python: read only, patient, and it remembers what was not there.

zarr-python's own store of fsspec asks once, and takes any failure for one of the chunk.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor

from zarr.abc.store import ByteRequest, OffsetByteRequest, RangeByteRequest, Store, SuffixByteRequest
from zarr.core.buffer import Buffer, BufferPrototype

from slidescan.errors import SlideNotFoundError
from slidescan.slides.ngff import META
from slidescan.slides.remote import RefusedError, Remote

__all__ = ["UrlStore"]

_READ_ONLY = "a URL is read, not written or listed"
_at_once: ThreadPoolExecutor  # requests of all slides of this process


def _make_room() -> None:
    """Make threads: those of a process that this one was forked from are not here."""
    global _at_once
    _at_once = ThreadPoolExecutor(16, thread_name_prefix="slidescan-url")


_make_room()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_make_room)


class UrlStore(Store):  # type: ignore[misc]  # zarr's types do not pass strict mode
    """The files below `root`; keys that are not there go into `missing`."""

    supports_writes = supports_deletes = supports_listing = False

    def __init__(self, root: Remote, missing: set[str]) -> None:
        super().__init__(read_only=True)
        self._root, self._missing = root, missing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, UrlStore) and other._root == self._root

    async def get(self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None) -> Buffer | None:
        """Return the bytes of a file or of a part of it, None where there is none."""
        span: tuple[int, int | None] = (0, None)
        if isinstance(byte_range, RangeByteRequest):
            span = byte_range.start, byte_range.end
        elif isinstance(byte_range, OffsetByteRequest):
            span = byte_range.offset, None
        elif isinstance(byte_range, SuffixByteRequest):
            span = -byte_range.suffix, None
        try:
            data = (await asyncio.get_running_loop().run_in_executor(_at_once, (self._root / key).fetch, [span]))[0]
        except SlideNotFoundError:
            self._missing.add(key)
            return None
        except RefusedError:
            if key.rpartition("/")[2] not in META:
                raise
            return None
        return prototype.buffer.from_bytes(data)

    async def get_partial_values(
        self, prototype: BufferPrototype, key_ranges: Iterable[tuple[str, ByteRequest | None]]
    ) -> list[Buffer | None]:
        """Return parts of files."""
        return await asyncio.gather(*(self.get(key, prototype, part) for key, part in key_ranges))

    async def exists(self, key: str) -> bool:
        """Return whether there is such a file."""
        try:
            await asyncio.get_running_loop().run_in_executor(_at_once, (self._root / key).fetch, [(0, 1)])
        except SlideNotFoundError:
            return False
        return True

    async def set(self, key: str, value: Buffer) -> None:
        """Refuse."""
        raise NotImplementedError(_READ_ONLY)

    async def delete(self, key: str) -> None:
        """Refuse."""
        raise NotImplementedError(_READ_ONLY)

    def list(self) -> AsyncIterator[str]:
        """Refuse."""
        raise NotImplementedError(_READ_ONLY)

    def list_prefix(self, prefix: str) -> AsyncIterator[str]:
        """Refuse."""
        raise NotImplementedError(_READ_ONLY)

    def list_dir(self, prefix: str) -> AsyncIterator[str]:
        """Refuse."""
        raise NotImplementedError(_READ_ONLY)
