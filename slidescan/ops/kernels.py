"""The two Triton kernels of deformable attention; `slidescan.ops.fused` launches them.

A program handles BLOCK_R rows (b, q, m), each with BLOCK_D channels and K points. Letters: M heads, D channels a head.
`level` holds width, height and first pixel of each point's level, so that levels and their points need no other form.
WORKING is the type of coordinates and sums; WIDE says that offsets inside an image need 64 bits.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["backward_kernel", "forward_kernel"]


@triton.jit
def _point(location, level, at, k, live, WORKING: tl.constexpr):
    """Corner of one point of each row: px left of and above it, its place between, and its level."""
    width = tl.load(level + 3 * k)
    height = tl.load(level + 3 * k + 1)
    start = tl.load(level + 3 * k + 2)
    x = tl.load(location + 2 * at, mask=live, other=-9.0).to(WORKING) * width.to(WORKING) - 0.5
    y = tl.load(location + 2 * at + 1, mask=live, other=-9.0).to(WORKING) * height.to(WORKING) - 0.5
    # False for NaN, and for what no integer could hold.
    inside = live & (x > -1) & (x < width.to(WORKING)) & (y > -1) & (y < height.to(WORKING))
    x = tl.where(inside, x, 0.0)
    y = tl.where(inside, y, 0.0)
    left = tl.floor(x)
    top = tl.floor(y)
    return left.to(tl.int32), top.to(tl.int32), x - left, y - top, inside, width, height, start


@triton.jit
def _corner(x, y, inside, width, height, start, row_stride, WIDE: tl.constexpr):
    """Offset of one corner from the first px of its image and head, and whether it is on the level."""
    there = inside & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    row = start + y * width + x
    if WIDE:
        row = row.to(tl.int64)
    return tl.where(there, row * row_stride, 0), there


@triton.jit
def forward_kernel(
    value, location, weight, level, out, n_rows, queries, batch_stride, row_stride, head_stride,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr, WORKING: tl.constexpr,
):  # fmt: skip
    """Sum the weighted samples of BLOCK_R rows into `out`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < n_rows
    channel = tl.arange(0, BLOCK_D)
    wanted = (channel < D)[None, :]
    base = value + (row // (M * queries)) * batch_stride + (row % M) * head_stride
    total = tl.zeros([BLOCK_R, BLOCK_D], WORKING)
    for k in tl.static_range(K):
        at = row * K + k
        x, y, right, down, inside, width, height, start = _point(location, level, at, k, live, WORKING)
        share = tl.load(weight + at, mask=live, other=0.0).to(WORKING)
        for j in tl.static_range(2):
            for i in tl.static_range(2):
                offset, there = _corner(x + i, y + j, inside, width, height, start, row_stride, WIDE)
                tap = share * (right if i else 1 - right) * (down if j else 1 - down)
                pixel = tl.load((base + offset)[:, None] + channel[None, :], mask=there[:, None] & wanted, other=0.0)
                total += tl.where(there, tap, 0.0)[:, None] * pixel.to(WORKING)
    target = out + row[:, None] * D + channel[None, :]
    tl.store(target, total.to(out.dtype.element_ty), mask=live[:, None] & wanted)


@triton.jit
def backward_kernel(
    value, location, weight, level, grad, grad_value, grad_location, grad_weight, n_rows, queries,
    batch_stride, row_stride, head_stride, pixels,
    K: tl.constexpr, M: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    WIDE: tl.constexpr, WORKING: tl.constexpr, FOR_VALUE: tl.constexpr, FOR_POINTS: tl.constexpr,
):  # fmt: skip
    """Add the gradient of the value of BLOCK_R rows, and store those of their locations and weights."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < n_rows
    channel = tl.arange(0, BLOCK_D)
    wanted = (channel < D)[None, :]
    batch = row // (M * queries)
    head = row % M
    base = value + batch * batch_stride + head * head_stride
    target = grad_value + (batch * pixels * M + head) * D  # contiguous, whatever the value's strides
    towards = tl.load(grad + row[:, None] * D + channel[None, :], mask=live[:, None] & wanted, other=0.0).to(WORKING)
    for k in tl.static_range(K):
        at = row * K + k
        x, y, right, down, inside, width, height, start = _point(location, level, at, k, live, WORKING)
        share = tl.load(weight + at, mask=live, other=0.0).to(WORKING)
        by_weight = tl.zeros([BLOCK_R], WORKING)
        by_x = tl.zeros([BLOCK_R], WORKING)
        by_y = tl.zeros([BLOCK_R], WORKING)
        for j in tl.static_range(2):
            for i in tl.static_range(2):
                across = right if i else 1 - right
                along = down if j else 1 - down
                if FOR_POINTS:
                    offset, there = _corner(x + i, y + j, inside, width, height, start, row_stride, WIDE)
                    mask = there[:, None] & wanted
                    pixel = tl.load((base + offset)[:, None] + channel[None, :], mask=mask, other=0.0)
                    agreement = tl.sum(pixel.to(WORKING) * towards, axis=1)
                    by_weight += agreement * across * along
                    by_x += agreement * along * (1 if i else -1)
                    by_y += agreement * across * (1 if j else -1)
                if FOR_VALUE:
                    offset, there = _corner(x + i, y + j, inside, width, height, start, M * D, WIDE)
                    there = there & (share != 0)
                    # Whole rows of at least four channels under one mask: the hardware adds them as vectors.
                    tl.atomic_add(
                        (target + offset)[:, None] + channel[None, :],
                        (share * across * along)[:, None] * towards,
                        mask=there[:, None] & wanted,
                        sem="relaxed",
                    )
        if FOR_POINTS:
            kind = grad_location.dtype.element_ty
            tl.store(grad_weight + at, by_weight.to(grad_weight.dtype.element_ty), mask=live)
            tl.store(grad_location + 2 * at, (by_x * share * width.to(WORKING)).to(kind), mask=live)
            tl.store(grad_location + 2 * at + 1, (by_y * share * height.to(WORKING)).to(kind), mask=live)
