"""The command `review`: look and decide in the browser."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from slidescan.errors import ConfigError, MissingExtraError, SlideError

__all__ = ["review"]


def review(
    run: Annotated[Path, typer.Argument(help="Result directory of a scan, or output directory of an archive.")],
    slides: Annotated[
        str | None,
        typer.Option(
            help="Where the pixels are: the slide; of an archive, its table, folder or pattern. Default: where they "
            "were scanned."
        ),
    ] = None,
    reviewer: Annotated[str | None, typer.Option(help="Who decides; default: your login name.")] = None,
    blinded: Annotated[bool, typer.Option("--blinded", help="Hide scores and the order they tell.")] = False,
    of: Annotated[Literal["regions", "detections"], typer.Option(help="What to decide on.")] = "regions",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on 127.0.0.1; 0: any free one.")] = 0,
    top: Annotated[int | None, typer.Option(min=1, help="Only so many, those with most evidence.")] = None,
) -> None:
    """Review what was found in the browser, on this machine only; Ctrl-C ends it, decisions are beside the result."""
    try:
        from slidescan.reviews.server import ReviewServer
    except ImportError as exc:
        raise MissingExtraError(
            f'review: needs starlette and uvicorn ({exc}); pip install "slidescan[review]"'
        ) from exc
    from slidescan.reviews import review as reviewed
    from slidescan.reviews.desk import Desk
    from slidescan.reviews.start import open_runs
    from slidescan.reviews.summary import notice

    looked = reviewed(open_runs(run), slides=slides, reviewer=reviewer, of=of, blinded=blinded, top=top)
    cases = list(looked.cases.values())
    lost = sum(not case.located for case in cases)
    if len(cases) == 1 and not lost:  # a wrong slide is told now, not with the first picture
        try:
            cases[0].slide()
        except (ConfigError, SlideError):
            if slides is not None:
                raise
            lost = 1  # it is not any more what it was
    server = ReviewServer(Desk(looked), port=port)
    typer.echo(f"{len(looked):,} {of} to review, {looked.left:,} left for {looked.reviewer}; Ctrl-C ends")
    if lost:
        of_all = "" if len(cases) == 1 else f" of {lost:,} of {len(cases):,} slides"
        typer.echo(f"no pixels{of_all} to see: --slides says where they are", err=True)
    if moved := notice(looked):
        typer.echo(moved)
    typer.echo(server.url)
    sys.stdout.flush()
    server.run()
    typer.echo(f"{looked.left:,} left; decisions are in decisions.jsonl beside each result")
