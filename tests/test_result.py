"""The result directory: loading gives everything back, and what is damaged is refused."""

from __future__ import annotations

import csv
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import slidescan as ss
from slidescan.errors import ConfigError, ResultError
from slidescan.geometry import Box
from slidescan.slides import memory_slide
from tests.archives import write_slide
from tests.discs import MPP, ORACLE, config, discs, tissue


def test_load_result_gives_everything_back(tmp_path: Path) -> None:
    """What is loaded equals what was returned."""
    slide, _ = discs()
    result = ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    loaded = ss.load_result(tmp_path / "case", verify=True)
    np.testing.assert_array_equal(result.detections.xyxy, loaded.detections.xyxy)
    np.testing.assert_array_equal(result.detections.score, loaded.detections.score)
    np.testing.assert_allclose(result.anomaly.score, loaded.anomaly.score, atol=5.1e-5)
    np.testing.assert_array_equal(result.coverage, loaded.coverage)
    assert result.ids == loaded.ids
    ranked, again = ([(r.rank, r.n, r.evidence) for r in each.flagged(5)] for each in (result, loaded))
    assert ranked == again
    assert (result.hotspot, result.config, result.threshold) == (loaded.hotspot, loaded.config, loaded.threshold)
    for key in ("slide", "detector", "config", "versions", "device", "seconds", "peak_rss_mb", "tiles"):
        assert loaded.provenance[key] == result.provenance[key]


@pytest.mark.parametrize("harm", ["truncate", "flip", "remove", "no manifest", "other schema", "no files", "not json"])
def test_a_damaged_result_is_refused(tmp_path: Path, harm: str) -> None:
    """A result whose files are not what the manifest lists is never loaded."""
    slide, _ = discs(n=10)
    out = tmp_path / "case"
    ss.scan(slide, ORACLE, out=out, config=config())
    table, manifest = out / "detections.parquet", out / "manifest.json"
    if harm == "truncate":
        table.write_bytes(table.read_bytes()[:-8])
    elif harm == "flip":
        data = bytearray(table.read_bytes())
        data[len(data) // 2] ^= 1
        table.write_bytes(bytes(data))
    elif harm == "remove":
        shutil.rmtree(out / "anomaly.ome.zarr")
    elif harm == "no manifest":
        manifest.unlink()
    elif harm == "other schema":
        manifest.write_text('{"schema": 99}')
    elif harm == "no files":
        manifest.write_text('{"schema": 1}')
    else:
        manifest.write_text("{")
    with pytest.raises(ResultError, match="case"):
        ss.load_result(out)


def test_a_result_is_told_in_a_line(tmp_path: Path) -> None:
    """And not with all its numbers."""
    slide, _ = discs(n=10)
    assert repr(ss.scan(slide, ORACLE, config=config())) == "ScanResult(not saved, 10 discs at score ≥ 0.50)"
    ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    assert repr(ss.load_result(tmp_path / "case")).startswith("ScanResult('case', 10 discs")


def test_ids_are_stable_and_unique(tmp_path: Path) -> None:
    """The same slide and model give the same ids under other settings; no two rows share one."""
    slide, _ = discs()
    a = ss.scan(slide, ORACLE, config=config())
    b = ss.scan(slide, ORACLE, config=config(tiling__region_px=5000, tiling__shift_px=[31, 7]))
    assert set(a.ids) == set(b.ids)
    assert len(set(a.ids)) == len(a.ids)


def test_a_score_that_is_the_threshold_counts_in_every_format(tmp_path: Path) -> None:
    """0.45 and 0.7 are no float32: the table must not say other rows than the rest."""
    slide, _ = discs(n=10)
    ss.scan(slide, ORACLE, out=tmp_path / "case", config=config())
    result = ss.load_result(tmp_path / "case")
    for threshold in (0.45, 0.7):
        scores = np.full(len(result.detections), threshold, np.float32)
        scores[:3] = threshold - 0.1, threshold + 0.1, threshold - 1e-4
        same = replace(result, detections=replace(result.detections, score=scores))
        kept = same.to_csv(tmp_path / "case.csv", min_score=threshold)
        assert kept == same.to_geojson(tmp_path / "case.geojson", min_score=threshold, what="detections") == 8


def test_nothing_found_is_told_as_something_is(tmp_path: Path) -> None:
    """Tables of an archive are read as one, and what is exported of none is a header."""
    some, none = (ss.scan(discs(n=n)[0], ORACLE, config=config()) for n in (3, 0))
    assert (len(some.table()), len(none.table())) == (3, 0)
    assert none.table().schema == some.table().schema
    assert none.to_csv(tmp_path / "none.csv", only=[]) == 0
    assert (tmp_path / "none.csv").read_text().startswith('"id","x0"')


def test_below_what_was_kept_there_is_nothing(tmp_path: Path) -> None:
    """An export says from which score it has all there was."""
    result = ss.scan(discs(n=3)[0], ORACLE, config=config(**{"detect.min_score": 0.2}))
    for asked, told in ((0.01, 0.2), (0.3, 0.3)):
        result.to_geojson(tmp_path / "case.geojson", min_score=asked)
        assert json.loads((tmp_path / "case.geojson").read_text())["slidescan"]["min_score"] == told


def test_a_name_or_a_score_that_cannot_be_meant(tmp_path: Path) -> None:
    """Nothing is written where the format or the lowest score is none."""
    result = ss.scan(discs(n=10)[0], ORACLE, config=config())
    for score in (-0.1, 1.5, float("nan")):
        for write, name in ((result.to_csv, "case.csv"), (result.to_geojson, "case.geojson")):
            with pytest.raises(ConfigError, match=r"min_score: expected a number from 0 to 1"):
                write(tmp_path / name, min_score=score)
        with pytest.raises(ConfigError, match="top_k: expected a number of regions or detections, got -1"):
            write(tmp_path / name, top_k=-1)
    with pytest.raises(ConfigError, match="what: expected all, detections or regions, got 'region'"):
        result.to_geojson(tmp_path / "case.geojson", what="region")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="n: expected a number"):
        result.flagged(-1)
    with pytest.raises(ConfigError, match=r"case\.geojson: expected a name that ends in \.csv"):
        result.to_csv(tmp_path / "case.geojson")
    assert not list(tmp_path.iterdir())
    n = result.to_geojson(tmp_path / "case.geojson", min_score=result.detections.score[4], what="detections")  # float32
    assert n == result.to_csv(tmp_path / "case.csv", min_score=result.detections.score[4])


@pytest.mark.parametrize(
    "name", ["manifest.json", "flagged.geojson", "anomaly.ome.zarr/zarr.json", "../case/manifest.json"]
)
def test_an_export_never_replaces_what_a_result_is_made_of(tmp_path: Path, name: str) -> None:
    """Another name beside it is one's own."""
    case = tmp_path / "case"
    result = ss.scan(discs(n=3)[0], ORACLE, out=case, config=config())
    before = (case / name).read_bytes()
    with pytest.raises(ConfigError, match="expected a file of your own, got one that the result there is made of"):
        result.to_geojson(case / name)
    assert (case / name).read_bytes() == before
    assert result.to_geojson(case / "mine.geojson")
    assert ss.load_result(case).ids == result.ids


def test_a_table_in_the_frame_of_a_viewer(tmp_path: Path) -> None:
    """A viewer that crops to the scanned bounds finds rows of CSV and objects of GeoJSON in one place."""
    slide, _ = discs(n=1)
    pixels = slide.read_level(0, 0, 0, *slide.size_wh).rgb
    bounded = memory_slide(pixels, MPP, bounds_l0=Box(50, 10, 1900, 1400))
    result = ss.scan(bounded, ORACLE, config=config())
    (row,) = result.detections.xyxy.tolist()
    for origin, (x, y) in (("level0", (0, 0)), ("qupath", (50, 10))):
        result.to_csv(tmp_path / "a.csv", origin=origin)  # type: ignore[arg-type]
        told = next(csv.DictReader((tmp_path / "a.csv").read_text().splitlines()))
        x0, y0, x1, y1 = row
        assert [float(told[key]) for key in ("x0", "y0", "x1", "y1")] == [x0 - x, y0 - y, x1 - x, y1 - y]


def test_a_slide_is_no_result(tmp_path: Path) -> None:
    write_slide(tmp_path / "a.tiff", 1)
    with pytest.raises(ResultError, match=r"a\.tiff: expected a result directory with manifest\.json; that is a file"):
        ss.load_result(tmp_path / "a.tiff")


@pytest.mark.parametrize("below", ["runs", "runs/slides"])
def test_a_folder_of_results_is_told_from_a_scan_that_has_not_finished(tmp_path: Path, below: str) -> None:
    """Who names the folder above is told of what is in it."""
    (tmp_path / "runs").mkdir()
    with pytest.raises(ResultError, match="no scan has finished there"):
        ss.load_result(tmp_path / "runs")
    ss.scan(discs(n=10)[0], ORACLE, out=tmp_path / below / "case", config=config())
    with pytest.raises(ResultError, match=r"of those below it, 1, name one, such as .*/case$"):
        ss.load_result(tmp_path / "runs")


def test_a_manifest_stands_for_its_directory(tmp_path: Path) -> None:
    result = ss.scan(discs(n=3)[0], ORACLE, out=tmp_path / "case", config=config())
    assert ss.load_result(tmp_path / "case" / "manifest.json").ids == result.ids


def test_a_folder_that_is_not_there_is_named_and_nothing_hidden(tmp_path: Path) -> None:
    """Not the file aside that was to be moved."""
    result = ss.scan(discs(n=3)[0], ORACLE, config=config())
    for write, name in ((result.to_csv, "case.csv"), (result.to_geojson, "case.geojson")):
        with pytest.raises(ResultError, match=rf"nowhere/{name}: cannot be written \(No such file or directory\)"):
            write(tmp_path / "nowhere" / name)


def test_a_part_of_flagged_regions_can_be_seen(tmp_path: Path) -> None:
    slide, _ = discs(n=10)
    flagged = ss.scan(slide, ORACLE, config=config()).flagged(5)
    assert flagged[0] is list(flagged)[0]  # noqa: RUF015
    assert [axes.get_title() for axes in flagged[1:2].plot(slide).axes] == [flagged.plot(slide).axes[1].get_title()]


def test_a_plot_takes_a_path(tmp_path: Path) -> None:
    """The slide's own, opened at the scale of the scan."""
    write_slide(tmp_path / "a.tiff", 1, mpp=None)
    result = ss.scan(ss.open_slide(tmp_path / "a.tiff", mpp=0.5), ORACLE, config=config())
    for plot in (result.plot, result.flagged(4).plot):
        of_slide, of_path = (plot(at) for at in (ss.open_slide(tmp_path / "a.tiff", mpp=0.5), str(tmp_path / "a.tiff")))
        assert of_slide._repr_png_() == of_path._repr_png_()


@pytest.mark.parametrize("name", ["S23:101", "a#b?c", os.fsdecode(b"M\xfcller"), "a\nb"])
def test_a_directory_of_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Some of them pyarrow takes for URLs, and some are no text."""
    monkeypatch.chdir(tmp_path)
    slide, _ = discs(n=5, size_wh=(700, 500))
    result = ss.scan(slide, ORACLE, out=name, config=config())
    assert ss.load_result(name).ids == result.ids
    assert result.to_csv(f"{name}.csv") == len(result.found)
    assert Path(f"{name}.csv").read_text().count("\n") == len(result.found) + 1


@pytest.mark.parametrize(
    "out", ["s3://bucket/runs", Path("s3://bucket/runs"), "file:///tmp/runs", "https://x.org/runs"]
)
def test_a_url_is_no_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, out: str | Path) -> None:
    """One of that name would be made here."""
    monkeypatch.chdir(tmp_path)
    slide, _ = discs(n=5, size_wh=(700, 500))
    with pytest.raises(ConfigError, match=r"expected a directory of this machine, got a (s3|file|https) URL"):
        ss.scan(slide, ORACLE, out=out, config=config())
    with pytest.raises(ConfigError, match="expected a directory of this machine"):
        ss.scan_archive([], ORACLE, out=out)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size_wh", [(2001, 1501), (1203, 801), (1999, 1499)])
def test_boxes_end_with_the_slide(size_wh: tuple[int, int]) -> None:
    """Also where the last px of the detector's plane reaches beyond it."""
    _, centers = discs(n=20, size_wh=size_wh)
    edge = np.array([[size_wh[0] - 2.0, 400], [500, size_wh[1] - 2.0]])
    pixels = tissue(size_wh, np.concatenate((centers, edge)))
    found = ss.scan(memory_slide(pixels, 0.2), replace(ORACLE, mpp=0.5), config=config()).detections.xyxy
    assert (found >= 0).all()
    assert (found[:, 2:] <= size_wh).all()
    assert (found[:, 2:] == size_wh).any(0).all()
