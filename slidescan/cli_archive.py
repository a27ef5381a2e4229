"""The commands for many slides: `archive` and `status`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from slidescan.cli_options import ModelMppOpt, PrecisionOpt, assigned, detector_of
from slidescan.cli_progress import slides_done, slides_opened
from slidescan.cli_report import area, duration, warnings_in_a_line
from slidescan.errors import ConfigError, WorkerError
from slidescan.timeouts import LONGEST_S

if TYPE_CHECKING:
    from distributed import Client

    from slidescan.archive import Entry
    from slidescan.detections import Detector
    from slidescan.jobqueue import Queue

__all__ = ["archive", "status", "with_reason"]


def archive(
    listing: Annotated[
        str, typer.Argument(help="CSV, TSV or Parquet with slide_path, a folder, or a pattern in quotes.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for all results and records.")] = Path("runs"),
    model: Annotated[
        str,
        typer.Option("--model", "-m", help="Detector: `mitosis`, a directory, a Hugging Face id, or ultralytics:DIR."),
    ] = "mitosis",
    model_mpp: ModelMppOpt = None,
    precision: PrecisionOpt = "auto",
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML with settings; see configs/slurm.yaml.")
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="One setting, as section.key=value.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes; default: one a core, or one a GPU.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")] = None,
    shard: Annotated[str | None, typer.Option(help="i/n: every n-th slide from the i-th on, for job arrays.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Open every slide, say what is to do, write nothing.")
    ] = False,
    allow_coarse: Annotated[
        bool, typer.Option("--allow-coarse", help="Scan coarser slides than was trained for.")
    ] = False,
    retry_failed: Annotated[
        str | None,
        typer.Option(metavar="[REASON]", help="Try again what failed for good: all, or those of one reason."),
    ] = None,
    max_failures: Annotated[int | None, typer.Option(min=1, help="Stop after so many failures.")] = None,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first failure.")] = False,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds for opening a slide or doing a region; then its process is ended.")
    ] = LONGEST_S,
) -> None:
    """Scan many slides; run it again after anything and it continues."""
    from slidescan.archive import read_listing, scan_archive
    from slidescan.archive.record import FAILURES
    from slidescan.jobqueue import load_settings

    if retry_failed and retry_failed not in FAILURES:
        raise ConfigError(f"--retry-failed must be one of {', '.join(FAILURES)}, or nothing, got {retry_failed!r}")
    settings, queue = load_settings(config, assigned(set_ or []))
    with warnings_in_a_line():  # of what is left out
        part, entries = _shard(shard), read_listing(listing)
    detector = detector_of(model, precision, model_mpp)
    with _cluster(scheduler, queue) as client:
        n = queue.workers if queue is not None and client is not None else workers
        common: dict[str, Any] = {"config": settings, "client": client, "workers": n, "shard": part}
        common |= {"allow_coarse": allow_coarse, "timeout_s": timeout, "out": out}
        common["retry_failed"] = retry_failed or retry_failed is not None
        if dry_run:
            _estimate(entries, detector, common)
            return
        with slides_done() as on_slide:
            records = scan_archive(
                entries,
                detector,
                max_failures=1 if fail_fast else max_failures,
                on_slide=on_slide,
                **common,
            )
    status(out)
    if any(record.state == "failed" for record in records):
        raise typer.Exit(1)
    left = len(_given(entries, part)) - len(records)
    if left > 0:
        raise WorkerError(
            f"{left} of the slides {'is' if left == 1 else 'are'} not done: another run was at work on them when they "
            "were asked for last; run the same command again"
        )


def status(
    out: Annotated[Path, typer.Argument(help="Output directory of `slidescan archive`.")],
    as_json: Annotated[bool, typer.Option("--json", help="As JSON.")] = False,
    write: Annotated[bool, typer.Option("--report", help="Write report.html of what is there now.")] = False,
) -> None:
    """Say how an archive stands: done, failed by reason, rate, what is left."""
    from slidescan.archive import archive_status, open_archive
    from slidescan.archive.report import write_report

    now = archive_status(out)
    if write:
        write_report(out, open_archive(out).records.values())
    typer.echo(json.dumps(now.told()) if as_json else "\n".join(now.lines()))


def with_reason(arguments: list[str]) -> list[str]:
    """Give ``--retry-failed`` its value where it has none: Typer knows no option with a value that may be left out."""
    if "--retry-failed" not in arguments:
        return arguments
    from slidescan.archive.record import REASONS

    at = arguments.index("--retry-failed") + 1
    told = at < len(arguments) and arguments[at] in REASONS
    return arguments if told else [*arguments[:at], "", *arguments[at:]]


@contextmanager
def _cluster(scheduler: str | None, queue: Queue | None) -> Iterator[Client | None]:
    """Give a client of the cluster that was asked for; None: of this machine's processes, which the run starts."""
    from slidescan.jobqueue import from_queue
    from slidescan.scheduler import connect

    if scheduler is not None:
        if queue is not None:
            raise ConfigError("--scheduler: expected either it or a section cluster: in the settings, got both")
        with warnings_in_a_line():
            connected = connect(scheduler)
        with connected as client:
            yield client
    elif queue is not None:
        with from_queue(queue, lambda said: typer.echo(said, err=True)) as client:
            yield client
    else:
        yield None


def _shard(shard: str | None) -> tuple[int, int] | None:
    if shard is None:
        return None
    found = re.fullmatch(r"(\d+)/(\d+)", shard)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard must be i/n such as 3/64, i from 1 to n, got {shard!r}")
    return int(found[1]), int(found[2])


def _given(entries: list[Entry], part: tuple[int, int] | None) -> list[Entry]:
    return entries if part is None else entries[part[0] - 1 :: part[1]]


def _estimate(entries: list[Entry], detector: Detector, common: dict[str, Any]) -> None:
    from slidescan.archive.engine import estimate_archive

    total: dict[str, float] = {"bytes": 0, "tissue_mm2": 0, "tiles": 0, "megapixels": 0, "seconds": 0}
    n = bad = 0
    slides = len(_given(entries, common["shard"]))
    with slides_opened() as on_slide:
        for entry, told in estimate_archive(entries, detector, **common):
            n += 1
            if "reason" in told:
                bad += 1
                why = told["message"].removeprefix(f"{entry.slide_id}: ")
                typer.echo(f"{entry.slide_id}: would fail, {told['reason']}: {why}")
            for name in total:
                total[name] += told.get(name) or 0
            on_slide(n, slides)
    if not n:
        typer.echo(f"slides      {slides:,}, all on record: nothing to do; what failed is tried with --retry-failed")
        return
    before = f"{slides - n:,} of {slides:,} need nothing or would fail again; " if n < slides else ""
    typer.echo(f"slides      {before}{n:,} to do, {bad:,} of which would fail; {total['bytes'] / 1e9:,.1f} GB")
    typer.echo(f"tissue      {area(total['tissue_mm2'])}")
    typer.echo(f"plan        {total['tiles']:,.0f} tiles, {total['megapixels']:,.0f} MP")
    typer.echo(f"time        about {duration(total['seconds'])} for one process; shared by all there are")
    if bad:
        raise typer.Exit(1)
