"""Random damage, as `pipelines/fuzz_slides.py` does it ten thousand times, and what that found."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import imagecodecs
import numpy as np
import pytest
import tifffile
import zarr
from imagecodecs.numcodecs import Jpeg, register_codecs
from numpy.typing import NDArray
from PIL import Image
from zarr.codecs import BloscCodec, GzipCodec, ZstdCodec

from slidescan.errors import SlideFormatError
from slidescan.geometry import Box
from slidescan.slides import open_slide, packed
from slidescan.slides.codecs import jpeg2000_size, jpeg_size
from slidescan.slides.packed import check_packed

ROOT = Path(__file__).resolve().parents[2]
# A frame that does not say its size, of eight blocks that repeat a 0 128 Ki times (RFC 8878, 3.1.1).
ZSTD_OF_UNKNOWN_SIZE = b"\x28\xb5\x2f\xfd\x00\x50" + 7 * b"\x02\x00\x10\x00" + b"\x03\x00\x10\x00"
LAYOUTS = ["jpeg.svs", "jp2.svs", "zlib.tiff", "lzw.tiff", "raw.tiff", "pyramid.ome.tiff", "strips.tiff"]
LAYOUTS += [f"{name}@openslide" for name in ("jpeg.svs", "zlib.tiff", "lzw.tiff", "raw.tiff", "pyramid.ome.tiff")]
LAYOUTS += ["blosc-0.4.zarr", "jpeg-0.4.zarr", "zstd-0.5.zarr", "sharded-0.5.zarr"]


def test_damaged_slides_are_refused_or_read() -> None:
    """No crash, hang, other error or more than 1 GB over slides damaged at random, in a process of its own."""
    command = [sys.executable, ROOT / "pipelines" / "fuzz_slides.py", "--count", "140", "--seed", "20000"]
    told = subprocess.run(command, capture_output=True, text=True, check=False)
    assert told.returncode == 0, told.stdout + told.stderr
    *layouts, total = told.stdout.splitlines()
    assert total.startswith("140 damaged slides: ")
    for outcome in ("refused", "holes", "read"):
        assert outcome in total  # the damage does all of it
    assert {line.split(":")[0] for line in layouts} >= set(LAYOUTS)


def with_giant_frame(stream: bytes) -> bytes:
    """Return a JPEG stream that says it has 30000 × 30000 px."""
    at = stream.index(b"\xff\xc0") + 5
    return stream[:at] + struct.pack(">HH", 30000, 30000) + stream[at + 4 :]


@pytest.mark.parametrize(
    ("coder", "sharded", "damage"),
    [
        (BloscCodec(), False, lambda data: data[: len(data) // 2]),  # its decoder would read on behind the end
        (BloscCodec(), False, lambda data: data[:10]),
        (BloscCodec(), True, lambda data: data[:12] + struct.pack("<I", len(data) + 1) + data[16:]),
        (BloscCodec(), False, lambda data: data[:4] + struct.pack("<I", 2**31) + data[8:]),
        (GzipCodec(), False, lambda data: b"no" + data[2:]),  # an OSError
        (GzipCodec(), False, lambda data: data[:12] + b"\xff" * 8 + data[20:]),  # a zlib.error
        (GzipCodec(), True, lambda data: b"no" + data[2:]),
        (ZstdCodec(), False, lambda data: data[:4] + b"\xe0" + struct.pack("<Q", 2**62) + data[6:]),
        (Jpeg(), False, with_giant_frame),
        (Jpeg(), False, lambda data: data[: len(data) // 2]),  # its decoder would fill the rest with grey
    ],
)
def test_what_a_chunk_says_is_not_believed(
    tmp_path: Path, coder: object, sharded: bool, damage: Callable[[bytes], bytes]
) -> None:
    """A chunk that claims an impossible size, or ends early, is one hole; the one beside it is read."""
    register_codecs(verbose=False)
    pixels = np.random.default_rng(0).integers(0, 99, (100, 200, 3), np.uint8).cumsum(1, np.uint8)
    more = {"shards": (100, 200, 3)} if sharded else {}
    version = 2 if isinstance(coder, Jpeg) else 3
    path, chunks = tmp_path / "a.zarr", (100, 100, 3)
    zarr.create_array(path, data=pixels, chunks=chunks, compressors=coder, zarr_format=version, **more)
    good = open_slide(path).read_level(0, 0, 0, 200, 100).rgb
    file = path / ("0.0.0" if version == 2 else "c/0/0/0")
    data = file.read_bytes()
    start, size = struct.unpack("<QQ", data[-36:-20]) if sharded else (0, len(data))  # of the first chunk in a shard
    file.write_bytes(data[:start] + damage(data[start : start + size]) + data[start + size :])
    read = open_slide(path).read_level(0, 0, 0, 200, 100)
    assert read.holes == (Box(0, 0, 100, 100),)
    assert np.array_equal(read.rgb[:, 100:], good[:, 100:])


@pytest.mark.parametrize(
    ("coder", "data"),
    [
        ("gzip", gzip.compress(bytes(1 << 20))),
        ("gzip", gzip.compress(bytes(1 << 20)) + gzip.compress(b"")),  # whose last number is 0
        ("zlib", zlib.compress(bytes(1 << 20))),
        ("imagecodecs_deflate", zlib.compress(bytes(1 << 20))),
        ("bz2", bz2.compress(bytes(1 << 19)) * 2),
        ("lzma", lzma.compress(bytes(1 << 20))),
        ("zstd", imagecodecs.zstd_encode(bytes(1 << 20))),
        ("zstd", ZSTD_OF_UNKNOWN_SIZE),
        ("imagecodecs_jpeg2k", imagecodecs.jpeg2k_encode(np.zeros((512, 682, 3), np.uint8))),
    ],
)
def test_a_chunk_that_unpacks_to_more_is_not_unpacked(coder: str, data: bytes) -> None:
    check_packed(coder, memoryview(data), 1 << 20)
    with pytest.raises((ValueError, RuntimeError), match=r"unpacks to \d{5,7} bytes or more|buffer is too small"):
        check_packed(coder, memoryview(data), 99_999)


@pytest.mark.parametrize("packed_by", ["crc32c", "twice", "unusual index", "shards"])
def test_a_chunk_that_nobody_can_tell_of_is_not_unpacked(tmp_path: Path, packed_by: str) -> None:
    """With its sum behind it it is looked into; where only unpacking could tell, the array is refused."""
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    gzipped: list[dict[str, Any]] = [little, {"name": "gzip", "configuration": {"level": 9}}]
    shard = {"chunk_shape": [64, 64, 3], "codecs": gzipped, "index_codecs": [little], "index_location": "end"}
    sharded = [{"name": "sharding_indexed", "configuration": shard}]
    codecs = {
        "crc32c": [*gzipped, {"name": "crc32c"}],
        "twice": [*gzipped, {"name": "zstd", "configuration": {"level": 3, "checksum": False}}],
        "unusual index": sharded,
        "shards": [{"name": "sharding_indexed", "configuration": {**shard, "codecs": sharded}}],
    }[packed_by]
    keys = {"name": "default", "configuration": {"separator": "/"}}
    grid = {"name": "regular", "configuration": {"chunk_shape": [64, 64, 3]}}
    told = {"zarr_format": 3, "node_type": "array", "shape": [64, 64, 3], "data_type": "uint8", "fill_value": 0}
    told |= {"chunk_grid": grid, "chunk_key_encoding": keys, "codecs": codecs, "attributes": {}}
    chunk = tmp_path / "a.zarr/c/0/0/0"
    chunk.parent.mkdir(parents=True)
    (tmp_path / "a.zarr/zarr.json").write_text(json.dumps(told))
    if packed_by != "crc32c":
        with pytest.raises(SlideFormatError, match="packed twice, or shards of an unusual kind"):
            open_slide(tmp_path / "a.zarr")
        return
    for size, holes in ((64 * 64 * 3, ()), (1 << 28, (Box(0, 0, 64, 64),))):
        data = gzip.compress(bytes(size), 1)
        chunk.write_bytes(data + struct.pack("<I", google_crc32c.value(data)))
        tracemalloc.start()
        assert open_slide(tmp_path / "a.zarr").read_level(0, 0, 0, 64, 64).holes == holes
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 1 << 26


@pytest.mark.parametrize("kind", ["jpeg", "scans", "jp2"])
def test_what_a_decoder_skips_says_nothing_of_its_size(kind: str) -> None:
    """A small frame where only a header's reader looks, before the large one that is decoded; and scans for hours."""
    large = np.zeros((512, 512, 3), np.uint8)
    jpeg, jp2 = imagecodecs.jpeg8_encode(large), imagecodecs.jpeg2k_encode(large, codecformat="jp2")
    if kind == "jp2":
        small = imagecodecs.jpeg2k_encode(large[:64, :64], codecformat="j2k")[:48]
        at = jp2.index(b"jp2c") - 4
        hidden = jp2[:at] + struct.pack(">I", 24 + len(small)) + b"uuid" + bytes(16) + small + jp2[at:]
        assert np.asarray(imagecodecs.jpeg2k_decode(hidden)).shape == (512, 512, 3)
        assert jpeg2000_size(hidden) == jpeg2000_size(jp2) == (512, 512)
        return
    assert jpeg_size(jpeg) == (512, 512)
    scan = jpeg[jpeg.index(b"\xff\xda") : -2]
    with pytest.raises(ValueError, match="JPEG stream" if kind == "jpeg" else "more scans"):
        jpeg_size(jpeg[:2] + b"\xff\x01" + jpeg[2:] if kind == "jpeg" else jpeg[:-2] + 64 * scan + jpeg[-2:])


@pytest.mark.parametrize(("kind", "turn", "size_wh"), [(3, b"\6\0\0\0", (30, 40)), (7, b"abcd", (40, 30))])
def test_damaged_exif_costs_nothing(tmp_path: Path, kind: int, turn: bytes, size_wh: tuple[int, int]) -> None:
    """A resolution that is no number, beside a sound orientation, and one that is none."""
    entries = struct.pack("<HHI4s", 0x112, kind, 1, turn) + struct.pack("<HHI4s", 0x11A, 7, 4, b"abcd")
    exif = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2) + entries + bytes(4)
    Image.new("RGB", (40, 30)).save(tmp_path / "a.jpg", exif=exif)
    assert open_slide(tmp_path / "a.jpg", mpp=0.25).size_wh == size_wh


def test_memory_for_a_dictionary_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    data = memoryview(lzma.compress(b"a"))  # whose dictionary has 8 MB
    check_packed("lzma", data, 1)
    monkeypatch.setattr(packed, "_LZMA_BYTES", 1 << 20)
    with pytest.raises(lzma.LZMAError, match="Memory usage limit"):
        check_packed("lzma", data, 1)


@pytest.mark.parametrize("number", ["1e999", "1" + "0" * 400, "9" * 5000, "0", "-1", "2147483647"])
@pytest.mark.parametrize("key", ["shape", "chunk_shape"])
def test_extreme_numbers_are_refused(
    tmp_path: Path, levels: list[NDArray[np.uint8]], write_ngff: Callable[..., Path], key: str, number: str
) -> None:
    """A size that no array has is a damaged slide, whatever Python makes of the number."""
    path = write_ngff(tmp_path / "a.zarr", levels, "0.5")
    file = path / "0" / "zarr.json"
    told = json.loads(file.read_text())
    (told if key == "shape" else told["chunk_grid"]["configuration"])[key][2] = "here"
    file.write_text(json.dumps(told).replace('"here"', number))
    with pytest.raises(SlideFormatError, match=r"^a\.zarr: "):
        open_slide(path)


def test_a_tile_that_lists_more_bytes_than_there_are(tmp_path: Path) -> None:
    """OpenSlide would make room for them and end the process; the tile is a hole, and costs nothing else."""
    pixels = np.random.default_rng(0).integers(0, 256, (128, 192, 3), np.uint8)
    path = tmp_path / "a.svs"
    coding = {"tile": (64, 64), "photometric": "rgb", "compression": "jpeg", "bigtiff": True}
    tifffile.imwrite(path, pixels, **coding, description="Aperio Image Library v1|MPP = 0.5", metadata=None)
    good = open_slide(path, backend="openslide").read_level(0, 0, 0, 192, 128).rgb
    with tifffile.TiffFile(path, mode="r+") as file:
        counts = list(file.pages.first.tags[325].value)
        counts[4] = 2**62
        file.pages.first.tags[325].overwrite(counts, dtype="Q")
    read = open_slide(path, backend="openslide").read_level(0, 0, 0, 192, 128)
    assert read.holes == (Box(64, 64, 128, 128),)
    read.rgb[64:, 64:128] = good[64:, 64:128]
    assert np.array_equal(read.rgb, good)
