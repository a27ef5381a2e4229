"""The GPU kernels as machine code: they compile for real targets and move whole rows, which no interpreter tells."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).resolve().parent
# architecture, type, channels a head, points of each of two levels, strides beyond 32 bits
USUAL = [
    (90, "bfloat16", 32, 6, False),
    (90, "float16", 24, 4, False),
    (90, "float32", 32, 6, False),
    (90, "float32", 16, 4, False),
    (90, "bfloat16", 32, 4, True),
    (100, "bfloat16", 64, 4, False),
]
UNUSUAL = [
    (80, "float32", 32, 4, False),
    (80, "bfloat16", 16, 2, False),
    (90, "float64", 32, 4, False),
    (90, "bfloat16", 5, 1, False),
    (120, "bfloat16", 32, 4, False),
    (90, "float32", 1, 48, False),
]


@pytest.fixture(scope="module")
def compiled() -> list[dict[str, Any]]:
    """What the machine code of every case holds, forward and backward."""
    paths = filter(None, (str(HERE.parents[1]), os.environ.get("PYTHONPATH")))
    environment = {**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, HERE / "machine_code.py", *(json.dumps(case) for case in USUAL + UNUSUAL)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_kernels_compile_for_real_targets(compiled: list[dict[str, Any]]) -> None:
    """Ampere, Hopper and Blackwell, every type, odd channels and far strides give machine code."""
    assert [case["direction"] for case in compiled] == ["forward", "backward"] * len(USUAL + UNUSUAL)
    assert all(case["bytes"] > 1000 for case in compiled)


def test_a_corner_is_one_wide_load(compiled: list[dict[str, Any]]) -> None:
    """The inner loop reads a corner of a row in one load a lane, and of a point x, y, weight and level besides."""
    for case in compiled[: 2 * len(USUAL)]:
        points = case["unroll"]
        if case["direction"] == "forward":
            assert case["wide loads"] == 4 * points, case
        else:
            assert case["wide loads"] == 4 * points + 1, case  # and the gradient of the output
        assert case["loads"] == 6 * points, case


def test_a_gradient_is_added_as_vectors_without_shared_memory(compiled: list[dict[str, Any]]) -> None:
    """From Hopper on a lane adds four channels at once, and nothing waits for other lanes inside the loop."""
    for case in compiled[1 : 2 * len(USUAL) : 2]:
        assert case["wide sums"] == 4 * case["unroll"], case
        assert case["sums"] == 0, case
        assert case["barriers"] <= 5, case  # of the stores at the end, however many points are unrolled
