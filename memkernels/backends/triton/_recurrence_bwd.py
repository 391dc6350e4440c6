"""The backward kernel of every recurrent layer: for each step, backwards, the cell, then the gradient of the entering state.

`dz` is the gradient of the gates' sums, `dhidden` of their hidden part where that differs (GRU, layer norm); the gradients of the weights
are products over all steps afterwards. SOURCE and tiles as in _recurrence_fwd. RESIDENT: one launch. LOOP: one launch is one step,
which first takes the product of dhidden of the step before (step T does only that). STAGE cuts a step where it needs whole rows: STATE ends
with the gradient of the new state, OUTPUT_GATE with that of the output gate, REST is what follows both. States' gradients: float32;
factors of the product with weight_hh: the input's dtype.
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
    per_unit,
    restarts,
    rows_of,
    scaled,
    span,
    store_gates,
    unzone,
)
from memkernels.backends.triton._common import dot, lanes, rounded, store, tanh
from memkernels.backends.triton._random import ZONEOUT_C, ZONEOUT_H
from memkernels.backends.triton._recurrence_fwd import LOOP, RESIDENT

ALL, STATE, OUTPUT_GATE, REST = (tl.constexpr(n) for n in range(4))


@triton.jit
def _multiply(d0, d1, d2, d3, w0, w1, w2, w3, total, GATES: tl.constexpr, PRECISION: tl.constexpr):
    """total + the gradients of all gates times their weights."""
    total = dot(rounded(d0, w0.dtype), w0, total, PRECISION)
    if GATES > 1:
        total = dot(rounded(d1, w1.dtype), w1, total, PRECISION)
        total = dot(rounded(d2, w2.dtype), w2, total, PRECISION)
    if GATES > 3:
        total = dot(rounded(d3, w3.dtype), w3, total, PRECISION)
    return total


@triton.jit
def _streamed(
    dhidden_ptr, weight_ptr, t, b, running, head, j, part, B, DH, DP, gate,
    GATES: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of the state that entered step t, from dhidden of all units of its head."""
    total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    for start in range(0, tl.where(tl.max(running.to(tl.int32), 0) > 0, DH, 0), BLOCK_K):
        k = start + lanes(BLOCK_K)
        row = dhidden_ptr + (t * B + b)[:, None] * (gate * GATES) + head * DH + k[None, :]
        d0, d1, d2, d3 = load_gates(row, gate, running[:, None] & (k < DH)[None, :], GATES)
        weight = weight_ptr + ((head * DH + k) * DP)[:, None] + j[None, :]
        w0, w1, w2, w3 = load_weights(weight, gate * DP, (k < DH)[:, None] & part[None, :], GATES)
        total = _multiply(d0, d1, d2, d3, w0, w1, w2, w3, total, GATES, PRECISION)
    return total


@triton.jit
def _settle(total, starts, dfresh_ptr, t, tile, own, size):
    """Where a row started anew, the gradient belongs to the given state and the state before gets none."""
    if dfresh_ptr is not None:
        store(dfresh_ptr + t * size + own, total, mask=tile & starts[:, None])
    return tl.where(starts[:, None], 0.0, total)


@triton.jit
def _unbounded(dbounded, c, bounded, norm_weight_ptr, dnormed_ptr, place, unit, units, tile, H):
    """The gradient of the new cell through tanh and, if there are weights, its layer norm."""
    d = dbounded * (1 - bounded * bounded)
    if norm_weight_ptr is not None:
        mean, scale = moments(c, c, c, c, tile, H, 1)
        store(dnormed_ptr + place, d, mask=tile)
        d *= per_unit(norm_weight_ptr + 8 * tl.cast(H, tl.int64), unit, units)
        normed = (c - mean) * scale
        along = (tl.sum(tl.where(tile, d * normed, 0.0), 1) / H)[:, None]
        d = scale * (d - (tl.sum(tl.where(tile, d, 0.0), 1) / H)[:, None] - normed * along)
    return d


@triton.jit
def _unnormalised(d0, d1, d2, d3, r0, r1, r2, r3, norm_weight_ptr, unit, units, tile, H):
    """The gradient of the hidden part before its layer norm; r: that part itself."""
    gate = tl.cast(H, tl.int64)
    mean, scale = moments(r0, r1, r2, r3, tile, 4 * H, 4)
    d0 *= per_unit(norm_weight_ptr + 4 * gate, unit, units)
    d1 *= per_unit(norm_weight_ptr + 5 * gate, unit, units)
    d2 *= per_unit(norm_weight_ptr + 6 * gate, unit, units)
    d3 *= per_unit(norm_weight_ptr + 7 * gate, unit, units)
    r0, r1, r2, r3 = (r0 - mean) * scale, (r1 - mean) * scale, (r2 - mean) * scale, (r3 - mean) * scale
    middle = (tl.sum(tl.where(tile, d0 + d1 + d2 + d3, 0.0), 1) / (4 * H))[:, None]
    along = (tl.sum(tl.where(tile, d0 * r0 + d1 * r1 + d2 * r2 + d3 * r3, 0.0), 1) / (4 * H))[:, None]
    return (
        scale * (d0 - middle - r0 * along),
        scale * (d1 - middle - r1 * along),
        scale * (d2 - middle - r2 * along),
        scale * (d3 - middle - r3 * along),
    )


@triton.jit
def _simple_cell(dh, output_ptr, gates_ptr, old, own, place, gate, tile, CELL: tl.constexpr):
    """GRU and RNN: the gates' gradients, those of the hidden part, and of the old state past weight_hh."""
    if CELL == GRU:
        r, z, n, hidden_n = load_gates(gates_ptr + place, gate, tile, 4)
        dn = dh * (1 - z) * (1 - n * n)
        return dn * hidden_n * r * (1 - r), dh * (old - n) * z * (1 - z), dn, dn * r, dh * z
    else:
        y = tl.load(output_ptr + own, mask=tile, other=0.0).to(tl.float32)
        if CELL == RELU:
            dz = tl.where(y <= 0, 0.0, dh)  # as in torch, only units at 0 are dead: one that is NaN is not
        else:
            dz = dh * (1 - y * y)
        return dz, dz, dz, dz, tl.zeros_like(dh)


@triton.jit
def _output_gate(dm, c, o, norm_weight_ptr, norm_bias_ptr, unit, units, tile, H):
    """tanh of the new cell (normalised if there are weights), and the gradient of the output gate."""
    if norm_weight_ptr is not None:
        mean, scale = moments(c, c, c, c, tile, H, 1)
        c = scaled((c - mean) * scale, norm_weight_ptr, norm_bias_ptr, 8 * tl.cast(H, tl.int64) + unit, units)
    bounded = tanh(c, False)
    return bounded, dm * bounded * o * (1 - o)


@triton.jit
def _inner_gates(dc_new, dc_old, i, f, g, c_old, peephole_ptr, gate, unit, units):
    """The gradients of i, f, g and of the old cell."""
    d0, d1 = dc_new * g * i * (1 - i), dc_new * c_old * f * (1 - f)
    dc_old += dc_new * f
    if peephole_ptr is not None:
        dc_old += per_unit(peephole_ptr, unit, units) * d0 + per_unit(peephole_ptr + gate, unit, units) * d1
    return d0, d1, dc_new * i * (1 - g * g), dc_old


@triton.jit
def _upstream(ptr, t, b, unit, mask, stride_t, stride_b, stride_h):
    return tl.load(ptr + t * stride_t + b[:, None] * stride_b + unit[None, :] * stride_h, mask=mask, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["first", "last"])
def recurrence_bwd_kernel(
    dz_ptr, dhidden_ptr, dh_state_ptr, dc_state_ptr, dnew_ptr, dmemory_ptr, dgate_o_ptr, dnormed_ptr, doutput_ptr, dcells_ptr,
    dreset_h_ptr, dreset_c_ptr, output_ptr, cells_ptr, gates_ptr, h0_ptr, c0_ptr, raw_ptr,
    weight_ptr, peephole_ptr, norm_weight_ptr, norm_bias_ptr, weight_co_ptr, weight_hr_ptr,
    reset_ptr, reset_h_ptr, reset_c_ptr, lengths_ptr, order_ptr, seed_ptr, first, last, T, B, H, P, DH, DP,
    dnew_stride_t, doutput_stride_t, doutput_stride_b, doutput_stride_h, dcells_stride_t, dcells_stride_b, dcells_stride_h,
    reset_stride_t, reset_stride_b, reset_h_stride_t, reset_h_stride_b, reset_h_stride_h, reset_c_stride_t, reset_c_stride_b,
    reset_c_stride_h, zoned_h, zoned_c, dropped, zoneout_h, zoneout_c, keep_scale,
    CELL: tl.constexpr, REVERSE: tl.constexpr, ZONEOUT: tl.constexpr, DROPOUT: tl.constexpr, SOURCE: tl.constexpr, STAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_K: tl.constexpr, AHEAD: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Step s is time T - 1 - s, or s where the layer runs in reverse."""
    GATES: tl.constexpr = 4 if CELL == LSTM else (3 if CELL == GRU else 1)
    b, inside, length = rows_of(tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B), order_ptr, lengths_ptr, T, B)
    share = DP if STAGE == STATE else DH
    tiles = tl.cdiv(share, BLOCK_H)
    head = tl.program_id(1).to(tl.int64) // tiles
    j = (tl.program_id(1).to(tl.int64) % tiles) * BLOCK_H + lanes(BLOCK_H)
    units, u, gate, size = j < share, head * share + j, tl.cast(H, tl.int64), tl.cast(B, tl.int64) * H
    tile, own, wide = inside[:, None] & units[None, :], b[:, None] * H + u[None, :], b[:, None] * (gate * GATES) + u[None, :]
    v, states, d, part = u, tile, lanes(BLOCK_P), units
    if weight_hr_ptr is not None and STAGE == ALL:
        v, states, part = d, inside[:, None] & (d < P)[None, :], d < P
    own_h = b[:, None] * P + v[None, :]
    if SOURCE == RESIDENT:
        w0, w1, w2, w3 = load_weights(weight_ptr + (u * DP)[:, None] + d[None, :], gate * DP, units[:, None] & (d < DP)[None, :], GATES)
        if weight_co_ptr is not None:
            weight_co = tl.load(weight_co_ptr + (u * H)[:, None] + u[None, :], mask=units[:, None] & units[None, :], other=0.0)
        if weight_hr_ptr is not None:
            weight_hr = tl.load(weight_hr_ptr + (v * H)[:, None] + u[None, :], mask=part[:, None] & units[None, :], other=0.0)
    if STAGE == ALL or STAGE == STATE:
        dh = tl.load(dh_state_ptr + own_h, mask=states, other=0.0)
    if CELL == LSTM and (STAGE == ALL or STAGE == REST):
        dc = tl.load(dc_state_ptr + own, mask=tile, other=0.0)
    begin, end = span(first, last, length + (1 if SOURCE == LOOP else 0), T, REVERSE)
    for step in tl.range(begin, end, num_stages=AHEAD):
        t = tl.cast(step if REVERSE else T - 1 - step, tl.int64)
        running = (t < length) & (tl.zeros_like(length) <= t)
        live, alive = running[:, None], tile & running[:, None]
        starts = restarts(reset_ptr, t, b, running, reset_stride_t, reset_stride_b)
        if SOURCE == LOOP:
            later = t - 1 if REVERSE else t + 1
            ran = (later < length) & (tl.zeros_like(length) <= later)
            total = _streamed(
                dhidden_ptr, weight_ptr, later, b, ran, head, j, part, B, DH, DP, gate, GATES, BLOCK_B, BLOCK_H, BLOCK_K, PRECISION
            )
            total = drop(total, seed_ptr, b, v, dropped, keep_scale, DROPOUT) + dh
            started = restarts(reset_ptr, later, b, ran, reset_stride_t, reset_stride_b)
            dh = _settle(total, started, dreset_h_ptr, later, tile, own_h, tl.cast(B, tl.int64) * P)
        if STAGE == ALL or STAGE == STATE:
            dnew = dh
            if doutput_ptr is not None:
                dnew += _upstream(doutput_ptr, t, b, v, states & live, doutput_stride_t, doutput_stride_b, doutput_stride_h)
            dnew, passed = unzone(dnew, seed_ptr, ZONEOUT_H, t, b, v, zoned_h, zoneout_h, ZONEOUT)
            if dnew_ptr is not None:
                store(dnew_ptr + t * dnew_stride_t + own_h, dnew, mask=states & live)
        if CELL == LSTM and STAGE != STATE:
            if STAGE != ALL:
                dm = tl.load(dmemory_ptr + own, mask=alive, other=0.0)
            elif weight_hr_ptr is not None:
                dm = dot(rounded(dnew, weight_hr.dtype), weight_hr, tl.zeros([BLOCK_B, BLOCK_H], tl.float32), PRECISION)
            else:
                dm = dnew
            i, f, g, o = load_gates(gates_ptr + t * size * 4 + wide, gate, alive, 4)
            c_old = before(cells_ptr, c0_ptr, t, b, u, length, alive, B, H, REVERSE).to(tl.float32)
            c_old = enter(c_old, starts, reset_c_ptr, t, b, u, tile, reset_c_stride_t, reset_c_stride_b, reset_c_stride_h)
            c_new = f * c_old + i * g
            bounded, d3 = _output_gate(dm, c_new, o, norm_weight_ptr, norm_bias_ptr, u, units, tile, H)
            if STAGE == OUTPUT_GATE:
                store(dgate_o_ptr + own, tl.where(live, d3, 0.0), mask=tile)
            else:
                dc_new = dc
                if dcells_ptr is not None:
                    dc_new += _upstream(dcells_ptr, t, b, u, alive, dcells_stride_t, dcells_stride_b, dcells_stride_h)
                dc_new, dc_old = unzone(dc_new, seed_ptr, ZONEOUT_C, t, b, u, zoned_c, zoneout_c, ZONEOUT)
                dc_new += _unbounded(dm * o, c_new, bounded, norm_weight_ptr, dnormed_ptr, t * size + own, u, units, alive, H)
                if weight_co_ptr is not None and SOURCE == RESIDENT:
                    dc_new = dot(rounded(d3, weight_co.dtype), weight_co, dc_new, PRECISION)
                elif dgate_o_ptr is not None:
                    dc_new += tl.load(dgate_o_ptr + own, mask=alive, other=0.0)
                if peephole_ptr is not None:
                    dc_new += per_unit(peephole_ptr + 2 * gate, u, units) * d3
                d0, d1, d2, dc_old = _inner_gates(dc_new, dc_old, i, f, g, c_old, peephole_ptr, gate, u, units)
                dc = tl.where(live, _settle(dc_old, starts, dreset_c_ptr, t, tile, own, size), dc)
                store_gates(dz_ptr + t * size * 4 + wide, gate, alive, d0, d1, d2, d3, 4)
                if norm_weight_ptr is not None:
                    r0, r1, r2, r3 = load_gates(raw_ptr + t * size * 4 + wide, gate, alive, 4)
                    d0, d1, d2, d3 = _unnormalised(d0, d1, d2, d3, r0, r1, r2, r3, norm_weight_ptr, u, units, tile, H)
                    store_gates(dhidden_ptr + t * size * 4 + wide, gate, alive, d0, d1, d2, d3, 4)
        elif STAGE != STATE:
            h_old = before(output_ptr, h0_ptr, t, b, u, length, alive, B, H, REVERSE).to(tl.float32)
            h_old = enter(h_old, starts, reset_h_ptr, t, b, u, tile, reset_h_stride_t, reset_h_stride_b, reset_h_stride_h)
            place = b[:, None] * (gate * 4) + u[None, :]
            d0, d1, d2, d3, passed = _simple_cell(
                dnew, output_ptr + t * size, gates_ptr, h_old, own, t * size * 4 + place, gate, alive, CELL
            )
            store_gates(dz_ptr + t * size * GATES + wide, gate, alive, d0, d1, d2, d3, GATES)
            if CELL == GRU:
                d2 = d3
                store_gates(dhidden_ptr + t * size * GATES + wide, gate, alive, d0, d1, d2, d3, GATES)
        if SOURCE == RESIDENT:
            total = tl.zeros([BLOCK_B, BLOCK_P], tl.float32)
            total = _multiply(d0, d1, d2, d3, w0, w1, w2, w3, total, GATES, PRECISION)
            total = drop(total, seed_ptr, b, v, dropped, keep_scale, DROPOUT) + passed
            passed = _settle(total, starts, dreset_h_ptr, t, states, own_h, tl.cast(B, tl.int64) * P)
        if STAGE == ALL or STAGE == STATE:
            dh = tl.where(live, passed, dh)
    if STAGE == ALL or STAGE == STATE:
        store(dh_state_ptr + own_h, dh, mask=states)
    if CELL == LSTM and (STAGE == ALL or STAGE == REST):
        store(dc_state_ptr + own, dc, mask=tile)
