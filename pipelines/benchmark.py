"""Measure what the README claims, on this machine, and print the table.

python pipelines/benchmark.py stitch      1,000,000 boxes on one core
python pipelines/benchmark.py memory      peak memory on a 20,000² and a 60,000² slide
python pipelines/benchmark.py read        px per second from file to batches of tiles, against codecs and other readers
python pipelines/benchmark.py overlap     a scan against the slower of its reading and its model
python pipelines/benchmark.py ops         deformable attention against transformers' own, and others on a GPU
python pipelines/benchmark.py models      whole detectors, accelerated or not
python pipelines/benchmark.py detector    px per second of the bundled detector against RT-DETRv2-R18, CPU
python pipelines/benchmark.py heap        the bundled detector with what it frees kept, and with glibc's defaults, CPU
python pipelines/benchmark.py grid        the same slide under shifted tile grids, bundled detector
python pipelines/benchmark.py archive     an archive of small slides with two worker processes against one, CPU
python pipelines/benchmark.py             all of these; --smoke for tiny sizes
python pipelines/benchmark.py tune        write the launches of the kernels that are best on this GPU
"""

from __future__ import annotations

import argparse
import importlib
import platform

import slidescan

# Each is imported when it is run: what the op and whole models need is less than what reading slides does.
BENCHES = {
    "stitch": "benchmark_scan.bench_stitch",
    "memory": "benchmark_scan.bench_memory",
    "read": "benchmark_read.bench_read",
    "overlap": "benchmark_overlap.bench_overlap",
    "ops": "benchmark_ops.bench_ops",
    "models": "benchmark_models.bench_models",
    "detector": "benchmark_detector.bench_detector",
    "heap": "benchmark_scan.bench_heap",
    "grid": "benchmark_scan.bench_grid",
    "archive": "benchmark_archive.bench_archive",
    "tune": "benchmark_tune.tune",
}


def main() -> None:
    """Run the chosen benchmarks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", nargs="*", choices=[*BENCHES, []], default=[])
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, for tests")
    arguments = parser.parse_args()
    print(f"slidescan {slidescan.__version__}, Python {platform.python_version()}, {platform.machine()}")
    for name in arguments.which or [name for name in BENCHES if name != "tune" or arguments.smoke]:
        module, function = BENCHES[name].split(".")
        print(getattr(importlib.import_module(module), function)(arguments.smoke), flush=True)


if __name__ == "__main__":
    main()
