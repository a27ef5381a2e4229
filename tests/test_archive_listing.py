"""What an archive is made of: a table, a folder or a pattern of slides, and what is wrong with one."""

from __future__ import annotations

import csv
import math
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidescan.archive import Entry, read_listing
from slidescan.archive.listing import named
from slidescan.errors import ConfigError
from tests.archives import write_cohort


@pytest.fixture
def cohort(tmp_path: Path) -> Path:
    return write_cohort(tmp_path)


class TestListing:
    def test_formats_agree(self, cohort: Path, tmp_path: Path) -> None:
        entries = read_listing(cohort)
        rows = list(csv.DictReader(cohort.read_text().splitlines()))
        absolute = [{**row, "slide_path": str(cohort.parent / row["slide_path"])} for row in rows]
        lines = ["\t".join(rows[0]), *("\t".join(row.values()) for row in absolute)]
        (tmp_path / "a.tsv").write_text("\n".join(lines))
        table = pa.Table.from_pylist([{**r, "mpp": float(r["mpp"]) if r["mpp"] else None, "more": 7} for r in absolute])
        pq.write_table(table, tmp_path / "a.parquet")
        assert read_listing(tmp_path / "a.tsv") == entries == read_listing(tmp_path / "a.parquet")
        assert [e.slide_id for e in entries][2:] == ["other", "unscaled", "broken", "lost", "unscaled-too"]
        assert entries[3].mpp == 0.5
        assert [e.group for e in entries][:3] == ["north", "south", "south"]

    @pytest.mark.parametrize("name", ["~$case.svs", "~nobody-is-called-so/x.svs"])
    def test_a_name_that_begins_like_a_home_directory(self, tmp_path: Path, name: str) -> None:
        """As of a file that an office program has open: it is what it is called."""
        (tmp_path / "a.csv").write_text(f"slide_path\n{name}\n")
        assert [entry.path for entry in read_listing(tmp_path / "a.csv")] == [str(tmp_path / name)]

    def test_a_home_directory_in_a_table(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A shell would have said what ~ is; in a table nobody did."""
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (tmp_path / "a.csv").write_text("slide_path\n~/case.svs\n")
        assert [entry.path for entry in read_listing(tmp_path / "a.csv")] == [str(tmp_path / "home/case.svs")]

    def test_what_pandas_writes(self, tmp_path: Path) -> None:
        """Whole numbers are floats where one is missing, what is missing is a NaN, and paths may be bytes."""
        columns = {"slide_path": [b"a.svs", b"b.svs"], "slide_id": [1001.0, 1002.0], "group": [17.0, math.nan]}
        pq.write_table(pa.table(columns), tmp_path / "a.parquet")
        read = [(Path(e.path).name, e.slide_id, e.group) for e in read_listing(tmp_path / "a.parquet")]
        assert read == [("a.svs", "1001", "17"), ("b.svs", "1002", "")]
        pq.write_table(pa.table({"slide_path": [b"\xff.svs"]}), tmp_path / "a.parquet")
        with pytest.raises(ConfigError, match=r"a\.parquet, slide 1: expected UTF-8 in column slide_path"):
            read_listing(tmp_path / "a.parquet")

    def test_up_from_a_linked_folder(self, tmp_path: Path) -> None:
        """As the system goes: from where the link leads, not from where it lies."""
        (tmp_path / "real/lists").mkdir(parents=True)
        (tmp_path / "lists").symlink_to(tmp_path / "real/lists")
        (tmp_path / "lists/a.csv").write_text("slide_path\n../slides/case.svs\nnear/../b.svs\n")
        paths = [entry.path for entry in read_listing(tmp_path / "lists/a.csv")]
        assert paths == [str(tmp_path / "real/slides/case.svs"), str(tmp_path / "lists/b.svs")]

    def test_an_id_that_is_the_name_of_another(self) -> None:
        given, other = named([Entry("case", "/a/x.svs"), Entry("", "/b/case.svs")])
        assert given.slide_id == "case"
        assert other.slide_id.startswith("case-")

    @given(st.permutations(range(6)))
    def test_ids_do_not_depend_on_the_order(self, order: list[int]) -> None:
        paths = ["/a/x.svs", "/b/x.svs", "/b/X.svs", "/c/y.ome.tiff", "/c/z.svs", "https://h/p/x.svs?t=1"]
        ids = {entry.path: entry.slide_id for entry in named([Entry("", paths[i]) for i in order])}
        assert ids == {entry.path: entry.slide_id for entry in named([Entry("", path) for path in paths])}
        assert len({name.casefold() for name in ids.values()}) == 6
        assert (ids["/c/y.ome.tiff"], ids["/c/z.svs"]) == ("y", "z")

    @pytest.mark.parametrize(
        ("text", "told"),
        [
            ("path\na.svs\n", "expected a column slide_path, found path"),
            ("", "found no header"),
            ("slide_path\n", "expected slides, found none"),
            ("slide_path;mpp\na.svs;\n", "found slide_path;mpp; columns are separated by commas"),
            ("slide_path,Mpp\na.svs,0.25\n", "column 'Mpp': expected mpp, if that is meant"),
            ("slide_path,slideid\na.svs,x\n", "column 'slideid': expected slide_id"),
            ("slide_path,sha_256,mpp\na.svs,x,\n", "column 'sha_256': expected sha256"),
            ("slide_path,mpp\na.svs,0\n", r"slide 1: mpp must be µm/px .* got '0'"),
            ("slide_path,mpp\na.svs,\nb.svs,fine\n", "slide 2: mpp must be"),
            ("slide_path,slide_id\na.svs,../up\n", "slide_id must be a plain name"),
            ("slide_path,sha256\na.svs,abc\n", "slide 1: sha256 must be 64 hexadecimal digits, or empty, got 'abc'"),
            ("slide_path,slide_id\na.svs,x\nb.svs,x\n", "slide_id 'x' is given to 2 slides"),
            ("slide_path\na.svs\n./a.svs\n", "a.svs: expected each slide once"),
            ("slide_path,group\n,north\n", "slide 1: expected a slide_path"),
            ('slide_path,group\n"a.svs,\nb.svs,\n', r"unexpected end of data: check its quotes"),
            ("slide_path\nA, B.svs\n", "slide 1: expected a cell a column, found more"),
            ('slide_path\n"a.svs\nb.svs"\n', "slide 1: expected a slide_path on one line"),
            ("slide_path\na\0.svs\n", "slide 1: expected a slide_path on one line|line contains NUL"),
        ],
    )
    def test_what_cannot_be_meant(self, tmp_path: Path, text: str, told: str) -> None:
        (tmp_path / "slides.csv").write_text(text)
        with pytest.raises(ConfigError, match=told):
            read_listing(tmp_path / "slides.csv")

    def test_columns_of_ones_own_are_left_alone(self, tmp_path: Path) -> None:
        """Also beside one whose name is alike, and where a table has a column without a name."""
        (tmp_path / "slides.csv").write_text("slide_path,stain,mpp,mpps,MPP,\na.svs,HE,0.25,1,2,3\n")
        (entry,) = read_listing(tmp_path / "slides.csv")
        assert entry.mpp == 0.25

    def test_a_name_that_is_no_text(self, tmp_path: Path) -> None:
        """As from a disk of another system: the id is text, so that records, log and report can tell it."""
        for name in (b"caf\xe9.tiff", b"caf\xe8.tiff"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
        ids = [entry.slide_id for entry in read_listing(tmp_path)]
        assert [name.encode().split(b"-")[0] for name in ids] == [b"caf?"] * 2
        assert len(set(ids)) == 2

    def test_a_name_that_no_file_can_have(self, tmp_path: Path) -> None:
        """A result's directory and its record are called like the slide, and need room for more."""
        for name in ("病" * 80 + ".svs", "below/" + "病" * 80 + ".svs"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        ids = [entry.slide_id for entry in read_listing(tmp_path)]
        assert len(set(ids)) == 2
        assert all(len(name.encode()) < 220 for name in ids)
        assert [entry.slide_id for entry in named(read_listing(tmp_path))] == ids  # as a list that is read is run
        (tmp_path / "slides.csv").write_text("slide_path\n..svs\n")
        assert read_listing(tmp_path / "slides.csv")[0].slide_id.strip(".")
        (tmp_path / "slides.csv").write_text(f"slide_path,slide_id\na.svs,{'x' * 201}\n")
        with pytest.raises(ConfigError, match="slide_id must have 200 bytes at most, got 201"):
            read_listing(tmp_path / "slides.csv")

    def test_nothing_there(self, tmp_path: Path) -> None:
        (tmp_path / "list.xlsx").write_bytes(b"PK")
        (tmp_path / "bad.parquet").write_bytes(b"PAR1")
        for source in (
            tmp_path / "no.csv",
            tmp_path,
            tmp_path / "*.svs",
            tmp_path / "list.xlsx",
            tmp_path / "bad.parquet",
        ):
            with pytest.raises(ConfigError):
                read_listing(source)


def test_a_name_that_would_end_a_line(tmp_path: Path) -> None:
    """Or colour a terminal: the slide has it, no record does."""
    for name in ("a\nb.svs", "a\x1b[31mb.svs"):
        (tmp_path / name).touch()
    told = [entry.slide_id for entry in read_listing(tmp_path)]
    assert sorted(id_.partition("-")[0] for id_ in told) == ["a?[31mb", "a?b"]
