"""Clusters of one's own: certificates, and jobs of a queue."""

from __future__ import annotations

import gc
import os
import signal
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
import yaml

from slidescan import jobqueue, scheduler
from slidescan.cluster import in_flight
from slidescan.config import ScanConfig
from slidescan.errors import ConfigError, MissingExtraError, WorkerError
from slidescan.jobqueue import Queue, from_queue, load_settings, prepared
from slidescan.scheduler import connect

if TYPE_CHECKING:
    from distributed import LocalCluster

EXAMPLE = Path(__file__).parents[1] / "configs" / "slurm.yaml"


def seen_by_a_worker(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", *names)}


def with_its_parent() -> tuple[int, int]:
    return os.getpid(), os.getppid()


@pytest.fixture(scope="module")
def guarded() -> Iterator[LocalCluster]:
    """A scheduler that takes only clients with its certificates."""
    from distributed import LocalCluster
    from distributed.security import Security

    options = {"protocol": "tls", "security": Security.temporary(), "host": "127.0.0.1", "silence_logs": 50}
    with LocalCluster(n_workers=1, processes=False, dashboard_address="127.0.0.1:0", **options) as running:
        yield running


def test_nothing_waits_for_processes_that_do_not_come() -> None:
    from dask import config
    from distributed import Client, LocalCluster

    with (
        config.set({"distributed.scheduler.no-workers-timeout": "10ms"}),
        LocalCluster(n_workers=0, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50) as none,
        Client(none) as client,
        pytest.raises(WorkerError, match="no worker process is left"),
    ):
        list(in_flight(client, abs, [-1].pop, 1, abs))


class TestCertificates:
    @staticmethod
    def configured(security: object, folder: Path) -> dict[str, str]:
        """Return Dask's configuration of a client with the certificates of `security`."""
        told = {}
        for key, name in {"ca-file": "ca_file", "client.cert": "client_cert", "client.key": "client_key"}.items():
            (folder / name).write_text(getattr(security, f"tls_{name}"))
            told[f"distributed.comm.tls.{key}"] = str(folder / name)
        return told

    def test_of_dasks_configuration(self, guarded: LocalCluster, tmp_path: Path) -> None:
        from dask import config

        with config.set(self.configured(guarded.security, tmp_path)), connect(guarded.scheduler_address) as client:
            assert client.submit(os.getpid).result() == os.getpid()

    def test_who_has_none_or_others_is_refused(self, guarded: LocalCluster, tmp_path: Path) -> None:
        from dask import config
        from distributed.security import Security

        there = guarded.scheduler_address
        in_the_open = there.replace("tls://", "tcp://")
        others = self.configured(Security.temporary(), tmp_path)
        must = {"distributed.comm.require-encryption": True}
        for configured, address, told in (
            ({}, there, r"only clients with certificates; set DASK_\S+CA_FILE"),
            ({}, in_the_open, "write tls:// if it has certificates"),
            (must, in_the_open, "use tls://"),
            (others, there, "of different authorities"),
            ({**others, "distributed.comm.tls.client.key": "no.pem"}, there, "cannot be read"),
        ):
            with config.set(configured), pytest.raises(ConfigError, match=told):
                connect(address)
            gc.collect()  # Dask's client that failed closes when collected: not while the next one starts

    @pytest.mark.parametrize(
        ("address", "exposed"),
        [
            ("tcp://192.0.2.7:8786", True),
            ("192.0.2.7:8786", True),
            ("tcp://node7:8786", True),
            ("ws://192.0.2.7:8786", True),
            ("tcp://[2001:db8::7]:8786", True),
            ("tcp://127.0.0.1:8786", False),
            ("127.0.1.1:8786", False),
            ("tcp://[::1]:8786", False),
            ("localhost:8786", False),
            ("tls://192.0.2.7:8786", False),
            ("inproc://192.0.2.7/7/1", False),
        ],
    )
    def test_code_sent_in_the_open(self, address: str, exposed: bool) -> None:
        assert scheduler._is_exposed(address) is exposed

    def test_is_warned_of(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def nobody(*_: object, **__: object) -> None:
            raise OSError("nobody there")

        monkeypatch.setattr("distributed.Client", nobody)
        with pytest.warns(UserWarning, match="beyond this machine use tls://"), pytest.raises(ConfigError):
            connect("tcp://192.0.2.7:8786")


@pytest.fixture
def queue_of(tmp_path: Path) -> object:
    """The example as a cluster's user edits it, on this machine alone."""

    def edited(**more: object) -> Queue:
        options = {
            "scheduler_options": {"host": "127.0.0.1"},
            "shared_temp_directory": str(tmp_path),
            "log_directory": str(tmp_path / "logs"),
            **more,
        }
        _, queue = load_settings(EXAMPLE, {f"cluster.options.{key}": value for key, value in options.items()})
        assert queue is not None
        return queue

    return edited


class TestQueue:
    def test_the_example_is_a_job(self, queue_of, tmp_path: Path) -> None:
        settings, queue = load_settings(EXAMPLE, {"cluster.jobs": 3, "map.um_per_px": 8.0})
        assert (settings, queue.jobs, queue.workers) == (ScanConfig.load({"map": {"um_per_px": 8.0}}), 3, 3)
        with prepared(queue_of()) as jobs:
            script = jobs.job_script()
            assert jobs.scheduler.allowed_failures == 1
            assert [folder.stat().st_mode & 0o77 for folder in tmp_path.glob(".slidescan-*")] == [0]
            assert jobs.scheduler_address.startswith("tls://127.0.0.1:")
        lines = script.splitlines()
        told = ["-p gpu", "-A my-account", "-n 1", "--cpus-per-task=8", "--mem=32G", "-t 12:00:00", "--gres=gpu:1"]
        assert {f"#SBATCH {line}" for line in told} <= set(lines)
        assert "export OMP_NUM_THREADS=8" in lines
        for option in (
            "--nthreads 8",
            "--memory-limit 32.00GiB",
            "--nanny",
            "--local-directory /tmp",
            "--dashboard-address 127.0.0.1:0",
            "--lifetime 11.5h",
            "--protocol tls://",
            f"--tls-key {tmp_path}/.slidescan-",
        ):
            assert option in lines[-1], lines[-1]
        assert not list(tmp_path.glob(".slidescan-*"))

    def test_the_example_for_cpus(self, queue_of) -> None:
        """What the comment says of CPUs is one core with two threads a job."""
        lines = EXAMPLE.read_text().partition("In place of the lines above:\n")[2].splitlines()
        told = yaml.safe_load("\n".join(line.lstrip("# ") for line in lines if ":" in line))
        assert told.pop("jobs") == 64
        with prepared(queue_of(**told, job_script_prologue=None)) as jobs:  # what a line taken out leaves
            script = jobs.job_script()
        assert "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False" in script
        assert "OMP_NUM_THREADS" not in script
        assert "#SBATCH --cpus-per-task=1" in script
        assert "--nthreads 2" in script

    def test_jobs_run_and_come_back(self, queue_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """With commands in SLURM's place that start the script they are given: it is the script that is tested."""
        from dask import config

        commands = {
            "sbatch": """
                cp "$1" "$JOBS/$$.sh"
                setsid bash "$JOBS/$$.sh" > "$JOBS/$$.log" 2>&1 &
                echo Submitted batch job $!
                """,
            "scancel": 'kill -TERM -- "-$1"',
        }
        for name, lines in commands.items():
            (tmp_path / name).write_text("#!/bin/sh\n" + textwrap.dedent(lines))
            (tmp_path / name).chmod(0o700)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setenv("JOBS", str(tmp_path))
        monkeypatch.setattr(jobqueue, "_RENEW_S", 0.1)
        queue = queue_of(cores=2, job_cpu=1, memory="1GiB", job_script_prologue=["export OMP_NUM_THREADS=7"])
        queue = queue.model_copy(update={"jobs": 1})
        said: list[str] = []
        ours = "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED"
        with config.set({"distributed.deploy.lost-worker-timeout": "0.1s"}), from_queue(queue, said.append) as client:
            seen = client.submit(seen_by_a_worker, ours).result()
            first = [psutil.Process(pid) for pid in client.submit(with_its_parent, pure=False).result()]
            sockets = [each for process in first for each in process.net_connections("inet")]
            (address,) = client.scheduler_info(n_workers=-1)["workers"]
            os.killpg(os.getpgid(first[0].pid), signal.SIGKILL)
            second = [psutil.Process(pid) for pid in client.submit(with_its_parent, pure=False).result()]
        assert seen["OMP_NUM_THREADS"] == "7"  # the prologue of the file is kept beside ours
        assert seen[ours] == "False"
        opened = {each.laddr for each in sockets if each.status == psutil.CONN_LISTEN}
        # What others can reach asks for a certificate.
        assert {port for interface, port in opened if interface != "127.0.0.1"} == {int(address.rpartition(":")[2])}
        assert address.startswith("tls://")
        assert first != second
        assert "waiting for the first of 1 jobs" in said[0]
        assert not psutil.wait_procs([*first, *second], timeout=20)[1]
        assert not list(tmp_path.glob(".slidescan-*"))

    def test_a_job_that_is_refused(self, queue_of, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ConfigError, match="found no sbatch here"), from_queue(queue_of(), print):
            pass
        (tmp_path / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition: gpu' >&2; exit 1")
        (tmp_path / "sbatch").chmod(0o700)
        told = "the queue does not take the job: sbatch: error: invalid partition: gpu$"
        with pytest.raises(ConfigError, match=told), from_queue(queue_of(), print):
            pass

    @pytest.mark.parametrize(
        ("changed", "told"),
        [
            ({"cluster": None}, "cluster: input should be a valid dict.*got None"),
            ({"cluster.jobs": 0}, "cluster.jobs: input should be greater than or equal to 1, got 0"),
            ({"cluster.kind": "pbs"}, "cluster.kind: input should be 'slurm', got 'pbs'"),
            ({"cluster.job": 8}, "unknown key cluster.job; known there: kind, jobs, options"),
            ({"cluster.options.security": True}, "cluster.options.security is for slidescan to set"),
            ({"cluster.jobs.a": 1}, "cluster.jobs must be a section"),
            ({"map.um": 1}, "unknown key map.um"),
        ],
    )
    def test_what_cannot_be_meant(self, changed: dict[str, object], told: str, tmp_path: Path) -> None:
        source = EXAMPLE
        if "cluster" in changed:
            source = tmp_path / "a.yaml"
            source.write_text(yaml.safe_dump(changed))
            changed = {}
        with pytest.raises(ConfigError, match=told):
            load_settings(source, changed)

    @pytest.mark.parametrize(
        ("options", "told"),
        [
            ({"partition": "gpu"}, "unexpected keyword argument 'partition'$"),
            ({"memory": "much"}, "cluster.options: .*much"),
            ({"cores": None}, "how much cores and memory"),
            ({"shared_temp_directory": "/proc/no"}, "cannot write in /proc/no"),
        ],
    )
    @pytest.mark.filterwarnings("ignore:unclosed cluster:ResourceWarning")  # dask-jobqueue's, where it refuses
    def test_options_that_cannot_be_meant(self, queue_of, options: dict[str, object], told: str) -> None:
        with pytest.raises(ConfigError, match=told), prepared(queue_of(**options)):
            pass
        gc.collect()

    def test_without_the_package(self, queue_of, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "dask_jobqueue", None)
        with pytest.raises(MissingExtraError, match=r'pip install "slidescan\[slurm\]"'), prepared(queue_of()):
            pass

    def test_a_file_without_the_section(self, tmp_path: Path) -> None:
        (tmp_path / "a.yaml").write_text("map: {um_per_px: 8.0}")
        assert load_settings(tmp_path / "a.yaml", {}) == (ScanConfig.load({"map": {"um_per_px": 8.0}}), None)
        assert load_settings(None, {}) == (ScanConfig(), None)
        with pytest.raises(ConfigError, match=r"no\.yaml"):
            load_settings(tmp_path / "no.yaml", {})
