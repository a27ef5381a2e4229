"""A Dask cluster whose workers are jobs of SLURM: the section `cluster:` of a settings file.

The scheduler runs in this process, so this process must live as long as the archive takes (on a login node, or in a job
of its own). Jobs and scheduler know each other by certificates made for this run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from slidescan.cluster import DEATHS, LOOPBACK, SILENT, UNWATCHED
from slidescan.config import ScanConfig
from slidescan.errors import ConfigError, MissingExtraError

if TYPE_CHECKING:
    from distributed import Client
    from distributed.security import Security

__all__ = ["Queue", "from_queue", "load_settings", "prepared"]

_SECTION = "cluster"
# Seconds between two looks at whether jobs that ran have ended, at their time limit say; these are submitted again.
_RENEW_S = 60
# Of a job's Dask worker: its status server, which starts even when told not to, is not seen from outside its machine.
_WORKER = ["--no-dashboard", "--dashboard-address", f"{LOOPBACK}:0"]
# Options of SLURMCluster that are not a file's to set.
_OURS = ("asynchronous", "job_cls", "loop", "n_workers", "nanny", "protocol", "scheduler_cls", "security")


class Queue(BaseModel):
    """The section `cluster:`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)

    kind: Literal["slurm"]
    """The queueing system."""
    jobs: Annotated[int, Field(ge=1)]
    """Jobs to submit; the scan begins with the first that starts."""
    options: dict[str, Any]
    """Of a job, as `dask_jobqueue.SLURMCluster` names them, and shared_temp_directory (default: the home directory):
    where the jobs find this run's certificates."""

    @property
    def workers(self) -> int:
        """Worker processes of all jobs together."""
        each = self.options.get("processes", 1)
        return self.jobs * each if isinstance(each, int) else self.jobs


def load_settings(source: Path | None, overrides: Mapping[str, Any]) -> tuple[ScanConfig, Queue | None]:
    """Return the scan's settings in a YAML file and its section `cluster:`, None where it has none.

    Parameters
    ----------
    source : Path, optional
        Default: all defaults, and no section.
    overrides : mapping
        As for `ScanConfig.load`; those of the section begin with ``cluster.``.

    Raises
    ------
    ConfigError
        If the file cannot be read, or a key is unknown or out of range; the message names it.
    """
    values: Any = None
    if source is not None:
        with suppress(OSError, UnicodeDecodeError, yaml.YAMLError):  # ScanConfig.load says what is wrong
            values = yaml.safe_load(source.read_text(encoding="utf-8"))
    if not isinstance(values, dict) or _SECTION not in values:
        return ScanConfig.load(source or {}, overrides), None
    section = {_SECTION: values.pop(_SECTION)}
    for dotted, value in overrides.items():
        if dotted.startswith(f"{_SECTION}."):
            *path, key = dotted.split(".")
            target: Any = section
            for part in path:
                target = target.setdefault(part, {}) if isinstance(target, dict) else None
            if not isinstance(target, dict):
                raise ConfigError(f"{source}: {'.'.join(path)} must be a section, got {target!r}")
            target[key] = value
    scan = {dotted: value for dotted, value in overrides.items() if not dotted.startswith(f"{_SECTION}.")}
    return ScanConfig.load(values, scan), _queue(str(source), section[_SECTION])


def _queue(name: str, section: Any) -> Queue:
    try:
        queue = Queue.model_validate(section)
    except ValidationError as exc:
        problem = exc.errors()[0]
        dotted = ".".join((_SECTION, *(str(part) for part in problem["loc"])))
        if problem["type"] == "extra_forbidden":
            raise ConfigError(f"{name}: unknown key {dotted}; known there: {', '.join(Queue.model_fields)}") from exc
        if problem["type"] == "missing":
            raise ConfigError(f"{name}: expected {dotted}, found none") from exc
        raise ConfigError(f"{name}: {dotted}: {problem['msg'].lower()}, got {problem['input']!r}") from exc
    for key in _OURS:
        if key in queue.options:
            raise ConfigError(f"{name}: {_SECTION}.options.{key} is for slidescan to set; leave it out")
    return queue


@contextmanager
def from_queue(queue: Queue, say: Callable[[str], None]) -> Iterator[Client]:
    """Submit the jobs and give a Dask client as soon as one of them runs; cancel them in the end.

    A job that ran and ended is submitted again, where it has one process.

    Parameters
    ----------
    queue : Queue
        What `load_settings` returned.
    say : callable
        Is told what is waited for: a queue may hold jobs for hours.

    Raises
    ------
    ConfigError
        If an option cannot be meant, or the queue does not take the jobs.
    MissingExtraError
        If dask-jobqueue is not installed.
    """
    from distributed import Client
    from tornado.ioloop import PeriodicCallback

    with prepared(queue) as cluster, Client(cluster) as client:
        for _ in range(queue.jobs):
            cluster.worker_spec.update(cluster.new_worker_spec())
        try:
            cluster.sync(_submitted, cluster)
        except FileNotFoundError as exc:
            raise ConfigError(f"{_SECTION}: found no {exc.filename} here; run this where jobs are submitted") from exc
        except RuntimeError as exc:
            said = str(exc).rpartition("stderr:")[2].strip() or exc
            raise ConfigError(f"{_SECTION}.options: the queue does not take the job: {said}") from exc
        renewal = PeriodicCallback(lambda: cluster.scale(jobs=queue.jobs), _RENEW_S * 1000)
        cluster.loop.add_callback(renewal.start)
        try:
            where = queue.options.get("log_directory", "slurm-*.out")
            say(f"waiting for the first of {queue.jobs} jobs; see `squeue --me` and {where}; Ctrl-C cancels them")
            client.wait_for_workers(1)
            yield client
        finally:
            cluster.loop.add_callback(renewal.stop)


async def _submitted(cluster: Any) -> None:
    await cluster


@contextmanager
def prepared(queue: Queue) -> Iterator[Any]:
    """Give the cluster with no jobs yet: its ``job_script()`` says what would be submitted."""
    from dask import config

    try:
        from dask_jobqueue import SLURMCluster
    except ImportError as exc:
        raise MissingExtraError(f'{_SECTION}: needs dask-jobqueue ({exc}); pip install "slidescan[slurm]"') from exc
    options = {"processes": 1, **queue.options}
    options["worker_extra_args"] = [*_WORKER, *(options.get("worker_extra_args") or [])]
    options["job_script_prologue"] = [*_exports(UNWATCHED), *(options.get("job_script_prologue") or [])]
    options["scheduler_options"] = {"dashboard_address": f"{LOOPBACK}:0", **options.get("scheduler_options", {})}
    shared = Path(options.pop("shared_temp_directory", None) or "~").expanduser()
    with (
        _folder(shared) as folder,
        config.set({"distributed.scheduler.allowed-failures": DEATHS, **UNWATCHED}),
    ):
        try:
            security = _certificates(folder)
            cluster = SLURMCluster(
                **{"silence_logs": SILENT, **options},
                job_cls=_ended(SLURMCluster.job_cls),
                protocol="tls://",
                security=security,
            )
        except (OSError, RuntimeError, TypeError, ValueError) as exc:
            raise ConfigError(f"{_SECTION}.options: {str(exc).partition('. ')[0]}") from exc
        with cluster:
            yield cluster


def _exports(settings: Mapping[str, Any]) -> list[str]:
    """Return the lines of shell after which a Dask worker has these settings.

    >>> _exports({"distributed.worker.daemon": False})
    ['export DASK_DISTRIBUTED__WORKER__DAEMON=False']
    """
    return [f"export DASK_{key.upper().replace('.', '__')}={value}" for key, value in settings.items()]


def _ended(job: Any) -> Any:
    """Return the class of jobs that say when they are closed, as Dask asks for and dask-jobqueue's do not."""
    from distributed import Status

    class Job(job):  # type: ignore[misc]
        async def close(self) -> None:
            await super().close()
            self.status = Status.closed

    return Job


@contextmanager
def _folder(shared: Path) -> Iterator[Path]:
    """Give a directory in `shared` that no other user can look into."""
    try:
        folder = TemporaryDirectory(prefix=".slidescan-", dir=shared)
    except OSError as exc:
        raise ConfigError(f"{_SECTION}.options.shared_temp_directory: cannot write in {shared}: {exc}") from exc
    with folder as name:
        yield Path(name)


def _certificates(folder: Path) -> Security:
    """Make certificates where the jobs find them; they are gone when the run is over."""
    from distributed.security import Security

    made = Security.temporary()
    told = {"ca_file": made.tls_ca_file, "cert": made.tls_worker_cert, "key": made.tls_worker_key}
    paths = {}
    for name, text in told.items():
        (folder / name).write_text(text)
        paths[name] = str(folder / name)
    files = {
        f"tls_{role}_{part}": paths[part] for role in ("client", "scheduler", "worker") for part in ("cert", "key")
    }
    return Security(require_encryption=True, tls_ca_file=paths["ca_file"], **files)
