"""Every broken file there is: one clear line, the right exit code, no traceback, no hang, nothing that looks done."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

import slidescan as ss
from slidescan.errors import SlidescanError
from slidescan.testing import OracleDetector

ORACLE = OracleDetector(mpp=0.5, input_px=512, object_um=20.0, max_per_tile=100_000)
ROOT = Path(__file__).resolve().parents[2] / "shared" / "broken"
# A bad tile costs that tile and the slide completes; everything else is refused.
COMPLETES = {
    "appmag_missing.svs",
    "bitflip200_seed0.svs",
    "bitflip200_seed2.svs",
    "tile50_half_zeroed.svs",
    "tile50_length_past_eof.svs",
    "tile50_zero_length.svs",
    "truncated_last_byte.svs",
}


def broken() -> list[str]:
    return sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*") if p.is_file())


@pytest.mark.data
@pytest.mark.parametrize("name", broken() or ["none"])
def test_a_broken_file_is_told_in_one_line_or_completes(
    shared: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A scan of it ends in one line that names the file, or completes with the hole in its coverage."""
    path = shared / "broken" / name
    outcome = None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        try:
            outcome = ss.scan(path, ORACLE, out=tmp_path / "case")
        except SlidescanError as exc:
            said = str(exc)
            assert path.name in said
            assert "\n" not in said
            assert 20 < len(said) < 500
    assert "".join(capfd.readouterr()) == ""
    assert (tmp_path / "case" / "manifest.json").exists() == (outcome is not None)
    if path.name in COMPLETES:
        assert outcome is not None, said
        assert outcome.anomaly.analysed_fraction > 0.9
