"""Dask, and nothing else of slidescan: where region tasks run, and how many of them at once."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from multiprocessing import forkserver, resource_tracker
from typing import TYPE_CHECKING, Any, TypeVar

from slidescan.errors import ConfigError, WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = [
    "DEATHS",
    "LOOPBACK",
    "cluster",
    "cores",
    "from_within",
    "in_flight",
    "processes",
    "readers_beside_gpu",
    "visible_gpus",
]

T = TypeVar("T")
R = TypeVar("R")

# Dask starts its status servers even when told to have none: they must not be seen from outside this machine.
LOOPBACK = "127.0.0.1"
# Worker processes that a task may take with it before it counts as their killer.
DEATHS = 1
_WORKERS_TIMEOUT_S = 5  # for the first of a scheduler's to come
_DRAIN_S = 5  # for regions in flight when a run is ended; SLURM kills 30 s after it asked, others after 10
_CLOSING_S = 2  # for what did begin of a cluster whose start was cut short
_OURS = "SLIDESCAN_WORKER"  # set in the environment of worker processes that `processes` started
_MOST_READERS = 16  # threads that read beside a GPU, a core each; every one holds a region of 50 MB


@contextmanager
def cluster(client: Client | None, threads: int) -> Iterator[tuple[Client, int, int]]:
    """Give a Dask client, its threads and processes: the caller's, or one of `threads` inside this process."""
    from distributed import Client, LocalCluster

    if client is not None:
        workers = _workers(client)
        yield client, sum(workers.values()), len(workers)
        return
    # One process: regions share the loaded model, and pixels never cross a socket. Memory is bounded by the regions in
    # flight, so Dask's own memory limits (which would restart our only worker) are off.
    with (
        LocalCluster(
            n_workers=1,
            threads_per_worker=threads,
            processes=False,
            dashboard_address=f"{LOOPBACK}:0",
            worker_dashboard_address=f"{LOOPBACK}:0",
            memory_limit=0,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster) as local,
    ):
        _hush(local)
        yield local, threads, 1


def _hush(client: Client) -> None:
    """Keep Dask's loop from telling the terminal of its own timer that ran out just when the loop was closed."""

    def heed(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        # Of a task, which does something, asyncio says "Task exception".
        is_unheard = context.get("message") == "Future exception was never retrieved"
        if not (is_unheard and isinstance(context.get("exception"), TimeoutError)):
            loop.default_exception_handler(context)

    inner: Any = client.loop
    inner.asyncio_loop.set_exception_handler(heed)


def _workers(client: Client) -> dict[str, int]:
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


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, named as CUDA_VISIBLE_DEVICES takes them; nothing is started on them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if told is None else [name.strip() for name in told.split(",")]
    if names and names[0].startswith("MIG-"):
        return names  # a process sees one part of a GPU at most, so that CUDA would count one whatever is named
    import torch

    n = torch.cuda.device_count()
    return names[:n] if names is not None else [str(i) for i in range(n)]


@contextmanager
def processes(
    client: Client | None,
    workers: int | None,
    *,
    gpu: bool,
    gpus: Sequence[str] | None = None,
    preload: Sequence[str] = (),
) -> Iterator[tuple[Client, int]]:
    """Give a Dask client and how many processes it has: the caller's, or a cluster of this machine's processes.

    On a CPU a process is a core: scoring then scales with processes, and its result does not depend on their number.
    They are forked from one process that has imported what all need. With GPUs a process sees one of them, and is
    started anew, for what has seen a GPU cannot be forked. Nobody else on this machine can talk to them: they ask for
    certificates that were made a moment ago and are on no disk.

    Parameters
    ----------
    client : distributed.Client, optional
        The caller's cluster.
    workers : int, optional
        Processes to start; of the caller's cluster how many it will have, if it has not all of them yet.
    gpu : bool
        Whether scoring is done on GPUs.
    gpus : sequence of str, optional
        Names of the GPUs, which the processes get in turn; default: `visible_gpus`. None given: all see all.
    preload : sequence of str
        Modules that are imported before processes are forked.
    """
    from dask import config
    from distributed import Client, LocalCluster
    from distributed.security import Security

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # in a worker that imports the script which started it, and would start workers; it is told there
    if client is not None:
        yield client, max(len(_workers(client)), workers or 0)
        return
    names = (visible_gpus() if gpus is None else gpus) if gpu else ()
    n = workers or (max(1, len(names)) if gpu else cores())
    settings = {
        "distributed.scheduler.allowed-failures": DEATHS,
        "distributed.worker.daemon": False,
        "distributed.scheduler.http.routes": [],  # its status pages name tasks and show logs
        "distributed.worker.http.routes": [],
    }
    # All of it, for a process that is forked has the environment of when the first one was.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // n) if gpu else 1), _OURS: "1"}
    with (
        config.set(settings),
        _deaf_loop() as loop,
        contextlib.nullcontext() if gpu else _forked(preload),
        _started(
            LocalCluster,
            loop=loop,
            n_workers=n,
            # One reads while another scores.
            threads_per_worker=2 + (readers_beside_gpu(n) if gpu else 0),
            processes=True,
            # A port of 127.0.0.1 is open to everyone on this machine, and a scheduler runs what it is sent.
            protocol="tls://",
            security=Security.temporary(),
            worker_class=_seeing_one_of(names) if names else None,
            host=LOOPBACK,
            dashboard_address=f"{LOOPBACK}:0",
            worker_dashboard_address=f"{LOOPBACK}:0",
            memory_limit=1 / n,  # "auto" goes by threads, of which there are more than cores
            env=environment,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, loop=loop) as local,
    ):
        _hush(local)
        yield local, n


@contextmanager
def _started(cluster: Callable[..., Any], **options: Any) -> Iterator[Any]:
    """Give a cluster of processes; one of which a process died in its start is started once more."""
    try:
        started = _start(cluster, options)
    except RuntimeError:
        try:
            started = _start(cluster, options)
        except RuntimeError as exc:
            raise WorkerError(
                "worker processes end while they are started: a script that scans an archive does it below "
                '`if __name__ == "__main__":`, or memory is short'
            ) from exc
    try:
        with started:
            try:
                yield started
            except BaseException:
                # What is in flight gets its time, but who ends a run (a queue, before it kills) does not wait long.
                end = threading.Timer(_DRAIN_S, _kill, [started])
                end.daemon = True
                end.start()
                raise
    except BaseException:
        _kill(started)  # the signal may have come while it was closed
        raise


def _kill(cluster: Any) -> None:
    """End what is left of a cluster, and leave nothing for Dask to close, with its own patience, at the end."""
    cluster._instances.discard(cluster)
    for nanny in list(cluster.workers.values()):
        nanny.auto_restart = False
        with contextlib.suppress(OSError, TypeError):  # it has ended
            os.kill(nanny.pid, signal.SIGKILL)


def _start(cluster: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Start a cluster; one whose start was cut short leaves nothing for Dask to fail over when the process ends."""
    from distributed import SpecCluster

    before = set(SpecCluster._instances)
    try:
        return cluster(**options)
    except BaseException:
        if loop := options.get("loop"):  # what was begun there fails now, and nobody waits for it
            loop.asyncio_loop.set_exception_handler(lambda loop, context: None)
        _kill_forked()
        for begun in set(SpecCluster._instances) - before:
            SpecCluster._instances.discard(begun)
            with contextlib.suppress(Exception):  # Dask asserts that workers which never began had begun
                begun.close(timeout=_CLOSING_S)
        raise


@contextmanager
def _deaf_loop() -> Iterator[Any]:
    """Give a loop for Dask whose processes Ctrl-C does not reach: a terminal sends it to all, and this one ends others.

    They inherit it from the loop's thread, which starts them, a worker that died again.
    """
    from distributed.utils import LoopRunner

    runner: Any = LoopRunner()
    with _deaf_to_ctrl_c():
        runner.start()
    try:
        yield runner.loop
    finally:
        runner.stop()


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Start threads and processes that Ctrl-C does not reach; here it waits until the block has ended."""
    resource_tracker.ensure_running()  # its own start would lift the block in the thread that starts the first process
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _forked(preload: Sequence[str]) -> Iterator[None]:
    """Have Dask fork worker processes from one that has imported `preload`; it is started now if it is not there.

    Importing torch and transformers takes a worker seconds and a few hundred MB, which processes forked so share. The
    server lives as long as this process.
    """
    from dask import config
    from distributed.utils import get_mp_context

    with config.set({"distributed.worker.multiprocessing-method": "forkserver"}):
        context = get_mp_context()  # sets what Dask would import
        context.set_forkserver_preload(list(preload))
        threads = os.environ.get("OMP_NUM_THREADS")
        os.environ["OMP_NUM_THREADS"] = "1"  # is read when torch is imported
        try:
            with _deaf_to_ctrl_c():
                forkserver.ensure_running()
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        try:
            yield
        except BaseException:
            _kill_forked()
            raise


def _kill_forked() -> None:
    """Kill the process that workers are forked from, and those that were: they would tell that this one is gone."""
    import psutil

    with contextlib.suppress(psutil.Error):
        for server in psutil.Process().children():
            if any("multiprocessing.forkserver" in word for word in server.cmdline()):
                for process in (*server.children(), server):
                    process.kill()


def _seeing_one_of(gpus: Sequence[str]) -> Callable[..., Any]:
    """Return what starts a worker process that sees one GPU, a restarted one the same as before."""
    from distributed import Nanny

    def start(address: str, *, name: int, env: dict[str, str], **options: Any) -> Any:
        env = {**env, "CUDA_VISIBLE_DEVICES": gpus[name % len(gpus)]}
        return Nanny(address, name=name, env=env, **options)

    return start


@contextmanager
def from_within() -> Iterator[Client]:
    """Give a task a client of the cluster it runs on; others may have its thread meanwhile."""
    from distributed import worker_client

    if os.environ.get(_OURS):
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
            del future  # or Dask does the task again where its worker dies after this
            hand_out()
            yield task, outcome
            hand_out()
    finally:
        with contextlib.suppress(CancelledError, ClosedClientError, CommClosedError):
            client.cancel(list(running.futures), force=True)
