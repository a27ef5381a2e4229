"""What is changed in a network of transformers once it is loaded: the same result, but faster and on tiles of any size.

Hides how transformers' modules are named. Each function changes a model in place.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["channels_last", "fold_normalisation", "leave_out", "lower_precision", "set_anchors"]


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


def lower_precision(model: nn.Module, device_type: str) -> None:
    """Run backbone and encoder of a D-FINE or RT-DETR model in bfloat16 and hand float32 to the decoder."""
    inner: Any = model.model
    autocast = torch.autocast(device_type, dtype=torch.bfloat16)
    for part in (inner.backbone, *inner.encoder_input_proj, inner.encoder):
        part.forward = autocast(part.forward)
    for projection in inner.decoder_input_proj:
        projection.register_forward_pre_hook(lambda _, inputs: tuple(t.float() for t in inputs))


def fold_normalisation(model: nn.Module) -> None:
    """Fold every batch normalisation into the convolution before it: same result, fewer passes over memory."""
    pairs = (("convolution", "normalization"), ("conv", "norm"), ("0", "1"))
    for module in model.modules():
        for first, second in pairs:
            conv, norm = getattr(module, first, None), getattr(module, second, None)
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(module, first, nn.utils.fuse_conv_bn_eval(conv, norm))
                setattr(module, second, nn.Identity())


def leave_out(model: nn.Module) -> None:
    """Leave out attention whose output is multiplied by zero, and take the larger of two px without torch's pooling.

    Same result. Of a tile of the bundled detector, 1,024 px in bfloat16 on 2 cores, these were an eighth each.
    """
    for module in model.modules():
        out, pool = getattr(module, "o_proj", None), getattr(module, "pool", None)
        if isinstance(out, nn.Linear) and not any(part.any() for part in out.parameters()):
            module.forward = _silent
        if isinstance(pool, nn.MaxPool2d) and (pool.kernel_size, pool.stride, pool.padding) == (2, 1, 0):
            module.pool = _LargerOfFour()


def _silent(hidden_states: Tensor, **_: Any) -> tuple[Tensor, None]:
    return torch.zeros_like(hidden_states), None


class _LargerOfFour(nn.Module):
    def forward(self, pixels: Tensor) -> Tensor:
        rows = torch.maximum(pixels[..., :-1, :], pixels[..., 1:, :])
        return torch.maximum(rows[..., :-1], rows[..., 1:])
