"""The commands `train` and `evaluate`: parse, call, say what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slidescan.errors import ConfigError

__all__ = ["evaluate", "train"]


def train(
    config: Annotated[Path, typer.Argument(help="YAML with settings; see configs/train_mitosis.yaml.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Directory of the run; default: runs/<name>[-smoke].")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="COCO directory, or slides with QuPath GeoJSON; default: the settings' own.")
    ] = None,
    mine: Annotated[
        list[Path] | None,
        typer.Option(help="Slide taken to be free of objects: what is found there is unlearned; repeatable."),
    ] = None,
    mine_mpp: Annotated[float | None, typer.Option(help="µm/px of the slides to mine, overriding their own.")] = None,
    add_decisions: Annotated[
        Path | None,
        typer.Option(help="Result directory that was reviewed, or an archive's: what was decided there is learned."),
    ] = None,
    slides: Annotated[
        str | None,
        typer.Option(
            help="Where the pixels of --add-decisions are: the slide; of an archive its list. Default: where they were "
            "scanned, as in review."
        ),
    ] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda:0, …; default: a GPU if there is one.")] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few steps of a tiny network, to see that all fits.")
    ] = False,
) -> None:
    """Train a detector; run it again to continue after a stop. `scan --model` takes the directory."""
    from slidescan.slides import open_slide
    from slidescan.train.run import train_detector
    from slidescan.train.settings import load_settings

    settings = load_settings(config)
    given = {"data": data, "device": device, "decisions": add_decisions, "decision_slides": slides}
    settings = settings.model_copy(update={key: value for key, value in given.items() if value is not None})
    if settings.decisions is None and settings.decision_slides is not None:
        raise ConfigError("--slides: expected --add-decisions with it, whose pixels these are, got none; add it")
    mined = [open_slide(path, mpp=mine_mpp) for path in mine or []]
    for slide in mined:
        if slide.mpp is None:
            raise ConfigError(f"--mine: expected a slide whose µm/px is known, got {slide.path.name}; give --mine-mpp")
    if smoke:
        settings = settings.smoke()
    out = out or Path("runs") / (f"{settings.name}-smoke" if smoke else settings.name)
    train_detector(settings, out, typer.echo, mine_slides=mined)
    typer.echo(f"model       {out}; use it with --model {out}")


def evaluate(
    model: Annotated[str, typer.Argument(help="A bundled name or a directory, such as that of a training run.")],
    data: Annotated[Path, typer.Option(help="COCO directory, or slides with QuPath GeoJSON, or midog21's parent.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Takes <µm/px>/metrics.json and pictures.")] = Path(
        "evaluation"
    ),
    images: Annotated[int, typer.Option(min=2, help="Images of each kind that is composed from crops.")] = 96,
    shifts: Annotated[int, typer.Option(min=0, help="Shifted grids to compare detections on; 0 leaves it out.")] = 8,
    mpp: Annotated[
        float | None,
        typer.Option(
            help="µm/px of the slides, overriding their own, and of pictures that do not say theirs; default of these: "
            "as in training, else the detector's, if it has one.",
        ),
    ] = None,
) -> None:
    """Measure a detector on annotated data that it was not trained on: metrics, curves, and the worst mistakes."""
    from slidescan.commit import made
    from slidescan.detect import load_detector
    from slidescan.detect.model import Family
    from slidescan.slides.resolution import override
    from slidescan.train.annotated import seen_by, seen_in
    from slidescan.train.evaluate import describe
    from slidescan.train.evaluate import evaluate as measure
    from slidescan.train.run import open_test

    if not data.exists():
        raise ConfigError(f"--data: expected a directory of annotated data, found nothing at {data}")
    if mpp is not None:
        override(mpp)
    made(out)
    detector = load_detector(model)
    variants = detector.variants if isinstance(detector, Family) else (detector,)
    for variant in variants:
        directory = out / f"{variant.mpp:g}"
        source = open_test(data, variant, images, mpp, variant.mpp if len(variants) == 1 else None)
        known = seen_by(variant.training)
        seen = known & seen_in(source.annotated("test")) if known else ()
        test, assembled = source.shown("test"), source.assembled("test")
        report = measure(variant, test, directory, assembled=assembled, shifts=shifts, seen=len(seen))
        for line in describe(report):
            typer.echo(line)
        names = ("metrics.json", "pr.png", "froc.png", "reliability.png", "worst.png")
        typer.echo(f"written     {directory}: {', '.join(name for name in names if (directory / name).is_file())}")
