"""Which slides a folder or a pattern holds: each once, and what is left out is said."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, generate_uid

import slidescan as ss
from slidescan.archive import read_listing
from slidescan.errors import ConfigError, SlideWarning
from tests.archives import write_cohort, write_slide

WSI, SEGMENTATION = "1.2.840.10008.5.1.4.1.1.77.1.6", "1.2.840.10008.5.1.4.1.1.66.4"


def write_dicom(path: Path, series: str, *, kind: str = WSI, flavour: str = "VOLUME") -> None:
    """Write the head of a DICOM file, with elements after the one that names its series."""
    head = Dataset()
    head.file_meta = FileMetaDataset()
    head.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    head.file_meta.MediaStorageSOPClassUID = head.SOPClassUID = kind
    head.file_meta.MediaStorageSOPInstanceUID = head.SOPInstanceUID = generate_uid()
    head.ImageType = ["ORIGINAL", "PRIMARY", flavour, "NONE"]
    head.PatientName = "Nobody^At All"
    head.SeriesInstanceUID = series
    head.Rows = head.Columns = 256
    path.parent.mkdir(parents=True, exist_ok=True)
    head.save_as(path, enforce_file_format=True)


def names(source: Path | str, root: Path) -> list[str]:
    return [Path(entry.path).relative_to(root).as_posix() for entry in read_listing(source)]


class TestFolder:
    def test_links_to_folders_are_followed_once(self, tmp_path: Path) -> None:
        """Slides on another mount are found; a link that leads back ends nowhere."""
        for name in ("slides/a.svs", "mount/b.svs"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).touch()
        (tmp_path / "slides/batch2").symlink_to(tmp_path / "mount")
        (tmp_path / "slides/again").symlink_to(tmp_path / "mount")
        (tmp_path / "mount/back").symlink_to(tmp_path / "slides")
        assert [entry.slide_id for entry in read_listing(tmp_path / "slides")] == ["a", "b"]
        found = [Path(entry.path).name for entry in read_listing(f"{tmp_path}/slides/**/*.svs")]
        assert found == ["a.svs", "b.svs"]  # a pattern's ** would go round and round

    def test_a_folder_that_cannot_be_read_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "lost+found").mkdir()
        scandir = os.scandir

        def deny(path: str) -> object:
            if str(path).endswith("lost+found"):
                raise PermissionError(13, "Permission denied", str(path))
            return scandir(path)

        monkeypatch.setattr(os, "scandir", deny)
        with pytest.raises(ConfigError, match=r"lost\+found: expected a folder .* Permission denied"):
            read_listing(tmp_path)

    def test_a_slide_is_listed_once(self, tmp_path: Path) -> None:
        """Nothing of a slide that is made of many files, nothing hidden and no result is another slide."""
        cohort = write_cohort(tmp_path)
        root = cohort.parent
        (root / ".trash").mkdir()
        write_slide(root / ".trash/gone.tiff", 1)
        for name in ("a.ome.zarr/0/inner.tiff", "b.mrxs", "b/Data0001.tif", "runs/slides/x/map.tif", "runs/new.svs"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        (root / "runs/records").mkdir()
        for name in ("runs/log.jsonl", "photo.jpg", "notes.txt", "case.geojson"):
            (root / name).touch()
        (root / "case/anomaly.ome.zarr").mkdir(parents=True)
        with pytest.warns(SlideWarning, match=r"9 slides; left out files of other kinds: 1 \.jpg"):
            found = names(root, root)
        slides = "broken.svs case.tiff case.tiff other.tiff unscaled-too.tiff unscaled.tiff".split()  # noqa: SIM905
        assert sorted(Path(name).name for name in found) == sorted([*slides, "a.ome.zarr", "b.mrxs", "new.svs"])
        for pattern in ("**", "**/*"):
            with pytest.warns(SlideWarning, match=r"9 slides; left out files of other kinds: 1 \.jpg"):
                assert names(f"{root}/{pattern}", root) == found
        assert names(f"{root}/**/*.zarr", root) == ["a.ome.zarr"]
        assert names(f"{root}/**/case.tiff", root) == [name for name in found if name.endswith("case.tiff")]

    def test_what_is_left_out_is_said(self, tmp_path: Path) -> None:
        """A person who meant the others must not find out on Monday."""
        for name in ("a.svs", "b.isyntax", "c.isyntax", "d.JPG", "README"):
            (tmp_path / name).touch()
        with pytest.warns(SlideWarning) as said:
            assert names(tmp_path, tmp_path) == ["a.svs"]
        told = "1 slide; left out files of other kinds: 2 .isyntax, 1 .jpg, 1 without suffix"
        assert str(said[0].message) == f"{tmp_path}: {told}"
        (tmp_path / "a.svs").unlink()
        with pytest.raises(ConfigError, match=r"expected slides \(\.bif, .*found none, but 2 \.isyntax, 1 \.jpg"):
            read_listing(tmp_path)


class TestDicom:
    def test_a_series_is_one_slide(self, tmp_path: Path) -> None:
        """By its first file with pixels; beside others, and again in another folder; what is damaged stays."""
        one, other = "1.2.3", "1.2.4"
        write_dicom(tmp_path / "a/1.dcm", one, flavour="LABEL")
        write_dicom(tmp_path / "a/2.DCM", one)
        write_dicom(tmp_path / "a/3.dcm", one)
        write_dicom(tmp_path / "a/4.dcm", other, flavour="OVERVIEW")
        write_dicom(tmp_path / "a/5.dcm", "1.2.5", kind=SEGMENTATION)
        write_dicom(tmp_path / "b/1.dcm", one)
        (tmp_path / "b/2.dcm").write_bytes(bytes(128) + b"DICM" + b"\xff" * 99)
        slides = ["a/2.DCM", "a/4.dcm", "b/1.dcm", "b/2.dcm"]
        with pytest.warns(SlideWarning, match=r"4 slides; left out files of other kinds: 1 \.dcm that are no slides"):
            assert names(tmp_path, tmp_path) == slides
        assert names(f"{tmp_path}/**/*.[dD][cC][mM]", tmp_path) == slides
        (tmp_path / "all.csv").write_text("slide_path\na/2.DCM\na/4.dcm\n")
        assert names(tmp_path / "all.csv", tmp_path) == ["a/2.DCM", "a/4.dcm"]
        (tmp_path / "all.csv").write_text("slide_path\na/2.DCM\na/3.dcm\na/4.dcm\na/5.dcm\n")
        with pytest.raises(ConfigError, match=r"all\.csv: expected each slide once, got 3 \.dcm files of 2;"):
            read_listing(tmp_path / "all.csv")

    @pytest.mark.data
    def test_real_ones_open(self, shared: Path, tmp_path: Path) -> None:
        for folder in ("dicom_cmu_napari", "dicom_cmu_wsic_jpeg"):
            for file in (shared / "slides" / folder).glob("*.dcm"):
                shutil.copy(file, tmp_path)
        entries = read_listing(tmp_path)
        assert len(entries) == 2
        assert ss.open_slide(entries[1].path).size_wh == (2220, 2967)  # OpenSlide does not know the other's colours
