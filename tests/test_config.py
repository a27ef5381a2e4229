"""Settings and errors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import yaml

from slidescan import errors
from slidescan.config import ScanConfig
from slidescan.errors import ConfigError, SlidescanError

ROOT = Path(__file__).resolve().parents[1]


def test_default_yaml_equals_the_code() -> None:
    """configs/default.yaml lists exactly the defaults; on failure copy what ScanConfig().dump() prints into it."""
    stored = yaml.safe_load((ROOT / "configs" / "default.yaml").read_text(encoding="utf-8"))
    assert ScanConfig().model_dump(mode="json") == stored


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tilling:\n  tile_px: 512\n", "unknown key tilling; known there: tissue, tiling"),
        ("tiling:\n  tile_size: 512\n", "unknown key tiling.tile_size; known there: tile_px"),
        ("tiling:\n  tile_px: 7\n", "tiling.tile_px"),
        ("map:\n  um_per_px: .inf\n", "map.um_per_px"),
        ("detect:\n  threshold: yes\n", "detect.threshold"),
        ("detect:\n  classes: []\n", "detect.classes"),
        ("detect:\n  classes: 5\n", "expected the name of a class, or a list of them, got 5"),
        ("detect:\n  classes: yes\n", "expected something else than yes or no, got True"),
        ("detect:\n  classes: [1]\n", "detect.classes.0"),
        ("map:\n  density_sigma_um: 1.0e+12\n", "map.density_sigma_um"),
        ("stitch:\n  iou: many\n", "got 'many'"),
        ("- 1\n", "expected sections"),
        ("a: [\n", "expected a YAML file"),
    ],
)
def test_bad_file_is_one_line_that_names_the_key(tmp_path: Path, text: str, said: str) -> None:
    """A wrong file is refused with its name and the key."""
    path = tmp_path / "bad.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        ScanConfig.load(path)
    assert said in str(caught.value)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_overrides_apply_on_top_of_the_file(tmp_path: Path) -> None:
    """--set wins over the file, the file over the defaults."""
    path = tmp_path / "mine.yaml"
    path.write_text("tiling:\n  tile_px: 512\n  region_px: 2048\n", encoding="utf-8")
    config = ScanConfig.load(path, {"tiling.tile_px": 768, "color": "srgb"})
    assert (config.tiling.tile_px, config.tiling.region_px, config.color) == (768, 2048, "srgb")


def test_missing_file_is_refused(tmp_path: Path) -> None:
    """A path that is not there is named."""
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        ScanConfig.load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("name", [name for name in errors.__all__ if not issubclass(getattr(errors, name), Warning)])
def test_every_error_survives_pickling(name: str) -> None:
    """Errors cross process borders: same type, same one-line text."""
    error = getattr(errors, name)("case.svs: expected this,\n got that")
    back = pickle.loads(pickle.dumps(error))
    assert (type(error), str(error)) == (type(back), str(back))
    assert isinstance(back, SlidescanError)
    assert "\n" not in str(back)


def test_a_section_of_comments_has_its_defaults(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("detect:\n  # threshold: 0.3\ntissue:\n")
    assert ScanConfig.load(tmp_path / "a.yaml", {"tiling.tile_px": 256}).detect == ScanConfig().detect


def test_what_is_no_file_and_no_mapping_is_said() -> None:
    with pytest.raises(ConfigError, match="expected a YAML file of settings"):
        ScanConfig.load([1])  # type: ignore[arg-type]
