"""What is freed is kept for what is asked for next, and given back when that is said."""

from __future__ import annotations

import json
import platform
import subprocess
import sys

import pytest

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
