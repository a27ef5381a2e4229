"""Settings of a training run, as its YAML file has them."""

from __future__ import annotations

from pathlib import Path

import pytest

from slidescan.errors import ConfigError
from slidescan.train.settings import TrainSettings, load_settings

ROOT = Path(__file__).resolve().parents[1]


def test_the_shipped_settings_are_valid() -> None:
    """The file in configs/ loads, and its smoke version is a valid run too."""
    settings = load_settings(ROOT / "configs" / "train_mitosis.yaml")
    assert [v.mpp for v in settings.variants] == [0.25, 0.5]
    assert TrainSettings.model_validate(settings.smoke().model_dump()).crops


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: 1", "learning_rate"),
        ("variants: [{mpp: -1}]", r"variants\.0\.mpp"),
        ("variants: [{mpp: 40, steps: 1}]", r"variants\.0\.mpp"),
        ("variants: [{tile_px: [100]}]", "tile_px"),
        ("variants: [{mpp: 0.25}]", "steps or minutes"),
        ("variants: [{steps: 1}, {steps: 2}]", "variants of different mpp"),
        ("variants: [{steps: 1, input_px: 64}]", "input_px"),
        ("variants: [{steps: 1, tile_px: []}]", "tile_px"),
        ("seed: -1", "seed"),
        ("a: [", "YAML"),
        ("name: 2021-02-30", "expected YAML, got day is out of range"),
        ("[" * 3000, "expected YAML"),
        ("stain_jitter: .inf", "stain_jitter"),
        ("seed: 18446744073709551615", "seed"),
        ("classes: [a, a]", "a name of its own"),
        ("classes: ['']", "a name of its own"),
        ("classes: [a]\nattributes: [a]", "a name of its own"),
    ],
)
def test_a_wrong_setting_is_named(tmp_path: Path, text: str, message: str) -> None:
    """Unknown keys, values out of range and broken YAML say where."""
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_settings(path)
    with pytest.raises(ConfigError, match="expected a YAML file"):
        load_settings(tmp_path / "missing.yaml")


def test_a_start_lies_where_the_settings_do(tmp_path: Path) -> None:
    """Unless there is none of its name: then it is a bundled one."""
    (tmp_path / "mine").mkdir()
    variants = "{steps: 1, start: mine}, {mpp: 0.5, steps: 1, start: mitosis}, {mpp: 1, steps: 1}"
    (tmp_path / "my.yaml").write_text(f"variants: [{variants}]")
    starts = [variant.start for variant in load_settings(tmp_path / "my.yaml").variants]
    assert starts == [str(tmp_path / "mine"), "mitosis", None]
