"""Which slides lie in a folder or fit a pattern: each once, whatever files it is made of and links lead to it.

Hides the kinds of slides there are, what belongs to another slide, and which DICOM files are one.
"""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from slidescan.errors import ConfigError, SlideWarning
from slidescan.manifest import MANIFEST
from slidescan.slides.dicom import read_instance

__all__ = ["one_a_series", "slides_below", "slides_like"]

# What a folder is searched for: slide formats by the suffix that is opened. A picture is no slide.
_SUFFIXES = frozenset(
    ".svs .tif .tiff .btf .ndpi .mrxs .scn .bif .vms .vmu .svslide .czi .dcm .zarr".split()  # noqa: SIM905  # one line
)
# What lies beside slides and nobody takes for one: lists, annotations, notes.
_TEXTS = frozenset(
    ".csv .tsv .txt .md .json .geojson .gz .xml .html .pdf .xls .xlsx .parquet .yaml .yml .log .license".split()  # noqa: SIM905
)
_MAP = "anomaly.ome.zarr"  # of a result: an archive's output may lie below its slides
_ARCHIVE = {"slides", "records"}  # its folders, beside its log
_LOG = "log.jsonl"
_DEEP = re.compile(r"[/\\]\*\*(?=[/\\]|$)")
_MOST_KINDS = 6  # that are named where files are left out


def slides_below(folder: Path) -> list[Path]:
    """Return the slides below a folder, sorted; warn of pictures, and files of unknown kinds, that are left out.

    Links to folders are followed, each folder once. A Zarr directory is one slide, and so are the files of one DICOM
    series in a folder. What is hidden is nobody's, what is beside a .mrxs is its, and results of slidescan are none.

    Raises
    ------
    ConfigError
        If a folder cannot be read, or there is no slide.
    """
    return _slides(str(folder), _files(folder))


def slides_like(pattern: str) -> list[Path]:
    """Return the slides that fit a pattern, sorted; ``**`` stands for the same folders as `slides_below` searches.

    A pattern that ends in ``*`` takes slides alone, and warns of the rest as `slides_below` does.

    Raises
    ------
    ConfigError
        If a folder cannot be read, or there is no slide.
    """
    once: dict[str, Path] = {}
    for file in sorted(_fitting(os.path.abspath(pattern))):  # noqa: PTH100  # keeps a link a link
        once.setdefault(os.path.join(os.path.realpath(file.parent), file.name), file)  # noqa: PTH118
    if Path(pattern).name in ("*", "**"):
        return _slides(pattern, once.values())
    slides, _ = one_a_series(once.values())
    if not slides:
        raise ConfigError(f"{pattern}: no slide fits this pattern; quote it so that the shell leaves it, and check it")
    return slides


def one_a_series(files: Iterable[Path]) -> tuple[list[Path], int]:
    """Leave of each DICOM slide one file, the first that holds its pixels; count files of other DICOM objects.

    OpenSlide opens all files of a series that lie beside the one it is given. A file that cannot be understood stays,
    to be refused by its name.
    """
    slides: list[Path] = []
    series: dict[tuple[Path, str], tuple[bool, Path]] = {}
    n_other = 0
    for file in files:
        told = read_instance(file) if file.suffix.lower() == ".dcm" else None
        if told is None:
            slides.append(file)
        elif not told.is_slide:
            n_other += 1
        else:
            key, this = (file.parent, told.series), (not told.has_pixels, file)
            series[key] = min(series.get(key, this), this)
    return sorted([*slides, *(file for _, file in series.values())]), n_other


def _slides(where: str, candidates: Iterable[Path]) -> list[Path]:
    """Return the slides among files; warn of the others."""
    files: list[Path] = []
    others: Counter[str] = Counter()
    for file in candidates:
        kind = file.suffix.lower()
        if kind in _SUFFIXES:
            files.append(file)
        elif kind not in _TEXTS:
            others[kind or "without suffix"] += 1
    slides, n_other = one_a_series(files)
    if n_other:
        others[".dcm that are no slides"] = n_other
    most = sorted(others.items(), key=lambda item: (-item[1], item[0]))[:_MOST_KINDS]
    told = ", ".join(f"{n:,} {kind}" for kind, n in most)
    told += ", …" if len(others) > _MOST_KINDS else ""
    if not slides:
        there = f", but {told}" if others else ""
        raise ConfigError(f"{where}: expected slides ({', '.join(sorted(_SUFFIXES))}), found none{there}")
    if others:
        n = f"{len(slides):,} slide{'s' * (len(slides) > 1)}"
        warnings.warn(f"{where}: {n}; left out files of other kinds: {told}", SlideWarning, stacklevel=4)
    return slides


def _fitting(pattern: str) -> Iterator[Path]:
    """Yield what fits and may be a slide; glob's own ``**`` takes for ever where links lead back."""
    above, *below = _DEEP.split(pattern, 1)
    if not below:
        for file in map(Path, glob.iglob(pattern)):  # noqa: PTH207  # it is absolute
            if file.name != _MAP and (file.suffix.lower() == ".zarr" or not os.path.isdir(file)):  # noqa: PTH112
                yield file
        return
    rest = below[0].lstrip(os.sep) or "*"
    for folder in filter(os.path.isdir, map(Path, glob.iglob(above or os.sep))):  # noqa: PTH207
        for directory, zarrs, files in _folders(folder):
            if os.sep in rest:
                yield from _fitting(os.path.join(glob.escape(directory), rest))  # noqa: PTH118
            else:
                names = (name for name in (*zarrs, *files) if not name.startswith("."))
                yield from (Path(directory, name) for name in names if fnmatch.fnmatchcase(name, rest))


def _files(folder: Path) -> Iterator[Path]:
    """Yield what may be a slide below a folder, or is none and may have been meant."""
    for directory, zarrs, files in _folders(folder):
        names = sorted([*zarrs, *files])
        yield from (Path(directory, name) for name in names if not name.startswith("."))


def _folders(folder: Path) -> Iterator[tuple[str, set[str], list[str]]]:
    """Yield the folders that may hold slides, each once, with their Zarr directories and files."""

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
        zarrs = {name for name in below if name.lower().endswith(".zarr")}
        of_mirax = {name[: -len(".mrxs")] for name in files if name.lower().endswith(".mrxs")}
        is_archive = _LOG in files and _ARCHIVE.issubset(below)
        if is_archive or (MANIFEST in files and _MAP in zarrs):
            files = [name for name in files if Path(name).suffix.lower() in _SUFFIXES]
        not_searched = zarrs | of_mirax | (_ARCHIVE if is_archive else set())
        below[:] = sorted(name for name in below if name not in not_searched and not name.startswith("."))
        yield directory, zarrs - {_MAP}, files
