"""Which pages of a TIFF are the slide, which are its levels, and what is told of the others."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray

from slidescan.errors import SlideWarning
from slidescan.slides import open_slide


class TestWhichImage:
    MACRO, MAIN = np.full((256, 300, 3), 40, np.uint8), np.full((900, 1200, 3), 200, np.uint8)

    def ome(self, path: Path, *images: tuple[str, NDArray[np.uint8], float]) -> Path:
        with tifffile.TiffWriter(path, ome=True) as writer:
            for name, pixels, mpp in images:
                told = {"axes": "YXS", "Name": name, "PhysicalSizeX": mpp, "PhysicalSizeY": mpp}
                writer.write(pixels, tile=(128, 128), photometric="rgb", metadata=told)
        return path

    @pytest.mark.filterwarnings("error::slidescan.errors.SlideWarning")
    def test_a_macro_image_before_the_slide_is_not_the_slide(self, tmp_path: Path) -> None:
        """Some exporters write it first; whose slide it is, is on it."""
        images = ("Macro Image", self.MACRO, 16.0), ("label", self.MACRO, 0.25), ("case #1", self.MAIN, 0.25)
        slide = open_slide(self.ome(tmp_path / "a.ome.tiff", *images))
        assert (slide.size_wh, slide.mpp, len(slide.levels)) == ((1200, 900), 0.25, 1)
        assert slide.read_level(0, 0, 0, 9, 9).rgb.min() == 200

    def test_a_second_slide_in_a_file_is_told_of(self, tmp_path: Path) -> None:
        path = self.ome(tmp_path / "a.ome.tiff", ("s1", self.MACRO, 0.25), ("s2", self.MAIN, 0.25))
        with pytest.warns(SlideWarning, match=r"a.ome.tiff: holds 1 more image, not read; export each as a file"):
            assert open_slide(path).size_wh == (1200, 900)

    def test_a_reduced_image_is_not_the_slide(self, tmp_path: Path) -> None:
        """A thumbnail may be the first directory."""
        with tifffile.TiffWriter(tmp_path / "a.tiff") as writer:
            writer.write(self.MAIN[:256, :300], photometric="rgb", subfiletype=1, metadata=None)
            scale = {"resolution": (4e4, 4e4), "resolutionunit": "CENTIMETER"}
            writer.write(self.MAIN, tile=(128, 128), photometric="rgb", metadata=None, **scale)
        slide = open_slide(tmp_path / "a.tiff", backend="tiff")
        assert (slide.size_wh, slide.mpp, len(slide.levels)) == ((1200, 900), 0.25, 1)

    @pytest.mark.parametrize("size", [900, 1200])
    def test_a_second_page_as_large_is_told_of(self, tmp_path: Path, size: int) -> None:
        """It may be the next section, or the slide itself behind its thumbnail; a smaller one is neither."""
        for name, first, second in (("a", self.MAIN[:, :900], self.MAIN[:, :size]), ("b", self.MAIN, self.MACRO)):
            with tifffile.TiffWriter(tmp_path / f"{name}.tiff") as writer:
                for pixels in (first, second):
                    writer.write(pixels, tile=(128, 128), photometric="rgb", metadata=None)
        with pytest.warns(SlideWarning, match="holds 1 more image, not read"):
            open_slide(tmp_path / "a.tiff", mpp=0.25)
        assert open_slide(tmp_path / "b.tiff", mpp=0.25).others == 0

    def test_a_second_slide_without_a_scale_is_told_of(self, tmp_path: Path) -> None:
        with tifffile.TiffWriter(tmp_path / "a.ome.tiff", ome=True) as writer:
            for pixels in (self.MAIN, self.MAIN):
                writer.write(pixels, tile=(128, 128), photometric="rgb", metadata={"axes": "YXS"})
        with pytest.warns(SlideWarning, match="holds 1 more image, not read"):
            open_slide(tmp_path / "a.ome.tiff", mpp=0.25)

    @pytest.mark.filterwarnings("error::slidescan.errors.SlideWarning")
    @pytest.mark.parametrize("ome", [True, False])
    def test_a_level_that_was_not_finished_is_none(self, tmp_path: Path, ome: bool) -> None:
        """Its writer was stopped: what it lacks would be glass, and the tissue there scored by nobody."""
        path = tmp_path / ("a.ome.tiff" if ome else "a.tiff")
        noise = np.random.default_rng(0).integers(0, 200, (1024, 1024, 3), np.uint8)
        with tifffile.TiffWriter(path, ome=ome) as writer:
            for factor in (1, 2, 4):
                writer.write(
                    noise[::factor, ::factor],
                    tile=(128, 128),
                    photometric="rgb",
                    subfiletype=int(factor > 1),
                    subifds=2 if ome and factor == 1 else None,
                    metadata={"axes": "YXS"} if ome and factor == 1 else None,
                )
        assert len(open_slide(path, mpp=0.25, backend="tiff").levels) == 3
        with tifffile.TiffFile(path, mode="r+") as tiff:
            tag = (tiff.pages.first.pages[0] if ome else tiff.pages[1]).tags[325]
            tag.overwrite([0 if i > 9 else n for i, n in enumerate(tag.value)])
        slide = open_slide(path, mpp=0.25, backend="tiff")
        assert [level.size_wh for level in slide.levels] == [(1024, 1024), (256, 256)]
        assert slide.read_level(1, 0, 0, 256, 256).rgb.max() < 200

    def aperio(self, path: Path, lacking: dict[int, list[int]]) -> Path:
        """Write three levels, of which some tiles have no bytes."""
        noise = np.random.default_rng(0).integers(0, 200, (1024, 1024, 3), np.uint8)
        with tifffile.TiffWriter(path) as writer:
            for factor in (1, 2, 4):
                writer.write(
                    noise[::factor, ::factor],
                    tile=(128, 128),
                    photometric="rgb",
                    compression="jpeg",
                    description="Aperio Image Library v11\r\n1024x1024 |AppMag = 40|MPP = 0.25",
                    metadata=None,
                    subfiletype=0,
                )
        with tifffile.TiffFile(path, mode="r+") as tiff:
            for level, tiles in lacking.items():
                tag = tiff.pages[level].tags[325]
                tag.overwrite([0 if i in tiles else n for i, n in enumerate(tag.value)])
        return path

    def test_a_level_that_lacks_tissue_is_openslides(self, tmp_path: Path) -> None:
        """Tiles that only a coarser level lacks are filled from the finer ones, and are no glass."""
        slide = open_slide(self.aperio(tmp_path / "a.svs", {1: [5]}))
        assert slide.backend == "openslide"
        assert slide.read_level(1, 128, 128, 128, 128).rgb.mean() < 150

    def test_glass_is_lacking_on_all_levels(self, tmp_path: Path) -> None:
        slide = open_slide(self.aperio(tmp_path / "a.svs", {0: [18, 19, 26, 27], 1: [5]}))
        assert slide.backend == "tiff"
        assert slide.read_level(1, 128, 128, 128, 128).rgb.min() == 255
