"""Bars of progress for a person at a terminal; machines read what is written."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from slidescan.cli_report import chosen

if TYPE_CHECKING:
    from slidescan.archive import ArchiveProgress
    from slidescan.prepare import Prepared
    from slidescan.scan_slide import Progress
    from slidescan.slides import Slide

__all__ = ["slide_scanned", "slides_done", "slides_opened"]


@contextmanager
def slide_scanned(slide: Slide, title: str) -> Iterator[tuple[Callable[[Prepared], None], Callable[[Progress], None]]]:
    """Show the regions of a scan; give what it calls when it is prepared and after each of them."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("regions  {task.fields[rate]}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=None, rate="")

        def prepared(what: Prepared) -> None:
            frame = slide.frame
            console.print(
                f"{frame.mpp:.4g} µm/px (from {slide.mpp_source}): {chosen(what)}", highlight=False, soft_wrap=True
            )
            if what.tissue is not None and what.tissue.note:
                console.print(f"tissue: {what.tissue.note}", highlight=False, soft_wrap=True)
            bar.update(task, total=len(what.plan.regions))

        def progress(state: Progress) -> None:
            elapsed = bar.tasks[0].elapsed or 0.0
            rate = f"{state.megapixels_done / elapsed:.1f} MP/s" if elapsed else ""
            bar.update(task, completed=state.regions_done, total=state.regions, rate=rate)

        yield prepared, progress


@contextmanager
def slides_opened() -> Iterator[Callable[[int, int], None]]:
    """Show how many slides were looked at; give what is called with their number and the number of all."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    with Bar(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("slides", total=None)
        yield lambda n, slides: bar.update(task, completed=n, total=slides)


@contextmanager
def slides_done() -> Iterator[Callable[[ArchiveProgress], None]]:
    """Show the slides of an archive; say what failed to everybody."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    columns = (TextColumn("slides"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    with Bar(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)

        def on_slide(now: ArchiveProgress) -> None:
            record = now.record
            if record.reason is not None and record.reason != "no_tissue":
                why = record.message.removeprefix(f"{record.slide_id}: ")
                told = f"{record.slide_id}: {record.state}, {record.reason}: {why}"
                console.print(told, markup=False, highlight=False, soft_wrap=True)
            rate = f"{now.megapixels / now.seconds:.1f} MP/s" if now.seconds else ""
            failed = f"{now.failed:,} failed  " if now.failed else ""
            bar.update(task, completed=now.done + now.failed, total=now.slides, description=failed + rate)

        yield on_slide
