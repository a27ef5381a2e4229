"""The overview picture: what is written on it fits, and the map's part of it can be cut out."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import ImageDraw

import slidescan as ss
from slidescan.anomaly import AnomalyMap, Coverage
from slidescan.detections import Detections
from slidescan.geometry import Box, Frame
from slidescan.legend import MARK
from slidescan.overview import draw_overview, heat_panel
from slidescan.slides import memory_slide
from tests.archives import write_slide
from tests.discs import ORACLE, config


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("overview")
    write_slide(folder / "a.tiff", 1)
    ss.scan(folder / "a.tiff", ORACLE, out=folder / "a", config=config())
    return folder / "a"


def test_the_right_panel(tmp_path: Path, scanned: Path) -> None:
    """What is cut out of a saved overview is the panel that was drawn, for wide slides and narrow ones."""
    result = ss.load_result(scanned)
    for width, height in ((900, 700), (400, 1600), (256, 31)):
        thumbnail = np.full((height, width, 3), 200, np.uint8)
        picture = draw_overview(thumbnail, result, "case")
        panel = heat_panel(picture, (100 * width, 100 * height))
        scale = 1100 / max(width, height)
        assert panel.size == (round(width * scale), round(height * scale))
        # Neither margin nor frame: white and the frame's grey surround it.
        inner = np.asarray(panel)
        assert not (inner == 255).all(-1).any(0).all()
        assert not (inner == 255).all(-1).any(1).all()
    with pytest.raises(ValueError, match="expected an overview"):
        heat_panel(picture, (900, 900))


@pytest.mark.parametrize("size_wh", [(900, 700), (300, 1600)])
def test_numbers_stay_on_the_slide_and_off_each_other(
    scanned: Path, monkeypatch: pytest.MonkeyPatch, size_wh: tuple[int, int]
) -> None:
    """Of one half covered by another nobody could tell which it is; the best come first."""
    result, rooms = ss.load_result(scanned), list[Box]()
    rng = np.random.default_rng(0)
    xy = rng.uniform(0, np.array(size_wh) * 99, (60, 2))
    found = Detections.build(np.concatenate((xy, xy + 50), 1), rng.uniform(0.6, 1, 60))
    frame = Frame((100 * size_wh[0], 100 * size_wh[1]), 0.5)
    plane = frame.at(32.0)
    seen, nothing = np.ones(plane.size_wh[::-1], np.uint8), np.zeros(plane.size_wh[::-1], np.float32)
    anomaly = AnomalyMap(plane, nothing, nothing, seen * Coverage.ANALYSED)
    result = replace(result, detections=found, frame=frame, anomaly=anomaly)
    whole = ImageDraw.ImageDraw.rounded_rectangle

    def note(draw: ImageDraw.ImageDraw, xy: Any, radius: float = 0, fill: Any = None, **more: Any) -> None:
        if fill == MARK:
            rooms.append(Box(*xy))
        whole(draw, xy, radius, fill=fill, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "rounded_rectangle", note)
    draw_overview(np.full((size_wh[1], size_wh[0], 3), 200, np.uint8), result, "case")
    assert 10 < len(rooms) <= 20
    assert not any(one.intersects(other) for one, other in combinations(rooms, 2))
    scale = 1100 / max(size_wh)
    panel = Box(28, 92, 28 + size_wh[0] * scale + 1, 92 + size_wh[1] * scale + 1)
    assert all(room.clip(panel) == room for room in rooms)


def test_a_long_title_stays_in_its_column(scanned: Path) -> None:
    """What is written beside it can be read, on a narrow slide, too."""
    result, thumbnail = ss.load_result(scanned), np.full((400, 300, 3), 200, np.uint8)
    long, short = (
        np.asarray(draw_overview(thumbnail, result, title)) for title in ("TCGA-A2-A0D0-01Z-00-DX1." * 5, "a")
    )
    middle = long.shape[1] // 2
    np.testing.assert_array_equal(long[:, middle:], short[:, middle:])
    assert (long[:50, :middle] != short[:50, :middle]).any()


def test_a_long_name_of_a_detector_leaves_room_for_what_it_is_for(scanned: Path) -> None:
    """The end of its line, that this is for research only, is on the page as with a short name."""
    result, thumbnail = ss.load_result(scanned), np.full((400, 300, 3), 200, np.uint8)
    pages = []
    for name in (
        "my-rt-detr-r50vd-finetuned-glomeruli-2026-run-17" * 2,
        "my-rt-detr-r50vd-finetuned-glomeruli-2026",
    ):
        detector = {**result.provenance["detector"], "name": name}
        same = replace(result, provenance={**result.provenance, "detector": detector})
        pages.append(np.asarray(draw_overview(thumbnail, same, "a")))
    line = slice(54, 80)
    for page in pages:
        assert (page[line, -28:] == 255).all()  # the margin
    assert (pages[0][line, -300:-200] != 255).any()


def test_the_map_of_a_large_slide_takes_little_memory(scanned: Path) -> None:
    """75 × 25 mm at 4 µm: no colours are made that the page has no px for, and what could not be read shows."""
    result, shape = ss.load_result(scanned), (6250, 18_750)
    coverage = np.full(shape, Coverage.ANALYSED, np.uint8)
    coverage[3000:3030, 9000:9030] = Coverage.READ_FAILED
    frame = Frame((300_000, 100_000), 0.25)
    density = np.zeros(shape, np.float32)
    large = replace(result, frame=frame, anomaly=AnomalyMap(frame.at(4.0), density, density, coverage))
    tracemalloc.start()
    page = np.asarray(draw_overview(np.full((1365, 4096, 3), 200, np.uint8), large, "a"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 0.5e9
    right = page[:, page.shape[1] // 2 :]
    assert (np.abs(right.astype(int) - 110).max(-1) < 30).sum() >= 2


def test_a_title_that_cannot_be_drawn(scanned: Path) -> None:
    """Lines, and letters of another system."""
    result, thumbnail = ss.load_result(scanned), np.full((400, 300, 3), 200, np.uint8)
    odd, same = (np.asarray(draw_overview(thumbnail, result, title)) for title in ("a\nb\udcfc", "a?b?"))
    np.testing.assert_array_equal(odd, same)


@pytest.mark.parametrize("side_px", [64, 128, 512])
def test_a_slide_that_ends_with_its_map_by_a_rounding_error(side_px: int) -> None:
    """Its sides are a whole number of the map's px and a millionth more."""
    slide = memory_slide(np.full((side_px, side_px, 3), 230, np.uint8), 0.25000003)
    result = ss.scan(slide, ORACLE, config=config(tissue__enabled=False))
    assert draw_overview(np.full((64, 64, 3), 200, np.uint8), result, "case").width > 1000
