"""Training windows around decided places: what nobody decided on is never background."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

import slidescan as ss
from slidescan.errors import ConfigError
from slidescan.slides import Slide, memory_slide
from slidescan.testing import TISSUE_GROUND
from slidescan.train.annotated import Annotated
from slidescan.train.loop import train
from slidescan.train.run import _network
from slidescan.train.settings import TrainSettings, VariantSettings
from slidescan.train.source import Batches
from slidescan.train.windows import Example, Windows
from tests.decided.saying import NOTHING, SETTINGS, decide, load
from tests.discs import MPP, ORACLE, config
from tests.reviewed import APART

INKS = np.array(
    [(200, 20, 20), (20, 160, 20), (20, 20, 220), (150, 110, 0), (0, 120, 140), (140, 0, 140), (0, 0, 0),
     (190, 130, 30), (30, 130, 190), (130, 190, 30)]
)  # fmt: skip  # the last three score below the threshold
FAINT = 3


@pytest.fixture(scope="module")
def painted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Slide, Path, np.ndarray]:
    """A slide of discs, each of its own ink, its result, and the centres by ink."""
    rng = np.random.default_rng(3)
    pixels = np.full((300, 400, 3), TISSUE_GROUND, np.uint8)
    cells = rng.permutation([(x, y) for x in range(30, 400, 60) for y in range(30, 300, 60)])[: len(INKS)]
    y, x = np.mgrid[:300, :400]
    for ink, (at_x, at_y) in zip(INKS, cells, strict=True):
        pixels[np.hypot(x - at_x, y - at_y) <= 10] = ink
    slide = memory_slide(pixels, MPP)
    path = tmp_path_factory.mktemp("painted") / "case"
    settings_ = config(flagged__link_um=32.0, flagged__margin_um=2.0, detect__threshold=0.6)
    found = ss.scan(slide, ORACLE, out=path, config=settings_)
    assert len(found.found) == len(INKS) - FAINT < len(found.detections)
    assert {1, 2} <= {region.n for region in found.regions} or len(found.regions) < len(INKS) - FAINT
    return slide, path, cells


def seen_as_background(example: Example) -> set[int]:
    """Inks of the discs that a window shows outside boxes and ignored places."""
    image, seen = example.image.astype(int), set()
    covered = np.zeros(image.shape[:2], np.bool_)
    for x0, y0, x1, y1 in np.concatenate((example.xyxy_px, example.ignored_xyxy_px)):
        covered[max(0, int(y0) - 2) : int(np.ceil(y1)) + 2, max(0, int(x0) - 2) : int(np.ceil(x1)) + 2] = True
    for k, ink in enumerate(INKS):
        alike = ndimage.minimum_filter(np.abs(image - ink).max(2) < 30, 3)  # an edge is a blend of two colours
        if (alike & ~covered).any():
            seen.add(k)
    return seen


ACTS = st.lists(
    st.tuples(
        st.sampled_from("ab"),
        st.sampled_from(["regions", "detections"]),
        st.integers(0, 9),
        st.sampled_from(["accept", "reject", "unsure"]),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40)
@given(acts=ACTS, seed=st.integers(0, 999))
def test_what_nobody_decided_on_is_never_background(
    painted: tuple[Slide, Path, np.ndarray], acts: list[tuple[str, str, int, str]], seed: int
) -> None:
    """Whatever was decided: only rejected discs are shown as background, and objects are accepted discs' pixels."""
    slide, path, cells = painted
    (path / "decisions.jsonl").unlink(missing_ok=True)
    result = ss.load_result(path, verify=False)
    said: dict[int, set[str]] = {}
    for who, of, number, verdict in acts:
        looked = ss.review(result, reviewer=who, of=of)
        item = looked.items()[number % len(looked)]
        made = looked.decide(item.id, verdict)
        for box in made.parts_l0 or (made.box_l0,):
            middle = np.array([box.x0 + box.x1, box.y0 + box.y1]) / 2
            said.setdefault(int(np.hypot(*(cells - middle).T).argmin()), set()).add(verdict)
    try:
        one, _ = load(path, slide)
    except ConfigError:
        return
    windows, rng = Windows([one], MPP), np.random.default_rng(seed)
    for size in (64, 97, 160):
        example = windows.window(rng, size)
        background = seen_as_background(example)
        assert all("reject" in said.get(k, ()) for k in background)
        for x0, y0, x1, y1 in example.xyxy_px:
            middle = example.image[int((y0 + y1) / 2), int((x0 + x1) / 2)].astype(int)
            assert "accept" in said.get(int(np.abs(INKS - middle).max(1).argmin()), ())


def test_windows_are_drawn_around_decided_places_only() -> None:
    """Each class and the rejected as often, each anywhere in the window; nothing is shown of the rest of the slide."""
    pixels = np.full((3000, 3000, 3), TISSUE_GROUND, np.uint8)
    slide = memory_slide(pixels, 0.25)
    at = np.array([[500, 500, 520, 520], [2500, 500, 2520, 520], [2400, 2400, 2420, 2420]], np.float64)
    rejected = np.concatenate((at[2:], at[2:] + 60))
    one = Annotated(slide, at[:2], np.array([0, 1]), np.empty((2, 0)), NOTHING, "p", "", rejected, whole=False)
    windows, rng = Windows([one], 0.25), np.random.default_rng(0)
    counts = {0: 0, 1: 0, None: 0}
    for _ in range(600):
        example = windows.window(rng, 128)
        counts[int(example.label[0]) if len(example.label) else None] += 1
    assert min(counts.values()) > 150  # of 200, less the objects that are cut
    for k, (x, y) in enumerate(at[:, :2].astype(int).tolist()):
        pixels[y : y + 20, x : x + 20] = INKS[k]
    marked = replace(
        one, slide=memory_slide(pixels, 0.25), rejected_xyxy_l0=at[2:], xyxy_l0=NOTHING, label=np.empty(0, int)
    )
    marked = replace(marked, attributes=np.empty((0, 0)))
    windows, centres_ = Windows([marked], 0.25), []
    for _ in range(400):
        shown = np.argwhere(np.abs(windows.window(rng, 128).image.astype(int) - INKS[2]).max(2) < 30)
        assert len(shown)
        centres_.append(shown.mean(0))
    for axis in np.array(centres_).T:
        assert (np.abs(np.histogram(axis, 4, (0, 128))[0] / len(axis) - 0.25) < 0.09).all()


def test_a_share_of_the_images_is_of_decided_slides() -> None:
    """Beside what is mined, whatever the source; none without decisions."""
    dark = memory_slide(np.zeros((300, 300, 3), np.uint8), 0.25)
    box = np.array([[140.0, 140, 160, 160]])
    one = Annotated(dark, NOTHING, np.empty(0, np.int64), np.empty((0, 0)), NOTHING, "p", "", box, whole=False)
    variant = VariantSettings(tile_px=[32], steps=1)

    class White:
        def example(self, rng: np.random.Generator, size: int) -> Example:
            image = np.full((size, size, 3), 255, np.uint8)
            return Example(image, NOTHING, np.empty(0, np.int64), np.empty((0, 0)), NOTHING)

    mined = [np.full((32, 32, 3), 128, np.uint8)]
    settings_ = TrainSettings(batch_mpx=0.5, stain_jitter=0.0, share_decided=0.3, share_mined=0.2)
    for decided, shares in ((Windows([one], 0.25), (0.3, 0.2)), (None, (0.0, 0.2))):
        images, _ = Batches(White(), settings_, variant, mined, decided)(np.random.default_rng(0))  # type: ignore[arg-type]
        means = images.mean((1, 2, 3))
        counted = (means < 70).mean(), ((means >= 70) & (means < 190)).mean()
        assert counted == pytest.approx(shares, abs=0.07)


def dotted(ink: tuple[int, int, int], seed: int) -> tuple[Slide, np.ndarray]:
    """Return a slide of 36 discs of one ink, and their boxes."""
    rng = np.random.default_rng(seed)
    pixels = np.clip(np.array(TISSUE_GROUND) + rng.normal(0, 4, (600, 600, 3)), 0, 255).astype(np.uint8)
    y, x = np.mgrid[:600, :600]
    at = np.mgrid[50:600:100, 50:600:100].reshape(2, -1).T + rng.integers(-20, 21, (36, 2))
    for at_x, at_y in at:
        pixels[np.hypot(x - at_x, y - at_y) <= 12] = ink
    return memory_slide(pixels, MPP), np.concatenate((at - 13, at + 13), 1).astype(np.float64)


def test_what_was_rejected_is_unlearned(tmp_path: Path) -> None:
    """A network that learned violet discs takes brown ones for some, unless reviewers rejected brown ones."""
    (violet, xyxy), (brown, _) = dotted((60, 30, 90), 0), dotted((110, 60, 20), 1)
    path = Path(ss.scan(brown, ORACLE, out=tmp_path / "case", config=APART).path or "")
    decide(path, *["reject"] * 36)
    one, decided = load(path, brown)
    assert decided.rejected == 36
    annotated = Annotated(violet, xyxy, np.zeros(36, np.int64), np.empty((36, 0)), NOTHING, "p")
    known = Windows([annotated], MPP)

    class Violet:
        def example(self, rng: np.random.Generator, size: int) -> Example:
            return known.window(rng, size)

    small = {"batch_mpx": 0.03, "width": 0.25, "warmup_steps": 5, "ema": 0.9, "device": "cpu", "object_um": 13.0}
    settings_ = SETTINGS.model_copy(update={**small, "share_decided": 0.5, "stain_jitter": 0.0})
    variant = VariantSettings(mpp=MPP, input_px=128, tile_px=[128], steps=80, lr=5e-3)
    scores = []
    for around in (None, Windows([one], MPP)):
        batches = Batches(Violet(), settings_, variant, decided=around)  # type: ignore[arg-type]
        checkpoint = tmp_path / f"{around is None}.safetensors"
        network = train(_network(settings_, variant, None), batches, settings_, variant, checkpoint=checkpoint, log=str)
        for slide in (violet, brown):
            rgb = slide.read(0, 0, 384, 384, slide.frame).rgb
            with torch.no_grad():
                found = network(torch.from_numpy(rgb / np.float32(255)).permute(2, 0, 1)[None])
            scores.append(float(found.logits.sigmoid().max()))
    violet_before, brown_before, violet_after, brown_after = scores
    assert min(violet_before, brown_before, violet_after) > 0.5
    assert brown_after < 0.2
