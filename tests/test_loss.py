"""The loss against transformers' own where the two agree, and by what it must teach where they do not."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given
from torch import Tensor
from transformers.loss.loss_for_object_detection import generalized_box_iou

from slidescan.detect.surgery import set_anchors
from slidescan.ops import accelerate
from slidescan.train.loss import Target, detection_loss, giou, place_queries
from slidescan.train.network import build_network, relabel

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
def test_a_query_has_the_nearest_object_of_its_own_image(seed: int, counts: list[int]) -> None:
    """Each query one object at most, in sizes of the object; all near ones, and none of another image."""
    rng = np.random.default_rng(seed)
    queries = 12
    targets = [target(boxes(rng, n)) for n in counts]
    starts = torch.stack([boxes(rng, queries) for _ in counts])
    pairs, at = place_queries(starts, targets)
    expected = {}
    for b, q in itertools.product(range(len(counts)), range(queries)):
        x, y = starts[b, q, :2].tolist()
        sizes = [np.hypot((x - cx) / w, (y - cy) / h) for cx, cy, w, h in targets[b].boxes.tolist()]
        if sizes and min(sizes) <= 0.5:
            expected[b, q] = int(np.argmin(sizes)), min(sizes) <= 0.24
    assert {(b, q): (t, near) for (b, q, t), near in zip(pairs.tolist(), at.tolist(), strict=True)} == expected


def test_a_prediction_that_is_not_finite_is_at_no_object() -> None:
    """And hides no other."""
    found = torch.tensor([[float("nan")] * 4, [0.3, 0.3, 0.1, 0.1]])
    pairs, _ = place_queries(found[None], [target(found[1:])])
    assert pairs.tolist() == [[0, 1, 0]]


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
    rate = torch.optim.lr_scheduler.PolynomialLR(optimiser, 60)  # to nothing, or the last steps' noise decides
    for _ in range(60):
        optimiser.zero_grad()
        sum(trial.terms([target(at), target(NONE)]).values()).backward()  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_(trial.network.parameters(), 1.0)
        optimiser.step()
        rate.step()
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


def test_queries_at_one_object_all_learn_it() -> None:
    """Two at it and one away: in every layer both are to score higher, whatever they say yet, and the third lower."""
    starts = torch.tensor([[[0.5, 0.5, 0.2, 0.2], [0.52, 0.5, 0.2, 0.2], [0.9, 0.9, 0.2, 0.2]]])
    logits = torch.zeros(1, 4, 3, 1, requires_grad=True)
    outputs = SimpleNamespace(
        intermediate_logits=logits,
        intermediate_reference_points=starts[:, None].expand(1, 4, 3, 4),
        enc_topk_logits=torch.zeros(1, 3, 1),
        enc_topk_bboxes=starts,
        enc_outputs_class=torch.zeros(1, 16 * 16 + 8 * 8, 1),
        denoising_meta_values=None,
    )
    loss = detection_loss(outputs, [target(torch.tensor([[0.5, 0.5, 0.2, 0.2]]))], SHAPES)["class"]
    (push,) = torch.autograd.grad(loss, logits)
    assert (push[0, :, :2] < 0).all()
    assert (push[0, :, 2] > 0).all()


def test_what_is_pinned_stays_and_the_place_of_a_tile_has_no_say() -> None:
    """After training steps a window shifted by 64 px says the same of every cell that its edges are far from."""
    trial = Trial()
    network = trial.network
    optimiser = torch.optim.AdamW(network.parameters(), 1e-2)
    for _ in range(3):
        optimiser.zero_grad()
        sum(trial.terms([target(ONE), target(NONE)]).values()).backward()  # type: ignore[union-attr]
        optimiser.step()
    assert not network.model.decoder.layers[0].self_attn.o_proj.weight.any()
    network.eval()
    edge, shift = 448, 64
    network.model.config.num_queries = (edge // 8) ** 2 + (edge // 16) ** 2  # every cell
    image = torch.rand(1, 3, edge + shift, edge)
    said: list[dict[tuple[int, int], list[float]]] = []
    with torch.no_grad():
        for top in (0, shift):
            out = network.model(image[..., top : top + edge, :])
            starts, boxes = (
                (part * edge).tolist() for part in (out.enc_topk_bboxes[0], out.intermediate_reference_points[0, -1])
            )
            said.append({})
            for (x, y, *_), (cx, cy, w, h), score in zip(
                starts, boxes, out.intermediate_logits[0, -1, :, 0].tolist(), strict=True
            ):
                said[-1][round(x), round(y) + top] = [cx, cy + top, w, h, score]
    far = [cell for cell in said[0] if 150 < cell[0] < edge - 150 and 150 + shift < cell[1] < edge - 150]
    assert len(far) > 100
    np.testing.assert_allclose([said[0][cell] for cell in far], [said[1][cell] for cell in far], atol=0.01)
    assert np.ptp([said[0][cell][4] for cell in far]) > 0.01  # and does say something


def test_names_in_another_order_take_their_weights_along() -> None:
    """Also where there are as many; a new one takes those of the one that is gone."""
    torch.manual_seed(0)
    before: Any = build_network(["a", "b", "c"], width=0.25, queries=20)
    pixels = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        one = before.eval().model(pixels).enc_outputs_class
        two = relabel(before, ["c", "new", "a"]).eval().model(pixels).enc_outputs_class
    torch.testing.assert_close(one[..., [2, 1, 0]], two)


def test_a_class_of_another_name_takes_the_place_of_one_and_not_of_an_attribute() -> None:
    """What was trained to find figures goes on to, whatever they are called."""
    torch.manual_seed(0)
    before: Any = build_network(["figure"], ["atypical"], width=0.25, queries=20)
    pixels = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        said = before.eval().model(pixels).enc_outputs_class
        only = relabel(before, ["Mitosis"], known_classes=1).eval().model(pixels).enc_outputs_class
        both: Any = relabel(before, ["Mitosis", "imposter"], ["odd"], known_classes=1).eval()
    torch.testing.assert_close(said[..., :1], only)
    head = before.model.enc_score_head.weight
    torch.testing.assert_close(both.model.enc_score_head.weight[2], head[1])  # odd is atypical
    assert not torch.equal(both.model.enc_score_head.weight[1], head[1])  # and an imposter is not


def test_what_keeps_its_name_keeps_its_weights() -> None:
    """A class goes, one comes, one moves: its score is the same as before, and the rest of the network, too."""
    torch.manual_seed(0)
    before: Any = build_network(["a", "b", "c"], width=0.25, queries=20)
    after: Any = relabel(before, ["c", "new"])
    pixels = torch.rand(1, 3, 128, 128)
    with torch.no_grad():
        one, two = (network.eval().model(pixels).enc_outputs_class for network in (before, after))
    torch.testing.assert_close(one[..., 2], two[..., 0])
    assert (after.config.num_labels, after.config.id2label) == (2, {0: "c", 1: "new"})
    assert relabel(before, ["x", "y", "z"]) is before
    with torch.no_grad():
        torch.testing.assert_close(before.model(pixels).enc_outputs_class, one)
