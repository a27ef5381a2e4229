"""The commands `export` and `validate`: a result for other programs, and whether QuPath reads a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from slidescan.cli_report import n_of
from slidescan.errors import ConfigError

__all__ = ["export", "validate"]


def export(
    run: Annotated[Path, typer.Argument(help="Result directory of a scan.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    format_: Annotated[
        Literal["geojson", "csv"] | None, typer.Option("--format", "-f", help="Of the file; default: as its name ends.")
    ] = None,
    origin: Annotated[
        Literal["qupath", "level0"] | None,
        typer.Option(help="Frame of the coordinates; default: of GeoJSON QuPath's, of CSV level 0."),
    ] = None,
    what: Annotated[Literal["all", "detections", "regions"], typer.Option(help="GeoJSON objects.")] = "all",
    min_score: Annotated[
        float | None, typer.Option(help="Lowest score of detections; default: the operating threshold.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=1, help="At most so many, best first.")] = None,
    decisions: Annotated[
        str | None,
        typer.Option(
            help="Only what was decided so: accepted, rejected or unsure regions and the detections in them; where "
            "reviewers differ, the later decision counts."
        ),
    ] = None,
    reviewer: Annotated[str | None, typer.Option(help="With --decisions: count only this reviewer's.")] = None,
) -> None:
    """Write a result for QuPath or a spreadsheet."""
    from slidescan.saved import load_result

    result = load_result(run)
    if reviewer is not None and decisions is None:
        raise ConfigError(f"--reviewer goes with --decisions, got {reviewer!r} alone")
    only, named = None, None
    if decisions is not None:
        from slidescan.reviews import decided

        only = decided(result, decisions, reviewer=reviewer)
        named = {id_: label for id_, label in only.items() if label is not None}
    is_csv = format_ == "csv" or (format_ is None and out.suffix.lower() == ".csv")
    if is_csv and what == "regions":
        raise ConfigError("--what regions: expected GeoJSON, which has regions, got CSV, which has detections only")
    if is_csv:
        n = result.to_csv(out, origin=origin or "level0", min_score=min_score, top_k=top_k, only=only, named=named)
    else:
        origin = origin or "qupath"
        n = result.to_geojson(out, origin=origin, min_score=min_score, top_k=top_k, what=what, only=only, named=named)
    typer.echo(f"{out}: {n_of(n, 'object')}")


def validate(path: Annotated[Path, typer.Argument(help="GeoJSON file, plain, .gz or .zip.")]) -> None:
    """Check a GeoJSON file against what QuPath 0.5–0.8 reads, and name each line that breaks."""
    from slidescan.export import inspect_geojson

    told = inspect_geojson(path)
    for problem in told.problems:
        typer.echo(f"{path}:{problem.line}: {problem.severity}: {problem.message} [{problem.rule}]")
    if not told.is_importable:
        raise typer.Exit(1)
    counts = {kind: sum(classes.values()) for kind, classes in told.summary.items()}
    objects = ", ".join(n_of(n, kind) for kind, n in counts.items()) or "there is no object in it"
    typer.echo(f"{path}: QuPath reads it: {objects}" + ("; see the warnings" if told.problems else ""))
