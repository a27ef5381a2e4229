"""Worker processes of this machine: what each of them sees, who can reach them, and what Ctrl-C does not."""

from __future__ import annotations

import asyncio
import gc
import http.client
import os
import signal
import socket
import ssl
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from slidescan import cluster
from slidescan import processes as own
from slidescan.processes import processes, visible_gpus

if TYPE_CHECKING:
    from distributed import Worker


def listening() -> set[tuple[int, str, int]]:
    """Return (process, interface, port) of all that this process and those it started listen on."""
    ours = [psutil.Process(), *psutil.Process().children(recursive=True)]
    return {
        (process.pid, opened.laddr.ip, opened.laddr.port)
        for process in ours
        for opened in process.net_connections("inet")
        if opened.status == psutil.CONN_LISTEN
    }


def knock(address: str) -> None:
    """Talk to an address as one who trusts anybody and has no certificate."""
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    host, port = address.removeprefix("tls://").split(":")
    with socket.create_connection((host, int(port)), timeout=5) as plain, trusting.wrap_socket(plain) as encrypted:
        encrypted.recv(1)


def page(port: int, path: str) -> int | None:
    """Return the HTTP status of a page; None where no HTTP is spoken."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    except (http.client.HTTPException, OSError):
        return None
    finally:
        connection.close()


def seen_by_a_worker(*names: str) -> dict[str, str | None]:
    return {name: os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", *names)}


def timers_ms(dask_worker: Worker) -> dict[str, float]:
    """Return how often the worker this runs on does what it does by the clock."""
    return {name: timer.callback_time for name, timer in dask_worker.periodic_callbacks.items()}


async def left_alone(error: Exception) -> None:
    """Leave a future with an error that nobody asks for."""
    asyncio.get_running_loop().create_future().set_exception(error)
    gc.collect()


async def ended_alone(error: Exception) -> None:
    """Leave a task that ended with an error that nobody asks for."""

    async def end() -> None:
        raise error

    task = asyncio.create_task(end())
    await asyncio.wait([task])
    del task
    gc.collect()


class TestThisMachine:
    def test_nothing_is_said_of_dasks_own_timers(self, caplog: pytest.LogCaptureFixture) -> None:
        """What else goes wrong in its loop is said."""
        with cluster.cluster(None, 1) as (client, _, _):
            for error in (TimeoutError("its time is over"), OSError("a wire was cut")):
                client.sync(left_alone, error)
            client.sync(ended_alone, TimeoutError("a task's"))
        assert "a wire was cut" in caplog.text
        assert "a task's" in caplog.text
        assert "its time is over" not in caplog.text

    def test_a_core_a_process_and_nobody_else_reaches_them(self) -> None:
        before = listening()
        with processes(None, 2, gpu=False) as (client, n):
            seen = client.run(seen_by_a_worker).values()
            told = client.scheduler_info(n_workers=-1)
            opened, workers = listening() - before, told["workers"]
            assert n == len(workers) == 2
            with processes(client, 5, gpu=False) as (same, expected):
                assert (same, expected) == (client, 5)
        assert [each["OMP_NUM_THREADS"] for each in seen] == ["1", "1"]
        assert {each["CUDA_VISIBLE_DEVICES"] for each in seen} == {os.environ.get("CUDA_VISIBLE_DEVICES")}
        assert {worker["nthreads"] for worker in workers.values()} == {2}
        assert len({pid for pid, _, _ in opened}) == 3  # a scheduler with nannies, two workers
        assert {interface for _, interface, _ in opened} == {"127.0.0.1"}
        assert all(address.startswith("tls://127.0.0.1:") for address in [told["address"], *workers])

    def test_nobody_else_on_this_machine_is_heard(self) -> None:
        before = listening()
        with processes(None, 1, gpu=False) as (client, _):
            addresses = [client.scheduler.address, *client.nthreads()]
            for address in addresses:
                with pytest.raises(ssl.SSLError, match="CERTIFICATE_REQUIRED"):
                    knock(address)
            talks = {int(address.rpartition(":")[2]) for address in addresses}
            pages = {port for _, _, port in listening() - before} - talks
            paths = ("/info/main/workers.html", "/metrics", "/health")
            answers = [page(port, path) for port in pages for path in paths]
        assert answers
        assert 200 not in answers

    def test_ctrl_c_reaches_this_process_alone(self) -> None:
        """A terminal sends it to the workers, too: they go on until they are told, also one that was started again."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        with processes(None, 1, gpu=False) as (client, _):
            assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
            first = client.submit(os.getpid, pure=False).result(60)
            os.kill(first, signal.SIGINT)
            assert client.submit(os.getpid, pure=False).result(60) == first
            os.kill(first, signal.SIGKILL)
            second = client.submit(os.getpid, pure=False).result(60)
            os.kill(second, signal.SIGINT)
            assert client.submit(os.getpid, pure=False).result(60) == second != first

    def test_one_that_is_slow_to_start_again_is_waited_for(self) -> None:
        """Dask gives up one that has died and is not back in time; when it was the last, its work waits for ever."""
        from dask import config

        at_once = config.set({"distributed.deploy.lost-worker-timeout": "1ms"})
        with at_once, processes(None, 1, gpu=False) as (client, _):
            first = client.submit(os.getpid, pure=False).result(60)
            os.kill(first, signal.SIGKILL)
            assert client.submit(os.getpid, pure=False).result(60) != first

    def test_threads_of_one_process_are_reached_by_nobody_either(self) -> None:
        before = listening()
        with cluster.cluster(None, 2) as (_, threads, n):
            assert (threads, n) == (2, 1)
            assert {interface for _, interface, _ in listening() - before} <= {"127.0.0.1"}

    @pytest.mark.parametrize("started", [processes(None, 1, gpu=False), cluster.cluster(None, 1)])
    def test_nobody_looks_at_what_threads_do(self, started: AbstractContextManager[tuple[Any, ...]]) -> None:
        """Dask does by itself, a hundred times a second, with the interpreter held."""
        with started as (client, *_):
            (timers,) = client.run(timers_ms).values()
        assert "profile" not in timers
        assert timers["tick"] >= 1000

    def test_each_process_sees_one_gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in (cluster, own):
            monkeypatch.setattr(module, "cores", lambda: 6)
        monkeypatch.setattr(own, "visible_gpus", lambda: ["3", "MIG-5"])
        with processes(None, None, gpu=True) as (client, n):
            seen = [client.submit(seen_by_a_worker, workers=[i], pure=False).result() for i in range(2)]
            workers = client.scheduler_info(n_workers=-1)["workers"].values()
            limits = {worker["memory_limit"] for worker in workers}
            assert n == 2
        assert [each["CUDA_VISIBLE_DEVICES"] for each in seen] == ["3", "MIG-5"]
        assert {each["OMP_NUM_THREADS"] for each in seen} == {"3"}
        assert {worker["nthreads"] for worker in workers} == {2 + 3}
        assert sum(limits) <= psutil.virtual_memory().total / 2

    @pytest.mark.parametrize(
        ("told", "counted", "names"),
        [
            (None, 2, ["0", "1"]),
            (None, 0, []),
            ("", 0, []),
            ("3, 5", 2, ["3", "5"]),
            ("1,9", 1, ["1"]),  # there is no ninth
            ("GPU-8f,GPU-2a", 2, ["GPU-8f", "GPU-2a"]),
            ("MIG-8f,MIG-2a", 1, ["MIG-8f", "MIG-2a"]),
        ],
    )
    def test_names_of_gpus(
        self, told: str | None, counted: int, names: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if told is not None:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", told)
        monkeypatch.setattr("torch.cuda.device_count", lambda: counted)
        assert visible_gpus() == names
