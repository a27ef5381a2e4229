"""The map as OME-NGFF: standard models and readers take it, and its pixels lie where the module says."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from slidescan.errors import ConfigError, ResultError
from slidescan.export.ngff import Channel, read_ngff, write_ngff

CHANNELS = [Channel("score", "FF0000", end=60000), Channel("density", "00ff00", end=500), Channel("coverage", "0000FF")]


def _pyramid(height: int = 700, width: int = 1000, n: int = 3) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    levels = [rng.integers(0, 65536, (3, height, width), np.uint16)]
    levels[0][:, : height // 2] = 0
    for _ in range(n - 1):
        levels.append(levels[-1][:, ::2, ::2])
    return levels


def _write(path: Path, levels: list[np.ndarray], **changes: object) -> None:
    settings = {"um_per_px": 8.0, "channels": CHANNELS, "name": "anomaly", "attributes": {"run": "r1"}, **changes}
    write_ngff(path, levels, **settings)  # type: ignore[arg-type]


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@settings(max_examples=40)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 4))
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, height: int, width: int, n: int) -> None:
    """Any pyramid and its attributes come back as they were."""
    path = tmp_path_factory.getbasetemp() / "round.ome.zarr"
    levels = _pyramid(height, width, n)
    _write(path, levels, attributes={"offset": [1, 2.5], "ø": None})
    out, attributes = read_ngff(path)
    assert attributes == {"offset": [1, 2.5], "ø": None}
    assert len(out) == n
    for expected, actual in zip(levels, out, strict=True):
        np.testing.assert_array_equal(expected, actual)


def test_the_standard_model_accepts_it(tmp_path: Path) -> None:
    """The metadata passes the OME-NGFF 0.5 models, and each array carries the axes' names."""
    from ome_zarr_models.v05 import Image

    _write(tmp_path / "m.ome.zarr", _pyramid(), downsampling="max")
    group = zarr.open_group(tmp_path / "m.ome.zarr", mode="r")
    image = Image.from_zarr(group)
    assert [axis.name for axis in image.attributes.ome.multiscales[0].axes] == ["c", "y", "x"]
    assert image.attributes.ome.multiscales[0].type == "max"
    for k in range(3):
        assert group[str(k)].metadata.dimension_names == ("c", "y", "x")
        assert group[str(k)].chunks == (1, 256, 256)
        assert group[str(k)].shards is None


def test_the_standard_reader_reads_it(tmp_path: Path) -> None:
    """ome-zarr-py gives back the pixels, the transforms and the channels' display."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # third-party deprecations
        from ome_zarr.io import parse_url
        from ome_zarr.reader import Reader

        levels = _pyramid(300, 200)
        _write(tmp_path / "m.ome.zarr", levels, slide_mpp=0.25)
        (node,) = Reader(parse_url(str(tmp_path / "m.ome.zarr")))()
        for expected, actual in zip(levels, node.data, strict=True):
            np.testing.assert_array_equal(expected, np.asarray(actual))
    transforms = node.metadata["coordinateTransformations"]
    assert [t[0]["scale"] for t in transforms] == [[1.0, s, s] for s in (8.0, 16.0, 32.0)]
    assert [t[1]["translation"] for t in transforms] == [[0.0, s, s] for s in (3.875, 7.875, 15.875)]
    assert node.metadata["channel_names"] == ["score", "density", "coverage"]
    assert node.metadata["contrast_limits"] == [[0, 60000], [0, 500], [0, 65535]]


@settings(max_examples=20)
@given(st.floats(0.5, 64), st.floats(0, 0.5), st.integers(0, 3), st.integers(0, 100))
def test_pixels_lie_on_the_slide(
    tmp_path_factory: pytest.TempPathFactory, um_per_px: float, slide_mpp: float, k: int, column: int
) -> None:
    """The centre of a map pixel is the centre of its square of the slide, in the slide's own NGFF frame."""
    path = tmp_path_factory.getbasetemp() / "place.ome.zarr"
    _write(path, _pyramid(8, 8, 4), um_per_px=um_per_px, slide_mpp=slide_mpp)
    ome = json.loads((path / "zarr.json").read_text())["attributes"]["ome"]
    scale, shift = ome["multiscales"][0]["datasets"][k]["coordinateTransformations"]
    from_corner_um = (column + 0.5) * um_per_px * 2**k  # independent: squares tile the slide from its corner
    first_slide_centre_um = slide_mpp / 2
    assert column * scale["scale"][2] + shift["translation"][2] == pytest.approx(from_corner_um - first_slide_centre_um)


def test_metadata_exactly(tmp_path: Path) -> None:
    """The group's metadata is this and nothing else."""
    _write(tmp_path / "m.zarr", [np.ones((1, 4, 4), np.uint16)], channels=[Channel("score", "ff8000", 1, 9)])
    document = json.loads((tmp_path / "m.zarr" / "zarr.json").read_text())
    micrometre = {"type": "space", "unit": "micrometer"}
    transforms = [{"type": "scale", "scale": [1.0, 8.0, 8.0]}, {"type": "translation", "translation": [0.0, 4.0, 4.0]}]
    window = {"min": 0, "max": 65535, "start": 1, "end": 9}
    assert document["attributes"]["ome"] == {
        "version": "0.5",
        "multiscales": [
            {
                "name": "anomaly",
                "axes": [{"name": "c", "type": "channel"}, {"name": "y", **micrometre}, {"name": "x", **micrometre}],
                "datasets": [{"path": "0", "coordinateTransformations": transforms}],
            }
        ],
        "omero": {
            "channels": [{"label": "score", "color": "FF8000", "active": True, "window": window}],
            "rdefs": {"model": "color"},
        },
    }
    assert document["attributes"]["slidescan"] == {"run": "r1"}


def test_bytes_are_the_same_again(tmp_path: Path) -> None:
    """Writing twice gives the same files, and chunks without a value take none."""
    _write(tmp_path / "a.zarr", _pyramid())
    _write(tmp_path / "b.zarr", _pyramid())
    files = _digests(tmp_path / "a.zarr")
    assert files == _digests(tmp_path / "b.zarr")
    assert "0/c/0/0/0" not in files
    assert "0/c/0/2/0" in files


def test_an_old_map_is_replaced_and_a_failure_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new map takes the old one's place whole; if writing fails, the old one stays and nothing is left beside it."""
    path = tmp_path / "m.ome.zarr"
    _write(path, _pyramid(600, 600))
    _write(path, [np.full((3, 4, 4), 7, np.uint16)])
    assert len(read_ngff(path)[0]) == 1

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zarr.Group, "create_array", full)
    with pytest.raises(ResultError, match="the disk is full; free some space"):
        _write(path, _pyramid())
    assert read_ngff(path)[0][0].shape == (3, 4, 4)
    assert [p.name for p in tmp_path.iterdir()] == ["m.ome.zarr"]


def test_what_is_no_map_is_not_overwritten(tmp_path: Path) -> None:
    """A folder of something else at the path is left alone."""
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "thesis.txt").write_text("x")
    with pytest.raises(ResultError, match="move it away"):
        _write(tmp_path / "precious", _pyramid())
    assert (tmp_path / "precious" / "thesis.txt").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"levels": []}, "one or more uint16 levels"),
        ({"levels": [np.zeros((3, 4, 4), np.uint8)]}, "one or more uint16 levels"),
        ({"levels": [np.zeros((2, 4, 4), np.uint16)]}, "3 channels"),
        ({"levels": [np.zeros((3, 8, 8), np.uint16), np.zeros((3, 2, 2), np.uint16)]}, "half the one before"),
        ({"um_per_px": 0.0}, "um_per_px > 0"),
        ({"um_per_px": float("nan")}, "um_per_px > 0"),
        ({"attributes": {"x": float("nan")}}, "JSON can hold"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, changes: dict, message: str) -> None:
    """Input the format cannot hold is an error in one line and leaves nothing behind."""
    settings = {"levels": [np.zeros((3, 4, 4), np.uint16)], **changes}
    with pytest.raises(ConfigError, match=message):
        _write(tmp_path / "m.zarr", settings.pop("levels"), **settings)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("changes", [{"color": "red"}, {"start": 5, "end": 5}, {"end": 70000}])
def test_channels_must_be_displayable(changes: dict) -> None:
    """A colour that is not six hex digits or a window outside its limits is refused."""
    with pytest.raises(ConfigError, match="channel 'score'"):
        Channel("score", **changes)


def test_damage_is_told(tmp_path: Path) -> None:
    """A missing map, broken metadata and a chunk cut short each give one line."""
    path = tmp_path / "m.ome.zarr"
    with pytest.raises(ResultError, match="got none"):
        read_ngff(path)
    _write(path, _pyramid())
    chunk = path / "0" / "c" / "0" / "2" / "0"
    chunk.write_bytes(chunk.read_bytes()[:100])
    with pytest.raises(ResultError, match="scan again"):
        read_ngff(path)
    (path / "zarr.json").write_text("{")
    with pytest.raises(ResultError, match="scan again"):
        read_ngff(path)
