"""What a detector is worth: numbers with their uncertainty, curves, and a page of its worst mistakes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray

from slidescan.detect.model import Model
from slidescan.detections import Detector
from slidescan.errors import ConfigError
from slidescan.slides import open_slide
from slidescan.train import metrics
from slidescan.train.agreement import Agreement, grid_shift_agreement
from slidescan.train.augment import Rgb
from slidescan.train.intervals import summary
from slidescan.train.report import draw_curves, draw_worst
from slidescan.train.source import Shown

__all__ = ["balanced_accuracy", "best_cut", "describe", "evaluate", "find_all"]


def evaluate(
    detector: Model,
    shown: Iterable[Shown],
    out: Path | None = None,
    *,
    assembled: Iterable[Rgb] = (),
    shifts: int = 8,
    rounds: int = 1000,
    seen: int = 0,
) -> dict[str, Any]:
    """Measure a detector at its own threshold.

    Parameters
    ----------
    detector : Model
    shown : iterable of Shown
        What to measure on; never what it was trained on or its threshold chosen by.
    out : Path, optional
        Directory for ``metrics.json``, ``pr.png``, ``froc.png``, ``reliability.png`` and ``worst.png``.
    assembled : iterable of ndarray of uint8, shape (H, W, 3)
        Larger images at the detector's µm/px for the agreement of shifted grids.
    shifts : int
        Grids to compare on each of them.
    rounds : int
        Of the bootstrap over patients.
    seen : int
        How many of the images it was trained on or chosen by, to be told with the numbers.

    Returns
    -------
    dict
        ``threshold``, ``found_within_um``, and for each kind of image what `slidescan.train.intervals.summary` says. Of
        covered figures only the share at which something was found all the same; of images without figures only false
        detections.

    Raises
    ------
    ConfigError
        If there is nothing to measure on.
    """
    kinds, images = find_all(detector, shown)
    if not kinds:
        raise ConfigError("evaluate: expected images to measure on, got none; is there a test split in --data?")
    one = next(iter(images.values()))[0]
    report: dict[str, Any] = {"model": detector.name, "mpp": detector.mpp, "threshold": detector.threshold}
    report["found_within_um"] = round(one.radius * one.mpp, 3)
    if seen:
        report["seen"] = seen
    for kind, found in images.items():
        row = summary(found, detector.threshold, rounds=rounds, classes=detector.classes)
        if kind.startswith("covered"):  # what is found there is no figure, and so neither typical nor not
            report[kind] = {"covers": row["figures"], "found": row["recall"]}
            continue
        if not row["figures"]:
            row = {key: row[key] for key in ("mm2", "false_per_mm2")}
        for column, name in enumerate(detector.attributes):
            accuracy = balanced_accuracy(found, detector.threshold, column, detector.attribute_cuts[column])
            if accuracy is not None:
                row[f"{name}_balanced_accuracy"], row[f"{name}_judged"] = accuracy
        report[kind] = row
    agreements = [_agreement(image, detector, shifts) for image in assembled] if shifts else []
    if agreements:
        compared, same = (sum(getattr(one, key) for one in agreements) for key in ("compared", "same"))
        report["grid_shift"] = {"compared": compared, "same": same, "share": None}
        if compared:
            report["grid_shift"]["share"] = round(same / compared, 4)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / "metrics.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        with_figures = {kind: found for kind, found in images.items() if "f1" in report[kind]}
        draw_curves(with_figures, detector.threshold, out)
        worst = next(iter(with_figures), None)
        (out / "worst.png").unlink(missing_ok=True)  # of a measurement before
        if worst is not None:
            draw_worst([one.patch for one in kinds[worst]], images[worst], detector.threshold, out / "worst.png")
    return report


def describe(report: dict[str, Any]) -> list[str]:
    """Say a report in a few lines."""
    lines = [f"{report['model']} at score ≥ {report['threshold']:g}"]
    if seen := report.get("seen"):
        lines.append(f"beware      trained on, or chosen by, {seen} of these images: on others it is worse")
    for kind, row in report.items():
        if not isinstance(row, dict):
            continue
        if "f1" in row:
            low_high = row["intervals_95"]["f1"]
            sure = f" [{low_high[0]:.3f}, {low_high[1]:.3f}]" if low_high else ""
            level = next(key for key in row if key.startswith("recall_at"))
            lines.append(
                f"{kind:<12}F1 {row['f1']:.3f}{sure}   precision {row['precision']:.3f}   recall {row['recall']:.3f}   "
                f"AP {row['ap']:.3f}   {level.replace('_', ' ')} {row[level]:.3f}   "
                f"{row['false_per_mm2'] or 0:.1f} false per mm²   calibration error {row['ece']:.3f}   "
                f"{row['figures']} objects"
                + (f" of {row['patients']} patient{'s' * (row['patients'] > 1)}" if row["patients"] else "")
            )
            lines += [
                f"  {name:<18}F1 {each['f1']:.3f}   precision {each['precision']:.3f}   recall {each['recall']:.3f}   "
                f"AP {each['ap']:.3f}   {each['figures']} objects"
                for name, each in row.get("classes", {}).items()
            ]
        elif "found" in row:
            lines.append(f"{kind}: {row['found']:.1%} of {row['covers']} covers taken for an object")
        elif "share" in row:
            of = "" if row["share"] is None else f"{row['share']:.1%} of {row['compared']} detections repeated"
            lines.append(f"grid shift  {of or 'nothing was found to compare'}")
        else:
            lines.append(f"{kind:<12}{row['false_per_mm2'] or 0:.1f} false per mm² on {row['mm2']:.1f} mm²")
        lines += [
            f"{kind:<12}{key.removesuffix('_balanced_accuracy')}: balanced accuracy {value:.3f}"
            for key, value in row.items()
            if key.endswith("_balanced_accuracy")
        ]
    return lines


def _agreement(image: Rgb, detector: Model, shifts: int) -> Agreement:
    """Compare shifted grids on an image, as a file: pixels in memory would travel with every task."""
    with TemporaryDirectory(prefix="slidescan-") as scratch:
        path = Path(scratch) / "assembled.tiff"
        tifffile.imwrite(path, image, tile=(512, 512), photometric="rgb")
        with open_slide(path, mpp=detector.mpp) as slide:
            return grid_shift_agreement(slide, detector, shifts=shifts)


def find_all(
    detector: Detector, shown: Iterable[Shown]
) -> tuple[dict[str, list[Shown]], dict[str, list[metrics.Image]]]:
    """Run the detector over images; return them, and what was found in them, by kind."""
    kinds: dict[str, list[Shown]] = {}
    images: dict[str, list[metrics.Image]] = {}
    for one in shown:
        kinds.setdefault(one.kind, []).append(one)
        images.setdefault(one.kind, []).append(one.find(detector))
    return kinds, images


def balanced_accuracy(
    images: Sequence[metrics.Image], threshold: float, column: int, cut: float = 0.5
) -> tuple[float, int] | None:
    """Return the mean of sensitivity and specificity of an attribute on the figures that were found, and their number.

    None where not both answers occur.
    """
    said, true = _answers(images, threshold, column)
    if not (0 < true.sum() < len(true)):
        return None
    yes = said >= cut
    return round(float((yes[true].mean() + (~yes[~true]).mean()) / 2), 4), len(true)


def best_cut(images: Sequence[metrics.Image], threshold: float, column: int) -> float:
    """Return the probability from which on an attribute is best said, by balanced accuracy; 0.5 if none can be told."""
    said, true = _answers(images, threshold, column)
    if not (0 < true.sum() < len(true)):
        return 0.5
    cuts = np.arange(2, 99) / 100
    values = [((said[true] >= cut).mean() + (said[~true] < cut).mean()) / 2 for cut in cuts]
    best = cuts[np.isclose(values, max(values))]
    return float(best[len(best) // 2])


def _answers(
    images: Sequence[metrics.Image], threshold: float, column: int
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return what was said and what is true of the figures that were found and judged by experts."""
    said, true = [np.empty(0)], [np.empty(0)]
    for image in images:
        if image.attributes is None or image.attributes.shape[1] <= column:
            continue
        kept = image.found.score >= threshold
        pairs = metrics.match(image.found_xyc[kept], image.truth_xyc, image.radius)
        if not len(pairs):  # without detections there is no column either
            continue
        said.append(image.found[kept].attributes[pairs[:, 0], column].astype(np.float64))
        true.append(image.attributes[pairs[:, 1], column])
    answers, truth = np.concatenate(said), np.concatenate(true)
    known = ~np.isnan(truth)
    return answers[known], truth[known] > 0.5
