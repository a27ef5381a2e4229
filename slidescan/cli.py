"""The command line: parse, call, say what came of it. Heavy imports wait until a command needs them.

Exit codes: 0 done; others as in `slidescan.endings.ends_in_a_line`.
"""

from __future__ import annotations

import io
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from slidescan import cli_archive, cli_export, cli_review, cli_train
from slidescan.cli_archive import with_reason
from slidescan.cli_options import ModelMppOpt, PrecisionOpt, assigned, detector_of
from slidescan.cli_progress import slide_scanned
from slidescan.cli_report import area, chosen, duration, n_of, report, say_profile, seconds_of, warnings_in_a_line
from slidescan.endings import ends_at_once, ends_in_a_line, heeded_signals
from slidescan.errors import ConfigError

if TYPE_CHECKING:
    from slidescan.config import ScanConfig
    from slidescan.detections import Detector
    from slidescan.result import ScanResult
    from slidescan.slides import Slide
    from slidescan.slides.open import Backend

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="slidescan",
    help="Finds what matters on gigapixel pathology slides. Research use only; not a diagnostic device.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_GO_ON = ("scan", "archive", "train")  # commands that continue where they were stopped

SlideArg = Annotated[str, typer.Argument(help="Whole-slide image: SVS, OME-TIFF, NDPI, DICOM, OME-Zarr, …; or a URL.")]
MppOpt = Annotated[float | None, typer.Option(help="µm/px of level 0, overriding the file's own.")]
ModelOpt = Annotated[
    str, typer.Option("--model", "-m", help="Detector: `mitosis`, a directory, a Hugging Face id, or ultralytics:DIR.")
]
ConfigOpt = Annotated[Path | None, typer.Option("--config", "-c", help="YAML with settings; see configs/default.yaml.")]
SetOpt = Annotated[list[str] | None, typer.Option("--set", help="One setting, as section.key=value; repeatable.")]
CoarseOpt = Annotated[bool, typer.Option("--allow-coarse", help="Scan a slide coarser than the detector's training.")]
BackendOpt = Annotated[Literal["auto", "tiff", "openslide", "zarr"], typer.Option(help="Reader.")]
VerifyOpt = Annotated[
    bool, typer.Option("--verify", help="Compare a few tiles with OpenSlide first, and let it read where they differ.")
]


def main() -> None:
    """Run the command line; a foreseen failure is one line on stderr."""
    for stream in (sys.stdout, sys.stderr):  # of a file whose name is no text, say
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    kept = "stopped; what was done is kept: run the same command to continue"
    goes_on = sys.argv[1:2] and sys.argv[1] in _GO_ON and "--dry-run" not in sys.argv
    with ends_in_a_line("slidescan", kept if goes_on else "stopped"), heeded_signals() if goes_on else nullcontext():
        try:
            # Typer returns the code of a command that ended by `Exit`, and 130 for Ctrl-C.
            code = app(with_reason(sys.argv[1:]), standalone_mode=False)
        except typer.Abort:
            code = 130
        except BrokenPipeError:
            code = 0
        except Exception as exc:
            # Typer raises Click's own usage errors through here; anything else is a bug and keeps its traceback.
            if not hasattr(exc, "exit_code") or not hasattr(exc, "format_message"):
                raise
            raise ConfigError(exc.format_message().replace("Value error, ", "")) from exc
        if code == 130:
            raise KeyboardInterrupt
    sys.exit(code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        from slidescan import __version__

        typer.echo(f"slidescan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    """Find what matters on gigapixel pathology slides. Research use only; not a diagnostic device."""


@app.command()
def info(
    slide: SlideArg,
    mpp: MppOpt = None,
    model: ModelOpt = "mitosis",
    model_mpp: ModelMppOpt = None,
    precision: PrecisionOpt = "auto",
    config: ConfigOpt = None,
    set_: SetOpt = None,
    allow_coarse: CoarseOpt = False,
    backend: BackendOpt = "auto",
    verify: VerifyOpt = False,
) -> None:
    """Say what a slide is, and what a scan of it would do and take."""
    settings = _settings(config, set_)
    opened = _open(slide, mpp, backend, verify)
    width, height = opened.size_wh
    typer.echo(f"{opened.name}: {width:,} × {height:,} px, {width * height / 1e6:,.0f} MP, read by {opened.backend}")
    levels = ", ".join(f"{level.size_wh[0]}×{level.size_wh[1]}" for level in opened.levels)
    typer.echo(f"levels      {len(opened.levels)}: {levels}")
    frame = opened.frame
    extent = f"{width * frame.mpp / 1000:.2f} × {height * frame.mpp / 1000:.2f} mm"
    typer.echo(f"resolution  {frame.mpp:.4g} µm/px (from {opened.mpp_source}); {extent}")

    from slidescan.prepare import estimate_s, prepare

    prepared = prepare(opened, detector_of(model, precision, model_mpp), settings, allow_coarse=allow_coarse)
    typer.echo(f"detector    {chosen(prepared)}")
    if prepared.tissue is not None:
        note = f"; {prepared.tissue.note}" if prepared.tissue.note else ""
        tissue_mm2 = prepared.tissue.fraction * frame.area_mm2
        typer.echo(f"tissue      {prepared.tissue.fraction:.1%} of the slide, {area(tissue_mm2)}{note}")
    plan = prepared.plan
    cut = f"{n_of(plan.n_tiles, 'tile')} in {n_of(len(plan.regions), 'region')}"
    typer.echo(f"plan        {cut}, {plan.core_megapixels:,.0f} MP")
    if plan.n_tiles:
        typer.echo(f"time        about {duration(estimate_s(opened, prepared, settings))} on this machine")


@app.command()
def scan(
    slide: SlideArg,
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory that will hold <slide id>/.")] = Path("runs"),
    mpp: MppOpt = None,
    model: ModelOpt = "mitosis",
    model_mpp: ModelMppOpt = None,
    precision: PrecisionOpt = "auto",
    config: ConfigOpt = None,
    set_: SetOpt = None,
    slide_id: Annotated[str | None, typer.Option(help="Name in outputs, instead of the file's own.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Regions in flight; the result is the same.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a running Dask scheduler.")] = None,
    allow_coarse: CoarseOpt = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace another scan's result.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="Say where the time of the regions went.")] = False,
    backend: BackendOpt = "auto",
    verify: VerifyOpt = False,
) -> None:
    """Scan one slide; run it again to continue after a stop."""
    settings = _settings(config, set_)
    opened = _open(slide, mpp, backend, verify)
    name = opened.name if slide_id is None else slide_id
    if not name.strip(". ") or any(char in name for char in "/\\") or not name.isprintable():
        said = "its file's, which needs --slide-id" if slide_id is None else f"{name!r}; give another"
        raise ConfigError(f"--slide-id: expected a plain name for the result, got {said}")
    result = _scan(
        opened,
        detector_of(model, precision, model_mpp),
        out / name,
        settings,
        title=slide_id,
        workers=workers,
        scheduler=scheduler,
        allow_coarse=allow_coarse,
        overwrite=overwrite,
    )
    report(result)
    if profile:
        say_profile(result)


app.command()(cli_export.export)
app.command()(cli_export.validate)


@app.command()
def detect(
    image: Annotated[Path, typer.Argument(help="A picture: PNG or JPEG (RGB, to 67 MP), or a slide.")],
    model: ModelOpt = "mitosis",
    precision: PrecisionOpt = "auto",
    min_score: Annotated[float | None, typer.Option(help="Lowest score; default: the operating threshold.")] = None,
    tile_px: Annotated[
        int | None, typer.Option(help="Edge of a tile, twice the largest object; a picture no larger is scored whole.")
    ] = None,
    mpp: Annotated[
        float | None, typer.Option(help="µm/px of the picture; default: its own, of a PNG or JPEG the model's.")
    ] = None,
    allow_coarse: CoarseOpt = False,
) -> None:
    """Detect on one picture of any size with any object-detection model of transformers; print boxes and scores."""
    from slidescan.detect import load_detector
    from slidescan.picture import detect_image

    detector = load_detector(model, precision=precision, mpp="px")  # where the model names no µm/px
    with warnings_in_a_line():
        found = detect_image(image, detector, min_score=min_score, tile_px=tile_px, mpp=mpp, allow_coarse=allow_coarse)
    columns = (found.xyxy.tolist(), found.score.tolist(), found.label.tolist(), found.attributes.tolist())
    for box, score, label, said in zip(*columns, strict=True):
        corners = ", ".join(f"{edge:.1f}" for edge in box)
        more = "".join(f", {name} {share:.2f}" for name, share in zip(detector.attributes, said, strict=True))
        typer.echo(f"{detector.classes[label]}: {score:.3f} at [{corners}]{more}")
    least = "the operating threshold" if min_score is None else f"{min_score:g}"
    typer.echo(f"{len(found)} found with a score of at least {least}", err=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Directory for the slide and the result.")] = Path("demo"),
    size_px: Annotated[int, typer.Option(min=2048, help="Edge of the phantom slide, px.")] = 12288,
    seed: Annotated[int, typer.Option(min=0, help="Another seed is another slide.")] = 0,
    workers: Annotated[int | None, typer.Option(min=1, help="Regions in flight.")] = None,
) -> None:
    """Write a phantom slide with known mitotic figures, scan it, and compare."""
    from slidescan.demo import compare, seam_phantom, write

    settings = _settings(None, None)
    detector = detector_of("mitosis")
    phantom = seam_phantom(detector, settings, size_px=size_px, seed=seed)
    path = out / f"phantom-{seed}.tiff"
    seconds = write(path, phantom)
    typer.echo(f"{path}: {size_px:,} × {size_px:,} px, {len(phantom.truth)} figures planted, {seconds:.1f} s to write")
    opened = _open(path, None, "auto")
    result = _scan(opened, detector, out / opened.name, settings, workers=workers, overwrite=True)
    outcome = compare(result, phantom)
    typer.echo(f"planted {outcome.planted}   found {outcome.found}   extra {outcome.extra}")
    typer.echo(f"on tile and region seams: planted {outcome.planted_on_seams}   found {outcome.found_on_seams}")
    typer.echo("seconds     " + seconds_of(result))
    report(result)


app.command()(cli_archive.archive)
app.command()(cli_archive.status)
app.command()(cli_review.review)
app.command()(cli_train.train)
app.command()(cli_train.evaluate)


def _settings(config: Path | None, assignments: list[str] | None) -> ScanConfig:
    """Return the settings of a file (or the defaults) under `--set` overrides."""
    from slidescan.config import ScanConfig

    return ScanConfig.load(config or {}, assigned(assignments or []))


def _open(path: str | Path, mpp: float | None, backend: Backend, verify: bool = False) -> Slide:
    """Open the slide as the options say."""
    from slidescan.slides import open_slide

    with warnings_in_a_line():
        return open_slide(path, mpp=mpp, backend=backend, verify=verify)


def _scan(
    opened: Slide,
    detector: Detector,
    out: Path,
    settings: ScanConfig,
    *,
    title: str | None = None,
    workers: int | None = None,
    scheduler: str | None = None,
    allow_coarse: bool = False,
    overwrite: bool = False,
) -> ScanResult:
    """Scan with a progress bar on stderr."""
    from slidescan.scan_slide import scan as scan_slide
    from slidescan.scheduler import connect

    with warnings_in_a_line():
        client = connect(scheduler) if scheduler else None
    with slide_scanned(opened, title or opened.name) as (prepared, progress):
        try:
            return scan_slide(
                opened,
                detector,
                out=out,
                config=settings,
                client=client,
                workers=workers,
                allow_coarse=allow_coarse,
                overwrite=overwrite,
                title=title,
                on_progress=progress,
                on_prepared=prepared,
            )
        finally:
            if client is not None:
                client.close()


def run() -> None:
    """Run the command line as a program."""
    ends_at_once(main)


if __name__ == "__main__":
    run()
