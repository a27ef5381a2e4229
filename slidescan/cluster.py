"""Dask, and nothing else of slidescan: where region tasks run, and how many of them at once."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from slidescan.errors import ConfigError, ModelError
from slidescan.region import RegionTask

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["cluster", "connect", "in_flight"]

# Seconds to wait for a scheduler to answer before saying that it does not.
_SCHEDULER_TIMEOUT_S = 10
# Dask starts its status servers even when told to have none: they must not be seen from outside this machine.
_LOOPBACK = "127.0.0.1"


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


def in_flight(
    client: Client, tasks: list[RegionTask], limit: int, gives_up: Callable[[RegionTask], bool]
) -> Iterator[tuple[RegionTask, dict[str, float]]]:
    """Run tasks with at most `limit` handed out at a time; yield each as it ends; the first error ends all.

    A task that killed its workers is done, without its seconds, where `gives_up` says so.
    """
    from distributed import CancelledError, KilledWorker, as_completed
    from distributed.client import ClosedClientError
    from distributed.comm import CommClosedError

    todo = iter(tasks)
    owner = {}
    running = as_completed()

    def hand_out() -> None:
        task = next(todo, None)
        if task is not None:
            future = client.submit(RegionTask.run, task, pure=False, retries=0)
            owner[future.key] = task
            running.add(future)

    try:
        for _ in range(limit):
            hand_out()
        for future in running:
            try:
                seconds = future.result()
            except (CancelledError, ClosedClientError, CommClosedError) as exc:
                raise ModelError("the Dask cluster is gone; start it and run the same command to continue") from exc
            except KilledWorker as exc:
                if not gives_up(owner[future.key]):
                    raise ModelError(
                        "a worker process died while scoring a region, most likely out of memory; run the same command "
                        "to continue, with a smaller tiling.region_px or fewer --workers"
                    ) from exc
                seconds = {}
            hand_out()
            yield owner.pop(future.key), seconds
    finally:
        with contextlib.suppress(CancelledError, ClosedClientError, CommClosedError):
            client.cancel(list(running.futures), force=True)
