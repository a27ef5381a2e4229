"""A crash in native code costs its region, once it is known to be one; any other end of a process costs nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import slidescan as ss
from slidescan.anomaly import Coverage
from slidescan.errors import SlideReadError
from slidescan.region import RegionPart
from slidescan.suspects import is_suspect
from tests.crashing import crashing_slide
from tests.discs import ORACLE, config, discs, in_order

ROOT = Path(__file__).parents[1]
CORNERS = [[-1, -1], [-1, 1], [1, -1], [1, 1]]


@pytest.mark.parametrize(("place", "regions", "workers"), [((800, 800), 1, 1), ((960, 800), 2, 3)])
def test_a_crash_costs_its_regions(tmp_path: Path, place: tuple[int, int], regions: int, workers: int) -> None:
    """The first run dies; the second gives up what holds the tile, says so, and finds all that lies elsewhere."""
    command = [sys.executable, "-m", "tests.crashing", *map(str, (tmp_path, *place, workers, 0))]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGSEGV
    slide, centers = crashing_slide(place)
    result = ss.scan(slide, ORACLE, out=tmp_path, config=config())
    assert result.provenance["tiles"]["crashed_regions"] == regions
    coverage, scale = result.coverage, result.anomaly.frame.mpp / slide.frame.mpp
    x, y = (int(n / scale) for n in place)
    assert coverage[y, x] == Coverage.READ_FAILED
    assert 0.5 < result.anomaly.analysed_fraction < 1
    # A tile beside a lost one finds what lies up to the slack beyond its own core.
    slack = result.provenance["tiles"]["slack_um"] / slide.frame.mpp
    around = [np.clip(centers + step, 0, np.array(slide.size_wh) - 1) for step in slack * np.array([[0, 0], *CORNERS])]
    lost = [coverage[tuple((at / scale).astype(int).T[::-1])] == Coverage.READ_FAILED for at in around]
    assert 0 < lost[0].sum() < len(centers) / 4
    n_found = len(result.detections)
    assert len(centers) - lost[0].sum() <= n_found <= len(centers) - np.all(lost, 0).sum()
    assert not list(tmp_path.glob("parts-*"))


def test_a_crash_in_the_thumbnail_is_said_from_then_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.crashing", *map(str, (tmp_path, 800, 800, 1, 1))]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode == -signal.SIGSEGV
    for _ in range(2):
        with pytest.raises(SlideReadError, match=r"^crashing: its decoder crashes where the whole slide is read"):
            ss.scan(crashing_slide((800, 800), whole=True)[0], ORACLE, out=tmp_path, config=config())
    mended, centers = discs()
    assert len(ss.scan(mended, ORACLE, out=tmp_path, config=config()).detections) == len(centers)
    assert not list(tmp_path.glob("*.reading"))


def test_on_a_cluster_it_costs_workers_and_its_region(tmp_path: Path) -> None:
    from dask import config as dask_config
    from distributed import Client, LocalCluster

    slide, _ = crashing_slide((800, 800))
    with (
        dask_config.set({"distributed.scheduler.allowed-failures": 0}),
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        result = ss.scan(slide, ORACLE, out=tmp_path, config=config(), client=client)
    assert result.provenance["tiles"]["crashed_regions"] == 1
    assert result.anomaly.analysed_fraction > 0.5


def test_a_mark_without_a_crash_costs_nothing(tmp_path: Path) -> None:
    """As a power cut leaves it, while regions were read."""
    slide, _ = discs()
    whole = ss.scan(slide, ORACLE, config=config())

    def stop(state: ss.scan_slide.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ss.scan(slide, ORACLE, out=tmp_path, config=config(), workers=1, on_progress=stop)
    parts = next(tmp_path.glob("parts-*"))
    assert not list(parts.glob("*.reading"))
    done = next(parts.glob("*.npz"))
    done.rename(tmp_path / "gone")
    done.with_suffix(".reading").touch()
    assert is_suspect(done)
    again = ss.scan(slide, ORACLE, out=tmp_path, config=config())
    assert again.provenance["tiles"]["crashed_regions"] == 0
    assert np.array_equal(in_order(again), in_order(whole))


def test_what_was_given_up_stays_so(tmp_path: Path) -> None:
    slide, _ = discs()
    region = ss.prepare.prepare(slide, ORACLE, config()).plan.regions[0]
    RegionPart.given_up(region).save(tmp_path / "a.npz")
    part = RegionPart.load(tmp_path / "a.npz")
    assert part is not None
    assert part.crashed
    assert len(part.failed) == len(region.tiles)
    assert len(part.cores) == len(part.detections) == 0
