"""The forward kernel of dnc_sequence, and what its backward kernel shares with it.

As in _ntm_fwd, a program owns a batch row and walks through all its steps; everything it hands from one thread to another lies in memory
that it alone touches, with a barrier between store and load. Memory and links are updated in place, float32; a row of the scratch has N
elements. The vectors that backward needs of a step (weights, usage, precedence, what following the links gives) are outputs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton._common import device, lanes
from memkernels.backends.triton._dnc_content import activated, choose_modes, contents, offsets
from memkernels.backends.triton._dnc_link import follow
from memkernels.backends.triton._ntm_bwd import store_tile
from memkernels.backends.triton._ntm_fwd import attend, control, kept_and_added, linear, read, tile_of, vector_of
from memkernels.backends.triton.allocation import by_usage, usage_after
from memkernels.backends.triton.usage import left


@device
def _ask(
    asked_ptr, input_ptr, h_ptr, matrix_ptr, bias_ptr, H, R, U, W, P, CONTROLLER: tl.constexpr, MASK: tl.constexpr,
    ONEPLUS: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The interface vector of a step."""
    for first in range(0, P, BLOCK_J):
        p = first + lanes(BLOCK_J)
        if CONTROLLER:
            raw = linear(h_ptr, matrix_ptr, bias_ptr, p, H, P, BLOCK_J, BLOCK_K)
        else:
            raw = vector_of(input_ptr, p, P)
        tl.store(asked_ptr + p, activated(raw, p, R, U, W, MASK, ONEPLUS, BOUNDED), mask=p < P)
    tl.debug_barrier()
    _, _, _, _, _, _, modes, _, _ = offsets(R, U, W, MASK)
    choose_modes(asked_ptr + modes, R, U, BLOCK_S)


@device
def _carry(cell_ptr, new_ptr, clip, H, BLOCK_K: tl.constexpr):
    """The cell that the next step sees; NaN stays."""
    for first in range(0, H, BLOCK_K):
        j = first + lanes(BLOCK_K)
        c = vector_of(new_ptr, j, H)
        tl.store(cell_ptr + j, tl.where(c > clip, clip, tl.where(c < -clip, -clip, c)), mask=j < H)
    tl.debug_barrier()


@device
def _use(usage_ptr, old_usage_ptr, old_ptr, free_ptr, N, R, U, BLOCK_V: tl.constexpr):
    """The usage, from that before and the weights "R+U N" before."""
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        kept, stays = left(old_ptr + R * N, None, U, -1, n, N, N, 1, 0, BLOCK_V), left(old_ptr, free_ptr, R, -1, n, N, N, 1, 1, BLOCK_V)
        usage = vector_of(old_usage_ptr, n, N)
        tl.store(usage_ptr + n, (usage + (1 - usage) * (1 - kept)) * stays, mask=n < N)
    tl.debug_barrier()


@device
def allocate(free_ptr, seen_ptr, order_ptr, before_ptr, usage_ptr, gates_ptr, N, U, KEEP: tl.constexpr, BLOCK_A: tl.constexpr):
    """The allocation of every writer "U N", and the usage that each one leaves. KEEP: also the order of the rows, as float32, which has
    all their numbers, and the products before each of them in that order. gates: for allocation, then for writing."""
    EPS: tl.constexpr = 1e-6
    for u in range(U):
        own = tl.cast(u, tl.int64) * N
        source = usage_ptr
        if u > 0:
            source = seen_ptr + (own - N)
        row, usage, s, before = by_usage(source, 1, EPS, N, BLOCK_A)
        found, rows = (1 - s) * before, row < N
        gate = tl.load(gates_ptr + tl.cast(u, tl.int64)) * tl.load(gates_ptr + (tl.cast(u, tl.int64) + U))
        tl.store(free_ptr + own + row, found, mask=rows)
        tl.store(seen_ptr + own + row, usage_after(usage, gate, found), mask=rows)
        if KEEP:
            n = lanes(BLOCK_A)
            tl.store(order_ptr + own + n, row.to(tl.float32), mask=n < N)
            tl.store(before_ptr + own + n, before, mask=n < N)
        tl.debug_barrier()


@device
def mixed(wanted_ptr, free_ptr, gate, n, N):
    """What a writer would write to by its allocation gate alone."""
    wanted = vector_of(wanted_ptr, n, N)
    return wanted + gate * (vector_of(free_ptr, n, N) - wanted)


@device
def _choose_writes(write_ptr, wanted_ptr, free_ptr, gates_ptr, N, U, BLOCK_V: tl.constexpr):
    for u in range(U):
        head = tl.cast(u, tl.int64)
        gate, write_gate = tl.load(gates_ptr + head), tl.load(gates_ptr + (head + U))
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            weights = write_gate * mixed(wanted_ptr + head * N, free_ptr + head * N, gate, n, N)
            tl.store(write_ptr + head * N + n, weights, mask=n < N)
    tl.debug_barrier()


@device
def write(
    out_ptr, memory_ptr, write_ptr, erase_ptr, old_ptr, free_ptr, N, W, R, U,
    DEALLOCATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """The memory after the writers; out may be the memory itself."""
    w = lanes(BLOCK_W)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        memory = tile_of(memory_ptr, n, w, N, W)
        if DEALLOCATE:
            memory *= left(old_ptr, free_ptr, R, -1, n, N, N, 1, 1, BLOCK_N)[:, None]
        kept, added = kept_and_added(write_ptr, erase_ptr, n, w, N, W, U, BLOCK_N, BLOCK_W)
        store_tile(out_ptr, memory * kept + added, n, w, N, W)
    tl.debug_barrier()


@device
def sharpened(ways_ptr, logs_ptr, followed_ptr, sharpness_ptr, N, R, U, BLOCK_V: tl.constexpr):
    """(followed + 1e-6)^sharpness over its sum, and the logarithms, "2 R U N"."""
    EPS: tl.constexpr = 1e-6
    for first in range(0, 2 * R * U * N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        logs = tl.log(vector_of(followed_ptr, n, 2 * R * U * N) + EPS)
        tl.store(logs_ptr + n, logs, mask=n < 2 * R * U * N)
    tl.debug_barrier()
    for k in range(2 * R * U):
        way = tl.cast(k, tl.int64)
        sharpness = tl.load(sharpness_ptr + (way // U % R * 2 + way // (R * U)))
        attend(ways_ptr + way * N, logs_ptr + way * N, sharpness, N, BLOCK_V)
    tl.debug_barrier()


@device
def _choose_reads(read_ptr, content_ptr, ways_ptr, modes_ptr, N, R, U, BLOCK_V: tl.constexpr):
    for r in range(R):
        head = tl.cast(r, tl.int64)
        modes = modes_ptr + head * (2 * U + 1)
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            total = tl.load(modes + 2 * U) * vector_of(content_ptr + head * N, n, N)
            for h in range(U):
                u = tl.cast(h, tl.int64)
                total += tl.load(modes + u) * vector_of(ways_ptr + ((R + head) * U + u) * N, n, N)
            for h in range(U):
                u = tl.cast(h, tl.int64)
                total += tl.load(modes + (U + u)) * vector_of(ways_ptr + (head * U + u) * N, n, N)
            tl.store(read_ptr + head * N + n, total, mask=n < N)
    tl.debug_barrier()


@triton.jit
def dnc_fwd_kernel(
    rows_ptr, weights_ptr, asked_ptr, usages_ptr, precedences_ptr, followed_ptr, gates_ptr, cells_ptr, memory_ptr, link_ptr, cell_ptr,
    scratch_ptr, projected_ptr, first_usage_ptr, first_precedence_ptr, first_ptr, controller_ptr, matrix_ptr, bias_ptr, clip,
    T, B, I, H, N, W, R, U, P, scratch_rows, CONTROLLER: tl.constexpr, MASK: tl.constexpr, SHARPEN: tl.constexpr,
    DEALLOCATE: tl.constexpr, ONEPLUS: tl.constexpr, COSINE: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """`memory`, `link`, `cell` hold the state before the first step, then that after the last one; `first` "B R+U N": the weights before.

    Without a controller `projected` holds the interface vectors before their activations, and a row of `rows` the reads alone.
    """
    b = tl.program_id(0).to(tl.int64)
    batch, hidden, count, width = tl.cast(B, tl.int64), tl.cast(H, tl.int64), tl.cast(N, tl.int64), tl.cast(W, tl.int64)
    every, readers, writers, size = tl.cast(R + U, tl.int64), tl.cast(R, tl.int64), tl.cast(U, tl.int64), tl.cast(P, tl.int64)
    K = readers * width + hidden
    columns, each, links = K + I, every * count, 2 * readers * writers * count
    strengths, write_keys, write_strengths, erase, free_gates, gates, modes, masks, sharpness = offsets(readers, writers, width, MASK)
    memory_ptr += b * count * width
    link_ptr += b * writers * count * count
    if CONTROLLER:
        cell_ptr += b * hidden
    similar = scratch_ptr + b * scratch_rows * count
    content = similar + each
    free = content + each
    seen = free + writers * count
    logs = seen + writers * count
    ways = logs
    part = logs
    if SHARPEN:
        ways += links
        part += 2 * links
    for t in tl.range(0, T, disable_licm=True):  # hoisted addresses would take the registers of the tiles
        place = tl.cast(t, tl.int64) * batch + b
        row = rows_ptr + (place * columns + I)
        after = row
        asked, weights, followed = asked_ptr + place * size, weights_ptr + place * each, followed_ptr + place * links
        usage, precedence = usages_ptr + place * count, precedences_ptr + place * writers * count
        old, old_usage, old_precedence = first_ptr + b * each, first_usage_ptr + b * count, first_precedence_ptr + b * writers * count
        if t > 0:
            old, old_usage, old_precedence = weights - batch * each, usage - batch * count, precedence - batch * writers * count
        if CONTROLLER:
            after += batch * columns
            control(
                after + readers * width, cells_ptr + place * hidden, gates_ptr + place * 4 * hidden, row, cell_ptr,
                projected_ptr + place * 4 * hidden, controller_ptr, hidden, K, BLOCK_J, BLOCK_K,
            )  # fmt: skip
            _carry(cell_ptr, cells_ptr + place * hidden, clip, hidden, BLOCK_K)
        _ask(
            asked, projected_ptr + place * size, after + readers * width, matrix_ptr, bias_ptr, hidden, readers, writers, width, size,
            CONTROLLER, MASK, ONEPLUS, BOUNDED, BLOCK_S, BLOCK_J, BLOCK_K,
        )  # fmt: skip
        _use(usage, old_usage, old, asked + free_gates, count, readers, writers, BLOCK_V)
        allocate(free, seen, seen, seen, usage, asked + gates, count, writers, False, BLOCK_A)
        contents(
            content, similar, memory_ptr, asked + write_keys, asked + masks, asked + write_strengths, count, width, writers,
            MASK, COSINE, BLOCK_N, BLOCK_W, BLOCK_V,
        )  # fmt: skip
        written = weights + readers * count
        _choose_writes(written, content, free, asked + gates, count, writers, BLOCK_V)
        write(
            memory_ptr, memory_ptr, written, asked + erase, old, asked + free_gates, count, width, readers, writers,
            DEALLOCATE, BLOCK_N, BLOCK_W,
        )  # fmt: skip
        follow(
            followed, precedence, link_ptr, part, written, old_precedence, old, count, readers, writers,
            BLOCK_M, BLOCK_C, BLOCK_R, BLOCK_V,
        )  # fmt: skip
        contents(
            content, similar, memory_ptr, asked, asked + masks + writers * width, asked + strengths, count, width, readers,
            MASK, COSINE, BLOCK_N, BLOCK_W, BLOCK_V,
        )  # fmt: skip
        if SHARPEN:
            sharpened(ways, logs, followed, asked + sharpness, count, readers, writers, BLOCK_V)
            _choose_reads(weights, content, ways, asked + modes, count, readers, writers, BLOCK_V)
        else:
            _choose_reads(weights, content, followed, asked + modes, count, readers, writers, BLOCK_V)
        read(after, memory_ptr, weights, count, width, readers, BLOCK_N, BLOCK_W)
