"""Slides carry patients: what is planted in every field of a slide comes out nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

import slidescan as ss
from slidescan.errors import SlidescanError
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image, random_centers

CANARY = "DOE^JANE-19570401"
ORACLE = OracleDetector(mpp=0.5, input_px=256, object_um=20.0, max_per_tile=1000)


def planted(path: Path, description: str) -> None:
    """Write an Aperio-like slide with the canary in every text field, and label and macro pages that show it."""
    centers = random_centers(np.random.default_rng(0), (1500, 1200), 20, apart_px=40)
    slide = disc_image((1500, 1200), centers, 11, ground=TISSUE_GROUND)
    loud = np.zeros((300, 400, 3), np.uint8)
    loud[..., 0] = 255  # pure red: easy to find in any picture
    text = {
        "software": CANARY,
        "datetime": "1957:04:01 00:00:00",
        "extratags": [
            (271, 2, None, CANARY, True),  # Make
            (315, 2, None, CANARY, True),  # Artist
            (316, 2, None, CANARY, True),  # HostComputer
            (33432, 2, None, CANARY, True),  # Copyright
        ],
    }
    with tifffile.TiffWriter(path) as tiff:
        options = {"tile": (256, 256), "compression": "jpeg", "photometric": "rgb", "metadata": None}
        tiff.write(slide, description=description, **options, **text)
        tiff.write(slide[::8, ::8], photometric="rgb", compression="jpeg", description=description, metadata=None)
        for name in ("label", "macro"):
            tiff.write(
                loud,
                subfiletype=1 if name == "label" else 9,
                description=f"Aperio {name} 400x300 {CANARY}",
                photometric="rgb",
                compression="lzw",
                metadata=None,
            )


APERIO = (
    f"Aperio Image Library v12\r\n1500x1200 (256x256) JPEG/RGB Q=70|AppMag = 20|MPP = 0.5|Filename = {CANARY}|"
    f"User = {CANARY}|Date = 04/01/57|Title = {CANARY}|ImageID = {CANARY}|Barcode = {CANARY}"
)


def test_a_planted_patient_reaches_no_output(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Neither files, nor stdout, stderr, repr or manifest hold the canary; no picture shows the label."""
    path = tmp_path / "case.svs"
    planted(path, APERIO)
    slide = ss.open_slide(path)
    result = ss.scan(slide, ORACLE, out=tmp_path / "runs" / "case")
    result.to_geojson(tmp_path / "runs" / "case.geojson")
    result.to_csv(tmp_path / "runs" / "case.csv")
    said = "".join(capfd.readouterr()) + repr(slide) + repr(result) + repr(result.summary())
    assert len(result.found) == 20
    for needle in (CANARY, "JANE", "19570401", "1957:04"):
        assert needle not in said
        for file in (tmp_path / "runs").rglob("*"):
            if file.is_file():
                data = file.read_bytes()
                assert needle.encode() not in data, file.name
                assert needle.encode("utf-16-le") not in data, file.name
    # The path is the user's; it stays out of what may be handed on.
    for file in (tmp_path / "runs").rglob("*"):
        assert not file.is_file() or str(tmp_path).encode() not in file.read_bytes(), file.name
    from PIL import Image

    picture = np.asarray(Image.open(tmp_path / "runs" / "case" / "overview.png").convert("RGB"), int)
    assert not ((picture[..., 0] > 240) & (picture[..., 1] < 15) & (picture[..., 2] < 15)).any()


def test_errors_do_not_quote_the_slides_text(tmp_path: Path) -> None:
    """A slide refused for its µm/px, or damaged, is refused without quoting what it says of the patient."""
    for name, description in (("a.svs", APERIO.replace("0.5", CANARY)), ("b.svs", APERIO.replace("0.5", "896"))):
        planted(tmp_path / name, description)
        with pytest.raises(SlidescanError) as caught:
            ss.scan(tmp_path / name, ORACLE)
        assert CANARY not in str(caught.value)
    data = (tmp_path / "b.svs").read_bytes()
    (tmp_path / "c.svs").write_bytes(data[: len(data) // 2])
    done = subprocess.run(
        [sys.executable, "-m", "slidescan.cli", "info", tmp_path / "c.svs"], capture_output=True, text=True, check=False
    )
    assert "JANE" not in done.stdout + done.stderr
