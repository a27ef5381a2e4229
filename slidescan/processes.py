"""Worker processes of this machine: started, told apart from others, and ended with nothing left of them.

Hides how Dask starts them. On a CPU they are forked from one process that has imported what all need; beside GPUs each
is started anew and sees one. Ctrl-C at the terminal does not reach them, nobody without their certificates talks to
them, and a start that is cut short leaves none.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import forkserver, resource_tracker
from typing import TYPE_CHECKING, Any

from slidescan.cluster import DEATHS, LOOPBACK, OURS, SILENT, UNWATCHED, cores, hush, readers_beside_gpu, workers_of
from slidescan.errors import WorkerError

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["processes", "visible_gpus"]

_DRAIN_S = 5  # for regions in flight when a run is ended; SLURM kills 30 s after it asked, others after 10
# A process that died and is not there again after this: Dask's own 15 s, after which it is never started again, are
# less than importing torch takes on a machine that swaps.
_RESTART_S = 600
_CLOSING_S = 2  # for what did begin of a cluster whose start was cut short
_servers_started: set[int] = set()  # processes that workers are forked from


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
        yield client, max(len(workers_of(client)), workers or 0)
        return
    names = (visible_gpus() if gpus is None else gpus) if gpu else ()
    n = workers or (max(1, len(names)) if gpu else cores())
    settings = {
        "distributed.scheduler.allowed-failures": DEATHS,
        "distributed.scheduler.no-workers-timeout": _RESTART_S,
        "distributed.deploy.lost-worker-timeout": _RESTART_S,
        "distributed.worker.daemon": False,
        **UNWATCHED,
        "distributed.scheduler.http.routes": [],  # its status pages name tasks and show logs
        "distributed.worker.http.routes": [],
    }
    # What is set now: a process that is forked has the environment of when the first one was.
    environment = {**os.environ, "OMP_NUM_THREADS": str(max(1, cores() // n) if gpu else 1), OURS: "1"}
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
            silence_logs=SILENT,
        ) as cluster,
        Client(cluster, loop=loop) as local,
    ):
        hush(local)
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
        nanny.close_gracefully()  # or it starts another one
        with contextlib.suppress(OSError, TypeError):  # it has ended
            os.kill(nanny.pid, signal.SIGKILL)


def _start(cluster: Callable[..., Any], options: dict[str, Any]) -> Any:
    """Start a cluster; one whose start was cut short leaves nothing for Dask to fail over when the process ends."""
    from distributed import SpecCluster

    before = set(SpecCluster._instances)
    try:
        return cluster(**options)
    except BaseException as exc:
        if loop := options.get("loop"):  # what was begun there fails now, and nobody waits for it
            loop.asyncio_loop.set_exception_handler(lambda loop, context: None)
        if not isinstance(exc, Exception):
            _kill_forked()
        for begun in set(SpecCluster._instances) - before:
            SpecCluster._instances.discard(begun)
            with contextlib.suppress(Exception):  # Dask asserts that workers which never began had begun
                begun.close(timeout=_CLOSING_S)
        raise


def _seeing_one_of(gpus: Sequence[str]) -> Callable[..., Any]:
    """Return what starts a worker process that sees one GPU, a restarted one the same as before."""
    from distributed import Nanny

    def start(address: str, *, name: int, env: dict[str, str], **options: Any) -> Any:
        env = {**env, "CUDA_VISIBLE_DEVICES": gpus[name % len(gpus)]}
        return Nanny(address, name=name, env=env, **options)

    return start


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
        before = _servers()
        try:
            with _deaf_to_ctrl_c():
                forkserver.ensure_running()
        finally:
            if threads is None:
                del os.environ["OMP_NUM_THREADS"]
            else:
                os.environ["OMP_NUM_THREADS"] = threads
        _servers_started.update(_servers() - before)  # one that was there is the caller's
        try:
            yield
        except Exception:
            raise
        except BaseException:
            _kill_forked()
            raise


def _servers() -> set[int]:
    """Return the processes that this one has for others to be forked from."""
    import psutil

    found = set()
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):
            if any("multiprocessing.forkserver" in word for word in child.cmdline()):
                found.add(child.pid)
    return found


def _kill_forked() -> None:
    """Kill the process that workers are forked from, and those that were, when this one is told to end.

    Those that are just being started would tell the terminal that it is gone.
    """
    import psutil

    for pid in _servers_started:
        with contextlib.suppress(psutil.Error):
            server = psutil.Process(pid)
            for process in (*server.children(), server):
                with contextlib.suppress(psutil.Error):
                    process.kill()
    _servers_started.clear()


def visible_gpus() -> list[str]:
    """Return the GPUs this process may use, named as CUDA_VISIBLE_DEVICES takes them; nothing is started on them."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = None if told is None else [name.strip() for name in told.split(",")]
    if names and names[0].startswith("MIG-"):
        return names  # a process sees one part of a GPU at most, so that CUDA would count one whatever is named
    import torch

    n = torch.cuda.device_count()
    return names[:n] if names is not None else [str(i) for i in range(n)]
