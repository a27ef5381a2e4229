"""What the tests of training share: made-up crops, and one run of a few steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image as Picture

from tests.marked import marked_crops
from tests.once import once
from tests.training.smoke import run


@pytest.fixture(scope="session")
def fake_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory laid out like the real crops, with green dots for figures."""
    root = tmp_path_factory.mktemp("data")
    folder = root / "midog21" / "images"
    folder.mkdir(parents=True)
    images, annotations = [], []
    for i, crop in enumerate(marked_crops(24)):
        Picture.fromarray(crop.image).save(folder / f"MIDOG21_{i}.png")
        split = "test" if i % 4 == 0 else "train"
        row = {"id": i, "file_name": f"MIDOG21_{i}.png", "slide": f"{i % 12}", "benchmark_split": split}
        images.append(
            {**row, "x0": 1000.0 * i, "y0": 0.0, "majority": ("Normal", "Atypical")[i % 3 == 0], "scanner": "s"}
        )
        annotations.append({"image_id": i, "category_id": 1, "bbox": [39, 39, 50, 50], "source": f"MIDOG++ #{i}"})
    table = {"images": images, "annotations": annotations}
    (root / "midog21" / "annotations.coco.json").write_text(json.dumps(table))
    return root


@pytest.fixture(scope="session")
def trained(fake_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a whole smoke run; one for all processes of the tests, so it stays as it is."""
    return once(tmp_path_factory, "trained", lambda out: run(fake_data, out, measured=True, shifts=1))
