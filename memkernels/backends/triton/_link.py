"""The kernels of link_step and link_read on Triton: L'_ij = (1 - w_i - w_j) L_ij + w_i p_j, diagonal 0 (or L' = L), L' q and L'^T q.

A program owns a block of rows of one matrix and walks its columns: L' is made in registers from one read of L, written, and multiplied from
both sides. Row sums stay in registers; column sums go to one partial a block of rows, combined in a fixed order. In backward what a program
adds up for its own rows is one more partial. Bytes an element of the matrix: forward 1 read, 1 write, backward 2 reads, 1 write, and
4 (R + 2) / BLOCK_M for partials. float32 inside.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, device, dot, lanes, precision, refuse, run, store, strides, sum_splits


@device
def heads_tile(ptr, stride_r, stride_n, r, n, R, N):
    """A tile of weights or gradients of the read heads, as float32; r and n say which way it lies."""
    return tl.load(ptr + r * stride_r + n * stride_n, mask=(r < R) & (n < N), other=0.0).to(tl.float32)


@device
def _row(ptr, stride_n, n, N):
    return tl.load(ptr + n * stride_n, mask=n < N, other=0.0).to(tl.float32)


@device
def updated(link, w_rows, w, p, off):
    """The new links of a tile; off: not on the diagonal."""
    return tl.where(off, (1 - w_rows[:, None] - w[None, :]) * link + w_rows[:, None] * p[None, :], 0.0)


@triton.jit
def _link_fwd_kernel(
    new_ptr, new_precedence_ptr, forward_ptr, part_ptr, link_ptr, precedence_ptr, write_ptr, read_ptr, B, H, R, N,
    link_stride_b, link_stride_h, link_stride_m, link_stride_n, precedence_stride_b, precedence_stride_h, precedence_stride_n,
    write_stride_b, write_stride_h, write_stride_n, read_stride_b, read_stride_r, read_stride_n,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    at, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    b, h, m, r = at // H, at % H, block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_R)
    link_ptr += b * link_stride_b + h * link_stride_h
    read_ptr += b * read_stride_b
    q_rows = heads_tile(read_ptr, read_stride_r, read_stride_n, r[:, None], m[None, :], R, N)
    forward, written = tl.zeros([BLOCK_M, BLOCK_R], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    if UPDATE:
        precedence_ptr += b * precedence_stride_b + h * precedence_stride_h
        write_ptr += b * write_stride_b + h * write_stride_h
        w_rows = _row(write_ptr, write_stride_n, m, N)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        tile = (m < N)[:, None] & (n < N)[None, :]
        new = tl.load(link_ptr + m[:, None] * link_stride_m + n[None, :] * link_stride_n, mask=tile, other=0.0).to(tl.float32)
        if UPDATE:
            w, p = _row(write_ptr, write_stride_n, n, N), _row(precedence_ptr, precedence_stride_n, n, N)
            new = updated(new, w_rows, w, p, m[:, None] != n[None, :])
            store(new_ptr + (at * N + m[:, None]) * N + n[None, :], new, mask=tile)
            written += w
        forward = dot(new, heads_tile(read_ptr, read_stride_r, read_stride_n, r[None, :], n[:, None], R, N), forward, PRECISION)
        columns = dot(q_rows, new, tl.zeros([BLOCK_R, BLOCK_N], tl.float32), PRECISION)
        place = ((block * B + b) * R + r[:, None]) * H + h
        store(part_ptr + place * N + n[None, :], columns, mask=(r < R)[:, None] & (n < N)[None, :])
    place = (b * R + r[None, :]) * H + h
    store(forward_ptr + place * N + m[:, None], forward, mask=(m < N)[:, None] & (r < R)[None, :])
    if UPDATE:
        last = (1 - tl.sum(written, 0)) * _row(precedence_ptr, precedence_stride_n, m, N) + w_rows
        store(new_precedence_ptr + at * N + m, last, mask=m < N)


@triton.jit
def _link_bwd_kernel(
    dlink_ptr, dprecedence_part_ptr, dwrite_part_ptr, dread_part_ptr, dnew_ptr, dnew_precedence_ptr, dforward_ptr, dbackward_ptr,
    link_ptr, precedence_ptr, write_ptr, read_ptr, B, H, R, N, dnew_stride_b, dnew_stride_h, dnew_stride_m, dnew_stride_n,
    dnew_precedence_stride_b, dnew_precedence_stride_h, dnew_precedence_stride_n,
    dforward_stride_b, dforward_stride_r, dforward_stride_h, dforward_stride_n,
    dbackward_stride_b, dbackward_stride_r, dbackward_stride_h, dbackward_stride_n,
    link_stride_b, link_stride_h, link_stride_m, link_stride_n, precedence_stride_b, precedence_stride_h, precedence_stride_n,
    write_stride_b, write_stride_h, write_stride_n, read_stride_b, read_stride_r, read_stride_n,
    UPDATE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_M)
    at, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    b, h, m, r = at // H, at % H, block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_R)
    link_ptr += b * link_stride_b + h * link_stride_h
    read_ptr += b * read_stride_b
    q_rows = heads_tile(read_ptr, read_stride_r, read_stride_n, r[None, :], m[:, None], R, N)
    if dforward_ptr is not None:
        dforward_ptr += b * dforward_stride_b + h * dforward_stride_h
        df_rows = heads_tile(dforward_ptr, dforward_stride_r, dforward_stride_n, r[None, :], m[:, None], R, N)
        df_columns = heads_tile(dforward_ptr, dforward_stride_r, dforward_stride_n, r[:, None], m[None, :], R, N)
    if dbackward_ptr is not None:
        dbackward_ptr += b * dbackward_stride_b + h * dbackward_stride_h
    if UPDATE:
        precedence_ptr += b * precedence_stride_b + h * precedence_stride_h
        write_ptr += b * write_stride_b + h * write_stride_h
        w_rows = _row(write_ptr, write_stride_n, m, N)
        if dnew_precedence_ptr is not None:
            dnew_precedence_ptr += b * dnew_precedence_stride_b + h * dnew_precedence_stride_h
    dread, dw_rows = tl.zeros([BLOCK_M, BLOCK_R], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    written, lost = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, N, BLOCK_N):
        n = first + lanes(BLOCK_N)
        tile, part = (m < N)[:, None] & (n < N)[None, :], (block * B * H + at) * N + n
        new = tl.load(link_ptr + m[:, None] * link_stride_m + n[None, :] * link_stride_n, mask=tile, other=0.0).to(tl.float32)
        g = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if dnew_ptr is not None:
            place = b * dnew_stride_b + h * dnew_stride_h + m[:, None] * dnew_stride_m + n[None, :] * dnew_stride_n
            g = tl.load(dnew_ptr + place, mask=tile, other=0.0).to(tl.float32)
        if dforward_ptr is not None:
            g = dot(df_rows, heads_tile(read_ptr, read_stride_r, read_stride_n, r[:, None], n[None, :], R, N), g, PRECISION)
        if dbackward_ptr is not None:
            g = dot(q_rows, heads_tile(dbackward_ptr, dbackward_stride_r, dbackward_stride_n, r[:, None], n[None, :], R, N), g, PRECISION)
        if UPDATE:
            w, p = _row(write_ptr, write_stride_n, n, N), _row(precedence_ptr, precedence_stride_n, n, N)
            off = tile & (m[:, None] != n[None, :])
            g, link = tl.where(off, g, 0.0), tl.where(off, new, 0.0)
            kept = 1 - w_rows[:, None] - w[None, :]
            new = tl.where(off, kept * link + w_rows[:, None] * p[None, :], 0.0)
            dw_rows += tl.sum(g * (p[None, :] - link), 1)
            if dwrite_part_ptr is not None:
                store(dwrite_part_ptr + part, -tl.sum(g * link, 0), mask=n < N)
            if dprecedence_part_ptr is not None:
                store(dprecedence_part_ptr + part, tl.sum(w_rows[:, None] * g, 0), mask=n < N)
            written += w
            if dnew_precedence_ptr is not None:
                lost += _row(dnew_precedence_ptr, dnew_precedence_stride_n, n, N) * p
            g *= kept
        if dlink_ptr is not None:
            store(dlink_ptr + (at * N + m[:, None]) * N + n[None, :], g, mask=tile)
        if dread_part_ptr is not None:
            columns = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
            if dforward_ptr is not None:
                columns = dot(df_columns, new, columns, PRECISION)
            if dbackward_ptr is not None:
                db = heads_tile(dbackward_ptr, dbackward_stride_r, dbackward_stride_n, r[None, :], n[:, None], R, N)
                dread = dot(new, db, dread, PRECISION)
            place = ((block * H + h) * B + b) * R + r[:, None]
            store(dread_part_ptr + place * N + n[None, :], columns, mask=(r < R)[:, None] & (n < N)[None, :])
    own = (blocks * B * H + at) * N + m
    if dread_part_ptr is not None:
        place = ((blocks * H + h) * B + b) * R + r[None, :]
        store(dread_part_ptr + place * N + m[:, None], dread, mask=(m < N)[:, None] & (r < R)[None, :])
    if UPDATE:
        d = tl.zeros([BLOCK_M], tl.float32)
        if dnew_precedence_ptr is not None:
            d = _row(dnew_precedence_ptr, dnew_precedence_stride_n, m, N)
        if dwrite_part_ptr is not None:
            store(dwrite_part_ptr + own, dw_rows + d - tl.sum(lost, 0), mask=m < N)
        if dprecedence_part_ptr is not None:
            store(dprecedence_part_ptr + own, (1 - tl.sum(written, 0)) * d, mask=m < N)


def refusal(link, read_weights):
    heads = read_weights.shape[1]
    if heads > _launch.MAX_HEADS // 4:
        return f"{heads} read heads are over the limit of {_launch.MAX_HEADS // 4}"
    return refuse(link)


def _options(link, read, update, backward):
    tiles = _launch.link(link.shape[2], read.shape[1], backward)
    return tiles, dict(
        UPDATE=update, PRECISION=precision(link.dtype), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r,
        num_warps=tiles.num_warps, num_stages=2,
    )  # fmt: skip


def step(new, new_precedence, forward, backward, link, precedence, write, read):
    """Forward of both ops; what an op does not have is None."""
    batch, heads, rows, _ = link.shape
    tiles, options = _options(link, read, write is not None, False)
    part = backward.new_empty(tiles.splits, *backward.shape, dtype=torch.float32)
    run(
        _link_fwd_kernel, (batch * heads * tiles.splits,), new, new_precedence, forward, part, link, precedence, write, read,
        batch, heads, read.shape[1], rows, *link.stride(), *strides(precedence, 3), *strides(write, 3), *read.stride(), **options,
    )  # fmt: skip
    sum_splits(backward, part)


def step_backward(gradients, upstream, link, precedence, write, read):
    """gradients: of link, precedence, write and read weights; upstream: of the new link and precedence, of forward and backward."""
    batch, heads, rows, _ = link.shape
    tiles, options = _options(link, read, write is not None, True)
    dlink, sums = gradients[0], gradients[1:]
    counts = (tiles.splits + 1, tiles.splits + 1, (tiles.splits + 1) * heads)
    parts = [None if t is None else t.new_empty(n, *t.shape, dtype=torch.float32) for t, n in zip(sums, counts)]
    steps = (stride for t, dims in zip(upstream, (4, 3, 4, 4)) for stride in strides(t, dims))
    run(
        _link_bwd_kernel, (batch * heads * tiles.splits,), dlink, *parts, *upstream, link, precedence, write, read,
        batch, heads, read.shape[1], rows, *steps, *link.stride(), *strides(precedence, 3), *strides(write, 3), *read.stride(), **options,
    )  # fmt: skip
    for gradient, part in zip(sums, parts):
        if gradient is not None and part is not None:
            sum_splits(gradient, part)


def aot_kernels(name, update):
    """Both kernels of one op for ahead-of-time compilation."""
    found = []
    for dtype in AOT_DTYPES:
        for kind, kernel in (("fwd", _link_fwd_kernel), ("bwd", _link_bwd_kernel)):
            tiles = _launch.link(512, 4, kind == "bwd")
            constants: dict[str, Any] = {a: 1 for a in kernel.arg_names if a.endswith("stride_n")}
            constants |= dict(
                UPDATE=update, PRECISION=precision(dtype), BLOCK_M=tiles.block_m, BLOCK_N=tiles.block_n, BLOCK_R=tiles.block_r
            )
            if not update:
                words = ("precedence", "write", "new")
                constants |= {a: None for a in kernel.arg_names if a.endswith("_ptr") and any(word in a for word in words)}
            types = {a: "*fp32" for a in kernel.arg_names if a.endswith("part_ptr")}
            found.append(aot(f"{name}_{kind}", kernel, dtype, constants, types, tiles.num_warps, 2))
    return found
