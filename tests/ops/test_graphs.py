"""The op as a node of a graph: torch.library's checks, torch.compile, torch.export, ONNX and CUDA graphs."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.rt_detr.modeling_rt_detr import MultiScaleDeformableAttention

from slidescan.ops import accelerate, deform_attn
from tests.ops.cases import OURS, inputs

of_the_compiler = pytest.mark.filterwarnings("ignore")  # inductor warns of its own deprecations, and of TF32
needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor wants a C++ compiler, on a CPU")


def test_fake_tensors_leave_nothing_behind() -> None:
    """After shapes were propagated without data, a real call of the same shapes works."""
    value, shapes, locations, weights, points = inputs([(3, 7)], [2])
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(tensor) for tensor in (value, locations, weights)]
        assert deform_attn(fakes[0], shapes, *fakes[1:], points).shape == (2, 5, 12)
    assert torch.isfinite(deform_attn(value, shapes, locations, weights, points)).all()


@pytest.mark.parametrize("backend", OURS)
def test_the_registered_node_is_sound(backend: str) -> None:
    """Schema, fake tensors, autograd registration and dynamic shapes pass torch's own checks."""
    value, _, locations, weights, points = inputs([(4, 6), (1, 3)], [2, 1])
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    torch.library.opcheck(torch.ops.slidescan.deform_attn.default, (*leaves, [4, 6, 1, 3], points, backend))


class _Layer(torch.nn.Module):
    """The op between other operators, with its shapes built in."""

    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        logits = deform_attn(value, [(4, 6), (1, 3)], locations, weights.softmax(-1), [2, 1], backend=self.backend)
        return logits * 2


def _learn(layer: torch.nn.Module, leaves: list[Tensor]) -> list[Tensor]:
    out = layer(*leaves)
    return [out.detach(), *torch.autograd.grad(out.square().sum(), leaves)]


@of_the_compiler
@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=needs_a_compiler)])
@pytest.mark.parametrize("backend", OURS)
def test_compiles_without_a_break(backend: str, compiler: str) -> None:
    """A compiled layer is one graph and gives the eager result and gradients."""
    torch.compiler.reset()
    value, _, locations, weights, _ = inputs([(4, 6), (1, 3)], [2, 1])
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    layer = _Layer(backend)
    compiled = torch.compile(layer, fullgraph=True, backend=compiler)
    for got, expected in zip(_learn(compiled, leaves), _learn(layer, leaves), strict=True):
        torch.testing.assert_close(got, expected)


def _penalty(layer: torch.nn.Module, leaves: list[Tensor]) -> None:
    grads = torch.autograd.grad(layer(*leaves).square().sum(), leaves, create_graph=True)
    torch.stack([grad.square().sum() for grad in grads]).sum().backward()


@of_the_compiler
@pytest.mark.parametrize("made", ["eager", "aot_eager", "export"])
def test_a_second_derivative_is_refused(made: str) -> None:
    """It would be zero, silently."""
    torch.compiler.reset()
    value, _, locations, weights, _ = inputs([(4, 6), (1, 3)], [2, 1])
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    layer: torch.nn.Module = _Layer("auto")
    if made == "export":
        layer = torch.export.export(layer, tuple(leaves)).module()
    else:
        layer = torch.compile(layer, backend=made)  # type: ignore[assignment]
    with pytest.raises((NotImplementedError, RuntimeError), match=r"second derivative|double backward"):
        _penalty(layer, leaves)


def test_export_keeps_the_node() -> None:
    """An exported layer holds one `slidescan::deform_attn`, and gives the same after saving and loading."""
    value, _, locations, weights, _ = inputs([(4, 6), (1, 3)], [2, 1])
    layer = _Layer("auto")
    program = torch.export.export(layer, (value, locations, weights))
    assert [str(node.target) for node in program.graph.nodes].count("slidescan.deform_attn.default") == 1
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    torch.testing.assert_close(again(value, locations, weights), layer(value, locations, weights))


class _Attention(torch.nn.Module):
    """RT-DETR's own module on a map of any size."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention()

    def forward(self, features: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        batch, channels, height, width = features.shape
        value = features.flatten(2).transpose(1, 2).reshape(batch, height * width, 2, channels // 2)
        rest = torch.zeros(1, 2), [(height, width)], torch.zeros(1)
        attended: Tensor = self.attention(value, *rest, locations.unsqueeze(3), weights.unsqueeze(3), 64)
        return attended


def test_an_exported_layer_takes_maps_of_other_sizes() -> None:
    """As the module does that is exchanged."""
    torch.manual_seed(0)
    arguments = torch.randn(2, 8, 6, 5), torch.rand(2, 4, 2, 3, 2), torch.rand(2, 4, 2, 3)
    layer = _Attention()
    expected = layer(torch.ones(2, 8, 9, 7), *arguments[1:])
    assert accelerate(layer) == 1
    sides = {2: torch.export.Dim("height", min=2, max=64), 3: torch.export.Dim("width", min=2, max=64)}
    program = torch.export.export(layer, arguments, dynamic_shapes=(sides, None, None))
    torch.testing.assert_close(program.module()(torch.ones(2, 8, 9, 7), *arguments[1:]), expected)


@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated:FutureWarning")  # torch's exporter itself
def test_a_graph_of_onnx_gives_the_same(tmp_path: Path) -> None:
    """An ONNX export holds operators of ONNX alone; another runtime computes the same from it."""
    runtime = pytest.importorskip("onnxruntime")
    value, _, locations, weights, _ = (
        tensor.cpu() if isinstance(tensor, Tensor) else tensor
        for tensor in inputs([(4, 6), (1, 3)], [2, 1], dtype=torch.float32)
    )
    layer, path = _Layer("auto").eval(), tmp_path / "layer.onnx"
    torch.onnx.export(layer, (value, locations, weights), path, dynamo=True, verbose=False)
    session = runtime.InferenceSession(path)
    names = [each.name for each in session.get_inputs()]
    arrays = (tensor.numpy() for tensor in (value, locations, weights))
    (found,) = session.run(None, dict(zip(names, arrays, strict=True)))
    torch.testing.assert_close(torch.from_numpy(found), layer(value, locations, weights))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_a_cuda_graph_captures_it_and_outlives_the_tables() -> None:
    """Replayed on other inputs, after calls of many other shapes, a captured call gives the eager result."""
    value, shapes, locations, weights, points = inputs([(4, 6), (1, 3)], [2, 1], dtype=torch.float32)
    deform_attn(value, shapes, locations, weights, points)  # compiles, and makes the table
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = deform_attn(value, shapes, locations, weights, points)
    for width in range(1, 100):
        deform_attn(*inputs([(1, width)], [1], dtype=torch.float32))
    value.neg_()
    locations.copy_(locations.flip(1))
    graph.replay()
    torch.testing.assert_close(out, deform_attn(value, shapes, locations, weights, points, backend="torch"))


@of_the_compiler
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_compiled_with_cuda_graphs(backend: str) -> None:
    """Inductor records graphs of a layer it has never run, forward and backward, and replays them rightly."""
    torch.compiler.reset()
    value, _, locations, weights, _ = inputs([(4, 6), (1, 3)], [2, 1], dtype=torch.float32)
    leaves = [tensor.requires_grad_() for tensor in (value, locations, weights)]
    layer = _Layer(backend)
    compiled = torch.compile(layer, fullgraph=True, mode="reduce-overhead")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        got, *gradients = (tensor.clone() for tensor in _learn(compiled, leaves))
    for found, expected in zip((got, *gradients), _learn(layer, leaves), strict=True):
        torch.testing.assert_close(found, expected)
