"""Model directories that say what no model says: one clear line, and nothing from elsewhere is asked for or run."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import transformers as hf

from slidescan.detect import load_detector
from slidescan.detect.card import Colours
from slidescan.errors import ModelError
from tests.families import DETECTORS, network, picture, saved
from tests.test_detect_families import plain


@pytest.fixture
def detr(tmp_path: Path) -> Path:
    return saved(network(partial(plain, hf.DetrForObjectDetection, hf.DetrConfig)), tmp_path)


@pytest.fixture
def rt_detr(tmp_path: Path) -> Path:
    return saved(DETECTORS["RT-DETR"]().model, tmp_path)


def changed(directory: Path, **change: Any) -> Path:
    """Write entries into its config.json."""
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | change))
    return directory


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attn_implementation": "acme/evil"}, "got attn_implementation"),
        ({"_attn_implementation": "kernels-community/flash-attn2"}, "got _attn_implementation"),
        ({"backbone_config": {"attn_implementation": "acme/evil"}}, r"got backbone_config\.attn_implementation"),
        ({"transformers_weights": "adapter_model.bin"}, "got transformers_weights"),
        ({"backbone_config": None, "backbone": "acme/resnet", "use_timm_backbone": False}, "got backbone"),
        ({"return_dict": False}, "got return_dict"),
        ({"model_type": ["detr"]}, "expected model_type to be of type str"),
        ({"num_queries": 0}, "expected num_queries from 1"),
        ({"num_queries": 10**9}, "expected num_queries from 1"),
        ({"id2label": None, "num_labels": 10**8}, "expected 1 to 32768 classes"),
    ],
)
def test_a_configuration_that_has_something_else_run_is_refused(detr: Path, change: dict[str, Any], said: str) -> None:
    """Code or parts from a hub, other weights than the digest knows, or what cannot be."""
    with pytest.raises(ModelError, match=said):
        load_detector(changed(detr, **change), mpp=1.0)


@pytest.mark.parametrize("strides", [[0, 0, 0], [10**9] * 3])
def test_strides_that_no_network_has(rt_detr: Path, strides: list[int]) -> None:
    with pytest.raises(ModelError, match=r"fits its network: strides from 1 to 1024 px"):
        load_detector(changed(rt_detr, feat_strides=strides), mpp=1.0).detect(picture()[None], 0.5)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"encoder_attention_heads": 3}, r"fails on tiles of \d+ x \d+ px \(RuntimeError: shape .* is invalid"),
        (
            {"encoder_ffn_dim": 33},
            r"expected model\.safetensors to fit config\.json; \d+ entries do not, such",
        ),
        ({"decoder_layers": 3}, r"expected model\.safetensors to fit config\.json; \d+ entries do not, such"),
    ],
)
def test_weights_of_another_network(rt_detr: Path, change: dict[str, Any], said: str) -> None:
    """Found where they are loaded, or with the first tile; told in a line."""
    with pytest.raises(ModelError, match=said) as caught:
        load_detector(changed(rt_detr, **change), mpp=1.0).detect(picture()[None], 0.5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json"])
def test_nesting_without_end_is_no_json(detr: Path, name: str) -> None:
    (detr / name).write_text("[" * 100_000)
    with pytest.raises(ModelError, match=f"{name}: expected a JSON file"):
        load_detector(detr, mpp=1.0).detect(picture()[None], 0.5)


def test_names_of_classes_are_of_one_line(detr: Path) -> None:
    """Whoever prints them has no more lines and no commands to a terminal; those of a card are refused."""
    names = {"0": "a\n", "1": "c\x1b]0;owned\x07", "2": "b"}
    assert load_detector(changed(detr, id2label=names), mpp=1.0).classes == ("a�", "c�]0;owned�", "b")
    for classes in (["a\n", "b", "c"], ["", "b", "c"], ["a", "a", "c"]):
        (detr / "slidescan.json").write_text(json.dumps({"name": "x", "classes": classes, "mpp": 1.0}))
        with pytest.raises(ModelError, match="lines of text, each class once"):
            load_detector(detr)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["image_mean", "image_std"])
def test_colours_are_finite(tmp_path: Path, key: str, value: float) -> None:
    told = {"image_processor_type": "DetrImageProcessor", key: [value] * 3}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    with pytest.raises(ModelError, match="three finite channels"):
        Colours.read(tmp_path)


def test_colours_are_those_that_transformers_takes(detr: Path) -> None:
    """Of two files the one for pictures and texts; without a type, that of the kind of model."""
    usual = Colours(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    (detr / "preprocessor_config.json").write_text(json.dumps({"size": {"shortest_edge": 800}}))
    processor = hf.AutoImageProcessor.from_pretrained(detr)
    assert (processor.do_normalize, tuple(processor.image_mean)) == (True, usual.mean)
    assert Colours.read(detr) == usual
    inner = {"image_processor_type": "DetrImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (detr / "processor_config.json").write_text(json.dumps({"image_processor": inner}))
    assert tuple(hf.AutoImageProcessor.from_pretrained(detr).image_mean) == (0.5,) * 3
    assert Colours.read(detr) == Colours(1 / 255, (0.5,) * 3, (0.25,) * 3)
