"""A detector in memory: tiles in, boxes in tile px out.

`Network` is what all have in common: batches, checks, the edge of the tile. `Detr` hides preprocessing, precision,
anchors and post-processing of every object-detection model of transformers that needs nothing but an image.
transformers' image processors are not used: they would squash each tile to the size of a photo.
Only what they say of colours is: scale, mean and spread. Invariants:

- Batches have one fixed size a device, padded, so a tile's result does not depend on its neighbours. On a GPU it is
  halved, for good, where there is no room for it; round-off may differ then.
- Whatever turns into a coordinate is float32. In bfloat16 a box on a 1024 px tile moves by several px, so only the
  convolutions (backbone and encoder) may run in it; the decoder never does.
- With `anchor_px` set, anchors are that many px whatever the tile's size. transformers makes them a share of the tile,
  which would make the same figure look different to the decoder on a 512 px and a 1024 px tile, and drops those within
  1 % of the border.
- A tile that is not whole windows of a network, or has fewer cells than it has queries, is padded with zeros; boxes
  stay in tile px. transformers masks its padding where a model takes a mask; here the network sees it as black.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from slidescan.detect.card import Colours
from slidescan.detect.device import Precision
from slidescan.detect.surgery import channels_last, fold, leave_out, lower_precision, set_anchors
from slidescan.detections import Detections, distinct
from slidescan.endings import is_short_of_memory, lost_device
from slidescan.errors import ModelError, SlidescanError
from slidescan.ops import accelerate
from slidescan.stages import stage

__all__ = ["Detr", "Forward", "Network"]

# From tiles of uint8 (B, H, W, 3) to score (B, Q), label (B, Q), x0, y0, x1, y1 (B, Q, 4) in tile px and probability of
# each attribute (B, Q, A), best first.
Forward = Callable[[Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]

# Coarsest stride of the models here, px; tiles must be a multiple, or levels would not line up.
STRIDE_PX = 32
_LARGEST_STRIDE_PX = 1024  # of a network that anyone has; beyond, no tile would be large enough for it
# Models whose last class is "nothing here" and whose scores are a softmax over all classes.
_SOFTMAX = ("detr", "yolos", "table-transformer")
# Models that want squares: transformers 5.23 cuts RF-DETR's windows with width and height exchanged, and so puts the
# features of any other image in wrong places.
_SQUARE = ("rf_detr",)
# Tiles at once on a GPU. On a CPU one at a time is as fast (measured) and needs no padding.
_GPU_BATCH = 8


class Network:
    """What a network finds on tiles, whatever it is.

    Parameters
    ----------
    forward : Forward
        The network, ready on its device.
    name : str
        For errors.
    device : str
    merge_iou : float, optional
        See the card.
    """

    def __init__(self, forward: Forward, *, name: str, device: str, merge_iou: float | None = None) -> None:
        self._forward, self._name, self._device = forward, name, torch.device(device)
        self._merge_iou = merge_iou
        self._batch = 1 if self._device.type == "cpu" else _GPU_BATCH

    def detect(self, tiles: NDArray[np.uint8], min_score: float) -> list[Detections]:
        """Score tiles (B, H, W, 3); return one table a tile in tile px, best first, scores >= `min_score`.

        Raises
        ------
        ModelError
            If H or W is no multiple of 32 px, the network fails on such a tile, or its output is not finite.
        """
        if tiles.ndim != 4 or tiles.shape[3] != 3 or tiles.dtype != np.uint8:
            raise ModelError(
                f"{self._name}: expected tiles of uint8 with shape (B, H, W, 3), got {tiles.dtype} {tiles.shape}"
            )
        height, width = tiles.shape[1:3]
        if height % STRIDE_PX or width % STRIDE_PX or not height or not width:
            raise ModelError(
                f"{self._name}: expected tiles whose sides are a multiple of {STRIDE_PX} px, got {width} x {height}; "
                "pad the tiles or choose another tile size"
            )
        found: list[Detections] = []
        at_once = self._batch
        for start in range(0, len(tiles), at_once):
            chunk = tiles[start : start + at_once]
            with stage("transfer"):  # of a copy, row by row: torch takes neither read-only nor mirrored arrays
                pixels = torch.from_numpy(np.array(chunk, order="C")).to(self._device)
            # Also where the caller computes in half: what becomes a coordinate does not.
            with torch.inference_mode(), torch.autocast(self._device.type, enabled=False):
                try:
                    scores, labels, boxes, attributes = self._scored(pixels)
                except Exception as exc:  # what a network that does not fit its configuration ends in is any error
                    if isinstance(exc, SlidescanError) or is_short_of_memory(exc) or lost_device(exc):
                        raise
                    said = next(iter(str(exc).strip().splitlines()), "")
                    raise ModelError(
                        f"{self._name}: fails on tiles of {width} x {height} px ({type(exc).__name__}: {said})"
                    ) from exc
                boxes = boxes.clamp(min=0).minimum(boxes.new_tensor([width, height] * 2))
                if not all(torch.isfinite(part).all() for part in (scores, boxes, attributes)):
                    raise ModelError(
                        f"{self._name}: the network returned NaN; its weights are damaged or too large for fp16"
                    )
            columns = [part.cpu().numpy() for part in (boxes, scores, labels, attributes)]
            for i in range(len(chunk)):
                keep = columns[1][i] >= min_score
                table = Detections.build(*(column[i][keep] for column in columns))
                found.append(table if self._merge_iou is None else distinct(table, self._merge_iou))
        return found

    def _scored(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """Return what the network says of up to a batch of tiles; in smaller ones where there is no room for it."""
        while True:
            batch = self._batch  # another thread may halve it meanwhile
            try:
                parts = [self._forward(_filled(part, batch)) for part in torch.split(pixels, batch)]
                return tuple(torch.cat(columns)[: len(pixels)] for columns in zip(*parts, strict=True))
            except torch.OutOfMemoryError:  # a GPU's; the next batches are as small
                if batch == 1:
                    raise
                self._batch = min(self._batch, batch // 2)
            torch.cuda.empty_cache()  # here the error no longer holds what it was raised over


def _filled(tiles: Tensor, batch: int) -> Tensor:
    """Return tiles (B, H, W, 3) with empty ones up to a batch."""
    if len(tiles) == batch:
        return tiles
    return torch.cat((tiles, tiles.new_zeros((batch - len(tiles), *tiles.shape[1:]))))


class Detr:
    """A transformers object-detection model made ready for tiles.

    Parameters
    ----------
    model : nn.Module
        As transformers loads it; it is changed in place (evaluation mode, fused, moved).
    name : str
        For errors.
    device, precision : str
        Where, and in what the convolutions run.
    anchor_px : float, optional
        Edge of the anchors; None keeps those of transformers.
    temperature, offset : float
        A score is sigmoid(logit / temperature + offset).
    colours : Colours, optional
        How grey levels become the model's input; default: 0 to 1.
    attributes : int
        How many of the last logits are no classes but attributes of the object.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        name: str,
        device: str,
        precision: Precision,
        anchor_px: float | None = None,
        temperature: float = 1.0,
        offset: float = 0.0,
        colours: Colours | None = None,
        attributes: int = 0,
    ) -> None:
        self._attributes = attributes
        self._name, self._temperature, self._offset = name, temperature, offset
        model = model.eval()
        kind = getattr(model.config, "model_type", "")
        self._softmax, self._square = kind in _SOFTMAX, kind in _SQUARE
        if self._softmax and (attributes or (temperature, offset) != (1.0, 0.0)):
            raise ModelError(
                f"{name}: expected no temperature, offset or attributes in slidescan.json with a model of type {kind}, "
                "whose classes share a softmax; leave them out"
            )
        self._window, self._least = _window_px(model.config), _least_px(model.config)
        with suppress(ModelError):  # DETR and YOLOS attend to everything: there is nothing to replace
            accelerate(model)
        fold(model)
        leave_out(model)
        colours = colours or Colours()
        self._mean, self._spread = (torch.tensor(c, device=device) for c in colours.mean_and_spread)
        if anchor_px is not None:
            if not hasattr(getattr(model, "model", None), "generate_anchors"):
                raise ModelError(f"{name}: expected anchor_px with a model that has anchors, got one of type {kind}")
            set_anchors(model, anchor_px)
        if precision == "bf16":
            lower_precision(model, torch.device(device).type, kernels=True)
        self._model: Any = channels_last(model.to(device))

    def __call__(self, tiles: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return score (B, Q), label (B, Q), box (B, Q, 4) in px and attributes (B, Q, A), best first."""
        tile_wh = tiles.shape[2], tiles.shape[1]
        width, height = self._padded(*tile_wh)
        # Whole rows at once: torch is six times as slow over a last axis of three colours.
        pixels = tiles.float()
        pixels.flatten(2).sub_(self._mean.repeat(tile_wh[0])).div_(self._spread.repeat(tile_wh[0]))
        pixels = pixels.permute(0, 3, 1, 2)  # is channels_last
        if (width, height) != tile_wh:
            pixels = nn.functional.pad(pixels, (0, width - tile_wh[0], 0, height - tile_wh[1]))
        out = self._model(pixel_values=pixels)
        boxes = getattr(out, "pred_boxes", None)
        if boxes is None or boxes.shape[-1] != 4:
            raise ModelError(
                f"{self._name}: expected a network that returns logits and pred_boxes of four numbers, got "
                f"{', '.join(out)}; choose another kind of model"
            )
        logits, cxcywh = out.logits.float(), boxes.float()
        logits, asked = logits.split((logits.shape[-1] - self._attributes, self._attributes), -1)
        if self._softmax:
            # A query speaks for its best class; the last one is "nothing".
            share, best = logits.softmax(-1)[..., :-1].max(-1)
            score, query = share.sort(descending=True, stable=True)
            label = best.gather(1, query)
        else:
            # A query may speak for several classes; the best Q pairs of query and class are the answer.
            queries, classes = logits.shape[1:]
            chance = (logits / self._temperature + self._offset).sigmoid().flatten(1)
            score, pair = (part[:, :queries] for part in chance.sort(descending=True, stable=True))
            query, label = pair // classes, pair % classes
        box, attributes = (
            part.gather(1, query[..., None].expand(*query.shape, part.shape[-1])) for part in (cxcywh, asked.sigmoid())
        )
        half = box[..., 2:] / 2
        size = box.new_tensor([width, height])
        return score, label, torch.cat(((box[..., :2] - half) * size, (box[..., :2] + half) * size), -1), attributes

    def _padded(self, width: int, height: int) -> tuple[int, int]:
        """Return the size the network is given: whole windows, the rest filled at the right and the bottom."""
        wide, high = (-(-max(n, self._least) // self._window) * self._window for n in (width, height))
        return (max(wide, high), max(wide, high)) if self._square else (wide, high)


def _window_px(config: Any) -> int:
    """Return what the sides of an image must be a multiple of for a backbone that cuts it into windows; or 1 px."""
    backbone: Any = getattr(config, "backbone_config", None)
    # LW-DETR counts the windows of an image, RF-DETR those of a side.
    windows = getattr(backbone, "num_windows_side", None) or getattr(backbone, "num_windows", None)
    return int(backbone.patch_size * windows) if windows else 1


def _least_px(config: Any) -> int:
    """Return the edge from which a tile has as many cells as the network takes queries from; or 1 px."""
    strides, wanted, edge = _strides_px(config), _wanted(config), STRIDE_PX
    if not strides or not wanted:
        return 1
    if not all(0 < stride <= _LARGEST_STRIDE_PX for stride in strides):
        raise ValueError(f"strides from 1 to {_LARGEST_STRIDE_PX} px, got {strides}")
    while sum((edge // stride) ** 2 for stride in strides) < wanted:
        edge += STRIDE_PX
    return edge


def _strides_px(config: Any) -> list[int]:
    """Return the px of a cell, by level, of the families that choose their queries among cells."""
    if strides := getattr(config, "feat_strides", None):
        return list(strides)
    if config.model_type in ("lw_detr", "rf_detr"):
        patch_px, scales = config.backbone_config.patch_size, getattr(config, "projector_scale_factors", None)
        return [max(1, round(patch_px / scale)) for scale in scales or (1.0,)]
    if getattr(config, "two_stage", False):  # Deformable DETR: the last three stages, and coarser ones
        return [8 << level for level in range(config.num_feature_levels)]
    return []


def _wanted(config: Any) -> int:
    two_stage = getattr(config, "two_stage", False) and getattr(config, "two_stage_num_proposals", 0)
    return int(two_stage or getattr(config, "num_queries", 0) or 0)
