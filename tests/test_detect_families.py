"""Any object-detection model of transformers is a detector: its scores, labels and boxes, and what is refused."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import nn

from slidescan.detect import load_detector
from slidescan.detections import Detections
from slidescan.errors import ModelError
from tests.families import (
    DETECTORS,
    HEIGHT,
    WIDTH,
    Case,
    grounding,
    lw_detr,
    network,
    picture,
    pixels,
    saved,
    stages,
)


def plain(family: type, kind: type, classes: int = 3) -> Case:
    """DETR and what followed it without deformable attention."""
    config = kind(
        backbone_config=stages(hf.ResNetConfig),
        num_queries=10,
        encoder_layers=2,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_layers=2,
        decoder_ffn_dim=32,
        decoder_attention_heads=2,
        d_model=16,
        num_labels=classes,
    )
    return Case(family(config), pixels(), 0)


def yolos() -> Case:
    """A ViT whose last tokens are the objects."""
    config = hf.YolosConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 64],
        patch_size=16,
        num_detection_tokens=10,
        num_labels=3,
    )
    return Case(hf.YolosForObjectDetection(config), pixels(), 0)


FAMILIES: dict[str, Callable[[], Case]] = DETECTORS | {
    "LW-DETR, windows of 64 px": partial(lw_detr, patch_size=16, num_windows=16),
    "DETR": partial(plain, hf.DetrForObjectDetection, hf.DetrConfig),
    "Conditional DETR": partial(plain, hf.ConditionalDetrForObjectDetection, hf.ConditionalDetrConfig),
    "DAB-DETR": partial(plain, hf.DabDetrForObjectDetection, hf.DabDetrConfig),
    "Table Transformer": partial(plain, hf.TableTransformerForObjectDetection, hf.TableTransformerConfig),
    "YOLOS": yolos,
}
QUADRILATERALS = FAMILIES.pop("PP-DocLayoutV4")

# Where the network sees more than the picture: (height, width), the rest 0 after normalisation.
SEEN = {
    "LW-DETR, windows of 64 px": (64, 128),
    # With other than squares transformers 5.23 itself puts the features of an RF-DETR in wrong places.
    "RF-DETR": (96, 96),
}

# Each family's own way from logits to boxes. RF-DETR and PP-DocLayout have theirs for torchvision alone; it is that of
# RT-DETR, but for the order of the rows.
PROCESSORS: dict[str, type] = {
    "conditional_detr": hf.ConditionalDetrImageProcessorPil,
    "dab-detr": hf.ConditionalDetrImageProcessorPil,
    "deformable_detr": hf.DeformableDetrImageProcessorPil,
    "detr": hf.DetrImageProcessorPil,
    "lw_detr": hf.DeformableDetrImageProcessorPil,
    "table-transformer": hf.DetrImageProcessorPil,
    "yolos": hf.YolosImageProcessorPil,
}


def of_transformers(model: Any, processor: Any, image: NDArray[np.uint8], seen: tuple[int, int]) -> Detections:
    """What transformers finds: its model as it is, pixels made ready by hand, its own post-processing."""
    height, width = image.shape[:2]
    values = torch.from_numpy(image).permute(2, 0, 1)[None].float() * processor.rescale_factor
    if processor.do_normalize:
        mean, spread = (torch.tensor(n)[:, None, None] for n in (processor.image_mean, processor.image_std))
        values = (values - mean) / spread
    values = nn.functional.pad(values, (0, seen[1] - width, 0, seen[0] - height))
    with torch.no_grad():
        out = model(pixel_values=values)
    to_boxes = processor.post_process_object_detection
    # The best pairs of query and class, as many as there are queries; some families keep 100 where nothing is said.
    most = {"top_k": out.logits.shape[1]} if "top_k" in inspect.signature(to_boxes).parameters else {}
    found = to_boxes(out, threshold=1e-6, target_sizes=[seen], **most)[0]
    boxes = found["boxes"].clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    return Detections.build(boxes, found["scores"], found["labels"])


def assert_same(found: Detections, expected: Detections, deep: float = 1.0) -> None:
    """Each row has its twin, to round-off; rows whose scores differ by no more may come in another order.

    `deep` is how much more a network with many layers makes of round-off.
    """
    assert len(found) == len(expected)
    apart = np.abs(found.xyxy[:, None] - expected.xyxy).max(-1) + 1000 * np.abs(found.score[:, None] - expected.score)
    apart[found.label[:, None] != expected.label] = 1e6
    twin = expected[linear_sum_assignment(apart)[1]]
    np.testing.assert_array_equal(found.label, twin.label)
    np.testing.assert_allclose(found.score, twin.score, rtol=0, atol=5e-6 * deep)
    np.testing.assert_allclose(found.xyxy, twin.xyxy, rtol=0, atol=2e-3 * deep)


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_detector_finds_what_transformers_finds(tmp_path: Path, family: str, normalise: bool) -> None:
    """Scores, labels and boxes are those of the untouched model and transformers' own post-processing."""
    # Nearer to what transformers starts with, these score places alike, and round-off chooses their queries.
    model = network(FAMILIES[family], spread=0.3 if family.startswith(("RT-DETR", "PP-DocLayout")) else 0.15)
    processor = PROCESSORS.get(model.config.model_type, hf.RTDetrImageProcessorPil)(do_normalize=normalise)
    processor.save_pretrained(tmp_path)
    image = picture()
    expected = of_transformers(model, processor, image, SEEN.get(family, (HEIGHT, WIDTH)))

    detector = load_detector(saved(model, tmp_path), mpp=1.0, device="cpu")
    found = detector.detect(image[None], 1e-6)[0]
    assert_same(found, expected)
    assert (np.diff(found.score) <= 0).all()
    assert len(found) == detector.max_per_tile == 10
    assert list(detector.classes) == list(model.config.id2label.values())


def test_a_directory_says_its_classes_and_its_tile(tmp_path: Path) -> None:
    """Two classes go unnamed in a configuration; the tile is as large as the images the model was trained on."""
    model = network(partial(plain, hf.DetrForObjectDetection, hf.DetrConfig, classes=2))
    hf.DetrImageProcessorPil().save_pretrained(saved(model, tmp_path))
    assert "id2label" not in json.loads((tmp_path / "config.json").read_text())
    detector = load_detector(tmp_path, mpp=1.0)
    assert list(detector.classes) == ["LABEL_0", "LABEL_1"]
    assert (detector.input_px, detector.mpp, detector.max_per_tile) == (800, 1.0, 10)
    assert set(detector.detect(picture()[None], 0.0)[0].label) <= {0, 1}


@pytest.mark.parametrize(
    "make",
    [QUADRILATERALS, lambda: Case(hf.PPOCRV5MobileDetForObjectDetection(hf.PPOCRV5MobileDetConfig()), {}, 0)],
    ids=["quadrilaterals", "a mask"],
)
def test_a_network_without_boxes_is_refused(tmp_path: Path, make: Callable[[], Case]) -> None:
    """What cannot be read as boxes is an error that says so, not other boxes."""
    model = make().model
    model.eval()
    with pytest.raises(ModelError, match="pred_boxes of four numbers"):
        load_detector(saved(model, tmp_path), mpp=1.0).detect(picture()[None], 0.5)


def test_a_model_that_takes_a_text_is_refused(tmp_path: Path) -> None:
    """It is said before any weight is read."""
    make = partial(grounding, hf.GroundingDinoForObjectDetection, hf.GroundingDinoConfig)
    with pytest.raises(ModelError, match="text prompt"):
        load_detector(saved(make().model, tmp_path), mpp=1.0)


def test_a_backbone_of_a_package_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    """The error names the package."""
    model = network(partial(plain, hf.DetrForObjectDetection, hf.DetrConfig))
    config = json.loads((saved(model, tmp_path) / "config.json").read_text())
    config["backbone_config"] = {"model_type": "timm_backbone", "backbone": "resnet18", "out_indices": [1, 2, 3, 4]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"cannot load the weights: .*timm"):
        load_detector(tmp_path, mpp=1.0).detect(picture()[None], 0.5)
