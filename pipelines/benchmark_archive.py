"""What a second worker process gives an archive of small slides."""

from __future__ import annotations

import shutil
import statistics
import tempfile
from pathlib import Path

from benchmark_read import small_slide

import slidescan as ss
from slidescan.archive import ArchiveProgress
from slidescan.phantom import write_phantom

__all__ = ["bench_archive"]


def bench_archive(smoke: bool) -> str:
    """Scan copies of one slide with one process and with two, in turns; the start and the last slides do not count."""
    copies, rounds = (4, 1) if smoke else (16, 3)
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "slides"
        folder.mkdir()
        if smoke:
            source = Path(scratch) / "tiny.tiff"
            write_phantom(source, ss.Phantom((512, 512), 0.5, n_figures=4))
        else:
            source = small_slide(Path(scratch))
        for i in range(copies):
            shutil.copyfile(source, folder / f"{i}{source.suffix}")
        for turn in range(rounds):
            for workers, each in seconds.items():
                ended: list[ArchiveProgress] = []
                out = Path(scratch) / f"{turn}-{workers}"
                ss.scan_archive(folder, out=out, workers=workers, remember=False, on_slide=ended.append)
                # The start of a run does not count, nor its end, where one process has nothing left to do.
                first, last = ended[workers - 1], ended[-workers]
                each.append((last.seconds - first.seconds) / (last.done - first.done))
    ratio = statistics.median(one / two for one, two in zip(*seconds.values(), strict=True))
    return f"archive: two processes {ratio:.2f}x as fast as one, {copies} slides"
