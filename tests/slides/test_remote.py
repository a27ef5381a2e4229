"""Slides behind a URL: the same pixels as from a disk, few requests, and a server that misbehaves is said in a line."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import numpy as np
import pytest
import tifffile
import zarr
from numpy.typing import NDArray

import slidescan as ss
from slidescan.archive import read_listing
from slidescan.errors import ConfigError, SlideError, SlideFormatError, SlideNotFoundError, SlideReadError
from slidescan.geometry import Box
from slidescan.phantom import Phantom, write_phantom
from slidescan.slides import Slide, open_slide, remote
from slidescan.slides.remote import Remote, locate
from tests.discs import ORACLE, config
from tests.slides.served import Fault, Served, serve

SECRET = "?signature=secret"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serve(tmp_path) as served:
        yield served


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Repeat requests without a pause, and do not wait long for an answer."""
    monkeypatch.setattr(remote, "_PAUSES_S", (0, 0, 0))
    monkeypatch.setattr(remote, "_ANSWER_S", 0.5)
    remote._blocks.clear()


@pytest.fixture
def case(tmp_path: Path, levels: list[NDArray[np.uint8]], write_tiff: Callable[..., Path]) -> Path:
    return write_tiff(tmp_path / "case 1.tiff", levels)


def same(slide: Slide, other: Slide) -> None:
    """Two openings of one slide: all they say and all pixels."""
    assert slide.levels == other.levels
    for said in ("name", "mpp", "mpp_source", "vendor", "bounds_l0"):
        assert getattr(slide, said) == getattr(other, said)
    for index, level in enumerate(slide.levels):
        ours, theirs = (each.read_level(index, -5, -5, *(n + 10 for n in level.size_wh)) for each in (slide, other))
        assert ours.holes == theirs.holes
        assert np.array_equal(ours.rgb, theirs.rgb)


class TestReads:
    @pytest.mark.parametrize("layout", ["tiff", "ome-tiff", "ngff-0.4", "ngff-0.5"])
    def test_the_same_as_a_disk(self, served: Served, files: dict[str, Path], layout: str) -> None:
        file = files[layout]
        served_too = served.root / file.name
        if not served_too.exists():
            served_too.symlink_to(file)
        same(open_slide(f"{served.url}/{file.name}{SECRET}"), open_slide(file))

    def test_real_slides(self, shared: Path) -> None:
        with serve(shared / "slides") as served:
            for name in ("CMU-1-Small-Region.svs", "CMU-1-Small-Region.jp2.tiff"):
                remote_one, local = open_slide(f"{served.url}/{name}"), open_slide(shared / "slides" / name)
                same(remote_one, local)
                assert remote_one.fingerprint == local.fingerprint

    def test_shards_and_what_is_missing(
        self, served: Served, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path]
    ) -> None:
        path = write_ngff(served.root / "a.zarr", levels, "0.5", sharded=True)
        (path / "0/c/0/1/1").unlink()
        slide = open_slide(f"{served.url}/a.zarr")
        same(slide, open_slide(path))
        assert slide.read_level(0, 0, 0, 701, 501).holes == (Box(256, 256, 512, 501),)

    def test_one_array_of_a_group(self, served: Served, levels: list[NDArray[np.uint8]]) -> None:
        group = zarr.open_group(served.root / "a.zarr", mode="w")
        group.create_array("0", data=levels[0], chunks=(128, 128, 3))
        same(open_slide(f"{served.url}/a.zarr/0{SECRET}", mpp=0.5), open_slide(served.root / "a.zarr/0", mpp=0.5))

    def test_any_file_system_of_fsspec(self, case: Path) -> None:
        fsspec.filesystem("memory").pipe("/bucket/case 1.tiff", case.read_bytes())
        same(open_slide("memory://bucket/case 1.tiff"), open_slide(case))

    def test_a_file_url_is_a_path(self, case: Path) -> None:
        assert locate(case.as_uri()) == case

    def test_travels_to_workers(self, served: Served, case: Path) -> None:
        slide = open_slide(f"{served.url}/case%201.tiff{SECRET}", mpp=0.4)
        revived = pickle.loads(pickle.dumps(slide))
        assert revived.mpp == 0.4
        same(revived, open_slide(case, mpp=0.4))

    def test_survives_a_fork(self, served: Served, files: dict[str, Path]) -> None:
        """Threads of a process are not in one that was forked from it, such as a loader of torch."""
        (served.root / "a.ome.zarr").symlink_to(files["ngff-0.5"])
        script = (
            "import os, sys, slidescan as ss\n"
            "slide = ss.open_slide(sys.argv[1])\n"
            "slide.read_level(0, 0, 0, 300, 300)\n"
            "child = os.fork()\n"
            "if not child:\n"
            "    os._exit(int(slide.read_level(0, 300, 100, 300, 300).holes != ()))\n"
            "sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))\n"
        )
        told = [sys.executable, "-W", "ignore", "-c", script, f"{served.url}/a.ome.zarr"]
        assert subprocess.run(told, timeout=120).returncode == 0

    def test_fingerprints_tell_slides_apart(
        self, served: Served, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path]
    ) -> None:
        other = [level.copy() for level in levels]
        other[0][200, 300] ^= 255
        told = []
        for name, pixels in (("a", levels), ("b", levels), ("c", other)):
            write_ngff(served.root / f"{name}.ome.zarr", pixels, "0.5")
            told.append(open_slide(f"{served.url}/{name}.ome.zarr").fingerprint)
        assert told[0] == told[1] != told[2]


class TestAsksForLittle:
    def test_every_byte_once_and_many_together(
        self, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(remote, "_ANSWER_S", 30)  # 2 MB are many for a server that shares its cores
        pixels = np.random.default_rng(0).integers(0, 255, (2048, 2048, 3), np.uint8)
        file = tmp_path / "noise.tiff"
        tifffile.imwrite(file, pixels, tile=(256, 256), photometric="rgb", metadata=None)
        slide = open_slide(f"{served.url}/noise.tiff")
        opening = len(served.asked)
        assert opening <= 8
        size = file.stat().st_size
        assert np.array_equal(slide.read_level(0, 0, 0, 2048, 2048).rgb, pixels)
        assert size <= served.sent_bytes <= 1.1 * size
        assert len(served.asked) - opening <= 12  # 200 blocks, of which 32 go into one request
        before = len(served.asked)
        slide.read_level(0, 0, 0, 2048, 2048)
        assert len(served.asked) == before

    def test_many_threads_ask_once(self, served: Served, tmp_path: Path) -> None:
        """Of regions that lie on the same blocks one fetches them, and the others wait for it."""
        pixels = np.random.default_rng(1).integers(0, 255, (1024, 1024, 3), np.uint8)
        tifffile.imwrite(tmp_path / "noise.tiff", pixels, tile=(256, 256), photometric="rgb", metadata=None)
        slide, begin = open_slide(f"{served.url}/noise.tiff"), threading.Barrier(16)

        def read(_: int) -> bool:
            begin.wait()
            return np.array_equal(slide.read_level(0, 0, 0, 1024, 1024).rgb, pixels)

        with ThreadPoolExecutor(16) as threads:
            assert all(threads.map(read, range(16)))
        assert served.sent_bytes <= 1.1 * (tmp_path / "noise.tiff").stat().st_size

    def test_a_corner_costs_a_corner(self, served: Served, tmp_path: Path) -> None:
        write_phantom(tmp_path / "case.tiff", Phantom((4096, 4096), 0.25, n_figures=2))
        slide = open_slide(f"{served.url}/case.tiff")
        opening = served.sent_bytes
        slide.read_level(0, 2000, 2000, 300, 300)
        assert served.sent_bytes - opening < (tmp_path / "case.tiff").stat().st_size / 4

    def test_a_tile_that_cannot_be_so_long_is_not_fetched(self, served: Served, tmp_path: Path) -> None:
        """Its length says that it goes on to the end of the file."""
        path = served.root / "long.tiff"
        pixels = np.random.default_rng(0).integers(0, 255, (512, 512, 3), np.uint8)
        tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", metadata=None)
        with tifffile.TiffFile(path, mode="r+b") as tiff:
            counts = tiff.pages.first.tags["TileByteCounts"]
            counts.overwrite([60_000_000, *counts.value[1:]])
        with path.open("ab") as file:
            file.truncate(64_000_000)
        slide = open_slide(f"{served.url}/long.tiff", mpp=0.25)
        assert slide.read_level(0, 0, 0, 512, 256).holes == (Box(0, 0, 256, 256),)
        assert served.sent_bytes < 16_000_000

    def test_the_pool_is_bounded(self, served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Pixels are right even where it holds less than one read wants."""
        monkeypatch.setattr(remote, "_blocks", remote.TilePool(3 << 16))
        pixels = np.random.default_rng(0).integers(0, 255, (1024, 1024, 3), np.uint8)
        tifffile.imwrite(tmp_path / "noise.tiff", pixels, tile=(256, 256), photometric="rgb", metadata=None)
        slide = open_slide(f"{served.url}/noise.tiff")
        assert np.array_equal(slide.read_level(0, 0, 0, 1024, 1024).rgb, pixels)
        assert remote._blocks.kept_bytes <= 3 << 16


class TestServersThatFail:
    @pytest.mark.parametrize("layout", ["ngff-0.4", "ngff-0.5"])
    def test_what_may_not_be_listed(self, served: Served, files: dict[str, Path], layout: str) -> None:
        """A public bucket without the right to list refuses what is not there, instead of saying so."""
        (served.root / "a.ome.zarr").symlink_to(files[layout])
        served.absent = 403
        slide = open_slide(f"{served.url}/a.ome.zarr")
        assert np.array_equal(
            slide.read_level(0, 0, 0, 701, 501).rgb, open_slide(files[layout]).read_level(0, 0, 0, 701, 501).rgb
        )
        assert slide.fingerprint
        with pytest.raises(SlideReadError, match="answers 403; check the URL and your access"):
            open_slide(f"{served.url}/b.ome.zarr")

    @pytest.mark.parametrize("fault", [503, "cut", "stall"])
    def test_once_are_asked_again(self, served: Served, case: Path, fault: Fault) -> None:
        slide, bad = open_slide(f"{served.url}/case%201.tiff"), served.number
        remote._blocks.clear()
        served.fault = lambda number: fault if number == bad else None
        assert slide.read_level(0, 0, 0, 701, 501).holes == ()
        assert served.number > bad + 1

    @pytest.mark.parametrize(
        ("fault", "told"),
        [(503, "answers 503"), (403, "answers 403"), ("cut", "cannot be read"), ("stall", "does not answer")],
    )
    @pytest.mark.parametrize("layout", ["tiff", "ngff-0.5"])
    def test_for_good_are_an_error_and_no_holes(
        self, served: Served, files: dict[str, Path], layout: str, fault: Fault, told: str
    ) -> None:
        (served.root / files[layout].name).symlink_to(files[layout])
        slide = open_slide(f"{served.url}/{files[layout].name}{SECRET}")
        remote._blocks.clear()
        served.fault = lambda number: fault
        with pytest.raises(SlideReadError, match=told) as caught:
            slide.read_level(0, 0, 0, 701, 501)
        assert "secret" not in str(caught.value)
        assert "127.0.0.1" not in str(caught.value)

    @pytest.mark.parametrize(
        ("fault", "error", "told"),
        [
            (404, SlideNotFoundError, "no such slide; check the URL"),
            (403, SlideReadError, "answers 403; check the URL and your access"),
            (503, SlideReadError, "answers 503"),
            ("whole", SlideFormatError, "gives whole files only; copy the slide to this machine"),
            ("stall", SlideReadError, "does not answer within 0.5 s"),
        ],
    )
    def test_at_opening(self, served: Served, case: Path, fault: Fault, error: type[SlideError], told: str) -> None:
        served.fault = lambda number: fault
        with pytest.raises(error, match=told) as caught:
            open_slide(f"{served.url}/case%201.tiff{SECRET}")
        said = str(caught.value)
        assert "case 1.tiff" in said
        assert "\n" not in said
        assert "secret" not in said
        assert len(served.asked) <= 1  # and that one is given up when more comes than was asked for

    def test_a_truncated_file(self, served: Served, case: Path) -> None:
        case.write_bytes(case.read_bytes()[:5000])
        with pytest.raises(SlideFormatError, match="missing or cut off"):
            open_slide(f"{served.url}/case%201.tiff")

    def test_what_is_gone_is_gone(self, served: Served, files: dict[str, Path]) -> None:
        """A directory that vanished is an error, not a slide full of holes."""
        link = served.root / "a.ome.zarr"
        link.symlink_to(files["ngff-0.5"])
        slide = open_slide(f"{served.url}/a.ome.zarr")
        link.unlink()
        with pytest.raises(SlideReadError, match="the slide is gone"):
            slide.read_level(0, 0, 0, 700, 500)


class TestRefuses:
    def test_what_needs_openslide(self, shared: Path) -> None:
        with serve(shared / "slides") as served:
            with pytest.raises(SlideFormatError, match=r"hamamatsu file needs OpenSlide.*copy the slide"):
                open_slide(f"{served.url}/test3-DAPI-2-387.ndpi")
            with pytest.raises(SlideFormatError, match=r"not a TIFF.*copy the slide"):
                open_slide(f"{served.url}/slide_with_ink.jpeg")
            with pytest.raises(ConfigError, match="OpenSlide reads no URL"):
                open_slide(f"{served.url}/CMU-1-Small-Region.svs", backend="openslide")

    def test_s3_without_credentials(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """What botocore raises is said once, with what does without; a bucket that is not there is no slide."""
        errors = pytest.importorskip("botocore.exceptions", reason="s3fs is not installed (slidescan[remote])")
        missing = {"Error": {"Code": "NoSuchBucket"}, "ResponseMetadata": {"HTTPStatusCode": 404}}
        for problem, expected, error in (
            (errors.NoCredentialsError(), r"wants credentials \(FSSPEC_S3_ANON=true", SlideReadError),
            (errors.ClientError(missing, "HeadObject"), "no such slide; check the URL", SlideNotFoundError),
        ):
            asked: list[str] = []

            def info(path: str, problem: Exception = problem, asked: list[str] = asked) -> None:
                asked.append(path)
                raise problem

            monkeypatch.setattr(fsspec.filesystem("memory"), "info", info)
            with pytest.raises(error, match=expected):
                open_slide("memory://bucket/case.svs")
            assert len(asked) == 1

    def test_unknown_kinds_of_url(self) -> None:
        with pytest.raises(ConfigError, match="of a kind that fsspec knows"):
            open_slide("gopher://archive/case.svs")

    def test_names_are_told_and_nothing_else(self) -> None:
        assert Remote("http://user:password@host").name == "host"
        case = Remote("s3://user:password@bucket/patients/case%201.svs?token=x")
        assert f"{case} {case!r} {case.name}" == "s3://…/case 1.svs s3://…/case 1.svs case 1.svs"

    def test_a_chained_url_has_the_name_of_its_file(self, case: Path) -> None:
        """As fsspec has them: a cache in front, or a file in an archive."""
        for url in ("simplecache::https://h/p/case%201.svs?token=x", "zip://case 1.svs::https://h/p/all.zip"):
            assert Remote(url).name == "case 1.svs"
        assert Remote("filecache::s3://b/case.ome.zarr").in_zarr
        fsspec.filesystem("memory").pipe("/bucket/case 2.tiff", case.read_bytes())
        slide = open_slide("simplecache::memory://bucket/case 2.tiff")
        assert slide.name == "case 2"
        same(slide, open_slide("memory://bucket/case 2.tiff"))

    @pytest.mark.parametrize("url", ["simplecache::{}/a.zarr", "memory:///a.zarr", "zip://a.zarr::{}/a.zip"])
    def test_a_zarr_behind_a_chained_url(
        self, served: Served, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path], url: str
    ) -> None:
        case = write_ngff(served.root / "a.zarr", levels, "0.5", sharded=True)
        shutil.make_archive(str(served.root / "a"), "zip", served.root, "a.zarr")
        fsspec.filesystem("memory").put(str(case), "/a.zarr", recursive=True)
        same(open_slide(url.format(served.url)), open_slide(case))

    def test_an_array_alone(self, tmp_path: Path, levels: list[NDArray[np.uint8]]) -> None:
        zarr.create_array(tmp_path / "a.zarr", data=levels[0], chunks=(128, 128, 3))
        fsspec.filesystem("memory").put(str(tmp_path / "a.zarr"), "/alone/a.zarr", recursive=True)
        same(open_slide("memory://alone/a.zarr", mpp=0.25), open_slide(tmp_path / "a.zarr", mpp=0.25))

    @pytest.mark.parametrize("url", ["http://[::1/x.svs", "https://h]/x.svs"])
    def test_a_url_that_is_none(self, tmp_path: Path, url: str) -> None:
        with pytest.raises(ConfigError, match="got a malformed one"):
            open_slide(url)
        (tmp_path / "a.csv").write_text(f"slide_path\n{url}\n")
        with pytest.raises(ConfigError, match=r"a\.csv, slide 1: slide_path: https?://…: expected a URL such as"):
            read_listing(tmp_path / "a.csv")

    def test_how_a_scheme_is_written_does_not_matter(self, served: Served, case: Path) -> None:
        same(open_slide(f"{served.url.replace('http', 'HTTP')}/case%201.tiff"), open_slide(case))

    def test_paths_that_are_none(self) -> None:
        with pytest.raises(ConfigError, match="NUL"):
            open_slide("a\0b.svs")
        with pytest.raises(SlideNotFoundError):
            open_slide("~nobody-is-called-so/x.svs")


class TestScans:
    def test_a_url_as_a_file(self, served: Served, tmp_path: Path) -> None:
        """The result is the file's, byte for byte, and nothing of the URL is in it."""
        write_phantom(tmp_path / "case.tiff", Phantom((1500, 1200), 0.5, n_figures=6))
        local = ss.scan(tmp_path / "case.tiff", ORACLE, out=tmp_path / "local", config=config(), title="case")
        ss.scan(f"{served.url}/case.tiff{SECRET}", ORACLE, out=tmp_path / "remote", config=config(), title="case")
        told = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("local", "remote")]
        assert told[0]["files"] == told[1]["files"]
        assert told[0]["run_key"] == told[1]["run_key"]
        assert len(local.detections)
        text = (tmp_path / "remote" / "manifest.json").read_text()
        assert "secret" not in text
        assert "127.0.0.1" not in text

    def test_a_file_that_is_replaced_meanwhile_is_no_result(self, served: Served, tmp_path: Path) -> None:
        """As on a disk; and a worker that had it open reads the new one."""
        for seed, name in ((1, "case"), (2, "other")):
            write_phantom(tmp_path / f"{name}.tiff", Phantom((1500, 1200), 0.5, seed=seed, n_figures=6))
        url = f"{served.url}/case.tiff"

        def replaced(state: ss.scan_slide.Progress) -> None:
            if (tmp_path / "other.tiff").exists():
                (tmp_path / "other.tiff").replace(tmp_path / "case.tiff")

        before = open_slide(url)
        assert before.fingerprint
        old = pickle.loads(pickle.dumps(before)).read_level(0, 0, 0, 900, 900).rgb
        with pytest.raises(SlideReadError, match="changed while it was scanned"):
            ss.scan(url, ORACLE, out=tmp_path / "run", config=config(), workers=1, on_progress=replaced)
        now = open_slide(url)
        assert now.fingerprint != before.fingerprint
        new = pickle.loads(pickle.dumps(now)).read_level(0, 0, 0, 900, 900).rgb
        assert not np.array_equal(old, new)
        assert np.array_equal(new, open_slide(tmp_path / "case.tiff").read_level(0, 0, 0, 900, 900).rgb)

    def test_a_server_that_goes_away_costs_nothing(self, served: Served, tmp_path: Path) -> None:
        write_phantom(tmp_path / "case.tiff", Phantom((1500, 1200), 0.5, n_figures=6))
        whole, url = ss.scan(tmp_path / "case.tiff", ORACLE, config=config()), f"{served.url}/case.tiff"

        def gone(state: ss.scan_slide.Progress) -> None:
            remote._blocks.clear()
            served.fault = lambda number: 503

        with pytest.raises(SlideReadError, match="run the same command again to continue"):
            ss.scan(url, ORACLE, out=tmp_path / "run", config=config(), workers=1, on_progress=gone)
        served.fault = lambda number: None
        again = ss.scan(url, ORACLE, out=tmp_path / "run", config=config())
        assert again.provenance["profile"]["regions"] < again.provenance["tiles"]["regions"]
        assert np.array_equal(again.detections.xyxy, whole.detections.xyxy)
