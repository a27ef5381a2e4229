"""Hard negatives: what a detector finds where nothing is.

The slides are assumed free of objects, on the user's word; every detection from half the threshold on is a false alarm,
and a window around it is kept, the highest scored first.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image as Picture

from slidescan.commit import commit
from slidescan.config import ScanConfig
from slidescan.detections import Detector
from slidescan.errors import ConfigError
from slidescan.scan_slide import scan
from slidescan.slides import Slide
from slidescan.train.annotated import Annotated
from slidescan.train.augment import Rgb
from slidescan.train.patients import Whose, patient_of
from slidescan.train.source import Source, Split

__all__ = ["mine", "refuse_annotated", "refuse_others"]

_WINDOW_PX = 128  # at the detector's µm/px: what decides, with its surroundings
_MOST = 2000  # windows a slide: 100 MB of pixels
_DONE = "mined.json"


def refuse_annotated(
    slides: Sequence[Slide],
    source: Source,
    known: Mapping[str, Whose] | None = None,
    decided: Sequence[Annotated] = (),
) -> None:
    """Refuse slides to mine that are measured on, or of whose patient one is, as the tables of `known` patients say.

    And those that have objects, annotated or accepted by reviewers: these would be taught to be none.

    Raises
    ------
    ConfigError
        If one, or its patient, is among the validation or test slides, or its objects are trained on.
    ResolutionError
        If the µm/px of one is not known.
    """
    mined = {slide.fingerprint: slide for slide in slides if slide.frame.mpp}
    splits: tuple[Literal["train"] | Split, ...] = ("train", "validation", "test")
    for split in splits if mined else ():
        for one in (*source.annotated(split), *(decided if split == "train" else ())):
            if (len(one.label) or split != "train") and one.slide.fingerprint in mined:
                raise ConfigError(
                    "mine: expected slides free of objects that nothing is measured on, got "
                    f"{mined[one.slide.fingerprint].path.name}, which is a {split} slide; leave it out"
                )
            for slide in mined.values() if split != "train" else ():
                if patient_of(known or {}, slide.path.name) == one.patient:
                    raise ConfigError(
                        f"mine: expected slides of patients that nothing is measured on, got {slide.path.name}, of "
                        f"whose patient {one.slide.path.name} is a {split} slide; leave it out"
                    )


def refuse_others(slides: Sequence[Slide], folder: Path) -> None:
    """Refuse slides to mine where others were mined into `folder` before, in whatever order.

    Raises
    ------
    ConfigError
        If others were, or what was mined is damaged.
    """
    done = folder / _DONE
    if not done.is_file():
        return
    try:
        before = sorted(json.loads(done.read_text(encoding="utf-8"))["slides"])
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{done}: expected what was mined before, found it damaged; delete {folder}") from exc
    if slides and before != sorted(slide.fingerprint for slide in slides):
        raise ConfigError(
            f"{folder}: holds what was mined on other slides; give the same slides, or another output directory"
        )


def mine(detector: Detector, slides: Sequence[Slide], folder: Path, log: Callable[[str], None]) -> list[Rgb]:
    """Scan slides and return a window around each false alarm; scan none again that was mined into `folder` before.

    Parameters
    ----------
    detector : Detector
    slides : sequence of Slide
        None: those mined before, if any.
    folder : Path
        Takes ``<slide>-<rank>.png``, numbered so that no slide's name shows, and ``mined.json`` when all are scanned.
    log : callable
        Takes one line.

    Returns
    -------
    list of ndarray of uint8, shape (128, 128, 3)

    Raises
    ------
    ConfigError
        If other slides were mined into `folder`.
    """
    done = folder / _DONE
    refuse_others(slides, folder)
    if slides and not done.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        for left in folder.glob("*.png"):  # of a run that was stopped, maybe on other slides
            left.unlink()
        count = sum(_write(detector, slide, folder, k) for k, slide in enumerate(slides))
        text = json.dumps({"slides": [slide.fingerprint for slide in slides], "windows": count}) + "\n"
        commit(done, lambda partial: partial.write_text(text, encoding="utf-8"))
        log(f"mined {count} false alarms on {len(slides)} slides")
    windows = []
    for file in sorted(folder.glob("*.png")) if done.is_file() else ():
        with Picture.open(file) as picture:
            windows.append(np.asarray(picture.convert("RGB")))
    return windows


def _write(detector: Detector, slide: Slide, folder: Path, k: int) -> int:
    """Write the windows of one slide; return how many."""
    variant = detector.at(slide.frame.mpp, allow_coarse=True)
    least = variant.threshold / 2
    settings = ScanConfig.load({}, {"detect.min_score": least, "detect.threshold": least})
    found = scan(slide, variant, config=settings, allow_coarse=True).detections[:_MOST]
    plane = slide.frame.at(variant.mpp)
    centres = np.rint(found.centers * slide.frame.factor_to(plane)).astype(int)
    for rank, (left, top) in enumerate((centres - _WINDOW_PX // 2).tolist()):
        rgb = slide.read(left, top, _WINDOW_PX, _WINDOW_PX, plane).rgb
        Picture.fromarray(rgb).save(folder / f"{k}-{rank}.png")
    return len(found)
