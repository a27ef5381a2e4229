"""Many slides: each scanned or explained, whatever happens to files, workers and the run itself."""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
import pytest

import slidescan as ss
from slidescan.archive import Entry, archive_status, engine, read_listing
from slidescan.archive.engine import ArchiveProgress, estimate_archive
from slidescan.archive.record import Record, read_records
from slidescan.errors import ConfigError, ResultError
from slidescan.lease import claimed
from tests.archives import DEADLY, FORGETFUL, TROUBLED, Fragile, differing, write_cohort, write_slide
from tests.discs import MPP, ORACLE, config

if TYPE_CHECKING:
    from distributed import Client

ROOT = Path(__file__).parents[1]
RESULT = ("detections.parquet", "flagged.geojson")


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(n_workers=2, threads_per_worker=2, dashboard_address="127.0.0.1:0", silence_logs=50) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return write_cohort(tmp_path)


def results(out: Path) -> dict[str, bytes]:
    """Return all files of all results but the manifests, which tell times, and the pictures' paths."""
    found = {}
    for file in sorted((out / "slides").rglob("*")):
        if file.is_file() and file.name != "manifest.json":
            found[file.relative_to(out).as_posix()] = file.read_bytes()
    return found


class TestRuns:
    def test_each_is_scanned_or_explained(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        """Results are those of `scan`; failures have reasons; nothing names the folder the slides lie in."""
        out, seen = tmp_path / "runs", []
        records = ss.scan_archive(cohort, ORACLE, out=out, config=config(), client=client, on_slide=seen.append)
        entries = read_listing(cohort)
        assert [r.slide_id for r in records] == [e.slide_id for e in entries]
        assert [r.reason for r in records] == [None] * 4 + ["open_error", "not_found", "no_mpp"]
        assert (seen[-1].done, seen[-1].failed, seen[-1].slides) == (4, 3, 7)
        for entry in entries[:4]:
            slide, alone = ss.open_slide(entry.path, mpp=entry.mpp), tmp_path / "alone"
            ss.scan(slide, ORACLE, out=alone, config=config())
            ours, whole = (
                json.loads((at / "manifest.json").read_text()) for at in (out / "slides" / entry.slide_id, alone)
            )
            assert ours["summary"]["detections"] == 12
            assert ours["run_key"] == whole["run_key"]
            assert {n: ours["files"][n] for n in RESULT} == {n: whole["files"][n] for n in RESULT}
            shutil.rmtree(tmp_path / "alone")
        index = pq.read_table(out / "index.parquet").to_pylist()
        assert [row["found"] for row in index if row["state"] == "done"] == [12] * 4
        failures = list(csv.DictReader((out / "failures.csv").read_text().splitlines()))
        assert sorted(row["reason"] for row in failures) == ["no_mpp", "not_found", "open_error"]
        assert all(row["message"] for row in failures)
        for file in out.rglob("*"):
            if file.is_file():
                content = file.read_bytes()
                assert b"Doe^Jane" not in content, file
                assert str(tmp_path).encode() not in content, file
        now = archive_status(out)
        assert (now.slides, now.done, now.running, now.found) == (7, 4, False, 48)
        assert now.failed == {"no_mpp": 1, "not_found": 1, "open_error": 1}
        assert now.analysed_fraction == 1.0
        assert now.busy is not None
        assert 0 < now.busy <= 1
        archive = ss.open_archive(out)
        assert (len(archive), len(list(archive))) == (7, 4)
        assert archive.table.to_pylist() == index
        assert archive.status == now
        everywhere = [(-r.evidence, s, r.rank) for s in archive for r in archive.result(s).regions]
        for k in (0, 1, 7, 1000):
            assert [(-e.region.evidence, e.slide_id, e.region.rank) for e in archive.top(k)] == sorted(everywhere)[:k]
        south = archive.top(1000, group="south")
        assert {each.group for each in south} == {"south"}
        assert len(south) == sum(len(archive.result(e.slide_id).regions) for e in entries if e.group == "south")
        with pytest.raises(ConfigError, match="got 'lost': it failed"):
            archive.result("lost")
        with pytest.raises(ConfigError, match="no such slide"):
            archive.result("none")

    def test_only_what_changed_is_done_again(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        out = tmp_path / "runs"

        def run(**more: object) -> set[str]:
            done: list[ArchiveProgress] = []
            options: dict[str, object] = {"config": config(), **more}
            ss.scan_archive(cohort, ORACLE, out=out, client=client, on_slide=done.append, **options)  # type: ignore[arg-type]
            return {each.record.slide_id for each in done}

        everything = {entry.slide_id for entry in read_listing(cohort)}
        assert run() == everything
        before = results(out)
        assert run() == {"lost"}  # a file that is not there may come
        assert run(retry_failed="no_mpp") == {"lost", "unscaled-too"}
        assert run(retry_failed=True) == {"lost", "unscaled-too", "broken"}
        write_slide(cohort.parent / "lost.svs", 9)
        write_slide(cohort.parent / "south/other.tiff", 8)
        assert run() == {"lost", "other"}
        after = results(out)
        kept = [name for name in before if name.startswith("slides/unscaled/")]
        assert kept
        assert [after[name] for name in kept] == [before[name] for name in kept]
        assert after["slides/other/detections.parquet"] != before["slides/other/detections.parquet"]
        assert run(config=config(detect__min_score=0.3)) == everything
        shutil.rmtree(out / "slides/unscaled")
        assert run(config=config(detect__min_score=0.3)) == {"unscaled"}

    def test_shards_share_the_work(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        parts = []
        for i in (1, 2, 3):
            records = ss.scan_archive(
                cohort, ORACLE, out=tmp_path / "runs", config=config(), client=client, shard=(i, 3)
            )
            parts.append([record.slide_id for record in records])
        assert sorted(name for part in parts for name in part) == sorted(
            entry.slide_id for entry in read_listing(cohort)
        )
        assert pq.read_table(tmp_path / "runs/index.parquet").num_rows == 7
        now = archive_status(tmp_path / "runs")
        assert (now.slides, now.done) == (7, 4)
        with pytest.raises(ConfigError, match="i from 1 to n, got 4/3"):
            ss.scan_archive(cohort, ORACLE, out=tmp_path / "runs", shard=(4, 3))

    def test_a_slide_another_run_is_at_is_left_to_it(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        """It is looked at twice: the other may have died."""
        out = tmp_path / "runs"
        with claimed(out / "slides/other"):
            ss.scan_archive(cohort, ORACLE, out=out, config=config(), client=client)
        assert "other" not in read_records(out / "records")
        assert (out / "log.jsonl").read_text().count('"slide_busy"') == 2
        ss.scan_archive(cohort, ORACLE, out=out, config=config(), client=client)
        assert read_records(out / "records")["other"].state == "done"

    def test_an_estimate_is_of_what_is_to_do(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        """Of an archive that is half done, the other half; what cannot be written into is said before the night."""
        out, options = tmp_path / "runs", {"config": config(), "client": client}

        def told(**more: object) -> set[str]:
            return {entry.slide_id for entry, _ in estimate_archive(cohort, ORACLE, out=out, **options, **more)}  # type: ignore[arg-type]

        ss.scan_archive(read_listing(cohort)[2:5], ORACLE, out=out, **options)  # type: ignore[arg-type]
        entries = {entry.slide_id for entry in read_listing(cohort)}
        assert told() == entries - {"other", "unscaled", "broken"}
        assert told(retry_failed=True) == entries - {"other", "unscaled"}
        out = cohort / "runs"
        with pytest.raises(ResultError, match=r"runs: cannot be written \(Not a directory\)"):
            told()

    def test_a_directory_that_cannot_be_written_costs_its_slide(
        self, cohort: Path, tmp_path: Path, client: Client
    ) -> None:
        in_the_way = tmp_path / "runs/slides/other"
        in_the_way.parent.mkdir(parents=True)
        in_the_way.touch()

        def reasons() -> list[str | None]:
            out, entries = tmp_path / "runs", read_listing(cohort)[1:4]
            records = ss.scan_archive(entries, ORACLE, out=out, config=config(), client=client)
            assert not any(str(tmp_path) in record.message for record in records)
            return [record.reason for record in records]

        entries = read_listing(cohort)[1:4]
        estimate = estimate_archive(entries, ORACLE, out=tmp_path / "runs", config=config(), client=client)
        assert {entry.slide_id: told.get("reason") for entry, told in estimate}["other"] == "unwritable"
        assert reasons() == [None, "unwritable", None]
        in_the_way.unlink()
        assert reasons() == [None] * 3

    def test_max_failures(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        with pytest.raises(ResultError, match="stopped after 2 failures"):
            ss.scan_archive(cohort, ORACLE, out=tmp_path / "runs", config=config(), client=client, max_failures=2)
        assert sum(archive_status(tmp_path / "runs").failed.values()) >= 2
        assert "No run is on: the same command" in (tmp_path / "runs/report.html").read_text(encoding="utf-8")
        assert archive_status(tmp_path / "runs").left >= 1

    def test_a_wrong_file_is_not_scanned(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        entries = [Entry("a", str(cohort.parent / "south/other.tiff"), sha256="0" * 64)]
        (record,) = ss.scan_archive(entries, ORACLE, out=tmp_path / "runs", config=config(), client=client)
        assert record.reason == "wrong_digest"
        assert not (tmp_path / "runs/slides/a/manifest.json").exists()

    def test_estimate_writes_nothing_and_names_what_will_fail(
        self, cohort: Path, tmp_path: Path, client: Client
    ) -> None:
        before = set(tmp_path.rglob("*"))
        told = {
            entry.slide_id: said for entry, said in estimate_archive(cohort, ORACLE, config=config(), client=client)
        }
        assert {name: said["reason"] for name, said in told.items() if "reason" in said} == {
            "broken": "open_error", "lost": "not_found", "unscaled-too": "no_mpp"
        }  # fmt: skip
        assert told["other"]["tiles"] > 4
        assert told["other"]["seconds"] > 0
        assert told["other"]["bytes"] == (cohort.parent / "south/other.tiff").stat().st_size
        assert set(tmp_path.rglob("*")) == before


class TestAccidents:
    def test_a_worker_that_dies_costs_its_slide(self, tmp_path: Path) -> None:
        """As when memory is short: tried three times, then left alone. What died beside it is done."""
        for seed in range(3):
            write_slide(tmp_path / f"in/{seed}.tiff", seed, mark=DEADLY if seed == 1 else None)

        def run() -> list[Record]:
            return ss.scan_archive(tmp_path / "in", TROUBLED, out=tmp_path / "runs", config=config(), workers=2)

        records = run()
        assert [(r.slide_id, r.state, r.reason) for r in records] == [
            ("0", "done", None), ("1", "failed", "killed"), ("2", "done", None)
        ]  # fmt: skip
        assert records[1].attempts == 3
        assert [record.finished_s for record in run()] == [record.finished_s for record in records]
        assert archive_status(tmp_path / "runs").quarantined == 1

    @pytest.mark.parametrize("calls", [7, 0])
    def test_a_device_that_fails_costs_its_process(self, tmp_path: Path, calls: int) -> None:
        """All that comes after it in that process fails, too; in another one it is done, unless it fails there."""
        for seed in range(2):
            write_slide(tmp_path / f"in/{seed}.tiff", seed)
        detector = Fragile(mpp=MPP, input_px=256, object_um=20.0, max_per_tile=1000, calls=calls)
        records = ss.scan_archive(tmp_path / "in", detector, out=tmp_path / "runs", config=config(), workers=1)
        if calls:
            assert [record.state for record in records] == ["done", "done"]
            return
        assert [(record.reason, record.attempts) for record in records] == [("killed", 3), ("killed", 3)]
        assert all("(CUDA error: unspecified launch failure)" in record.message for record in records)

    def test_what_may_pass_is_tried_again_later(
        self, cohort: Path, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(engine, "_BACKOFF_S", 0.1)
        at = tmp_path / "tried"
        detector = replace(FORGETFUL, path=str(at))
        (record,) = ss.scan_archive(
            read_listing(cohort)[:1], detector, out=tmp_path / "runs", config=config(), client=client
        )
        assert (record.state, record.attempts) == ("done", 2)
        events = [json.loads(line) for line in (tmp_path / "runs/log.jsonl").read_text().splitlines()]
        assert [event["event"] for event in events] == ["run_started", "slide_failed", "slide_done", "run_ended"]
        assert events[1]["reason"] == "out_of_memory"
        assert events[2]["at"] - events[1]["at"] > 0.1

    def test_a_killed_run_continues_and_ends_the_same(self, tmp_path: Path) -> None:
        """SIGKILL of everything, early and when a slide is done, leaves what an undisturbed run leaves."""
        for seed in range(4):
            write_slide(tmp_path / f"in/{seed}.tiff", seed)
        command = [sys.executable, "-m", "tests.archives", str(tmp_path / "in")]
        subprocess.run([*command, str(tmp_path / "whole")], cwd=ROOT, check=True, capture_output=True)
        out = tmp_path / "runs"
        for regions in (1, 14):
            with (tmp_path / "said").open("w") as said:
                run = subprocess.Popen([*command, str(out)], cwd=ROOT, start_new_session=True, stderr=said)
            until = time.monotonic() + 60
            while run.poll() is None and time.monotonic() < until:
                n_slides = len(list(out.glob("slides/*/manifest.json")))
                if 8 * n_slides + len(list(out.glob("slides/*/parts-*/*.npz"))) >= regions:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    run.wait(timeout=0.005)
            assert run.poll() is None, (tmp_path / "said").read_text()
            os.killpg(run.pid, signal.SIGKILL)
            run.wait()
        subprocess.run([*command, str(out)], cwd=ROOT, check=True, capture_output=True)
        assert differing(results(out), results(tmp_path / "whole")) == {}
        assert not list(out.glob("slides/*/parts-*"))
        assert archive_status(out).done == 4

    def test_a_full_disk_ends_the_run(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        out = tmp_path / "runs"
        (out / "slides").mkdir(parents=True)
        (out / "records").touch()  # a file where a directory is to be
        with pytest.raises(ResultError, match="cannot be written"):
            ss.scan_archive(cohort, ORACLE, out=out, config=config(), client=client)

    def test_a_setting_that_cannot_be_meant_ends_the_run(self, cohort: Path, tmp_path: Path, client: Client) -> None:
        """Before its first slide, where that can be told without one."""
        wrong = config(detect__min_score=0.9)
        with pytest.raises(ConfigError, match="must not exceed the threshold"):
            ss.scan_archive(cohort, ORACLE, out=tmp_path / "runs", config=wrong, client=client)
        with pytest.raises(ConfigError, match="must not exceed the threshold"):
            next(estimate_archive(cohort, ORACLE, config=wrong, client=client))
        assert not (tmp_path / "runs").exists()
        with pytest.raises(ConfigError, match=r"tiling\.halo_um must be at least"):
            ss.scan_archive(cohort, ORACLE, out=tmp_path / "runs", config=config(tiling__halo_um=1.0), client=client)
        assert archive_status(tmp_path / "runs").done == 0

    def test_records_that_cannot_be_read_are_as_none(self, tmp_path: Path) -> None:
        Record("a", "", "k", "done").save(tmp_path)
        (tmp_path / "b.json").write_text('{"slide_id": "b"')
        (tmp_path / "c.json").write_text('{"slide_id": "c", "color": 1}')
        assert set(read_records(tmp_path)) == {"a"}

    def test_a_spreadsheet_runs_nothing(self, tmp_path: Path) -> None:
        from slidescan.archive.record import write_tables

        write_tables(tmp_path, [Record("=cmd()", "@x", "k", "failed", "open_error", "-1+1")])
        (row,) = csv.DictReader((tmp_path / "failures.csv").read_text().splitlines())
        assert (row["slide_id"], row["group"], row["message"]) == ("'=cmd()", "'@x", "'-1+1")
