"""The contact sheet of flagged regions: which, where, and of which slide."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from matplotlib.patches import Polygon

import slidescan as ss
from slidescan.contact_sheet import View, contact_sheet, corners
from slidescan.errors import ConfigError
from slidescan.geometry import Box, Frame
from slidescan.slides import Slide, memory_slide
from tests.discs import MPP, ORACLE, config, discs
from tests.reviewed import APART


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=30, size_wh=(1600, 1200))[0]


@pytest.fixture(scope="module")
def result(slide: Slide) -> ss.ScanResult:
    return ss.scan(slide, ORACLE, config=APART)


def test_it_shows_the_regions_in_order(result: ss.ScanResult, slide: Slide, tmp_path: Path) -> None:
    """Rank, highest score and class above each; its outline around what is dark; no display needed."""
    flagged = result.flagged(5)
    assert flagged == result.regions[:5]
    figure = flagged.plot(slide, columns=3, fov_um=64.0, px=128)
    assert [axes.get_title() for axes in figure.axes] == [f"{r.rank} · {r.peak:.2f} · {r.label}" for r in flagged]
    assert [text.get_text() for text in figure.axes[0].texts] == ["20 µm"]
    for axes, region in zip(figure.axes, flagged, strict=True):
        (outline,) = (patch for patch in axes.patches if isinstance(patch, Polygon))
        around = outline.get_xy()[:-1]
        np.testing.assert_allclose(np.ptp(around, axis=0), np.ptp(region.polygon_l0, axis=0) * MPP)
        pixels = np.asarray(axes.images[0].get_array())
        dark_um = np.argwhere(pixels.mean(2) < 128)[:, ::-1] / 2  # 128 px are 64 µm
        inside = dark_um[((dark_um >= around.min(0)) & (dark_um <= around.max(0))).all(1)]
        assert len(inside) > 20
        np.testing.assert_allclose(inside.mean(0), [32, 32], atol=1.5)  # a disc, in the middle of its outline
    figure.savefig(tmp_path / "sheet.png")
    assert (tmp_path / "sheet.png").stat().st_size > 5000


def test_of_a_region_larger_than_the_field_its_best_detection_is_seen(slide: Slide) -> None:
    """Not glass or other tissue in the middle of its box; the detection has an outline of its own."""
    result = ss.scan(slide, ORACLE, config=config(flagged__link_um=400.0))
    region = result.regions[0]
    assert min(region.box_l0.width, region.box_l0.height) * MPP > 64
    box = region.peak_box_l0
    best = result.found.score == region.peak
    assert (box.x0, box.y0, box.x1, box.y1) in [tuple(row) for row in result.found.xyxy[best].tolist()]
    (axes,) = result.flagged(1).plot(slide, fov_um=64.0, px=128).axes
    whole, around = (patch.get_xy()[:-1] for patch in axes.patches if isinstance(patch, Polygon))
    np.testing.assert_allclose(np.ptp(whole, axis=0), np.ptp(region.polygon_l0, axis=0) * MPP)
    np.testing.assert_allclose(
        [around.min(0), around.max(0)], 32 + np.outer([-0.5, 0.5], [box.width, box.height]) * MPP
    )
    pixels = np.asarray(axes.images[0].get_array())
    assert pixels[60:68, 60:68].mean() < 100


def test_what_is_said_is_written_as_it_is() -> None:
    """Dollars in a class's or a slide's name begin no formula."""
    field = np.zeros((8, 8, 3), np.uint8)
    figure = contact_sheet([View(field, [], r"1 · $\foo$")], fov_um=64.0)
    figure.canvas.draw()
    assert figure.axes[0].get_title() == r"1 · $\foo$"


def test_regions_are_a_tuple_that_travels(result: ss.ScanResult, slide: Slide) -> None:
    """Pickled regions can still be seen; none at all is a sheet that says so."""
    again = pickle.loads(pickle.dumps(result.flagged(2)))
    assert [(r.rank, r.evidence) for r in again] == [(r.rank, r.evidence) for r in result.regions[:2]]
    assert len(again.plot(slide).axes) == 2
    nothing = result.flagged(0).plot(slide)
    assert [text.get_text() for text in nothing.texts] == ["nothing to show"]


def test_a_long_line_stays_above_its_own_field() -> None:
    """A slide's id of forty letters, above rank and score, is no wider than the field."""
    field = np.zeros((8, 8, 3), np.uint8)
    said = "TCGA-A2-A0T2-01Z-00-DX1.29A5C4B1-0F\n12 · 0.97 · accept"
    views = [View(field, [corners(Box(1, 1, 2, 2))], said)] * 3
    figure = contact_sheet(views, fov_um=64.0, columns=3)
    figure.canvas.draw()
    for axes in figure.axes:
        heading, field_box = axes.title.get_window_extent(), axes.get_window_extent()
        assert heading.width < 1.06 * field_box.width  # a tenth of an inch is between them
        assert heading.y1 <= figure.bbox.height
        assert axes.get_title().endswith("12 · 0.97 · accept")
        assert axes.get_title().startswith("TCGA-A2")
    figure = contact_sheet([View(field, [corners(Box(1, 1, 2, 2))], "12 · 0.97 · mitotic figure")], fov_um=64.0)
    assert figure.axes[0].get_title() == "12 · 0.97 · mitotic figure"  # what the bundled detector says fits


def test_what_cannot_be_shown_is_one_line(result: ss.ScanResult, slide: Slide) -> None:
    other = discs(n=3, size_wh=(1600, 1200), seed=5)[0]
    scaled = memory_slide(slide.read(0, 0, 1600, 1200, slide.frame).rgb, MPP / 2)
    assert scaled.frame == Frame((1600, 1200), MPP / 2)
    for taken, options, said in (
        (other, {}, "slide: expected the slide that was scanned, got one of other content"),
        (scaled, {}, f"slide: expected {MPP:g} µm/px, as it was scanned, got {MPP / 2:g}; open it with mpp={MPP}"),
        (slide, {"columns": 0}, "columns: expected 1 or more, got 0"),
        (slide, {"px": 0}, "px: expected 1 to 4096 px, got 0"),
        (slide, {"fov_um": -1.0}, "fov_um: expected a positive number of µm, got -1.0"),
    ):
        with pytest.raises(ConfigError, match=said) as refused:
            result.flagged(2).plot(taken, **options)
        assert "\n" not in str(refused.value)
