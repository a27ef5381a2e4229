"""The loss of a D-FINE: one query an object, and the encoder's score at every pixel of its maps besides.

Hides matching. Each image is matched with its own objects only: transformers compares every query with the objects of
the whole batch and throws most of it away (3.5 s a call at 8 images of 300 objects), and takes the diagonal of N x N
overlaps. All prediction sets of a step (encoder, first guess, each decoder layer) are matched from one tensor of costs.

Terms, each divided by the number of objects, or of images where that is more:

- ``class``: a matched query is to score 1, any other 0; the latter weighs 0.75 p², so that what is easily nothing
  counts little (varifocal, arXiv 2008.13367, with 1 in place of the overlap: boxes of cells are nominal, and how well
  one is placed is no reason to doubt what it is).
- ``l1``, ``giou``: of matched boxes, in float32.
- ``attribute``: what else is asked of an object, such as whether it is atypical, for matched queries whose object has
  an answer. Attributes are the logits after those of the classes; the encoder is taught to keep them low, for it ranks
  cells by their highest logit.
- ``noise``: all of these for the denoising queries, whose object is known.
- ``dense``: focal (arXiv 1708.02002) over all cells of the encoder's maps: 1 within a quarter of the object's size
  around its centre, 0 beyond a half, between them nothing. A query is matched once an image; this teaches backbone and
  encoder from every cell, and the queries taken are then the hardest places of the image.

What lies in an ignored box is neither right nor wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Target", "detection_loss", "giou", "match_queries"]

# Weights of the matching costs and of the loss terms: those of D-FINE (arXiv 2410.13842); that of the dense term by
# trial: after 4 minutes of training AP on validation fields was 0.55 with 1 and 0.75 with 5.
_COST_CLASS, _COST_L1, _COST_GIOU = 2.0, 5.0, 2.0
_WEIGHTS = {"class": 1.0, "l1": 5.0, "giou": 2.0, "attribute": 0.5, "dense": 5.0}
_NEGATIVE, _GAMMA = 0.75, 2.0  # of the class term and the focal cost
# Share of an object's size within which a cell shows it, and beyond which it does not. At a stride of 16 px an object
# of 50 px then has one cell at least.
_SHOWS, _CLEAR = 0.24, 0.5
_DENSE_ALPHA = 0.25
_FEWEST_CELLS = 4  # cells an image is taken to show at least: images of nothing must not weigh more than others


@dataclass(frozen=True, slots=True, eq=False)
class Target:
    """What is in one image.

    Parameters
    ----------
    boxes : Tensor of float32, shape (T, 4)
        cx, cy, w, h as shares of the image.
    labels : Tensor of int64, shape (T,)
    ignored : Tensor of float32, shape (N, 4)
        Boxes in which nothing is right or wrong.
    attributes : Tensor of float32, shape (T, A)
        1 yes, 0 no, NaN unknown.
    """

    boxes: Tensor
    labels: Tensor
    ignored: Tensor
    attributes: Tensor

    def to(self, device: torch.device) -> Target:
        """Return the same on a device."""
        return Target(*(part.to(device) for part in (self.boxes, self.labels, self.ignored, self.attributes)))


def detection_loss(outputs: Any, targets: Sequence[Target], shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Return the weighted terms of the loss; their sum is what to minimise.

    Parameters
    ----------
    outputs : DFineModelOutput
        Of the inner model in training mode, called with these targets as labels.
    targets : sequence of Target
        One an image.
    shapes : sequence of (int, int)
        Height and width of each level of the encoder's maps.

    Returns
    -------
    dict of Tensor
        ``class``, ``l1``, ``giou``, ``attribute``, ``noise``, ``dense``: scalars.
    """
    # (B, layers, Q, …) to (layers, B, Q, …), the encoder's own choice as one more layer.
    logits, boxes = (
        part.transpose(0, 1).float() for part in (outputs.intermediate_logits, outputs.intermediate_reference_points)
    )
    noise = outputs.denoising_meta_values
    known = 0 if noise is None else int(noise["dn_num_split"][0])
    sets_logits = torch.cat((outputs.enc_topk_logits.float()[None], logits[:, :, known:]))
    sets_boxes = torch.cat((outputs.enc_topk_bboxes.float()[None], boxes[:, :, known:]))
    count = max(len(targets), sum(len(target.labels) for target in targets))
    classes = logits.shape[-1] - targets[0].attributes.shape[1]
    pairs = match_queries(sets_logits.detach()[..., :classes], sets_boxes.detach(), targets)
    terms = _query_terms(sets_logits, sets_boxes, targets, pairs, count, first=1)
    terms["noise"] = logits.new_zeros(())
    if noise is not None:
        groups = int(noise["dn_num_group"])
        fixed = _known_pairs(noise["dn_positive_idx"], targets, groups, len(logits))
        parts = _query_terms(logits[:, :, :known], boxes[:, :, :known], targets, fixed, count * groups)
        terms["noise"] = sum(parts.values(), logits.new_zeros(()))
    terms["dense"] = _WEIGHTS["dense"] * _dense(outputs.enc_outputs_class.float(), targets, shapes)
    return terms


@torch.no_grad()
def match_queries(logits: Tensor, boxes: Tensor, targets: Sequence[Target]) -> Tensor:
    """Assign a query to every object of its own image, at the least total cost, in each prediction set.

    Parameters
    ----------
    logits : Tensor, shape (P, B, Q, C)
    boxes : Tensor, shape (P, B, Q, 4)
        cxcywh in [0, 1].
    targets : sequence of B Target

    Returns
    -------
    Tensor of int64, shape (N, 4)
        Set, image, query, object. Where an image holds more objects than queries, the dearest objects have none.

    Examples
    --------
    >>> at = torch.tensor([[0.2, 0.2, 0.1, 0.1], [0.7, 0.7, 0.1, 0.1]])
    >>> target = Target(at[1:], torch.zeros(1, dtype=torch.long), torch.empty(0, 4), torch.empty(1, 0))
    >>> match_queries(torch.zeros(1, 1, 2, 1), at[None, None], [target]).tolist()
    [[0, 0, 1, 0]]
    """
    rows: list[NDArray[np.int64]] = [np.empty((0, 4), np.int64)]
    for b, target in enumerate(targets):
        if not len(target.labels):
            continue
        p = logits[:, b].sigmoid()[..., target.labels]  # (P, Q, T)
        positive = (1 - _NEGATIVE) * (1 - p) ** _GAMMA * -(p + 1e-8).log()
        negative = _NEGATIVE * p**_GAMMA * -(1 - p + 1e-8).log()
        found, there = boxes[:, b, :, None], target.boxes
        cost = (
            _COST_CLASS * (positive - negative)
            + _COST_L1 * (found - there).abs().sum(-1)
            - _COST_GIOU * giou(found, there)
        )
        # Something not finite never hides a query that is: it is merely the last choice.
        for s, table in enumerate(torch.nan_to_num(cost, 1e6, 1e6, 1e6).cpu().numpy()):
            queries, objects = linear_sum_assignment(table)
            ones = np.ones_like(queries)
            rows.append(np.stack((s * ones, b * ones, queries, objects), 1))
    return torch.from_numpy(np.concatenate(rows)).to(logits.device)


def giou(one: Tensor, other: Tensor) -> Tensor:
    """Return the generalised overlap (arXiv 1902.09630) of cxcywh boxes pair by pair; shapes (…, 4) broadcast.

    Examples
    --------
    >>> box = torch.tensor([0.5, 0.5, 0.2, 0.2])
    >>> round(float(giou(box, box)), 6)
    1.0
    """
    (low, high), (low2, high2) = (
        (box[..., :2] - box[..., 2:] / 2, box[..., :2] + box[..., 2:] / 2) for box in (one, other)
    )
    inside = (torch.minimum(high, high2) - torch.maximum(low, low2)).clamp(min=0).prod(-1)
    hull = (torch.maximum(high, high2) - torch.minimum(low, low2)).prod(-1)
    union = one[..., 2:].prod(-1) + other[..., 2:].prod(-1) - inside
    return inside / union.clamp(min=1e-9) - (hull - union) / hull.clamp(min=1e-9)


def _query_terms(
    logits: Tensor, boxes: Tensor, targets: Sequence[Target], pairs: Tensor, count: int, first: int = 0
) -> dict[str, Tensor]:
    """Return the terms of prediction sets (P, B, Q, …) whose `pairs` are (set, image, query, object).

    Attributes are asked of the sets from `first` on.
    """
    s, b, q, t = pairs.unbind(1)
    answers = torch.cat([target.attributes for target in targets])
    classes = logits.shape[-1] - answers.shape[1]
    logits, asked = logits[..., :classes], logits[..., classes:]
    start = torch.tensor([0, *np.cumsum([len(target.labels) for target in targets])], device=logits.device)[b]
    truth, label, answer = (
        torch.cat(parts)[start + t]
        for parts in zip(*((target.boxes, target.labels, target.attributes) for target in targets), strict=True)
    )
    wanted = torch.zeros_like(logits)
    wanted[s, b, q, label] = 1.0
    weight = torch.where(wanted > 0, 1.0, _NEGATIVE * logits.detach().sigmoid() ** _GAMMA)
    # A query nobody matched in an ignored box may have found what nobody annotated.
    for i, target in enumerate(targets):
        if len(target.ignored):
            weight[:, i] *= ~(_within(boxes[:, i, :, :2].detach(), target.ignored)[..., None] & (wanted[:, i] == 0))
    loss = F.binary_cross_entropy_with_logits(logits, wanted, weight, reduction="sum")
    found = boxes[s, b, q]
    said = ~answer.isnan() & (s >= first)[:, None]
    guess = F.binary_cross_entropy_with_logits(asked[s, b, q][said], answer[said], reduction="sum")
    return {
        "attribute": _WEIGHTS["attribute"] * guess / count,
        "class": _WEIGHTS["class"] * loss / count,
        "l1": _WEIGHTS["l1"] * (found - truth).abs().sum() / count,
        "giou": _WEIGHTS["giou"] * (1 - giou(found, truth)).sum() / count,
    }


def _known_pairs(positive: Sequence[Tensor], targets: Sequence[Target], groups: int, sets: int) -> Tensor:
    """Return the pairs of the denoising queries, the same in every set."""
    rows = [
        torch.stack(
            (
                torch.full_like(queries, b),
                queries,
                torch.arange(len(target.labels), device=queries.device).repeat(groups),
            ),
            1,
        )
        for b, (queries, target) in enumerate(zip(positive, targets, strict=True))
    ]
    one = torch.cat(rows)
    first = torch.arange(sets, device=one.device).repeat_interleave(len(one))
    return torch.cat((first[:, None], one.repeat(sets, 1)), 1)


def _dense(logits: Tensor, targets: Sequence[Target], shapes: Sequence[tuple[int, int]]) -> Tensor:
    """Return the focal loss of the encoder's scores (B, S, C) over all cells, a mean over those that show."""
    cells = torch.cat([_centres(shape, logits.device) for shape in shapes])
    wanted, weight = torch.zeros_like(logits), torch.ones_like(logits)
    for b, target in enumerate(targets):
        if len(target.ignored):
            weight[b][_within(cells, target.ignored)] = 0.0
        if len(target.labels):
            # Distance in sizes of the object, so that a long object shows along its length.
            away = ((cells[:, None] - target.boxes[:, :2]) / target.boxes[:, 2:].clamp(min=1e-6)).norm(dim=-1)
            weight[b][(away < _CLEAR).any(1)] = 0.0
            cell, which = (away <= _SHOWS).nonzero(as_tuple=True)
            wanted[b, cell, target.labels[which]] = 1.0
            weight[b][cell] = 1.0
    p = logits.sigmoid()
    miss = torch.where(wanted > 0, _DENSE_ALPHA * (1 - p) ** _GAMMA, (1 - _DENSE_ALPHA) * p**_GAMMA)
    loss = weight * miss * F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return loss.sum() / max(_FEWEST_CELLS * len(targets), float(wanted.sum()))


def _centres(shape: tuple[int, int], device: torch.device) -> Tensor:
    """Return the centres (H * W, 2) of a map's cells as shares of the image."""
    y, x = ((torch.arange(n, device=device) + 0.5) / n for n in shape)
    return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).flatten(0, 1)


def _within(points: Tensor, boxes: Tensor) -> Tensor:
    """Return which points (…, 2) lie in any of the boxes (N, 4)."""
    return ((points[..., None, :] - boxes[:, :2]).abs() <= boxes[:, 2:] / 2).all(-1).any(-1)
