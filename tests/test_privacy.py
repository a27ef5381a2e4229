"""Slides carry patients: what is planted in every field of a slide comes out nowhere."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile

import slidescan as ss
from slidescan import scan_slide
from slidescan.archive.engine import estimate_archive
from slidescan.archive.explained import as_listed
from slidescan.archive.listing import Entry
from slidescan.errors import SlidescanError
from slidescan.testing import TISSUE_GROUND, OracleDetector, disc_image, random_centers
from tests.archives import write_slide

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


def test_a_file_named_after_a_patient_goes_by_the_id_of_the_list(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Whatever becomes of it: done, damaged, without scale, of another digest, not there; also in a dry run's words."""
    folder = tmp_path / "Doe Jane 1957"
    write_slide(folder / "Jane 1.tiff", 1)
    write_slide(folder / "Jane 2.tiff", 2, mpp=None)
    (folder / "Jane 3.svs").write_bytes(b"II*\0 not a slide")
    write_slide(folder / "Jane 4.tiff", 4)
    (folder / "Jane 6.mrxs").write_bytes(b"\xff\xd8 no slide")
    names = [f"Jane {n}.{'svs' if n in (3, 5) else 'mrxs' if n == 6 else 'tiff'}" for n in range(1, 7)]
    rows = [f"{name},P{n},{'0' * 64 if n == 4 else ''}" for n, name in enumerate(names, 1)]
    (folder / "slides.csv").write_text("\n".join(["slide_path,slide_id,sha256", *rows]) + "\n")
    records = ss.scan_archive(folder / "slides.csv", ORACLE, out=tmp_path / "runs", workers=1)
    assert [record.reason for record in records] == [
        None, "no_mpp", "open_error", "wrong_digest", "not_found", "open_error"
    ]  # fmt: skip
    assert all(record.message.startswith(f"{record.slide_id}: ") for record in records[1:])
    for _, told in estimate_archive(folder / "slides.csv", ORACLE, workers=1):
        assert "Jane" not in str(told)
    assert "Jane" not in "".join(capfd.readouterr())
    for file in (tmp_path / "runs").rglob("*"):
        assert "Jane" not in file.name
        assert not file.is_file() or b"Jane" not in file.read_bytes(), file.name


def test_a_picture_is_headed_by_the_name_of_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not by that of the file, which may be a patient's."""
    headings: list[str] = []
    draw = scan_slide.draw_overview
    monkeypatch.setattr(scan_slide, "draw_overview", lambda *a: (headings.append(a[2]), draw(*a))[1])
    write_slide(tmp_path / "Jane.tiff", 1)
    ss.scan(tmp_path / "Jane.tiff", ORACLE, out=tmp_path / "runs" / "P1")
    ss.scan(tmp_path / "Jane.tiff", ORACLE, out=tmp_path / "runs" / "P2", title="case 2")
    assert headings == ["P1", "case 2"]


@pytest.mark.parametrize(
    ("path", "slide_id", "said", "expected"),
    [
        ("/a/Jane 1.tiff", "P1", "Jane 1.tiff: 1 parts", "P1: 1 parts"),
        ("/a/1.svs", "P1", "1.svs: 1 parts; expected 1 to 8, got 1.5", "P1: 1 parts; expected 1 to 8, got 1.5"),
        ("/a/slide.svs", "P1", "is slide.svs a slide?", "is P1 a slide?"),
        ("/a/Jane.svs", "Jane.svs x", "Jane.svs: no", "Jane.svs x: no"),
        ("/a/Jane.mrxs", "P1", "/a/Jane.mrxs: Jane/Slidedat.ini lacks", "P1: P1/Slidedat.ini lacks"),
        ("/a/Jane.ome.zarr", "P1", "Jane.ome.zarr: Jane.ome.zarr/0/c lacks", "P1: P1/0/c lacks"),
        ("s3://bucket/", "P1", "cannot read it: a reason", "cannot read it: a reason"),
    ],
)
def test_what_a_message_calls_a_slide(path: str, slide_id: str, said: str, expected: str) -> None:
    """Its id for its name and the folder beside it; no other word, and no id twice."""
    assert as_listed(said, Entry(slide_id, path)) == expected
