"""`review`: what is to be reviewed, by whom, and where its pixels are."""

from __future__ import annotations

import getpass
import os
import warnings
from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from slidescan.archive import Archive, ArchiveRegion, open_archive, read_listing
from slidescan.archive.listing import as_recorded
from slidescan.errors import ConfigError, ResultError, SlideWarning
from slidescan.manifest import read_manifest
from slidescan.result import ScanResult
from slidescan.reviews.case import Case, SlideAt
from slidescan.reviews.decisions import DECISIONS, What
from slidescan.reviews.items import ReviewItem
from slidescan.reviews.session import Review
from slidescan.reviews.words import check_name, person
from slidescan.saved import load_result
from slidescan.slides import Slide
from slidescan.whereabouts import recalled

__all__ = ["Slides", "decided_cases", "open_runs", "review"]

Slides = SlideAt | Mapping[str, SlideAt]


def review(
    what: ScanResult | Archive | Sequence[ArchiveRegion],
    *,
    slides: Slides | None = None,
    reviewer: str | None = None,
    of: Literal["regions", "detections"] = "regions",
    blinded: bool = False,
    top: int | None = None,
) -> Review:
    """Review what was found: look at it in order and decide.

    Parameters
    ----------
    what : ScanResult, Archive or sequence of ArchiveRegion
        A saved result, all results of `open_archive`, or the best regions of them, from `Archive.top`.
    slides : Slide, path or URL; mapping of slide id to these; list of slides, optional
        Where the pixels are, for a result names no path; default: where this machine scanned them, if they are there
        still (`slidescan.whereabouts`). Of an archive: the table, folder or pattern it was scanned from, or a mapping.
        Only crops and figures need it.
    reviewer : str, optional
        Who decides; default: the name you are logged in under.
    of : {"regions", "detections"}
        Decide on flagged regions, or on each detection at or above the threshold.
    blinded : bool
        Hide scores, evidence and rank, and the order they would tell.
    top : int, optional
        Only so many, those with most evidence; default: all.

    Raises
    ------
    ConfigError
        If the result is not saved, a setting cannot be meant, or `slides` has none of those that were scanned.

    Examples
    --------
    >>> import slidescan as ss
    >>> looked = ss.review(ss.load_result("runs/case"), reviewer="ann")  # doctest: +SKIP
    >>> while item := looked.next():  # doctest: +SKIP
    ...     looked.decide(item.id, "accept" if your_eyes(looked.crop(item.id)) else "reject")
    """
    if of not in ("regions", "detections"):
        raise ConfigError(f"of: expected regions or detections, got {of!r}")
    kind: What = "region" if of == "regions" else "detection"
    who = _logged_in() if reviewer is None else reviewer
    check_name("reviewer", who, "a name on one line")
    if top is not None and top < 1:
        raise ConfigError(f"top: expected a number of items, got {top}")
    if isinstance(what, ScanResult):
        cases = [Case(what, kind)]
        shown = list(cases[0].items.values())
    elif isinstance(what, Archive) and kind == "region" and top is not None:
        cases, shown = _of_regions(what.top(top), kind)  # opens no more slides than it must
    elif isinstance(what, Archive):
        cases = [_of_slide(what, slide_id, kind) for slide_id in what if not what.under_way(slide_id)]
        shown = [item for case in cases for item in case.items.values()]
    else:
        cases, shown = _of_regions(what, kind)
    if top is not None:
        shown = sorted(shown, key=lambda item: (-(item.evidence or 0.0), item.slide_id, item.rank))[:top]
    _read_from(what, slides, cases)
    return Review(cases, shown, reviewer=person(who), blinded=blinded)


def open_runs(path: str | Path) -> ScanResult | Archive:
    """Open a result directory, or the output directory of an archive, whichever it is.

    Raises
    ------
    ResultError
        If it is neither.
    """
    out = Path(path)
    if read_manifest(out) is not None:
        return load_result(out, verify=False)
    if not (out / "records").is_dir():
        state = "if a scan writes there, it has not finished" if out.is_dir() else "there is no such directory"
        raise ResultError(f"{out}: expected a result or the output directory of an archive, found neither; {state}")
    return open_archive(out)


def decided_cases(what: ScanResult | Archive, slides: Slides | None) -> list[Case]:
    """Return the results with decisions beside them, with their flagged regions in review; others are not read.

    Parameters
    ----------
    what : ScanResult or Archive
    slides : Slides, optional
        As `review` takes it.

    Raises
    ------
    ConfigError
        If a result is not saved, or the list of slides is none.
    ResultError
        If a result is damaged.
    """
    if isinstance(what, ScanResult):
        cases = [Case(what, "region")]
    else:
        decided = [slide_id for slide_id in what if (what.path / "slides" / slide_id / DECISIONS).is_file()]
        cases = [_of_slide(what, slide_id, "region") for slide_id in decided]
    _read_from(what, slides, cases)
    return [case for case in cases if case.log.path.is_file()]


def _of_slide(archive: Archive, slide_id: str, kind: What) -> Case:
    return Case(archive.result(slide_id), kind, slide_id=slide_id, group=archive.records[slide_id].group)


def _read_from(what: object, slides: Slides | None, cases: Sequence[Case]) -> None:
    """Tell each case where its pixels are."""
    if slides is None:
        found = recalled(case.path for case in cases)
        for case in cases:
            if case.path in found:
                case.read_from(found[case.path])
        return
    at = _slides_of(what, slides, cases)
    if cases and not any(case.slide_id in at for case in cases):
        raise ConfigError(f"slides: expected {cases[0].slide_id!r} or another that was scanned, got none of them")
    for case in cases:
        if case.slide_id in at:
            case.read_from(at[case.slide_id])


def _of_regions(regions: Sequence[ArchiveRegion], kind: What) -> tuple[list[Case], list[ReviewItem]]:
    """Return the cases that regions of an archive are of, and the regions as items."""
    if isinstance(regions, str | PathLike) or not all(isinstance(each, ArchiveRegion) for each in regions):
        raise ConfigError(
            f"what: expected a result, an archive or what its top(k) returns, got {type(regions).__name__}; read a "
            "directory with load_result or open_archive"
        )
    if kind == "detection":
        raise ConfigError("of: expected regions for a list of regions, got detections; pass the archive itself")
    cases: dict[Path, Case] = {}
    shown = []
    for each in regions:
        if each.result_path not in cases:
            result = load_result(each.result_path, verify=False)
            cases[each.result_path] = Case(result, kind, slide_id=each.slide_id, group=each.group)
        by_rank = list(cases[each.result_path].items.values())
        item = by_rank[each.region.rank - 1] if each.region.rank <= len(by_rank) else None
        if item is None or item.polygon_l0 is None or not np.array_equal(item.polygon_l0, each.region.polygon_l0):
            raise ConfigError(f"what: {each.slide_id!r} was scanned anew since its regions were listed; call top again")
        shown.append(item)
    return sorted(cases.values(), key=lambda case: case.slide_id), shown  # as listed they would tell their evidence


def _slides_of(what: object, slides: Slides, cases: Sequence[Case]) -> Mapping[str, SlideAt]:
    """Return by slide id where pixels come from."""
    if isinstance(slides, Mapping):
        return slides
    if isinstance(what, ScanResult):
        return {case.slide_id: slides for case in cases}
    if isinstance(slides, Slide):
        raise ConfigError(f"slides: expected a list of slides or a mapping from slide ids, got one slide: {slides!r}")
    with warnings.catch_warnings():  # what else lies there does not matter
        warnings.simplefilter("ignore", SlideWarning)
        listed = read_listing(str(slides))
    if isinstance(what, Archive):
        listed = as_recorded(listed, what.records)
    return {entry.slide_id: entry.path for entry in listed}


def _logged_in() -> str:
    try:
        return os.environ.get("JUPYTERHUB_USER") or getpass.getuser()  # on a hub all may be one user of the system
    except (OSError, KeyError, ImportError) as exc:  # a container without a user's name
        raise ConfigError("reviewer: expected who decides, and nobody is logged in here; pass reviewer=") from exc
