"""Convert a YOLO: python pipelines/convert_ultralytics.py best.pt -o DIR --mpp 0.25 [--object-um 15 --threshold 0.5].

Thin on purpose: the work is `slidescan.detect.convert_yolo`. It needs the extra `ultralytics`, which is AGPL-3.0, and
no connection. DIR is then a model: slidescan scan case.svs --model ultralytics:DIR.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from slidescan.detect import convert_yolo
from slidescan.endings import ends_in_a_line


def main() -> None:
    """Run the pipeline."""
    parser = argparse.ArgumentParser(
        description="Write a model directory from a YOLO26 or YOLOv10 of ultralytics.",
        epilog="A .pt is a pickle, which can run code. It is opened so that it rebuilds known layers and nothing else; "
        "all the same, convert only files you trust.",
    )
    parser.add_argument("source", nargs="?", help="best.pt; or yolo26n.yaml, for random weights")
    parser.add_argument("-o", "--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--mpp", type=float, required=True, help="µm/px it was trained at; 1 for photographs")
    parser.add_argument("--object-um", type=float, default=15.0, help="edge of the largest object, µm")
    parser.add_argument("--threshold", type=float, default=0.5, help="operating score")
    parser.add_argument("--smoke", action="store_true", help="random weights instead, to see that all parts fit")
    args = parser.parse_args()
    source = "yolo26n.yaml" if args.smoke else args.source
    if source is None:
        parser.error("expected a .pt or .yaml file, got none")
    model = convert_yolo(source, args.out, mpp=args.mpp, object_um=args.object_um, threshold=args.threshold)
    print(f"ultralytics:{args.out}: {len(model.classes)} classes, tiles of {model.input_px} px at {model.mpp:g} µm/px")


if __name__ == "__main__":
    with ends_in_a_line("convert_ultralytics"):
        main()
