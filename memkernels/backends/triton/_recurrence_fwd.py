"""The forward kernel of every recurrent layer: for each step the product of the entering state with weight_hh, then the cell.

The input's part of the gates comes ready (`projected`, float32). A program owns a tile of batch rows x hidden units. SOURCE says where the
hidden part comes from. RESIDENT: the program holds a whole head, weights and state stay in registers for all steps. LOOP: one launch is one
step, the entering state is read from the output of the step before. SCRATCH: an earlier launch of the step left it in `hidden`. NONE: it is
in `projected` already. STAGE ends a launch early where the next part of a step needs whole rows first. Rows are sorted by length (`order`),
so a program stops at its own longest row. State and products: the input's dtype; sums and the cell: float32.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton._cells import (
    GRU,
    LSTM,
    RELU,
    before,
    drop,
    enter,
    load_gates,
    load_weights,
    moments,
    multiply,
    per_unit,
    restarts,
    rows_of,
    scaled,
    span,
    store_gates,
    zone,
)
from memkernels.backends.triton._common import dot, lanes, rounded, sigmoid, store, tanh
from memkernels.backends.triton._random import ZONEOUT_C, ZONEOUT_H

RESIDENT, LOOP, SCRATCH, NONE = (tl.constexpr(n) for n in range(4))
ALL, PRODUCT, CELL_STATE, MEMORY, SCAN = (tl.constexpr(n) for n in range(5))


@triton.jit
def _streamed(
    output_ptr, h0_ptr, weight_ptr, reset_h_ptr, seed_ptr, t, b, length, starts, head, j, units, B, P, DH, DP, gate,
    reset_h_stride_t, reset_h_stride_b, reset_h_stride_h, dropped, keep_scale,
    GATES: tl.constexpr, REVERSE: tl.constexpr, DROPOUT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The hidden part of the gates, its state read from the output of the step before."""
    s0 = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    s1, s2, s3 = s0, s0, s0
    for start in range(0, DP, BLOCK_K):
        k = start + lanes(BLOCK_K)
        tile = (t < length)[:, None] & (k < DP)[None, :]
        old = before(output_ptr, h0_ptr, t, b, head * DP + k, length, tile, B, P, REVERSE)
        old = enter(old, starts, reset_h_ptr, t, b, head * DP + k, tile, reset_h_stride_t, reset_h_stride_b, reset_h_stride_h)
        old = rounded(drop(old, seed_ptr, b, head * DP + k, dropped, keep_scale, DROPOUT), old.dtype)
        weight = weight_ptr + ((head * DH + j) * DP)[None, :] + k[:, None]
        w0, w1, w2, w3 = load_weights(weight, gate * DP, (k < DP)[:, None] & units[None, :], GATES)
        s0, s1, s2, s3 = multiply(old, w0, w1, w2, w3, s0, s1, s2, s3, GATES, PRECISION)
    return s0, s1, s2, s3


@triton.jit
def _normalised(s0, s1, s2, s3, weight_ptr, bias_ptr, u, units, tile, H):
    """Layer norm of the hidden part over all four gates."""
    mean, scale = moments(s0, s1, s2, s3, tile, 4 * H, 4)
    gate = tl.cast(H, tl.int64)
    s0 = scaled((s0 - mean) * scale, weight_ptr, bias_ptr, 4 * gate + u, units)
    s1 = scaled((s1 - mean) * scale, weight_ptr, bias_ptr, 5 * gate + u, units)
    s2 = scaled((s2 - mean) * scale, weight_ptr, bias_ptr, 6 * gate + u, units)
    return s0, s1, s2, scaled((s3 - mean) * scale, weight_ptr, bias_ptr, 7 * gate + u, units)


@triton.jit
def _lstm_cell(z0, z1, z2, c, peephole_ptr, u, units, H):
    """i, f, g and the new cell."""
    if peephole_ptr is not None:
        z0 += per_unit(peephole_ptr, u, units) * c
        z1 += per_unit(peephole_ptr + tl.cast(H, tl.int64), u, units) * c
    i, f, g = sigmoid(z0, False), sigmoid(z1, False), tanh(z2, False)
    return i, f, g, f * c + i * g


@triton.jit
def _bounded(c, norm_weight_ptr, norm_bias_ptr, u, units, tile, H):
    """tanh of the new cell, normalised first if there are weights."""
    if norm_weight_ptr is not None:
        mean, scale = moments(c, c, c, c, tile, H, 1)
        c = scaled((c - mean) * scale, norm_weight_ptr, norm_bias_ptr, 8 * tl.cast(H, tl.int64) + u, units)
    return tanh(c, False)


@triton.jit
def _simple_cell(x0, x1, x2, s0, s1, s2, old, bias_ptr, u, units, CELL: tl.constexpr):
    """GRU and RNN: the new state; r, z, n and the hidden part of n."""
    if CELL == GRU:
        if bias_ptr is not None:
            s2 += per_unit(bias_ptr, u, units)
        r, z = sigmoid(x0 + s0, False), sigmoid(x1 + s1, False)
        n = tanh(x2 + r * s2, False)
        return (1 - z) * n + z * old, r, z, n, s2
    elif CELL == RELU:
        new = tl.where(x0 + s0 < 0, 0.0, x0 + s0)
        return new, new, new, new, new
    else:
        new = tanh(x0 + s0, False)
        return new, new, new, new, new


@triton.jit(do_not_specialize=["first", "last"])
def recurrence_fwd_kernel(
    output_ptr, cells_ptr, gates_ptr, h_state_ptr, c_state_ptr, projected_ptr, hidden_ptr, scratch_ptr, gate_o_ptr,
    weight_ptr, bias_ptr, peephole_ptr, norm_weight_ptr, norm_bias_ptr, weight_co_ptr, weight_hr_ptr, h0_ptr,
    reset_ptr, reset_h_ptr, reset_c_ptr, lengths_ptr, order_ptr, seed_ptr, first, last, T, B, H, P, DH, DP,
    reset_stride_t, reset_stride_b, reset_h_stride_t, reset_h_stride_b, reset_h_stride_h, reset_c_stride_t, reset_c_stride_b,
    reset_c_stride_h, zoned_h, zoned_c, dropped, zoneout_h, zoneout_c, keep_scale,
    CELL: tl.constexpr, REVERSE: tl.constexpr, ZONEOUT: tl.constexpr, DROPOUT: tl.constexpr, SOURCE: tl.constexpr, STAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Step s is time s, or T - 1 - s where the layer runs in reverse."""
    GATES: tl.constexpr = 4 if CELL == LSTM else (3 if CELL == GRU else 1)
    b, inside, length = rows_of(tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B), order_ptr, lengths_ptr, T, B)
    tiles = tl.cdiv(DH, BLOCK_H)
    head = tl.program_id(1).to(tl.int64) // tiles
    j = (tl.program_id(1).to(tl.int64) % tiles) * BLOCK_H + lanes(BLOCK_H)
    units, u, gate, size = j < DH, head * DH + j, tl.cast(H, tl.int64), tl.cast(B, tl.int64) * H
    tile, own, wide = inside[:, None] & units[None, :], b[:, None] * H + u[None, :], b[:, None] * (gate * GATES) + u[None, :]
    v, states, d = u, tile, lanes(BLOCK_P)
    if weight_hr_ptr is not None:
        v, states = d, inside[:, None] & (d < P)[None, :]
    if SOURCE == RESIDENT:
        part = (d < DP)[:, None] & units[None, :]
        w0, w1, w2, w3 = load_weights(weight_ptr + (u * DP)[None, :] + d[:, None], gate * DP, part, GATES)
        if weight_co_ptr is not None:
            weight_co = tl.load(weight_co_ptr + (u * H)[None, :] + u[:, None], mask=units[:, None] & units[None, :], other=0.0)
        if weight_hr_ptr is not None:
            weight_hr = tl.load(weight_hr_ptr + (v * H)[None, :] + u[:, None], mask=units[:, None] & (d < P)[None, :], other=0.0)
    if CELL == LSTM and STAGE != PRODUCT:
        c = tl.load(c_state_ptr + own, mask=tile, other=0.0)
    if STAGE == ALL:
        h = tl.load(h_state_ptr + b[:, None] * P + v[None, :], mask=states, other=0.0)
    begin, end = span(first, last, length, T, REVERSE == 0)
    for step in tl.range(begin, end, num_stages=AHEAD):
        t = tl.cast(T - 1 - step if REVERSE else step, tl.int64)
        running = t < length
        live = running[:, None]
        starts = restarts(reset_ptr, t, b, running, reset_stride_t, reset_stride_b)
        if STAGE == ALL:
            h_old = enter(h, starts, reset_h_ptr, t, b, v, states, reset_h_stride_t, reset_h_stride_b, reset_h_stride_h)
        if SOURCE == RESIDENT:
            operand = rounded(drop(h_old, seed_ptr, b, v, dropped, keep_scale, DROPOUT), h_old.dtype)
            s0 = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
            s0, s1, s2, s3 = multiply(operand, w0, w1, w2, w3, s0, s0, s0, s0, GATES, PRECISION)
        elif SOURCE == LOOP:
            s0, s1, s2, s3 = _streamed(
                output_ptr, h0_ptr, weight_ptr, reset_h_ptr, seed_ptr, t, b, length, starts, head, j, units, B, P, DH, DP, gate,
                reset_h_stride_t, reset_h_stride_b, reset_h_stride_h, dropped, keep_scale,
                GATES, REVERSE, DROPOUT, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION,
            )  # fmt: skip
        elif SOURCE == SCRATCH:
            s0, s1, s2, s3 = load_gates(hidden_ptr + wide, gate, tile, GATES)
        else:
            s0 = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
            s1, s2, s3 = s0, s0, s0
        if STAGE == PRODUCT:
            store_gates(hidden_ptr + wide, gate, tile, s0, s1, s2, s3, GATES)
        else:
            x0, x1, x2, x3 = load_gates(projected_ptr + t * size * GATES + wide, gate, tile, GATES)
            if CELL == LSTM:
                if norm_weight_ptr is not None:
                    s0, s1, s2, s3 = _normalised(s0, s1, s2, s3, norm_weight_ptr, norm_bias_ptr, u, units, tile, H)
                c_old = enter(c, starts, reset_c_ptr, t, b, u, tile, reset_c_stride_t, reset_c_stride_b, reset_c_stride_h)
                i, f, g, c_new = _lstm_cell(x0 + s0, x1 + s1, x2 + s2, c_old, peephole_ptr, u, units, H)
                if STAGE == CELL_STATE:
                    store(scratch_ptr + own, tl.where(live, c_new, 0.0), mask=tile)
                else:
                    o = x3 + s3
                    if peephole_ptr is not None:
                        o += per_unit(peephole_ptr + 2 * gate, u, units) * c_new
                    if weight_co_ptr is not None and SOURCE == RESIDENT:
                        o = dot(rounded(c_new, weight_co.dtype), weight_co, o, PRECISION)
                    elif gate_o_ptr is not None:
                        o += tl.load(gate_o_ptr + own, mask=tile, other=0.0)
                    o = sigmoid(o, False)
                    if STAGE != SCAN:
                        new = o * _bounded(c_new, norm_weight_ptr, norm_bias_ptr, u, units, tile, H)
                    c_next = zone(c_new, c_old, seed_ptr, ZONEOUT_C, t, b, u, zoned_c, zoneout_c, ZONEOUT)
                    c = tl.where(live, c_next, c)
                    if cells_ptr is not None:
                        store(cells_ptr + t * size + own, c_next, mask=tile & live)
                    if gates_ptr is not None:
                        store_gates(gates_ptr + t * size * 4 + wide, gate, tile & live, i, f, g, o, 4)
                    if STAGE == MEMORY:
                        store(scratch_ptr + own, tl.where(live, new, 0.0), mask=tile)
                    elif STAGE == ALL:
                        if weight_hr_ptr is not None:
                            new = dot(rounded(new, weight_hr.dtype), weight_hr, tl.zeros([BLOCK_B, BLOCK_P], tl.float32), PRECISION)
                        new = zone(new, h_old.to(tl.float32), seed_ptr, ZONEOUT_H, t, b, v, zoned_h, zoneout_h, ZONEOUT)
            else:
                new, r, z, n, hidden_n = _simple_cell(x0, x1, x2, s0, s1, s2, h_old.to(tl.float32), bias_ptr, u, units, CELL)
                if gates_ptr is not None:
                    store_gates(gates_ptr + t * size * 4 + b[:, None] * (gate * 4) + u[None, :], gate, tile & live, r, z, n, hidden_n, 4)
            if STAGE == ALL:
                new = rounded(new, h.dtype)
                store(output_ptr + t * B * P + b[:, None] * P + v[None, :], new, mask=states & live)
                h = tl.where(live, new, h)
    if STAGE == ALL:
        store(h_state_ptr + b[:, None] * P + v[None, :], h, mask=states)
    if CELL == LSTM and STAGE != PRODUCT and STAGE != CELL_STATE:
        store(c_state_ptr + own, c, mask=tile)


@triton.jit(do_not_specialize=["step"])
def finish_fwd_kernel(
    output_ptr, h_state_ptr, new_ptr, reset_ptr, reset_h_ptr, lengths_ptr, seed_ptr, step, T, B, P,
    reset_stride_t, reset_stride_b, reset_h_stride_t, reset_h_stride_b, reset_h_stride_h, zoned_h, zoneout_h,
    REVERSE: tl.constexpr, ZONEOUT: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The end of a step whose new state was projected by a launch of its own."""
    b, inside, length = rows_of(tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B), None, lengths_ptr, T, B)
    v = tl.program_id(1).to(tl.int64) * BLOCK_P + lanes(BLOCK_P)
    tile, own = inside[:, None] & (v < P)[None, :], b[:, None] * P + v[None, :]
    t = tl.cast(T - 1 - step if REVERSE else step, tl.int64)
    running = t < length
    starts = restarts(reset_ptr, t, b, running, reset_stride_t, reset_stride_b)
    h = tl.load(h_state_ptr + own, mask=tile, other=0.0)
    h = enter(h, starts, reset_h_ptr, t, b, v, tile, reset_h_stride_t, reset_h_stride_b, reset_h_stride_h)
    new = tl.load(new_ptr + own, mask=tile, other=0.0)
    new = zone(new, h.to(tl.float32), seed_ptr, ZONEOUT_H, t, b, v, zoned_h, zoneout_h, ZONEOUT)
    store(output_ptr + t * B * P + own, new, mask=tile & running[:, None])
    store(h_state_ptr + own, new, mask=tile & running[:, None])
