"""location_address on Triton: w_g = g c + (1 - g) p, w_s = shift * w_g in a circle, weights = w_s^sharpen / sum.

A program owns one head of one batch entry and walks its rows in blocks. Forward: one pass for the largest w_s and the sum of powers, which
is scaled when the largest grows, one to write. Backward: one pass for weights . dweights, one that writes dw_s, a second kernel for what
is a sum over taps of it. A tap reads its neighbours from memory, which the L1 cache holds. Bytes: forward 3*s*N, backward 5*s*N + 8*N.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, device, lanes, refuse, run, store, strides

# Below it the slope of a row of nothing but such weights would leave the range of float32.
LEAST = tl.constexpr(2.0**-100)


@device
def _gated(content_ptr, previous_ptr, gate, content_stride_n, previous_stride_n, n, N):
    content = tl.load(content_ptr + n * content_stride_n, mask=n < N, other=0.0).to(tl.float32)
    return gate * content + (1 - gate) * tl.load(previous_ptr + n * previous_stride_n, mask=n < N, other=0.0).to(tl.float32)


@device
def _around(n, steps, N):
    """The rows `steps` further in the circle of N, for rows n below N; the division is one of scalars."""
    steps = steps % N
    place = n + tl.where(steps < 0, steps + N, steps)  # the remainder has the sign of steps
    return tl.where(place < N, place, place - N)


@device
def _shifted(
    content_ptr, previous_ptr, shift_ptr, gate, content_stride_n, previous_stride_n, shift_stride_s, n, N, taps, BLOCK_N: tl.constexpr
):  # fmt: skip
    """w_s at rows n; 0 beyond N."""
    total = tl.zeros([BLOCK_N], tl.float32)
    for t in range(taps):
        tap = tl.load(shift_ptr + tl.cast(t, tl.int64) * shift_stride_s).to(tl.float32)
        place = tl.where(n < N, _around(n, taps // 2 - t, N), N)
        total += tap * _gated(content_ptr, previous_ptr, gate, content_stride_n, previous_stride_n, place, N)
    return total


@device
def _sharpened(shifted, largest, above):
    """w_s / largest, its logarithm and its power sharpen - 1: 0, 0 and 1 where it is not positive; NaN stays NaN."""
    ratio = tl.math.div_rn(shifted, largest)  # 1 for the largest, which a GPU's own division does not promise
    ratio = tl.where(ratio <= 0, 0.0, ratio)
    logarithm = tl.log(tl.where(ratio == 0, 1.0, ratio))
    return ratio, logarithm, tl.exp(above * logarithm)


@device
def address(
    weights_ptr, stats_ptr, content_ptr, previous_ptr, shift_ptr, gate, sharpen, N, taps,
    content_stride_n, previous_stride_n, shift_stride_s, BLOCK_N: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Weights and stats of one head, from pointers to its own rows; FLOOR is added to the sum of w_s^sharpen."""
    largest, total = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        shifted = _shifted(
            content_ptr, previous_ptr, shift_ptr, gate, content_stride_n, previous_stride_n, shift_stride_s, n, N, taps, BLOCK_N
        )
        now = tl.maximum(largest, tl.max(shifted, 0))
        safe = tl.where(now == 0, 1.0, now)
        before, _, power = _sharpened(largest, safe, sharpen - 1)
        ratio, _, powers = _sharpened(shifted, safe, sharpen - 1)
        total = total * before * power + tl.sum(ratio * powers, 0)
        largest = now
    largest = tl.where(largest == 0, 1.0, largest)
    if FLOOR > 0:
        total += FLOOR * tl.exp(-sharpen * tl.log(largest))
    tl.store(stats_ptr, largest)
    tl.store(stats_ptr + tl.cast(1, tl.int64), total)
    total = tl.where(total == 0, 1.0, total)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        shifted = _shifted(
            content_ptr, previous_ptr, shift_ptr, gate, content_stride_n, previous_stride_n, shift_stride_s, n, N, taps, BLOCK_N
        )
        ratio, _, power = _sharpened(shifted, largest, sharpen - 1)
        store(weights_ptr + n, ratio * power / total, mask=n < N)


@device
def address_slope(
    slope_ptr, dweights_ptr, stats_ptr, content_ptr, previous_ptr, shift_ptr, gate, sharpen, N, taps,
    dweights_stride_n, content_stride_n, previous_stride_n, shift_stride_s, BLOCK_N: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of w_s of one head; returns that of sharpen."""
    largest, total = tl.load(stats_ptr), tl.load(stats_ptr + tl.cast(1, tl.int64))
    total = tl.where(total == 0, 1.0, total)
    centre, mass, dsharpen = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        shifted = _shifted(
            content_ptr, previous_ptr, shift_ptr, gate, content_stride_n, previous_stride_n, shift_stride_s, n, N, taps, BLOCK_N
        )
        ratio, _, power = _sharpened(shifted, largest, sharpen - 1)
        d = tl.load(dweights_ptr + n * dweights_stride_n, mask=n < N, other=0.0).to(tl.float32)
        centre += tl.sum(ratio * power / total * d, 0)
        mass += tl.sum(ratio * power, 0) / total
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        shifted = _shifted(
            content_ptr, previous_ptr, shift_ptr, gate, content_stride_n, previous_stride_n, shift_stride_s, n, N, taps, BLOCK_N
        )
        ratio, logarithm, power = _sharpened(shifted, largest, sharpen - 1)
        d = tl.load(dweights_ptr + n * dweights_stride_n, mask=n < N, other=0.0).to(tl.float32) - centre
        dsharpen += tl.sum(ratio * power / total * d * logarithm, 0)
        slope = tl.where(ratio == 0, 0.0, sharpen / (total * tl.maximum(largest, LEAST)) * power * d)
        tl.store(slope_ptr + n, slope, mask=n < N)
    if FLOOR > 0:  # else the weights sum to 1 and the largest drops out
        dsharpen += tl.log(largest) * centre * (1 - mass)
    return dsharpen


@device
def address_inputs(
    dcontent_ptr, dprevious_ptr, dshift_ptr, slope_ptr, content_ptr, previous_ptr, shift_ptr, gate, N, taps,
    content_stride_n, previous_stride_n, shift_stride_s, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From the gradient of w_s of one head: writes those of content, previous and shift, returns that of gate."""
    dgate = tl.cast(0.0, tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        d = tl.zeros([BLOCK_N], tl.float32)
        for t in range(taps):
            at = _around(n, t - taps // 2, N)
            tap = tl.load(shift_ptr + tl.cast(t, tl.int64) * shift_stride_s).to(tl.float32)
            d += tap * tl.load(slope_ptr + at, mask=n < N, other=0.0)
        content = tl.load(content_ptr + n * content_stride_n, mask=n < N, other=0.0).to(tl.float32)
        previous = tl.load(previous_ptr + n * previous_stride_n, mask=n < N, other=0.0).to(tl.float32)
        dgate += tl.sum(d * (content - previous), 0)
        if dcontent_ptr is not None:
            store(dcontent_ptr + n, gate * d, mask=n < N)
        if dprevious_ptr is not None:
            store(dprevious_ptr + n, (1 - gate) * d, mask=n < N)
    if dshift_ptr is not None:
        for t in range(taps):
            dtap = tl.cast(0.0, tl.float32)
            for first in range(0, N, BLOCK_N):
                n = first + lanes(BLOCK_N)
                at = tl.where(n < N, _around(n, taps // 2 - t, N), N)
                gated = _gated(content_ptr, previous_ptr, gate, content_stride_n, previous_stride_n, at, N)
                dtap += tl.sum(tl.load(slope_ptr + n, mask=n < N, other=0.0) * gated, 0)
            store(dshift_ptr + tl.cast(t, tl.int64), dtap)
    return dgate


@triton.jit
def _location_address_fwd_kernel(
    weights_ptr, stats_ptr, content_ptr, previous_ptr, gate_ptr, shift_ptr, sharpen_ptr, N, R, taps,
    content_stride_b, content_stride_r, content_stride_n, previous_stride_b, previous_stride_r, previous_stride_n,
    gate_stride_b, gate_stride_r, shift_stride_b, shift_stride_r, shift_stride_s, sharpen_stride_b, sharpen_stride_r,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    b, r = place // R, place % R
    gate = tl.load(gate_ptr + b * gate_stride_b + r * gate_stride_r).to(tl.float32)
    sharpen = tl.load(sharpen_ptr + b * sharpen_stride_b + r * sharpen_stride_r).to(tl.float32)
    content_ptr += b * content_stride_b + r * content_stride_r
    previous_ptr += b * previous_stride_b + r * previous_stride_r
    shift_ptr += b * shift_stride_b + r * shift_stride_r
    address(
        weights_ptr + place * N, stats_ptr + 2 * place, content_ptr, previous_ptr, shift_ptr, gate, sharpen, N, taps,
        content_stride_n, previous_stride_n, shift_stride_s, BLOCK_N, 0.0,
    )  # fmt: skip


@triton.jit
def _location_address_slope_kernel(
    dsharpen_ptr, slope_ptr, dweights_ptr, stats_ptr, content_ptr, previous_ptr, gate_ptr, shift_ptr, sharpen_ptr, N, R, taps,
    dweights_stride_b, dweights_stride_r, dweights_stride_n,
    content_stride_b, content_stride_r, content_stride_n, previous_stride_b, previous_stride_r, previous_stride_n,
    gate_stride_b, gate_stride_r, shift_stride_b, shift_stride_r, shift_stride_s, sharpen_stride_b, sharpen_stride_r,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    b, r = place // R, place % R
    gate = tl.load(gate_ptr + b * gate_stride_b + r * gate_stride_r).to(tl.float32)
    sharpen = tl.load(sharpen_ptr + b * sharpen_stride_b + r * sharpen_stride_r).to(tl.float32)
    content_ptr += b * content_stride_b + r * content_stride_r
    previous_ptr += b * previous_stride_b + r * previous_stride_r
    dweights_ptr += b * dweights_stride_b + r * dweights_stride_r
    shift_ptr += b * shift_stride_b + r * shift_stride_r
    dsharpen = address_slope(
        slope_ptr + place * N, dweights_ptr, stats_ptr + 2 * place, content_ptr, previous_ptr, shift_ptr, gate, sharpen, N, taps,
        dweights_stride_n, content_stride_n, previous_stride_n, shift_stride_s, BLOCK_N, 0.0,
    )  # fmt: skip
    if dsharpen_ptr is not None:
        store(dsharpen_ptr + place, dsharpen)


@triton.jit
def _location_address_bwd_kernel(
    dcontent_ptr, dprevious_ptr, dgate_ptr, dshift_ptr, slope_ptr, content_ptr, previous_ptr, gate_ptr, shift_ptr, N, R, taps,
    content_stride_b, content_stride_r, content_stride_n, previous_stride_b, previous_stride_r, previous_stride_n,
    gate_stride_b, gate_stride_r, shift_stride_b, shift_stride_r, shift_stride_s, BLOCK_N: tl.constexpr,
):  # fmt: skip
    place = tl.program_id(0).to(tl.int64)
    b, r = place // R, place % R
    gate = tl.load(gate_ptr + b * gate_stride_b + r * gate_stride_r).to(tl.float32)
    content_ptr += b * content_stride_b + r * content_stride_r
    previous_ptr += b * previous_stride_b + r * previous_stride_r
    shift_ptr += b * shift_stride_b + r * shift_stride_r
    if dcontent_ptr is not None:
        dcontent_ptr += place * N
    if dprevious_ptr is not None:
        dprevious_ptr += place * N
    if dshift_ptr is not None:
        dshift_ptr += place * taps
    dgate = address_inputs(
        dcontent_ptr, dprevious_ptr, dshift_ptr, slope_ptr + place * N, content_ptr, previous_ptr, shift_ptr, gate, N, taps,
        content_stride_n, previous_stride_n, shift_stride_s, BLOCK_N,
    )  # fmt: skip
    if dgate_ptr is not None:
        store(dgate_ptr + place, dgate)


def supports(content, previous, gate, shift, sharpen):
    return refuse(content)


def _sizes(content, shift):
    batch, heads, rows = content.shape
    circle = _launch.circle(rows)
    return (batch * heads,), (rows, heads, shift.shape[2]), dict(BLOCK_N=circle.block_n, num_warps=circle.num_warps)


def forward(weights, stats, content, previous, gate, shift, sharpen):
    grid, sizes, tiles = _sizes(content, shift)
    run(
        _location_address_fwd_kernel, grid, weights, stats, content, previous, gate, shift, sharpen, *sizes,
        *content.stride(), *previous.stride(), *gate.stride(), *shift.stride(), *sharpen.stride(), **tiles,
    )  # fmt: skip


def backward(dcontent, dprevious, dgate, dshift, dsharpen, dweights, content, previous, gate, shift, sharpen, weights, stats):
    grid, sizes, tiles = _sizes(content, shift)
    slope = content.new_empty(content.shape, dtype=torch.float32)
    run(
        _location_address_slope_kernel, grid, dsharpen, slope, dweights, stats, content, previous, gate, shift, sharpen, *sizes,
        *strides(dweights, 3), *content.stride(), *previous.stride(), *gate.stride(), *shift.stride(), *sharpen.stride(), **tiles,
    )  # fmt: skip
    run(
        _location_address_bwd_kernel, grid, dcontent, dprevious, dgate, dshift, slope, content, previous, gate, shift, *sizes,
        *content.stride(), *previous.stride(), *gate.stride(), *shift.stride(), **tiles,
    )  # fmt: skip


def _aot(name, kernel, dtype):
    circle = _launch.circle(1024)
    constants = {a: 1 for a in kernel.arg_names if a.endswith(("stride_n", "stride_s"))} | dict(BLOCK_N=circle.block_n)
    return aot(name, kernel, dtype, constants, dict(stats_ptr="*fp32", slope_ptr="*fp32"), circle.num_warps)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        _aot("location_address_fwd", _location_address_fwd_kernel, dtype),
        _aot("location_address_slope", _location_address_slope_kernel, dtype),
        _aot("location_address_bwd", _location_address_bwd_kernel, dtype),
    )
]
