"""Zarr slides: both NGFF versions, what is unsafe, and what is missing."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from slidescan.errors import ResolutionError, SlideFormatError, SlideReadError, SlideWarning
from slidescan.geometry import Box
from slidescan.plan import Region, plan
from slidescan.slides import open_slide
from slidescan.slides import zarr as zarr_source
from slidescan.slides.pool import TilePool


@pytest.fixture(params=["0.4", "0.5"])
def path(
    request: pytest.FixtureRequest, tmp_path: Path, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path]
) -> Path:
    """A fresh NGFF slide in each version, to be damaged."""
    return write_ngff(tmp_path / "case.ome.zarr", levels, request.param)


def chunk(path: Path, level: int, c: int, row: int, column: int) -> Path:
    """Return a chunk's file in either version."""
    array = path / str(level)
    return array / ("c" if (array / "zarr.json").exists() else "") / f"{c}/{row}/{column}"


def edit(path: Path, change: Callable[[dict[str, object]], None]) -> None:
    """Rewrite a JSON file."""
    told = json.loads(path.read_text())
    change(told)
    path.write_text(json.dumps(told))


def test_name_scale_and_vendor(path: Path) -> None:
    """The name drops both suffixes and the scale is the first dataset's."""
    slide = open_slide(path)
    assert (slide.name, slide.vendor, slide.backend) == ("case", "ngff", "zarr")
    assert (slide.mpp, slide.mpp_source) == (0.25, "ngff")
    assert slide.levels[0].tile_wh == (128, 128)


@pytest.mark.parametrize("order", [(1, 0), (2, 1, 0), (1, 2, 0)])
def test_the_scale_is_that_of_the_largest_level(path: Path, order: tuple[int, ...]) -> None:
    """Wherever the metadata list it."""

    def change(told: dict[str, Any]) -> None:
        told = told.get("attributes", told)
        (image,) = told.get("ome", told)["multiscales"]
        image["datasets"] = [image["datasets"][k] for k in order]

    edit(path / ("zarr.json" if (path / "zarr.json").is_file() else ".zattrs"), change)
    assert open_slide(path).mpp == 0.25


@pytest.mark.parametrize(("unit", "mpp"), [("angstrom", 2.5e-5), ("furlong DOE", None), (None, None)])
def test_units_that_are_no_length_are_told_without_a_number(path: Path, unit: str | None, mpp: float | None) -> None:
    """And without the unit, which may say anything."""

    def change(told: dict[str, Any]) -> None:
        told = told.get("attributes", told)
        (image,) = told.get("ome", told)["multiscales"]
        for axis in image["axes"][1:]:
            axis["unit"] = unit

    edit(path / ("zarr.json" if (path / "zarr.json").is_file() else ".zattrs"), change)
    slide = open_slide(path)
    assert slide.mpp is None  # or no microscope's
    problem = str(slide.mpp_problem)
    assert ("2.5e-05" if mpp else "not a known length" if unit else "does not say") in problem
    assert "nan" not in problem
    assert "DOE" not in problem


def test_shards_are_read_by_inner_chunks(
    tmp_path: Path, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path]
) -> None:
    """A sharded array reads the same; its tile is the inner chunk; a lost shard is one hole."""
    path = write_ngff(tmp_path / "a.zarr", levels, "0.5", sharded=True)
    slide = open_slide(path)
    assert slide.levels[0].tile_wh == (128, 128)
    assert np.array_equal(slide.read_level(0, 0, 0, 701, 501).rgb, levels[0])
    (path / "0/c/0/1/1").unlink()
    assert slide.read_level(0, 0, 0, 701, 501).holes == (Box(256, 256, 512, 501),)


@pytest.mark.parametrize("options", [{}, {"sharded": True}, {"sharded": True, "compressors": None}], ids=str)
def test_a_chunk_that_was_not_written_is_a_hole(
    tmp_path: Path, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path], options: dict[str, object]
) -> None:
    """In a shard, too, whose file is there: zarr-python would read it as black tissue."""
    pixels = levels[0].copy()
    pixels[128:256, 384:512] = 0  # what is all fill value is not written
    slide = open_slide(write_ngff(tmp_path / "a.zarr", [pixels], "0.5", **options))
    found = slide.read_level(0, 100, 100, 500, 300)
    assert found.holes == (Box(384, 128, 512, 256),)
    assert (found.rgb[28:156, 284:412] == 255).all()
    assert slide.read_level(0, 0, 0, 384, 501).holes == ()


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_scan_decodes_every_chunk_once(
    tmp_path: Path, write_ngff: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, sharded: bool, threads: int
) -> None:
    """Regions overlap, and yet no chunk is decoded twice; the pixels are those of the whole image."""
    image = np.random.default_rng(0).integers(0, 256, (1500, 1600, 3), np.uint8)
    slide = open_slide(write_ngff(tmp_path / "a.zarr", [image], "0.5", sharded=sharded))
    decoded = []
    monkeypatch.setattr(zarr_source, "check_packed", lambda *arguments: decoded.append(arguments))
    tiles = TilePool(80 * 128 * 128 * 3)  # of 156: what no region will want again has to go
    monkeypatch.setattr(zarr_source, "pool", tiles)
    regions = plan(slide.frame, None, tile_px=256, halo_px=56, region_px=500).regions

    def read(region: Region) -> None:
        x0, y0, x1, y1 = region.read.round_out()
        left, top, right, bottom = max(0, x0), max(0, y0), min(x1, 1600), min(y1, 1500)
        inside = slide.read(x0, y0, x1 - x0, y1 - y0, slide.frame).rgb[top - y0 : bottom - y0, left - x0 : right - x0]
        np.testing.assert_array_equal(inside, image[top:bottom, left:right])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, regions))
    assert len(regions) > 9
    assert len(decoded) == 3 * -(-1500 // 128) * -(-1600 // 128)  # a chunk a channel


@given(blocks=st.lists(st.tuples(*[st.integers(0, n) for n in (700, 500, 400, 400)]), max_size=8))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_blocks_anywhere(path: Path, levels: list[NDArray[np.uint8]], blocks: list[tuple[int, int, int, int]]) -> None:
    """Whatever is in the pool from blocks before, px are those of the image."""
    slide = open_slide(path)
    for x, y, width, height in blocks:
        found = slide.read_level(0, x, y, width + 1, height + 1).rgb
        inside = levels[0][y : y + height + 1, x : x + width + 1]
        np.testing.assert_array_equal(found[: len(inside), : inside.shape[1]], inside)


def test_of_a_block_only_what_is_lacking_is_decoded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where that is no rectangle."""
    slide = open_slide(path)
    decoded = []
    monkeypatch.setattr(zarr_source, "check_packed", lambda *arguments: decoded.append(arguments))
    slide.read_level(0, 0, 0, 250, 250)
    assert len(decoded) == 3 * 2 * 2  # a chunk a channel
    slide.read_level(0, 128, 130, 250, 250)
    assert len(decoded) == 3 * (2 * 2 + 2 * 2 - 1)


def test_a_bad_chunk_does_not_fill_the_pool(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a whole image will be wanted again, be it read chunk by chunk or not."""
    monkeypatch.setattr(zarr_source, "pool", TilePool())
    chunk(path, 0, 1, 1, 2).write_bytes(b"")
    assert len(open_slide(path).read_level(0, 0, 0, 701, 501).holes) == 1
    assert zarr_source.pool.kept_bytes == 0


def test_a_chunk_that_comes_late_is_read(path: Path, tmp_path: Path, levels: list[NDArray[np.uint8]]) -> None:
    """A slide that is being copied has holes; they are not remembered."""
    victim, slide = chunk(path, 0, 1, 1, 2), open_slide(path)
    victim.rename(tmp_path / "late")
    assert slide.read_level(0, 200, 100, 300, 200).holes == (Box(256, 128, 384, 256),)
    (tmp_path / "late").rename(victim)
    pixels = slide.read_level(0, 200, 100, 300, 200)
    assert pixels.holes == ()
    assert np.array_equal(pixels.rgb, levels[0][100:300, 200:500])


def test_chunks_too_large_for_the_pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are decoded for each block, and take nothing from others."""
    monkeypatch.setattr(zarr_source, "pool", TilePool())
    image = np.random.default_rng(0).integers(0, 256, (1500, 1500, 3), np.uint8)
    options = {"chunks": (1300, 1300, 3), "dtype": "uint8", "zarr_format": 2}
    zarr.create_array(tmp_path / "a.zarr", shape=image.shape, **options)[:] = image
    slide = open_slide(tmp_path / "a.zarr", mpp=0.25)
    assert np.array_equal(slide.read_level(0, 1200, 1200, 200, 200).rgb, image[1200:1400, 1200:1400])
    assert zarr_source.pool.kept_bytes == 0


@pytest.mark.parametrize("damage", [b"", b"\0\1\2 not compressed data", None], ids=["empty", "garbage", "missing"])
def test_a_bad_chunk_is_a_hole(path: Path, levels: list[NDArray[np.uint8]], damage: bytes | None) -> None:
    """A chunk that is lost or cannot be decoded costs its place only, whichever channel it belongs to."""
    victim = chunk(path, 0, 1, 1, 2)
    if damage is None:
        victim.unlink()
    else:
        victim.write_bytes(damage)
    pixels = open_slide(path).read_level(0, 200, 100, 300, 200)
    assert pixels.holes == (Box(256, 128, 384, 256),)
    assert (pixels.rgb[28:156, 56:184] == 255).all()
    pixels.rgb[28:156, 56:184] = levels[0][128:256, 256:384]
    assert np.array_equal(pixels.rgb, levels[0][100:300, 200:500])


def test_a_vanished_slide_is_an_error(path: Path, tmp_path: Path) -> None:
    """A directory that is gone is unreadable, not black and not full of holes."""
    slide = open_slide(path)
    slide.read_level(0, 0, 0, 10, 10)
    path.rename(tmp_path / "moved.ome.zarr")
    with pytest.raises(SlideReadError, match="the slide is gone"):
        slide.read_level(0, 0, 0, 10, 10)


def test_white_fill_is_glass(tmp_path: Path) -> None:
    """Where the writer leaves out white chunks they are white, and no holes."""
    array = zarr.create_array(
        tmp_path / "a.zarr", shape=(300, 300, 3), chunks=(100, 100, 3), dtype="uint8", fill_value=255, zarr_format=2
    )
    array[:100, :100] = 7
    pixels = open_slide(tmp_path / "a.zarr").read_level(0, 0, 0, 300, 300)
    assert pixels.holes == ()
    assert (pixels.rgb[:100, :100] == 7).all()
    assert (pixels.rgb[100:] == 255).all()


def test_bioformats2raw_layout(
    tmp_path: Path, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path]
) -> None:
    """An image in the numbered group below the root is found."""
    root = tmp_path / "a.zarr"
    zarr.open_group(root, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    write_ngff(root / "0", levels, "0.4")
    label = write_ngff(root / "1", levels[2:], "0.4")
    edit(label / ".zattrs", lambda told: told["multiscales"][0]["datasets"][0].pop("coordinateTransformations"))
    assert open_slide(root).size_wh == (701, 501)
    write_ngff(root / "2", levels, "0.4")
    with pytest.warns(SlideWarning, match="holds 1 more image, not read"):
        open_slide(root)


@pytest.mark.parametrize(("name", "largest"), [("label image", "1"), ("series 0", "1"), ("", "0")])
def test_the_slide_of_several_images_is_no_label(
    tmp_path: Path, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path], name: str, largest: str
) -> None:
    """Some files begin with their label: the largest image that is not called so is the slide."""
    root = tmp_path / "a.zarr"
    zarr.open_group(root, mode="w", zarr_format=2).attrs["bioformats2raw.layout"] = 3
    for n in "01":
        write_ngff(root / n, levels if n == largest else levels[2:], "0.4")
    edit(root / "0/.zattrs", lambda told: told["multiscales"][0].update(name=name))
    slide = open_slide(root) if name == "label image" else None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SlideWarning)
        slide = slide or open_slide(root)
    assert slide.size_wh == (701, 501)


def test_jpeg_chunks_of_a_bare_group(shared: Path) -> None:
    """A group of RGB arrays without NGFF metadata is read, JPEG chunks included, but has no scale."""
    slide = open_slide(shared / "slides/CMU-1-Small-Region-JPEG.zarr")
    assert (slide.size_wh, slide.vendor, slide.mpp) == ((2220, 2967), None, None)
    with pytest.raises(ResolutionError, match="the file does not say"):
        _ = slide.frame


def test_a_codec_that_unpickles_is_refused(path: Path) -> None:
    """Only codecs that yield bytes pass: Zarr v2 can name one that runs code."""

    def change(told: dict[str, object]) -> None:
        if "codecs" in told:
            told["codecs"] = [{"name": "numcodecs.pickle"}]
        else:
            told["filters"] = [{"id": "pickle"}]

    array = path / "0"
    edit(next(p for p in (array / ".zarray", array / "zarr.json") if p.exists()), change)
    with pytest.raises(SlideFormatError, match="unknown codec"):
        open_slide(path)


def test_giant_chunks_are_refused(path: Path) -> None:
    """One chunk that unpacks to gigabytes is refused before it is read."""

    def change(told: dict[str, object]) -> None:
        told["shape"] = [3, 60000, 60000]
        if "chunk_grid" in told:
            told["chunk_grid"] = {"name": "regular", "configuration": {"chunk_shape": [3, 60000, 60000]}}
        else:
            told["chunks"] = [3, 60000, 60000]

    array = path / "0"
    edit(next(p for p in (array / ".zarray", array / "zarr.json") if p.exists()), change)
    with pytest.raises(SlideFormatError, match="one chunk unpacks to"):
        open_slide(path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda m: m.pop("axes"), "metadata is incomplete"),
        (lambda m: m["datasets"][0].pop("coordinateTransformations"), "metadata is incomplete"),
        (lambda m: m["datasets"][0].update(coordinateTransformations=[]), "metadata is incomplete"),
        (lambda m: m["datasets"][0].update(path="../../etc"), "outside the directory"),
        (lambda m: m["datasets"][0].update(path="nothing"), "missing or damaged"),
        (lambda m: m["axes"][0].update(name="q"), "expected the axes c, y and x"),
        (lambda m: m.update(datasets=[]), "metadata is incomplete"),
    ],
)
def test_damaged_metadata_is_one_line(path: Path, change: Callable[[dict[str, object]], object], told: str) -> None:
    """Each way to break the metadata is said, with the slide's name."""

    def apply(document: dict[str, object]) -> None:
        attributes = document.get("attributes", document)
        assert isinstance(attributes, dict)
        change(attributes.get("ome", attributes)["multiscales"][0])

    edit(next(p for p in (path / ".zattrs", path / "zarr.json") if p.exists()), apply)
    with pytest.raises(SlideFormatError, match=told) as caught:
        open_slide(path)
    assert str(caught.value).startswith("case.ome.zarr: ")


@pytest.mark.parametrize(
    "text", ["", "{", "[" * 100_000, "\ufeff{}", '{"a": 1}'], ids=["empty", "open", "deep", "bom", "other"]
)
def test_json_that_is_none(path: Path, text: str) -> None:
    """Broken JSON is a damaged slide, however deep it nests."""
    next(p for p in (path / "0/.zarray", path / "0/zarr.json") if p.exists()).write_text(text)
    with pytest.raises(SlideFormatError, match=r"not valid JSON|missing or damaged"):
        open_slide(path)


def test_units_decide(path: Path) -> None:
    """Without units there is no scale; in millimetres it is converted; an unknown one is no scale."""
    file = next(p for p in (path / ".zattrs", path / "zarr.json") if p.exists())
    for unit, mpp in ((None, None), ("millimeter", 250.0), ("parsec", None), ("nanometer", 0.00025)):

        def change(document: dict[str, object], unit: str | None = unit) -> None:
            attributes = document.get("attributes", document)
            assert isinstance(attributes, dict)
            for axis in attributes.get("ome", attributes)["multiscales"][0]["axes"][1:]:
                axis["unit"] = unit

        edit(file, change)
        slide = open_slide(path)
        assert slide.mpp is None
        assert mpp is None or f"{mpp:.6g}" in str(slide.mpp_problem)
