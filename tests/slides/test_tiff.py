"""The TIFF reader: right levels, right pixels, nothing decoded that is unsafe, and a bad tile costs itself only."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
import tifffile
from numpy.typing import NDArray
from PIL import Image

from slidescan.errors import SlideFormatError
from slidescan.geometry import Box
from slidescan.slides import open_slide
from slidescan.slides.ifd import File, read_directories
from slidescan.slides.source import Declined

RGB = {256: 256, 257: 256, 258: [8, 8, 8], 262: 2, 277: 3, 322: 256, 323: 256}  # one 256² tile of 8-bit RGB


def tiled(**changes: int) -> dict[int, int | list[int] | bytes]:
    """Tags of a one-tile TIFF whose tile is at byte 8; `changes` like ``t256=0``."""
    tags: dict[int, int | list[int] | bytes] = {**RGB, 259: 8, 324: 8, 325: 100}
    return tags | {int(key[1:]): value for key, value in changes.items()}


class TestAgainstOtherReaders:
    @pytest.mark.parametrize(
        "name",
        [
            "CMU-1-Small-Region.svs",
            "CMU-1-Small-Region.jpeg.tiff",
            "TCGA-CR-7395-01A-01-TS1.svs",
            "prostate_pyramid_badres.tiff",
            "tiny/boxes.tiff",
            "tiny/small_HE_levels.tiff",
            "tiny/small.svs",
        ],
    )
    def test_equals_openslide(self, shared: Path, name: str) -> None:
        """Levels, scale and level-0 pixels are OpenSlide's: measured difference 0 in every px, so none is allowed."""
        ours, other = (open_slide(shared / "slides" / name, backend=backend) for backend in ("tiff", "openslide"))
        assert [level.size_wh for level in ours.levels] == [level.size_wh for level in other.levels]
        assert (ours.mpp, ours.mpp_source, ours.fingerprint) == (other.mpp, other.mpp_source, other.fingerprint)
        width, height = ours.size_wh
        block = (width // 3, height // 3, min(1000, width), min(1000, height))
        assert np.array_equal(ours.read_level(0, *block).rgb, other.read_level(0, *block).rgb)

    @pytest.mark.parametrize(
        "name", ["XYC_JPEG.ome.tiff", "XYC_JPEG-2000.ome.tiff", "XYC_LZW.ome.tiff", "XYC_zlib.ome.tiff"]
    )
    def test_ome_tiff_equals_tifffile(self, shared: Path, name: str) -> None:
        """Each codec of Bio-Formats gives tifffile's pixels, and the lossless ones the original grid."""
        path = shared / "slides/ometiff_xyc" / name
        slide = open_slide(path)
        assert (slide.backend, slide.vendor, slide.mpp) == ("tiff", "ome", None)
        rgb = slide.read_level(0, 0, 0, 512, 512).rgb
        assert np.array_equal(rgb, tifffile.imread(path))
        if "XYC_JPEG.ome" not in name:
            assert np.array_equal(rgb, np.asarray(Image.open(shared / "slides/XYC_coordinate_grid.png")))

    def test_one_image_in_four_containers(self, shared: Path) -> None:
        """The same scan as SVS, Zarr and DICOM: equal where it was copied, close where it was coded again."""
        names = ["CMU-1-Small-Region.svs", "CMU-1-Small-Region-JPEG.zarr", "CMU-1-Small-Region.jp2.tiff"]
        svs, copied, coded = (open_slide(shared / "slides" / n).read_level(0, 300, 400, 900, 800).rgb for n in names)
        assert np.array_equal(svs, copied)
        assert np.abs(svs.astype(int) - coded).mean() < 2

    def test_strips_read_like_tiles(self, shared: Path) -> None:
        """A small file in strips is read with the scale of its resolution tag."""
        slide = open_slide(shared / "slides/XYC-half-mpp.tiff")
        grid = np.asarray(Image.open(shared / "slides/XYC_coordinate_grid.png"))
        assert slide.mpp == 0.5
        assert np.array_equal(slide.read(100, 90, 200, 300, slide.frame).rgb, grid[90:390, 100:300])

    def test_label_and_macro_are_never_levels(self, shared: Path) -> None:
        """The SVS has thumbnail, label and macro directories; the slide has one level."""
        path = shared / "slides/CMU-1-Small-Region.svs"
        assert len(read_directories(File(path))) == 4
        assert len(open_slide(path).levels) == 1


class TestCodecs:
    @pytest.mark.parametrize(
        "options",
        [
            {"compression": None},
            {"compression": "lzw"},
            {"compression": "lzw", "predictor": True},
            {"compression": "zlib", "predictor": True},
            {"compression": "packbits"},
            {"compression": "zstd"},
            {"compression": "jpeg2000"},
            {"compression": None, "bigtiff": True},
            {"compression": "lzw", "byteorder": ">"},
            {"compression": "zlib", "tile": None, "rowsperstrip": 33},
        ],
        ids=str,
    )
    def test_lossless_ones_are_exact(
        self, tmp_path: Path, levels: list[NDArray[np.uint8]], options: dict[str, object]
    ) -> None:
        """What a writer stores losslessly is read back exactly, in either byte order and size."""
        path = tmp_path / "a.tiff"
        tifffile.imwrite(path, levels[0], **{"tile": (128, 128), "photometric": "rgb", "metadata": None, **options})
        slide = open_slide(path, backend="tiff")
        assert np.array_equal(slide.read_level(0, 0, 0, 701, 501).rgb, levels[0])
        assert np.array_equal(slide.read_level(0, 200, 100, 300, 301).rgb, levels[0][100:401, 200:500])

    @pytest.mark.parametrize(
        "options",
        [
            {"compression": None},
            {"compression": "lzw", "predictor": True},
            {"compression": "zlib", "tile": None, "rowsperstrip": 33},
            {"compression": "zstd"},
            {"compression": "jpeg2000"},
            {"compression": "jpeg", "compressionargs": {"level": 80}},
        ],
        ids=str,
    )
    @pytest.mark.parametrize("ome", [False, True])
    def test_separate_planes_are_put_together(
        self, tmp_path: Path, levels: list[NDArray[np.uint8]], options: dict[str, object], ome: bool
    ) -> None:
        """Each colour in tiles of its own, as Bio-Formats writes it, is the same picture."""
        path = tmp_path / "a.tiff"
        more = {"metadata": {"axes": "CYX"} if ome else None, "planarconfig": "separate", "ome": ome}
        planes = np.ascontiguousarray(levels[0].transpose(2, 0, 1))
        tifffile.imwrite(path, planes, **{"tile": (128, 128), "photometric": "rgb", **more, **options})
        slide = open_slide(path, backend="tiff")
        seen = slide.read_level(0, 200, 100, 300, 301)
        assert (seen.holes, slide.vendor) == ((), "ome" if ome else "generic-tiff")
        assert np.array_equal(seen.rgb, tifffile.imread(path)[:, 100:401, 200:500].transpose(1, 2, 0))
        if options["compression"] in (None, "lzw") and not ome:  # OpenSlide reads no zstd, no strips
            other = open_slide(path, backend="openslide").read_level(0, 200, 100, 300, 301)
            assert np.array_equal(seen.rgb, other.rgb)

    def test_a_tile_without_one_of_its_planes_is_a_hole(self, tmp_path: Path) -> None:
        """Without any it is glass."""
        path = tmp_path / "a.tiff"
        planes = np.full((3, 128, 384), 77, np.uint8)
        tifffile.imwrite(path, planes, tile=(128, 128), photometric="rgb", planarconfig="separate", metadata=None)
        with tifffile.TiffFile(path, mode="r+") as tiff:
            counts = tiff.pages[0].tags[325]
            counts.overwrite([n if i not in (0, 3, 6, 5) else 0 for i, n in enumerate(counts.value)])
        seen = open_slide(path, backend="tiff").read_level(0, 0, 0, 384, 128)
        assert seen.holes == (Box(256, 0, 384, 128),)
        assert (seen.rgb[:, :128] == 255).all()
        assert (seen.rgb[:, 128:256] == 77).all()

    @pytest.mark.parametrize("planes", ["contig", "separate"])
    @pytest.mark.parametrize("alpha", ["UNASSALPHA", "ASSOCALPHA"])
    def test_transparency_becomes_white(self, tmp_path: Path, alpha: str, planes: str) -> None:
        """Both kinds of alpha in a TIFF are laid over white."""
        rgba = np.zeros((256, 256, 4), np.uint8)
        rgba[:, 128:] = (10, 20, 30, 255)
        path = tmp_path / "a.tiff"
        data = rgba if planes == "contig" else rgba.transpose(2, 0, 1)
        told = {"planarconfig": planes, "extrasamples": [alpha], "metadata": None}
        tifffile.imwrite(path, data, tile=(128, 128), photometric="rgb", **told)
        rgb = open_slide(path, backend="tiff").read_level(0, 0, 0, 256, 256).rgb
        assert (rgb[:, :128] == 255).all()
        assert (rgb[:, 128:] == (10, 20, 30)).all()

    def test_aperio_ycbcr_jpeg2000_is_converted(self, tmp_path: Path, raw_tiff: Callable[..., bytes]) -> None:
        """Compression 33003 in an Aperio file holds YCbCr that its codestream does not declare; OpenSlide agrees."""
        y, x = np.mgrid[0:256, 0:256].astype(np.uint8)
        rgb = np.stack([x, y, 255 - x // 2], axis=2)
        ycbcr = np.asarray(Image.fromarray(rgb).convert("YCbCr"))
        data = imagecodecs.jpeg2k_encode(ycbcr, codecformat="J2K", mct=False, reversible=True, level=0)
        path = tmp_path / "a.svs"
        told = {270: b"Aperio Image Library|MPP = 0.5|\0", 259: 33003, 324: 8, 325: len(data)}
        path.write_bytes(raw_tiff(RGB | told, data))
        seen, other = (open_slide(path, backend=b).read_level(0, 0, 0, 256, 256).rgb for b in ("tiff", "openslide"))
        assert np.abs(seen.astype(int) - rgb).max() <= 3
        assert np.abs(seen.astype(int) - other).max() <= 2

    @pytest.mark.parametrize(
        ("array", "options", "told"),
        [
            (np.zeros((256, 256), np.uint8), {"photometric": "minisblack"}, "expected RGB, found 1 channels"),
            (np.zeros((256, 256, 3), np.uint16), {"photometric": "rgb"}, "expected 8-bit colour, found 16 bits"),
            (np.zeros((256, 256, 5), np.uint8), {"photometric": "rgb"}, "expected RGB, found 5 channels"),
        ],
    )
    def test_other_than_rgb_is_refused(
        self, tmp_path: Path, array: NDArray[np.uint8], options: dict[str, object], told: str
    ) -> None:
        """Grey, 16-bit and many-channel images are refused by name, not shown as something else."""
        path = tmp_path / "a.tiff"
        tifffile.imwrite(path, array, tile=(128, 128), metadata=None, **options)
        with pytest.raises(SlideFormatError, match=told):
            open_slide(path)


class TestBadTiles:
    def test_an_offset_beyond_counting_is_a_hole(self, tmp_path: Path, raw_tiff: Callable[..., bytes]) -> None:
        """Of 64 bits with the first one set."""
        pixels = np.zeros((256, 512, 3), np.uint8)
        tifffile.imwrite(tmp_path / "a.tiff", pixels, tile=(256, 256), photometric="rgb", bigtiff=True, metadata=None)
        with tifffile.TiffFile(tmp_path / "a.tiff", mode="r+") as tiff:
            tag = tiff.pages[0].tags[324]
            tag.overwrite([tag.value[0], tag.value[1] | 1 << 63])
        assert open_slide(tmp_path / "a.tiff", backend="tiff").read_level(0, 0, 0, 512, 256).holes == (
            Box(256, 0, 512, 256),
        )

    @pytest.mark.parametrize("backend", ["tiff", "openslide"])
    @pytest.mark.parametrize("name", ["tile50_half_zeroed", "tile50_length_past_eof"])
    def test_cost_themselves_only(self, shared: Path, name: str, backend: str) -> None:
        """The damaged tile is one hole, white, and every other px is untouched."""
        good = open_slide(shared / "slides/CMU-1-Small-Region.svs").read_level(0, 0, 1000, 800, 600).rgb
        slide = open_slide(shared / f"broken/svs_mutations/{name}.svs", backend=backend)
        pixels = slide.read(0, 1000, 800, 600, slide.frame)
        assert pixels.holes == (Box(0, 1200, 240, 1440),)
        assert (pixels.rgb[200:440, :240] == 255).all()
        pixels.rgb[200:440, :240] = good[200:440, :240]
        assert np.array_equal(pixels.rgb, good)

    @pytest.mark.parametrize("backend", ["tiff", "openslide"])
    def test_of_zero_length_are_glass(self, shared: Path, backend: str) -> None:
        """Aperio leaves out tiles of glass: white, and no hole."""
        slide = open_slide(shared / "broken/svs_mutations/tile50_zero_length.svs", backend=backend)
        pixels = slide.read(0, 1200, 240, 240, slide.frame)
        assert pixels.holes == ()
        assert (pixels.rgb == 255).all()

    def test_a_stream_of_another_size_is_a_hole(self, tmp_path: Path, raw_tiff: Callable[..., bytes]) -> None:
        """A JPEG that claims more px than its tile is never handed to the decoder."""
        good = imagecodecs.jpeg8_encode(np.zeros((256, 256, 3), np.uint8))
        huge = imagecodecs.jpeg8_encode(np.zeros((16, 16, 3), np.uint8)).replace(
            struct.pack(">HH", 16, 16), struct.pack(">HH", 65500, 65500)
        )
        path = tmp_path / "a.tiff"
        tags = RGB | {256: 512, 259: 7, 262: 6, 324: [8, 8 + len(good)], 325: [len(good), len(huge)]}
        path.write_bytes(raw_tiff(tags, good + huge))
        assert open_slide(path, backend="tiff").read_level(0, 0, 0, 512, 256).holes == (Box(256, 0, 512, 256),)

    def test_a_deflate_stream_cannot_grow(self, tmp_path: Path, raw_tiff: Callable[..., bytes]) -> None:
        """A stream that unpacks to more than its tile stops there or fails; memory stays bounded."""
        good = zlib.compress(bytes(256 * 256 * 3))
        bomb = zlib.compress(bytes(64 << 20))
        path = tmp_path / "a.tiff"
        tags = RGB | {256: 512, 259: 8, 324: [8, 8 + len(good)], 325: [len(good), len(bomb)]}
        path.write_bytes(raw_tiff(tags, good + bomb))
        pixels = open_slide(path, backend="tiff").read_level(0, 0, 0, 512, 256)
        assert (pixels.rgb[:, :256] == 0).all()
        assert pixels.holes in ((), (Box(256, 0, 512, 256),))


class TestUnsafeStructure:
    @pytest.mark.parametrize("backend", ["auto", "tiff", "openslide"])
    @pytest.mark.parametrize(
        ("tags", "told"),
        [
            (tiled(t256=16384, t257=16384, t322=16384, t323=16384), "one tile unpacks to 16384 × 16384 px"),
            (tiled(t256=0), "image size 0 × 256 px"),
            (tiled(t256=65535), "256 × 1 tiles are needed for 65535 × 256 px, 1 are listed"),
            (tiled(t322=0), "tile size 0 × 256 px"),
            (tiled(t256=(1 << 32) - 1), "image size 4294967295 × 256 px"),
        ],
        ids=["bomb", "no width", "wide", "no tile", "wider than possible"],
    )
    def test_is_refused_before_decoding(
        self,
        tmp_path: Path,
        raw_tiff: Callable[..., bytes],
        backend: str,
        tags: dict[int, int | list[int] | bytes],
        told: str,
    ) -> None:
        """Whatever reader is asked for, sizes that lie or explode are named before a px is decoded."""
        path = tmp_path / "bomb.tiff"
        path.write_bytes(raw_tiff(tags, bytes(100)))
        with pytest.raises(SlideFormatError, match=told):
            open_slide(path, backend=backend)

    def test_large_images_without_tiles_are_refused(self, tmp_path: Path, raw_tiff: Callable[..., bytes]) -> None:
        """Strips span the width: such an image must be small."""
        tags = {256: 20000, 257: 20000, 258: [8, 8, 8], 259: 8, 262: 2, 277: 3, 278: 2000}
        path = tmp_path / "a.tiff"
        path.write_bytes(raw_tiff(tags | {273: [8] * 10, 279: [100] * 10}, bytes(100)))
        with pytest.raises(SlideFormatError, match="without tiles"):
            open_slide(path)

    def test_tags_that_point_outside_are_refused(self, tmp_path: Path, raw_tiff: Callable[..., bytes]) -> None:
        """A table longer than the file is damage, and is not allocated."""
        data = bytearray(raw_tiff(tiled(), bytes(100)))
        at = data.index(struct.pack("<HH", 324, 4))
        data[at + 4 : at + 12] = struct.pack("<II", 0x3FFFFFFF, 8)
        path = tmp_path / "a.tiff"
        path.write_bytes(data)
        with pytest.raises(SlideFormatError, match="1 × 1 tiles are needed for 256 × 256 px, 0 are listed"):
            open_slide(path)

    def test_ndpi_is_left_to_openslide(self, shared: Path) -> None:
        """Hamamatsu stores 64-bit offsets in a 32-bit layout; only OpenSlide reads it."""
        path = shared / "slides/test3-DAPI-2-387.ndpi"
        with pytest.raises(Declined, match="needs OpenSlide"):
            open_slide(path, backend="tiff")
        slide = open_slide(path)
        assert (slide.backend, slide.vendor, slide.mpp_source) == ("openslide", "hamamatsu", "openslide")
        assert [level.downsample for level in slide.levels] == [1, 2, 4, 8, 16, 32, 64]


class TestOme:
    HEAD = '<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06"><Image ID="Image:0">'

    def write(self, path: Path, pixels: str, raw_tiff: Callable[..., bytes], before: str = "") -> Path:
        text = f"{before}{self.HEAD}{pixels}</Image></OME>\0".encode()
        data = zlib.compress(bytes(256 * 256 * 3))
        path.write_bytes(raw_tiff(RGB | {259: 8, 270: text, 324: 8, 325: len(data)}, data))
        return path

    def test_a_namespace_with_a_prefix(
        self, tmp_path: Path, raw_tiff: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pixels = '<Pixels SizeC="3" SizeT="1" SizeZ="1" Type="uint8" PhysicalSizeX="0.25" PhysicalSizeY="0.25"/>'
        monkeypatch.setattr(self, "HEAD", self.HEAD.replace("<OME xmlns=", "<ome:OME xmlns:ome="), raising=False)
        text = f"{self.HEAD}{pixels}</Image></ome:OME>\0".encode()
        data = zlib.compress(bytes(256 * 256 * 3))
        (tmp_path / "a.tiff").write_bytes(raw_tiff(RGB | {259: 8, 270: text, 324: 8, 325: len(data)}, data))
        slide = open_slide(tmp_path / "a.tiff")
        assert (slide.mpp, slide.mpp_source, slide.vendor) == (0.25, "ome-xml", "ome")

    @pytest.mark.parametrize(
        ("scale", "mpp"),
        [
            ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
            ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="250" PhysicalSizeYUnit="nm"', 0.25),
            ('PhysicalSizeX="0.25" PhysicalSizeXUnit="pixel" PhysicalSizeY="0.25" PhysicalSizeYUnit="pixel"', None),
            ('PhysicalSizeX="0.25" PhysicalSizeXUnit="DOE" PhysicalSizeY="0.25"', None),
            ('PhysicalSizeX="2500" PhysicalSizeXUnit="Å" PhysicalSizeY="0.25" PhysicalSizeYUnit="μm"', 0.25),
            ('PhysicalSizeX="DOE" PhysicalSizeY="JANE"', None),
            ("", None),
        ],
    )
    def test_scale_and_units(
        self, tmp_path: Path, raw_tiff: Callable[..., bytes], scale: str, mpp: float | None
    ) -> None:
        """µm are the default, other lengths are converted, and a unit that is no length gives no scale."""
        pixels = f'<Pixels SizeC="3" SizeT="1" SizeZ="1" Type="uint8" {scale}><TiffData IFD="0"/></Pixels>'
        slide = open_slide(self.write(tmp_path / "a.ome.tiff", pixels, raw_tiff))
        assert slide.name == "a"
        assert slide.mpp == (None if mpp is None else pytest.approx(mpp))
        assert "DOE" not in str(slide.mpp_problem)
        assert "nan" not in str(slide.mpp_problem)

    @pytest.mark.parametrize(
        ("pixels", "before", "told"),
        [
            ('<Pixels SizeC="5" SizeT="1" SizeZ="1" Type="uint8"/>', "", "found sizes Z 1, C 5, T 1"),
            ('<Pixels SizeC="3" SizeT="1" SizeZ="9" Type="uint8"/>', "", "found sizes Z 9"),
            ('<Pixels SizeC="3" Type="uint8"><TiffData IFD="7"/></Pixels>', "", "not there"),
            ("<Pixels", "", "cannot be parsed"),
            ("", "", "describes no image"),
            ("<Pixels/>", '<!DOCTYPE a [<!ENTITY b "c">]>', "document type"),
            (
                "<Pixels><TiffData><UUID>a</UUID></TiffData><TiffData><UUID>b</UUID></TiffData></Pixels>",
                "",
                "several files",
            ),
        ],
    )
    def test_what_is_no_single_rgb_image_is_refused(
        self, tmp_path: Path, raw_tiff: Callable[..., bytes], pixels: str, before: str, told: str
    ) -> None:
        """Stacks, channels, several files and unsafe XML are refused in one line."""
        with pytest.raises(SlideFormatError, match=told):
            open_slide(self.write(tmp_path / "a.ome.tiff", pixels, raw_tiff, before))
