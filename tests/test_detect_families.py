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
import safetensors.torch
import torch
import transformers as hf
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import nn

from slidescan.detect import load_detector
from slidescan.detect.card import Colours, read_card
from slidescan.detections import Detections
from slidescan.errors import ModelError
from tests.families import (
    DETECTORS,
    HEIGHT,
    WIDTH,
    Case,
    deformable_detr,
    grounding,
    lw_detr,
    network,
    picture,
    pixels,
    rf_detr,
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


@pytest.mark.parametrize(
    "make",
    [
        partial(lw_detr, patch_size=16, num_windows=16),
        partial(rf_detr, hf.RfDetrForObjectDetection),
        partial(deformable_detr, two_stage=True, with_box_refine=True),
    ],
    ids=["LW-DETR", "RF-DETR", "Deformable DETR"],
)
def test_a_tile_with_fewer_cells_than_queries_is_filled_up(tmp_path: Path, make: Callable[[], Case]) -> None:
    """Of families that choose their queries among cells; each asks for 300 of them here."""
    model = make().model
    config: Any = model.config
    config.num_queries = config.two_stage_num_proposals = 300
    made = type(model)(config)
    found = load_detector(saved(made, tmp_path), mpp=1.0, device="cpu").detect(picture()[None], 0.0)[0]
    assert len(found) == 300
    assert (found.xyxy <= [WIDTH, HEIGHT, WIDTH, HEIGHT]).all()


def test_anchors_of_one_size_of_image_serve_others(tmp_path: Path) -> None:
    """Those that a configuration asks to be kept are of the images it was made for, and no tile's."""
    config = DETECTORS["RT-DETR"]().model.config
    config.anchor_image_size = [64, 64]
    found = load_detector(saved(hf.RTDetrForObjectDetection(config), tmp_path), mpp=1.0).detect(picture()[None], 0.0)
    assert len(found[0]) == config.num_queries


@pytest.mark.parametrize(
    ("told", "scale", "normalised"),
    [
        ({"image_processor_type": "DetrImageProcessor"}, 1 / 255, True),
        ({"feature_extractor_type": "DetrFeatureExtractor", "rescale_factor": 0.5}, 0.5, True),
        ({"image_processor_type": "RTDetrImageProcessor"}, 1 / 255, False),
        ({"image_processor_type": "PPDocLayoutV3ImageProcessor"}, 1 / 255, False),
        ({"image_processor_type": "PPDocLayoutV2ImageProcessor", "do_normalize": True}, 1 / 255, False),
        ({"image_processor_type": "DetrImageProcessor", "do_normalize": False}, 1 / 255, False),
        ({"size": {"shortest_edge": 800}}, 1 / 255, False),
    ],
)
def test_what_a_processor_leaves_out_is_its_classes_default(
    tmp_path: Path, told: dict[str, Any], scale: float, normalised: bool
) -> None:
    """DETR and its kin normalise by ImageNet's mean and spread, RT-DETR does not."""
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(told))
    expected = Colours(scale, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)) if normalised else Colours(scale)
    assert Colours.read(tmp_path) == expected


@pytest.mark.parametrize(
    ("kind", "normalised"),
    [
        ("deformable_detr", True),
        ("conditional_detr", True),
        ("d_fine", False),
        ("rt_detr_v2", False),
        ("pp_doclayout_v3", False),
        (None, False),
    ],
)
def test_without_a_processor_it_is_that_of_the_kind(tmp_path: Path, kind: str | None, normalised: bool) -> None:
    """A model saved alone is prepared for as transformers would; a processor for texts, too, holds one for pictures."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": kind} if kind else {}))
    usual = Colours(1 / 255, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert Colours.read(tmp_path) == (usual if normalised else Colours())
    told = {"image_processor_type": "GroundingDinoImageProcessor", "image_mean": [0.5] * 3, "image_std": [0.25] * 3}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**told, "size": 640}}))
    assert Colours.read(tmp_path) == Colours(1 / 255, (0.5,) * 3, (0.25,) * 3)


@pytest.mark.parametrize("factor", [0, -1])
def test_a_scale_that_cannot_be_is_refused(tmp_path: Path, factor: float) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"rescale_factor": factor}))
    with pytest.raises(ModelError, match="rescale_factor above 0"):
        Colours.read(tmp_path)


def test_an_older_processors_size_is_a_number(tmp_path: Path) -> None:
    model = network(partial(plain, hf.DetrForObjectDetection, hf.DetrConfig))
    saved(model, tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"feature_extractor_type": "DetrFeatureExtractor", "size": 800}'
    )
    assert load_detector(tmp_path, mpp=1.0).input_px == 800


def test_code_in_a_directory_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is asked whether it may be."""
    told = {"model_type": "mine", "architectures": ["MyForObjectDetection"], "id2label": {"0": "cat"}}
    code = {"AutoConfig": "mine.Mine", "AutoModelForObjectDetection": "mine.MyForObjectDetection"}
    (tmp_path / "config.json").write_text(json.dumps(told | {"auto_map": code}))
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ModelError):
        load_detector(tmp_path, mpp=1.0).detect(picture()[None], 0.5)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"classes": ["x"]}, "config.json has 3 classes"),
        ({"classes": "abc"}, "a list of names"),
        ({"classes": []}, "out of range"),
        ({"attributes": ["large"]}, "classes and attributes are 4"),
        ({"temperature": float("nan")}, "out of range"),
        ({"anchor_px": 20.0}, "model that has anchors"),
        ({"temperature": 3.0, "offset": -2.0}, "share a softmax"),
        ({"classes": ["a", "b"], "attributes": ["large"]}, "share a softmax"),
    ],
)
def test_a_card_that_does_not_fit_its_network_is_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    """Before a detection has a class that has no name."""
    saved(network(partial(plain, hf.DetrForObjectDetection, hf.DetrConfig)), tmp_path)
    card = {"name": "x", "classes": ["a", "b", "c"], "mpp": 1.0, "input_px": 96, "object_um": 10.0}
    (tmp_path / "slidescan.json").write_text(json.dumps(card))
    assert len(load_detector(tmp_path).detect(picture()[None], 0.0)[0]) == 10
    (tmp_path / "slidescan.json").write_text(json.dumps(card | change))
    with pytest.raises(ModelError, match=said):
        load_detector(tmp_path).detect(picture()[None], 0.0)


def test_steps_that_a_batch_norm_counted_are_no_weights(tmp_path: Path) -> None:
    """Published DETRs hold them; transformers loads these."""
    path = saved(network(partial(plain, hf.DetrForObjectDetection, hf.DetrConfig)), tmp_path)
    (before,) = load_detector(path, mpp=1.0).detect(picture()[None], 0.0)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    means = [key for key in tensors if key.endswith("running_mean")]
    assert means
    counted = {key.replace("running_mean", "num_batches_tracked"): torch.tensor(7) for key in means}
    safetensors.torch.save_file(tensors | counted, path / "model.safetensors", {"format": "pt"})
    (after,) = load_detector(path, mpp=1.0).detect(picture()[None], 0.0)
    assert np.array_equal(before.score, after.score)


def test_weights_in_several_files_are_told(tmp_path: Path) -> None:
    model = network(partial(plain, hf.DetrForObjectDetection, hf.DetrConfig))
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    with pytest.raises(ModelError, match="several files; save the model again with a larger max_shard_size"):
        load_detector(tmp_path, mpp=1.0)


def test_a_crowded_tile_of_two_stages_is_recognised(tmp_path: Path) -> None:
    """As many objects as the second stage looks at, whatever the number of queries it would have without."""
    model = network(partial(deformable_detr, two_stage=True, with_box_refine=True))
    model.config.num_queries = 300
    detector = load_detector(saved(model, tmp_path), mpp=1.0, device="cpu")
    (found,) = detector.detect(picture()[None], 0.0)
    assert detector.max_per_tile == len(found) == 10


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


def test_classes_of_one_name_are_told_apart(tmp_path: Path) -> None:
    """As in COCO's checkpoints, whose numbers without a class are all called so; a saved result gives them back."""
    names = dict(enumerate(["N/A", "cat", "N/A", "N/A"]))
    config = {"model_type": "detr", "architectures": ["DetrForObjectDetection"], "id2label": names}
    config = json.loads(json.dumps(config))  # whose keys are text
    assert list(read_card(tmp_path, config, 0.5).classes) == ["N/A", "cat", "N/A (2)", "N/A (3)"]
