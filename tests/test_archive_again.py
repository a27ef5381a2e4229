"""What a later run, or somebody who looks meanwhile, meets in an archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import slidescan as ss
from slidescan.archive import open_archive
from slidescan.archive.engine import estimate_archive
from slidescan.lease import claimed
from tests.archives import write_slide
from tests.discs import ORACLE, config

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
