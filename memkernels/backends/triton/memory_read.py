"""read = weights @ memory on Triton.

Forward: a program owns one split of the rows of one batch entry and one tile of the width, and holds all heads; partial sums are combined
in a fixed order by a second kernel. Backward: a program owns a block of rows, reads it once and writes both gradients; nothing is combined.
Bytes: forward s*N*W + 4*R*W a split, backward 2*s*N*W. Products are exact in float32 (see _common.precision), sums float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, precision, refuse, run, store, strides, sum_splits


@triton.jit
def _memory_read_fwd_kernel(
    part_ptr, memory_ptr, weights_ptr, B, N, R, W, splits, chunk,
    memory_stride_b, memory_stride_n, memory_stride_w, weights_stride_b, weights_stride_r, weights_stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, split = tl.program_id(0).to(tl.int64) // splits, tl.program_id(0).to(tl.int64) % splits
    r, w = lanes(BLOCK_R), tl.program_id(1).to(tl.int64) * BLOCK_W + lanes(BLOCK_W)
    memory_ptr += b * memory_stride_b + w[None, :] * memory_stride_w
    weights_ptr += b * weights_stride_b + r[:, None] * weights_stride_r
    total = tl.zeros([BLOCK_R, BLOCK_W], tl.float32)
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, N), BLOCK_N):
        n = first + lanes(BLOCK_N)
        memory = tl.load(memory_ptr + n[:, None] * memory_stride_n, mask=(n < N)[:, None] & (w < W)[None, :], other=0.0)
        weights = tl.load(weights_ptr + n[None, :] * weights_stride_n, mask=(r < R)[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(weights.to(tl.float32), memory.to(tl.float32), total, input_precision=PRECISION)
    place = ((split * B + b) * R + r)[:, None] * W + w[None, :]
    store(part_ptr + place, total, mask=(r < R)[:, None] & (w < W)[None, :])


@triton.jit
def _memory_read_bwd_kernel(
    dmemory_ptr, dweights_ptr, dread_ptr, memory_ptr, weights_ptr, N, R, W,
    dread_stride_b, dread_stride_r, dread_stride_w, memory_stride_b, memory_stride_n, memory_stride_w,
    weights_stride_b, weights_stride_r, weights_stride_n,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    b = tl.program_id(0).to(tl.int64) // blocks
    n, r = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK_N + lanes(BLOCK_N), lanes(BLOCK_R)
    memory_ptr += b * memory_stride_b + n[:, None] * memory_stride_n
    dread_ptr += b * dread_stride_b + r[:, None] * dread_stride_r
    heads = (n < N)[:, None] & (r < R)[None, :]
    weights_ptr += b * weights_stride_b + n[:, None] * weights_stride_n + r[None, :] * weights_stride_r
    weights = tl.load(weights_ptr, mask=heads, other=0.0).to(tl.float32)
    dweights = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for first in range(0, W, BLOCK_W):
        w = first + lanes(BLOCK_W)
        dread = tl.load(dread_ptr + w[None, :] * dread_stride_w, mask=(r < R)[:, None] & (w < W)[None, :], other=0.0).to(tl.float32)
        tile = (n < N)[:, None] & (w < W)[None, :]
        if dweights_ptr is not None:
            memory = tl.load(memory_ptr + w[None, :] * memory_stride_w, mask=tile, other=0.0).to(tl.float32)
            dweights = tl.dot(dread, tl.trans(memory), dweights, input_precision=PRECISION)
        if dmemory_ptr is not None:
            dmemory = tl.dot(weights, dread, input_precision=PRECISION)
            store(dmemory_ptr + (b * N + n)[:, None] * W + w[None, :], dmemory, mask=tile)
    if dweights_ptr is not None:
        store(dweights_ptr + (b * R + r)[:, None] * N + n[None, :], dweights, mask=(r < R)[:, None] & (n < N)[None, :])


def supports(memory, weights):
    if weights.shape[1] > _launch.MAX_HEADS:
        return f"{weights.shape[1]} heads are over the limit of {_launch.MAX_HEADS}"
    return refuse(memory)


def _tiles(rows, dtype):
    return dict(BLOCK_R=rows.block_r, BLOCK_N=rows.block_n, BLOCK_W=rows.block_w, PRECISION=precision(dtype), num_warps=rows.num_warps)


def forward(read, memory, weights):
    batch, heads, count = weights.shape
    width = memory.shape[2]
    rows = _launch.memory_read(count, heads, width)
    part = read[None] if rows.splits == 1 else read.new_empty(rows.splits, *read.shape, dtype=torch.float32)
    run(
        _memory_read_fwd_kernel, (batch * rows.splits, _launch.ceil_div(width, rows.block_w)),
        part, memory, weights, batch, count, heads, width, rows.splits, rows.chunk,
        *memory.stride(), *weights.stride(), **_tiles(rows, memory.dtype),
    )  # fmt: skip
    if rows.splits != 1:
        sum_splits(read, part)


def backward(dmemory, dweights, dread, memory, weights):
    batch, heads, count = weights.shape
    rows = _launch.memory_read(count, heads, memory.shape[2], backward=True)
    run(
        _memory_read_bwd_kernel, (batch * _launch.ceil_div(count, rows.block_n),),
        dmemory, dweights, dread, memory, weights, count, heads, memory.shape[2],
        *strides(dread, 3), *memory.stride(), *weights.stride(), **_tiles(rows, memory.dtype),
    )  # fmt: skip


def _aot(name, kernel, dtype, **types):
    rows = _launch.memory_read(65536, 4, 64, "bwd" in name)
    constants = {k: v for k, v in _tiles(rows, dtype).items() if k.isupper()}
    ones = {a: 1 for a in kernel.arg_names if a in ("memory_stride_w", "weights_stride_n", "dread_stride_w")}
    return aot(name, kernel, dtype, constants | ones, types, rows.num_warps)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        _aot("memory_read_fwd", _memory_read_fwd_kernel, dtype, part_ptr="*fp32"),
        _aot("memory_read_bwd", _memory_read_bwd_kernel, dtype),
    )
]
