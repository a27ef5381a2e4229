"""Opening: the right reader, one clear line for everything that is no slide, and a pool that never hurts a reader."""

from __future__ import annotations

import gc
import pickle
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from slidescan.errors import (
    ConfigError,
    ResolutionError,
    SlideError,
    SlideFormatError,
    SlideNotFoundError,
    SlideReadError,
)
from slidescan.slides import open_slide, pooled

# Broken file: what becomes of it. "opens" has its µm/px, "no scale" opens but refuses to be scanned.
VERDICTS = {
    "pillow_adv/issue_2278.tif": "1 bits a sample",
    "pillow_adv/no_rows_per_strip.tif": "found 1 channels",
    "pillow_adv/oom-225817ca0f8c663be7ab4b9e717b02c661e66834.tif": "directory is missing or cut off",
    "pillow_adv/tiff_overflow_rows_per_strip.tif": "1 × 1 tiles are needed for 278 × 374 px, 39 are listed",
    "pillow_adv/tiff_wrong_bits_per_sample.tiff": "none of 1 sampled tiles decodes",
    "pillow_adv/tiff_wrong_bits_per_sample_2.tiff": "1/8 bits a sample",
    "pillow_adv/tiff_wrong_bits_per_sample_3.tiff": "found 4 channels",
    "pillow_adv/total-pages-zero.tif": "1 bits a sample",
    "svs_mutations/appmag_missing.svs": "opens",
    "svs_mutations/bitflip200_seed0.svs": "opens",
    "svs_mutations/bitflip200_seed2.svs": "opens",
    "svs_mutations/compression_unknown.svs": "unknown compression 52479",
    "svs_mutations/empty.svs": "is empty",
    "svs_mutations/ifd_loop.svs": "form a loop",
    "svs_mutations/imagewidth_max.svs": "are needed for 65535",
    "svs_mutations/imagewidth_zero.svs": "image size 0 × 2967",
    "svs_mutations/mpp_huge.svs": "no scale",
    "svs_mutations/mpp_inf.svs": "no scale",
    "svs_mutations/mpp_nan.svs": "no scale",
    "svs_mutations/mpp_negative.svs": "no scale",
    "svs_mutations/not_a_slide.svs": "OpenSlide cannot open it",
    "svs_mutations/photometric_bad.svs": "unknown colour model 9",
    "svs_mutations/tile50_half_zeroed.svs": "opens",
    "svs_mutations/tile50_length_past_eof.svs": "opens",
    "svs_mutations/tile50_zero_length.svs": "opens",
    "svs_mutations/tilewidth_zero.svs": "tile size 0 × 240",
    "svs_mutations/truncated_header_only.svs": "missing or cut off",
    "svs_mutations/truncated_last_byte.svs": "opens",
    "upstream/broken.svs": "OpenSlide cannot open it",
    "upstream/unopenable.tiff": "unknown compression 52479",
    "upstream/unreadable.svs": "none of 1 sampled tiles decodes",
}
REFUSED = {
    "TCGA-CR-7395-01A-01-TS1.svs": "does not say",
    "prostate_pyramid_badres.tiff": "896.056 µm/px",
    "CMU-1-Small-Region.jpeg.tiff": "0.00499 µm/px",
    "slide_with_ink.jpeg": "does not say",
}


class TestBrokenFiles:
    @pytest.mark.parametrize("name", VERDICTS)
    def test_end_in_one_clear_line(self, shared: Path, name: str, capfd: pytest.CaptureFixture[str]) -> None:
        """Each is refused in one line with its name and reason, or opens and reads; libraries print nothing."""
        path, verdict = shared / "broken" / name, VERDICTS[name]
        if verdict in ("opens", "no scale"):
            slide = open_slide(path)
            pixels = slide.read_level(0, 0, 1000, 500, 600)
            assert len(pixels.holes) <= 1
            if verdict == "opens":
                assert slide.frame.mpp == 0.499
            else:
                with pytest.raises(ResolutionError, match=r"not plausible.*--mpp 0"):
                    _ = slide.frame
        else:
            with pytest.raises(SlideFormatError) as caught:
                open_slide(path)
            said = str(caught.value)
            assert verdict in said
            assert said.startswith(f"{path.name}: ")
            assert str(path.parent) not in said
            assert "\n" not in said
            assert len(said) < 400
        assert capfd.readouterr() == ("", "")

    def test_every_broken_file_has_a_verdict(self, shared: Path) -> None:
        """The table above is complete."""
        found = {p.relative_to(shared / "broken").as_posix() for p in (shared / "broken").rglob("*.*") if p.is_file()}
        assert {name for name in found if not name.endswith((".md", ".txt"))} == set(VERDICTS)

    @pytest.mark.parametrize("backend", ["tiff", "openslide"])
    @pytest.mark.parametrize("name", VERDICTS)
    def test_no_backend_crashes_or_leaks_foreign_errors(self, shared: Path, name: str, backend: str) -> None:
        """Asked for by name, each reader still fails with our own errors only."""
        said = ""
        try:
            slide = open_slide(shared / "broken" / name, backend=backend)
            slide.read_level(0, 0, 1000, 500, 300)
        except SlideError as error:
            said = str(error)
        assert said.startswith(Path(name).name) or not said

    @pytest.mark.parametrize("name", REFUSED)
    def test_real_slides_without_believable_scale(self, shared: Path, name: str) -> None:
        """They open, say what is wrong, and scan with an override."""
        path = shared / "slides" / name
        slide = open_slide(path)
        with pytest.raises(ResolutionError, match=r"--mpp 0\.25") as caught:
            _ = slide.frame
        assert REFUSED[name] in str(caught.value)
        assert "unknown" in repr(slide)
        assert open_slide(path, mpp=0.5).frame.mpp == 0.5

    def test_random_damage_never_escapes(self, shared: Path, tmp_path: Path) -> None:
        """A slide with a damaged header is refused or read; nothing else happens."""
        data = (shared / "slides/tiny/boxes.tiff").read_bytes()
        rng = np.random.default_rng(3)
        path = tmp_path / "a.tiff"
        said = []
        for _ in range(150):
            changed = bytearray(data)
            for at in rng.integers(0, len(data), 6):
                changed[at] = rng.integers(0, 256)
            path.write_bytes(changed[: int(rng.integers(8, len(data) + 1))])
            try:
                slide = open_slide(path)
                slide.read_level(len(slide.levels) - 1, -5, -5, 60, 60)
            except SlideError as error:
                said.append(str(error))
        assert 0 < len(said) < 150
        assert all(text.startswith("a.tiff: ") for text in said)


class TestWhatIsNoSlide:
    @pytest.mark.parametrize(
        ("make", "error", "told"),
        [
            (lambda p: None, SlideNotFoundError, "no such slide"),
            (lambda p: p.mkdir(), SlideFormatError, "this is a directory"),
            (lambda p: p.write_bytes(b""), SlideFormatError, "the file is empty"),
            (lambda p: p.write_text("hello, I am a text"), SlideFormatError, "expected a complete whole-slide image"),
            (lambda p: p.write_bytes(b"II*\0"), SlideFormatError, "not a TIFF file"),
            (lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n"), SlideFormatError, "damaged PNG or JPEG"),
            (lambda p: p.write_bytes(b"\xff\xd8\xff\xe0\0"), SlideFormatError, "damaged PNG or JPEG"),
        ],
    )
    def test_is_named(self, tmp_path: Path, make: Callable[[Path], object], error: type[SlideError], told: str) -> None:
        """Missing, a directory, empty, text, cut off: each has its own line, and the error survives pickling."""
        path = tmp_path / "case.svs"
        make(path)
        with pytest.raises(error, match=told) as caught:
            open_slide(path)
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)

    def test_a_file_without_permission(self, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
        """An unreadable file is a read error with the system's reason."""

        def deny(*args: object, **more: object) -> None:
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(Path, "open", deny)
        with pytest.raises(SlideReadError, match=r"cannot be opened .Permission denied"):
            open_slide(files["tiff"])

    def test_a_zarr_whose_metadata_cannot_be_read(self, files: dict[str, Path], tmp_path: Path) -> None:
        """The reason is told: here a link that leads nowhere but to itself."""
        path = Path(shutil.copytree(files["ngff-0.5"], tmp_path / "case.zarr"))
        metadata = path / "0" / "zarr.json"
        metadata.unlink()
        metadata.symlink_to(metadata)
        with pytest.raises(SlideError, match=r"zarr\.json") as refused:
            open_slide(path)
        assert "None" not in str(refused.value)

    def test_options_are_checked(self, files: dict[str, Path]) -> None:
        """Unknown backends, and readers that do not fit the file, are said."""
        with pytest.raises(ConfigError, match="expected one of auto, tiff, openslide, zarr"):
            open_slide(files["tiff"], backend="cucim")  # type: ignore[arg-type]
        with pytest.raises(SlideFormatError, match="expected an OME-Zarr directory"):
            open_slide(files["tiff"], backend="zarr")
        with pytest.raises(SlideFormatError, match="this is a directory"):
            open_slide(files["ngff-0.5"], backend="tiff")


class TestPlainImages:
    def test_are_read_whole(self, tmp_path: Path, levels: list[NDArray[np.uint8]]) -> None:
        """A PNG is a slide of one level without scale; transparency is white; it pickles as its path."""
        path = tmp_path / "a.png"
        rgba = np.dstack([levels[0], np.full((501, 701), 255, np.uint8)])
        rgba[:9, :9, 3] = 0
        Image.fromarray(rgba).save(path)
        slide = open_slide(path, mpp=0.25)
        assert slide.backend == "image"
        rgb = slide.read(0, 0, 701, 501, slide.frame).rgb
        assert (rgb[:9, :9] == 255).all()
        assert np.array_equal(rgb[9:], levels[0][9:])
        assert len(pickle.dumps(slide)) < 1000

    @pytest.mark.parametrize("mode", ["L", "I;16", "CMYK", "1"])
    def test_other_than_colour_is_refused(self, tmp_path: Path, mode: str) -> None:
        """Grey, 16-bit and print images are named as such."""
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
        Image.new(mode, (20, 20)).save(path)
        with pytest.raises(SlideFormatError, match="expected an 8-bit colour image"):
            open_slide(path)

    def test_large_ones_are_refused_by_their_header(self, tmp_path: Path) -> None:
        """The size is judged before Pillow sees the file; a truncated one is damaged."""
        path = tmp_path / "a.png"
        Image.new("RGB", (40, 40)).save(path)
        data = path.read_bytes()
        path.write_bytes(data[:16] + (60000).to_bytes(4, "big") * 2 + data[24:])
        with pytest.raises(SlideFormatError, match="60000 × 60000 px is too large"):
            open_slide(path)
        path.write_bytes(data[:60])
        with pytest.raises(SlideFormatError, match="damaged PNG or JPEG"):
            open_slide(path)


def test_no_text_of_the_file_is_told(
    tmp_path: Path, raw_tiff: Callable[..., bytes], capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """A patient's name planted in every text tag appears in no repr, attribute, error or log."""
    canary = "DOE^JANE 1970-01-01 ACC4711"
    tags = {256: 64, 257: 64, 258: [8, 8, 8], 259: 1, 262: 2, 277: 3, 322: 64, 323: 64, 324: 8, 325: 64 * 64 * 3}
    texts = {tag: canary.encode() + b"\0" for tag in (269, 271, 272, 305, 306, 315, 316, 700)}
    seen = []
    for head in (f"Aperio {canary}|MPP = {canary}|User = {canary}|\0", f"{canary}\0", f"<OME>{canary}</OME>\0"):
        for change in ({}, {259: 52479}, {262: 9}, {256: 0}):
            path = tmp_path / "a.svs"
            path.write_bytes(raw_tiff(tags | texts | {270: head.encode()} | change, bytes(64 * 64 * 3)))
            for backend in ("auto", "tiff", "openslide"):
                try:
                    slide = open_slide(path, backend=backend)
                    public = [getattr(slide, k) for k in dir(type(slide)) if not k.startswith("_") and k != "frame"]
                    seen += [repr(slide), repr(public), slide.fingerprint]
                    _ = slide.frame
                except SlideError as error:
                    seen.append(str(error))
    seen += [*capfd.readouterr(), caplog.text]
    assert not [text for text in seen if "DOE" in text or "4711" in text]


class TestPool:
    def test_shares_one_slide_and_opens_a_replaced_file_anew(
        self, tmp_path: Path, files: dict[str, Path], levels: list[NDArray[np.uint8]], write_tiff: Callable[..., Path]
    ) -> None:
        """The same path and options are one slide; other options or another file are not."""
        path = tmp_path / "a.tiff"
        path.write_bytes(files["tiff"].read_bytes())
        first = pooled(path, mpp=0.5)
        assert pooled(path, mpp=0.5) is first
        assert pooled(path, mpp=0.4) is not first
        assert pickle.loads(pickle.dumps(open_slide(path, mpp=0.5))) is first
        write_tiff(path, [levels[1]])
        assert pooled(path, mpp=0.5).size_wh == (350, 250)

    def test_eviction_does_not_break_a_reader(
        self, tmp_path: Path, files: dict[str, Path], levels: list[NDArray[np.uint8]]
    ) -> None:
        """A slide pushed out of the pool keeps reading, and its descriptor closes with its last user."""
        data = files["tiff"].read_bytes()
        paths = [tmp_path / f"{i}.tiff" for i in range(12)]
        for path in paths:
            path.write_bytes(data)
        slides = [pooled(path) for path in paths]
        for slide in slides:
            assert np.array_equal(slide.read_level(0, 100, 100, 50, 50).rgb, levels[0][100:150, 100:150])
        assert pooled(paths[0]) is not slides[0]
        before = len(list(Path("/proc/self/fd").iterdir())) if Path("/proc/self/fd").exists() else 0
        del slides, slide
        gc.collect()
        if before:
            assert len(list(Path("/proc/self/fd").iterdir())) < before

    def test_many_threads_get_one_slide(self, files: dict[str, Path]) -> None:
        """Concurrent first uses open the file once."""
        got: list[object] = []
        threads = [threading.Thread(target=lambda: got.append(pooled(files["ome-tiff"]))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len({id(slide) for slide in got}) == 1

    def test_unpickling_opens_nothing(self, tmp_path: Path) -> None:
        """A pickled slide is its path and options; the file is touched on first use only."""
        path = tmp_path / "a.png"
        Image.new("RGB", (9, 9)).save(path)
        data = pickle.dumps(open_slide(path, mpp=1.0))
        path.unlink()
        slide = pickle.loads(data)
        assert slide.name == "a"
        with pytest.raises(SlideNotFoundError):
            _ = slide.size_wh
