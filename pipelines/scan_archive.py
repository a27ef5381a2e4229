"""Scan an archive from Python: a list of slides, one line a slide, and the best of all slides at the end.

python pipelines/scan_archive.py slides.csv -o runs     run it again after anything: it continues
"""

from __future__ import annotations

import argparse
from pathlib import Path

import slidescan as ss
from slidescan.archive import ArchiveProgress, archive_status
from slidescan.endings import ends_in_a_line


def say(now: ArchiveProgress) -> None:
    """Print what became of a slide."""
    print(f"{now.done + now.failed} of {now.slides}: {now.record.slide_id} {now.record.reason or 'done'}", flush=True)


def main() -> None:
    """Scan, and print the slides with most figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("listing", help="CSV, TSV or Parquet with slide_path, a folder, or a pattern")
    parser.add_argument("-o", "--out", type=Path, default=Path("runs"))
    parser.add_argument("--model", default="mitosis")
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    records = ss.scan_archive(
        arguments.listing, arguments.model, out=arguments.out, workers=arguments.workers, on_slide=say
    )
    print("\n".join(archive_status(arguments.out).lines()))
    done = [record for record in records if record.state == "done"]
    for record in sorted(done, key=lambda record: -record.told["found"])[:5]:
        print(f"{record.told['found']:>6} found on {record.slide_id}, hotspot {record.told['hotspot_count']}")


if __name__ == "__main__":  # the workers are processes that import this file
    with ends_in_a_line("scan_archive", "stopped; run it again to continue"):
        main()
