"""The desk behind the review's page: lists that stay, filters, and the slide with what lies over it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import slidescan as ss
from slidescan.anomaly import Coverage, coarser
from slidescan.errors import ConfigError
from slidescan.reviews import Review, layers
from slidescan.reviews.desk import Desk
from slidescan.reviews.tiles import Tiling
from slidescan.slides import Slide, memory_slide
from tests.discs import MPP


def looked_at(case: Path, slide: Slide, **options: Any) -> Review:
    return ss.review(ss.load_result(case, verify=False), slides=slide, reviewer="ann", **options)


@pytest.fixture
def desk(case: Path, slide: Slide) -> Desk:
    return Desk(looked_at(case, slide))


def picture(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_a_list_stays_while_its_items_are_decided(desk: Desk) -> None:
    """Of a list of what is not decided the second page follows the first, whatever was decided meanwhile."""
    first = desk.answer("items", {"decision": "undecided", "page": 0, "size": 6})
    for item in first["items"]:
        desk.answer("decide", {"id": item["id"], "decision": "unsure"})
    second = desk.answer("items", {"listing": first["listing"], "page": 1, "size": 6})
    assert len({item["id"] for item in first["items"] + second["items"]}) == 12
    assert desk.answer("next", {"listing": first["listing"], "start": 0}) == {"index": 6}
    assert desk.answer("items", {"decision": "undecided", "page": 0, "size": 100})["total"] == 6
    for item in second["items"]:
        desk.answer("decide", {"id": item["id"], "decision": "unsure"})
    assert desk.answer("next", {"listing": first["listing"], "start": 0}) == {"index": None}
    for _ in range(8):
        desk.answer("items", {"page": 0, "size": 1})
    with pytest.raises(ConfigError, match="list anew"):
        desk.answer("items", {"listing": first["listing"], "page": 0, "size": 6})


def test_what_is_left_counts_whoever_decided(case: Path, slide: Slide) -> None:
    """The same reviewer decides in a notebook's cell, or in another window, and then with a key of the page."""
    review = looked_at(case, slide)
    desk, elsewhere = Desk(review), looked_at(case, slide)
    ids = [item.id for item in review.items()]
    assert desk.answer("state", {})["left"] == 12
    review.decide(ids[0], "accept")
    elsewhere.decide(ids[1], "reject")
    assert desk.answer("decide", {"id": ids[2], "decision": "unsure"})["left"] == 9
    assert desk.answer("undo", {})["left"] == 10
    elsewhere.undo()
    assert desk.answer("state", {})["left"] == 11
    for n, id_ in enumerate([*ids[1:], *ids], 1):
        review.decide(id_, "accept")
        assert review.left == max(0, 11 - n) == sum(review.decision(each) is None for each in ids)
    assert (review.undo(), review.left) == (ids[-1], 0)


def test_a_decision_of_another_window_is_not_overruled_unseen(case: Path, slide: Slide) -> None:
    """Two windows of one reviewer, of one server and of two, show an item that is undecided."""
    review = looked_at(case, slide)
    for other in (review, looked_at(case, slide)):
        first, second = Desk(review), Desk(other)
        id_ = review.items(decision="undecided")[0].id
        made = first.answer("decide", {"id": id_, "decision": "accept", "note": "odd"})
        told = second.answer("decide", {"id": id_, "decision": "reject"})
        assert (made["saved"], told["saved"]) == (True, False)
        assert told["item"]["decided"] == made["item"]["decided"]
        assert told["left"] == second.answer("state", {})["left"]
        seen = told["item"]["decided"]["event_id"]
        assert second.answer("decide", {"id": id_, "decision": "reject", "over": seen})["saved"]
        first.answer("undo", {})
        assert first.answer("decide", {"id": id_, "decision": "unsure", "over": "gone"})["saved"] is False


def test_a_decision_that_is_sent_again_is_there_once(case: Path, desk: Desk) -> None:
    """No answer came, and a person or a carrier asks again."""
    asked = {"id": desk.answer("items", {"page": 0, "size": 1})["items"][0]["id"], "decision": "accept", "note": "odd"}
    answers = [desk.answer("decide", asked) for _ in range(2)]
    assert answers[0] == answers[1]
    assert answers[0]["saved"]
    assert len((case / "decisions.jsonl").read_text().splitlines()) == 1


def test_a_new_list_knows_what_others_decided_meanwhile(case: Path, desk: Desk) -> None:
    listed = {"page": 0, "size": 1}
    id_ = desk.answer("items", listed)["items"][0]["id"]
    ss.review(ss.load_result(case, verify=False), reviewer="ben").decide(id_, "reject")
    (others,) = desk.answer("items", listed)["items"][0]["others"]
    assert (others["reviewer"], others["decision"]) == ("ben", "reject")


def test_every_class_of_the_detector_can_be_said(case: Path, slide: Slide) -> None:
    """Also one that no region in review is of."""
    result = ss.load_result(case, verify=False)
    two = replace(result, classes=(*result.classes, "other"))
    state = Desk(ss.review(two, slides=slide, reviewer="ann")).answer("state", {})
    assert (state["labels"], state["classes"]) == (["disc"], ["disc", "other"])


def test_filters(desk: Desk) -> None:
    score = desk.answer("items", {"page": 0, "size": 100, "sort": "score"})["items"][5]["score"]
    for values, n in (
        ({"min_score": score}, 6),
        ({"slide": 0}, 12),
        ({"label": "disc"}, 12),
        ({"decision": "accept"}, 0),
    ):
        assert desk.answer("items", {"page": 0, "size": 1, **values})["total"] == n, values


def test_tiles_make_up_the_slide(desk: Desk, slide: Slide) -> None:
    told = desk.answer("slide", {"slide": 0})
    assert (told["size_wh"], told["most"], told["least"], told["tile_px"]) == ([900, 700], 10, 0, 512)
    rows = [
        np.hstack([picture(desk.answer("tile", {"slide": 0, "level": 10, "x": x, "y": y}).data) for x in (0, 1)])
        for y in (0, 1)
    ]
    whole = np.vstack(rows)
    assert whole.shape == (700, 900, 3)
    assert np.abs(whole.astype(int) - slide.read(0, 0, 900, 700, slide.frame).rgb).mean() < 3
    for level, shape in ((9, (350, 450, 3)), (0, (1, 1, 3))):
        assert picture(desk.answer("tile", {"slide": 0, "level": level, "x": 0, "y": 0}).data).shape == shape


def test_a_slide_without_small_levels_is_not_read_whole_for_a_tile() -> None:
    flat = memory_slide(np.broadcast_to(np.uint8(0), (40_000, 40_000, 3)), MPP)
    assert (Tiling.of(flat).most, Tiling.of(flat).least) == (16, 13)  # (512 × 2³)² is 17 MP, twice that 67 MP
    half = memory_slide([np.broadcast_to(np.uint8(0), (px, px, 3)) for px in (40_000, 20_000)], MPP)
    assert Tiling.of(half).least == 12


def test_layers(desk: Desk, case: Path) -> None:
    result, told = ss.load_result(case), desk.answer("slide", {"slide": 0})
    boxes = np.frombuffer(desk.answer("boxes", {"slide": 0}).data, "<f4").reshape(-1, 6)
    assert len(boxes) == told["boxes"] == len(result.detections)
    assert np.abs(boxes[:, :4] - result.detections.xyxy).max() < 0.01
    assert boxes[:, 4].tolist() == result.detections.score.tolist()
    assert (picture(desk.answer("coverage", {"slide": 0}).data) == result.coverage).all()
    heat = picture(desk.answer("heat", {"slide": 0}).data)
    assert heat.shape == (*result.coverage.shape, 4)
    assert heat[..., 3].max() > 200
    assert heat[result.coverage == Coverage.BACKGROUND, 3].max(initial=0) == 0
    assert told["map_wh_l0"] == [n * result.anomaly.frame.mpp / MPP for n in result.anomaly.frame.size_wh]


def test_a_large_map_is_made_coarser_and_loses_no_pixel(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    plane = np.zeros((5, 7), np.uint8)
    plane[4, 6] = Coverage.READ_FAILED
    assert coarser(plane, 2).tolist() == [[0] * 4, [0] * 4, [0, 0, 0, 4]]
    fine = desk.answer("slide", {"slide": 0})["map_wh_l0"]
    monkeypatch.setattr(layers, "_MOST_PX", 30)
    desk._layers.clear()
    coarse = desk.answer("slide", {"slide": 0})["map_wh_l0"]
    assert max(picture(desk.answer("coverage", {"slide": 0}).data).shape) <= 30
    assert all(a <= b < a + 32 * 2 for a, b in zip(fine, coarse, strict=True))


def test_colours_are_those_of_the_overview(case: Path) -> None:
    anomaly = ss.load_result(case).anomaly
    for per_mm2, rgba in ((0.0, (255, 237, 160, 0)), (20.0, (160, 0, 20, 230)), (900.0, (160, 0, 20, 230))):
        heat = layers._heat(replace(anomaly, density=np.full_like(anomaly.density, per_mm2)))
        assert np.array_equal(np.unique(heat.reshape(-1, 4), axis=0), [rgba])


def test_top(case: Path, slide: Slide) -> None:
    """The best, of regions and of detections."""
    for of in ("regions", "detections"):
        best = [item.id for item in looked_at(case, slide, of=of).items()[:3]]
        assert [item.id for item in looked_at(case, slide, of=of, top=3).items()] == best
    with pytest.raises(ConfigError, match="top: expected"):
        looked_at(case, slide, top=0)
