"""Seconds by stage: they add up, and what is said of a scan is of that scan."""

from __future__ import annotations

import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import slidescan as ss
from slidescan import stages
from slidescan.phantom import Phantom, write_phantom
from slidescan.stages import Profile, stage, taken
from tests.discs import ORACLE, config, discs


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that goes on by a second whenever it is read."""
    second = itertools.count()
    monkeypatch.setattr(stages.time, "perf_counter", lambda: float(next(second)))
    taken()


@pytest.mark.usefixtures("ticks")
def test_a_stage_inside_another_pauses_it() -> None:
    with stage("assemble"):  # 0
        with stage("decode"):  # 1
            pass  # 2
        with stage("decode"):  # 3
            pass  # 4
    assert taken() == {"assemble": 3.0, "decode": 2.0}  # left at 5
    assert taken() == {}


@pytest.mark.usefixtures("ticks")
def test_an_error_leaves_the_clock_right() -> None:
    with pytest.raises(ValueError, match="bad tile"), stage("assemble"), stage("decode"):
        raise ValueError("bad tile")
    with stage("model"):
        pass
    assert taken() == {"assemble": 2.0, "decode": 1.0, "model": 1.0}


def test_threads_have_clocks_of_their_own() -> None:
    def one(name: str) -> dict[str, float]:
        with stage(name):
            pass
        return taken()

    with ThreadPoolExecutor(2) as pool:
        told = list(pool.map(one, ["read", "decode"] * 20))
    assert [list(each) for each in told] == [["read"], ["decode"]] * 20


def test_rates_and_the_slower_of_the_two() -> None:
    profile = Profile(threads=4, scoring=1)
    for _ in range(10):
        profile.add(16.0, {"decode": 6.0, "read": 2.0, "model": 1.0, "wait": 1.0})
    profile.wall_s = 25.0
    assert profile.reads_mp_s == 8.0  # 160 MP in 80 s of 4 threads
    assert profile.scores_mp_s == 16.0
    assert profile.share_of_slower == pytest.approx(160 / 25 / 8)
    said = "\n".join(profile.lines())
    assert "10 regions, 160.0 MP in 25.0 s" in said
    assert "decode         60.0 s   60.0%" in said
    assert "80% of the slower, reading" in said
    assert Profile(**profile.told()) == profile


@pytest.mark.parametrize("workers", [1, 3])
def test_a_scan_accounts_for_its_time(workers: int) -> None:
    slide, _ = discs()
    told = ss.scan(slide, ORACLE, config=config(), workers=workers).provenance
    profile = Profile(**told["profile"])
    assert (profile.threads, profile.scoring, profile.regions) == (workers, 1, told["tiles"]["regions"])
    assert {"assemble", "batch", "model", "write"} <= set(profile.thread_s)
    assert sum(profile.thread_s.values()) <= workers * profile.wall_s + 0.1  # rounded to ms
    assert profile.wall_s <= told["seconds"]["total"]


def test_a_file_is_read_and_decoded(tmp_path: Path) -> None:
    write_phantom(tmp_path / "case.tiff", Phantom((1024, 1024), 0.5, n_figures=2))
    result = ss.scan(tmp_path / "case.tiff", ORACLE, out=tmp_path / "case", config=config())
    assert {"read", "decode"} <= set(result.provenance["profile"]["thread_s"])
    assert set(result.provenance["seconds"]) == {"tissue", "regions", "stitch", "write", "total"}
    assert ss.load_result(tmp_path / "case").provenance["seconds"] == result.provenance["seconds"]


def test_what_was_done_before_a_stop_is_not_counted_again(tmp_path: Path) -> None:
    slide, _ = discs()

    def stop(state: ss.scan_slide.Progress) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ss.scan(slide, ORACLE, out=tmp_path, config=config(), workers=1, on_progress=stop)
    committed = len(list(tmp_path.glob("parts-*/*.npz")))
    told = ss.scan(slide, ORACLE, out=tmp_path, config=config()).provenance
    assert told["profile"]["regions"] == told["tiles"]["regions"] - committed < told["tiles"]["regions"]


def test_nothing_scored_has_a_profile_too() -> None:
    assert Profile(2, 1).lines() == ["profile     nothing was scored in this run"]
    assert Profile(2, 1).share_of_slower == 0
