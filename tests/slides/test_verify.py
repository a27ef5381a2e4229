"""`verify=True`: the fast reader is compared with OpenSlide, and steps back where it is wrong."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from slidescan.errors import SlideWarning
from slidescan.slides import open_slide
from slidescan.slides.codecs import Codec


@pytest.fixture(autouse=True)
def no_other_warnings() -> None:
    warnings.simplefilter("error", SlideWarning)


@pytest.mark.parametrize(
    "name", ["CMU-1-Small-Region.svs", "CMU-1-Small-Region.jpeg.tiff", "TCGA-CR-7395-01A-01-TS1.svs", "tiny/small.svs"]
)
def test_real_slides_agree(shared: Path, name: str) -> None:
    assert open_slide(shared / "slides" / name, verify=True).backend == "tiff"


def test_wrong_colours_are_noticed(files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Red and blue exchanged in one tile of many is enough, and the slide is right wherever it travels."""
    decode = Codec.decode

    def wrong(self: Codec, data: bytes, need_wh: tuple[int, int]) -> NDArray[np.uint8]:
        return decode(self, data, need_wh)[..., ::-1]

    right = open_slide(files["tiff"]).read_level(0, 0, 0, 701, 501).rgb
    monkeypatch.setattr(Codec, "decode", wrong)
    with pytest.warns(SlideWarning, match=r"differs from OpenSlide by \d+\.\d grey levels at") as told:
        slide = open_slide(files["tiff"], verify=True)
    assert str(files["tiff"].parent) not in str(told[0].message)
    for opened in (slide, pickle.loads(pickle.dumps(slide))):
        assert opened.backend == "openslide"
        assert np.array_equal(opened.read_level(0, 0, 0, 701, 501).rgb, right)


def test_what_cannot_be_compared_is_said(tmp_path: Path, levels: list[NDArray[np.uint8]]) -> None:
    tifffile.imwrite(tmp_path / "strips.tiff", levels[0], photometric="rgb", rowsperstrip=16)
    with pytest.warns(SlideWarning, match="not verified: OpenSlide cannot open it"):
        assert open_slide(tmp_path / "strips.tiff", verify=True).backend == "tiff"


def test_a_bad_tile_is_no_difference(
    tmp_path: Path, levels: list[NDArray[np.uint8]], write_tiff: Callable[..., Path]
) -> None:
    path = write_tiff(tmp_path / "case.tiff", levels, compression="jpeg")
    content = bytearray(path.read_bytes())
    at = content.index(b"\xff\xd8", len(content) // 3)
    content[at : at + 40] = bytes(40)
    path.write_bytes(bytes(content))
    slide = open_slide(path, verify=True)
    assert slide.backend == "tiff"
    assert slide.read_level(0, 0, 0, 701, 501).holes
