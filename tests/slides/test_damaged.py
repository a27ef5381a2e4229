"""Random damage, as `pipelines/fuzz_slides.py` does it ten thousand times."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_damaged_slides_are_refused_or_read() -> None:
    """No crash, hang, other error or more than 1 GB over files damaged at random, in a process of its own."""
    command = [sys.executable, ROOT / "pipelines" / "fuzz_slides.py", "--count", "150", "--seed", "20000"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    assert told.stdout.startswith("150 damaged slides: ")
    for outcome in ("refused", "holes", "read"):
        assert outcome in told.stdout  # the damage does all of it
