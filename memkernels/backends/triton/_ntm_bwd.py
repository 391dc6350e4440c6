"""The backward kernel of ntm_sequence: the memories again from the writes that forward kept, then every step backwards.

As in _ntm_fwd, a program owns a batch row. The writes are replayed twice: once to keep the memory before each segment of about sqrt(T)
steps, then, from the last segment to the first, to have those within it. What a step hands to the one before, gradients of the memory, of
the weights, of [reads, h] and of the cell, lies in memory that is updated in place and ends as the gradient of the initial state. The
gradients of the weight matrices are products over all steps afterwards, of `dgates` and `draws`, which is that of all that is linear in h.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton._common import device, lanes, sigmoid, tanh
from memkernels.backends.triton._ntm_fwd import contents, kept_and_added, tile_of, vector_of, write
from memkernels.backends.triton.location_address import address_inputs, address_slope


@device
def arrived(carried_ptr, upstream_ptr, offset, n, N):
    """A gradient from the step after and, if there is one, from outside."""
    d = vector_of(carried_ptr, n, N)
    if upstream_ptr is not None:
        d += vector_of(upstream_ptr + offset, n, N)
    return d


@device
def store_tile(ptr, value, n, w, N, W):
    tl.store(ptr + n[:, None] * W + w[None, :], value, mask=(n < N)[:, None] & (w < W)[None, :])


@device
def read_backward(
    dmemory_ptr, dweights_ptr, dstate_ptr, dreads_ptr, dreads_at, upstream_ptr, upstream_at, memory_ptr, weights_ptr, N, W, R,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Adds the gradients of the memory that was read, and of the readers' weights."""
    w = lanes(BLOCK_W)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        d, memory = tile_of(dmemory_ptr, n, w, N, W), tile_of(memory_ptr, n, w, N, W)
        for r in range(R):
            head = tl.cast(r, tl.int64)
            dread = arrived(dstate_ptr + head * W, dreads_ptr, dreads_at + head * W, w, W)[None, :]
            d += vector_of(weights_ptr + head * N, n, N)[:, None] * dread
            found = tl.sum(memory * dread, 1) + arrived(dweights_ptr + head * N, upstream_ptr, upstream_at + head * N, n, N)
            tl.store(dweights_ptr + head * N + n, found, mask=n < N)
        store_tile(dmemory_ptr, d, n, w, N, W)
    tl.debug_barrier()


@device
def _others(weights_ptr, erase_ptr, u, n, w, N, W, U, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """What all writers but u keep."""
    kept = tl.full([BLOCK_N, BLOCK_W], 1.0, tl.float32)
    for g in range(U):
        head = tl.cast(g, tl.int64)
        erased = vector_of(weights_ptr + head * N, n, N)[:, None] * vector_of(erase_ptr + head * W, w, W)[None, :]
        kept *= tl.where(head == u, 1.0, 1 - erased)
    return kept


@device
def write_backward(
    dmemory_ptr, dweights_ptr, draw_ptr, upstream_ptr, upstream_at, memory_ptr, weights_ptr, erase_ptr, N, W, U,
    GRAVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The gradient of the memory before the writers; adds that of their weights; that of erase and add before their activations."""
    w = lanes(BLOCK_W)
    for u in range(U):
        head = tl.cast(u, tl.int64)
        erase, add = vector_of(erase_ptr + head * W, w, W), vector_of(erase_ptr + (U + head) * W, w, W)
        derase, dadd = tl.zeros([BLOCK_N, BLOCK_W], tl.float32), tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for first in range(0, N, BLOCK_N):
            n = first + lanes(BLOCK_N)
            d = tile_of(dmemory_ptr, n, w, N, W)
            others = _others(weights_ptr, erase_ptr, head, n, w, N, W, U, BLOCK_N, BLOCK_W)
            dkept, weights = d * tile_of(memory_ptr, n, w, N, W) * others, vector_of(weights_ptr + head * N, n, N)[:, None]
            derase -= dkept * weights
            dadd += d * weights
            found = tl.sum(d * add[None, :] - dkept * erase[None, :], 1)
            found += arrived(dweights_ptr + head * N, upstream_ptr, upstream_at + head * N, n, N)
            tl.store(dweights_ptr + head * N + n, found, mask=n < N)
        tl.store(draw_ptr + head * W + w, tl.sum(derase, 0) * erase * (1 - erase), mask=w < W)
        slope = 1 - add * add if GRAVES else tl.full([BLOCK_W], 1.0, tl.float32)
        tl.store(draw_ptr + (U + head) * W + w, tl.sum(dadd, 0) * slope, mask=w < W)
    tl.debug_barrier()
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        kept, _ = kept_and_added(weights_ptr, erase_ptr, n, w, N, W, U, BLOCK_N, BLOCK_W)
        store_tile(dmemory_ptr, tile_of(dmemory_ptr, n, w, N, W) * kept, n, w, N, W)
    tl.debug_barrier()


@device
def attend_backward(dlogit_ptr, content_ptr, similar_ptr, N, BLOCK_V: tl.constexpr):
    """The gradient of content becomes that of strength * similar; returns that of strength."""
    centre, dstrength = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        centre += tl.sum(vector_of(dlogit_ptr, n, N) * vector_of(content_ptr, n, N), 0)
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        d = vector_of(content_ptr, n, N) * (vector_of(dlogit_ptr, n, N) - centre)
        dstrength += tl.sum(d * vector_of(similar_ptr, n, N), 0)
        tl.debug_barrier()  # with few rows every warp has all of them, to have the sums: none may find what another one has replaced
        tl.store(dlogit_ptr + n, d, mask=n < N)
    tl.debug_barrier()
    return dstrength


@device
def _cosine_backward(
    dmemory_ptr, dkey_ptr, dlogit_ptr, similar_ptr, memory_ptr, key_ptr, strength, dstrength, N, W,
    GRAVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """Adds the gradient of the memory under one head's key, and writes that of the key."""
    EPS: tl.constexpr = 1e-6 if GRAVES else 1e-16
    w = lanes(BLOCK_W)
    key = vector_of(key_ptr, w, W)
    key_square = tl.sum(key * key, 0) + EPS
    dkey = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        memory, d = tile_of(memory_ptr, n, w, N, W), strength * vector_of(dlogit_ptr, n, N)
        square = tl.sum(memory * memory, 1) + EPS
        along = d * vector_of(similar_ptr, n, N) / square
        scaled = (d / (tl.sqrt(key_square) * tl.sqrt(square)))[:, None]
        dkey += scaled * memory
        found = tile_of(dmemory_ptr, n, w, N, W) + (scaled * key[None, :] - memory * along[:, None])
        store_tile(dmemory_ptr, found, n, w, N, W)
    tl.store(dkey_ptr + w, tl.sum(dkey, 0) - key * (strength * dstrength / key_square), mask=w < W)


@device
def _head_backward(
    dmemory_ptr, dweights_ptr, dkey_ptr, draw_ptr, slope_ptr, dlogit_ptr, content_ptr, similar_ptr, memory_ptr, key_ptr, scalar_ptr,
    stats_ptr, previous_ptr, raw_ptr, N, W, taps,
    GRAVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One head: the gradient of its weights becomes that of the weights before. raw: its strength, gate, sharpen before activation."""
    one = tl.cast(1, tl.int64)
    strength, gate, sharpen = tl.load(scalar_ptr), tl.load(scalar_ptr + one), tl.load(scalar_ptr + 2 * one)
    shift_ptr, dshift_ptr = scalar_ptr + 3 * one, draw_ptr + 3 * one
    dsharpen = address_slope(
        slope_ptr, dweights_ptr, stats_ptr, content_ptr, previous_ptr, shift_ptr, gate, sharpen, N, taps, 1, 1, 1, 1, BLOCK_V,
        0.0 if GRAVES else 1e-16,
    )  # fmt: skip
    tl.debug_barrier()
    dgate = address_inputs(
        dlogit_ptr, dweights_ptr, dshift_ptr, slope_ptr, content_ptr, previous_ptr, shift_ptr, gate, N, taps, 1, 1, 1, BLOCK_V
    )
    tl.debug_barrier()
    dstrength = attend_backward(dlogit_ptr, content_ptr, similar_ptr, N, BLOCK_V)
    _cosine_backward(
        dmemory_ptr, dkey_ptr, dlogit_ptr, similar_ptr, memory_ptr, key_ptr, strength, dstrength, N, W, GRAVES, BLOCK_N, BLOCK_W
    )
    s = lanes(BLOCK_S)
    shift, dshift = vector_of(shift_ptr, s, taps), vector_of(dshift_ptr, s, taps)
    tl.debug_barrier()
    tl.store(dshift_ptr + s, shift * (dshift - tl.sum(shift * dshift, 0)), mask=s < taps)
    tl.store(draw_ptr, dstrength * sigmoid(tl.load(raw_ptr)))
    tl.store(draw_ptr + one, dgate * gate * (1 - gate))
    tl.store(draw_ptr + 2 * one, dsharpen * sigmoid(tl.load(raw_ptr + 2 * one)))
    tl.debug_barrier()


@device
def columns(d_ptr, matrix_ptr, k, K, P, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):
    """Columns k of d "P" @ matrix "P K"."""
    total = tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
    for first in range(0, P, BLOCK_J):
        p = first + lanes(BLOCK_J)
        tile = (p < P)[:, None] & (k < K)[None, :]
        matrix = tl.load(matrix_ptr + p[:, None] * K + k[None, :], mask=tile, other=0.0).to(tl.float32)
        total += vector_of(d_ptr, p, P)[:, None] * matrix
    return tl.sum(total, 0)


@device
def control_backward(
    dgates_ptr, dcell_ptr, dh_ptr, dhidden_ptr, dhidden_at, draw_ptr, gates_ptr, c_ptr, c_before_ptr, matrix_ptr, H, P,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradients of the gates' sums, and of the cell before."""
    for first in range(0, H, BLOCK_K):
        j = first + lanes(BLOCK_K)
        dh = columns(draw_ptr, matrix_ptr, j, H, P, BLOCK_J, BLOCK_K) + arrived(dh_ptr, dhidden_ptr, dhidden_at, j, H)
        i, f = vector_of(gates_ptr, j, H), vector_of(gates_ptr + H, j, H)
        g, o = vector_of(gates_ptr + 2 * H, j, H), vector_of(gates_ptr + 3 * H, j, H)
        bounded = tanh(vector_of(c_ptr, j, H))
        dc = vector_of(dcell_ptr, j, H) + dh * o * (1 - bounded * bounded)
        tl.store(dgates_ptr + j, dc * g * i * (1 - i), mask=j < H)
        tl.store(dgates_ptr + H + j, dc * vector_of(c_before_ptr, j, H) * f * (1 - f), mask=j < H)
        tl.store(dgates_ptr + 2 * H + j, dc * i * (1 - g * g), mask=j < H)
        tl.store(dgates_ptr + 3 * H + j, dh * bounded * o * (1 - o), mask=j < H)
        tl.store(dcell_ptr + j, dc * f, mask=j < H)
    tl.debug_barrier()


@triton.jit
def ntm_bwd_kernel(
    dmemory_ptr, dweights_ptr, dstate_ptr, dcell_ptr, dgates_ptr, draws_ptr, memories_ptr, similar_ptr, content_ptr, slope_ptr, dlogit_ptr,
    dhidden_ptr, dreads_ptr, upstream_ptr, weights_ptr, gates_ptr, cells_ptr, heads_ptr, raw_ptr, first_ptr, c0_ptr, controller_ptr,
    matrix_ptr, T, B, H, N, W, R, U, share, segment, segments, GRAVES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`memories` "B segments+segment N W": the memory before each segment, the first of them given, then those after its steps."""
    b = tl.program_id(0).to(tl.int64)
    batch, hidden, count, width = tl.cast(B, tl.int64), tl.cast(H, tl.int64), tl.cast(N, tl.int64), tl.cast(W, tl.int64)
    every, readers, writers = tl.cast(R + U, tl.int64), tl.cast(R, tl.int64), tl.cast(U, tl.int64)
    taps, share, size = share - 3, tl.cast(share, tl.int64), count * width
    K, scalars = readers * width + hidden, every * width
    erase = scalars + every * share
    P = erase + 2 * writers * width
    Q, each = P + 2 * every, every * count
    dmemory_ptr += b * size
    dweights_ptr += b * each
    dstate_ptr += b * K
    dcell_ptr += b * hidden
    memories_ptr += b * (segments + segment) * size
    similar_ptr += b * each
    content_ptr += b * each
    slope_ptr += b * count
    dlogit_ptr += b * count
    inner = memories_ptr + tl.cast(segments, tl.int64) * size
    for c in range(1, segments):
        kept = memories_ptr + tl.cast(c, tl.int64) * size
        for s in range(segment):
            place = ((tl.cast(c, tl.int64) - 1) * segment + s) * batch + b
            before = tl.where(s == 0, kept - size, kept)
            written = weights_ptr + (place * each + readers * count)
            write(kept, before, written, heads_ptr + (place * Q + erase), count, width, writers, BLOCK_N, BLOCK_W)
    for back in range(segments):
        last = tl.cast(segments - 1 - back, tl.int64)
        start, checkpoint = last * segment, memories_ptr + last * size
        steps = tl.minimum(start + segment, T) - start
        for s in range(steps):
            place, after = (start + s) * batch + b, inner + s * size
            before = tl.where(s == 0, checkpoint, after - size)
            written = weights_ptr + (place * each + readers * count)
            write(after, before, written, heads_ptr + (place * Q + erase), count, width, writers, BLOCK_N, BLOCK_W)
        for s in tl.range(0, steps, disable_licm=True):  # hoisted addresses would take the registers of the tiles
            i = steps - 1 - s
            t = start + i
            place, after = t * batch + b, inner + i * size
            before, previous, c_before = after - size, first_ptr + b * each, c0_ptr + b * hidden
            if i == 0:
                before = checkpoint
            if t > 0:
                previous, c_before = weights_ptr + (place - batch) * each, cells_ptr + (place - batch) * hidden
            heads, weights, draw = heads_ptr + place * Q, weights_ptr + place * each, draws_ptr + place * P
            reads_at = place * readers * width
            if GRAVES:
                read_backward(
                    dmemory_ptr, dweights_ptr, dstate_ptr, dreads_ptr, reads_at, upstream_ptr, place * each, after, weights,
                    count, width, readers, BLOCK_N, BLOCK_W,
                )  # fmt: skip
            write_backward(
                dmemory_ptr, dweights_ptr + readers * count, draw + erase, upstream_ptr, place * each + readers * count, before,
                weights + readers * count, heads + erase, count, width, writers, GRAVES, BLOCK_N, BLOCK_W,
            )  # fmt: skip
            if not GRAVES:
                read_backward(
                    dmemory_ptr, dweights_ptr, dstate_ptr, dreads_ptr, reads_at, upstream_ptr, place * each, before, weights,
                    count, width, readers, BLOCK_N, BLOCK_W,
                )  # fmt: skip
            contents(
                content_ptr, similar_ptr, before, heads, heads + scalars, count, width, every, share, GRAVES, BLOCK_N, BLOCK_W, BLOCK_V
            )
            for h in range(every):
                head = tl.cast(h, tl.int64)
                own = head * count
                _head_backward(
                    dmemory_ptr, dweights_ptr + own, draw + head * width, draw + scalars + head * share, slope_ptr, dlogit_ptr,
                    content_ptr + own, similar_ptr + own, before, heads + head * width, heads + scalars + head * share,
                    heads + P + 2 * head, previous + own, raw_ptr + (place * every + head) * share, N, W, taps,
                    GRAVES, BLOCK_N, BLOCK_W, BLOCK_V, BLOCK_S,
                )  # fmt: skip
            control_backward(
                dgates_ptr + place * 4 * hidden, dcell_ptr, dstate_ptr + readers * width, dhidden_ptr, place * hidden, draw,
                gates_ptr + place * 4 * hidden, cells_ptr + place * hidden, c_before, matrix_ptr, hidden, P,
                BLOCK_J, BLOCK_K,
            )  # fmt: skip
            for first in range(0, K, BLOCK_K):
                column = first + lanes(BLOCK_K)
                found = columns(dgates_ptr + place * 4 * hidden, controller_ptr, column, K, 4 * hidden, BLOCK_J, BLOCK_K)
                tl.store(dstate_ptr + column, found, mask=column < K)
            tl.debug_barrier()
