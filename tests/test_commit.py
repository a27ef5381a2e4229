"""Files are whole or not there, and what a killed writer left is removed by who comes later."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import slidescan as ss
from slidescan.commit import commit, made, sweep
from slidescan.errors import ResultError
from slidescan.export import write_geojson
from tests.discs import ORACLE

# Writes half a file and is killed at it.
KILLED = """
import os, signal, sys
from pathlib import Path
from slidescan.commit import commit

def half(partial):
    partial.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)

commit(Path(sys.argv[1]), half)
"""

# Writes an export, a file or a directory, and is killed at it.
KILLED_AT_EXPORT = """
import os, signal, sys
from pathlib import Path
import numpy as np
from slidescan.export import ngff, write_geojson

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)
    yield

path, ngff.flush = Path(sys.argv[1]), lambda _: list(die())
if path.suffix == ".geojson":
    write_geojson(path, die())
level, channel = np.ones((1, 2, 2), np.uint16), ngff.Channel("score")
ngff.write_ngff(path, [level], um_per_px=8.0, channels=[channel], name="map")
"""


def whole(partial: Path) -> None:
    partial.write_text("whole")


def killed(path: Path, script: str = KILLED) -> Path:
    """Have a process killed while it writes `path`; return what it left."""
    assert subprocess.run([sys.executable, "-c", script, str(path)], check=False).returncode == -signal.SIGKILL
    (left,) = path.parent.glob(".*")
    return left


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    """The half-written file goes; whole files, also hidden ones, and those of others stay."""
    path = tmp_path / "a.b-3.json"
    commit(path, whole)
    mine = tmp_path / ".mine.partial"
    left = killed(path)
    mine.write_text("mine")
    sweep(tmp_path)
    assert not left.exists()
    assert path.read_text() == "whole"
    assert mine.read_text() == "mine"


@pytest.mark.parametrize("name", ["case.geojson", "map.ome.zarr"])
def test_what_a_killed_export_left_is_gone_after_the_next(tmp_path: Path, name: str) -> None:
    """Beside the same file or another, which may be a directory of the user's own."""
    left = killed(tmp_path / name, KILLED_AT_EXPORT)
    assert left.exists()
    write_geojson(tmp_path / "other.geojson", [])
    assert [path.name for path in tmp_path.iterdir()] == ["other.geojson"]


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    """A sweep at any moment of a write does not touch it."""

    def write(partial: Path) -> None:
        partial.write_text("who")
        sweep(tmp_path)
        with partial.open("a") as file:
            file.write("le")

    commit(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_another_machines_is_swept_after_a_day(tmp_path: Path) -> None:
    """Whether its process lives cannot be seen from here, so only its age tells."""
    left = killed(tmp_path / "a")
    name, place, rest = left.name.split(".")[1], left.name.split(".")[2].split("-")[0], left.name.split("-", 1)[1]
    other = left.rename(tmp_path / f".{name}.{'0' * len(place)}-{rest}")
    sweep(tmp_path)
    assert other.exists()
    day_ago = other.stat().st_mtime - 25 * 3600
    os.utime(other, (day_ago, day_ago))
    sweep(tmp_path)
    assert not other.exists()


def test_a_file_that_was_swept_is_written_again(tmp_path: Path) -> None:
    """A machine that takes the writer for dead costs a second write."""
    written = []

    def write(partial: Path) -> None:
        whole(partial)
        written.append(partial)
        if len(written) == 1:
            partial.unlink()

    commit(tmp_path / "a", write)
    assert (tmp_path / "a").read_text() == "whole"
    assert len(written) == 2


def test_a_directory_that_cannot_be_made_is_one_clear_line(tmp_path: Path) -> None:
    """Said before the work that it is for."""
    assert made(tmp_path / "a/b").is_dir()
    (tmp_path / "file").touch()
    with pytest.raises(ResultError, match=r"cannot be written .*; choose another output directory"):
        made(tmp_path / "file/b")


def test_a_folder_that_is_gone_is_one_clear_line(tmp_path: Path) -> None:
    """Writing again and again does not help there."""
    with pytest.raises(ResultError, match="cannot be written") as caught:
        commit(tmp_path / "gone" / "a", whole)
    assert "\n" not in str(caught.value)
    sweep(tmp_path / "gone")


def test_an_archive_sweeps_before_it_begins(tmp_path: Path) -> None:
    """Its records and tables are written by a process that may be killed; slides sweep for themselves."""
    (tmp_path / "records").mkdir()
    left = [killed(tmp_path / "index.parquet"), killed(tmp_path / "records" / "case.json")]
    ss.scan_archive([], ORACLE, out=tmp_path)
    assert not any(file.exists() for file in left)


@pytest.mark.parametrize("name", ["漢" * 66 + ".json", "a" * 240 + ".json"])
def test_a_long_name_is_written_and_swept(tmp_path: Path, name: str) -> None:
    """Any name that the file system takes: what is added to it while it is written does not count."""
    commit(tmp_path / name, whole)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    left = killed(tmp_path / name)
    sweep(tmp_path)
    assert not left.exists()
