"""What the command line says of a scan: what it will do, what came of it, where its time went."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from slidescan.prepare import Prepared
    from slidescan.result import ScanResult

__all__ = ["area", "chosen", "duration", "n_of", "report", "say_profile", "seconds_of", "warnings_in_a_line"]


def chosen(prepared: Prepared) -> str:
    """Say which variant of the detector reads what."""
    detector, plane = prepared.detector, prepared.plane
    exact = math.isclose(plane.mpp, detector.mpp, rel_tol=1e-9)
    how = f"at {plane.mpp:.4g} µm/px" if exact else f"on the slide's own {plane.mpp:.4g} µm/px, without resampling"
    return f"{detector.name}, trained at {detector.mpp:g} µm/px, reads {how}"


def area(mm2: float) -> str:
    """Say an area, small ones in two digits."""
    return f"{mm2:,.1f} mm²" if mm2 >= 1 or not mm2 else f"{mm2:.2g} mm²"


def n_of(n: int, what: str) -> str:
    """Say how many of something there are."""
    return f"{n:,} {what}{'' if n == 1 else 's'}"


def duration(seconds: float) -> str:
    """Say a duration as a person would."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = seconds / 60
    return f"{minutes:.0f} min" if minutes < 90 else f"{minutes / 60:.1f} h"


def report(result: ScanResult) -> None:
    """Say what was found and where it is."""
    from slidescan.legend import area_text, counted, share_text

    summary = result.summary()
    found = counted(summary["found"], result.classes, result.threshold)
    typer.echo(f"found       {found}, in {n_of(summary['flagged_regions'], 'flagged region')}")
    if result.hotspot is not None:
        typer.echo(f"hotspot     {result.hotspot.count} in {area_text(result.hotspot.area_mm2)}")
    if summary["analysed_fraction"] is None:
        typer.echo("looked at   nothing: no tissue was found on this slide")
    else:
        unread = result.provenance["tiles"]["read_failed_boxes"]
        but = f"; {n_of(unread, 'part')} of the slide could not be read" if unread else ""
        seen = share_text(result.anomaly.analysed_fraction, 2)
        typer.echo(f"looked at   {seen} of {area(summary['tissue_mm2'])} of tissue{but}")
    saturated = result.provenance["tiles"]["saturated"]
    if saturated:
        typer.echo(f"saturated   {n_of(saturated, 'tile')}, with more than the detector can report: counts are too low")
    crashed = result.provenance["tiles"].get("crashed_regions", 0)
    if crashed:
        typer.echo(f"crashed     the reader, on {n_of(crashed, 'region')}; that counts as tissue not analysed")
    typer.echo(f"result      {result.path}")
    typer.echo(f"overview    {result.path / 'overview.png' if result.path else ''}")


def say_profile(result: ScanResult) -> None:
    """Say where the time went."""
    from slidescan.stages import Profile

    told = {"threads": 0, "scoring": 0, **result.provenance.get("profile", {})}
    typer.echo("\n".join(Profile(**told).lines()))
    typer.echo("seconds     " + seconds_of(result))


@contextmanager
def warnings_in_a_line() -> Iterator[None]:
    """Say what is warned of on stderr, a line each, once the block is done."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always", UserWarning)
        try:
            yield
        finally:
            for warning in said:
                typer.echo(f"slidescan: {warning.message}", err=True)


def seconds_of(result: ScanResult) -> str:
    """Return the wall seconds of a scan's parts on a line."""
    return "   ".join(f"{name} {value:.1f}" for name, value in result.provenance["seconds"].items())
