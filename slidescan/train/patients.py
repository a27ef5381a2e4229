"""Whose tissue a slide or picture shows: what a table says, or else what its name or folder does."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from slidescan.errors import ConfigError

__all__ = ["Whose", "names_of", "patient_in", "patient_of", "read_all", "read_patients", "whose"]

Whose = tuple[str, str]  # patient and scanner
_TABLE = "patients.csv"


def read_patients(folder: Path) -> dict[str, Whose] | None:
    """Return patient and scanner by slide as ``patients.csv`` in the folder says them, None where there is no table.

    Raises
    ------
    ConfigError
        If it is no table with the columns slide and patient, filled in, or says two things of a slide.
    """
    path = folder / _TABLE
    if not path.exists():
        return None
    found: dict[str, Whose] = {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                slide, patient = ((row.get(key) or "").strip() for key in ("slide", "patient"))
                if not slide or not patient:
                    raise ConfigError(f"{_TABLE}: expected columns slide and patient, filled in every row; add them")
                said = (patient, (row.get("scanner") or "").strip())
                if found.setdefault(slide, said) != said:
                    raise ConfigError(f"{_TABLE}: expected one row for the slide {slide}, found two that differ")
    except (OSError, UnicodeDecodeError, csv.Error) as exc:
        raise ConfigError(f"{path}: expected a CSV table in UTF-8, {exc}") from exc
    return found


def read_all(places: Iterable[Path | None]) -> dict[str, Whose]:
    """Return what the tables in several directories, or beside several files, say together."""
    folders = [place if place.is_dir() else place.parent for place in places if place is not None]
    folders = [each for folder in folders for each in (folder, folder / "annotations")]  # CVAT's, of its COCO file
    return {slide: said for folder in folders for slide, said in (read_patients(folder) or {}).items()}


def patient_of(known: Mapping[str, Whose], file: str, name: str | None = None) -> str:
    """Return the patient of a slide as a table says it, else as its name does (default: the file's)."""
    names = names_of(file)
    return next((known[each][0] for each in (file, *names) if each in known), patient_in(name or names[0]))


def whose(known: Mapping[str, Whose], file: str) -> Whose:
    """Return patient and scanner of a slide or picture.

    Raises
    ------
    ConfigError
        If the table does not say them.
    """
    for name in (file, *names_of(Path(file).name)):
        if name in known:
            return known[name]
    raise ConfigError(f"{_TABLE}: expected a row for the slide {file}, found none")


def names_of(file: str) -> tuple[str, ...]:
    """Return what a slide may be called where something is written of it."""
    stem = Path(file).stem
    return stem, stem.removesuffix(".ome"), file


def patient_in(stem: str) -> str:
    """Return the patient that a name of TCGA begins with (TCGA-<site>-<participant>-<sample>…), or the name."""
    found = re.match(r"TCGA-[^\W_]+-[^\W_]+(?=[-._]|$)", stem)
    return found[0] if found else stem
