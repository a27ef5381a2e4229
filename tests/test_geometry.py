"""Boxes and frames."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from slidescan.geometry import Box, Frame

number = st.floats(-1e6, 1e6)
box = st.builds(lambda x, y, w, h: Box(x, y, x + w, y + h), number, number, st.floats(0, 1e5), st.floats(0, 1e5))


@given(box, box)
def test_clip_is_inside_both_or_empty(a: Box, b: Box) -> None:
    """What two boxes share lies in both, and is empty exactly when they share no area."""
    shared = a.clip(b)
    assert (not shared.is_empty) == (a.intersects(b) and not a.is_empty and not b.is_empty)
    if not shared.is_empty:
        assert max(a.x0, b.x0) == shared.x0
        assert min(a.y1, b.y1) == shared.y1
        assert shared.area <= min(a.area, b.area)


@given(box)
def test_round_out_covers_by_less_than_a_pixel(a: Box) -> None:
    """The whole-pixel box holds the box and is less than one px larger on each side."""
    x0, y0, x1, y1 = a.round_out()
    assert x0 <= a.x0 < x0 + 1
    assert y0 <= a.y0 < y0 + 1
    assert x1 - 1 < a.x1 <= x1
    assert y1 - 1 < a.y1 <= y1


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.floats(0.05, 20), st.floats(0.05, 20))
def test_frame_at_covers_the_same_extent(width: int, height: int, mpp: float, other: float) -> None:
    """A frame at another resolution covers the slide and is at most one px larger."""
    frame = Frame((width, height), mpp)
    there = frame.at(other)
    for n, m in zip(frame.size_wh, there.size_wh, strict=True):
        assert m * other >= n * mpp - 2e-6 * other
        assert (m - 1) * other < n * mpp or m == 1


def test_frame_at_has_no_rounding_surplus() -> None:
    """A size that divides exactly gains no pixel from float round-off (0.1 * 3 / 0.3 > 1)."""
    assert Frame((3000, 3000), 0.1).at(0.3).size_wh == (1000, 1000)
    assert Frame((3000, 3000), 0.1).at(0.1).size_wh == (3000, 3000)


@given(st.floats(0.05, 20), st.floats(0, 1e6))
def test_um_and_px_are_inverse(mpp: float, length_um: float) -> None:
    """A length survives the trip to px and back."""
    frame = Frame((10, 10), mpp)
    assert abs(frame.um(frame.px(length_um)) - length_um) <= 1e-9 * max(1.0, length_um)
