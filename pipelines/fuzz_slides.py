"""Damage small slides at random and read them: every one must give a slide error or its pixels, never a crash.

python pipelines/fuzz_slides.py                    10,000 files, seeds 0 to 9,999
python pipelines/fuzz_slides.py --count 300 --seed 7

Each seed names one damage of one slide: bytes overwritten, words set to extremes, parts cut, repeated or moved. Reading
happens in a process of its own under a limit of memory. A process that dies or hangs costs its seed, which is reported,
and the rest goes on. Exit code 1 if there was any.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile

import slidescan as ss
from slidescan.errors import SlideError

_MEMORY_BYTES = 1 << 30  # that reading a damaged file may add; more is a failed allocation, which must become an error
_SECONDS = 30  # without a word from the reading process: it hangs
_EXTREMES = (0, 1, 0x7F, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)


def small_slides(folder: Path) -> list[Path]:
    """Write one small slide of each layout; return them."""
    image = np.random.default_rng(0).integers(0, 256, (300, 420, 3), np.uint8)
    image = np.kron(image[::20, ::20], np.ones((20, 20, 1), np.uint8))
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
    tifffile.imwrite(folder / "strips.tiff", image, photometric="rgb", compression="zlib", rowsperstrip=16)
    return sorted(path for path in folder.iterdir() if path.is_file())


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


def read_all(path: Path) -> str:
    """Read a slide as a scan would; return what came of it."""
    try:
        with ss.open_slide(path, mpp=0.5) as slide:
            slide.opened()
            holes = 0
            for index, level in enumerate(slide.levels):
                width, height = (min(side, 600) for side in level.size_wh)
                for x, y in ((0, 0), (level.size_wh[0] - width, level.size_wh[1] - height), (-20, -20)):
                    holes += len(slide.read_level(index, x, y, width, height).holes)
            slide.thumbnail(256)
            return "holes" if holes else "read"
    except SlideError as exc:
        if "\n" in str(exc) or not str(exc).startswith(path.name):
            return f"wrong words: {exc}"
        return "refused"
    except MemoryError:
        return "MemoryError"
    except Exception as exc:  # noqa: BLE001  whatever else comes out is what this program looks for
        return f"{type(exc).__name__}: {exc}"


def work(folder: Path, first: int, last: int) -> None:
    """Read seeds from `first` to before `last`; print a line before and after each."""
    slides = sorted(path for path in folder.iterdir() if path.is_file())
    for path in slides:  # what libraries take once is not the damage's doing
        read_all(path)
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    virtual = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (virtual + _MEMORY_BYTES, virtual + _MEMORY_BYTES))
    with tempfile.TemporaryDirectory() as scratch:
        for seed in range(first, last):
            rng = np.random.default_rng(seed)
            source = slides[int(rng.integers(len(slides)))]
            path = Path(scratch) / source.name
            path.write_bytes(damaged(source.read_bytes(), rng))
            print(json.dumps([seed, source.name]), flush=True)
            said = read_all(path)
            more = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - used
            print(json.dumps([seed, source.name, said, more]), flush=True)


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
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    first, last = arguments.seed, arguments.seed + arguments.count
    if arguments.work:
        work(arguments.work, first, last)
        return
    counts: Counter[str] = Counter()
    wrong, most = [], 0
    with tempfile.TemporaryDirectory() as scratch:
        small_slides(Path(scratch))
        for seed, name, said, more in outcomes(Path(scratch), first, last):
            fine = said in ("read", "holes", "refused") and more <= _MEMORY_BYTES
            counts[said if fine else "WRONG"] += 1
            most = max(most, more)
            if not fine:
                wrong.append(f"seed {seed}, {name}: {said}, {more / 1e6:.0f} MB")
                print(wrong[-1], flush=True)
    told = ", ".join(f"{n} {what}" for what, n in counts.most_common())
    print(f"{last - first} damaged slides: {told}; at most {most / 1e6:.0f} MB more")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
