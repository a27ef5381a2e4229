"""Pictures drawn of a training: curves, the worst mistakes, losses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image as Picture

from slidescan.detections import Detections
from slidescan.train.metrics import Image
from slidescan.train.report import draw_curves, draw_losses, draw_worst
from tests.scored import RADIUS_PX, SIZE_PX, boxes_at, patients, row

BLUE = (0, 114, 178)  # of the first line of a chart
LOSSES = "step,minutes,lr,loss,class,l1\n10,0.1,1e-4,3.0,2.0,1.0\n20,0.2,2e-4,2.0,1.5,0.5\n30,0.3,1e-4,1.0,0.7,0\n"


def cut_from(sample: NDArray[np.uint8]) -> Callable[[float, float, int], NDArray[np.uint8]]:
    """What cuts a square around a point, the edge of the sample repeated."""

    def cut(x: float, y: float, edge: int) -> NDArray[np.uint8]:
        rows, columns = (np.clip(round(at - edge / 2) + np.arange(edge), 0, len(sample) - 1) for at in (y, x))
        return sample[rows[:, None], columns]

    return cut


def pixels(path: Path) -> NDArray[np.uint8]:
    """The RGB pixels of a picture, which says nothing besides them."""
    with Picture.open(path) as picture:
        assert set(picture.info) <= {"dpi"}
        return np.asarray(picture.convert("RGB"))


def count_of(picture: NDArray[np.uint8], colour: tuple[int, int, int]) -> int:
    return int((np.abs(picture.astype(int) - colour).max(-1) <= 2).sum())


def test_curves_are_drawn(tmp_path: Path) -> None:
    """Three charts of 800 px with a line; images without figures have no recall and so no line in two of them."""
    images = patients([0.1, 0.5, 0.9])
    bare = [replace(image, truth=np.empty((0, 2))) for image in images]
    for kinds, folder in (({"mosaic": images, "bare": bare}, "both"), ({"bare": bare}, "bare"), ({}, "none")):
        (tmp_path / folder).mkdir()
        draw_curves(kinds, 0.5, tmp_path / folder)
        for name in ("pr", "froc", "reliability"):
            picture = pixels(tmp_path / folder / f"{name}.png")
            assert picture.shape == (600, 800, 3)
            drawn = folder == "both" or (folder == "bare" and name == "reliability")
            bluish = picture[..., 2].astype(int) - picture[..., 0] > 60  # of discs that let the grid through, too
            assert (bluish.sum() > 100) == drawn


def test_the_operating_point_is_where_it_should_be(tmp_path: Path) -> None:
    """Higher precision moves the disc up: the blue pixels' middle follows."""
    heights = []
    for name, n_false in (("good", 2), ("poor", 30)):
        score = np.concatenate((np.full(10, 0.75), np.full(n_false, 0.75)))
        (tmp_path / name).mkdir()
        draw_curves({"field": [row(score, np.arange(len(score)) < 10)]}, 0.5, tmp_path / name)
        picture = pixels(tmp_path / name / "pr.png")[:, 600:]  # recall 1, right of the legend
        blue = np.abs(picture.astype(int) - BLUE).max(-1) <= 2
        heights.append(float(np.flatnonzero(blue.any(1)).mean()))
    assert heights[0] < 200
    assert heights[1] > 350


def test_pictures_do_not_depend_on_names(tmp_path: Path) -> None:
    """Neither patients nor scanners nor file names are in them: without, they are the same byte for byte."""
    images = patients([0.1, 0.5, 0.9])
    samples = [np.full((image.size, image.size, 3), 200, np.uint8) for image in images]
    for folder, some in (("a", images), ("other", [replace(i, patient="", scanner="x") for i in images])):
        (tmp_path / folder).mkdir()
        draw_curves({"field": some}, 0.5, tmp_path / folder)
        draw_worst([cut_from(sample) for sample in samples], some, 0.5, tmp_path / folder / "worst.png")
        (tmp_path / folder / f"{folder}.csv").write_text(LOSSES)
        draw_losses(tmp_path / folder / f"{folder}.csv", tmp_path / folder / "loss.png")
    for name in ("pr", "froc", "reliability", "worst", "loss"):
        a, other = (tmp_path / folder / f"{name}.png" for folder in ("a", "other"))
        assert a.read_bytes() == other.read_bytes()


def test_the_worst_mistake_comes_first(tmp_path: Path) -> None:
    """Patches are where the page has them, in order, with the mistake in the middle and the edge repeated."""
    truth = np.array([[20.0, 60.0], [60.0, 60.0]])
    found = boxes_at(np.array([[2.0, 20.0], [60.0, 20.0], [60.0, 60.0]]), np.array([0.75, 0.875, 0.25]))
    sample = np.full((SIZE_PX, SIZE_PX, 3), 255, np.uint8)
    colours = {(2, 20): (200, 0, 0), (60, 20): (0, 200, 0), (20, 60): (0, 0, 200), (60, 60): (200, 0, 200)}
    for (x, y), colour in colours.items():
        sample[max(0, y - 5) : y + 5, max(0, x - 5) : x + 5] = colour
    empty = Image(Detections.empty(), np.empty((0, 2)), RADIUS_PX, SIZE_PX)
    image = Image(found, truth, RADIUS_PX, SIZE_PX, mpp=0.5)
    path = tmp_path / "worst.png"
    draw_worst([cut_from(sample * 0), cut_from(sample)], [empty, image], 0.5, path, window_um=10.0)
    page = pixels(path)
    assert page.shape == (387, 800, 3)
    # Two rows of patches of 126 px, 132 px apart, from 40 px and 230 px down.
    first, second, lost_first, lost_second = (page[y : y + 126, x : x + 126] for y in (40, 230) for x in (7, 139))
    for patch, colour in ((first, (0, 200, 0)), (second, (200, 0, 0)), (lost_first, (0, 0, 200))):
        assert tuple(patch[63, 63]) == colour
        assert tuple(patch[3, 63]) == (255, 255, 255)
        assert 0.1 < count_of(patch, colour) / 126**2 < 0.3  # a quarter less what the scaling blurs
    assert tuple(lost_second[63, 63]) == (200, 0, 200)
    assert tuple(second[63, 2]) == (200, 0, 0)  # beyond the left border
    assert tuple(first[63, 2]) == (255, 255, 255)

    draw_worst([cut_from(sample * 0), cut_from(sample)], [empty, image], 0.5, path, window_um=10.0, most=1)
    assert count_of(pixels(path), (200, 0, 0)) == 0


def test_a_page_without_mistakes_says_none(tmp_path: Path) -> None:
    """Two headings, and a word where the patches would be."""
    image = Image(Detections.empty(), np.empty((0, 2)), RADIUS_PX, SIZE_PX)
    draw_worst([cut_from(np.zeros((SIZE_PX, SIZE_PX, 3), np.uint8))], [image], 0.5, tmp_path / "worst.png")
    page = pixels(tmp_path / "worst.png")
    for top in (40, 230):
        word = page[top : top + 150] < 128
        assert 20 < word.any(-1).sum() < 1000
        assert word.any((0, 2))[370:430].any()


def test_losses_are_drawn_from_what_is_whole(tmp_path: Path) -> None:
    """Rows repeated by a resumed run and a row half written change nothing; without rows the picture says so."""
    head, *rows = LOSSES.splitlines()
    (tmp_path / "whole.csv").write_text(LOSSES)
    (tmp_path / "torn.csv").write_text("\n".join([head, "10,0.1,1e-4,9,9,9", *rows, "40,0.4,1e-"]))
    (tmp_path / "empty.csv").write_text(head + "\n")
    for name in ("whole", "torn", "empty"):
        draw_losses(tmp_path / f"{name}.csv", tmp_path / f"{name}.png")
    whole, torn, empty = (pixels(tmp_path / f"{name}.png") for name in ("whole", "torn", "empty"))
    np.testing.assert_array_equal(whole, torn)
    assert whole.shape == empty.shape == (600, 800, 3)
    assert count_of(whole, BLUE) > 100
    assert count_of(empty, BLUE) == 0


def test_many_steps_are_averaged(tmp_path: Path) -> None:
    """A loss that jumps up and down at every step is drawn as a smooth line."""
    lines = [f"{i},{i / 100},1e-4,{1 + 9 * (i % 2)},1,100" for i in range(6000)]
    (tmp_path / "long.csv").write_text("\n".join(["step,minutes,lr,loss,class,l1", *lines]))
    draw_losses(tmp_path / "long.csv", tmp_path / "long.png")
    dark = pixels(tmp_path / "long.png")[60:540, 120:560].max(-1) < 80  # inside the axes, left of the legend
    assert 0 < dark.sum(0).max() < 10
