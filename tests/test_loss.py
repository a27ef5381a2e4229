"""The loss against transformers' own where the two agree, and by what it must teach where they do not."""

from __future__ import annotations

import itertools
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor
from transformers import DFineConfig
from transformers.loss.loss_for_object_detection import generalized_box_iou
from transformers.loss.loss_rt_detr import RTDetrHungarianMatcher

from slidescan.detect.network import set_anchors
from slidescan.ops import accelerate
from slidescan.train.loss import Target, detection_loss, giou, match_queries
from slidescan.train.network import build_network

SHAPES = [(16, 16), (8, 8)]  # of a tile of 128 px


def boxes(rng: np.random.Generator, n: int) -> Tensor:
    """Random cxcywh boxes inside the image."""
    wh = rng.uniform(0.05, 0.4, (n, 2))
    return torch.from_numpy(np.concatenate((rng.uniform(wh / 2, 1 - wh / 2), wh), 1)).float()


def target(xywh: Tensor, label: list[int] | None = None, ignored: Tensor | None = None, answers: Any = None) -> Target:
    """A target with as little said as possible."""
    return Target(
        xywh,
        torch.tensor(label if label is not None else [0] * len(xywh), dtype=torch.long),
        torch.empty(0, 4) if ignored is None else ignored,
        torch.empty(len(xywh), 0) if answers is None else torch.tensor(answers).reshape(len(xywh), -1),
    )


def corners(cxcywh: Tensor) -> Tensor:
    """The same as x0, y0, x1, y1."""
    return torch.cat((cxcywh[:, :2] - cxcywh[:, 2:] / 2, cxcywh[:, :2] + cxcywh[:, 2:] / 2), 1)


@given(seed=st.integers(0, 10_000), n=st.integers(1, 6))
def test_overlap_is_the_diagonal_of_transformers_table(seed: int, n: int) -> None:
    """Pair by pair, without the table."""
    rng = np.random.default_rng(seed)
    one, other = boxes(rng, n), boxes(rng, n)
    expected = generalized_box_iou(corners(one), corners(other)).diag()
    torch.testing.assert_close(giou(one, other), expected, atol=1e-5, rtol=1e-5)


@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_matching_is_that_of_transformers_image_by_image(seed: int, counts: list[int]) -> None:
    """The same total cost for every image, which here is found from its own objects alone."""
    rng = np.random.default_rng(seed)
    queries, classes = 6, 3
    logits = torch.from_numpy(rng.normal(0, 2, (1, len(counts), queries, classes))).float()
    found = torch.stack([boxes(rng, queries) for _ in counts])[None]
    targets = [target(boxes(rng, n), rng.integers(0, classes, n).tolist()) for n in counts]
    pairs = match_queries(logits, found, targets)
    matcher = RTDetrHungarianMatcher(DFineConfig())
    labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
    theirs = matcher({"logits": logits[0], "pred_boxes": found[0]}, labels)
    for b, (query, obj) in enumerate(theirs):
        mine = {(int(q), int(t)) for _, image, q, t in pairs if image == b}
        assert mine == set(zip(query.tolist(), obj.tolist(), strict=True))


def test_more_objects_than_queries_leaves_the_dearest() -> None:
    """Every query has one object, and no pair of a better choice is left out."""
    rng = np.random.default_rng(0)
    there, found = boxes(rng, 4), boxes(rng, 2)
    pairs = match_queries(torch.zeros(1, 1, 2, 1), found[None, None], [target(there)])
    cost = (found[:, None] - there).abs().sum(-1) * 5 - 2 * giou(found[:, None], there)
    best = min(float(cost[0, a] + cost[1, b]) for a, b in itertools.permutations(range(4), 2))
    assert sum(float(cost[q, t]) for _, _, q, t in pairs.tolist()) == pytest.approx(best, abs=1e-4)


def test_a_prediction_that_is_not_finite_hides_no_other() -> None:
    """It is matched only where nothing else is left."""
    found = torch.tensor([[float("nan")] * 4, [0.3, 0.3, 0.1, 0.1]])
    pairs = match_queries(torch.zeros(1, 1, 2, 1), found[None, None], [target(found[1:])])
    assert pairs.tolist() == [[0, 0, 1, 0]]


class Trial:
    """A small network in training mode and the loss of it."""

    def __init__(self, attributes: tuple[str, ...] = ()) -> None:
        torch.manual_seed(0)
        self.network: Any = build_network(["a"], attributes, width=0.25, queries=20)
        accelerate(self.network)
        set_anchors(self.network, 32.0)
        self.network.train()
        self.pixels = torch.rand(2, 3, 128, 128)

    def terms(self, targets: list[Target]) -> dict[str, Tensor]:
        torch.manual_seed(1)
        labels = [{"class_labels": t.labels, "boxes": t.boxes} for t in targets]
        return detection_loss(self.network.model(self.pixels, labels=labels), targets, SHAPES)


ONE = torch.tensor([[0.5, 0.5, 0.25, 0.25]])
NONE = torch.empty(0, 4)


def test_images_without_objects_have_a_finite_loss_with_gradients() -> None:
    """No boxes, so only what is wrongly found costs."""
    trial = Trial()
    terms = trial.terms([target(NONE), target(NONE)])
    values = {name: term.item() for name, term in terms.items()}
    assert all(np.isfinite(value) for value in values.values())
    assert values["l1"] == values["giou"] == values["noise"] == 0.0
    sum(terms.values()).backward()  # type: ignore[union-attr]
    assert trial.network.model.enc_score_head.weight.grad.abs().sum() > 0


def test_what_lies_in_an_ignored_box_costs_nothing() -> None:
    """All ignored: neither queries nor cells are taught anything. A part ignored: less than nothing ignored."""
    trial = Trial()
    everywhere, half = torch.tensor([[0.5, 0.5, 2.0, 2.0]]), torch.tensor([[0.25, 0.5, 0.5, 1.0]])
    loss = [trial.terms([target(NONE, ignored=box)] * 2) for box in (NONE, half, everywhere)]
    for term in ("class", "dense"):
        full, part, none = (terms[term].item() for terms in loss)
        assert none == 0.0
        assert 0 < part < full


def test_attributes_are_taught_only_where_they_are_known() -> None:
    """NaN is no answer; yes and no differ."""
    trial = Trial(("odd",))
    yes, no, unknown = (
        trial.terms([target(ONE, answers=[answer])] * 2)["attribute"].item() for answer in (1.0, 0.0, float("nan"))
    )
    assert unknown == 0.0
    assert yes > 0
    assert no > 0
    assert yes != no


def test_the_loss_teaches_where_an_object_is() -> None:
    """Some steps on one image: the best query is the object in its place, and the encoder ranks its cells first."""
    trial = Trial()
    trial.pixels = torch.full((2, 3, 128, 128), 0.8)
    at = torch.tensor([[0.25, 0.625, 0.25, 0.25]])
    trial.pixels[0, :, 64:96, 16:48] = 0.1
    optimiser = torch.optim.AdamW(trial.network.parameters(), 2e-3)
    for _ in range(60):
        optimiser.zero_grad()
        sum(trial.terms([target(at), target(NONE)]).values()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(trial.network.parameters(), 1.0)
        optimiser.step()
    with torch.no_grad():
        out = trial.network.model(trial.pixels)
    score = out.intermediate_logits[:, -1, :, 0].sigmoid()
    best = int(score[0].argmax())
    assert score[0, best] > 0.5
    assert score[1].max() < 0.3
    assert giou(out.intermediate_reference_points[0, -1, best], at[0]) > 0.4
    cell = int(out.enc_outputs_class[0, :256, 0].argmax())  # of the finer level, 16 cells a row
    assert abs(cell % 16 - 3.5) <= 2
    assert abs(cell // 16 - 9.5) <= 2
