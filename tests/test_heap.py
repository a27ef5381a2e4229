"""What is freed is kept for what is asked for next, and given back when that is said."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from numpy.typing import NDArray

from slidescan import heap
from slidescan.heap import give_back_pixels, keep_freed, pixels

PROGRAM = """
import json, os, resource
import numpy as np
from slidescan.heap import give_back_freed, keep_freed

PAGE = resource.getpagesize()

def fill():
    blocks = [np.full(10_000_000, 1, np.uint8) for _ in range(20)]

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    fill()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * PAGE

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * PAGE

keep_freed()
fill()
again = faults()
held = resident()
give_back_freed()
print(json.dumps([again, held - resident()]))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's heap is told")
def test_freed_blocks_are_kept_until_they_are_given_back() -> None:
    """200 MB in blocks of 10 MB: the second time the system clears hardly a page; in the end it has them back."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    cleared_bytes, returned_bytes = json.loads(done.stdout)
    assert cleared_bytes < 20e6
    assert returned_bytes > 180e6


def address(array: NDArray[np.uint8]) -> int:
    """Return where it begins; `array.ctypes` would keep it alive until the next collection."""
    return int(array.__array_interface__["data"][0])


class TestPixels:
    """Blocks of pixels are used again, and never while anything refers to them."""

    @pytest.fixture(autouse=True)
    def _kept_from_here(self) -> Iterator[None]:
        give_back_pixels()
        keep_freed()
        yield
        give_back_pixels()

    def test_a_block_is_used_again(self) -> None:
        first = pixels(1200, 1300)
        at = address(first)
        del first
        again = pixels(1200, 1200)  # a smaller one fits
        assert address(again) == at
        assert (again.shape, again.dtype, again.flags.c_contiguous, again.flags.writeable) == (
            (1200, 1200, 3),
            np.uint8,
            True,
            True,
        )

    def test_a_view_keeps_it(self) -> None:
        """Of a view, a view of that, and what another library made of it."""
        block = pixels(1200, 1300)
        block[...] = 7
        kept = [block[5:9, 5:9][1:], torch.from_numpy(block)[0, 0], memoryview(block)[:1]]
        at = address(block)
        del block
        while kept:
            other = pixels(1200, 1300)
            assert address(other) != at
            other[...] = 9
            last = kept.pop()
            assert (np.asarray(last) == 7).all()
            del other
            heap._free.clear()  # so that what is used again below is the block itself, which is still held
            del last
        assert address(pixels(1200, 1300)) == at

    @settings(max_examples=20)
    @given(st.lists(st.tuples(st.integers(1000, 2000), st.integers(1, 6)), min_size=1, max_size=20))
    def test_blocks_that_live_never_share(self, asked: list[tuple[int, int]]) -> None:
        """Whatever is let go in between; each still holds what was written to it."""
        held: list[tuple[int, NDArray[np.uint8]]] = []
        for number, (edge, keep) in enumerate(asked):
            block = pixels(edge, 1400)
            block[::100] = number
            held.append((number, block))
            del block
            held = held[-keep:]
            assert all((each[::100] == n).all() for n, each in held)

    def test_what_is_kept_is_bounded(self) -> None:
        blocks = [pixels(5000, 5000) for _ in range(20)]  # 1.5 GB, never touched
        del blocks
        assert 0.8e9 < sum(block.size for block in heap._free) <= 1 << 30
        pixels(2000, 2000)  # far smaller: a block of its own
        assert min(block.size for block in heap._free) == 2000 * 2000 * 3

    def test_nothing_is_kept_where_nobody_asked(self) -> None:
        """Before `keep_freed`, after `give_back_pixels`, and of a block that no scan would read."""
        pixels(7000, 7000)
        assert not heap._free
        late = pixels(1200, 1300)
        give_back_pixels()
        del late
        pixels(1200, 1300)
        assert not heap._free

    def test_threads(self) -> None:
        """Many at once, taking and letting go."""

        def work(number: int) -> bool:
            fine = True
            for _ in range(50):
                block = pixels(1200, 1200)
                block[0] = block[-1] = number
                fine &= bool((block[0] == number).all() and (block[-1] == number).all())
            return fine

        with ThreadPoolExecutor(8) as threads:
            assert all(threads.map(work, range(8)))
