"""Dask, and nothing else of slidescan: where region tasks run, and how many of them at once."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeVar

from slidescan.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["cluster", "connect", "from_within", "in_flight", "processes", "readers_beside_gpu"]

T = TypeVar("T")
R = TypeVar("R")

# Seconds to wait for a scheduler to answer before saying that it does not.
_SCHEDULER_TIMEOUT_S = 5
# Dask starts its status servers even when told to have none: they must not be seen from outside this machine.
_LOOPBACK = "127.0.0.1"
# Worker processes that a task may take with it before it counts as their killer.
_DEATHS = 1
_MOST_READERS = 16  # threads that read beside a GPU, a core each; every one holds a region of 50 MB


def connect(address: str) -> Client:
    """Connect to a running Dask scheduler.

    Raises
    ------
    ConfigError
        If none answers at `address`.
    """
    from distributed import Client

    try:
        return Client(address, timeout=_SCHEDULER_TIMEOUT_S)
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"--scheduler: no Dask scheduler answers at {address} within {_SCHEDULER_TIMEOUT_S} s; "
            "start one with `dask scheduler`, or leave the option out"
        ) from exc


@contextmanager
def cluster(client: Client | None, threads: int) -> Iterator[tuple[Client, int, int]]:
    """Give a Dask client, its threads and processes: the caller's, or one of `threads` inside this process."""
    from distributed import Client, LocalCluster

    if client is not None:
        workers = client.scheduler_info(n_workers=-1)["workers"].values()
        if not workers:
            raise ConfigError("--scheduler: the Dask scheduler has no workers; start some with `dask worker ADDRESS`")
        yield client, sum(worker["nthreads"] for worker in workers), len(workers)
        return
    # One process: regions share the loaded model, and pixels never cross a socket. Memory is bounded by the regions in
    # flight, so Dask's own memory limits (which would restart our only worker) are off.
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=threads,
            processes=False,
            dashboard_address=f"{_LOOPBACK}:0",
            worker_dashboard_address=f"{_LOOPBACK}:0",
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as local,
    ):
        yield local, threads, 1


def readers_beside_gpu() -> int:
    """Return how many threads read while a GPU scores."""
    return min(_MOST_READERS, os.cpu_count() or 1)


@contextmanager
def processes(client: Client | None, workers: int | None, *, gpu: bool) -> Iterator[tuple[Client, int]]:
    """Give a Dask client and how many processes it has: the caller's, or a cluster of this machine's processes.

    On a CPU a process is a core: scoring then scales with processes, and its result does not depend on their number.
    """
    from dask import config
    from distributed import Client, LocalCluster

    if client is not None:
        n = len(client.scheduler_info(n_workers=-1)["workers"])
        if not n:
            raise ConfigError("--scheduler: the Dask scheduler has no workers; start some with `dask worker ADDRESS`")
        yield client, n
        return
    cores = os.cpu_count() or 1
    n = workers or (1 if gpu else cores)
    settings = {"distributed.scheduler.allowed-failures": _DEATHS, "distributed.worker.daemon": False}
    with (
        config.set(settings),
        LocalCluster(
            n_workers=n,
            # One reads while another scores.
            threads_per_worker=2 + (readers_beside_gpu() if gpu else 0),
            processes=True,
            host=_LOOPBACK,
            dashboard_address=f"{_LOOPBACK}:0",
            worker_dashboard_address=f"{_LOOPBACK}:0",
            memory_limit="auto",
            env={"OMP_NUM_THREADS": str(cores if gpu else 1)},
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as local,
    ):
        yield local, n


@contextmanager
def from_within() -> Iterator[Client]:
    """Give a task a client of the cluster it runs on; others may have its thread meanwhile."""
    from distributed import worker_client

    with worker_client() as client:
        yield client


def in_flight(
    client: Client, do: Callable[[T], R], todo: Callable[[], T | None], limit: int, killed: Callable[[T], R]
) -> Iterator[tuple[T, R]]:
    """Run ``do(task)`` for what `todo` gives, at most `limit` at a time; yield each as it ends.

    The first error ends all. `todo` is asked again after each. What became of a task that killed its workers is for
    `killed` to say.
    """
    from distributed import CancelledError, KilledWorker, as_completed
    from distributed.client import ClosedClientError
    from distributed.comm import CommClosedError

    owner: dict[str, T] = {}
    running = as_completed()

    def hand_out() -> None:
        while len(owner) < limit and (task := todo()) is not None:
            future = client.submit(do, task, pure=False, retries=0)
            owner[future.key] = task
            running.add(future)

    try:
        hand_out()
        for future in running:
            task = owner.pop(future.key)
            try:
                outcome = future.result()
            except (CancelledError, ClosedClientError, CommClosedError) as exc:
                raise WorkerError("the Dask cluster is gone; start it and run the same command to continue") from exc
            except KilledWorker:
                outcome = killed(task)
            hand_out()
            yield task, outcome
            hand_out()
    finally:
        with contextlib.suppress(CancelledError, ClosedClientError, CommClosedError):
            client.cancel(list(running.futures), force=True)
