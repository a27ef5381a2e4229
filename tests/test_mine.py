"""Mined windows are of the slides they were mined on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from slidescan.train.mine import mine
from tests.discs import ORACLE, discs


def test_what_a_stopped_run_left_is_not_of_this_one(tmp_path: Path) -> None:
    """Windows of a slide that was withdrawn since are gone; those of the slides given are there, and stay."""
    Image.fromarray(np.zeros((128, 128, 3), np.uint8)).save(tmp_path / "0-70.png")
    slide, centers = discs(n=9, size_wh=(900, 700))
    said: list[str] = []
    windows = mine(ORACLE, [slide], tmp_path, said.append)
    assert (len(windows), said) == (len(centers), ["mined 9 false alarms on 1 slides"])
    assert all(window.any() for window in windows)
    assert len(mine(ORACLE, [], tmp_path, said.append)) == 9
