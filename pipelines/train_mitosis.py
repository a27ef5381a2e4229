"""Train the bundled detector: python pipelines/train_mitosis.py configs/train_mitosis.yaml -o runs/train [--smoke].

Thin on purpose: the work is in `slidescan.train`. A stopped run goes on where it was; metrics.json holds the test
numbers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from slidescan.errors import SlidescanError
from slidescan.train.mitosis import train_mitosis
from slidescan.train.settings import load_settings

ROOT = Path(__file__).resolve().parent.parent


def main(argv: list[str] | None = None) -> int:
    """Run the pipeline; return the exit status."""
    parser = argparse.ArgumentParser(description="Train the mitosis detector.")
    parser.add_argument("config", type=Path, help="YAML file of settings")
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory for checkpoints, models and metrics")
    parser.add_argument("--data", type=Path, help="directory that holds midog21 (default: `data` of the config)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of a tiny network, to see that all parts fit")
    args = parser.parse_args(argv)
    try:
        settings = load_settings(args.config)
        settings = settings.model_copy(update={"data": args.data or ROOT / settings.data})
        train_mitosis(settings.smoke() if args.smoke else settings, args.out, lambda line: print(line, flush=True))
    except SlidescanError as exc:
        print(f"train_mitosis: {exc}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
