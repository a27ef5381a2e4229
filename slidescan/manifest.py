"""``manifest.json``: what makes a directory a result; written last, with size and sha256 of every other file."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from slidescan.commit import commit
from slidescan.errors import ConfigError, ResultError, ResultInTheWayError

__all__ = ["MANIFEST", "SCHEMA", "check_files", "listed", "read_manifest", "refuse_own", "write_manifest"]

MANIFEST = "manifest.json"
SCHEMA = 1
_FILES = ("detections.parquet", "anomaly.ome.zarr", "flagged.geojson", "overview.png")


def read_manifest(out: Path) -> dict[str, Any] | None:
    """Return the manifest of a finished result, or None where there is none."""
    try:
        manifest = json.loads((out / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as exc:
        raise ResultInTheWayError(f"{out}: {MANIFEST} cannot be read; scan again with --overwrite") from exc
    if not isinstance(manifest, dict) or "schema" not in manifest:
        raise ResultInTheWayError(
            f"{out}: expected {MANIFEST} to be a result's, found another; scan again with --overwrite"
        )
    if manifest["schema"] != SCHEMA:
        raise ResultInTheWayError(f"{out}: expected {MANIFEST} of schema {SCHEMA}; it was written by another slidescan")
    return manifest


def write_manifest(out: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest: from now on the directory is a result."""
    text = json.dumps(manifest, indent=1, allow_nan=False) + "\n"

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    commit(out / MANIFEST, write)


def listed(out: Path) -> dict[str, dict[str, Any]]:
    """Return size and sha256 of every file of the result, by its name in the directory, sorted."""
    files = [f for name in _FILES for f in ([out / name] if (out / name).is_file() else (out / name).rglob("*"))]
    return {name: _digest(out / name) for name in sorted(f.relative_to(out).as_posix() for f in files if f.is_file())}


def refuse_own(target: Path) -> None:
    """Refuse to write a file over one that a result is made of.

    Raises
    ------
    ConfigError
        If `target` is the manifest of a result, or one of the files that it lists.
    """
    place = target.resolve()
    for out in place.parents:
        if place.relative_to(out).parts[0] in (MANIFEST, *_FILES) and (out / MANIFEST).is_file():
            raise ConfigError(
                f"{target}: expected a file of your own, got one that the result there is made of; name another"
            )


def check_files(out: Path, manifest: Mapping[str, Any], *, verify: bool) -> None:
    """Refuse a result whose files differ from the manifest in size or, where `verify` is set, in sha256.

    Raises
    ------
    ResultError
        If one does.
    """
    for name, entry in manifest["files"].items():
        file = out / name
        if not file.is_file() or file.stat().st_size != entry["bytes"] or (verify and _digest(file) != entry):
            raise ResultError(f"{out}: {name} is not what the manifest lists; scan again with --overwrite")


def _digest(file: Path) -> dict[str, Any]:
    """Return size and sha256 of a file."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}
