"""One writer at a time: on this machine by a lock, on others by a lease, and nobody waits for the dead."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import slidescan as ss
from slidescan import lease
from slidescan.archive import Entry
from slidescan.archive import slide as archive_slide
from slidescan.commit import machine as this_machine
from slidescan.commit import place
from slidescan.errors import ResultBusyError, ResultError, ResultLeasedError
from slidescan.lease import claimed
from tests.archives import write_slide
from tests.discs import ORACLE, config


def left(out: Path, machine: str, age_s: float) -> None:
    """Leave a lease of some machine, renewed so long ago."""
    out.mkdir(exist_ok=True)
    (out / "lease").write_text(f"{machine} 1234")
    renewed = time.time() - age_s
    os.utime(out / "lease", (renewed, renewed))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Be on a file system without locks, as Lustre often is."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(lease.fcntl, "flock", refuse)


def test_it_is_held_and_given_back(tmp_path: Path) -> None:
    with claimed(tmp_path / "out"):
        with pytest.raises(ResultBusyError, match="another scan is writing there"), claimed(tmp_path / "out"):
            pass
        (held,) = (tmp_path / "out").iterdir()
        assert held.read_text().startswith(this_machine())
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(("machine", "age_s"), [("ours", 0), ("ours", 3600), ("another", 61)])
def test_nobody_waits_for_the_dead(tmp_path: Path, machine: str, age_s: float) -> None:
    left(tmp_path / "out", this_machine() if machine == "ours" else machine, age_s)
    with claimed(tmp_path / "out"):
        assert "1234" not in (tmp_path / "out/lease").read_text()
    assert not list((tmp_path / "out").iterdir())


def test_another_machine_that_may_live_is_left_alone(tmp_path: Path) -> None:
    left(tmp_path / "out", "another", 30)
    with pytest.raises(ResultLeasedError, match="less than 60 s ago"), claimed(tmp_path / "out"):
        pass
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["lease"]


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_lease_holds_on_one_machine_too(tmp_path: Path) -> None:
    with claimed(tmp_path), pytest.raises(ResultLeasedError), claimed(tmp_path):
        pass
    with claimed(tmp_path):
        pass


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_number_of_a_process_tells_that_it_died(tmp_path: Path) -> None:
    """As of a worker that a slide killed: the one in its place need not wait."""
    died = subprocess.Popen([sys.executable, "-c", ""])
    died.wait()
    left(tmp_path / "out", f"{place()} {died.pid}", 0)
    with claimed(tmp_path / "out"):
        pass
    for lives in (f"{place()} {os.getpid()}", f"another {died.pid}"):
        left(tmp_path / "out", lives, 0)
        with pytest.raises(ResultLeasedError), claimed(tmp_path / "out"):
            pass


@pytest.mark.usefixtures("no_locks")
def test_of_many_that_find_it_void_one_has_it(tmp_path: Path) -> None:
    for attempt in range(20):
        out = tmp_path / str(attempt)
        left(out, "another", 3600)
        begin, end = threading.Barrier(8), threading.Barrier(8)

        def take(_: int, out: Path = out, begin: threading.Barrier = begin, end: threading.Barrier = end) -> bool:
            begin.wait()
            try:
                with claimed(out):
                    end.wait()
                    return True
            except ResultLeasedError:
                end.wait()
                return False

        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(take, range(8))) == 1
        assert not list(out.iterdir())


def test_a_living_holder_renews_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "_RENEWED_S", 0.01)
    with claimed(tmp_path):
        left(tmp_path, "ours", 3600)
        until = time.monotonic() + 30
        while time.time() - (tmp_path / "lease").stat().st_mtime > 60:
            assert time.monotonic() < until
    assert (tmp_path / "lease").exists(), "it was another's in the end"


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match="cannot be written"), claimed(tmp_path / "file"):
        pass


def test_an_archive_looks_again_when_the_lease_has_run_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The job of another node died over a slide: this one does it, in the same run."""
    from distributed import Client, LocalCluster

    write_slide(tmp_path / "a.tiff", 1)
    out = tmp_path / "runs/slides/a"
    out.mkdir(parents=True)
    left(out, "another", 30)
    monkeypatch.setattr(archive_slide, "LASTS_S", -0.9)  # and a second
    take, looked = lease._take, []

    def half_a_minute_later(*told: Any) -> None:
        looked.append(told)
        if len(looked) == 2:
            left(out, "another", 61)
        take(*told)

    monkeypatch.setattr(lease, "_take", half_a_minute_later)
    with (
        LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0") as cluster,
        Client(cluster) as client,
    ):
        entries = [Entry("a", str(tmp_path / "a.tiff"))]
        (record,) = ss.scan_archive(entries, ORACLE, out=tmp_path / "runs", config=config(), client=client)
    assert (record.state, record.attempts) == ("done", 1)
    events = [json.loads(line)["event"] for line in (tmp_path / "runs/log.jsonl").read_text().splitlines()]
    assert events == ["run_started", "slide_busy", "slide_done", "run_ended"]


def test_a_full_disk_leaves_no_lease(tmp_path: Path) -> None:
    """An empty one would be that of another machine, and be waited for."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))  # no byte can be written
    try:
        with pytest.raises(ResultError, match="cannot be written"), claimed(tmp_path / "out"):
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "out").iterdir())
