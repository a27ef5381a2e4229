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
import os
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from slidescan.archive.record import Record
from slidescan.errors import ConfigError, SlideReadError
from slidescan.export.stored import read_table
from slidescan.slides.fingerprint import fingerprint
from slidescan.slides.remote import Remote, locate
from slidescan.slides.resolution import override

__all__ = ["Entry", "as_recorded", "read_listing", "stem_of", "tag_of"]

# What a folder is searched for: slide formats by the suffix that is opened. A picture is no slide, and the files beside
# a .mrxs or a .vms are theirs.
_SUFFIXES = frozenset(
    ".svs .tif .tiff .ndpi .mrxs .scn .bif .vms .vmu .svslide .czi .zarr".split()  # noqa: SIM905  # one line to read
)
_COLUMNS = ("slide_path", "slide_id", "mpp", "group", "sha256")
_ALIKE = 0.85  # of difflib: one letter more, less or wrong, and none in mpp
_PICTURES = frozenset({".png", ".jpg", ".jpeg"})  # known by their pixels, not by their files
_OWN = "anomaly.ome.zarr"  # the map of a result: an archive's output may lie below its slides
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
    """

    slide_id: str
    path: str
    mpp: float | None = None
    group: str = ""
    sha256: str | None = None


def read_listing(source: str | Path) -> list[Entry]:
    r"""Return the slides of a list.

    Parameters
    ----------
    source : str or Path
        A .csv, .tsv or .parquet file with a column ``slide_path`` (relative to the file) and optionally ``slide_id``,
        ``mpp``, ``group`` and ``sha256``; other columns are left alone. Or a folder, searched whole. Or a pattern such
        as ``slides/**/*.svs``.

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
    if path.is_dir():
        entries = [Entry("", str(file)) for file in _found(path)]
        said = f"{path}: expected a folder with slides, found none ({', '.join(sorted(_SUFFIXES))})"
    elif path.is_file():
        entries = _table(path)
        said = f"{path.name}: expected slides, found none"
    elif glob.has_magic(str(source)):
        matched = sorted(glob.glob(str(path), recursive=True))  # noqa: PTH207  # patterns may be absolute
        entries = [Entry("", os.path.abspath(file)) for file in matched]  # noqa: PTH100  # keeps a link a link
        said = f"{source}: no file fits this pattern; quote it so that the shell leaves it alone, and check it"
    else:
        raise ConfigError(f"{source}: expected a table of slides, a folder or a pattern, found nothing there")
    if not entries:
        raise ConfigError(said)
    return _named(entries)


def _found(folder: Path) -> Iterable[Path]:
    """Yield the slides below a folder, sorted; a Zarr directory is one slide, and hidden ones are nobody's.

    Links to folders are followed, each folder once. Results of slidescan are no slides.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(
            f"{error.filename}: expected a folder that can be read, got {error.strerror}; it is below {folder}"
        )

    seen: set[str] = set()
    for directory, below, files in os.walk(folder.absolute(), onerror=refuse, followlinks=True):
        place = os.path.realpath(directory)
        if place in seen:
            below.clear()
            continue
        seen.add(place)
        zarrs = [name for name in below if name.lower().endswith(".zarr")]
        below[:] = sorted(name for name in below if name not in zarrs and not name.startswith("."))
        for name in sorted([*zarrs, *files]):
            if not name.startswith(".") and name != _OWN and Path(name).suffix.lower() in _SUFFIXES:
                yield Path(directory, name)


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
    return [_entry(path, number, row) for number, row in enumerate(rows, 1)]


def _entry(table: Path, number: int, row: Mapping[str, Any]) -> Entry:
    where = f"{table.name}, slide {number}"
    told = {name: str(row.get(name) if row.get(name) is not None else "").strip() for name in _COLUMNS}
    if not told["slide_path"]:
        raise ConfigError(f"{where}: expected a slide_path, found none")
    if row.get(None):  # type: ignore[call-overload]  # csv's, of a row that is too long
        raise ConfigError(f"{where}: expected a cell a column, found more; quote what has a comma in it")
    if any(char in told["slide_path"] for char in "\0\n\r"):
        raise ConfigError(f"{where}: expected a slide_path on one line, got {told['slide_path']!r}; check the quotes")
    slide_id = told["slide_id"]
    if slide_id in (".", "..") or any(char in slide_id for char in "/\\") or not slide_id.isprintable():
        raise ConfigError(f"{where}: slide_id must be a plain name, got {slide_id!r}")
    try:
        mpp = float(told["mpp"]) if told["mpp"] else None
        if mpp is not None:
            override(mpp)
    except ValueError as exc:  # a ConfigError is one
        raise ConfigError(f"{where}: mpp must be µm/px such as 0.25, or empty, got {told['mpp']!r}") from exc
    at = locate(told["slide_path"]) if "://" in told["slide_path"] else _beside(table, told["slide_path"])
    path = at.url if isinstance(at, Remote) else os.path.abspath(at)  # noqa: PTH100
    return Entry(slide_id, path, mpp, told["group"], told["sha256"].lower() or None)


def _beside(table: Path, told: str) -> Path:
    place = Path(told)
    with contextlib.suppress(RuntimeError):  # ~ and no user of that name: a file may be called so
        place = place.expanduser()
    return table.absolute().parent / place


def _named(entries: list[Entry]) -> list[Entry]:
    """Give each slide its id: its name, and a tag of its path where the name alone would not tell."""
    twice = [path for path, n in Counter(entry.path for entry in entries).items() if n > 1]
    if twice:
        raise ConfigError(f"{locate(twice[0]).name}: expected each slide once, this one is listed twice")
    names = [entry.slide_id or stem_of(entry.path) for entry in entries]
    times = Counter(name.casefold() for name in names)  # some file systems know one case
    named = []
    for entry, name in zip(entries, names, strict=True):
        n, fits = times[name.casefold()], len(name.encode()) <= _LONGEST_BYTES
        if entry.slide_id and n > 1:
            raise ConfigError(f"slide_id {name!r} is given to {n} slides; each needs one of its own")
        if entry.slide_id and not fits:
            raise ConfigError(f"slide_id must have {_LONGEST_BYTES} bytes at most, got {len(name.encode())}: {name!r}")
        if n > 1 or not fits or not name.strip("."):
            short = name.encode()[:_LONGEST_BYTES].decode(errors="ignore").rstrip(".")
            name = f"{short}-{tag_of(entry.path)}"
        named.append(replace(entry, slide_id=name))
    return named


def as_recorded(entries: Iterable[Entry], records: Mapping[str, Record]) -> list[Entry]:
    """Give a slide the id under which it is on record, where another of its name was listed since, or is no longer.

    One that has the name of another that is done, in another list, gets a tag: neither takes the other's place.
    """
    kept = []
    for entry in entries:
        stem, tag = stem_of(entry.path), tag_of(entry.path)
        tagged = f"{stem}-{tag}"
        own = [name for name in (stem, tagged) if name in records and records[name].place == tag]
        if entry.slide_id in (stem, tagged):
            if own:
                entry = replace(entry, slide_id=own[0])
            elif entry.slide_id in records and _is_another(entry, records[entry.slide_id]):
                entry = replace(entry, slide_id=tagged)
        kept.append(entry)
    return kept


def _is_another(entry: Entry, record: Record) -> bool:
    """Return whether a slide is not the one that was done under its name, which may have been moved."""
    where, size_wh = locate(entry.path), record.told.get("size_wh")
    if record.state != "done" or size_wh is None or not isinstance(where, Path) or where.suffix.lower() in _PICTURES:
        return False
    try:
        return bool(fingerprint(where, tuple(size_wh)) != record.told["fingerprint"])
    except SlideReadError:  # it is not there: what is on record stays so
        return False


def tag_of(path: str) -> str:
    """Return what tells a slide from others of its name, and nothing of where it lies."""
    return hashlib.sha256(os.fsencode(path)).hexdigest()[:_TAG_CHARS]


def stem_of(path: str) -> str:
    """Return the name of a slide's file without what says its kind."""
    where = locate(path)
    # A name that is no text, from another system, would be a record that no JSON can hold.
    stem = where.stem.encode(errors="replace").decode()
    return stem.removesuffix(".ome") if where.suffix.lower() in (".zarr", ".tif", ".tiff") else stem
