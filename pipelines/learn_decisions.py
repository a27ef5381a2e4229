"""Measure what reviewers' decisions teach: a detector before and after it was trained on with them, on other slides.

python pipelines/learn_decisions.py             four phantoms decided on, four to measure on; --steps, --model
python pipelines/learn_decisions.py --smoke     one small one of each, for tests; the numbers mean nothing

Phantoms are scanned, and each detection is accepted or rejected by where figures were planted, as a reviewer without
mistakes would. Decisions are all that teaches. The operating threshold of either detector is the best one on two
phantoms of their own, so that a better choice of threshold is not taken for learning. A phantom is not tissue: what
comes of a review of real slides has to be measured on real slides.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path

import slidescan as ss
from slidescan.detect import load_detector
from slidescan.detect.model import Model
from slidescan.endings import ends_in_a_line
from slidescan.export.features import Feature
from slidescan.export.geojson import write_geojson
from slidescan.phantom import Phantom, write_phantom
from slidescan.train import metrics
from slidescan.train.own import ShownSlide, load_annotated
from slidescan.train.run import train_detector
from slidescan.train.settings import TrainSettings, VariantSettings

_MPP = 0.25
_SLIDES, _SIZE_PX = 4, 4096  # 1 mm² each
# Seeds of the phantoms decided on, measured on, and to choose thresholds by; the bundled detector saw 9000 to 9011.
_DECIDED, _MEASURED, _CHOSEN = 100, 200, 300
_FIGURES, _LOOK_ALIKES = 40, 160  # a mm²: a proliferating tumour, with four times as much that misleads


def phantom(seed: int, size_px: int) -> Phantom:
    """Return a phantom with as many figures and look-alikes as its area asks for."""
    area_mm2 = (size_px * _MPP * 1e-3) ** 2
    figures, look_alikes = (max(2, round(n * area_mm2)) for n in (_FIGURES, _LOOK_ALIKES))
    return Phantom((size_px, size_px), mpp=_MPP, seed=seed, n_figures=figures, n_look_alikes=look_alikes, tissue=0.9)


def write(folder: Path, seed: int, n: int, size_px: int, classes: Sequence[str]) -> dict[str, Phantom]:
    """Write `n` phantoms with their truth as GeoJSON; return them by slide id."""
    folder.mkdir()
    made = {f"phantom-{seed + i}": phantom(seed + i, size_px) for i in range(n)}
    for name, slide in made.items():
        write_phantom(folder / f"{name}.svs", slide)
        boxes = (tuple(row) for row in slide.truth.xyxy.tolist())
        write_geojson(folder / f"{name}.geojson", (Feature("annotation", box, classes[0]) for box in boxes))
    return made


def decide(runs: Path, phantoms: dict[str, Phantom]) -> None:
    """Accept each detection that is a planted figure, and reject the others."""
    looked = ss.review(ss.open_archive(runs), reviewer="truth", of="detections")
    for name, slide in phantoms.items():
        result = ss.open_archive(runs).result(name)
        pairs = metrics.match(result.found.centers, slide.truth.centers, slide.frame.px(metrics.RADIUS_UM))
        ids = [id_ for id_, score in zip(result.ids, result.detections.score, strict=True) if score >= result.threshold]
        right = {ids[row] for row in pairs[:, 0].tolist()}
        for id_ in ids:
            looked.decide(id_, "accept" if id_ in right else "reject")


def measured(name: str, model: Model, chosen: Sequence[ShownSlide], slides: Sequence[ShownSlide]) -> str:
    """Return a row: what a detector finds at the threshold that is best on other slides."""
    threshold = metrics.best_threshold([slide.find(model) for slide in chosen])
    images = [slide.find(model) for slide in slides]
    at, precision = metrics.score(images, threshold), metrics.average_precision(images)
    return f"{name} | {threshold:.2f} | {at.precision:.3f} | {at.recall:.3f} | {at.f1:.3f} | {precision:.3f}"


def main() -> None:
    """Scan, decide, train, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="mitosis")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--smoke", action="store_true", help="one small phantom of each, for tests")
    arguments = parser.parse_args()
    n, size_px = (1, 1024) if arguments.smoke else (_SLIDES, _SIZE_PX)
    before = load_detector(arguments.model).at(_MPP)
    assert isinstance(before, Model)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        phantoms = write(root / "decided", _DECIDED, n, size_px, before.classes)
        write(root / "measured", _MEASURED, n, size_px, before.classes)
        write(root / "chosen", _CHOSEN, 2, size_px, before.classes)
        ss.scan_archive(str(root / "decided" / "*.svs"), before, out=root / "runs", workers=1)
        decide(root / "runs", phantoms)
        variant = VariantSettings(
            mpp=_MPP,
            input_px=before.input_px,
            tile_px=[256, 384],
            steps=2 if arguments.smoke else arguments.steps,
            lr=1e-4,
            start=arguments.model,
        )
        settings = TrainSettings(
            data=root / "chosen",  # calibrated on one of the two; nothing of the other is trained on
            validation_share=0.5,
            decisions=root / "runs",
            decision_slides=str(root / "decided" / "*.svs"),
            share_decided=1.0,
            classes=list(before.classes),
            attributes=list(before.attributes),
            variants=[variant],
            shifts=0,  # what decisions teach has nothing to do with the grid
        )
        if arguments.smoke:
            settings = settings.model_copy(update={"batch_mpx": 0.07})
        train_detector(settings, root / "model", print)
        after = load_detector(root / "model").at(_MPP)
        assert isinstance(after, Model)
        chosen, slides = (
            [ShownSlide(one, "slides") for one in load_annotated(root / name, settings, _MPP)]
            for name in ("chosen", "measured")
        )
        print("detector | threshold | precision | recall | F1 | average precision\n-|-|-|-|-|-")
        for name, model in (("before", before), ("after", after)):
            print(measured(name, model, chosen, slides), flush=True)


if __name__ == "__main__":  # the workers are processes that import this file
    with ends_in_a_line("learn_decisions"):
        main()
