"""The softmax over a union of parts on Triton: lse = log sum_s exp(lse_s), out = sum_s exp(lse_s - lse) out_s.

A program owns a block of rows (b, h, q), in forward a tile of their width too; it reads the log-sum-exps of all parts first, then the parts
in their order. Bytes a row: forward (S + 1) V elements, backward (2 S + 1) V, S V more where the width is over one tile. float32 inside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, refuse, run, store, strides


@triton.jit
def _place(row, NH, Q, stride_b, stride_h, stride_q):
    """Where row (b, h, q) begins."""
    return row // Q // NH * stride_b + row // Q % NH * stride_h + row % Q * stride_q


@triton.jit
def _union(lses_ptr, rows, S, stride_s, BLOCK_M: tl.constexpr):
    """The maximum of the log-sum-exps of a row (0 where all are -inf), and the sum of their exponentials less it."""
    top, total = tl.full([BLOCK_M], float("-inf"), tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for s in range(S):
        top = tl.maximum(top, tl.load(lses_ptr + tl.cast(s, tl.int64) * stride_s, mask=rows, other=float("-inf")))
    top = tl.where(top == float("-inf"), 0.0, top)
    for s in range(S):
        total += tl.exp(tl.load(lses_ptr + tl.cast(s, tl.int64) * stride_s, mask=rows, other=float("-inf")) - top)
    return top, total


@triton.jit
def _weight(lses_ptr, rows, s, stride_s, top, total):
    lse = tl.load(lses_ptr + tl.cast(s, tl.int64) * stride_s, mask=rows, other=float("-inf"))
    return tl.exp(lse - top) / tl.where(total == 0, 1.0, total)


@triton.jit
def _merge_attention_fwd_kernel(
    out_ptr, lse_ptr, outs_ptr, lses_ptr, S, NH, Q, V, M,
    outs_stride_s, outs_stride_b, outs_stride_h, outs_stride_q, outs_stride_v,
    lses_stride_s, lses_stride_b, lses_stride_h, lses_stride_q,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, v = tl.program_id(0).to(tl.int64) * BLOCK_M + lanes(BLOCK_M), tl.program_id(1).to(tl.int64) * BLOCK_V + lanes(BLOCK_V)
    rows, tile = row < M, (row < M)[:, None] & (v < V)[None, :]
    outs_ptr += _place(row, NH, Q, outs_stride_b, outs_stride_h, outs_stride_q)[:, None] + v[None, :] * outs_stride_v
    lses_ptr += _place(row, NH, Q, lses_stride_b, lses_stride_h, lses_stride_q)
    top, total = _union(lses_ptr, rows, S, lses_stride_s, BLOCK_M)
    out = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for s in range(S):
        weight = _weight(lses_ptr, rows, s, lses_stride_s, top, total)
        counts = tile & (weight != 0)[:, None]
        out += weight[:, None] * tl.load(outs_ptr + tl.cast(s, tl.int64) * outs_stride_s, mask=counts, other=0.0).to(tl.float32)
    store(out_ptr + row[:, None] * V + v[None, :], out, mask=tile)
    if tl.program_id(1) == 0:
        store(lse_ptr + row, top + tl.log(total), mask=rows)


@triton.jit
def _dot(outs_ptr, dout_ptr, counts, V, outs_stride_v, dout_stride_v, BLOCK_V: tl.constexpr):
    """dout . out of one part."""
    dot = tl.zeros([counts.shape[0]], tl.float32)
    for first in range(0, V, BLOCK_V):
        v = first + lanes(BLOCK_V)
        tile = counts[:, None] & (v < V)[None, :]
        out = tl.load(outs_ptr[:, None] + v[None, :] * outs_stride_v, mask=tile, other=0.0).to(tl.float32)
        dot += tl.sum(out * tl.load(dout_ptr[:, None] + v[None, :] * dout_stride_v, mask=tile, other=0.0).to(tl.float32), 1)
    return dot


@triton.jit
def _merge_attention_bwd_kernel(
    douts_ptr, dlses_ptr, dout_ptr, dlse_ptr, outs_ptr, lses_ptr, S, NH, Q, V, M,
    dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v, dlse_stride_b, dlse_stride_h, dlse_stride_q,
    outs_stride_s, outs_stride_b, outs_stride_h, outs_stride_q, outs_stride_v,
    lses_stride_s, lses_stride_b, lses_stride_h, lses_stride_q,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + lanes(BLOCK_M)
    rows = row < M
    outs_ptr += _place(row, NH, Q, outs_stride_b, outs_stride_h, outs_stride_q)
    lses_ptr += _place(row, NH, Q, lses_stride_b, lses_stride_h, lses_stride_q)
    top, total = _union(lses_ptr, rows, S, lses_stride_s, BLOCK_M)
    less = tl.zeros([BLOCK_M], tl.float32)  # the weighted mean of the dots, less the upstream gradient of lse
    if dout_ptr is not None:
        dout_ptr += _place(row, NH, Q, dout_stride_b, dout_stride_h, dout_stride_q)
        if dlses_ptr is not None:
            for s in range(S):
                weight = _weight(lses_ptr, rows, s, lses_stride_s, top, total)
                part = outs_ptr + tl.cast(s, tl.int64) * outs_stride_s
                less += weight * _dot(part, dout_ptr, rows & (weight != 0), V, outs_stride_v, dout_stride_v, BLOCK_V)
    if dlse_ptr is not None:
        less -= tl.load(dlse_ptr + _place(row, NH, Q, dlse_stride_b, dlse_stride_h, dlse_stride_q), mask=rows & (total != 0), other=0.0)
    for s in range(S):
        weight = _weight(lses_ptr, rows, s, lses_stride_s, top, total)
        counts, place = rows & (weight != 0), tl.cast(s, tl.int64) * M + row
        if dlses_ptr is not None:
            dot = tl.zeros([BLOCK_M], tl.float32)
            if dout_ptr is not None:
                part = outs_ptr + tl.cast(s, tl.int64) * outs_stride_s
                dot = _dot(part, dout_ptr, counts, V, outs_stride_v, dout_stride_v, BLOCK_V)
            store(dlses_ptr + place, tl.where(counts, weight * (dot - less), 0.0), mask=rows)
        if douts_ptr is not None:
            for first in range(0, V, BLOCK_V):
                v = first + lanes(BLOCK_V)
                d = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
                if dout_ptr is not None:
                    tile = counts[:, None] & (v < V)[None, :]
                    d = weight[:, None] * tl.load(dout_ptr[:, None] + v[None, :] * dout_stride_v, mask=tile, other=0.0).to(tl.float32)
                store(douts_ptr + place[:, None] * V + v[None, :], d, mask=rows[:, None] & (v < V)[None, :])


def supports(outs, lses):
    return refuse(outs)


def forward(out, lse, outs, lses):
    parts, _, heads, queries, width = outs.shape
    blocks, rows = _launch.pointwise(width), lse.numel()
    run(
        _merge_attention_fwd_kernel, (_launch.ceil_div(rows, blocks.block_n), max(_launch.ceil_div(width, blocks.block_w), 1)),
        out, lse, outs, lses, parts, heads, queries, width, rows, *outs.stride(), *lses.stride(), **_tiles(blocks),
    )  # fmt: skip


def backward(douts, dlses, dout, dlse, outs, lses):
    parts, batch, heads, queries, width = outs.shape
    blocks, rows = _launch.pointwise(width), batch * heads * queries
    run(
        _merge_attention_bwd_kernel, (_launch.ceil_div(rows, blocks.block_n),), douts, dlses, dout, dlse, outs, lses,
        parts, heads, queries, width, rows, *strides(dout, 4), *strides(dlse, 3), *outs.stride(), *lses.stride(), **_tiles(blocks),
    )  # fmt: skip


def _tiles(blocks):
    return dict(BLOCK_M=blocks.block_n, BLOCK_V=blocks.block_w, num_warps=blocks.num_warps)


def _aot(name, kernel, dtype):
    blocks = _launch.pointwise(64)
    ones = {a: 1 for a in kernel.arg_names if a.endswith(("stride_v", "stride_q")) and ("lse" in a or a.endswith("v"))}
    types = {a: "*fp32" for a in kernel.arg_names if "lse" in a and a.endswith("_ptr")}
    return aot(name, kernel, dtype, ones | dict(BLOCK_M=blocks.block_n, BLOCK_V=blocks.block_w), types, blocks.num_warps)


AOT = [
    _aot(name, kernel, dtype)
    for dtype in AOT_DTYPES
    for name, kernel in (("merge_attention_fwd", _merge_attention_fwd_kernel), ("merge_attention_bwd", _merge_attention_bwd_kernel))
]
