"""The backward kernel of dnc_sequence: memories and links again from the writes that forward kept, then every step backwards.

As in _ntm_bwd: the writes are replayed twice, first to keep memory and links before each segment of about sqrt(T) steps, then, from the
last segment to the first, to have those within it. What a step hands to the one before (gradients of memory, usage, links, precedence,
weights, [reads, h] and cell) lies in memory that is updated in place and ends as the gradient of the initial state. The gradients of weight
matrices are products over all steps afterwards, of `dgates` and `draws`, the gradient of the interface vectors before their activations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton._common import device, lanes
from memkernels.backends.triton._dnc_content import contents, contents_backward, interface_slopes, offsets
from memkernels.backends.triton._dnc_fwd import allocate, mixed, sharpened, write
from memkernels.backends.triton._dnc_link import advance, follow_backward
from memkernels.backends.triton._ntm_bwd import columns, control_backward, read_backward, store_tile, write_backward
from memkernels.backends.triton._ntm_fwd import tile_of, vector_of
from memkernels.backends.triton.allocation import handed_back, usage_slope
from memkernels.backends.triton.usage import left


@device
def _way_backward(
    dfollowed_ptr, dread_ptr, way_ptr, log_ptr, followed_ptr, mode, sharpness, N, SHARPEN: tl.constexpr, BLOCK_V: tl.constexpr
):  # fmt: skip
    """From the gradient of the weights of a reader: of what following the links gave; returns that of its mode and of its sharpness."""
    EPS: tl.constexpr = 1e-6
    dmode, dsharpness = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        dmode += tl.sum(vector_of(dread_ptr, n, N) * vector_of(way_ptr, n, N), 0)
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        d = vector_of(dread_ptr, n, N)
        if SHARPEN:
            d = mode * (vector_of(way_ptr, n, N) * (d - dmode))
            dsharpness += tl.sum(d * vector_of(log_ptr, n, N), 0)
            tl.store(dfollowed_ptr + n, sharpness * d / (vector_of(followed_ptr, n, N) + EPS), mask=n < N)
        else:
            tl.store(dfollowed_ptr + n, mode * d, mask=n < N)
    return dmode, dsharpness


@device
def _reads_backward(
    dfollowed_ptr, dcontent_ptr, dmodes_ptr, dsharpness_ptr, dread_ptr, content_ptr, ways_ptr, logs_ptr, followed_ptr, modes_ptr,
    sharpness_ptr, N, R, U, SHARPEN: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From the gradients of the readers' weights "R N": of their modes, and of what these mix."""
    for r in range(R):
        head = tl.cast(r, tl.int64)
        modes, dmodes, dread, own = modes_ptr + head * (2 * U + 1), dmodes_ptr + head * (2 * U + 1), dread_ptr + head * N, head * N
        dmode, by_content = tl.cast(0.0, tl.float32), tl.load(modes + 2 * U)
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            d = vector_of(dread, n, N)
            dmode += tl.sum(d * vector_of(content_ptr + own, n, N), 0)
            tl.store(dcontent_ptr + own + n, by_content * d, mask=n < N)
        tl.store(dmodes + 2 * U, dmode)
        for k in range(2):
            direction = tl.cast(k, tl.int64)  # forward, then backward; their modes lie the other way round
            sharpness, dsharpness = 1.0, tl.cast(0.0, tl.float32)
            if SHARPEN:
                sharpness = tl.load(sharpness_ptr + (head * 2 + direction))
            for h in range(U):
                u = tl.cast(h, tl.int64)
                at, mode = ((direction * R + head) * U + u) * N, (1 - direction) * U + u
                found, more = _way_backward(
                    dfollowed_ptr + at, dread, ways_ptr + at, logs_ptr + at, followed_ptr + at, tl.load(modes + mode), sharpness, N,
                    SHARPEN, BLOCK_V,
                )  # fmt: skip
                tl.store(dmodes + mode, found)
                dsharpness += more
            if SHARPEN:
                tl.store(dsharpness_ptr + (head * 2 + direction), dsharpness)
    tl.debug_barrier()


@device
def _keep(kept_ptr, memory_ptr, old_ptr, free_ptr, N, W, R, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr):
    """The memory before the writers, without what is freed."""
    w = lanes(BLOCK_W)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        stays = left(old_ptr, free_ptr, R, -1, n, N, N, 1, 1, BLOCK_N)
        store_tile(kept_ptr, tile_of(memory_ptr, n, w, N, W) * stays[:, None], n, w, N, W)
    tl.debug_barrier()


@device
def _keep_backward(
    dstays_ptr, dmemory_ptr, memory_ptr, old_ptr, free_ptr, N, W, R, DEALLOCATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr
):  # fmt: skip
    """The gradient of what stays of each row, and that of the memory, in place; without DEALLOCATE memory has no part in it."""
    w = lanes(BLOCK_W)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        if DEALLOCATE:
            d = tile_of(dmemory_ptr, n, w, N, W)
            dstays = tl.sum(d * tile_of(memory_ptr, n, w, N, W), 1)
            stays = left(old_ptr, free_ptr, R, -1, n, N, N, 1, 1, BLOCK_N)
            tl.debug_barrier()  # a thread that has the same element, for the sum, must not find what this one stores
            store_tile(dmemory_ptr, d * stays[:, None], n, w, N, W)
        else:
            dstays = tl.zeros([BLOCK_N], tl.float32)
        tl.store(dstays_ptr + n, dstays, mask=n < N)
    tl.debug_barrier()


@device
def _writes_backward(
    dcontent_ptr, later_ptr, dfree_ptr, dgates_ptr, dwrite_ptr, wanted_ptr, free_ptr, order_ptr, before_ptr, usage_ptr, seen_ptr,
    gates_ptr, N, U, BLOCK_V: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """From the gradients of the writers' weights "U N": of their content, of their gates and, in `later`, of the usage."""
    EPS: tl.constexpr = 1e-6
    a = lanes(BLOCK_A)
    tl.store(later_ptr + a, tl.zeros([BLOCK_A], tl.float32), mask=a < N)
    for back in range(U):
        head = U - 1 - tl.cast(back, tl.int64)
        own = head * N
        gate, write_gate = tl.load(gates_ptr + head), tl.load(gates_ptr + (head + U))
        dgate, dwrite_gate = tl.cast(0.0, tl.float32), tl.cast(0.0, tl.float32)
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            d, wanted = vector_of(dwrite_ptr + own, n, N), vector_of(wanted_ptr + own, n, N)
            dwrite_gate += tl.sum(d * mixed(wanted_ptr + own, free_ptr + own, gate, n, N), 0)
            d = write_gate * d
            dgate += tl.sum(d * (vector_of(free_ptr + own, n, N) - wanted), 0)
            tl.store(dfree_ptr + n, gate * d, mask=n < N)
            tl.store(dcontent_ptr + own + n, (1 - gate) * d, mask=n < N)
        tl.debug_barrier()
        source = usage_ptr
        if head > 0:
            source = seen_ptr + (own - N)
        row = tl.load(order_ptr + own + a, mask=a < N, other=0.0).to(tl.int64)
        row = tl.where(a < N, row, N)
        rows, before = row < N, vector_of(before_ptr + own, a, N)
        usage = tl.load(source + row, mask=rows, other=1.0)
        s, both = EPS + (1 - EPS) * usage, gate * write_gate
        later, d = tl.load(later_ptr + row, mask=rows, other=0.0), tl.load(dfree_ptr + row, mask=rows, other=0.0)
        d, dusage, dboth = handed_back(d, later, usage, both, (1 - s) * before, rows)
        found = dusage + usage_slope(d, s, before, EPS, BLOCK_A)
        tl.debug_barrier()
        tl.store(later_ptr + row, found, mask=rows)
        tl.store(dgates_ptr + head, dgate + dboth * write_gate)
        tl.store(dgates_ptr + (head + U), dwrite_gate + dboth * gate)
        tl.debug_barrier()


@device
def _use_backward(
    dusage_ptr, dweights_ptr, dfree_gates_ptr, dstays_ptr, later_ptr, old_usage_ptr, old_ptr, free_gates_ptr, N, R, U,
    WRITE_GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The gradient of the usage before, in place; adds that of the readers before, writes that of the writers before and of the free gates.
    dstays: what stays of a row for the memory's sake, then for all."""
    for first in range(0, N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        kept = left(old_ptr + R * N, None, U, -1, n, N, N, 1, 0, BLOCK_V)
        stays = left(old_ptr, free_gates_ptr, R, -1, n, N, N, 1, 1, BLOCK_V)
        usage, d = vector_of(old_usage_ptr, n, N), vector_of(dusage_ptr, n, N) + vector_of(later_ptr, n, N)
        tl.store(dstays_ptr + n, vector_of(dstays_ptr, n, N) + d * (usage + (1 - usage) * (1 - kept)), mask=n < N)
        d *= stays
        for u in range(U):
            head = tl.cast(u, tl.int64)
            dwrite = tl.zeros([BLOCK_V], tl.float32)
            if WRITE_GRADIENT:
                dwrite = d * (1 - usage) * left(old_ptr + R * N, None, U, head, n, N, N, 1, 0, BLOCK_V)
            tl.store(dweights_ptr + (R + head) * N + n, dwrite, mask=n < N)
        tl.store(dusage_ptr + n, d * kept, mask=n < N)
    tl.debug_barrier()
    for r in range(R):
        head = tl.cast(r, tl.int64)
        gate, dgate = tl.load(free_gates_ptr + head), tl.cast(0.0, tl.float32)
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            d = vector_of(dstays_ptr, n, N) * left(old_ptr, free_gates_ptr, R, head, n, N, N, 1, 1, BLOCK_V)
            dgate -= tl.sum(d * vector_of(old_ptr + head * N, n, N), 0)
            place = dweights_ptr + head * N + n
            tl.store(place, tl.load(place, mask=n < N, other=0.0) - d * gate, mask=n < N)
        tl.store(dfree_gates_ptr + head, dgate)
    tl.debug_barrier()


@device
def _clip_backward(dcell_ptr, cell_ptr, clip, H, BLOCK_K: tl.constexpr):
    for first in range(0, H, BLOCK_K):
        j = first + lanes(BLOCK_K)
        inside = (tl.abs(vector_of(cell_ptr, j, H)) <= clip).to(tl.float32)
        tl.store(dcell_ptr + j, vector_of(dcell_ptr, j, H) * inside, mask=j < H)
    tl.debug_barrier()


@device
def _room(scratch_ptr, N, W, R, U, SHARPEN: tl.constexpr, DEALLOCATE: tl.constexpr):
    """What lies in the scratch of a batch row: gradients of contents; cosines, contents; allocation, usage that each writer leaves, order
    of rows, products before them; gradients of usage, of one allocation, of what stays of rows; of what following the links gave;
    logarithms of that and its sharpened form; memory without what is freed; parts of the gradients of links."""
    each, heads, links = (R + U) * N, U * N, 2 * R * U * N
    free = scratch_ptr + 3 * each
    later = free + 4 * heads
    dfollowed = later + 3 * N
    logs = dfollowed + links
    kept, ways = logs, logs
    if SHARPEN:
        ways = logs + links
        kept = ways + links
    part = kept
    if DEALLOCATE:
        part = kept + N * W
    return (
        scratch_ptr, scratch_ptr + each, scratch_ptr + 2 * each, free, free + heads, free + 2 * heads, free + 3 * heads,
        later, later + N, later + 2 * N, dfollowed, logs, ways, kept, part,
    )  # fmt: skip


@device
def _entered(t, b, B, weights_ptr, precedences_ptr, first_ptr, first_precedence_ptr, N, R, U):
    """The weights and the precedence before step t."""
    each, heads, place = (R + U) * N, U * N, (t - 1) * B + b
    old, precedence = first_ptr + b * each, first_precedence_ptr + b * heads
    if t > 0:
        old, precedence = weights_ptr + place * each, precedences_ptr + place * heads
    return old, precedence


@device
def _replay(
    out_memory_ptr, out_link_ptr, memory_ptr, link_ptr, t, b, B, weights_ptr, asked_ptr, precedences_ptr, first_ptr, first_precedence_ptr,
    N, W, R, U, P, MASK: tl.constexpr, DEALLOCATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Memory and links after step t."""
    _, _, _, erase, free_gates, _, _, _, _ = offsets(R, U, W, MASK)
    old, precedence = _entered(t, b, B, weights_ptr, precedences_ptr, first_ptr, first_precedence_ptr, N, R, U)
    written, asked = weights_ptr + (t * B + b) * (R + U) * N + R * N, asked_ptr + (t * B + b) * P
    write(out_memory_ptr, memory_ptr, written, asked + erase, old, asked + free_gates, N, W, R, U, DEALLOCATE, BLOCK_N, BLOCK_W)
    advance(out_link_ptr, link_ptr, written, precedence, N, U, BLOCK_M, BLOCK_C)


@device
def _step_reads(
    dmemory_ptr, dread_ptr, draw_ptr, scratch_ptr, followed_ptr, memory_ptr, asked_ptr, N, W, R, U,
    MASK: tl.constexpr, SHARPEN: tl.constexpr, DEALLOCATE: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From the gradients of the readers' weights: of the memory that they saw, of what following the links gave, of what they asked for."""
    dcontent, similar, content, _, _, _, _, _, _, _, dfollowed, logs, ways, _, _ = _room(scratch_ptr, N, W, R, U, SHARPEN, DEALLOCATE)
    strengths, _, _, _, _, _, modes, masks, sharpness = offsets(R, U, W, MASK)
    masks += U * W
    contents(
        content, similar, memory_ptr, asked_ptr, asked_ptr + masks, asked_ptr + strengths, N, W, R, MASK, COSINE, BLOCK_N, BLOCK_W, BLOCK_V
    )
    if SHARPEN:
        sharpened(ways, logs, followed_ptr, asked_ptr + sharpness, N, R, U, BLOCK_V)
    else:
        ways = followed_ptr
    _reads_backward(
        dfollowed, dcontent, draw_ptr + modes, draw_ptr + sharpness, dread_ptr, content, ways, logs, followed_ptr, asked_ptr + modes,
        asked_ptr + sharpness, N, R, U, SHARPEN, BLOCK_V,
    )  # fmt: skip
    contents_backward(
        dmemory_ptr, draw_ptr, draw_ptr + masks, draw_ptr + strengths, dcontent, content, similar, memory_ptr, asked_ptr, asked_ptr + masks,
        asked_ptr + strengths, N, W, R, MASK, COSINE, BLOCK_N, BLOCK_W, BLOCK_V,
    )  # fmt: skip


@device
def _step_writes(
    dmemory_ptr, dlink_ptr, dprecedence_ptr, dweights_ptr, draw_ptr, upstream_ptr, upstream_at, scratch_ptr, memory_ptr, link_ptr,
    weights_ptr, asked_ptr, old_ptr, old_precedence_ptr, N, W, R, U,
    MASK: tl.constexpr, SHARPEN: tl.constexpr, DEALLOCATE: tl.constexpr, BOUNDED: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Memory and links before the writers: their gradients, and that of the writers' weights."""
    _, _, _, _, _, _, _, _, _, dstays, dfollowed, _, _, kept, part = _room(scratch_ptr, N, W, R, U, SHARPEN, DEALLOCATE)
    _, _, _, erase, free_gates, _, _, _, _ = offsets(R, U, W, MASK)
    if DEALLOCATE:
        _keep(kept, memory_ptr, old_ptr, asked_ptr + free_gates, N, W, R, BLOCK_N, BLOCK_W)
    else:
        kept = memory_ptr
    written = weights_ptr + R * N
    write_backward(
        dmemory_ptr, dweights_ptr + R * N, draw_ptr + erase, upstream_ptr, upstream_at + R * N, kept, written, asked_ptr + erase,
        N, W, U, BOUNDED, BLOCK_N, BLOCK_W,
    )  # fmt: skip
    follow_backward(
        dlink_ptr, dprecedence_ptr, dweights_ptr, part, dfollowed, link_ptr, written, old_precedence_ptr, old_ptr, N, R, U,
        BLOCK_M, BLOCK_C, BLOCK_R, BLOCK_V,
    )  # fmt: skip
    _keep_backward(dstays, dmemory_ptr, memory_ptr, old_ptr, asked_ptr + free_gates, N, W, R, DEALLOCATE, BLOCK_N, BLOCK_W)


@device
def _step_choice(
    dmemory_ptr, dusage_ptr, dweights_ptr, draw_ptr, scratch_ptr, memory_ptr, asked_ptr, usage_ptr, old_usage_ptr, old_ptr, N, W, R, U,
    MASK: tl.constexpr, SHARPEN: tl.constexpr, DEALLOCATE: tl.constexpr, WRITE_GRADIENT: tl.constexpr, COSINE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """From the gradients of the writers' weights: of what they chose by, content and usage, and of the weights before."""
    dcontent, similar, content, free, seen, order, before, later, dfree, dstays, _, _, _, _, _ = _room(
        scratch_ptr, N, W, R, U, SHARPEN, DEALLOCATE
    )
    _, keys, strengths, _, free_gates, gates, _, masks, _ = offsets(R, U, W, MASK)
    contents(
        content, similar, memory_ptr, asked_ptr + keys, asked_ptr + masks, asked_ptr + strengths, N, W, U,
        MASK, COSINE, BLOCK_N, BLOCK_W, BLOCK_V,
    )  # fmt: skip
    allocate(free, seen, order, before, usage_ptr, asked_ptr + gates, N, U, True, BLOCK_A)
    _writes_backward(
        dcontent, later, dfree, draw_ptr + gates, dweights_ptr + R * N, content, free, order, before, usage_ptr, seen,
        asked_ptr + gates, N, U, BLOCK_V, BLOCK_A,
    )  # fmt: skip
    contents_backward(
        dmemory_ptr, draw_ptr + keys, draw_ptr + masks, draw_ptr + strengths, dcontent, content, similar, memory_ptr, asked_ptr + keys,
        asked_ptr + masks, asked_ptr + strengths, N, W, U, MASK, COSINE, BLOCK_N, BLOCK_W, BLOCK_V,
    )  # fmt: skip
    _use_backward(
        dusage_ptr, dweights_ptr, draw_ptr + free_gates, dstays, later, old_usage_ptr, old_ptr, asked_ptr + free_gates, N, R, U,
        WRITE_GRADIENT, BLOCK_V,
    )  # fmt: skip


@triton.jit
def dnc_bwd_kernel(
    dmemory_ptr, dusage_ptr, dlink_ptr, dprecedence_ptr, dweights_ptr, dstate_ptr, dcell_ptr, dgates_ptr, draws_ptr, memories_ptr,
    links_ptr, scratch_ptr, dreads_ptr, dhidden_ptr, upstream_ptr, weights_ptr, asked_ptr, usages_ptr, precedences_ptr, followed_ptr,
    gates_ptr, cells_ptr, entered_ptr, raw_ptr, first_usage_ptr, first_precedence_ptr, first_ptr, controller_ptr, matrix_ptr, clip,
    T, B, H, N, W, R, U, P, segment, segments, scratch_rows, CONTROLLER: tl.constexpr, MASK: tl.constexpr, SHARPEN: tl.constexpr,
    DEALLOCATE: tl.constexpr, WRITE_GRADIENT: tl.constexpr, COSINE: tl.constexpr, BOUNDED: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_J: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_A: tl.constexpr,
):  # fmt: skip
    """`memories`, `links` "B segments+segment ...": the state before each segment, the first of them given, then that after its steps."""
    b = tl.program_id(0).to(tl.int64)
    batch, hidden, count, width = tl.cast(B, tl.int64), tl.cast(H, tl.int64), tl.cast(N, tl.int64), tl.cast(W, tl.int64)
    every, readers, writers, size = tl.cast(R + U, tl.int64), tl.cast(R, tl.int64), tl.cast(U, tl.int64), tl.cast(P, tl.int64)
    K, each, area, matrices = readers * width + hidden, every * count, count * width, writers * count * count
    raw_size = every
    if SHARPEN:
        raw_size += 2 * readers
    dmemory_ptr += b * area
    dusage_ptr += b * count
    dlink_ptr += b * matrices
    dprecedence_ptr += b * writers * count
    dweights_ptr += b * each
    dstate_ptr += b * K
    if CONTROLLER:
        dcell_ptr += b * hidden
    memories_ptr += b * (segments + segment) * area
    links_ptr += b * (segments + segment) * matrices
    scratch_ptr += b * scratch_rows * count
    inner, inner_links = memories_ptr + tl.cast(segments, tl.int64) * area, links_ptr + tl.cast(segments, tl.int64) * matrices
    for c in tl.range(1, segments, disable_licm=True):  # hoisted addresses would take the registers of the tiles
        at = tl.cast(c, tl.int64)
        for s in tl.range(0, segment, disable_licm=True):
            memory, link = memories_ptr + at * area, links_ptr + at * matrices
            if s == 0:
                memory, link = memory - area, link - matrices
            _replay(
                memories_ptr + at * area, links_ptr + at * matrices, memory, link, (at - 1) * segment + s, b, batch, weights_ptr,
                asked_ptr, precedences_ptr, first_ptr, first_precedence_ptr, count, width, readers, writers, size,
                MASK, DEALLOCATE, BLOCK_N, BLOCK_W, BLOCK_M, BLOCK_C,
            )  # fmt: skip
    for back in tl.range(0, segments, disable_licm=True):
        at = tl.cast(segments - 1 - back, tl.int64)
        start = at * segment
        steps = tl.minimum(start + segment, T) - start
        for s in tl.range(0, steps, disable_licm=True):
            step = tl.cast(s, tl.int64)
            memory, link = inner + (step - 1) * area, inner_links + (step - 1) * matrices
            if s == 0:
                memory, link = memories_ptr + at * area, links_ptr + at * matrices
            _replay(
                inner + step * area, inner_links + step * matrices, memory, link, start + step, b, batch, weights_ptr,
                asked_ptr, precedences_ptr, first_ptr, first_precedence_ptr, count, width, readers, writers, size,
                MASK, DEALLOCATE, BLOCK_N, BLOCK_W, BLOCK_M, BLOCK_C,
            )  # fmt: skip
        for s in tl.range(0, steps, disable_licm=True):
            i = steps - 1 - s
            t = start + i
            place, after = t * batch + b, inner + i * area
            asked, weights, draw = asked_ptr + place * size, weights_ptr + place * each, draws_ptr + place * size
            old, old_precedence = _entered(
                t, b, batch, weights_ptr, precedences_ptr, first_ptr, first_precedence_ptr, count, readers, writers
            )
            usage, old_usage = usages_ptr + place * count, first_usage_ptr + b * count
            if t > 0:
                old_usage = usage - batch * count
            memory, link = after - area, inner_links + (i - 1) * matrices
            if i == 0:
                memory, link = memories_ptr + at * area, links_ptr + at * matrices
            read_backward(
                dmemory_ptr, dweights_ptr, dstate_ptr, dreads_ptr, place * readers * width, upstream_ptr, place * each, after, weights,
                count, width, readers, BLOCK_N, BLOCK_W,
            )  # fmt: skip
            _step_reads(
                dmemory_ptr, dweights_ptr, draw, scratch_ptr, followed_ptr + place * 2 * readers * writers * count, after, asked,
                count, width, readers, writers, MASK, SHARPEN, DEALLOCATE, COSINE, BLOCK_N, BLOCK_W, BLOCK_V,
            )  # fmt: skip
            _step_writes(
                dmemory_ptr, dlink_ptr, dprecedence_ptr, dweights_ptr, draw, upstream_ptr, place * each, scratch_ptr, memory, link,
                weights, asked, old, old_precedence, count, width, readers, writers, MASK, SHARPEN, DEALLOCATE, BOUNDED,
                BLOCK_N, BLOCK_W, BLOCK_V, BLOCK_M, BLOCK_C, BLOCK_R,
            )  # fmt: skip
            _step_choice(
                dmemory_ptr, dusage_ptr, dweights_ptr, draw, scratch_ptr, memory, asked, usage, old_usage, old,
                count, width, readers, writers, MASK, SHARPEN, DEALLOCATE, WRITE_GRADIENT, COSINE, BLOCK_N, BLOCK_W, BLOCK_V, BLOCK_A,
            )  # fmt: skip
            interface_slopes(draw, asked, raw_ptr + place * raw_size, readers, writers, width, size, MASK, BOUNDED, BLOCK_S, BLOCK_V)
            if CONTROLLER:
                _clip_backward(dcell_ptr, cells_ptr + place * hidden, clip, hidden, BLOCK_K)
                control_backward(
                    dgates_ptr + place * 4 * hidden, dcell_ptr, dstate_ptr + readers * width, dhidden_ptr, place * hidden, draw,
                    gates_ptr + place * 4 * hidden, cells_ptr + place * hidden, entered_ptr + place * hidden, matrix_ptr, hidden, size,
                    BLOCK_J, BLOCK_K,
                )  # fmt: skip
                for first in range(0, K, BLOCK_K):
                    column = first + lanes(BLOCK_K)
                    found = columns(dgates_ptr + place * 4 * hidden, controller_ptr, column, K, 4 * hidden, BLOCK_J, BLOCK_K)
                    tl.store(dstate_ptr + column, found, mask=column < K)
                tl.debug_barrier()
