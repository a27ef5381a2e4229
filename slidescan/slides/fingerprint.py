"""Which slide is this, wherever it lies: a digest that is cheap on ten gigabytes.

Hides the sampling. Invariants: independent of path, name and time stamps; a small file is digested whole; a large one
by its size, both ends (where formats keep their tables) and evenly spaced pieces; a directory by its sorted listing
with sizes, and by its metadata files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

from slidescan.errors import SlideReadError
from slidescan.slides.dicom import series_beside
from slidescan.slides.ifd import File, open_file
from slidescan.slides.remote import RemoteFile, Where

__all__ = ["changed", "fingerprint", "stamp", "unchanged"]

_WHOLE_BYTES = 4 << 20  # bytes; up to here everything is read
_END_BYTES = 256 << 10  # bytes at each end; holds the directories of most TIFF files
_PIECE_BYTES = 32 << 10  # bytes
_PIECES = 17  # 0.5 MB in all: a few ms on a local disk, 19 reads on a mount
_INI_BYTES = 64 << 10  # bytes; such a file names a few dozen others
_DEPTH, _MOST_DIRECTORIES, _MOST_ENTRIES = 3, 256, 1000  # of a Zarr, looked at for changes
_META = ("zarr.json", ".zattrs", ".zgroup", ".zarray")


def fingerprint(path: Where, size_wh: tuple[int, int], pieces: Iterable[bytes] | None = None) -> str:
    """Return the sha256 (hex) that identifies the slide at `path`, of `size_wh` level-0 px.

    A file has one digest wherever it is. A directory behind a URL cannot be listed: its reader gives `pieces`, and its
    digest is not that of the same one on a disk.

    Raises
    ------
    SlideReadError
        If the file cannot be read.
    """
    digest = hashlib.sha256(f"slidescan-slide-1 {size_wh[0]}x{size_wh[1]}".encode())
    try:
        if pieces is not None:
            for piece in pieces:
                digest.update(hashlib.sha256(piece).digest())
        elif isinstance(path, Path) and path.is_dir():
            _directory(digest, path)
        elif isinstance(path, Path) and path.suffix.lower() == ".dcm" and (levels := series_beside(path)):
            _levels(digest, levels)
        else:
            _file(digest, open_file(path))
            beside = _beside(path) if isinstance(path, Path) and path.suffix.lower() != ".dcm" else []
            if isinstance(path, Path) and beside:  # MIRAX names the directory after the slide, which is no content
                _files(digest, path.with_suffix("") if path.suffix.lower() == ".mrxs" else path.parent, beside)
    except SlideReadError:
        raise
    except OSError as exc:
        raise SlideReadError(f"{path.name}: cannot be read for its fingerprint ({exc.strerror})") from exc
    return digest.hexdigest()


def stamp(path: Where) -> tuple[int, ...]:
    """Return size and time of change of a slide, of all its files; nothing where there is none, or behind a URL.

    Of a directory with a file a chunk, only the directories near its top are asked. Of DICOM all files in the folder
    are, some of which may be of other slides: their heads would have to be read.
    """
    if not isinstance(path, Path):
        return ()
    try:
        own = path.stat()
        parts = list(islice(_directories(path), _MOST_DIRECTORIES)) if path.is_dir() else _beside(path)
        told = [part.stat() for part in parts]
    except OSError:
        return ()
    more = (len(told), sum(part.st_size for part in told), max(part.st_mtime_ns for part in told)) if told else ()
    return (own.st_size, own.st_mtime_ns, *more)


def unchanged(path: Where, known: tuple[int, ...]) -> None:
    """Make sure that a slide's own file is still what a stamp says of it, if there is one.

    Its other files are not asked: of DICOM there may be a thousand in a folder, and this is done for every region.

    Raises
    ------
    SlideReadError
        If it was cut off, replaced or copied anew.
    """
    if not known or not isinstance(path, Path):
        return
    try:
        own = path.stat()
    except OSError as exc:
        raise changed(path) from exc
    if (own.st_size, own.st_mtime_ns) != known[:2]:
        raise changed(path)


def changed(path: Where) -> SlideReadError:
    """Say that a slide is not what it was when a scan began."""
    return SlideReadError(f"{path.name}: the file changed while it was scanned; scan it again")


def _beside(path: Path) -> list[Path]:
    """Return the files that hold the pixels of a slide whose named file does not, sorted.

    MIRAX keeps them in a directory of its own, Hamamatsu's VMS and VMU in files that they name, DICOM in files beside.
    """
    suffix = path.suffix.lower()
    if suffix == ".dcm":
        with os.scandir(path.parent) as entries:
            return [Path(each.path) for each in islice(entries, _MOST_ENTRIES) if each.name.lower().endswith(".dcm")]
    if suffix == ".mrxs":
        return sorted(item for item in path.with_suffix("").rglob("*") if item.is_file())
    if suffix not in (".vms", ".vmu"):
        return []
    with path.open("rb") as file:
        lines = file.read(_INI_BYTES).decode("latin-1").splitlines()
    names = {line.partition("=")[2].strip() for line in lines}
    return sorted(path.parent / name for name in names if Path(name).name == name and (path.parent / name).is_file())


def _directories(path: Path) -> Iterator[Path]:
    """Yield the directories near the top of one, in a directory of many files those among the first."""
    level = [path]
    for _ in range(_DEPTH):
        below: list[Path] = []
        for directory in level:
            with os.scandir(directory) as entries:
                below += sorted(Path(entry.path) for entry in islice(entries, _MOST_ENTRIES) if entry.is_dir())
        yield from below
        level = below[:_MOST_DIRECTORIES]


def _file(digest: hashlib._Hash, file: File | RemoteFile) -> None:
    digest.update(f"file {file.size}\n".encode())
    spans = [(0, file.size)]
    if file.size > _WHOLE_BYTES:
        inner = file.size - 2 * _END_BYTES - _PIECE_BYTES
        pieces = [(_END_BYTES + inner * i // (_PIECES - 1), _PIECE_BYTES) for i in range(_PIECES)]
        spans = [(0, _END_BYTES), *pieces, (file.size - _END_BYTES, _END_BYTES)]
    file.want(spans)
    for offset, count in spans:
        digest.update(file.read(offset, count))


def _levels(digest: hashlib._Hash, files: Sequence[Path]) -> None:
    """Digest files of one slide, whatever they are called and whichever of them is named."""
    each = []
    for file in files:
        own = hashlib.sha256()
        _file(own, open_file(file))
        each.append(own.digest())
    digest.update(b"".join(sorted(each)))


def _directory(digest: hashlib._Hash, path: Path) -> None:
    _files(digest, path, sorted(item for item in path.rglob("*") if item.is_file()))


def _files(digest: hashlib._Hash, root: Path, files: Sequence[Path]) -> None:
    for item in files:
        digest.update(f"{item.relative_to(root).as_posix()} {item.stat().st_size}\n".encode())
        if item.name in _META:
            digest.update(item.read_bytes())
    # Chunks that are not compressed all have one size: names and sizes alone do not tell two slides apart.
    chunks = [item for item in files if item.name not in _META]
    for item in chunks[:: max(1, len(chunks) // _PIECES)]:
        with item.open("rb") as file:
            digest.update(file.read(_PIECE_BYTES))
