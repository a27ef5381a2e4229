"""Every backend gives the same slide: same levels, same pixels, same life cycle."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from slidescan.errors import ConfigError, SlideReadError
from slidescan.geometry import Frame
from slidescan.slides import Slide, open_slide


class TestEveryBackend:
    def test_levels_are_the_written_ones(self, slide: Slide, levels: list[NDArray[np.uint8]]) -> None:
        """Sizes are exact and a floored level spans whole level-0 px."""
        assert [level.size_wh for level in slide.levels] == [(701, 501), (350, 250), (175, 125)]
        assert [level.downsample for level in slide.levels] == [1.0, 2.0, 4.0]
        assert all(0 < tile <= 256 for level in slide.levels for tile in level.tile_wh)

    def test_scale_comes_from_the_file(self, slide: Slide) -> None:
        """The µm/px is what was written, and the frame holds it."""
        assert slide.mpp == pytest.approx(0.25, rel=1e-6)
        assert slide.mpp_problem is None
        assert slide.frame == Frame((701, 501), slide.mpp)

    def test_level_pixels_are_exact(self, slide: Slide, levels: list[NDArray[np.uint8]]) -> None:
        """Each level reads back what was written, whole and in parts that straddle tiles.

        OpenSlide addresses levels in whole level-0 px and smooths where a floored level makes that uneven.
        """
        for index, pixels in enumerate(levels):
            height, width = pixels.shape[:2]
            whole = slide.read_level(index, 0, 0, width, height)
            assert np.array_equal(whole.rgb, pixels)
            assert whole.holes == ()
            if slide.backend != "openslide" or index == 0:
                part = slide.read_level(index, 100, 70, 60, 50)
                assert np.array_equal(part.rgb, pixels[70:120, 100:160])

    def test_outside_is_white(self, slide: Slide, levels: list[NDArray[np.uint8]]) -> None:
        """A block that reaches outside holds the slide where it is and white around it; nothing is a hole."""
        pixels = slide.read(-30, -20, 800, 600, slide.frame)
        inside = pixels.rgb[20:521, 30:731]
        assert np.array_equal(inside, levels[0])
        outside = np.ones((600, 800), bool)
        outside[20:521, 30:731] = False
        assert (pixels.rgb[outside] == 255).all()
        assert pixels.holes == ()
        assert (slide.read(5000, -900, 9, 7, slide.frame).rgb == 255).all()

    def test_a_level_near_the_wanted_scale_is_read_as_stored(
        self, slide: Slide, levels: list[NDArray[np.uint8]]
    ) -> None:
        """Within 3 % the plane is the level's own grid, pixel for pixel."""
        plane = slide.plane(0.51)
        assert plane.size_wh == (350, 250)
        assert plane.mpp == pytest.approx(0.5, rel=1e-6)
        assert np.array_equal(slide.read(0, 0, 350, 250, plane).rgb, levels[1])

    def test_resampled_pixels_agree_with_memory(self, slide: Slide, open_as: Callable[[str], Slide]) -> None:
        """Resampling is done once for all backends, so their planes are equal."""
        memory = open_as("memory")
        for mpp in (0.2, 0.4, 0.7, 2.9):
            # The same float for both: a µm/px in cm and back differs in the last digit.
            plane, expected = slide.plane(mpp), memory.plane(mpp)
            assert plane.size_wh == expected.size_wh
            width, height = plane.size_wh
            a = slide.read(3, 2, width - 5, height - 4, plane).rgb
            b = memory.read(3, 2, width - 5, height - 4, expected).rgb
            assert np.abs(a.astype(int) - b).max() <= 1

    def test_thumbnail_maps_back_to_level_0(self, slide: Slide) -> None:
        """The longer side is what was asked for, and the frame converts thumbnail px to level-0 px."""
        pixels, plane = slide.thumbnail(100)
        assert pixels.rgb.shape == (plane.size_wh[1], plane.size_wh[0], 3) == (72, 100, 3)
        assert 100 * plane.factor_to(slide.frame) == pytest.approx(701)
        assert slide.thumbnail(5000)[1] == slide.frame

    def test_a_thumbnail_is_a_level_where_one_fits(self, slide: Slide) -> None:
        """It is not made anew from finer ones; a level of less than half the px would be too coarse."""
        size_wh = slide.levels[1].size_wh
        for asked_px in (max(size_wh), 2 * max(size_wh) - 1):
            pixels, plane = slide.thumbnail(asked_px)
            assert np.array_equal(pixels.rgb, slide.read_level(1, 0, 0, *size_wh).rgb)
            assert max(size_wh) * plane.factor_to(slide.frame) == pytest.approx(701, rel=0.01)
        assert max(slide.thumbnail(2 * max(size_wh) + 1)[1].size_wh) > max(size_wh)

    def test_pickles_and_reads_the_same(self, slide: Slide) -> None:
        """A slide survives the trip to a worker, where it reads the same pixels."""
        twin = pickle.loads(pickle.dumps(slide))
        a, b = (s.read(10, 20, 300, 200, s.plane(0.6)) for s in (slide, twin))
        assert np.array_equal(a.rgb, b.rgb)
        assert repr(twin) == repr(slide)

    def test_closing_is_safe_and_reading_reopens(self, slide: Slide, levels: list[NDArray[np.uint8]]) -> None:
        """Closing twice is no error, and a closed slide still reads."""
        with slide:
            slide.read(0, 0, 5, 5, slide.frame)
        slide.close()
        assert np.array_equal(slide.read(7, 9, 50, 40, slide.frame).rgb, levels[0][9:49, 7:57])

    def test_threads_read_while_another_closes(self, slide: Slide, levels: list[NDArray[np.uint8]]) -> None:
        """Many threads get right pixels although one keeps closing the slide under them."""
        wrong: list[object] = []
        done = threading.Event()

        def read(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(15):
                x, y = int(rng.integers(0, 500)), int(rng.integers(0, 400))
                rgb = slide.read_level(0, x, y, 90, 80).rgb
                if not np.array_equal(rgb, levels[0][y : y + 80, x : x + 90]):
                    wrong.append((x, y))

        def close() -> None:
            while not done.is_set():
                slide.close()
                done.wait(0.002)

        readers = [threading.Thread(target=read, args=(i,)) for i in range(4)]
        closer = threading.Thread(target=close)
        for thread in [*readers, closer]:
            thread.start()
        for thread in readers:
            thread.join()
        done.set()
        closer.join()
        assert wrong == []

    def test_repr_names_no_directory(self, slide: Slide) -> None:
        """The repr shows name, size, scale and backend only."""
        assert "/" not in repr(slide).replace("µm/px", "")
        assert "701 × 501 px" in repr(slide)

    def test_a_foreign_plane_is_refused(self, slide: Slide) -> None:
        """Reading another slide's plane would give wrong places, so it is an error; so is an empty block."""
        with pytest.raises(ConfigError, match="not a plane of this slide"):
            slide.read(0, 0, 10, 10, Frame((4000, 3000), 0.25))
        with pytest.raises(ConfigError, match="a block must have a size"):
            slide.read(0, 0, 0, 10, slide.frame)
        with pytest.raises(ConfigError, match="positive number"):
            slide.plane(0.0)


def test_fingerprint_is_the_contents(files: dict[str, Path], tmp_path: Path) -> None:
    """A copy under another name has the same fingerprint in every backend; one changed byte changes it."""
    data = files["tiff"].read_bytes()
    (tmp_path / "other.tif").write_bytes(data)
    (tmp_path / "changed.tif").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    first = open_slide(files["tiff"]).fingerprint
    assert open_slide(tmp_path / "other.tif", backend="openslide").fingerprint == first
    assert open_slide(tmp_path / "changed.tif").fingerprint != first
    four, five = (open_slide(files[kind]).fingerprint for kind in ("ngff-0.4", "ngff-0.5"))
    assert len({first, four, five}) == 3


def test_large_files_are_fingerprinted_by_samples(tmp_path: Path, files: dict[str, Path]) -> None:
    """Both ends and the middle of a large file count."""
    data = bytearray(files["tiff"].read_bytes() + bytes(9 << 20))
    seen = set()
    for at in (len(data) - 1, len(data) // 2 + 20000, None):
        changed = bytearray(data)
        if at is not None:
            changed[at - 40000 : at] = b"\1" * 40000
        path = tmp_path / "big.tiff"
        path.write_bytes(changed)
        seen.add(open_slide(path).fingerprint)
    assert len(seen) == 3


def test_a_changed_file_is_not_mixed_with_the_old(
    tmp_path: Path, files: dict[str, Path], levels: list[NDArray[np.uint8]], write_tiff: Callable[..., Path]
) -> None:
    """A file replaced by another slide while closed is an error, not a silent change of pixels."""
    path = tmp_path / "a.tiff"
    path.write_bytes(files["tiff"].read_bytes())
    slide = open_slide(path)
    assert slide.size_wh == (701, 501)
    slide.close()
    write_tiff(path, [levels[1]])
    with pytest.raises(SlideReadError, match="changed since it was opened"):
        slide.read_level(0, 0, 0, 9, 9)


def test_a_vanished_file_is_said(tmp_path: Path, files: dict[str, Path]) -> None:
    """A slide whose file is gone says so on the next opening."""
    path = tmp_path / "a.tiff"
    path.write_bytes(files["tiff"].read_bytes())
    slide = open_slide(path)
    slide.close()
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no such slide"):
        slide.read_level(0, 0, 0, 9, 9)
