"""Which slides an archive holds: from a table, a folder or a pattern, judged before the night begins.

Invariants: every slide has an id of its own, which names its results; two slides of one name in two folders do not
collide; an id depends on the slide's place and the names in the list, not on the order of it.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import glob
import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from slidescan.archive.record import Record
from slidescan.archive.search import one_a_series, slides_below, slides_like
from slidescan.errors import ConfigError, SlideReadError
from slidescan.export.stored import read_table
from slidescan.slides.fingerprint import fingerprint, stamp
from slidescan.slides.remote import Remote, locate
from slidescan.slides.resolution import override

__all__ = ["Entry", "as_recorded", "named", "read_listing", "stem_of", "tag_of"]

_COLUMNS = ("slide_path", "slide_id", "mpp", "group", "sha256")
_SHA256 = re.compile("[0-9A-Fa-f]{64}")
_ALIKE = 0.85  # of difflib: one letter more, less or wrong, and none in mpp
_PICTURES = frozenset({".png", ".jpg", ".jpeg"})  # known by their pixels, not by their files
_LONGEST_BYTES = 200  # of an id: file systems take names of 255, and files aside add to it
_TAG_CHARS = 8  # hex digits that tell slides of one name apart: 1 in 4 billion


@dataclass(frozen=True, slots=True)
class Entry:
    """One slide to scan.

    Parameters
    ----------
    slide_id : str
        Names its results; no two are the same.
    path : str
        File, directory or URL.
    mpp : float, optional
        µm per level-0 px, where the file's own is wrong or missing.
    group : str
        Patient, site, cohort: as the list says.
    sha256 : str, optional
        Digest the whole file must have.
    derived : bool
        Whether the id was made of the file's name, for the list gave none.
    """

    slide_id: str
    path: str
    mpp: float | None = None
    group: str = ""
    sha256: str | None = None
    derived: bool = False


def read_listing(source: str | Path) -> list[Entry]:
    r"""Return the slides of a list.

    Parameters
    ----------
    source : str or Path
        A .csv, .tsv or .parquet file with a column ``slide_path`` (relative to the file) and optionally ``slide_id``,
        ``mpp``, ``group`` and ``sha256``; other columns are left alone. Or a folder, searched whole; `SlideWarning`
        tells what was left out there. Or a pattern such as ``slides/**/*.svs``. The files of one DICOM series in one
        folder are one slide.

    Raises
    ------
    ConfigError
        If there is no such list, or a row of it cannot be meant.

    Examples
    --------
    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     table = Path(folder, "slides.csv")
    ...     _ = table.write_text("slide_path,mpp,group\na/case.svs,,north\nb/case.svs,0.25,south\nc.svs,,\n")
    ...     [(entry.slide_id.split("-")[0], entry.mpp, entry.group) for entry in read_listing(table)]
    [('case', None, 'north'), ('case', 0.25, 'south'), ('c', None, '')]
    """
    path = Path(source).expanduser()
    if os.path.isdir(path):  # noqa: PTH112  # a Path raises where it may not look
        entries = [Entry("", str(file)) for file in slides_below(path)]
    elif os.path.isfile(path):  # noqa: PTH113
        entries = _table(path)
    elif glob.has_magic(str(source)):
        entries = [Entry("", str(file)) for file in slides_like(str(path))]
    else:
        raise ConfigError(f"{source}: expected a table of slides, a folder or a pattern, found nothing there")
    return named(entries)


def _table(path: Path) -> list[Entry]:
    rows: list[Mapping[str, Any]]
    kind = path.suffix.lower()
    try:
        if kind == ".parquet":
            table = read_table(path)
            names = table.column_names
            rows = table.select([name for name in _COLUMNS if name in names]).to_pylist()
        elif kind in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:  # what Excel writes begins with a mark
                reader = csv.DictReader(file, delimiter="\t" if kind == ".tsv" else ",", strict=True)
                rows, names = list(reader), list(reader.fieldnames or ())
        else:
            raise ConfigError(
                f"{path.name}: expected a list of slides as .csv, .tsv or .parquet, got {kind or 'no'} file"
            )
    except (OSError, UnicodeDecodeError, csv.Error, pa.ArrowException) as exc:
        hint = {UnicodeDecodeError: "; save it as UTF-8", csv.Error: f"; {exc}: check its quotes"}.get(type(exc), "")
        raise ConfigError(f"{path.name}: cannot be read as a list of slides ({type(exc).__name__}){hint}") from exc
    if "slide_path" not in names:
        found = ", ".join(names) or "no header"
        hint = "; columns are separated by commas" if kind == ".csv" and len(names) == 1 and ";" in found else ""
        raise ConfigError(f"{path.name}: expected a column slide_path, found {found}{hint}")
    for name in names:  # what looks like a column and is none would be left out of account unseen
        (meant,) = difflib.get_close_matches(name.strip().lower(), _COLUMNS, 1, _ALIKE) or [None]
        if meant is not None and meant not in names:
            raise ConfigError(f"{path.name}: column {name!r}: expected {meant}, if that is meant; else another name")
    if not rows:
        raise ConfigError(f"{path.name}: expected slides, found none")
    entries = [_entry(path, number, row) for number, row in enumerate(rows, 1)]
    dicom = [Path(entry.path) for entry in entries if entry.path.lower().endswith(".dcm") and "://" not in entry.path]
    slides, n_other = one_a_series(dicom)
    if len(slides) + n_other < len(dicom):
        n = f"{len(dicom) - n_other:,} .dcm files of {len(slides):,}"
        raise ConfigError(f"{path.name}: expected each slide once, got {n}; list one file of a series, or the folder")
    return entries


def _entry(table: Path, number: int, row: Mapping[str, Any]) -> Entry:
    where = f"{table.name}, slide {number}"
    told = {name: _text(row.get(name), where, name) for name in _COLUMNS}
    if not told["slide_path"]:
        raise ConfigError(f"{where}: expected a slide_path, found none")
    if row.get(None):  # type: ignore[call-overload]  # csv's, of a row that is too long
        raise ConfigError(f"{where}: expected a cell a column, found more; quote what has a comma in it")
    if any(char in told["slide_path"] for char in "\0\n\r"):
        raise ConfigError(f"{where}: expected a slide_path on one line, got {told['slide_path']!r}; check the quotes")
    try:
        mpp = float(told["mpp"]) if told["mpp"] else None
        if mpp is not None:
            override(mpp)
    except ValueError as exc:  # a ConfigError is one
        raise ConfigError(f"{where}: mpp must be µm/px such as 0.25, or empty, got {told['mpp']!r}") from exc
    if told["sha256"] and not _SHA256.fullmatch(told["sha256"]):
        raise ConfigError(f"{where}: sha256 must be 64 hexadecimal digits, or empty, got {told['sha256']!r}")
    try:
        at = locate(told["slide_path"]) if "://" in told["slide_path"] else _beside(table, told["slide_path"])
    except ConfigError as exc:
        raise ConfigError(f"{where}: slide_path: {exc}") from exc
    path = at.url if isinstance(at, Remote) else _absolute(at)
    return Entry(told["slide_id"], path, mpp, told["group"], told["sha256"].lower() or None)


def _text(cell: Any, where: str, column: str) -> str:
    """Return what a cell says; pandas makes floats of whole numbers where one is missing, and a NaN of what is."""
    if isinstance(cell, bytes):
        try:
            cell = cell.decode()
        except UnicodeDecodeError as exc:
            raise ConfigError(f"{where}: expected UTF-8 in column {column}, got other bytes") from exc
    if isinstance(cell, float) and (math.isnan(cell) or cell.is_integer()):
        cell = None if math.isnan(cell) else int(cell)
    return "" if cell is None else str(cell).strip()


def _absolute(at: Path) -> str:
    """Return an absolute path without ``..``, links kept but where ``..`` after one leads elsewhere."""
    plain = os.path.abspath(at)  # noqa: PTH100
    return plain if os.path.realpath(plain) == os.path.realpath(at) else os.path.realpath(at)


def _beside(table: Path, told: str) -> Path:
    place = Path(told)
    with contextlib.suppress(RuntimeError):  # ~ and no user of that name: a file may be called so
        place = place.expanduser()
    return table.absolute().parent / place


def named(entries: list[Entry]) -> list[Entry]:
    """Give each slide its id: its own, or its name, and a tag of its path where the name alone would not tell.

    Raises
    ------
    ConfigError
        If an id is no plain name or that of two slides, or a slide is there twice.
    """
    twice = [path for path, n in Counter(entry.path for entry in entries).items() if n > 1]
    if twice:
        raise ConfigError(f"{locate(twice[0]).name}: expected each slide once, this one is listed twice")
    for number, entry in enumerate(entries, 1):
        told = entry.slide_id
        if told in (".", "..") or any(char in told for char in "/\\") or not told.isprintable():
            raise ConfigError(f"slide {number}: slide_id must be a plain name, got {told!r}")
    given = [bool(entry.slide_id) and not entry.derived for entry in entries]
    names = [each.slide_id if is_given else stem_of(each.path) for each, is_given in zip(entries, given, strict=True)]
    times = Counter(name.casefold() for name in names)  # some file systems know one case
    times_given = Counter(name.casefold() for name, is_given in zip(names, given, strict=True) if is_given)
    named = []
    for entry, name, is_given in zip(entries, names, given, strict=True):
        n, fits = times[name.casefold()], len(name.encode()) <= _LONGEST_BYTES
        if is_given and (same := times_given[name.casefold()]) > 1:
            raise ConfigError(f"slide_id {name!r} is given to {same} slides; each needs one of its own")
        if is_given and not fits:
            raise ConfigError(f"slide_id must have {_LONGEST_BYTES} bytes at most, got {len(name.encode())}: {name!r}")
        if (n > 1 and not is_given) or not fits or not name.strip("."):
            short = name.encode()[:_LONGEST_BYTES].decode(errors="ignore").rstrip(".")
            name = f"{short}-{tag_of(entry.path)}"
        named.append(replace(entry, slide_id=name, derived=not is_given))
    return named


def as_recorded(entries: Sequence[Entry], records: Mapping[str, Record]) -> list[Entry]:
    """Give a slide the id under which it is on record, where another of its name was listed since, or is no longer.

    One that has the name of another on record, of another list, gets a tag: neither takes the other's place.

    Raises
    ------
    ConfigError
        If the list gives a slide the id of another one that is done, which it does not name.
    """
    tags = {tag_of(entry.path) for entry in entries}
    kept = []
    for entry in entries:
        stem, tag = stem_of(entry.path), tag_of(entry.path)
        record = records.get(entry.slide_id)
        is_taken = record is not None and record.place not in tags and _is_another(entry, record)
        if not entry.derived:
            if is_taken:
                raise ConfigError(
                    f"slide_id {entry.slide_id!r}: expected one that no other slide is done under, in that output "
                    "directory it is that of another; give another slide_id or another output directory"
                )
        elif own := [name for name in (stem, f"{stem}-{tag}") if name in records and records[name].place == tag]:
            entry = replace(entry, slide_id=own[0])
        elif is_taken:
            entry = replace(entry, slide_id=f"{stem}-{tag}")
        kept.append(entry)
    return kept


def _is_another(entry: Entry, record: Record) -> bool:
    """Return whether a slide is not the one that is on record under its name, which may have been moved."""
    where, size_wh = locate(entry.path), record.told.get("size_wh")
    if record.state == "failed" and entry.derived and record.reason != "not_found":
        # Moved, a file keeps its time and size. One that was not there may have been looked for in the wrong place.
        known = record.key.partition(":")[2]
        return bool(known) and known != stamped(stamp(where))
    if record.state != "done" or size_wh is None or not isinstance(where, Path) or where.suffix.lower() in _PICTURES:
        return False
    try:
        return bool(fingerprint(where, tuple(size_wh)) != record.told["fingerprint"])
    except SlideReadError:  # it is not there: what is on record stays so
        return False


def stamped(now: tuple[int, ...]) -> str:
    """Return the part of a record's key that tells the file as it was; `now` is its stamp."""
    return hashlib.sha256(json.dumps(now).encode()).hexdigest()


def tag_of(path: str) -> str:
    """Return what tells a slide from others of its name, and nothing of where it lies."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:_TAG_CHARS]


def stem_of(path: str) -> str:
    """Return the name of a slide's file without what says its kind."""
    where = locate(path)
    # A name that is no text, from another system, would be a record that no JSON can hold.
    stem = where.stem.encode(errors="replace").decode()
    stem = "".join(char if char.isprintable() else "?" for char in stem)  # that would colour a terminal, or end a line
    return stem.removesuffix(".ome") if where.suffix.lower() in (".zarr", ".tif", ".tiff") else stem
