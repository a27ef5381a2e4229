"""A worker that hangs is ended, and what it hung over is explained; a person's own process never is."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

import slidescan as ss
from slidescan.archive.engine import estimate_archive
from slidescan.errors import WorkerTimeoutError
from slidescan.geometry import Box
from slidescan.slides import Slide, memory_slide
from slidescan.slides.memory import MemorySource
from slidescan.slides.open import _Held
from slidescan.slides.resolution import override
from slidescan.timeouts import what_ended, within
from tests.archives import HANGING, TROUBLED, write_slide
from tests.discs import MPP, ORACLE, config, discs, tissue

if TYPE_CHECKING:
    from distributed import Client

LIMIT_S = 4  # a region of discs takes 0.1 s, the first of a process 1 s, on a busy machine a few


class Hanging(MemorySource):
    """Never comes back where a region holds one px; the thumbnail is read in larger blocks."""

    def read_level(self, level: int, x: int, y: int, out: np.ndarray) -> list[Box]:
        height, width = out.shape[:2]
        if width < 1200 and 0 <= 10 - x < width and 0 <= 10 - y < height:
            threading.Event().wait()
        return super().read_level(level, x, y, out)


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    from dask import config
    from distributed import Client, LocalCluster

    with (
        config.set({"distributed.scheduler.allowed-failures": 0}),  # a task is given up at its first death
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_a_region_that_is_not_read_in_time_is_given_up(tmp_path: Path, client: Client) -> None:
    """As one that crashes its reader: the rest of the slide is scanned, and coverage shows the hole."""
    slide, centers = discs()
    source = Hanging([tissue(slide.size_wh, centers)], override(MPP), name="hanging")
    hanging = Slide(Path("hanging"), _Held(source))
    result = ss.scan(hanging, ORACLE, out=tmp_path / "out", config=config(), client=client, timeout_s=LIMIT_S)
    assert result.provenance["tiles"]["crashed_regions"] == 1
    whole = ss.scan(slide, ORACLE, config=config())
    assert 0 < len(result.detections) < len(whole.detections)
    assert not list((tmp_path / "out").rglob("*.late"))


def test_a_region_that_is_not_scored_in_time_ends_the_scan(tmp_path: Path, client: Client) -> None:
    pixels = tissue((900, 700), discs(size_wh=(900, 700), n=12)[1])
    pixels[:40, :40] = HANGING
    with pytest.raises(WorkerTimeoutError, match=f"longer than {LIMIT_S} s, twice"):
        ss.scan(
            memory_slide(pixels, MPP), TROUBLED, out=tmp_path / "out", config=config(), client=client,
            timeout_s=LIMIT_S,
        )  # fmt: skip


def test_a_slide_that_an_estimate_hangs_on_costs_itself(tmp_path: Path, client: Client) -> None:
    """Before the night, too: it is named, and the one after it is looked at."""
    for name, mark in (("a", HANGING), ("b", None)):
        write_slide(tmp_path / f"in/{name}.tiff", 1, mark=mark)
    whole = config(tiling__region_px=5000)
    told = {
        entry.slide_id: said
        for entry, said in estimate_archive(tmp_path / "in", TROUBLED, config=whole, client=client, timeout_s=LIMIT_S)
    }
    assert told["a"]["reason"] == "timeout"
    assert f"longer than {LIMIT_S} s" in told["a"]["message"]
    assert told["b"]["tiles"] > 4


def _overlapping(folder: str) -> None:
    """Begin two blocks; the one that began later has less time and hangs."""
    with within(60, Path(folder, "slow")), within(0.1, Path(folder, "late")):
        threading.Event().wait()


def _in_time(folder: str) -> None:
    with within(0.05, Path(folder, "quick")):
        pass
    threading.Event().wait(0.2)


def test_the_first_limit_that_runs_out_counts(tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=_overlapping, args=(str(tmp_path),))
    process.start()
    process.join(30)
    assert process.exitcode == 1
    assert what_ended(tmp_path / "late") == "late"
    assert what_ended(tmp_path / "late") is None
    assert what_ended(tmp_path / "slow") == "died"
    assert not list(tmp_path.iterdir())


def test_what_is_done_in_time_ends_nothing(tmp_path: Path) -> None:
    process = get_context("spawn").Process(target=_in_time, args=(str(tmp_path),))
    process.start()
    process.join(30)
    assert process.exitcode == 0
    assert not list(tmp_path.iterdir())


def test_a_process_that_nobody_restarts_is_not_ended(tmp_path: Path) -> None:
    with within(0.001, tmp_path / "mark"):
        assert not (tmp_path / "mark").exists()
        threading.Event().wait(0.05)
    assert os.getpid()


def test_a_mark_that_cannot_be_left_changes_nothing(tmp_path: Path) -> None:
    with within(1, tmp_path / "no/such/folder"):
        pass
    assert what_ended(tmp_path / "no/such/folder") is None
