"""The forward kernel of ntm_sequence, and what its backward kernel shares with it.

A program owns a batch row and walks through all its steps. Every vector and the row's memory lie in memory that this program alone
touches, float32, in its L1 cache where they fit; a barrier stands between the store of a vector and the loads of it by other threads.
Vectors over the memory's rows go by in blocks of BLOCK_V, the memory in tiles BLOCK_N x BLOCK_W, products of the controller in tiles
BLOCK_J x BLOCK_K read from the L2 cache. A row of `heads`: all keys, all scalars (strength, gate, sharpen, taps), erase and add vectors of
the writers, stats of location_address; readers stand before writers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton._common import device, lanes, sigmoid, tanh
from memkernels.backends.triton.location_address import address


@device
def softplus(x):
    """log(1 + exp x), with all digits where it is small."""
    e = tl.exp(-tl.abs(x))
    above = 1 + e
    rounding = tl.where(above == 1, 1.0, above - 1)
    return tl.maximum(x, 0.0) + tl.where(above == 1, e, tl.log(above) * (e / rounding))


@device
def tile_of(ptr, n, w, N, W):
    """Rows n of a memory "N W"."""
    return tl.load(ptr + n[:, None] * W + w[None, :], mask=(n < N)[:, None] & (w < W)[None, :], other=0.0)


@device
def vector_of(ptr, n, N):
    return tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32)


@device
def similarities(
    similar_ptr, memory_ptr, heads_ptr, N, W, every, GRAVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """Cosines of every head's key with every row, "every N"."""
    EPS: tl.constexpr = 1e-6 if GRAVES else 1e-16
    w = lanes(BLOCK_W)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        memory = tile_of(memory_ptr, n, w, N, W)
        norm = tl.sqrt(tl.sum(memory * memory, 1) + EPS)
        for h in range(every):
            head = tl.cast(h, tl.int64)
            key = vector_of(heads_ptr + head * W, w, W)
            key_norm = tl.sqrt(tl.sum(key * key, 0) + EPS)
            tl.store(similar_ptr + head * N + n, tl.sum(memory * key[None, :], 1) / (norm * key_norm), mask=n < N)


@device
def attend(content_ptr, similar_ptr, strength, N, BLOCK_V: tl.constexpr):
    """softmax(strength * similar) of one head."""
    top, total = tl.cast(float("-inf"), tl.float32), tl.cast(0.0, tl.float32)
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        logit = tl.where(n < N, strength * vector_of(similar_ptr, n, N), float("-inf"))
        now = tl.maximum(top, tl.max(logit, 0))
        total = total * tl.exp(top - now) + tl.sum(tl.exp(logit - now), 0)
        top = now
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        tl.store(content_ptr + n, tl.exp(strength * vector_of(similar_ptr, n, N) - top) / total, mask=n < N)


@device
def contents(
    content_ptr, similar_ptr, memory_ptr, heads_ptr, scalars_ptr, N, W, every, share,
    GRAVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The weights by content of every head, "every N"; `share`: scalars of a head."""
    similarities(similar_ptr, memory_ptr, heads_ptr, N, W, every, GRAVES, BLOCK_N, BLOCK_W)
    tl.debug_barrier()
    for h in range(every):
        head = tl.cast(h, tl.int64)
        attend(content_ptr + head * N, similar_ptr + head * N, tl.load(scalars_ptr + head * share), N, BLOCK_V)
    tl.debug_barrier()


@device
def kept_and_added(weights_ptr, erase_ptr, n, w, N, W, U, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """Of all writers: what they keep of each element of a tile, and what they add; the add vectors follow the erase vectors."""
    kept, added = tl.full([BLOCK_N, BLOCK_W], 1.0, tl.float32), tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for u in range(U):
        head = tl.cast(u, tl.int64)
        weights = vector_of(weights_ptr + head * N, n, N)[:, None]
        kept *= 1 - weights * vector_of(erase_ptr + head * W, w, W)[None, :]
        added += weights * vector_of(erase_ptr + (U + head) * W, w, W)[None, :]
    return kept, added


@device
def write(out_ptr, memory_ptr, weights_ptr, erase_ptr, N, W, U, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """The memory after the writers; out may be the memory itself."""
    w = lanes(BLOCK_W)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        memory = tile_of(memory_ptr, n, w, N, W)
        kept, added = kept_and_added(weights_ptr, erase_ptr, n, w, N, W, U, BLOCK_N, BLOCK_W)
        tl.store(out_ptr + n[:, None] * W + w[None, :], memory * kept + added, mask=(n < N)[:, None] & (w < W)[None, :])
    tl.debug_barrier()


@device
def read(reads_ptr, memory_ptr, weights_ptr, N, W, R, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    w = lanes(BLOCK_W)
    for r in range(R):
        head = tl.cast(r, tl.int64)
        total = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
        for first in range(0, N, BLOCK_N):
            n = first + lanes(BLOCK_N)
            total += vector_of(weights_ptr + head * N, n, N)[:, None] * tile_of(memory_ptr, n, w, N, W)
        tl.store(reads_ptr + head * W + w, tl.sum(total, 0), mask=w < W)
    tl.debug_barrier()


@device
def control(
    h_ptr, c_ptr, gates_ptr, row_ptr, c_before_ptr, projected_ptr, controller_ptr, H, K,
    BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One step of the LSTM: its new hidden state, cell and gates, from the row [reads, h] of the step before."""
    for first in range(0, H, BLOCK_J):
        j = first + lanes(BLOCK_J)
        a0, a1 = tl.zeros([BLOCK_J, BLOCK_K], tl.float32), tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
        a2, a3 = tl.zeros([BLOCK_J, BLOCK_K], tl.float32), tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
        for start in range(0, K, BLOCK_K):
            k = start + lanes(BLOCK_K)
            x = vector_of(row_ptr, k, K)[None, :]
            tile, place = (j < H)[:, None] & (k < K)[None, :], controller_ptr + j[:, None] * K + k[None, :]
            gate = H * K
            a0 += x * tl.load(place, mask=tile, other=0.0).to(tl.float32)
            a1 += x * tl.load(place + gate, mask=tile, other=0.0).to(tl.float32)
            a2 += x * tl.load(place + 2 * gate, mask=tile, other=0.0).to(tl.float32)
            a3 += x * tl.load(place + 3 * gate, mask=tile, other=0.0).to(tl.float32)
        i = sigmoid(tl.sum(a0, 1) + vector_of(projected_ptr, j, H))
        f = sigmoid(tl.sum(a1, 1) + vector_of(projected_ptr + H, j, H))
        g = tanh(tl.sum(a2, 1) + vector_of(projected_ptr + 2 * H, j, H))
        o = sigmoid(tl.sum(a3, 1) + vector_of(projected_ptr + 3 * H, j, H))
        c = f * vector_of(c_before_ptr, j, H) + i * g
        tl.store(gates_ptr + j, i, mask=j < H)
        tl.store(gates_ptr + H + j, f, mask=j < H)
        tl.store(gates_ptr + 2 * H + j, g, mask=j < H)
        tl.store(gates_ptr + 3 * H + j, o, mask=j < H)
        tl.store(c_ptr + j, c, mask=j < H)
        tl.store(h_ptr + j, o * tanh(c), mask=j < H)
    tl.debug_barrier()


@device
def _activated(raw, p, scalars, erase, add, share, GRAVES: tl.constexpr):
    """Row p of what is linear in h after its activation, taps but for their softmax. `scalars`, `erase`, `add`: where those begin."""
    kind = (p - scalars) % share
    some = (p >= scalars) & (p < erase)
    soft, bounded = softplus(raw), sigmoid(raw)
    value = tl.where(some & (kind == 0), soft + 1 if GRAVES else soft, raw)
    value = tl.where((some & (kind == 1)) | ((p >= erase) & (p < add)), bounded, value)
    value = tl.where(some & (kind == 2), soft + 1, value)
    if GRAVES:
        value = tl.where(p >= add, tanh(raw), value)
    return value


@device
def linear(h_ptr, matrix_ptr, bias_ptr, p, H, P, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr):
    """Rows p of matrix "P H" @ h + bias."""
    total = tl.zeros([BLOCK_J, BLOCK_K], tl.float32)
    for start in range(0, H, BLOCK_K):
        k = start + lanes(BLOCK_K)
        tile = (p < P)[:, None] & (k < H)[None, :]
        weight = tl.load(matrix_ptr + p[:, None] * H + k[None, :], mask=tile, other=0.0).to(tl.float32)
        total += vector_of(h_ptr, k, H)[None, :] * weight
    return tl.sum(total, 1) + vector_of(bias_ptr, p, P)


@device
def softmax_in_place(ptr, s, count):
    raw = tl.load(ptr + s, mask=s < count, other=float("-inf"))
    tl.debug_barrier()
    power = tl.exp(raw - tl.max(raw, 0))
    tl.store(ptr + s, power / tl.sum(power, 0), mask=s < count)


@device
def _steer(
    heads_ptr, h_ptr, matrix_ptr, bias_ptr, H, W, every, U, share,
    GRAVES: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """All that is linear in h, activated."""
    scalars = every * W
    erase = scalars + every * share
    P = erase + 2 * U * W
    for first in range(0, P, BLOCK_J):
        p = first + lanes(BLOCK_J)
        raw = linear(h_ptr, matrix_ptr, bias_ptr, p, H, P, BLOCK_J, BLOCK_K)
        tl.store(heads_ptr + p, _activated(raw, p, scalars, erase, erase + U * W, share, GRAVES), mask=p < P)
    tl.debug_barrier()
    s = lanes(BLOCK_S)
    for h in range(every):
        softmax_in_place(heads_ptr + (scalars + tl.cast(h, tl.int64) * share + 3), s, share - 3)
    tl.debug_barrier()


@triton.jit
def ntm_fwd_kernel(
    rows_ptr, weights_ptr, gates_ptr, cells_ptr, heads_ptr, memory_ptr, similar_ptr, content_ptr,
    projected_ptr, first_ptr, c0_ptr, controller_ptr, matrix_ptr, bias_ptr,
    T, B, I, H, N, W, R, U, share, GRAVES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`memory` "B N W" holds the initial memory, then the last one; `first` "B R+U N": the weights before the first step."""
    b = tl.program_id(0).to(tl.int64)
    batch, hidden, count, width = tl.cast(B, tl.int64), tl.cast(H, tl.int64), tl.cast(N, tl.int64), tl.cast(W, tl.int64)
    every, readers, writers = tl.cast(R + U, tl.int64), tl.cast(R, tl.int64), tl.cast(U, tl.int64)
    K = readers * width + hidden
    columns, scalars, taps, share = K + I, every * width, share - 3, tl.cast(share, tl.int64)
    erase = scalars + every * share
    Q = erase + 2 * writers * width + 2 * every
    memory_ptr += b * count * width
    similar_ptr += b * every * count
    content_ptr += b * every * count
    for t in tl.range(0, T, disable_licm=True):  # hoisted addresses would take the registers of the tiles
        place = tl.cast(t, tl.int64) * batch + b
        row = rows_ptr + (place * columns + I)
        after = row + batch * columns
        heads, weights = heads_ptr + place * Q, weights_ptr + place * every * count
        previous, c_before = first_ptr + b * every * count, c0_ptr + b * hidden
        if t > 0:
            previous, c_before = weights - batch * every * count, cells_ptr + (place - batch) * hidden
        control(
            after + readers * width, cells_ptr + place * hidden, gates_ptr + place * 4 * hidden, row, c_before,
            projected_ptr + place * 4 * hidden, controller_ptr, hidden, K, BLOCK_J, BLOCK_K,
        )  # fmt: skip
        _steer(
            heads, after + readers * width, matrix_ptr, bias_ptr, hidden, width, every, writers, share, GRAVES, BLOCK_J, BLOCK_K, BLOCK_S,
        )  # fmt: skip
        contents(
            content_ptr, similar_ptr, memory_ptr, heads, heads + scalars, count, width, every, share, GRAVES, BLOCK_N, BLOCK_W, BLOCK_V
        )
        for h in range(every):
            head = tl.cast(h, tl.int64)
            scalar, stats = heads + scalars + head * share, heads + Q + 2 * (head - every)
            gate, sharpen = tl.load(scalar + tl.cast(1, tl.int64)), tl.load(scalar + tl.cast(2, tl.int64))
            address(
                weights + head * count, stats, content_ptr + head * count, previous + head * count, scalar + tl.cast(3, tl.int64),
                gate, sharpen, N, taps, 1, 1, 1, BLOCK_V, 0.0 if GRAVES else 1e-16,
            )  # fmt: skip
        tl.debug_barrier()
        if not GRAVES:
            read(after, memory_ptr, weights, count, width, readers, BLOCK_N, BLOCK_W)
        write(memory_ptr, memory_ptr, weights + readers * count, heads + erase, count, width, writers, BLOCK_N, BLOCK_W)
        if GRAVES:
            read(after, memory_ptr, weights, count, width, readers, BLOCK_N, BLOCK_W)
