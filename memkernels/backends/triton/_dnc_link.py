"""The links of dnc_sequence, float32, by one program: L'_ij = (1 - w_i - w_j) L_ij + w_i p_j in place, followed both ways; its gradient.

Tiles as in _link. What rows sum up stays in registers, what columns sum up goes to one part a block of rows, added in the order of blocks.
"""

from __future__ import annotations

import triton.language as tl

from memkernels.backends.triton._common import device, dot, lanes
from memkernels.backends.triton._link import heads_tile, updated
from memkernels.backends.triton._ntm_bwd import store_tile
from memkernels.backends.triton._ntm_fwd import tile_of, vector_of


@device
def sum_of(ptr, N, BLOCK_V: tl.constexpr):
    total = tl.cast(0.0, tl.float32)
    for first in range(0, N, BLOCK_V):
        total += tl.sum(vector_of(ptr, first + lanes(BLOCK_V), N), 0)
    return total


@device
def _parts_of(part_ptr, n, N, blocks, step, BLOCK_V: tl.constexpr):
    """The sum over blocks of rows."""
    total = tl.zeros([BLOCK_V], tl.float32)
    for block in range(blocks):
        total += vector_of(part_ptr + tl.cast(block, tl.int64) * step, n, N)
    return total


@device
def advance(out_ptr, link_ptr, write_ptr, precedence_ptr, N, U, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """The links "U N N" after a write; out may be the links themselves."""
    for u in range(U):
        head = tl.cast(u, tl.int64)
        at, own = head * N * N, head * N
        for top in range(0, N, BLOCK_M):
            m = top + lanes(BLOCK_M)
            w_rows = vector_of(write_ptr + own, m, N)
            for first in range(0, N, BLOCK_C):
                n = first + lanes(BLOCK_C)
                w, p = vector_of(write_ptr + own, n, N), vector_of(precedence_ptr + own, n, N)
                new = updated(tile_of(link_ptr + at, m, n, N, N), w_rows, w, p, m[:, None] != n[None, :])
                store_tile(out_ptr + at, new, m, n, N, N)
    tl.debug_barrier()


@device
def follow(
    followed_ptr, next_precedence_ptr, link_ptr, part_ptr, write_ptr, precedence_ptr, read_ptr, N, R, U,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The links after a write, in place; `followed` "2 R U N" forward and backward from the rows last read; the precedence."""
    r = lanes(BLOCK_R)
    for u in range(U):
        head = tl.cast(u, tl.int64)
        own = head * N
        matrix = link_ptr + own * N
        for top in range(0, N, BLOCK_M):
            m = top + lanes(BLOCK_M)
            w_rows, q_rows = vector_of(write_ptr + own, m, N), heads_tile(read_ptr, N, 1, r[:, None], m[None, :], R, N)
            forward = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
            for first in range(0, N, BLOCK_C):
                n = first + lanes(BLOCK_C)
                w, p = vector_of(write_ptr + own, n, N), vector_of(precedence_ptr + own, n, N)
                new = updated(tile_of(matrix, m, n, N, N), w_rows, w, p, m[:, None] != n[None, :])
                tl.debug_barrier()  # a thread that has the same element, for a product, must not find what this one stores
                store_tile(matrix, new, m, n, N, N)
                forward = dot(new, heads_tile(read_ptr, N, 1, r[None, :], n[:, None], R, N), forward, "ieee")
                columns = dot(q_rows, new, tl.zeros([BLOCK_R, BLOCK_C], tl.float32), "ieee")
                store_tile(part_ptr + tl.cast(top // BLOCK_M, tl.int64) * R * N, columns, r, n, R, N)
            place = followed_ptr + (r[None, :] * U + head) * N + m[:, None]
            tl.store(place, forward, mask=(m < N)[:, None] & (r < R)[None, :])
        tl.debug_barrier()
        written = sum_of(write_ptr + own, N, BLOCK_V)
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            last = (1 - written) * vector_of(precedence_ptr + own, n, N) + vector_of(write_ptr + own, n, N)
            tl.store(next_precedence_ptr + own + n, last, mask=n < N)
            for q in range(R):
                reader = tl.cast(q, tl.int64)
                backward = _parts_of(part_ptr + reader * N, n, N, tl.cdiv(N, BLOCK_M), R * N, BLOCK_V)
                tl.store(followed_ptr + ((R + reader) * U + head) * N + n, backward, mask=n < N)
        tl.debug_barrier()


@device
def _link_tiles_backward(
    dlink_ptr, part_ptr, dforward_ptr, dbackward_ptr, link_ptr, write_ptr, precedence_ptr, read_ptr, N, R, U,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One head. A part "R+2 N" holds what one block of rows adds to the gradients of the R readers, of write and of precedence; that
    after the last block what rows sum up, of the first two."""
    r, rows = lanes(BLOCK_R), tl.cdiv(N, BLOCK_M) * (R + 2) * N
    for top in range(0, N, BLOCK_M):
        m = top + lanes(BLOCK_M)
        w_rows, q_rows = vector_of(write_ptr, m, N), heads_tile(read_ptr, N, 1, r[None, :], m[:, None], R, N)
        df_rows = heads_tile(dforward_ptr, U * N, 1, r[None, :], m[:, None], R, N)
        df_columns = heads_tile(dforward_ptr, U * N, 1, r[:, None], m[None, :], R, N)
        dread, dwrite = tl.zeros([BLOCK_M, BLOCK_R], tl.float32), tl.zeros([BLOCK_M], tl.float32)
        part = part_ptr + tl.cast(top // BLOCK_M, tl.int64) * (R + 2) * N
        for first in range(0, N, BLOCK_C):
            n = first + lanes(BLOCK_C)
            off = m[:, None] != n[None, :]
            w, p, link = vector_of(write_ptr, n, N), vector_of(precedence_ptr, n, N), tile_of(link_ptr, m, n, N, N)
            g = dot(df_rows, heads_tile(read_ptr, N, 1, r[:, None], n[None, :], R, N), tile_of(dlink_ptr, m, n, N, N), "ieee")
            g = dot(q_rows, heads_tile(dbackward_ptr, U * N, 1, r[:, None], n[None, :], R, N), g, "ieee")
            g, link = tl.where(off, g, 0.0), tl.where(off, link, 0.0)
            dwrite += tl.sum(g * (p[None, :] - link), 1)
            tl.store(part + R * N + n, -tl.sum(g * link, 0), mask=n < N)
            tl.store(part + (R + 1) * N + n, tl.sum(w_rows[:, None] * g, 0), mask=n < N)
            new = updated(link, w_rows, w, p, off)
            store_tile(part, dot(df_columns, new, tl.zeros([BLOCK_R, BLOCK_C], tl.float32), "ieee"), r, n, R, N)
            dread = dot(new, heads_tile(dbackward_ptr, U * N, 1, r[None, :], n[:, None], R, N), dread, "ieee")
            tl.debug_barrier()  # a thread that has the same element, for a sum, must not find what this one stores
            store_tile(dlink_ptr, g * (1 - w_rows[:, None] - w[None, :]), m, n, N, N)
        tl.store(part_ptr + rows + R * N + m, dwrite, mask=m < N)
        tl.store(part_ptr + rows + r[None, :] * N + m[:, None], dread, mask=(m < N)[:, None] & (r < R)[None, :])
    tl.debug_barrier()


@device
def follow_backward(
    dlink_ptr, dprecedence_ptr, dweights_ptr, part_ptr, dfollowed_ptr, link_ptr, write_ptr, precedence_ptr, read_ptr, N, R, U,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """From the links before: the gradients of links and precedence before, in place; `dweights` "R+U N": that of the readers before, and
    more of the writers."""
    blocks, step = tl.cdiv(N, BLOCK_M), (R + 2) * N
    for first in range(0, R * N, BLOCK_V):
        n = first + lanes(BLOCK_V)
        tl.store(dweights_ptr + n, tl.zeros([BLOCK_V], tl.float32), mask=n < R * N)
    for u in range(U):
        head = tl.cast(u, tl.int64)
        own = head * N
        _link_tiles_backward(
            dlink_ptr + own * N, part_ptr, dfollowed_ptr + own, dfollowed_ptr + (R * U + head) * N, link_ptr + own * N, write_ptr + own,
            precedence_ptr + own, read_ptr, N, R, U, BLOCK_M, BLOCK_C, BLOCK_R,
        )  # fmt: skip
        written, lost = sum_of(write_ptr + own, N, BLOCK_V), tl.cast(0.0, tl.float32)
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            lost += tl.sum(vector_of(dprecedence_ptr + own, n, N) * vector_of(precedence_ptr + own, n, N), 0)
        tl.debug_barrier()
        for first in range(0, N, BLOCK_V):
            n = first + lanes(BLOCK_V)
            d = vector_of(dprecedence_ptr + own, n, N)
            found = _parts_of(part_ptr + R * N, n, N, blocks + 1, step, BLOCK_V) + (d - lost)
            place = dweights_ptr + (R + head) * N + n
            tl.store(place, tl.load(place, mask=n < N, other=0.0) + found, mask=n < N)
            found = _parts_of(part_ptr + (R + 1) * N, n, N, blocks, step, BLOCK_V) + (1 - written) * d
            tl.store(dprecedence_ptr + own + n, found, mask=n < N)
            for q in range(R):
                reader = tl.cast(q, tl.int64) * N
                found = vector_of(dweights_ptr + reader, n, N) + _parts_of(part_ptr + reader, n, N, blocks + 1, step, BLOCK_V)
                tl.store(dweights_ptr + reader + n, found, mask=n < N)
        tl.debug_barrier()
