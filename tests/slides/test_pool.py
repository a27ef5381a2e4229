"""Tiles that neighbouring reads share: decoded once, bounded, never wrong."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidescan.plan import plan
from slidescan.slides import open_slide, tiff
from slidescan.slides.codecs import Codec
from slidescan.slides.pool import TilePool


def tile(value: int, edge: int = 4) -> NDArray[np.uint8]:
    """A small square of one grey level."""
    return np.full((edge, edge, 3), value, np.uint8)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 12))), st.integers(0, 1000))
def test_what_is_kept_is_bounded_and_right(asked: list[tuple[int, int]], budget: int) -> None:
    """Any order of keys and sizes: each call returns its own tile, and what stays fits the budget."""
    pool = TilePool(budget)
    edges = dict(reversed(asked))
    for key, _ in asked:
        found = pool.get(key, lambda key=key: tile(key, edges[key]))  # type: ignore[misc]
        np.testing.assert_array_equal(found, tile(key, edges[key]))
        assert 0 <= pool.kept_bytes <= budget


def test_threads_that_want_one_tile_decode_it_once() -> None:
    """However many come while it is decoded."""
    pool, started, calls = TilePool(), threading.Barrier(8), []

    def decode() -> NDArray[np.uint8]:
        calls.append(threading.get_ident())
        return tile(7)

    def want(_: int) -> NDArray[np.uint8]:
        started.wait()
        return pool.get("a", decode)

    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(want, range(8)))
    assert len(calls) == 1
    assert all((each == 7).all() for each in found)


def test_tiles_wanted_together_are_decoded_together() -> None:
    """What the pool has is left out, and what another thread decodes meanwhile is waited for."""
    pool, calls, begun, meet = TilePool(), [], threading.Event(), threading.Barrier(2, timeout=30)
    pool.get("a", lambda: tile(1))

    def decode(keys: Sequence[str]) -> list[NDArray[np.uint8]]:
        calls.append(list(keys))
        begun.set()
        meet.wait()
        return [tile(ord(key) - 96) for key in keys]

    def want(keys: str) -> list[int]:
        return [int(found[0, 0, 0]) for found in pool.get_all(dict.fromkeys(keys, 9), decode)]

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(want, "abc")
        assert begun.wait(30)
        assert threads.submit(want, "dcb").result() == [4, 3, 2]
        assert first.result() == [1, 2, 3]
    assert calls == [["b", "c"], ["d"]]


def test_what_is_forgotten_is_decoded_again() -> None:
    """And leaves room; what was never there can be forgotten, too."""
    pool = TilePool()
    pool.get("a", lambda: tile(1))
    for key in "ab":
        pool.forget(key)
    assert pool.kept_bytes == 0
    assert (pool.get("a", lambda: tile(3)) == 3).all()


def test_a_batch_that_fails_leaves_nothing() -> None:
    """None of its tiles is kept, and each can be had alone."""
    pool = TilePool()
    with pytest.raises(ZeroDivisionError):
        pool.get_all({"a": 2, "b": 2}, lambda keys: [tile(1 // 0) for _ in keys])
    assert (pool.kept_bytes, pool.decoded) == (0, 0)
    assert (pool.get("b", lambda: tile(3)) == 3).all()


def test_a_tile_that_fails_is_raised_and_tried_again() -> None:
    """A waiting thread tries for itself; what failed once may succeed later."""
    pool, inside, go_on = TilePool(), threading.Event(), threading.Event()

    def fails() -> NDArray[np.uint8]:
        inside.set()
        go_on.wait()
        raise ValueError("damaged")

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(pool.get, "a", fails)
        inside.wait()
        second = threads.submit(pool.get, "a", lambda: tile(3))
        go_on.set()
        with pytest.raises(ValueError, match="damaged"):
            first.result()
        assert (second.result() == 3).all()
    assert (pool.get("a", lambda: tile(3)) == 3).all()


def test_a_tile_goes_after_its_last_read() -> None:
    """Of three reads that will want it the third takes it away; a fourth would decode it again."""
    pool, calls = TilePool(), []

    def decode() -> NDArray[np.uint8]:
        calls.append(0)
        return tile(7)

    kept = []
    for _ in range(4):
        assert (pool.get("a", decode, 3) == 7).all()
        kept.append(pool.kept_bytes)
    assert kept == [48, 48, 0, 48]
    assert len(calls) == 2
    assert (pool.get("b", decode, 1) == 7).all()
    assert pool.kept_bytes == 48


def test_reads_that_come_while_it_is_decoded_count() -> None:
    """Eight threads are all that will want it: it is decoded once, and then gone."""
    pool, started, calls = TilePool(), threading.Barrier(8), []

    def decode() -> NDArray[np.uint8]:
        calls.append(0)
        return tile(7)

    def want(_: int) -> NDArray[np.uint8]:
        started.wait()
        return pool.get("a", decode, 8)

    with ThreadPoolExecutor(8) as threads:
        assert all((each == 7).all() for each in threads.map(want, range(8)))
    assert (len(calls), pool.kept_bytes) == (1, 0)


@given(st.lists(st.tuples(st.integers(0, 4), st.integers(1, 5))), st.integers(0, 200))
def test_however_many_reads_are_told(asked: list[tuple[int, int]], budget: int) -> None:
    """Each call returns its own tile, even if more or fewer come than were told."""
    pool = TilePool(budget)
    for key, reads in asked:
        np.testing.assert_array_equal(pool.get(key, lambda key=key: tile(key), reads), tile(key))  # type: ignore[misc]
        assert 0 <= pool.kept_bytes <= budget


@pytest.mark.parametrize("threads", [1, 2])
def test_a_scan_decodes_every_tile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Regions overlap, and yet no tile is decoded twice; the pixels are those of the whole image."""
    image = np.random.default_rng(0).integers(0, 256, (3000, 3200, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tiff", image, tile=(64, 64), photometric="rgb")
    slide = open_slide(tmp_path / "a.tiff", mpp=0.25)
    slide.opened()
    decoded = []
    decode = Codec.decode

    def counted(self: Codec, data: bytes, *more: object) -> NDArray[np.uint8]:
        decoded.append(data)
        return decode(self, data, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Codec, "decode", counted)
    # Half of what is needed if tiles that nobody will want again stay until they are the oldest.
    monkeypatch.setattr(tiff, "pool", TilePool(500 * 64 * 64 * 3))
    plane = slide.frame
    regions = plan(plane, None, tile_px=512, halo_px=112, region_px=900).regions

    def read(k: int) -> None:
        x0, y0, x1, y1 = regions[k].read.round_out()
        rgb = slide.read(x0, y0, x1 - x0, y1 - y0, plane).rgb
        left, top, right, bottom = max(0, x0), max(0, y0), min(x1, 3200), min(y1, 3000)
        inside = rgb[top - y0 : bottom - y0, left - x0 : right - x0]
        np.testing.assert_array_equal(inside, image[top:bottom, left:right])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(len(regions))))
    assert len(regions) == 16
    assert len(decoded) == -(-3000 // 64) * -(-3200 // 64)
