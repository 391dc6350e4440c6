"""Device functions of the recurrent kernels: tiles of gates, which rows run, the state that enters a step, zoneout, layer norm."""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton._common import dot, store
from memkernels.backends.triton._random import DROPOUT, events

LSTM, GRU, TANH, RELU = (tl.constexpr(n) for n in range(4))


@triton.jit
def load_gates(ptr, gate, mask, GATES: tl.constexpr):
    """1, 3 or 4 tiles `gate` elements apart, in float32; the rest repeat the first."""
    a = tl.load(ptr, mask=mask, other=0.0).to(tl.float32)
    b, c, d = a, a, a
    if GATES > 1:
        b = tl.load(ptr + gate, mask=mask, other=0.0).to(tl.float32)
        c = tl.load(ptr + 2 * gate, mask=mask, other=0.0).to(tl.float32)
    if GATES > 3:
        d = tl.load(ptr + 3 * gate, mask=mask, other=0.0).to(tl.float32)
    return a, b, c, d


@triton.jit
def load_weights(ptr, gate, mask, GATES: tl.constexpr):
    """As load_gates, in their own dtype."""
    a = tl.load(ptr, mask=mask, other=0.0)
    b, c, d = a, a, a
    if GATES > 1:
        b, c = tl.load(ptr + gate, mask=mask, other=0.0), tl.load(ptr + 2 * gate, mask=mask, other=0.0)
    if GATES > 3:
        d = tl.load(ptr + 3 * gate, mask=mask, other=0.0)
    return a, b, c, d


@triton.jit
def store_gates(ptr, gate, mask, a, b, c, d, GATES: tl.constexpr):
    store(ptr, a, mask=mask)
    if GATES > 1:
        store(ptr + gate, b, mask=mask)
        store(ptr + 2 * gate, c, mask=mask)
    if GATES > 3:
        store(ptr + 3 * gate, d, mask=mask)


@triton.jit
def multiply(old, a, b, c, d, sum_a, sum_b, sum_c, sum_d, GATES: tl.constexpr, PRECISION: tl.constexpr):
    """The sums plus one tile of states times the weights of each gate."""
    sum_a = dot(old, a, sum_a, PRECISION)
    if GATES > 1:
        sum_b, sum_c = dot(old, b, sum_b, PRECISION), dot(old, c, sum_c, PRECISION)
    if GATES > 3:
        sum_d = dot(old, d, sum_d, PRECISION)
    return sum_a, sum_b, sum_c, sum_d


@triton.jit
def rows_of(place, order_ptr, lengths_ptr, T, B):
    """The batch rows at these places and how many steps each has, 0 past the end of the batch."""
    inside = place < B
    b = place
    length = tl.where(inside, tl.cast(T, tl.int64), 0)
    if order_ptr is not None:
        b = tl.load(order_ptr + place, mask=inside, other=0)
    if lengths_ptr is not None:
        length = tl.maximum(tl.minimum(tl.load(lengths_ptr + b, mask=inside, other=0), length), 0)
    return b, inside, length


@triton.jit
def span(first, last, length, T, RISING: tl.constexpr):
    """The part of first .. last-1 in which a row of this program runs; step s is time s if RISING, else T - 1 - s."""
    longest = tl.max(length, 0).to(tl.int32)
    if RISING:
        return first, tl.minimum(last, longest)
    else:
        return tl.maximum(first, T - longest), last


@triton.jit
def restarts(reset_ptr, t, b, running, reset_stride_t, reset_stride_b):
    """Rows whose state is replaced as it enters step t."""
    starts = running & False
    if reset_ptr is not None:
        starts = running & (tl.load(reset_ptr + t * reset_stride_t + b * reset_stride_b, mask=running, other=0) != 0)
    return starts


@triton.jit
def enter(old, starts, fresh_ptr, t, b, unit, tile, fresh_stride_t, fresh_stride_b, fresh_stride_h):
    """The state that enters: the old one, or where the row starts anew the given one (zero if none is given)."""
    fresh = tl.zeros_like(old)
    if fresh_ptr is not None:
        place = t * fresh_stride_t + b[:, None] * fresh_stride_b + unit[None, :] * fresh_stride_h
        fresh = tl.load(fresh_ptr + place, mask=tile & starts[:, None], other=0.0).to(old.dtype)
    return tl.where(starts[:, None], fresh, old)


@triton.jit
def before(all_ptr, first_ptr, t, b, unit, length, tile, B, N, REVERSE: tl.constexpr):
    """A state before resets: that of the step run before step t, or the first one (both contiguous, "T B N" and "B N")."""
    if REVERSE:
        new, earlier = t + 1 >= length, t + 1
    else:
        new, earlier = tl.zeros_like(length) == t, t - 1
    own = b[:, None] * N + unit[None, :]
    past = tl.load(all_ptr + earlier * B * N + own, mask=tile & (new == 0)[:, None], other=0.0)
    initial = tl.load(first_ptr + own, mask=tile & new[:, None], other=0.0)
    return tl.where(new[:, None], initial.to(past.dtype), past)


@triton.jit
def drop(value, seed_ptr, b, unit, threshold, scale, ON: tl.constexpr):
    """Recurrent dropout: the mask of a sequence, scaled (zero where dropped, whatever the value)."""
    if ON:
        return tl.where(events(seed_ptr, DROPOUT, 0, b, unit, threshold), 0.0, value.to(tl.float32) * scale)
    else:
        return value


@triton.jit
def zone(new, old, seed_ptr, STREAM: tl.constexpr, t, b, unit, threshold, rate, ZONEOUT: tl.constexpr):
    """ZONEOUT 1: the old value where the event happens; 2: its expectation."""
    if ZONEOUT == 1:
        return tl.where(events(seed_ptr, STREAM, t, b, unit, threshold), old, new)
    elif ZONEOUT == 2:
        return rate * old + (1 - rate) * new
    else:
        return new


@triton.jit
def unzone(d, seed_ptr, STREAM: tl.constexpr, t, b, unit, threshold, rate, ZONEOUT: tl.constexpr):
    """The gradient of `zone` in its new and in its old value."""
    if ZONEOUT == 1:
        kept = events(seed_ptr, STREAM, t, b, unit, threshold)
        return tl.where(kept, 0.0, d), tl.where(kept, d, 0.0)
    elif ZONEOUT == 2:
        return (1 - rate) * d, rate * d
    else:
        return d, tl.zeros_like(d)


@triton.jit
def moments(a, b, c, d, tile, N, GATES: tl.constexpr):
    """Mean and 1 / standard deviation of each row of GATES tiles, N elements in all, as a column."""
    total, squares = a, tl.zeros_like(a)
    if GATES > 1:
        total = a + b + c + d
    mean = (tl.sum(tl.where(tile, total, 0.0), 1) / N)[:, None]
    squares = (a - mean) * (a - mean)
    if GATES > 1:
        squares += (b - mean) * (b - mean) + (c - mean) * (c - mean) + (d - mean) * (d - mean)
    variance = tl.sum(tl.where(tile, squares, 0.0), 1) / N
    return mean, (1 / tl.sqrt(variance + 1e-5))[:, None]


@triton.jit
def scaled(value, weight_ptr, bias_ptr, unit, units):
    """value * weight + bias, one weight and bias a unit."""
    weight = tl.load(weight_ptr + unit, mask=units, other=0.0).to(tl.float32)[None, :]
    return value * weight + tl.load(bias_ptr + unit, mask=units, other=0.0).to(tl.float32)[None, :]


@triton.jit
def per_unit(ptr, unit, units):
    """One number a unit, as a row."""
    return tl.load(ptr + unit, mask=units, other=0.0).to(tl.float32)[None, :]
