"""Which DICOM files are one slide, by their heads; OpenSlide reads the pixels."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Instance", "read_instance", "series_beside"]

_WSI = "1.2.840.10008.5.1.4.1.1.77.1.6"  # VL Whole Slide Microscopy Image Storage, DICOM PS3.6 table A-1
_SERIES_TAG = 0x0020000E  # SeriesInstanceUID; tags come in rising order, and those of a million tiles after it


@dataclass(frozen=True, slots=True)
class Instance:
    """What a DICOM file says that it is."""

    is_slide: bool
    series: str
    """UID of what it belongs to: OpenSlide opens all files of a series that lie beside the one it is given."""
    has_pixels: bool
    """Whether it holds a level of the slide, not its label or an overview."""


def read_instance(file: Path) -> Instance | None:
    """Read a file's head; None where it is no DICOM that can be understood."""
    from pydicom.filereader import read_partial

    try:
        with warnings.catch_warnings(), file.open("rb") as opened:
            warnings.simplefilter("ignore")
            head = read_partial(opened, stop_when=lambda tag, vr, length: tag > _SERIES_TAG)
            kind, series = str(head.SOPClassUID), str(head.SeriesInstanceUID)
            return Instance(kind == _WSI, series, "VOLUME" in head.get("ImageType", ()))
    except Exception:  # noqa: BLE001  # a damaged file may raise anything there
        return None


def series_beside(file: Path) -> list[Path]:
    """Return the levels of a slide, of which a file is named: in its folder, sorted; none where it is no slide."""
    named = read_instance(file)
    if named is None:
        return []
    beside = sorted(each for each in file.parent.iterdir() if each.suffix.lower() == ".dcm")
    told = ((each, read_instance(each)) for each in beside)
    return [each for each, one in told if one is not None and one.has_pixels and one.series == named.series]
