"""Families of transformers give the same outputs and the same gradients after `accelerate`, and nothing else changes.

Every model is tiny, random and in float64, where two ways to the same sum agree to about 1e-12 and no top-k, no pixel
and no mask flips between them.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from slidescan.errors import ModelError
from slidescan.ops import accelerate, deform_attn
from slidescan.ops.deform_attn import Backend
from tests.families import DETECTORS, HIDDEN, SIDE, Case, grounding, network, pixels, randomised, rf_detr, swin

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def omdet_turbo() -> Case:
    """A Swin, a CLIP text encoder, two layers; two classes for each of two images."""
    text = hf.CLIPTextConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=8,
        bos_token_id=48,
        eos_token_id=49,
    )
    config = hf.OmDetTurboConfig(
        backbone_config=swin(),
        text_config=text,
        image_size=SIDE,
        apply_layernorm_after_vision_backbone=False,  # made for timm's Swin, whose channels come last
        text_projection_in_dim=32,
        text_projection_out_dim=32,
        task_encoder_hidden_dim=HIDDEN,
        class_embed_dim=32,
        num_queries=10,
        encoder_hidden_dim=HIDDEN,
        vision_features_channels=[HIDDEN] * 3,
        encoder_in_channels=[16, 32, 64],
        encoder_attention_heads=2,
        encoder_dim_feedforward=32,
        decoder_hidden_dim=HIDDEN,
        decoder_num_heads=2,
        decoder_num_layers=2,
        decoder_dim_feedforward=32,
    )
    classes, tasks = torch.randint(3, 48, (4, 5)), torch.randint(3, 48, (2, 5))
    classes[:, -1] = tasks[:, -1] = 49
    text_inputs = {
        "classes_input_ids": classes,
        "classes_attention_mask": torch.ones_like(classes),
        "tasks_input_ids": tasks,
        "tasks_attention_mask": torch.ones_like(tasks),
        "classes_structure": torch.tensor([2, 2]),
    }
    return Case(hf.OmDetTurboForObjectDetection(config), {**pixels(SIDE, SIDE), **text_inputs}, 2)


MASKS: dict[str, Any] = {
    "num_queries": 10,
    "hidden_dim": 64,
    "encoder_feedforward_dim": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "num_attention_heads": 4,
    "dim_feedforward": 32,
    "num_labels": 3,
}


def mask2former() -> Case:
    """Two layers of pixel decoder over three levels."""
    config = hf.Mask2FormerConfig(backbone_config=swin([1, 2, 3, 4]), feature_size=64, mask_feature_size=64, **MASKS)
    return Case(hf.Mask2FormerForUniversalSegmentation(config), pixels(), 2)


def oneformer() -> Case:
    """Two layers of pixel decoder over three levels; the task is a text."""
    config = hf.OneFormerConfig(backbone_config=swin([1, 2, 3, 4]), conv_dim=64, mask_dim=64, task_seq_len=8, **MASKS)
    task = {"task_inputs": torch.randint(0, 50, (2, 8))}
    return Case(hf.OneFormerForUniversalSegmentation(config), {**pixels(), **task}, 2)


FAMILIES: dict[str, Callable[[], Case]] = DETECTORS | {
    "RF-DETR, masks": partial(rf_detr, hf.RfDetrForInstanceSegmentation),
    "Grounding DINO": partial(grounding, hf.GroundingDinoForObjectDetection, hf.GroundingDinoConfig),
    "MM Grounding DINO": partial(grounding, hf.MMGroundingDinoForObjectDetection, hf.MMGroundingDinoConfig),
    "OmDet-Turbo": omdet_turbo,
    "Mask2Former": mask2former,
    "OneFormer": oneformer,
}

# One of each way in which transformers calls the op: as a sub-module, as a function with the points of all levels in
# one axis, as an attribute, as a function with levels and points as two axes. With it, where the attention is.
WAYS = {
    "RT-DETR": "model.decoder.layers",
    "RT-DETRv2": "model.decoder.layers",
    "D-FINE": "model.decoder.layers",
    "Mask2Former": "model.pixel_level_module.decoder.encoder.layers",
}


def build(family: str, seed: int = 0) -> Case:
    """A random model of the family, in float64, with its inputs."""
    model, inputs, modules = randomised(FAMILIES[family], seed)
    return Case(model.to(DEVICE), {name: tensor.to(DEVICE) for name, tensor in inputs.items()}, modules)


def floats(output: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every float tensor of an output, however deep, with its place."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield name, output
    elif isinstance(output, dict):
        for key, value in output.items():
            yield from floats(value, f"{name}.{key}")
    elif isinstance(output, (list, tuple)):
        for i, value in enumerate(output):
            yield from floats(value, f"{name}[{i}]")


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What a model returns, without gradients."""
    with torch.no_grad():
        return dict(floats(model(**inputs)))


def learn(model: nn.Module, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What a model returns, and what its squares give as gradients of the parameters that take part."""
    model.zero_grad()
    found = dict(floats(model(**inputs)))
    # Anchors at the border and logits of absent words are infinite, or the largest number there is.
    sum(tensor[tensor.abs() < 1e6].square().sum() for tensor in found.values()).backward()
    return found, {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All outputs are there and agree; an infinity agrees with itself."""
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def assert_same_gradients(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Each parameter's gradient is right to 1e-9 of its largest entry."""
    sizes = {name: gradient.abs().max() for name, gradient in expected.items()}
    # What has no effect, as the bias of keys, has round-off for a gradient.
    floor = 1e-5 * max(sizes.values())
    assert gradients.keys() == expected.keys()
    torch.testing.assert_close(
        {name: gradient / (sizes[name] + floor) for name, gradient in gradients.items()},
        {name: gradient / (sizes[name] + floor) for name, gradient in expected.items()},
        rtol=0,
        atol=1e-9,
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Backend]:
    """The backend of each call that accelerated modules make."""
    seen: list[Backend] = []

    def counted(*args: Any, backend: Backend) -> Tensor:
        seen.append(backend)
        return deform_attn(*args, backend=backend)

    # By name, for slidescan.ops has the function where the module would be.
    monkeypatch.setattr(sys.modules["slidescan.ops.accelerate"], "deform_attn", counted)
    return seen


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_keeps_outputs_gradients_and_names(family: str, calls: list[Backend]) -> None:
    """Outputs, gradients of all parameters and names of weights are those of the untouched model."""
    model, inputs, modules = build(family)
    fast = copy.deepcopy(model)
    assert accelerate(fast) == modules
    assert list(fast.state_dict()) == list(model.state_dict())

    expected, expected_gradients = learn(model, inputs)
    assert calls == []
    found, gradients = learn(fast, inputs)
    assert calls == ["auto"] * modules
    assert_same(found, expected)
    assert_same_gradients(gradients, expected_gradients)

    offsets = [name for name in gradients if name.endswith("sampling_offsets.weight")]
    assert len(offsets) == (0 if "discrete" in family else modules)
    assert all(gradients[name].any() for name in offsets)


@pytest.mark.parametrize("family", WAYS)
def test_a_second_call_changes_nothing(family: str) -> None:
    """Again the same count, the same outputs, the same weights and attributes."""
    model, inputs, modules = build(family)
    assert accelerate(model) == modules
    attributes = [set(vars(module)) for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = outputs(model, inputs)

    assert accelerate(model) == modules
    assert [set(vars(module)) for module in model.modules()] == attributes
    torch.testing.assert_close(dict(model.state_dict()), weights, rtol=0, atol=0)
    assert_same(outputs(model, inputs), expected)


@pytest.mark.parametrize("family", WAYS)
def test_other_models_and_transformers_stay_as_they_are(family: str, calls: list[Backend]) -> None:
    """Models built before and after run transformers' code; its classes and modules hold what they held."""
    model, inputs, modules = build(family)
    kinds = {type(module) for module in model.modules()}
    watched = [*kinds, *(sys.modules[kind.__module__] for kind in kinds), *model.modules()]
    expected = [dict(vars(each)) for each in watched]

    fast = copy.deepcopy(model)
    assert accelerate(fast) == modules
    assert [dict(vars(each)) for each in watched] == expected
    for untouched in (model, build(family).model):
        assert all("forward" not in vars(module) for module in untouched.modules())
        outputs(untouched, inputs)
    assert calls == []


def test_a_model_without_the_attention_is_refused() -> None:
    """One line says which model it is."""
    with pytest.raises(ModelError) as caught:
        accelerate(nn.Linear(2, 2))
    assert str(caught.value).startswith("Linear: ")
    assert "\n" not in str(caught.value)
    with pytest.raises(ModelError, match="backend: expected one of auto, triton, torch, reference, got 'cuda'"):
        accelerate(nn.Linear(2, 2), backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="model: expected a loaded transformers model, got str; load it first"):
        accelerate("my-rt-detr")  # type: ignore[arg-type]


@pytest.mark.parametrize("family", WAYS)
def test_the_backend_is_taken_and_can_be_changed(family: str, calls: list[Backend]) -> None:
    """The reference gives the same outputs; another call goes back to auto."""
    model, inputs, modules = build(family)
    fast = copy.deepcopy(model)
    expected = outputs(model, inputs)
    for backend in ("reference", "auto"):
        calls.clear()
        accelerate(fast, backend=backend)
        assert_same(outputs(fast, inputs), expected)
        assert calls == [backend] * modules


@pytest.mark.parametrize("family", WAYS)
def test_a_copy_is_accelerated_and_stands_alone(family: str, calls: list[Backend]) -> None:
    """A deep copy gives the same outputs, from its own weights."""
    model, inputs, modules = build(family)
    accelerate(model)
    expected = outputs(model, inputs)
    calls.clear()
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    assert_same(outputs(other, inputs), expected)
    assert calls == ["auto"] * modules


@pytest.mark.parametrize("family", WAYS)
def test_replicas_on_other_gpus_use_their_own_weights(family: str) -> None:
    """DataParallel copies a module's attributes: a method of the original among them would use the original's."""
    model, _, _ = build(family)
    accelerate(model)
    for module in model.modules():
        replica: Any = module._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        assert replica.forward.__self__ is replica


@pytest.mark.parametrize("family", WAYS)
def test_a_fresh_model_takes_the_weights(family: str) -> None:
    """What an accelerated model saves, another loads, and gives the same outputs."""
    model, inputs, _ = build(family)
    accelerate(model)
    fresh = build(family, seed=1).model
    accelerate(fresh)
    fresh.load_state_dict(model.state_dict())
    assert_same(outputs(fresh, inputs), outputs(model, inputs))


@pytest.mark.filterwarnings(r"ignore:The \.grad attribute of a Tensor:UserWarning")  # torch hides it, unless it raises
@pytest.mark.parametrize(("family", "layers"), WAYS.items())
def test_compiled_layers_keep_outputs_and_gradients(family: str, layers: str) -> None:
    """torch.compile takes the layers of an accelerated model, and then those of an untouched one."""
    model, inputs, _ = build(family)
    fast, plain = copy.deepcopy(model), copy.deepcopy(model)
    accelerate(fast)
    expected, expected_gradients = learn(model, inputs)
    torch.compiler.reset()
    try:
        for compiled in (fast, plain):
            for layer in compiled.get_submodule(layers):
                layer.compile(backend="eager", fullgraph=False)
            found, gradients = learn(compiled, inputs)
            assert_same(found, expected)
            assert_same_gradients(gradients, expected_gradients)
    finally:
        torch.compiler.reset()


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's exporter itself
def test_an_accelerated_model_exports_to_onnx(tmp_path: Path) -> None:
    """Another runtime finds what the model finds: the export holds nothing of ours."""
    runtime = pytest.importorskip("onnxruntime")

    class Plain(nn.Module):
        """Two tensors instead of transformers' output."""

        def __init__(self) -> None:
            super().__init__()
            self.model = network(DETECTORS["RT-DETR"], spread=0.3)  # nearer to zero it scores places alike
            accelerate(self.model)

        def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
            out = self.model(pixel_values=values)
            return out.logits, out.pred_boxes

    plain, values = Plain().eval(), pixels()["pixel_values"].float()
    torch.onnx.export(plain, (values,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    found = session.run(None, {session.get_inputs()[0].name: values.numpy()})
    with torch.no_grad():
        for got, expected in zip(found, plain(values), strict=True):
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4)
