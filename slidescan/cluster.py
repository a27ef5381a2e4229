"""Dask, and nothing else of slidescan: where region tasks run, and how many of them at once."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from slidescan.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "DEATHS",
    "LOOPBACK",
    "OURS",
    "SILENT",
    "UNWATCHED",
    "cluster",
    "cores",
    "from_within",
    "hush",
    "in_flight",
    "readers_beside_gpu",
    "workers_of",
]

T = TypeVar("T")
R = TypeVar("R")

# Dask starts its status servers even when told to have none: they must not be seen from outside this machine.
LOOPBACK = "127.0.0.1"
# Worker processes that a task may take with it before it counts as their killer.
DEATHS = 1
# Dask's: a hundred times a second it looks at what every thread of a worker does, for a dashboard that nobody is shown,
# and fifty times at whether a process still answers. An archive of small slides took a sixth longer for the first, and
# two idle workers and their scheduler a sixth of a core for the second.
UNWATCHED: dict[str, Any] = {"distributed.worker.profile.enabled": False, "distributed.admin.tick.interval": "1s"}
# Of Dask's log nothing is told: to its scheduler it is critical that a client goes while it is told of its tasks.
SILENT = logging.CRITICAL + 1
_WORKERS_TIMEOUT_S = 5  # for the first of a scheduler's to come
OURS = "SLIDESCAN_WORKER"  # in the environment of worker processes that are slidescan's own
_MOST_READERS = 16  # threads that read beside a GPU, a core each; every one holds a region of 50 MB


@contextmanager
def cluster(client: Client | None, threads: int) -> Iterator[tuple[Client, int, int]]:
    """Give a Dask client, its threads and processes: the caller's, or one of `threads` inside this process."""
    from dask import config
    from distributed import Client, LocalCluster

    if client is not None:
        workers = workers_of(client)
        yield client, sum(workers.values()), len(workers)
        return
    # One process: regions share the loaded model, and pixels never cross a socket. Memory is bounded by the regions in
    # flight, so Dask's own memory limits (which would restart our only worker) are off.
    with (
        # A picture in memory goes with each task; it is not sent anywhere.
        config.set({"distributed.admin.large-graph-warning-threshold": "1 TB", **UNWATCHED}),
        LocalCluster(
            n_workers=1,
            threads_per_worker=threads,
            processes=False,
            dashboard_address=f"{LOOPBACK}:0",
            worker_dashboard_address=f"{LOOPBACK}:0",
            memory_limit=0,
            silence_logs=SILENT,
        ) as cluster,
        _left_behind(cluster),
        Client(cluster) as local,
    ):
        hush(local)
        yield local, threads, 1


@contextmanager
def _left_behind(cluster: Any) -> Iterator[None]:
    """Have Dask not wait at the end of this process for a cluster of its threads that was not closed in peace."""
    try:
        yield
    except BaseException:
        cluster._instances.discard(cluster)
        raise


def hush(client: Client) -> None:
    """Keep Dask's loop from telling the terminal of its own timer that ran out just when the loop was closed."""

    def heed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Of a task, which does something, asyncio says "Task exception".
        is_unheard = context.get("message") == "Future exception was never retrieved"
        if not (is_unheard and isinstance(context.get("exception"), TimeoutError)):
            loop.default_exception_handler(context)

    inner: Any = client.loop
    inner.asyncio_loop.set_exception_handler(heed)


def workers_of(client: Client) -> dict[str, int]:
    """Return the threads of each worker; a worker that is started again is waited for."""
    # Not `scheduler_info`: its answer is a field that the client's own timer empties every two seconds.
    workers: dict[str, int] = client.nthreads()
    if not workers:
        try:
            client.wait_for_workers(1, timeout=_WORKERS_TIMEOUT_S)
        except TimeoutError as exc:
            raise ConfigError(
                "--scheduler: the Dask scheduler has no workers; start some with `dask worker ADDRESS`"
            ) from exc
        workers = client.nthreads()
    return workers


def cores() -> int:
    """Return how many cores this job or container may use, of those the machine has."""
    from dask.system import CPU_COUNT

    return int(CPU_COUNT)


def readers_beside_gpu(gpus: int = 1) -> int:
    """Return how many threads read beside each GPU while it scores."""
    return max(1, min(_MOST_READERS, cores() // gpus))


@contextmanager
def from_within() -> Iterator[Client]:
    """Give a task a client of the cluster it runs on; others may have its thread meanwhile."""
    from distributed import worker_client

    if os.environ.get(OURS):
        _end_at_once()
    with worker_client() as client:
        yield client


@cache
def _end_at_once() -> None:
    """Have this worker process end without Python's tidying up, once Dask has closed it.

    It takes a second or two for torch's modules, and clients of a slide in progress tell that their loop is gone.
    """
    atexit.register(os._exit, 0)


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
    from distributed.scheduler import NoValidWorkerError, NoWorkerError

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
            except (NoWorkerError, NoValidWorkerError) as exc:
                raise WorkerError(
                    "no worker process is left, and none came back; see to the machine's memory and run the same "
                    "command to continue"
                ) from exc
            except KilledWorker:
                outcome = killed(task)
            del future  # or Dask does the task again where its worker dies after this
            hand_out()
            yield task, outcome
            hand_out()
    finally:
        with contextlib.suppress(CancelledError, ClosedClientError, CommClosedError):
            client.cancel(list(running.futures), force=True)
