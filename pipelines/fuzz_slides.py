"""Damage small slides at random and read them: every one must give a slide error or its pixels, never a crash.

python pipelines/fuzz_slides.py                    10,000 slides, seeds 0 to 9,999
python pipelines/fuzz_slides.py --count 300 --seed 7
python pipelines/fuzz_slides.py --only "*.zarr"    these layouts; so, with --seed S --count 1, one damage is repeated

The layouts take turns. A seed names one damage of each: bytes overwritten, words set to extremes, parts cut, repeated
or moved; where a slide is many files, also files lost or emptied, and JSON values replaced. Reading happens in a
process of its own under a limit of memory. A process that dies or hangs costs its seed, which is reported, and the rest
goes on. Exit code 1 if there was any. Real slides take part where there are some: in `shared` beside the checkout, or
$SLIDESCAN_TEST_DATA.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
import zarr
from imagecodecs.numcodecs import Jpeg, Jpeg2k, register_codecs
from numpy.typing import NDArray
from zarr.codecs import GzipCodec, ZstdCodec

import slidescan as ss
from slidescan.errors import SlideError
from slidescan.slides.open import Backend

_MEMORY_BYTES = 1 << 30  # that reading a damaged file may add; more is a failed allocation, which must become an error
_SECONDS = 30  # without a word from the reading process: it hangs
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
_NUMBERS: list[Any] = [0, 1, -1, 7, 0.5, 2**31 - 1, 2**31, 2**63, 10**400, 1e-308, 1e308, math.inf, math.nan]
_OTHERS: list[Any] = [None, True, 3, 0.5, "", "text", "9" * 20, [], [[]], [3, 4], {}, {"id": "zlib"}, {"a": []}]
_METADATA = (".zarray", ".zattrs", ".zgroup", "zarr.json")
_SHARED = Path(os.environ.get("SLIDESCAN_TEST_DATA", Path(__file__).resolve().parents[2] / "shared")) / "slides"
_BY_OPENSLIDE = "@openslide"  # ends the name of a layout that OpenSlide reads although slidescan has a reader


def write_layouts(folder: Path, only: str) -> None:
    """Make a folder for each layout whose name is like `only`: the files of one small slide."""
    with tempfile.TemporaryDirectory() as scratch:
        write_tiffs(Path(scratch))
        write_zarrs(Path(scratch))
        real = [*_SHARED.glob("tiny/*"), *_SHARED.glob("dicom_cmu_napari"), *_SHARED.glob("*.ndpi")]
        for slide in [*Path(scratch).iterdir(), *real]:
            for suffix in ("", _BY_OPENSLIDE) if slide.suffix in (".svs", ".tiff") else ("",):
                layout = folder / (slide.name + suffix)
                if not fnmatch(layout.name, only):
                    continue
                for path in slide.iterdir() if slide.name.startswith("dicom") else [slide]:
                    if path.is_dir():
                        shutil.copytree(path, layout / path.name)
                    else:
                        layout.mkdir(exist_ok=True)
                        (layout / path.name).write_bytes(path.read_bytes())
                if read_all(layout, main_file(layout)) != "read":  # one that OpenSlide does not know, or is bad already
                    shutil.rmtree(layout)


def main_file(layout: Path) -> str:
    """Return the name of what to open: all there is, or the largest of the files of a DICOM slide."""
    return max(layout.iterdir(), key=lambda path: path.stat().st_size).name


def picture() -> NDArray[np.uint8]:
    """Return the pixels of level 0."""
    image = np.random.default_rng(0).integers(0, 256, (300, 420, 3), np.uint8)
    return np.kron(image[::20, ::20], np.ones((20, 20, 1), np.uint8))


def write_tiffs(folder: Path) -> None:
    """Write one small TIFF slide of each layout."""
    image = picture()
    half = image[::2, ::2]
    tiled = {"tile": (64, 64), "photometric": "rgb"}
    aperio = "Aperio Image Library v1\r\n420x300 [0,0 420x300] (64x64) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5"
    for name, coding, text in (
        ("jpeg.svs", {"compression": "jpeg"}, aperio),
        ("jp2.svs", {"compression": "jpeg2000"}, aperio),
        ("zlib.tiff", {"compression": "zlib", "predictor": True}, None),
        ("lzw.tiff", {"compression": "lzw"}, None),
        ("raw.tiff", {}, None),
    ):
        with tifffile.TiffWriter(folder / name, bigtiff=name.startswith("lzw")) as file:
            file.write(image, **tiled, **coding, description=text, metadata=None)
            file.write(half, **tiled, **coding, subfiletype=1, metadata=None)
    with tifffile.TiffWriter(folder / "pyramid.ome.tiff", ome=True) as file:
        file.write(image, **tiled, compression="zlib", subifds=1, metadata={"axes": "YXS", "PhysicalSizeX": 0.5})
        file.write(half, **tiled, compression="zlib", subfiletype=1)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    tifffile.imwrite(folder / "planes.tiff", planes, **tiled, compression="jpeg", planarconfig="separate")
    tifffile.imwrite(folder / "strips.tiff", image, photometric="rgb", compression="zlib", rowsperstrip=16)


def write_zarrs(folder: Path) -> None:
    """Write one small OME-Zarr slide of each layout."""
    register_codecs(verbose=False)
    image = picture()
    planes, planar, packed = image.transpose(2, 0, 1), {"chunks": (1, 128, 128)}, {"chunks": (128, 128, 3)}
    blosc = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1, "blocksize": 0}
    sharded = {"chunks": (3, 64, 64), "shards": (3, 128, 128), "compressors": GzipCodec()}
    for name, pixels, axes, codings in (
        ("blosc-0.4.zarr", planes, "cyx", 2 * [{**planar, "compressors": blosc}]),
        ("jpeg-0.4.zarr", image, "yxc", [{**packed, "compressors": coder} for coder in (Jpeg(), Jpeg2k(level=0))]),
        ("zstd-0.5.zarr", planes, "cyx", 2 * [{**planar, "compressors": ZstdCodec()}]),
        ("sharded-0.5.zarr", planes, "cyx", 2 * [sharded]),
    ):
        v3 = "0.5" in name
        group = zarr.open_group(folder / name, mode="w", zarr_format=3 if v3 else 2)
        datasets = []
        for i, coding in enumerate(codings):
            every = tuple(slice(None, None, 1 if axis == "c" else 2**i) for axis in axes)
            group.create_array(str(i), data=np.ascontiguousarray(pixels[every]), **coding)
            scale = [1.0 if axis == "c" else 0.5 * 2**i for axis in axes]
            datasets.append({"path": str(i), "coordinateTransformations": [{"type": "scale", "scale": scale}]})
        units = [{"name": axis} if axis == "c" else {"name": axis, "unit": "micrometer"} for axis in axes]
        told = {"multiscales": [{"axes": units, "datasets": datasets}]}
        group.attrs.update({"ome": told} if v3 else told)


def damage(layout: Path, rng: np.random.Generator) -> None:
    """Damage the only file of a slide, or one to three of many: metadata as likely as pixels."""
    files = sorted(path for path in layout.rglob("*") if path.is_file())
    if len(files) == 1:
        files[0].write_bytes(damaged(files[0].read_bytes(), rng))
        return
    described = [path for path in files if path.name in _METADATA]
    others = [path for path in files if path not in described]
    for _ in range(int(rng.integers(1, 4))):
        among = described if described and rng.random() < 0.5 else others
        path = among[int(rng.integers(len(among)))]
        chance = rng.random()
        if not path.exists() or chance < 0.1:
            path.unlink(missing_ok=True)
        elif chance < 0.2:
            path.write_bytes(b"")
        elif among is described and chance < 0.7:
            path.write_bytes(misled(path.read_bytes(), rng))
        else:
            path.write_bytes(damaged(path.read_bytes(), rng))


def misled(content: bytes, rng: np.random.Generator) -> bytes:
    """Return a JSON document with one number extreme or one value of another type."""
    try:
        told = json.loads(content)
    except ValueError:  # damaged before
        return content
    found, values = list(places(told)), _OTHERS
    numbers = [(node, key) for node, key in found if type(node[key]) in (int, float)]
    if numbers and rng.random() < 0.5:
        found, values = numbers, _NUMBERS
    if found:
        node, key = found[int(rng.integers(len(found)))]
        node[key] = values[int(rng.integers(len(values)))]
    return json.dumps(told).encode()


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every value in a JSON document as the list or object that holds it and its index or key there."""
    for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
        yield node, key
        yield from places(node[key])


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """Return the content with one to four things wrong."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        # Half of the places in the first and last kilobyte, where headers and directories are.
        near = int(rng.choice([0, max(0, len(data) - 1024)])) if rng.random() < 0.5 else 0
        span = min(1024, len(data)) if near or rng.random() < 0.5 else len(data)
        at = min(near + int(rng.integers(0, max(1, span))), max(0, len(data) - 1))
        match int(rng.integers(0, 6)):
            case 0:
                data[at : at + 1] = bytes([int(rng.integers(0, 256))])
            case 1:
                word, code = int(rng.choice(_EXTREMES)), str(rng.choice(["<H", "<I", "<Q"]))
                size = struct.calcsize(code)
                data[at : at + size] = struct.pack(code, word & ((1 << 8 * size) - 1))
            case 2:
                data[at : at + 16] = rng.integers(0, 256, 16, np.uint8).tobytes()
            case 3:
                del data[at:]
            case 4:
                data[at:at] = data[at : at + int(rng.integers(1, 64))]
            case _:
                other = int(rng.integers(0, max(1, len(data))))
                data[at : at + 8] = data[other : other + 8]
    return bytes(data)


def read_all(layout: Path, name: str) -> str:
    """Read a slide as a scan would; return what came of it."""
    try:
        backend: Backend = "openslide" if layout.name.endswith(_BY_OPENSLIDE) else "auto"
        with ss.open_slide(layout / name, mpp=0.5, backend=backend) as slide:
            slide.opened()
            holes = 0
            for index, level in enumerate(slide.levels):
                width, height = (min(side, 600) for side in level.size_wh)
                for x, y in ((0, 0), (level.size_wh[0] - width, level.size_wh[1] - height), (-20, -20)):
                    holes += len(slide.read_level(index, x, y, width, height).holes)
            slide.thumbnail(256)
            _ = slide.fingerprint
            return "holes" if holes else "read"
    except SlideError as exc:
        # What is not there is named by its path.
        if "\n" in str(exc) or not str(exc).startswith((name, f"{layout / name}: no such slide")):
            return f"wrong words: {exc}"
        return "refused"
    except MemoryError:
        return "MemoryError"
    except Exception as exc:  # noqa: BLE001  whatever else comes out is what this program looks for
        return f"{type(exc).__name__}: {exc}"


def work(folder: Path, first: int, last: int) -> None:
    """Read seeds from `first` to before `last`; print a line before and after each."""
    layouts = sorted(folder.iterdir())
    for layout in layouts:  # what libraries take once is not the damage's doing
        read_all(layout, main_file(layout))
    most = resource.getrlimit(resource.RLIMIT_AS)[1]
    for seed in range(first, last):
        source = layouts[seed % len(layouts)]
        with tempfile.TemporaryDirectory() as scratch:
            layout = Path(shutil.copytree(source, Path(scratch) / source.name))
            damage(layout, np.random.default_rng(seed))
            print(json.dumps([seed, source.name]), flush=True)
            with suppress(OSError):  # where that is forbidden, the peak is that of all slides so far
                Path("/proc/self/clear_refs").write_text("5")
            used = memory("VmRSS")
            resource.setrlimit(resource.RLIMIT_AS, (memory("VmSize") + _MEMORY_BYTES, most))
            said = read_all(layout, main_file(source))
        print(json.dumps([seed, source.name, said, memory("VmHWM") - used]), flush=True)


def memory(what: str) -> int:
    """Return one of the sizes that Linux gives for this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def outcomes(folder: Path, first: int, last: int) -> Iterator[tuple[int, str, str, int]]:
    """Yield seed, slide, what came of it and the memory it took, over processes that may die."""
    while first < last:
        command = [sys.executable, __file__, "--work", str(folder), "--seed", str(first), "--count", str(last - first)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        begun: tuple[int, str] | None = None
        hung = threading.Event()

        def give_up(process: subprocess.Popen[str] = process, hung: threading.Event = hung) -> None:
            hung.set()
            process.kill()

        assert process.stdout is not None
        timer = threading.Timer(_SECONDS * 4, give_up)  # the first word takes imports
        timer.start()
        for line in process.stdout:
            timer.cancel()
            timer = threading.Timer(_SECONDS, give_up)
            timer.start()
            row = json.loads(line)
            if len(row) == 2:
                begun = row[0], row[1]
                continue
            begun = None
            yield row[0], row[1], row[2], row[3]
            first = row[0] + 1
        timer.cancel()
        code = process.wait()
        if begun is not None:
            yield *begun, "hung" if hung.is_set() else f"died with {code}", 0
            first = begun[0] + 1
        elif code:
            raise SystemExit(f"the reading process ended with {code} before it read anything")


def main() -> None:
    """Damage, read, and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="*", metavar="PATTERN")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    first, last = arguments.seed, arguments.seed + arguments.count
    if arguments.work:
        work(arguments.work, first, last)
        return
    counts: dict[str, Counter[str]] = {}
    wrong, most = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        write_layouts(Path(scratch), arguments.only)
        if not any(Path(scratch).iterdir()):
            parser.error(f"no layout is like {arguments.only!r}")
        for seed, name, said, more in outcomes(Path(scratch), first, last):
            fine = said in ("read", "holes", "refused") and more <= _MEMORY_BYTES
            counts.setdefault(name, Counter())[said if fine else "WRONG"] += 1
            most = max(most, more)
            if not fine:
                wrong.append(f"seed {seed}, {name}: {said}, {more / 1e6:.0f} MB")
                print(wrong[-1], flush=True)
    for name, found in sorted(counts.items()):
        print(f"{name}: {in_words(found)}")
    print(
        f"{last - first} damaged slides: {in_words(sum(counts.values(), Counter()))}; at most {most / 1e6:.0f} MB more"
    )
    raise SystemExit(bool(wrong))


def in_words(counts: Counter[str]) -> str:
    """Return counts in words, the most first."""
    return ", ".join(f"{n} {what}" for what, n in counts.most_common())


if __name__ == "__main__":
    main()
