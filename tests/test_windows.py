"""Annotated slides: no patient is in two splits, and windows show objects where they are."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from slidescan.errors import ConfigError
from slidescan.geometry import Box
from slidescan.slides import memory_slide
from slidescan.train.annotated import Annotated, refuse_leaks, split
from slidescan.train.own import OwnSource
from slidescan.train.settings import VariantSettings
from slidescan.train.windows import Example, Windows

NOTHING = np.empty((0, 4))
GREY = 200
COLOURS = np.array(
    [(230, 20, 20), (20, 200, 20), (20, 20, 230), (220, 200, 10), (10, 200, 210), (210, 10, 200), (120, 60, 0)],
    np.uint8,
)
BLANK = memory_slide(np.full((64, 64, 3), GREY, np.uint8), 0.25)


def one(slide: Any, xyxy: Any, patient: str = "p", **more: Any) -> Annotated:
    """Annotate a slide with objects of class 0."""
    boxes = np.array(xyxy, np.float64).reshape(-1, 4)
    columns = {"label": np.zeros(len(boxes), np.int64), "attributes": np.empty((len(boxes), 0))} | more
    return Annotated(slide, boxes, ignored_xyxy_l0=columns.pop("ignored_xyxy_l0", NOTHING), patient=patient, **columns)


@given(patients=st.lists(st.sampled_from("abcdefg"), min_size=2), share=st.floats(0.01, 0.99), seed=st.integers(0, 99))
def test_splits_part_no_patient(patients: list[str], share: float, seed: int) -> None:
    """Both sides have a patient, none is in both, nothing is lost, and the order does not matter."""
    members = [one(BLANK, [], patient) for patient in patients]
    if len(set(patients)) == 1:
        with pytest.raises(ConfigError, match="two patients"):
            split(members, share, seed)
        return
    rest, held = split(members, share, seed)
    assert rest
    assert held
    assert len(rest) + len(held) == len(members)
    refuse_leaks(rest=rest, held=held)
    again = split(members[::-1], share, seed)[1]
    assert {m.patient for m in again} == {m.patient for m in held}


def test_the_whole_of_slides_has_the_validation_patients() -> None:
    """Their slide is seen in its training windows and not in the others'; test stays out of both."""
    splits = {
        name: [one(memory_slide(np.full((300, 300, 3), colour, np.uint8), 0.25), [(100, 100, 150, 150)], name)]
        for name, colour in zip(("train", "validation", "test"), COLOURS, strict=False)
    }
    source = OwnSource(splits, VariantSettings(steps=1), kinds={})
    rng = np.random.default_rng(0)
    for whole, names in ((source, {0}), (source.whole(), {0, 1})):
        centres = [whole.example(rng, 128).image[64, 64].astype(int) for _ in range(60)]
        assert {int(np.abs(COLOURS.astype(int) - centre).sum(1).argmin()) for centre in centres} == names


def test_halves_of_slides_train_on_what_the_other_shows() -> None:
    """Test stays out of both; where one patient has all objects, there are none."""
    names = ("train", "left", "right", "test")
    slides = {
        name: one(memory_slide(np.full((300, 300, 3), colour, np.uint8), 0.25), [(100, 100, 150, 150)], name)
        for name, colour in zip(names, COLOURS, strict=False)
    }
    splits = {"train": [slides["train"]], "validation": [slides["left"], slides["right"]], "test": [slides["test"]]}
    source = OwnSource(splits, VariantSettings(steps=1), kinds={"validation": "slides"})
    rng, shown = np.random.default_rng(0), set[str]()
    for half in source.halves():
        (held,) = (part.annotated.patient for part in half.shown("validation"))
        centres = [half.example(rng, 128).image[64, 64].astype(int) for _ in range(60)]
        seen = {names[int(np.abs(COLOURS[:4].astype(int) - centre).sum(1).argmin())] for centre in centres}
        assert seen == {"train", "left", "right"} - {held}
        shown.add(held)
    assert shown == {"left", "right"}
    alone = {**splits, "validation": [slides["left"], one(BLANK, [], "right")]}
    assert not OwnSource(alone, VariantSettings(steps=1), kinds={}).halves()


def test_leaks_are_refused() -> None:
    """The message says how many patients leak, and between which splits."""
    a, b, c = ([one(BLANK, [], patient) for patient in names] for names in ("xyz", "w", "zy"))
    refuse_leaks(train=a, validation=b, test=[])
    with pytest.raises(ConfigError, match=r"train and test: .*found 2, the first 'y'"):
        refuse_leaks(train=a, validation=b, test=c)
    with pytest.raises(ConfigError, match="share"):
        split(a, 1.0, 0)


def test_background_is_drawn_where_it_counts() -> None:
    """Of a slide of which a corner was annotated, not the rest, where nothing is right or wrong."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(60, 200, (4200, 4200, 3), np.uint8)  # 4.4 mm² of tissue
    rest = [(400, 0, 4200, 4200), (0, 400, 400, 4200)]
    slide = one(memory_slide(pixels, 0.5), [(100, 100, 120, 120)], ignored_xyxy_l0=np.array(rest, np.float64))
    windows = Windows([slide], 0.5)
    shares = []
    for i in range(40):
        ignored = windows.window(np.random.default_rng(i), 64).ignored_xyxy_px
        shares.append(float(((ignored[:, 2:] - ignored[:, :2]).prod(1)).sum()) / 64**2)
    assert np.mean(shares) < 0.3


def painted(seed: int, size_wh: tuple[int, int], holes: tuple[Box, ...] = ()) -> Annotated:
    """Squares of 16 px, each of its own colour, which its attribute names, on grey; the last one is ignored."""
    rng = np.random.default_rng(seed)
    pixels = np.full((size_wh[1], size_wh[0], 3), GREY, np.uint8)
    cells = [(x, y) for x in range(0, size_wh[0] - 39, 40) for y in range(0, size_wh[1] - 39, 40)]
    boxes = []
    for k, i in enumerate(rng.permutation(len(cells))[: len(COLOURS)]):
        x, y = np.array(cells[i]) + rng.integers(0, 24, 2)
        pixels[y : y + 16, x : x + 16] = COLOURS[k]
        boxes.append([x, y, x + 16, y + 16])
    rows = np.array(boxes, np.float64)
    n = len(rows) - 1
    slide = memory_slide(pixels, 0.25, holes=holes)
    return Annotated(slide, rows[:n], np.arange(n) % 2, np.arange(n)[:, None] / 10, rows[n:], "p")


def assert_seen_where_said(example: Example, size: int) -> None:
    """Each box has its colour in the middle, and there is no colour outside boxes and ignored regions."""
    image = example.image.astype(int)
    assert image.shape == (size, size, 3)
    assert example.image.dtype == np.uint8
    assert len(example.xyxy_px) == len(example.label) == len(example.attributes)
    for boxes in (example.xyxy_px, example.ignored_xyxy_px):
        assert boxes.shape == (len(boxes), 4)
        assert ((boxes >= 0) & (boxes <= size)).all()
        assert (boxes[:, 2:] > boxes[:, :2]).all()
    for (x0, y0, x1, y1), label, attribute in zip(
        example.xyxy_px, example.label, example.attributes[:, 0], strict=True
    ):
        k = round(attribute * 10)
        assert label == k % 2
        assert np.abs(image[int((y0 + y1) / 2), int((x0 + x1) / 2)] - COLOURS[k]).max() < 50
    coloured = image.max(2) - image.min(2) > 50
    for x0, y0, x1, y1 in np.concatenate((example.xyxy_px, example.ignored_xyxy_px)):
        coloured[max(0, int(y0) - 1) : int(np.ceil(y1)) + 1, max(0, int(x0) - 1) : int(np.ceil(x1)) + 1] = False
    assert not coloured.any()


SIZES = st.sampled_from([64, 97, 160])
SLIDES = st.sampled_from([(300, 240), (130, 400), (120, 120)])


@settings(max_examples=60)
@given(
    seed=st.integers(0, 999), size=SIZES, size_wh=SLIDES, mpp=st.sampled_from([0.2, 0.25, 0.4]), joined=st.booleans()
)
def test_objects_are_where_the_window_shows_them(
    seed: int, size: int, size_wh: tuple[int, int], mpp: float, joined: bool
) -> None:
    """Scaled, cut, mirrored, turned and joined, boxes stay on their squares, and no square is background."""
    windows = Windows([painted(seed, size_wh), painted(seed + 1, size_wh)], mpp)
    rng = np.random.default_rng(seed)
    for _ in range(4):
        assert_seen_where_said(windows.mosaic(rng, size) if joined else windows.window(rng, size), size)


def test_what_cannot_be_decoded_is_ignored() -> None:
    """A hole is white: an object in it is none, and the place counts neither way."""
    shown = painted(3, (300, 240))
    hole = Box(*shown.xyxy_l0[0].tolist()).grow(4)
    windows = Windows([painted(3, (300, 240), (hole,))], 0.25)
    rng = np.random.default_rng(0)
    for _ in range(40):
        example = windows.window(rng, 96)
        assert_seen_where_said(example, 96)
        assert 0.0 not in example.attributes
        white = (example.image == 255).all(2)
        for x0, y0, x1, y1 in example.ignored_xyxy_px:
            white[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = False
        assert white.mean() < 0.01


def test_objects_are_anywhere_in_half_of_the_windows() -> None:
    """Whole boxes are spread evenly over the window, in both directions; the other windows are of the rest."""
    slide = memory_slide(np.full((3000, 3000, 3), GREY, np.uint8), 0.25)
    windows = Windows([one(slide, [1490, 1490, 1510, 1510])], 0.25)
    rng = np.random.default_rng(1)
    examples = [windows.window(rng, 128) for _ in range(800)]
    holds = sum(len(example.xyxy_px) + len(example.ignored_xyxy_px) > 0 for example in examples)
    assert 340 < holds < 460
    boxes = np.concatenate([example.xyxy_px for example in examples])
    whole = boxes[((boxes > 0.5) & (boxes < 127.5)).all(1)]
    centres = (whole[:, :2] + whole[:, 2:]) / 2
    for axis in centres.T:
        counts = np.histogram(axis, 4, (12, 116))[0] / len(axis)
        assert (np.abs(counts - 0.25) < 0.08).all()


def test_classes_are_equally_likely() -> None:
    """One object of a rare class is drawn as often as all of a common one."""
    slide = memory_slide(np.full((400, 4000, 3), GREY, np.uint8), 0.25)
    boxes = np.array([[x, 200, x + 10, 210] for x in range(100, 4000, 200)], np.float64)
    windows = Windows([one(slide, boxes, label=(np.arange(len(boxes)) > 0).astype(np.int64))], 0.25)
    rng = np.random.default_rng(0)
    labels = np.concatenate([windows.window(rng, 64).label for _ in range(300)])
    assert 0.35 < (labels == 0).mean() < 0.6


def test_background_is_tissue() -> None:
    """On a slide, windows without an object lie where the tissue is; a slide without tissue is not drawn from."""
    pixels = np.full((1600, 2000, 3), 243, np.uint8)
    empty = memory_slide(pixels.copy(), 2.0)
    noise = np.random.default_rng(0).integers(-15, 15, (1200, 700, 1))
    pixels[200:1400, 200:900] = np.array([190, 110, 170]) + noise
    slide = memory_slide(pixels, 2.0)
    windows = Windows([one(empty, []), one(slide, [400, 400, 408, 408])], 2.0)
    rng = np.random.default_rng(0)
    stained = [(windows.window(rng, 48).image[..., 1] < 180).mean() for _ in range(100)]
    assert np.mean(np.array(stained) > 0.2) > 0.85


def test_a_window_is_a_function_of_its_generator() -> None:
    """The same state gives the same example, whatever was drawn before."""
    windows = Windows([painted(0, (300, 240))], 0.25, seed=3)
    first, _, again = (windows.mosaic(np.random.default_rng(seed), 96) for seed in (1, 2, 1))
    np.testing.assert_array_equal(first.image, again.image)
    np.testing.assert_array_equal(first.xyxy_px, again.xyxy_px)


def test_only_a_few_slides_stay_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many slides there are, handles of those read last are kept and the others closed."""
    monkeypatch.setattr("slidescan.train.windows._OPEN", 2)
    members = [painted(seed, (120, 120)) for seed in range(6)]
    windows = Windows(members, 0.25)
    for member in members:
        member.slide.close()  # as the loaders leave them
    rng = np.random.default_rng(0)
    for _ in range(30):
        windows.window(rng, 64)
        assert sum(member.slide._source is not None for member in members) <= 2


def test_nothing_annotated_is_refused() -> None:
    """Windows need an object."""
    for members in ([], [one(BLANK, [])]):
        with pytest.raises(ConfigError, match="at least one annotated object"):
            Windows(members, 0.25)
