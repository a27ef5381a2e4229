"""`write_report`: how a run over an archive went, as one HTML file for the person who comes back to it.

Invariants: the file needs no network and no other file to be read; it runs only the script beside this module, whose
digest its policy names; what records say is escaped, or data that the script shows as text, never as markup; it holds
no path, only what the records hold and small pictures of the results.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from html import escape
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image

from slidescan.archive.record import REASONS, SCORE_BINS, Record
from slidescan.archive.status import standing
from slidescan.commit import commit
from slidescan.errors import ResultError
from slidescan.legend import share_text
from slidescan.manifest import read_manifest
from slidescan.overview import heat_panel

__all__ = ["write_report"]

# Small pictures: how many at most (each takes about 4 kB of the page and 50 ms to make), their longer side in px, which
# is twice what the page gives them so that they are sharp on a fine screen, and JPEG quality.
_MOST_PICTURES, _PICTURE_PX, _QUALITY = 200, 160, 75
# Kinds of rows, worst first.
_FAILED, _GAPS, _WHOLE = range(3)
_NUMBERS = (
    "tissue_mm2",
    "analysed_fraction",
    "found",
    "hotspot_count",
    "flagged_regions",
    "best_evidence",
    "read_failed_boxes",
    "saturated_tiles",
    "crashed_regions",
    "seconds",
    "peak_rss_mb",
    "peak_gpu_mb",
)
_COLUMNS = ("rank", "slide_id", "group", "state", "reason", "message", *_NUMBERS, "per_mm2", "stages_s", "picture")
# By kind of reason, whether a slide is tried again; of other kinds it need not be.
_AGAIN = {"retry": "by the next run", "next_run": "by the next run", "crash": "a few times", "stays": "no"}
# Of the histogram, px at its natural size: height and width of the bars' field, and room for the numbers beside it.
_PLOT_W, _PLOT_H, _LEFT, _TOP, _BELOW = 560, 150, 46, 14, 36


def write_report(out: Path, records: Iterable[Record]) -> None:
    """Write ``report.html``: the run's numbers, and a table of all slides, worst first.

    Parameters
    ----------
    out : Path
        Output directory of an archive.
    records : iterable of Record
        Of every slide.

    Raises
    ------
    ResultError
        If `out` cannot be written.
    """
    rows = sorted(map(_known, records), key=_worst_first)
    pictures = _pictures(out / "slides", rows)
    stages = list(dict.fromkeys(name for record in rows for name in record.told.get("stages_s", ())))
    reasons = dict.fromkeys(record.reason for record in rows if record.reason)
    data = {
        "columns": _COLUMNS,
        "stages": stages,
        "reasons": {reason: REASONS[reason][1] if reason in REASONS else "" for reason in reasons},
        "rows": [_row(record, stages, pictures.get(record.slide_id)) for record in rows],
    }
    # Without a < nothing can end the block or open a comment in it; the rest is ASCII.
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    style, script = _asset("report.css"), _asset("report.js")
    parts = {
        "policy": f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'",
        "style": style,
        "head": "\n".join(_head(out, rows)),
        "pictures": f"{len(pictures):,}",
        "most_pictures": f"{_MOST_PICTURES:,}",
        "data": text,
        "script": script,
    }
    page = re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("report.html"))
    # Bytes: a line end made two characters would be another digest. Half a surrogate, of a file name, is a ?.
    commit(out / "report.html", lambda partial: partial.write_bytes(page.encode(errors="replace")))


def _asset(name: str) -> str:
    return resources.files("slidescan.archive").joinpath(name).read_text(encoding="utf-8")


def _source(text: str) -> str:
    """Return how a content security policy names a style or script by its digest."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _number(value: object) -> float | None:
    """Return a number that JSON has, or None."""
    good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if good else None  # type: ignore[return-value]  # mypy does not follow `good`


def _known(record: Record) -> Record:
    """Return a record with what can be shown of its slide: a number that is null, NaN or no number is as none."""
    told: dict[str, Any] = {name: _number(record.told.get(name)) for name in (*_NUMBERS, "megapixels")}
    stages, scores, detector = (record.told.get(name) for name in ("stages_s", "scores", "detector"))
    if isinstance(stages, dict):
        told["stages_s"] = {str(name): s for name, value in stages.items() if (s := _number(value)) is not None}
    if isinstance(scores, list) and len(scores) == SCORE_BINS:
        told["scores"] = [max(0, int(_number(n) or 0)) for n in scores]
    if isinstance(detector, str):
        told["detector"] = detector
    return replace(record, told={name: value for name, value in told.items() if value is not None})


def _rank(record: Record) -> int:
    """Return how a slide fared: failed, done but not wholly looked at, or done."""
    if record.state != "done":
        return _FAILED
    seen = record.told.get("analysed_fraction")
    amiss = any(record.told.get(name) for name in ("read_failed_boxes", "saturated_tiles", "crashed_regions"))
    return _GAPS if record.reason or amiss or (seen is not None and seen < 1) else _WHOLE


def _worst_first(record: Record) -> tuple[int, str, float, float, str]:
    """Return a sort key: failures by reason; gaps by what was not looked at; the others by evidence."""
    rank, seen = _rank(record), record.told.get("analysed_fraction")
    reason = (record.reason or "") if rank == _FAILED else ""
    # Of a slide without tissue nothing was looked at; of another one without a number nothing is known.
    share = 1.0 if rank != _GAPS else seen if seen is not None else 0.0 if record.reason == "no_tissue" else 1.0
    evidence = record.told.get("best_evidence")
    return rank, reason, share, math.inf if evidence is None else -evidence, record.slide_id


def _row(record: Record, stages: list[str], picture: str | None) -> list[Any]:
    """Return a slide's cells, as `_COLUMNS` has them; None is an empty one."""
    told = record.told
    found, seen_mm2 = told.get("found"), told.get("tissue_mm2", 0.0) * told.get("analysed_fraction", 0.0)
    seconds = told.get("stages_s")
    return [
        _rank(record),
        record.slide_id,
        record.group,
        record.state,
        record.reason,
        record.message,
        *(told.get(name) for name in _NUMBERS),
        None if found is None or seen_mm2 <= 0 else round(found / seen_mm2, 4),
        [seconds.get(name) for name in stages] if seconds else None,
        picture,
    ]


def _pictures(slides: Path, rows: list[Record]) -> dict[str, str]:
    """Return small pictures of the slides that matter, as data URIs: some with gaps, then those with most evidence."""
    gaps = [record for record in rows if _rank(record) == _GAPS]
    telling = [record for record in rows if _rank(record) == _WHOLE and record.told.get("best_evidence")]
    half = _MOST_PICTURES // 2  # an archive with gaps everywhere still shows what was found
    wanted = (record.slide_id for record in (*gaps[:half], *telling, *gaps[half:]))
    chosen = list(islice((slide_id for slide_id in wanted if _drawn(slides, slide_id)), _MOST_PICTURES))
    # Nearly all of the time goes into unpacking PNGs, which threads do side by side.
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        drawn = threads.map(partial(_picture, slides), chosen)
        return {slide_id: picture for slide_id, picture in zip(chosen, drawn, strict=True) if picture is not None}


def _drawn(slides: Path, slide_id: str) -> bool:
    """Tell whether a slide's result has an overview."""
    with contextlib.suppress(OSError):  # a name that is too long
        return Path(slide_id).name == slide_id and (slides / slide_id / "overview.png").is_file()
    return False


def _picture(slides: Path, slide_id: str) -> str | None:
    """Return a result's heat map, small; None where it cannot be read."""
    try:
        manifest = read_manifest(slides / slide_id)
        if manifest is None:
            return None
        width, height = manifest["frame"]["size_wh"]
        with Image.open(slides / slide_id / "overview.png", formats=["PNG"]) as overview:
            panel = heat_panel(overview, (int(width), int(height)))
        panel.thumbnail((_PICTURE_PX, _PICTURE_PX))
        file = io.BytesIO()
        panel.convert("RGB").save(file, "JPEG", quality=_QUALITY, optimize=True)
    # Pillow says of a damaged PNG that it is a SyntaxError.
    except (ResultError, OSError, SyntaxError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
        return None
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def _head(out: Path, rows: list[Record]) -> Iterator[str]:
    """Yield what stands above the table; it is there without a script, too."""
    status = standing(rows, out)
    n_failed = sum(status.failed.values())
    rate = status.slides_per_h
    figures = [
        ("Slides", f"{status.slides:,}", ""),
        ("Done", f"{status.done:,}", "good"),
        ("Failed", f"{n_failed:,}", "bad" if n_failed else ""),
        ("To do", f"{status.left:,}", ""),
        ("Tissue", f"{status.tissue_mm2:,.1f} mm²", ""),
        ("Tissue analysed", _share(status.analysed_fraction), ""),
        ("Figures found", f"{status.found:,}", ""),
        ("Slides per hour", "" if rate is None else f"{rate:,.1f}", ""),
        ("MP per second", "" if rate is None else f"{status.megapixels_per_s or 0:,.1f}", ""),
        ("Model busy", "" if status.busy is None else f"{status.busy:.0%}", ""),
    ]
    yield '<dl class="figures">'
    for name, value, kind in figures:
        if value:
            yield f'<div class="{kind}"><dt>{name}</dt><dd>{value}</dd></div>'
    yield "</dl>"
    yield f"<p>{escape(_when(rows))}</p>"
    if status.running:
        yield '<p class="note">The run is on, or was killed before its end: the same command continues it.</p>'
    elif status.left:
        yield '<p class="note">No run is on: the same command continues.</p>'
    yield '<div class="panels"><div>'
    yield from _reasons("Failures by reason", status.failed)
    if status.quarantined:
        yield f"<p>Left alone after too many crashes: {status.quarantined:,}.</p>"
    if any(REASONS.get(reason, ("stays",))[0] == "stays" for reason in status.failed):
        yield "<p>No: only with another file, other settings or <code>--retry-failed</code>.</p>"
    yield "</div><div>"
    yield from _reasons("Done, with a caveat", status.caveats)
    yield from _scores([record.told["scores"] for record in rows if "scores" in record.told])
    yield "</div></div>"


def _share(value: float | None) -> str:
    """Say a share; what is not whole is never said to be."""
    return "" if value is None else share_text(value, 2)


def _when(rows: list[Record]) -> str:
    """Say with what the slides were scanned, and up to when."""
    names = sorted({str(record.told["detector"]) for record in rows if record.told.get("detector")})
    said = [f"Detector {', '.join(names)}."] if names else []
    last = max((record.finished_s for record in rows), default=0.0)
    if last > 0:
        said.append(f"The last slide ended {datetime.fromtimestamp(last, UTC):%Y-%m-%d %H:%M} UTC.")
    return " ".join(said)


def _reasons(title: str, counts: dict[str, int]) -> Iterator[str]:
    """Yield a table of reasons, most frequent first."""
    if not counts:
        return
    kinds = {reason: REASONS.get(reason, ("stays", "a reason of another slidescan")) for reason in counts}
    again = any(kind in _AGAIN for kind, _ in kinds.values())
    names = ["Reason", "Slides", "What it means", *(["Tried again"] if again else [])]
    yield f'<section><h2>{title}</h2><table class="reasons"><thead><tr>'
    yield "".join(f'<th scope="col">{name}</th>' for name in names) + "</tr></thead><tbody>"
    for reason, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
        kind, meaning = kinds[reason]
        yield f'<tr><th scope="row">{escape(reason)}</th><td>{n:,}</td><td>{escape(meaning)}</td>'
        yield f"<td>{_AGAIN.get(kind, '')}</td></tr>" if again else "</tr>"
    yield "</tbody></table></section>"


def _scores(told: list[list[int]]) -> Iterator[str]:
    """Yield the histogram of the scores of all detections: counts go over decades, so their axis is logarithmic."""
    counts = [sum(bins) for bins in zip(*told, strict=True)]
    total = sum(counts)
    if not total:
        return
    decades = max(1, math.ceil(math.log10(max(counts))))
    bottom, bar_w = _TOP + _PLOT_H, _PLOT_W / SCORE_BINS

    def y(n: float) -> float:
        # A tenth of a decade below 1, so that a single detection is seen.
        return bottom - _PLOT_H * (math.log10(n) + 0.1) / (decades + 0.1)

    size = f"{_LEFT + _PLOT_W + 16} {bottom + _BELOW}"
    yield f"<section><h2>Scores of all {total:,} detections</h2>"
    yield f'<svg viewBox="0 0 {size}" role="img" aria-label="Histogram of detection scores; the numbers are below">'
    for power in range(decades + 1):
        at = y(10**power)
        yield f'<line class="grid" x1="{_LEFT}" x2="{_LEFT + _PLOT_W}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{_short(10**power)}</text>'
    ranges = [f"{i / SCORE_BINS:.2f} to {(i + 1) / SCORE_BINS:.2f}" for i in range(SCORE_BINS)]
    for i, n in enumerate(counts):
        if n:
            x, top = _LEFT + i * bar_w + 1, y(n)
            box = f'x="{x:.1f}" y="{top:.1f}" width="{bar_w - 2:.1f}" height="{bottom - top:.1f}"'
            yield f'<rect class="bar" {box}><title>{ranges[i]}: {n:,}</title></rect>'
    yield f'<line class="axis" x1="{_LEFT}" x2="{_LEFT + _PLOT_W}" y1="{bottom}" y2="{bottom}"/>'
    for tenth in range(0, 11, 2):
        x = _LEFT + _PLOT_W * tenth / 10
        yield f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tenth / 10:.1f}</text>'
    middle = _LEFT + _PLOT_W / 2
    yield f'<text x="{middle}" y="{bottom + 32}" text-anchor="middle">score (detections, logarithmic)</text></svg>'
    yield '<details><summary>The numbers</summary><table class="reasons">'
    for span, n in zip(ranges, counts, strict=True):
        yield f'<tr><th scope="row">{span}</th><td>{n:,}</td></tr>'
    yield "</table></details></section>"


def _short(n: int) -> str:
    """Write a power of ten short enough for an axis."""
    for unit, name in ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k")):
        if n >= unit:
            return f"{n // unit}{name}"
    return str(n)
