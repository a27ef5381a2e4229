"""The whole slide on the review page, at full resolution, in a real browser."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import slidescan as ss
from slidescan.reviews import Review
from slidescan.reviews.case import Case
from slidescan.reviews.desk import Desk, Picture
from slidescan.slides import Slide
from tests.chromium import CHROMIUM, WHY, Tab
from tests.discs import ORACLE, discs
from tests.paged import REVIEW, N, at, decided, press
from tests.reviewed import APART

# A connection that a browser holds open ends with the server's loop, of which asyncio complains.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\"><b>&amp;{{x}}"


@pytest.fixture(scope="module")
def slide() -> Slide:
    return discs(n=N, size_wh=(1600, 1200))[0]


@pytest.mark.skipif(CHROMIUM is None, reason=WHY)
class TestSlide:
    PIXELS = (  # of a canvas; read from a copy, which is read alone
        "(() => {{ const c = document.querySelector('{}'), o = new OffscreenCanvas(c.width, c.height);"
        " const x = o.getContext('2d', {{willReadFrequently: true}}); x.drawImage(c, 0, 0);"
        " const d = x.getImageData(0, 0, c.width, c.height).data;"
        " let n = 0; {} }})()"
    )
    PAINTED = PIXELS.format(
        ".openseadragon-canvas canvas",
        "for (let i = 3; i < d.length; i += 4) n += d[i] > 0; return n / (d.length / 4);",
    )
    DIGEST = PIXELS.format(".ss-overlay", "for (const v of d) n = (31 * n + v) | 0; return String(n);")
    STILL = (
        "(() => { const v = document.getElementById('review').review.context.viewer.viewport;"
        " return Math.abs(v.getZoom(true) / v.getZoom() - 1) < 1e-9"
        " && v.getCenter(true).distanceTo(v.getCenter()) < 1e-9; })()"
    )
    SCALE = f"{REVIEW}.context.view().scale"
    LOADED = f"document.querySelector('.ss-context').dataset.layers && {REVIEW}.context.image?.getFullyLoaded()"

    def test_it_is_there_at_full_resolution(self, opened: Callable[..., Desk], tab: Tab, case: Path) -> None:
        """Tiles are painted; keys zoom and move; the layers come and go; a decision leads to the next place."""
        opened()
        press(tab, "f")
        tab.wait(self.LOADED)
        tab.wait(f"{self.PAINTED} > 0.5")
        assert any("/api/tile" in url for url in tab.asked)
        tab.press("0")
        tab.wait(f"{self.STILL} && {self.SCALE} < 0.62")  # all 1600 px in about 950
        for layer in ("h", "b"):
            full = tab.wait(self.DIGEST)
            tab.press(layer)
            tab.wait(f"{self.DIGEST} !== '{full}'")
            tab.press(layer)
            tab.wait(f"{self.DIGEST} === '{full}'")
        # A screen px a slide's px is the finest level.
        for _ in range(4):
            tab.press("+")
        tab.wait(f"{self.SCALE} > 2")
        tab.wait(self.LOADED)
        levels = {int(n) for url in tab.asked for n in re.findall(r"level%22%3A(\d+)", url)}
        assert max(levels) == 11
        left = f"{REVIEW}.context.view().left"
        before = tab.run(left)
        tab.press("ArrowRight", shift=True)
        tab.wait(f"{left} < {before - 20}")
        press(tab, "a")
        at(tab, 2)
        assert decided(case) == [("decide", "accept")]
        middle = (
            f"(() => {{ const v = {REVIEW}.context.view(), b = {REVIEW}.current.box_l0;"
            " return Math.hypot((b[0] + b[2]) / 2 * v.scale + v.left - v.width / 2,"
            " (b[1] + b[3]) / 2 * v.scale + v.top - v.height / 2); })()"
        )
        tab.wait(f"{middle} < 3")
        press(tab, "f")
        tab.wait("document.activeElement.matches('.ss-card[aria-current]')")
        assert tab.said == []

    def test_from_slide_to_slide(self, opened: Callable[..., Desk], tab: Tab, case: Path, slide: Slide) -> None:
        """The next item's slide is opened, and the one before again."""
        other, _ = discs(n=3, size_wh=(900, 700), seed=7)
        result = ss.scan(other, ORACLE, out=case.parent / "other", config=APART)
        cases = [Case(ss.load_result(case), "region", slide_id="a"), Case(result, "region", slide_id="b")]
        for each, pixels in zip(cases, (slide, other), strict=True):
            each.read_from(pixels)
        items = [item for each in cases for item in list(each.items.values())[:2]]
        review = Review(cases, items, reviewer="ann", blinded=False)
        names = [item.slide_id for item in review.items()]
        assert names == ["b", "a", "a", "b"]
        opened(review)
        press(tab, "f")
        for key, n in (("ArrowRight", 2), ("a", 3), ("ArrowRight", 4), ("ArrowLeft", 3), ("z", 2), ("ArrowLeft", 1)):
            press(tab, key)
            at(tab, n, 4)
            tab.wait(f"document.querySelector('.ss-context').dataset.layers === '{names[n - 1]}' && {self.LOADED}")
            tab.wait(f"document.querySelector('.ss-legend').textContent.includes('boxes on {names[n - 1]};')")
        tab.wait(f"{self.PAINTED} > 0.05")  # a small slide
        # OpenSeadragon says of a tile that arrives for the slide just left that it does not paint it.
        assert [said for said in tab.said if not said.startswith("Ignoring tile %s loaded before reset")] == []

    def test_the_mouse_moves_it(self, opened: Callable[..., Desk], tab: Tab) -> None:
        opened()
        press(tab, "f")
        tab.wait(self.LOADED)
        before = tab.run(f"{REVIEW}.context.view()")
        for kind, x, buttons in (("mousePressed", 600, 1), ("mouseMoved", 500, 1), ("mouseReleased", 500, 0)):
            tab.send("Input.dispatchMouseEvent", type=kind, x=x, y=450, button="left", buttons=buttons, clickCount=1)
        tab.wait(f"{REVIEW}.context.view().left < {before['left'] - 50}")
        tab.send("Input.dispatchMouseEvent", type="mouseWheel", x=500, y=450, deltaX=0, deltaY=-200)
        tab.wait(f"{self.SCALE} > {before['scale'] * 1.1}")
        tab.press("a")  # the keys are still ours
        at(tab, 2)

    def test_a_click_on_an_item_goes_to_it(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """On its outline or some px beside it; the view stays. A drag and a click on nothing go nowhere."""
        desk = opened()
        boxes = [item.box_l0 for item in desk._review.items()]
        press(tab, "f")
        tab.wait(self.LOADED)
        tab.press("0")
        tab.wait(f"{self.STILL} && {self.SCALE} < 0.62")
        stage = tab.run(
            "(() => { const r = document.querySelector('.ss-stage').getBoundingClientRect(); return [r.x, r.y]; })()"
        )

        def click(x_l0: float, y_l0: float, *, by: float = 0, to: float = 0) -> dict[str, float]:
            """Press `by` px right of a place, release `to` px farther; return the view before."""
            view: dict[str, float] = tab.run(f"{REVIEW}.context.view()")
            x, y = x_l0 * view["scale"] + view["left"] + stage[0] + by, y_l0 * view["scale"] + view["top"] + stage[1]
            for kind, at_x, buttons in (("Pressed", x, 1), ("Moved", x + to, 1), ("Released", x + to, 0)):
                how = {"button": "left", "buttons": buttons, "clickCount": 1}
                tab.send("Input.dispatchMouseEvent", type=f"mouse{kind}", x=at_x, y=y, **how)
            return view

        middle = [((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2) for box in boxes]
        view = click(*middle[7])
        at(tab, 8)
        assert tab.run(f"{REVIEW}.context.view()") == pytest.approx(view)
        inner = [n for n in range(1, N) if n != 7 and boxes[n].x1 < 1500]
        lonely = max(inner, key=lambda n: sorted(np.hypot(*np.subtract(middle[n], m)) for m in middle)[1])
        click(boxes[lonely].x1, middle[lonely][1], by=8)
        at(tab, lonely + 1)
        asked = sum("/api/find" in url for url in tab.asked)
        click(*middle[0], to=60)
        click(boxes[lonely].x1, middle[lonely][1], by=12)
        tab.wait(f"{self.STILL}")
        press(tab, "a")  # of the one that was gone to
        tab.wait("document.querySelector('[role=status]').textContent.startsWith('Accepted')")
        assert desk._review.decision(desk._review.items()[lonely].id) is not None
        assert sum("/api/find" in url for url in tab.asked) == asked + 1

    def test_two_hundred_thousand_boxes(self, opened: Callable[..., Desk], tab: Tab) -> None:
        """All are found by place, and a view of any part is painted within a frame or two."""
        side, n = 100_000, 200_000
        rng = np.random.default_rng(0)
        corner = rng.uniform(0, side - 60, (n, 2))
        score = np.sort(rng.uniform(0.1, 1, n))[::-1]
        boxes = np.column_stack([corner, corner + rng.uniform(30, 60, (n, 2)), score, np.zeros(n)]).astype("<f4")

        desk = opened()
        press(tab, "f")
        tab.wait(self.LOADED)
        desk._kinds = {**desk._kinds, "boxes": lambda asked: Picture(boxes.tobytes(), "application/octet-stream")}
        built = (
            f"(async () => {{ const c = {REVIEW}.context, blob = await c.transport.request('boxes', {{slide: 0}}),"
            " values = new Float32Array(await blob.arrayBuffer()), t = performance.now();"
            f" window.index = new c.layers.index.constructor(values, [{side}, {side}]);"
            " return performance.now() - t; })()"
        )
        assert tab.run(built) < 3000
        for x0, y0, x1, y1 in ((0, 0, 500, 500), (42_000, 61_000, 45_000, 62_000), (99_000, 0, side, side)):
            found = tab.run(
                f"(() => {{ const f = []; index.each({x0}, {y0}, {x1}, {y1}, (i) => f.push(i)); return f; }})()"
            )
            meets = (boxes[:, 0] < x1) & (boxes[:, 2] > x0) & (boxes[:, 1] < y1) & (boxes[:, 3] > y0)
            assert sorted(found) == np.flatnonzero(meets).tolist()
        paint = (
            "((scale) => {{ const c = {review}.context, o = c.overlay;"
            " const layers = {{...c.layers, masks: null, heat: null, index}};"
            " const times = [], drawn = [];"
            " for (let k = 0; k < 9; k += 1) {{ const t = performance.now();"
            " const left = -k * 40 - 20000 * scale * (scale > 0.02), view = {{left, top: -k * 30, scale}};"
            " o.paint({{...view, width: 1000, height: 800}}, layers,"
            " {{boxes: true, minScore: 0.17}}); o.context.getImageData(0, 0, 1, 1);"
            " times.push(performance.now() - t); drawn.push(o.drawn); }}"
            " times.sort((a, b) => a - b); return [times[4], Math.max(...drawn)]; }})({scale})"
        )
        told = {scale: tab.run(paint.format(review=REVIEW, scale=scale)) for scale in (0.008, 0.02, 0.05, 0.1, 1)}
        assert all(drawn > 0 for _, drawn in told.values())
        assert max(drawn for _, drawn in told.values()) < n / 3
        assert max(ms for ms, _ in told.values()) < 150  # on a core that does other things, too
