"""A result on disk, saved so that half a result is never taken for a whole one.

::

    <out>/detections.parquet  anomaly.ome.zarr/  flagged.geojson  overview.png  manifest.json

``manifest.json`` is written last and lists size and sha256 of every other file: without it a directory is not a result.
Nothing in the directory names the slide's path or carries text from inside the slide file.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slidescan.commit import commit, disk_error
from slidescan.errors import ResultError, SlidescanError
from slidescan.export.stored import from_table, read_map, read_table, write_map, write_table
from slidescan.geometry import Frame
from slidescan.manifest import MANIFEST, SCHEMA, check_files, listed, read_manifest, write_manifest
from slidescan.result import COMPUTED, ScanResult

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["load_result", "save_result"]


def save_result(result: ScanResult, out: Path, draw: Callable[[], Image]) -> ScanResult:
    """Write the result directory, manifest last, and return the result bound to it; `draw` makes the overview."""
    started = time.perf_counter()
    try:
        (out / MANIFEST).unlink(missing_ok=True)  # of the result that is replaced
        write_table(out / "detections.parquet", result.table())
        write_map(out / "anomaly.ome.zarr", result.anomaly, result.frame)
        result.to_geojson(out / "flagged.geojson", what="regions")
        # Packed hard it is 8 % smaller and takes twice as long: of a small slide's scan 3 %.
        commit(out / "overview.png", lambda partial: draw().save(partial, format="PNG", compress_level=1))
        files = listed(out)
        write_s, seconds = round(time.perf_counter() - started, 3), result.provenance["seconds"]
        seconds = {**seconds, "write": write_s, "total": round(seconds["total"] + write_s, 3)}
        saved = replace(result, path=out, provenance={**result.provenance, "seconds": seconds})
        manifest = {
            "schema": SCHEMA,
            "classes": list(result.classes),
            "frame": {"size_wh": list(result.frame.size_wh), "mpp": result.frame.mpp},
            "summary": result.summary(),
            **saved.provenance,
            "files": files,
        }
        write_manifest(out, manifest)
    except OSError as exc:
        if isinstance(exc, ResultError):
            raise
        raise disk_error(out, exc) from exc
    # What was computed stays computed: a slide of half a million detections is clustered once.
    saved.__dict__.update({name: result.__dict__[name] for name in COMPUTED if name in result.__dict__})
    return saved


def load_result(path: str | Path, *, verify: bool = True) -> ScanResult:
    """Read a result directory.

    Parameters
    ----------
    path : str or Path
        The directory that holds ``manifest.json``.
    verify : bool
        Compare every file's sha256 with the manifest, not only its size.

    Raises
    ------
    ResultError
        If the directory is missing, unfinished, damaged, or of a newer slidescan.
    """
    out = Path(path)
    if out.name == MANIFEST and out.is_file():
        out = out.parent
    manifest = read_manifest(out)
    if manifest is None:
        below = sorted(each.parent for each in (*out.glob(f"*/{MANIFEST}"), *out.glob(f"slides/*/{MANIFEST}")))
        state = (
            f"of those below it, {len(below)}, name one, such as {below[0]}"
            if below
            else "the scan has not finished; run the same command to continue"
            if any(out.glob("parts-*"))
            else "no scan has finished there"
            if out.is_dir()
            else "that is a file"
            if out.exists()
            else "no such directory"
        )
        raise ResultError(f"{out}: expected a result directory with {MANIFEST}; {state}")
    try:
        check_files(out, manifest, verify=verify)
        return _load(out, manifest)
    except (OSError, ValueError, KeyError, TypeError) as exc:
        if isinstance(exc, SlidescanError):
            raise
        raise ResultError(f"{out}: damaged ({type(exc).__name__}); scan again with --overwrite") from exc


def _load(out: Path, manifest: dict[str, Any]) -> ScanResult:
    """Build the result from the files the manifest lists."""
    frame = Frame(
        (int(manifest["frame"]["size_wh"][0]), int(manifest["frame"]["size_wh"][1])), manifest["frame"]["mpp"]
    )
    classes = tuple(manifest["classes"])
    table = read_table(out / "detections.parquet")
    detections = from_table(table, classes, manifest["detector"].get("attributes", ()))
    provenance = {k: v for k, v in manifest.items() if k not in ("schema", "classes", "frame", "summary", "files")}
    anomaly = read_map(out / "anomaly.ome.zarr", frame.at(float(manifest["config"]["map"]["um_per_px"])))
    return ScanResult(frame, classes, detections, anomaly, provenance, out)
