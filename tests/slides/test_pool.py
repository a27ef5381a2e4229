"""Tiles that neighbouring reads share: decoded once, bounded, never wrong."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidescan.plan import plan
from slidescan.slides import open_slide
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


@pytest.mark.parametrize("threads", [1, 3])
def test_a_scan_decodes_every_tile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, threads: int) -> None:
    """Regions overlap, and yet no tile is decoded twice; the pixels are those of the whole image."""
    image = np.random.default_rng(0).integers(0, 256, (1500, 1700, 3), np.uint8)
    tifffile.imwrite(tmp_path / "a.tiff", image, tile=(64, 64), compression="zlib", photometric="rgb")
    slide = open_slide(tmp_path / "a.tiff", mpp=0.25)
    slide.opened()
    decoded = []
    decode = Codec.decode

    def counted(self: Codec, data: bytes, *more: object) -> NDArray[np.uint8]:
        decoded.append(data)
        return decode(self, data, *more)  # type: ignore[arg-type]

    monkeypatch.setattr(Codec, "decode", counted)
    plane = slide.frame
    regions = plan(plane, None, tile_px=256, halo_px=32, region_px=400).regions

    def read(k: int) -> None:
        x0, y0, x1, y1 = regions[k].read.round_out()
        rgb = slide.read(x0, y0, x1 - x0, y1 - y0, plane).rgb
        left, top, right, bottom = max(0, x0), max(0, y0), min(x1, 1700), min(y1, 1500)
        inside = rgb[top - y0 : bottom - y0, left - x0 : right - x0]
        np.testing.assert_array_equal(inside, image[top:bottom, left:right])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, range(len(regions))))
    assert len(regions) >= 20
    assert len(decoded) == -(-1500 // 64) * -(-1700 // 64)
