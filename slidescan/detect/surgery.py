"""What is changed in a network of transformers once it is loaded: the same result, but faster and on tiles of any size.

Hides how transformers' modules are named. Each function changes a model in place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

__all__ = ["channels_last", "fold", "leave_out", "lower_precision", "set_anchors"]


def channels_last(model: nn.Module) -> nn.Module:
    """Return the model with its kernels laid out as the convolutions want them."""
    # torch's annotations of Module.to leave this argument out.
    untyped: Any = model
    return untyped.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def set_anchors(model: nn.Module, anchor_px: float) -> None:
    """Give every anchor of a D-FINE type model an edge of `anchor_px` px, whatever the tile's size."""
    inner: Any = model.model
    stride = tuple(inner.config.feat_strides)

    @lru_cache(maxsize=32)  # tile sizes in use: one or two
    def anchors(shapes: tuple[tuple[int, int], ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        with torch.inference_mode(mode=False):  # cached tensors must serve training too
            levels = []
            for (height, width), step in zip(shapes, stride, strict=True):
                y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
                # A tile smaller than an anchor: 0.95 of its edge keeps the logit finite.
                w, h = min(anchor_px / (width * step), 0.95), min(anchor_px / (height * step), 0.95)
                edges = torch.full_like(x, w), torch.full_like(x, h)
                levels.append(torch.stack((x / width, y / height, *edges), -1).flatten(0, 1))
            boxes = torch.cat(levels)[None].to(device=device, dtype=dtype)
            return torch.logit(boxes), torch.ones_like(boxes[..., :1], dtype=torch.bool)

    def generate_anchors(
        spatial_shapes: tuple[tuple[int, int], ...],
        grid_size: float = 0.0,  # the share of the tile that `anchor_px` replaces
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> tuple[Tensor, Tensor]:
        return anchors(tuple(spatial_shapes), torch.device(device), dtype)

    inner.generate_anchors = generate_anchors


def lower_precision(model: nn.Module, device_type: str, *, kernels: bool = False) -> None:
    """Run backbone and encoder of a D-FINE or RT-DETR model in bfloat16 and hand float32 to the decoder.

    Parameters
    ----------
    model : nn.Module
    device_type : str
    kernels : bool, optional
        Keep kernels in bfloat16, which training must not; else they are converted anew for every tile.
    """
    inner: Any = model.model
    autocast = torch.autocast(device_type, dtype=torch.bfloat16)
    for part in (inner.backbone, *inner.encoder_input_proj, inner.encoder):
        part.forward = autocast(part.forward)
        for module in part.modules() if kernels else ():
            if isinstance(module, nn.Conv2d):
                module.bfloat16()
    for projection in inner.decoder_input_proj:
        projection.register_forward_pre_hook(lambda _, inputs: tuple(t.float() for t in inputs))


def fold(model: nn.Module) -> None:
    """Fold into convolutions what follows them or lies beside them: same result, fewer passes over memory.

    Batch normalisation becomes part of the convolution before it, and an activation after both works in place.
    Of a RepVGG block (Ding et al., 2021) the kernel of 1 px becomes the centre of that of 3 px.
    """
    parts = (("convolution", "normalization", "activation"), ("conv", "norm", "activation"), ("0", "1", ""))
    for module in model.modules():
        for first, second, third in parts:
            conv, norm, act = (getattr(module, name, None) for name in (first, second, third))
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())
                if isinstance(act, nn.ReLU):
                    act.inplace = True
                elif isinstance(act, (nn.SiLU, SiLUActivation)):
                    setattr(module, third, nn.SiLU(inplace=True))
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child).__name__.endswith("RepVggBlock"):
                joined = _joined(child)
                if joined is not None:
                    setattr(module, name, joined)


def _joined(block: Any) -> nn.Module | None:
    """Return one convolution and the activation for a RepVGG block; None for LW-DETR's, which is none but in name."""
    wide, narrow = (getattr(layer, "conv", None) for layer in (block.conv1, block.conv2))
    if not (isinstance(wide, nn.Conv2d) and isinstance(narrow, nn.Conv2d)):
        return None
    if (wide.kernel_size, narrow.kernel_size) != ((3, 3), (1, 1)) or wide.bias is None or narrow.bias is None:
        return None
    wide.weight.data[..., 1:2, 1:2] += narrow.weight.data
    wide.bias.data += narrow.bias.data
    return nn.Sequential(wide, block.activation)


def leave_out(model: nn.Module) -> None:
    """Leave out what does not change the result.

    Attention whose output is multiplied by zero, torch's slow pooling where the larger of two px will do, and the boxes
    of cells that are chosen for no query. Of a tile of the bundled detector, 1,024 px in bfloat16 on 2 cores, these
    were an eighth, an eighth and a twelfth.
    """
    for module in model.modules():
        out, pool = getattr(module, "o_proj", None), getattr(module, "pool", None)
        if isinstance(out, nn.Linear) and not any(part.any() for part in out.parameters()):
            module.forward = _silent
        if isinstance(pool, nn.MaxPool2d) and (pool.kernel_size, pool.stride, pool.padding) == (2, 1, 0):
            module.pool = _LargerOfFour()
    inner: Any = getattr(model, "model", None)
    score, box = getattr(inner, "enc_score_head", None), getattr(inner, "enc_bbox_head", None)
    if isinstance(score, nn.Module) and isinstance(box, nn.Module):
        inner.enc_bbox_head = _BoxesOfChosen(score, box, inner.config.num_queries)


def _silent(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


class _LargerOfFour(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        rows = torch.maximum(pixels[..., :-1, :], pixels[..., 1:, :])
        return torch.maximum(rows[..., :-1], rows[..., 1:])


class _BoxesOfChosen(nn.Module):
    """Boxes of the cells whose best score is among the `queries` best; zeros for all others, which nobody reads."""

    def __init__(self, score: nn.Module, box: nn.Module, queries: int) -> None:
        super().__init__()
        self.score, self.box, self._queries = score, box, queries

    def forward(self, cells: Tensor) -> Tensor:
        chosen = self.score(cells).amax(-1).topk(self._queries, dim=1).indices[..., None]
        boxes: Tensor = self.box(cells.gather(1, chosen.expand(-1, -1, cells.shape[-1])))
        return boxes.new_zeros((*cells.shape[:2], boxes.shape[-1])).scatter(1, chosen.expand_as(boxes), boxes)
