"""The two Triton kernels of deformable attention; `slidescan.ops.fused` launches them.

A program handles BLOCK_R rows (q, m) of one image, each with BLOCK_D channels and K points. Letters: M heads, D
channels a head. `level` holds width, height and first pixel of each point's level, so that levels need no other form.

What makes them fast is that lanes next to each other read, and add to, 16 bytes of one row each. The compiler sees that
only while it can prove where a row starts: strides come in units of ALIGN channels, and an offset is never chosen by a
condition. A corner beyond its level has an offset like any other, and a mask that is false.

WORKING is the type of coordinates and sums; WIDE says that offsets inside an image need 64 bits; UNROLL points are
computed at a time.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]


@triton.jit
def _place(queries, M: tl.constexpr, BLOCK_R: tl.constexpr, WIDE: tl.constexpr):
    """Image of this program, its rows in it, and which of them there are."""
    blocks = tl.cdiv(queries * M, BLOCK_R)
    image = tl.program_id(0) // blocks
    row = (tl.program_id(0) - image * blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    if WIDE:
        row = row.to(tl.int64)
    return image.to(tl.int64), row, row < queries * M


@triton.jit
def _point(location, weight, level, at, k, live, WORKING: tl.constexpr, WIDE: tl.constexpr):
    """Weight of one point of each row, its place between four pixels, the first of them, and which are on the level."""
    width = tl.load(level + 3 * k)
    height = tl.load(level + 3 * k + 1)
    start = tl.load(level + 3 * k + 2)
    x = tl.load(location + 2 * at, mask=live, other=-9.0).to(WORKING) * width.to(WORKING) - 0.5
    y = tl.load(location + 2 * at + 1, mask=live, other=-9.0).to(WORKING) * height.to(WORKING) - 0.5
    share = tl.load(weight + at, mask=live, other=0.0).to(WORKING)
    # False for NaN, and for what no integer could hold.
    inside = (x >= -1) & (x < width.to(WORKING)) & (y >= -1) & (y < height.to(WORKING))
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    share = tl.where(inside, share, 0.0)
    column = tl.floor(x).to(tl.int32)
    line = tl.floor(y).to(tl.int32)
    pixel = start + line * width + column
    if WIDE:
        pixel = pixel.to(tl.int64)
    left = inside & (column >= 0)
    right = inside & (column + 1 < width)
    return share, x - tl.floor(x), y - tl.floor(y), pixel, width, height, left, right, line >= 0, line + 1 < height


@triton.jit
def forward_kernel(
    value, location, weight, level, out, queries, batch_stride, row_stride, head_stride,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, WORKING: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Sum the weighted samples of BLOCK_R rows into `out`."""
    image, row, live = _place(queries, M, BLOCK_R, WIDE)
    channel = tl.arange(0, BLOCK_D)[None, :]
    wanted = channel < D
    rows_before = image * queries * M
    location += rows_before * (2 * K)
    weight += rows_before * K
    base = (value + image * batch_stride * ALIGN) + ((row % M) * head_stride * ALIGN)[:, None] + channel
    total = tl.zeros([BLOCK_R, BLOCK_D], WORKING)
    for k in tl.range(K, loop_unroll_factor=UNROLL):
        share, across, down, pixel, width, _, left, right, upper, lower = _point(
            location, weight, level, row * K + k, k, live, WORKING, WIDE
        )
        for j in tl.static_range(2):
            for i in tl.static_range(2):
                there = (right if i else left) & (lower if j else upper)
                tap = share * (across if i else 1 - across) * (down if j else 1 - down)
                offset = (pixel + j * width + i) * row_stride * ALIGN
                sample = tl.load(base + offset[:, None], mask=there[:, None] & wanted, other=0.0)
                total += tap[:, None] * sample.to(WORKING)
    target = out + rows_before * D + row[:, None] * D + channel
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & wanted)


@triton.jit
def backward_kernel(
    value, location, weight, level, grad, grad_value, grad_location, grad_weight, queries, batch_stride, row_stride,
    head_stride, pixels,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, ALIGN: tl.constexpr, WIDE: tl.constexpr, WORKING: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr, UNROLL: tl.constexpr,
    BLOCK_K: tl.constexpr, FOR_VALUE: tl.constexpr, FOR_POINTS: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the value of BLOCK_R rows, and store those of their locations and weights."""
    image, row, live = _place(queries, M, BLOCK_R, WIDE)
    channel = tl.arange(0, BLOCK_D)[None, :]
    wanted = channel < D
    rows_before = image * queries * M
    location += rows_before * (2 * K)
    weight += rows_before * K
    head = row % M
    base = (value + image * batch_stride * ALIGN) + (head * head_stride * ALIGN)[:, None] + channel
    target = (grad_value + image * pixels * (M * D)) + (head * D)[:, None] + channel  # contiguous, unlike the value
    source = grad + rows_before * D + row[:, None] * D + channel
    towards = tl.load(source, mask=live[:, None] & wanted, other=0.0).to(WORKING)
    # Gradients of all points of a row are kept, and stored at the end as whole lines of memory.
    point = tl.arange(0, BLOCK_K)[None, :]
    of_weight = tl.zeros([BLOCK_R, BLOCK_K], WORKING)
    of_x = tl.zeros([BLOCK_R, BLOCK_K], WORKING)
    of_y = tl.zeros([BLOCK_R, BLOCK_K], WORKING)
    for k in tl.range(K, loop_unroll_factor=UNROLL):
        share, across, down, pixel, width, height, left, right, upper, lower = _point(
            location, weight, level, row * K + k, k, live, WORKING, WIDE
        )
        if FOR_POINTS:  # before anything is added: no load could be moved before an atomic one
            by_weight = tl.zeros([BLOCK_R], WORKING)
            by_x = tl.zeros([BLOCK_R], WORKING)
            by_y = tl.zeros([BLOCK_R], WORKING)
            for j in tl.static_range(2):
                for i in tl.static_range(2):
                    there = (right if i else left) & (lower if j else upper)
                    of_column = across if i else 1 - across
                    of_line = down if j else 1 - down
                    offset = (pixel + j * width + i) * row_stride * ALIGN
                    sample = tl.load(base + offset[:, None], mask=there[:, None] & wanted, other=0.0)
                    agreement = tl.sum(sample.to(WORKING) * towards, axis=1)
                    by_weight += agreement * of_column * of_line
                    by_x += agreement * of_line * (1 if i else -1)
                    by_y += agreement * of_column * (1 if j else -1)
            of_weight = tl.where(point == k, by_weight[:, None], of_weight)
            of_x = tl.where(point == k, (by_x * share * width.to(WORKING))[:, None], of_x)
            of_y = tl.where(point == k, (by_y * share * height.to(WORKING))[:, None], of_y)
        if FOR_VALUE:
            for j in tl.static_range(2):
                for i in tl.static_range(2):
                    there = (right if i else left) & (lower if j else upper) & (share != 0)
                    tap = share * (across if i else 1 - across) * (down if j else 1 - down)
                    offset = (pixel + j * width + i) * (M * D)
                    part = tap[:, None] * towards
                    tl.atomic_add(target + offset[:, None], part, mask=there[:, None] & wanted, sem="relaxed")
    if FOR_POINTS:
        known = live[:, None] & (point < K)
        at = row[:, None] * K + point
        kind = grad_location.dtype.element_ty
        tl.store(grad_weight + rows_before * K + at, of_weight.to(grad_weight.dtype.element_ty), mask=known)
        tl.store(grad_location + rows_before * (2 * K) + 2 * at, of_x.to(kind), mask=known)
        tl.store(grad_location + rows_before * (2 * K) + 2 * at + 1, of_y.to(kind), mask=known)
