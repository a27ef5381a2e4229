"""Planes are exact: where a px lies, how adjacent reads agree, and what transparency, colour and holes become."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image, ImageCms

from slidescan.errors import ConfigError, ResolutionError, SlideFormatError
from slidescan.geometry import Box, Frame
from slidescan.slides import Facts, Slide, memory_slide, open_slide
from slidescan.slides.resample import resample
from slidescan.slides.resolution import judge
from slidescan.slides.source import Level, composite, downsample_of, pyramid


def ramp(width: int, height: int, step: int = 1) -> NDArray[np.uint8]:
    """Red counts columns and green rows: a colour says where the px came from. Averages of `step` px keep that true."""
    y, x = np.mgrid[0:height, 0:width].astype(float) * step + (step - 1) / 2
    return np.stack([x, y, np.zeros_like(x)], axis=2).round().clip(0, 255).astype(np.uint8)


class TestWhereAPixelLies:
    @given(
        mpp=st.floats(0.11, 6.0),
        pyramidal=st.booleans(),
        x=st.integers(-5, 200),
        y=st.integers(-5, 150),
    )
    @settings(max_examples=80)
    def test_to_half_a_pixel(self, mpp: float, pyramidal: bool, x: int, y: int) -> None:
        """The colour at plane px i is the ramp at level-0 (i + ½)·scale: nothing is shifted by half a px."""
        arrays = [ramp(240, 180), ramp(120, 90, 2), ramp(60, 45, 4)] if pyramidal else [ramp(240, 180)]
        slide = memory_slide(arrays, 0.25)
        plane = slide.plane(mpp)
        scale = plane.factor_to(slide.frame)
        rgb = slide.read(x, y, 40, 30, plane).rgb
        # Beside the border the filter sees one side only.
        margin = math.ceil(3 * max(1.0, 1 / scale))
        for i in range(40):
            for j in (0, 14, 29):
                if margin <= x + i < plane.size_wh[0] - margin and margin <= y + j < plane.size_wh[1] - margin:
                    expected = (x + i + 0.5) * scale - 0.5, (y + j + 0.5) * scale - 0.5
                    # Half a level-0 px or half a px of the plane, and a rounding at each of three steps.
                    assert abs(rgb[j, i, 0] - expected[0]) <= 0.5 * max(1.0, scale / 4) + 1.0
                    assert abs(rgb[j, i, 1] - expected[1]) <= 0.5 * max(1.0, scale / 4) + 1.0

    @given(
        mpp=st.floats(0.1, 9.0),
        seed=st.integers(0, 99),
        inner=st.tuples(st.integers(0, 20), st.integers(0, 20), st.integers(1, 20), st.integers(1, 20)),
        at=st.sampled_from([0.0, 0.4, 1.0]),
    )
    @settings(max_examples=80)
    def test_a_pixel_has_one_value_in_every_block(
        self, mpp: float, seed: int, inner: tuple[int, int, int, int], at: float
    ) -> None:
        """A read equals the same area of a bigger read, at the slide's edges too; 1 grey level is rounding."""
        pixels = np.random.default_rng(seed).integers(0, 256, (300, 411, 3), np.uint8)
        slide = memory_slide([pixels, pixels[:300:2, :410:2].copy()], 0.25)
        plane = slide.plane(mpp)
        left, top, width, height = inner
        x, y = (int((n - 20) * at) for n in plane.size_wh)
        big = slide.read(x, y, 40, 40, plane).rgb
        small = slide.read(x + left, y + top, width, height, plane).rgb
        assert np.abs(big[top : top + height, left : left + width].astype(int) - small).max() <= 1

    @given(width=st.integers(1, 5000), height=st.integers(1, 5000), factor=st.sampled_from([2, 3, 4, 8, 16, 10]))
    def test_floored_and_completed_levels_have_whole_factors(self, width: int, height: int, factor: int) -> None:
        """A level that drops or completes its last px still spans a whole number of level-0 px."""
        for size in ((width // factor, height // factor), (-(-width // factor), -(-height // factor))):
            if min(size) >= 2 * factor:
                assert downsample_of((width, height), size) == factor

    def test_every_block_of_the_coordinate_grid_is_where_it_belongs(self, shared: Path) -> None:
        """Each 8 × 8 block of the grid is unlike all others, so a match proves the place."""
        grid = np.asarray(Image.open(shared / "slides/XYC_coordinate_grid.png"))
        slide = memory_slide(grid.repeat(4, 0).repeat(4, 1), 0.25)
        blocks = grid.reshape(64, 8, 64, 8, 3).transpose(0, 2, 1, 3, 4).reshape(4096, -1).astype(int)
        for mpp in (1.0, 0.97, 0.125):
            plane = slide.plane(mpp, tolerance=0)
            scale = plane.factor_to(slide.frame)
            for column, row in ((0, 0), (63, 63), (17, 40), (5, 58), (32, 31)):
                x0, y0 = column * 32 / scale, row * 32 / scale
                x, y = math.floor(x0), math.floor(y0)
                side = math.ceil(32 / scale) + 1
                seen = Image.fromarray(slide.read(x, y, side, side, plane).rgb)
                corner = (x0 - x, y0 - y, min(side, x0 - x + 32 / scale), min(side, y0 - y + 32 / scale))
                block = np.asarray(seen.resize((8, 8), Image.Resampling.BOX, box=corner)).astype(int).reshape(-1)
                assert np.abs(blocks - block).sum(axis=1).argmin() == row * 64 + column

    def test_strong_reduction_is_streamed_and_averages(self) -> None:
        """Far below the level's resolution the mean colour stays and nothing is skipped."""
        pixels = np.zeros((1000, 1500, 3), np.uint8)
        pixels[::2] = 200
        slide = memory_slide(pixels, 0.25)
        rgb = slide.thumbnail(15)[0].rgb
        assert rgb.shape == (10, 15, 3)
        assert np.abs(rgb.astype(int) - 100).max() <= 1

    @pytest.mark.parametrize(("strip_px", "most"), [(4000, 2), (8, 2)])
    def test_strips_are_hardly_decoded_twice(self, strip_px: int, most: int) -> None:
        """Each is decoded whole, however little of it is asked for; squares across them would cost many times that."""
        width, height = 16_000, 12_000
        times = np.zeros(height // strip_px, int)

        def read(_: int, x0: int, y0: int, x1: int, y1: int) -> tuple[NDArray[np.uint8], list[Box]]:
            times[y0 // strip_px : -(-y1 // strip_px)] += 1
            return np.zeros((y1 - y0, x1 - x0, 3), np.uint8), []

        levels = [Level((width, height), 1.0, (width, strip_px))]
        resample(read, levels, 8.0, 0, 0, width // 8, height // 8)
        assert 1 <= times.min() <= times.max() <= most

    def test_finer_than_the_slide_is_interpolated(self) -> None:
        """A slide coarser than the model is enlarged from level 0, and stays in place."""
        slide = memory_slide(ramp(60, 50), 1.0)
        plane = slide.plane(0.25)
        assert plane == Frame((240, 200), 0.25)
        rgb = slide.read(0, 0, 240, 200, plane).rgb
        assert np.abs(rgb[100, 8:230, 0] - ((np.arange(8, 230) + 0.5) / 4 - 0.5)).max() <= 1


class TestPlaneChoice:
    def test_tolerance_is_relative(self) -> None:
        """3 % takes the level as it is, more is resampled to exactly what was asked for."""
        slide = memory_slide(np.zeros((100, 100, 3), np.uint8), 0.2450)
        assert slide.plane(0.25) == slide.frame
        assert slide.plane(0.25, tolerance=0.01) == Frame((98, 98), 0.25)
        assert slide.plane(0.26).mpp == 0.26

    def test_without_scale_only_levels_can_be_read(self) -> None:
        """Everything physical refuses with the fix; stored pixels are still there."""
        slide = memory_slide(np.zeros((10, 10, 3), np.uint8), None)
        assert (slide.mpp, slide.mpp_source) == (None, "none")
        with pytest.raises(ResolutionError, match=r"--mpp 0\.25 .*mpp=0\.25 in Python"):
            slide.plane(0.25)
        assert slide.read_level(0, 0, 0, 10, 10).rgb.max() == 0


class TestHoles:
    def test_are_plane_px_clipped_to_the_request(self) -> None:
        """A hole lies where it is on the plane, absolute, white, and covers what the filter spread."""
        slide = memory_slide(np.zeros((400, 400, 3), np.uint8), 0.25, holes=[Box(100, 100, 140, 120)])
        assert slide.read(90, 90, 100, 20, slide.frame).holes == (Box(100, 100, 140, 110),)
        plane = slide.plane(0.5)
        pixels = slide.read(40, 40, 60, 60, plane)
        (hole,) = pixels.holes
        assert hole.clip(Box(50, 50, 70, 60)) == Box(50, 50, 70, 60)
        assert hole.area <= 25 * 15
        x0, y0, x1, y1 = hole.translate(-40, -40).round_out()
        assert (pixels.rgb[y0:y1, x0:x1] == 255).all()
        pixels.rgb[y0:y1, x0:x1] = 0
        assert pixels.rgb.max() == 0

    def test_survive_strong_reduction(self) -> None:
        """A hole is reported on a thumbnail too."""
        slide = memory_slide(np.zeros((1000, 1000, 3), np.uint8), 0.25, holes=[Box(0, 0, 300, 300)])
        pixels, _ = slide.thumbnail(50)
        (hole,) = pixels.holes
        assert 15 <= hole.x1 < 20


class TestTransparencyBoundsAndColour:
    def test_transparent_is_white_never_black(self) -> None:
        """Straight alpha is laid over white, level by level."""
        rgba = np.zeros((40, 40, 4), np.uint8)
        rgba[:, 20:] = (200, 100, 50, 255)
        rgba[:, 30:, 3] = 128
        slide = memory_slide(rgba, 0.5, bounds_l0=Box(20, 0, 40, 40))
        row = slide.read(0, 0, 40, 1, slide.frame).rgb[0]
        assert (row[:20] == 255).all()
        assert (row[20:30] == (200, 100, 50)).all()
        assert np.abs(row[30:].astype(int) - (227, 177, 152)).max() <= 1
        assert slide.bounds_l0 == Box(20, 0, 40, 40)
        assert pickle.loads(pickle.dumps(slide)).bounds_l0 == slide.bounds_l0

    @given(st.integers(0, 255), st.integers(0, 255), st.integers(0, 255))
    def test_composite_lies_between_colour_and_background(self, value: int, alpha: int, back: int) -> None:
        """Compositing is the weighted mean, rounded."""
        out = composite(np.full((1, 1, 4), (value, value, value, alpha), np.uint8), (back, back, back))
        assert abs(int(out[0, 0, 0]) - (value * alpha + back * (255 - alpha)) / 255) <= 0.5

    def test_srgb_uses_the_profile_and_raw_does_not(self, tmp_path: Path) -> None:
        """A profile with red and green exchanged does so through each reader; outside stays white, raw stays raw."""
        icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        swapped = icc.replace(b"rXYZ", b"tmp!").replace(b"gXYZ", b"rXYZ").replace(b"tmp!", b"gXYZ")
        path = tmp_path / "a.tiff"
        pixels = np.full((300, 300, 3), (200, 40, 90), np.uint8)
        tifffile.imwrite(path, pixels, tile=(128, 128), photometric="rgb", iccprofile=swapped, metadata=None)
        for backend in ("tiff", "openslide"):
            slide = open_slide(path, mpp=0.5, color="srgb", backend=backend)
            for twin in (slide, pickle.loads(pickle.dumps(slide))):
                rgb = twin.read(-5, -5, 200, 200, twin.frame).rgb.astype(int)
                assert (rgb[:5] == 255).all()
                assert np.abs(rgb[5:, 5:] - (40, 200, 90)).max() <= 2
            raw = open_slide(path, mpp=0.5, backend=backend)
            assert np.array_equal(raw.read(0, 0, 300, 300, raw.frame).rgb, pixels)

    def test_srgb_without_profile_is_raw(self, files: dict[str, Path], levels: list[NDArray[np.uint8]]) -> None:
        """Where the slide has no profile there is nothing to convert."""
        assert np.array_equal(open_slide(files["tiff"], color="srgb").read_level(0, 0, 0, 701, 501).rgb, levels[0])
        with pytest.raises(ConfigError, match='"raw" or "srgb"'):
            open_slide(files["tiff"], color="vivid")  # type: ignore[arg-type]

    def test_an_unusable_profile_is_an_error_at_opening(self, tmp_path: Path) -> None:
        """A damaged profile, or one for another colour model, is refused with the way out."""
        lab = io.BytesIO(ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()).getvalue()
        for icc in (b"not a profile", lab):
            path = tmp_path / "a.png"
            Image.new("RGB", (8, 8)).save(path, icc_profile=icc)
            assert open_slide(path).backend == "image"
            with pytest.raises(SlideFormatError, match=r'ICC profile.*color="raw"'):
                open_slide(path, color="srgb")


class TestScale:
    @pytest.mark.parametrize(
        ("x", "y", "mpp"),
        [
            (0.25, 0.25, 0.25),
            ("0.499", "0.499", 0.499),
            ("0,25", "0,25", 0.25),
            (0.25, 0.26, math.sqrt(0.065)),
            (0.25, 0.27, None),
            (0, 0, None),
            (-0.25, -0.25, None),
            ("inf", "inf", None),
            ("nan", "nan", None),
            (0.25, None, None),
            (499000, 499000, None),
            (0.0499, 0.0499, None),
            ("DOE^JANE", "DOE^JANE", None),
        ],
    )
    def test_only_believable_values_count(self, x: object, y: object, mpp: float | None) -> None:
        """An implausible value becomes a sentence that repeats numbers but never text."""
        verdict = judge(x, y, "openslide")
        assert verdict.mpp == mpp if mpp is None else verdict.mpp == pytest.approx(mpp)
        assert (verdict.problem is None) == (mpp is not None)
        assert "DOE" not in str(verdict.problem)

    @pytest.mark.parametrize("mpp", [0, -1, 0.04, 21, math.inf, math.nan, "x"])
    def test_an_override_must_be_believable_too(self, mpp: float) -> None:
        """The user's own value is checked as well."""
        with pytest.raises(ConfigError, match=r"expected 0\.05 to 20 µm/px"):
            memory_slide(np.zeros((5, 5, 3), np.uint8), mpp)

    def test_the_override_wins(self, files: dict[str, Path]) -> None:
        """The user's value replaces the file's, and says so."""
        slide = open_slide(files["tiff"], mpp=0.5)
        assert (slide.mpp, slide.mpp_source, slide.frame.mpp) == (0.5, "override", 0.5)
        assert open_slide(files["tiff"]).mpp_source == "tiff-resolution"
        assert open_slide(files["openslide"], backend="openslide").mpp_source == "tiff-resolution"
        assert open_slide(files["ome-tiff"]).mpp_source == "ome-xml"
        assert open_slide(files["ngff-0.5"]).mpp_source == "ngff"


class _Grey:
    """A procedural slide of one level; remembers the largest block it was asked for."""

    def __init__(self, side_px: int) -> None:
        levels = pyramid([(side_px, side_px)], [(512, 512)])
        self.facts = Facts("made", None, levels, judge(0.25, 0.25, "made"))
        self.most_px = 0

    def read_level(self, level: int, x: int, y: int, out: NDArray[np.uint8]) -> list[Box]:
        self.most_px = max(self.most_px, out.shape[0] * out.shape[1])
        out[:] = 100
        return []


def test_a_giant_without_pyramid_is_streamed() -> None:
    """A thumbnail of a one-level slide of 432 MB never asks for more than 50 MB of pixels at once."""
    source = _Grey(12_000)
    slide = Slide(Path("giant"), lambda: source)
    pixels, plane = slide.thumbnail(200)
    assert plane.size_wh == (200, 200)
    assert (pixels.rgb == 100).all()
    assert source.most_px <= 1 << 24


def test_memory_slides_refuse_what_is_no_picture() -> None:
    """Arrays of another type or shape, and levels out of order, are named as such."""
    for bad in (np.zeros((5, 5), np.uint8), np.zeros((5, 5, 3), np.float32), np.zeros((0, 0, 3), np.uint8)):
        with pytest.raises(SlideFormatError, match="expected uint8 arrays"):
            memory_slide(bad, 0.5)
    with pytest.raises(SlideFormatError, match="from the largest to the smallest"):
        memory_slide([np.zeros((5, 5, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)], 0.5)
    with pytest.raises(ConfigError, match="path: expected that of a slide, got ndarray; of pixels in memory use"):
        open_slide(np.zeros((5, 5, 3), np.uint8))  # type: ignore[arg-type]


def test_a_level_that_is_not_the_whole_slide_is_no_thumbnail() -> None:
    """Of another shape than level 0: it is made of one that fits."""
    levels = [np.full((120, 900, 3), 90, np.uint8), np.full((40, 225, 3), 10, np.uint8)]
    pixels, plane = memory_slide(levels, 0.25).thumbnail(400)
    assert max(plane.size_wh) == 400
    assert pixels.rgb.shape[:2] == plane.size_wh[::-1]
