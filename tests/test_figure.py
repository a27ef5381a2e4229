"""The figure of a result: what is drawn, where, and what is not said."""

from __future__ import annotations

import io
import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.transforms import Bbox
from nbclient import NotebookClient
from PIL import Image

import slidescan as ss
from slidescan.anomaly import AnomalyMap, Coverage
from slidescan.detections import Detections
from slidescan.errors import ConfigError
from slidescan.figure import draw_map
from slidescan.geometry import Frame
from slidescan.legend import COVER_TINT, ramp_rgb, round_length_um
from slidescan.slides import Slide, memory_slide
from tests.discs import MPP, ORACLE, config, discs
from tests.reviewed import APART


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=30, size_wh=(1600, 1200))[0]


@pytest.fixture(scope="module")
def result(slide: Slide) -> ss.ScanResult:
    """A scan of which a strip at the right is called glass, and a corner could not be read."""
    scanned = ss.scan(slide, ORACLE, config=APART)
    coverage = scanned.coverage.copy()
    coverage[:, -10:] = Coverage.BACKGROUND
    coverage[:6, :6] = Coverage.READ_FAILED
    unseen = coverage != Coverage.ANALYSED
    score, density = (np.where(unseen, np.nan, plane) for plane in (scanned.anomaly.score, scanned.anomaly.density))
    return replace(scanned, anomaly=AnomalyMap(scanned.anomaly.frame, score, density, coverage))


def words(figure: Figure) -> list[str]:
    """Return all that is written, but the ticks."""
    figure.canvas.draw()
    said = [axes.get_title(loc="left") for axes in figure.axes]
    said += [text.get_text() for axes in figure.axes for text in axes.texts]
    said += [label for axes in figure.axes for label in (axes.get_xlabel(), axes.get_ylabel())]
    return [text for text in said if text] + [text.get_text() for legend in figure.legends for text in legend.texts]


def test_a_notebook_shows_it(result: ss.ScanResult, slide: Slide, tmp_path: Path) -> None:
    """As the last line of a cell, where nobody imported pyplot."""
    saved = ss.scan(slide, ORACLE, out=tmp_path / "case", config=APART)
    for figure in (result.plot(), ss.review(saved, slides=slide, reviewer="ann").plot(2)):
        picture = Image.open(io.BytesIO(figure._repr_png_()))
        assert picture.width == pytest.approx(110 * figure.get_figwidth(), abs=1)
    shown = "from slidescan.figure import Plot; Plot().add_subplot().figure"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(shown)])
    NotebookClient(notebook).execute()
    assert "image/png" in notebook.cells[0].outputs[0].data


def test_places_are_in_mm(result: ss.ScanResult) -> None:
    """Axes, map, outlines, hotspot and bar are where and as long as they are on the slide."""
    figure = result.plot(regions=7)
    axes = figure.axes[0]
    assert axes.get_xlim() == pytest.approx((0, 0.8))
    assert axes.get_ylim() == pytest.approx((0.6, 0))
    assert axes.get_aspect() == 1
    heat = axes.images[-1]
    height, width = result.coverage.shape
    assert heat.get_extent() == pytest.approx([0, width * 0.008, height * 0.008, 0])
    shown = heat.get_array()
    assert np.array_equal(np.ma.getmaskarray(shown), np.isnan(result.anomaly.density))
    assert np.array_equal(shown.compressed(), result.anomaly.density[np.isfinite(result.anomaly.density)])
    (outlines,) = (drawn for drawn in axes.collections if type(drawn) is PolyCollection)
    assert len(outlines.get_paths()) == 7
    best = outlines.get_paths()[-1].vertices[:-1]  # on top
    assert best == pytest.approx(result.regions[0].polygon_l0 * MPP / 1000)
    assert sorted(text.get_text() for text in axes.texts) == sorted([*map(str, range(1, 8)), "200 µm"])
    (square,) = (patch for patch in axes.patches if isinstance(patch, Rectangle))
    box = result.hotspot.box_l0.scale(MPP / 1000)
    assert square.get_bbox().extents == pytest.approx((box.x0, box.y0, box.x1, box.y1))
    (bar,) = axes.lines
    assert np.ptp(bar.get_xdata()) == pytest.approx(0.2)


def test_what_it_says(result: ss.ScanResult, slide: Slide) -> None:
    """Units, count and threshold, what is hatched; not the slide's name."""
    said = words(result.plot(slide))
    assert f"{len(result.found)} discs at score ≥ {result.threshold:.2f}" in said
    assert {"objects per mm²", "mm", "flagged region", "not analysed: no tissue", "could not be read"} <= set(said)
    assert any(text.startswith(f"hotspot: {result.hotspot.count} in ") for text in said)
    assert not [text for text in said if slide.name in text]
    assert "highest score" in words(result.plot(what="score"))
    coverage = result.plot(what="coverage")
    assert len(coverage.axes) == 1  # no colour bar
    assert "analysed" in words(coverage)


def test_what_was_not_analysed_is_hatched(result: ss.ScanResult) -> None:
    """Each state has its own hatch, over the very px that are in it."""
    axes = result.plot().axes[0]
    glass, failed = (drawn for drawn in axes.collections if isinstance(drawn, ContourSet))
    assert (glass.hatches, failed.hatches) == (["////"], ["xxxxx"])
    height, width = result.coverage.shape
    for drawn, state in ((glass, Coverage.BACKGROUND), (failed, Coverage.READ_FAILED)):
        x, y = np.meshgrid((np.arange(width) + 0.5) * 0.008, (np.arange(height) + 0.5) * 0.008)
        inside = drawn.get_paths()[0].contains_points(np.column_stack([x.ravel(), y.ravel()]))
        assert np.array_equal(inside.reshape(height, width), result.coverage == state)
    whole = replace(result.anomaly, coverage=np.full_like(result.coverage, Coverage.ANALYSED))
    figure = draw_map(whole, result.frame, what="density", title="")
    assert not [drawn for drawn in figure.axes[0].collections if isinstance(drawn, ContourSet)]
    assert not [text for text in words(figure) if "not analysed" in text]


def test_colours_are_those_of_the_overview(result: ss.ScanResult) -> None:
    """Ten objects per mm² have half the ramp's colour; what was analysed has its tint."""
    heat, tint = result.plot().axes[0].images[-1], result.plot(what="coverage").axes[0].images[-1]
    for per_mm2 in (10.0, 20.0, 90.0):
        rgba = np.array(heat.cmap(heat.norm(per_mm2)))
        assert rgba[:3] * 255 == pytest.approx(ramp_rgb(np.float64(min(1, per_mm2 / 20))), abs=2)
        assert rgba[3] == 0.85
    assert heat.cmap(heat.norm(0.0))[3] == 0
    colours = np.unique(tint.get_array()[result.coverage == Coverage.ANALYSED][:, :3], axis=0)
    assert colours.tolist() == [list(COVER_TINT[Coverage.ANALYSED])]


def test_the_slide_is_under_the_map(result: ss.ScanResult, slide: Slide) -> None:
    """Pale, grey and in its place: the discs are where they were found."""
    assert len(result.plot().axes[0].images) == 2
    under = result.plot(slide).axes[0].images[0]
    assert under.get_extent() == pytest.approx([0, 0.8, 0.6, 0])
    grey = np.asarray(under.get_array())
    assert grey.min() >= 0.55 * 255
    x, y = (result.found.centers / 1600 * grey.shape[1]).round().astype(int).T
    assert grey[y, x].max() < np.median(grey) - 20


def test_a_small_region_is_seen(result: ss.ScanResult) -> None:
    """On a slide of 80 mm an outline of 20 µm gets a square of 5 points."""
    wide = Frame((160_000, 120_000), MPP)
    figure = draw_map(result.anomaly, wide, what="density", title="", regions=result.flagged(1))
    (outlines,) = (drawn for drawn in figure.axes[0].collections if type(drawn) is PolyCollection)
    across_mm = np.ptp(outlines.get_paths()[0].vertices[:, 0])
    place = figure.axes[0].get_position()
    assert across_mm / 80 * place.width * figure.get_figwidth() * 72 == pytest.approx(5)


def test_numbers_do_not_lie_on_each_other(result: ss.ScanResult) -> None:
    """Where regions crowd, those with most evidence have theirs, beside their own outline."""
    wide = Frame((16_000, 12_000), MPP)
    regions = result.flagged(20)
    assert len(regions) == 20
    figure = draw_map(result.anomaly, wide, what="density", title="", regions=regions, width_in=3.5)
    figure.canvas.draw()
    numbers = {text.get_text(): text for text in figure.axes[0].texts if text.get_text().isdecimal()}
    assert "1" in numbers
    assert len(numbers) < 20
    boxes = [text.get_window_extent() for text in numbers.values()]
    for one, other in itertools.combinations(boxes, 2):
        both = Bbox.intersection(one, other)
        assert both is None or both.width * both.height < 0.2 * one.width * one.height
    for region in regions:
        if str(region.rank) in numbers:
            box = region.box_l0.scale(MPP / 1000)
            assert numbers[str(region.rank)].xy == pytest.approx(
                ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2), abs=0.4
            )
    apart = draw_map(result.anomaly, result.frame, what="density", title="", regions=regions)
    assert len([text for text in apart.axes[0].texts if text.get_text().isdecimal()]) == 20


@pytest.mark.parametrize(("size_wh", "width_in"), [((4000, 300), 3.5), ((300, 4000), 7.0), ((1600, 1200), 3.5)])
def test_it_fits_a_page(size_wh: tuple[int, int], width_in: float, tmp_path: Path) -> None:
    """Wide or tall, the figure is as wide as asked, no taller than a page, and nothing lies outside it."""
    frame = Frame(size_wh, MPP)
    plane = frame.at(8.0)
    shape = plane.size_wh[::-1]
    coverage = np.full(shape, Coverage.ANALYSED, np.uint8)
    coverage[0] = Coverage.BACKGROUND
    anomaly = AnomalyMap(plane, np.zeros(shape, np.float32), np.zeros(shape, np.float32), coverage)
    figure = draw_map(anomaly, frame, what="density", title="3 discs at score ≥ 0.50", width_in=width_in)
    assert figure.get_figwidth() == width_in
    assert figure.get_figheight() <= 9
    figure.canvas.draw()
    box = figure.get_tightbbox()
    assert box.x0 > -0.01
    assert box.y0 > -0.01
    assert box.x1 < width_in + 0.01
    assert box.y1 < figure.get_figheight() + 0.01


def test_of_nothing(tmp_path: Path) -> None:
    """A slide without a figure, and one without tissue, have a figure that says so."""
    glass = memory_slide(np.full((600, 800, 3), 245, np.uint8), MPP)
    scanned = ss.scan(glass, ORACLE, config=config())
    assert np.isnan(scanned.anomaly.analysed_fraction)
    said = words(scanned.plot(glass))
    assert "0 discs at score ≥ 0.50" in said
    assert "not analysed: no tissue" in said
    assert "flagged region" not in said
    seen = np.full((75, 100), Coverage.ANALYSED, np.uint8)
    empty = replace(
        scanned,
        detections=Detections.build(np.empty((0, 4)), []),
        anomaly=AnomalyMap(Frame((100, 75), 4.0), np.zeros((75, 100)), np.zeros((75, 100)), seen),
    )
    assert words(empty.plot()) == ["0 discs at score ≥ 0.50", "100 µm", "mm", "mm", "objects per mm²"]


def test_files(result: ss.ScanResult, slide: Slide, tmp_path: Path) -> None:
    """A picture has 300 px an inch; in a PDF the map is a picture and the rest is not."""
    result.plot(slide, width_in=3.5).savefig(tmp_path / "f.png")
    data = (tmp_path / "f.png").read_bytes()
    assert int.from_bytes(data[16:20], "big") == 1050
    result.plot(slide).savefig(tmp_path / "f.pdf")
    pdf = (tmp_path / "f.pdf").read_bytes()
    assert 1 <= pdf.count(b"/Subtype /Image") <= 12
    assert b"/PatternType 1" in pdf  # the hatch
    assert b"/Font" in pdf


def test_what_cannot_be_drawn_is_one_line(result: ss.ScanResult, slide: Slide) -> None:
    other = discs(n=3, size_wh=(1600, 1200), seed=5)[0]
    with pytest.raises(ConfigError, match=r"^slide: expected the slide that was scanned, got one of other content"):
        result.plot(other)
    for options, words_ in (
        ({"what": "heat"}, "what: expected density, score or coverage, got 'heat'"),
        ({"width_in": 0.5}, "width_in: expected 2.5 to 40 inches, got 0.5"),
        ({"width_in": float("nan")}, "width_in: expected"),
        ({"um": 0.0}, "um: expected a scale bar of up to 720 µm, got 0.0"),
        ({"um": 900.0}, "um: expected"),
        ({"regions": -1}, "regions: expected a number of regions or detections, got -1"),
    ):
        with pytest.raises(ConfigError, match=words_) as refused:
            result.plot(slide, **options)
        assert "\n" not in str(refused.value)


def test_neither_pyplot_nor_a_display(result: ss.ScanResult, tmp_path: Path) -> None:
    """Importing slidescan loads no matplotlib; drawing loads no pyplot, whatever the backend is set to."""
    script = """
import sys, numpy as np, slidescan as ss, slidescan.result
assert "matplotlib" not in sys.modules
from slidescan.anomaly import AnomalyMap
from slidescan.figure import draw_map
from slidescan.geometry import Frame
frame = Frame((40, 30), 8.0)
plane = np.zeros((30, 40))
draw_map(AnomalyMap(frame, plane, plane, plane.astype(np.uint8) + 2), frame, what="density", title="").savefig("f.pdf")
assert "matplotlib.pyplot" not in sys.modules
"""
    root = str(Path(__file__).parents[1])
    subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, check=True, env={"PYTHONPATH": root, "MPLBACKEND": "qtagg"}
    )
    assert (tmp_path / "f.pdf").is_file()


@pytest.mark.parametrize(
    ("most_um", "um"), [(1.0, 1.0), (9.99, 5.0), (0.3, 0.2), (1000.0, 1000.0), (4999.0, 2000.0), (64 * 0.35, 20.0)]
)
def test_lengths_of_bars_are_round(most_um: float, um: float) -> None:
    assert round_length_um(most_um) == pytest.approx(um)
    assert json.dumps(round_length_um(most_um))


def test_a_large_map_is_drawn_as_finely_as_it_is_printed(slide: Slide) -> None:
    """300 px to the inch, in place, and no hot one is lost."""
    fine = ss.scan(slide, ORACLE, config=config(map__um_per_px=0.6, map__density_sigma_um=100))
    assert fine.anomaly.coverage.shape[1] > 1050
    figure = fine.plot(what="score", width_in=3.5)
    heat = figure.axes[0].images[-1]
    assert max(heat.get_array().shape) <= 1050
    assert heat.get_array().max() == pytest.approx(float(np.nanmax(fine.anomaly.score)))
    x0, x1, y1, y0 = heat.get_extent()
    assert (x0, y0) == (0, 0)
    px_mm = 0.6e-3 * 2
    assert (x1, y1) == pytest.approx((0.8, 0.6), abs=px_mm)
