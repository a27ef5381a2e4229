"""What a later run, or somebody who looks meanwhile, meets in an archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import tifffile

import slidescan as ss
from slidescan.archive import Entry, archive_status, open_archive, read_listing
from slidescan.archive.engine import estimate_archive
from slidescan.archive.listing import tag_of
from slidescan.archive.record import Record
from slidescan.archive.run import Run
from slidescan.archive.slide import scan_slide
from slidescan.archive.unfinished import UNFINISHED, begin
from slidescan.errors import ConfigError
from slidescan.export.stored import read_table
from slidescan.lease import claimed
from tests.archives import write_slide
from tests.discs import MPP, ORACLE, config

if TYPE_CHECKING:
    from distributed import Client


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    from distributed import Client, LocalCluster

    with (
        LocalCluster(
            n_workers=1, threads_per_worker=2, processes=False, dashboard_address="127.0.0.1:0", silence_logs=50
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


@pytest.fixture
def two(tmp_path: Path) -> Path:
    """A table of two slides."""
    for seed, name in enumerate("ab"):
        write_slide(tmp_path / f"in/{name}.tiff", seed)
    table = tmp_path / "in/slides.csv"
    table.write_text("slide_path\na.tiff\nb.tiff\n")
    return table


@pytest.mark.parametrize(
    ("url", "reason"), [("htp://nowhere.invalid/x.svs", "unsupported"), ("gs://nowhere/x.svs", "missing_package")]
)
def test_a_row_that_cannot_be_meant_costs_itself_alone(
    two: Path, tmp_path: Path, client: Client, url: str, reason: str
) -> None:
    """A URL of no known kind, or one that needs a package more, fails with its reason; the others are scanned."""
    two.write_text(f"{two.read_text()}{url}\n")
    told = {entry.slide_id: said for entry, said in estimate_archive(two, ORACLE, config=config(), client=client)}
    assert [name for name, said in told.items() if "reason" in said] == ["x"]
    records = ss.scan_archive(two, ORACLE, out=tmp_path / "runs", config=config(), client=client)
    assert [record.state for record in records] == ["done", "done", "failed"]
    assert records[2].reason == told["x"]["reason"] == reason
    assert "://…/x: " in records[2].message


def test_a_slide_that_another_run_has_is_not_among_what_is_done(
    two: Path, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even with its record of before, when a setting was another."""
    out = tmp_path / "runs"
    ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    monkeypatch.setattr("slidescan.archive.slide._UNLOCKED_S", 0)
    with claimed(out / "slides/a"):
        records = ss.scan_archive(two, ORACLE, out=out, config=config(tiling__region_px=500), client=client)
    assert [record.slide_id for record in records] == ["b"]
    records = ss.scan_archive(two, ORACLE, out=out, config=config(tiling__region_px=500), client=client)
    assert [record.slide_id for record in records] == ["a", "b"]


def test_a_damaged_result_is_made_again(two: Path, tmp_path: Path, client: Client) -> None:
    """Of a slide that is looked at once more because its file was touched."""
    out = tmp_path / "runs"
    ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    overview = out / "slides/a/overview.png"
    overview.unlink()
    (two.parent / "a.tiff").touch()
    records = ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    assert [record.state for record in records] == ["done", "done"]
    assert overview.is_file()
    assert len(ss.load_result(out / "slides/a").detections) == 12


def test_a_result_of_other_settings_is_not_taken_for_that_of_the_record(
    two: Path, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is ended between a slide's result and its record leaves a record that is out of date."""
    out, other = tmp_path / "runs", config(flagged__margin_um=3.0)
    ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)

    def ended(self: Run, record: Record) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Run, "keep", ended)
        with pytest.raises(KeyboardInterrupt):
            ss.scan_archive(two, ORACLE, out=out, config=other, client=client)
    ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    assert {ss.load_result(out / "slides" / name).config.flagged.margin_um for name in "ab"} == {
        config().flagged.margin_um
    }


def test_what_was_done_stays_so_when_its_file_is_moved_away(two: Path, tmp_path: Path, client: Client) -> None:
    """To a tape, say; under other settings it is to be done, and cannot be."""
    out = tmp_path / "runs"
    before = ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    (two.parent / "a.tiff").unlink()
    assert ss.scan_archive(two, ORACLE, out=out, config=config(), client=client) == before
    other = config(flagged__margin_um=3.0)
    records = ss.scan_archive(two, ORACLE, out=out, config=other, client=client)
    assert [record.reason for record in records] == ["not_found", None]


def test_a_slide_keeps_its_id_when_another_of_its_name_is_listed(two: Path, tmp_path: Path, client: Client) -> None:
    """And when it is no longer: else it would be on record, and counted, twice."""
    out = tmp_path / "runs"
    first = ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    write_slide(two.parent / "more/a.tiff", 7)
    two.write_text(f"{two.read_text()}more/a.tiff\n")
    records = ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    assert records[:2] == first
    assert archive_status(out).slides == len(open_archive(out)) == 3
    two.write_text("slide_path\nmore/a.tiff\n")
    assert ss.scan_archive(two, ORACLE, out=out, config=config(), client=client) == records[2:]
    looked = ss.review(open_archive(out), slides=two, reviewer="ann")
    item = next(item for item in looked.items() if item.slide_id == records[2].slide_id)
    assert looked.crop(item.id).shape == (256, 256, 3)


def test_lists_with_slides_of_one_name_share_an_output(tmp_path: Path, client: Client) -> None:
    """Neither takes the other's place, whichever is run again; one that was moved is still the same."""
    for site, seed in (("north", 3), ("south", 8)):
        write_slide(tmp_path / site / "case.tiff", seed)
    out = tmp_path / "runs"

    def scanned(site: str) -> list[Record]:
        return ss.scan_archive(tmp_path / site, ORACLE, out=out, config=config(), client=client)

    (north,), (south,) = scanned("north"), scanned("south")
    assert north.slide_id != south.slide_id
    assert (scanned("north"), scanned("south")) == ([north], [south])
    assert archive_status(out).slides == len(open_archive(out)) == 2
    (tmp_path / "north").rename(tmp_path / "moved")
    (moved,) = scanned("moved")
    assert (moved.slide_id, moved.told["fingerprint"]) == (north.slide_id, north.told["fingerprint"])
    assert archive_status(out).slides == 2


@pytest.mark.parametrize("state", ["failed", "killed"])
def test_what_is_not_done_keeps_its_place_beside_another_of_its_name(
    tmp_path: Path, client: Client, state: str
) -> None:
    """Of two lists: the first one's failed, or its run was killed before it was at it."""
    write_slide(tmp_path / "north/case.tiff", 3, mpp=None if state == "failed" else MPP)
    write_slide(tmp_path / "south/case.tiff", 8)
    out = tmp_path / "runs"

    def scanned(site: str) -> list[Record]:
        return ss.scan_archive(tmp_path / site, ORACLE, out=out, config=config(), client=client)

    if state == "failed":
        (north,) = scanned("north")
        assert north.reason == "no_mpp"
    else:
        (out / UNFINISHED).mkdir(parents=True)
        (entry,) = read_listing(tmp_path / "north")
        begin(out, {"case": tag_of(entry.path)}, ["case"], 1)
    scanned("south")
    now = archive_status(out)
    assert (now.slides, now.done, now.left) == (2, 1, int(state == "killed"))
    assert now.failed == ({"no_mpp": 1} if state == "failed" else {})
    scanned("north")
    assert (archive_status(out).slides, archive_status(out).left) == (2, 0)


def test_a_corrected_group_is_that_of_what_is_done(two: Path, tmp_path: Path, client: Client) -> None:
    """Without a scan: in the record, the table and the cohort."""
    rows, out = two.read_text().split()[1:], tmp_path / "runs"
    for group in ("train", "test"):
        two.write_text("\n".join(["slide_path,group", *(f"{row},{group}" for row in rows)]))
        records = ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    assert [record.group for record in records] == ["test", "test"]
    assert set(read_table(out / "index.parquet")["group"].to_pylist()) == {"test"}
    assert [len(open_archive(out).top(100, group=group)) > 0 for group in ("train", "test")] == [False, True]
    assert sum(record.attempts for record in records) == 2
    two.write_text("\n".join(["slide_path", *rows]))  # a list that knows of none takes none away
    assert ss.scan_archive(two, ORACLE, out=out, config=config(), client=client) == records


def test_a_slide_that_vanishes_is_tried_again(two: Path, tmp_path: Path) -> None:
    """Its mount was away, or its worker has none: it was there when it was listed."""
    task = Run(tmp_path / "runs", ORACLE, config(), allow_coarse=False).new_task(read_listing(two)[1])
    (two.parent / "b.tiff").unlink()
    record = scan_slide(task)
    assert (record.reason, record.kind) == ("read_error", "retry")
    assert record.message == "b: its worker finds no slide where there was one; it is tried again"


def test_a_link_to_itself_costs_itself_alone(
    two: Path, tmp_path: Path, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it leads no system can say."""
    monkeypatch.setattr("slidescan.archive.engine._BACKOFF_S", 0.1)
    (two.parent / "loop.svs").symlink_to("loop.svs")
    two.write_text(f"{two.read_text()}loop.svs\n")
    records = ss.scan_archive(two, ORACLE, out=tmp_path / "runs", config=config(), client=client)
    assert [(record.state, record.attempts) for record in records] == [("done", 1), ("done", 1), ("failed", 3)]
    assert str(tmp_path) not in records[2].message


def test_results_below_the_slides_are_no_slides(two: Path, client: Client) -> None:
    """The same command a second time has nothing to do."""
    folder = two.parent
    two.unlink()
    before = ss.scan_archive(folder, ORACLE, out=folder / "runs", config=config(), client=client)
    ss.scan(folder / "a.tiff", ORACLE, out=folder / "one", config=config())
    assert ss.scan_archive(folder, ORACLE, out=folder / "runs", config=config(), client=client) == before


def test_a_list_with_digests_of_files_that_cannot_be_read(two: Path, tmp_path: Path) -> None:
    """A missing slide is not found, and a disk's error may pass."""
    digest = "0" * 64
    two.write_text(f"slide_path,sha256\nnone.svs,{digest}\n/proc/self/mem,{digest}\n")
    records = [
        scan_slide(Run(tmp_path, ORACLE, config(), allow_coarse=False).new_task(entry)) for entry in read_listing(two)
    ]
    assert [record.reason for record in records] == ["not_found", "read_error"]


def test_further_images_of_a_file_are_told(tmp_path: Path, client: Client, recwarn: pytest.WarningsRecorder) -> None:
    """On record, under the slide's id; a warning would name the file."""
    write_slide(tmp_path / "Jane Doe.tiff", 0)
    pixels = tifffile.imread(tmp_path / "Jane Doe.tiff")
    ome = tmp_path / "Jane Doe.ome.tiff"
    with tifffile.TiffWriter(ome, ome=True) as file:
        for name in "xy":
            told = {"Name": name, "axes": "YXS", "PhysicalSizeX": 0.25, "PhysicalSizeY": 0.25}
            file.write(pixels, photometric="rgb", tile=(256, 256), metadata=told)
    table = tmp_path / "slides.csv"
    table.write_text("slide_path,slide_id\nJane Doe.ome.tiff,P1\n")
    (record,) = ss.scan_archive(table, ORACLE, out=tmp_path / "runs", config=config(), client=client)
    assert (record.state, record.reason) == ("done", "more_images")
    assert record.message == "1 more image in its file, not looked at; export each as a file of its own"
    assert not [warning for warning in recwarn if "Doe" in str(warning.message)]


def test_a_line_that_was_cut_off_hides_no_run(two: Path, tmp_path: Path, client: Client) -> None:
    """Even within a letter: the next run begins on a line of its own."""
    out = tmp_path / "runs"
    ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    log = out / "log.jsonl"
    log.write_bytes(log.read_bytes() + '{"event": "slide_failed", "message": "µ'.encode()[:-1])
    assert not archive_status(out).running
    two.write_text(f"{two.read_text()}none.svs\n")
    ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    assert archive_status(out).slides == 3


def test_an_archive_is_reviewed_while_a_slide_is_scanned_anew(two: Path, tmp_path: Path, client: Client) -> None:
    """It has no result just then: the regions are those of the others."""
    out = tmp_path / "runs"
    ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
    before = [each.slide_id for each in open_archive(out).top(100)]
    (out / "slides/a/manifest.json").unlink()  # as the run that scans it anew does first
    archive = open_archive(out)
    assert set(before) == {"a", "b"}
    assert [each.slide_id for each in archive.top(100)] == [slide_id for slide_id in before if slide_id == "b"]
    looked = ss.review(archive, reviewer="ann")
    assert {item.slide_id for item in looked.items()} == {"b"}


def test_a_slide_under_another_id_is_one_slide(two: Path, tmp_path: Path, client: Client) -> None:
    """Who gives ids later has no slide twice in tables and regions; the former result stays on the disk."""
    out = tmp_path / "runs"

    def run() -> list[str]:
        ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)
        assert archive_status(out).slides == 2
        return sorted(read_table(out / "index.parquet")["slide_id"].to_pylist())

    assert run() == ["a", "b"]
    two.write_text("slide_path,slide_id\na.tiff,first\nb.tiff,b\n")
    assert run() == ["b", "first"]
    assert {each.slide_id for each in open_archive(out).top(1000)} == {"b", "first"}
    assert (out / "slides/a/manifest.json").is_file()
    two.write_text("slide_path\na.tiff\nb.tiff\n")
    assert run() == ["a", "b"]
    two.write_text("slide_path\nb.tiff\n")  # what a list leaves out stays
    assert run() == ["a", "b"]


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ([Entry("a", "a.svs"), Entry("A", "b.svs")], "slide_id 'A?a?' is given to 2 slides"),
        ([Entry("up/a", "a.svs")], "slide 1: slide_id must be a plain name, got 'up/a'"),
        ([Entry("a", "a.svs"), Entry("b", "a.svs")], "a.svs: expected each slide once"),
    ],
)
def test_a_list_made_by_hand_is_looked_at_too(tmp_path: Path, entries: list[Entry], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        ss.scan_archive(entries, ORACLE, out=tmp_path / "runs", config=config())
    with pytest.raises(ConfigError, match=told):
        estimate_archive(entries, ORACLE, config=config())


def test_two_lists_that_number_their_slides(two: Path, tmp_path: Path, client: Client) -> None:
    """No list takes the results of another; ids that are exchanged within one are meant, and both done again."""
    out = tmp_path / "runs"

    def run(rows: str, *, dry: bool = False) -> list[Record]:
        two.write_text(f"slide_path,slide_id\n{rows}\n")
        if dry:
            assert not list(estimate_archive(two, ORACLE, out=out, config=config(), client=client))
        return ss.scan_archive(two, ORACLE, out=out, config=config(), client=client)

    run("a.tiff,1")
    before = (out / "slides/1/detections.parquet").read_bytes()
    for dry in (True, False):
        with pytest.raises(ConfigError, match="slide_id '1': expected one that no other slide is done under"):
            run("b.tiff,1", dry=dry)
    assert (out / "slides/1/detections.parquet").read_bytes() == before
    run("a.tiff,1\nb.tiff,2")
    assert [record.state for record in run("a.tiff,2\nb.tiff,1")] == ["done", "done"]
    assert (out / "slides/2/detections.parquet").read_bytes() == before
    # An id that is given is kept, though it is the name of a file of another list.
    run("b.tiff,")
    two.parent.joinpath("c").mkdir()
    write_slide(two.parent / "c/b.tiff", 7)
    run("c/b.tiff,")
    write_slide(two.parent / "b.svs", 8)
    with pytest.raises(ConfigError, match="slide_id 'b': expected one"):
        run("c/b.tiff,1\nb.svs,b")
