"""written = memory * prod_h(1 - w_h e_h^T) + sum_h w_h a_h^T on Triton.

A program owns a block of whole rows; all heads are applied while it is in registers. Backward sums over rows go to one partial a program,
combined in a fixed order; the product over the other heads is taken anew for each head, which is exact where a factor is zero.
Bytes: forward 2*s*N*W, backward 3*s*N*W + 16*H*W a block of rows. float32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, refuse, run, store, strides, sum_splits


@triton.jit
def _memory_write_fwd_kernel(
    written_ptr, memory_ptr, weights_ptr, erase_ptr, add_ptr, N, W, H,
    written_stride_b, written_stride_n, written_stride_w, memory_stride_b, memory_stride_n, memory_stride_w,
    weights_stride_b, weights_stride_h, weights_stride_n, erase_stride_b, erase_stride_h, erase_stride_w,
    add_stride_b, add_stride_h, add_stride_w, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    b = tl.program_id(0).to(tl.int64) // blocks
    n, w = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK_N + lanes(BLOCK_N), lanes(BLOCK_W)
    tile = (n < N)[:, None] & (w < W)[None, :]
    place = b * memory_stride_b + n[:, None] * memory_stride_n + w[None, :] * memory_stride_w
    memory = tl.load(memory_ptr + place, mask=tile, other=0.0).to(tl.float32)
    kept, added = tl.full([BLOCK_N, BLOCK_W], 1.0, tl.float32), tl.zeros([BLOCK_N, BLOCK_W], tl.float32)
    for h in range(H):
        head = tl.cast(h, tl.int64)
        weights = tl.load(weights_ptr + b * weights_stride_b + head * weights_stride_h + n * weights_stride_n, mask=n < N, other=0.0)
        erase = tl.load(erase_ptr + b * erase_stride_b + head * erase_stride_h + w * erase_stride_w, mask=w < W, other=0.0)
        add = tl.load(add_ptr + b * add_stride_b + head * add_stride_h + w * add_stride_w, mask=w < W, other=0.0)
        weights = weights.to(tl.float32)[:, None]
        kept *= 1 - weights * erase.to(tl.float32)[None, :]
        added += weights * add.to(tl.float32)[None, :]
    place = b * written_stride_b + n[:, None] * written_stride_n + w[None, :] * written_stride_w
    store(written_ptr + place, memory * kept + added, mask=tile)


@triton.jit
def _memory_write_bwd_kernel(
    dmemory_ptr, dweights_ptr, derase_part_ptr, dadd_part_ptr, dwritten_ptr, memory_ptr, weights_ptr, erase_ptr, add_ptr, B, N, W, H,
    dwritten_stride_b, dwritten_stride_n, dwritten_stride_w, memory_stride_b, memory_stride_n, memory_stride_w,
    weights_stride_b, weights_stride_h, weights_stride_n, erase_stride_b, erase_stride_h, erase_stride_w,
    add_stride_b, add_stride_h, add_stride_w, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    b, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    n, w = block * BLOCK_N + lanes(BLOCK_N), lanes(BLOCK_W)
    tile = (n < N)[:, None] & (w < W)[None, :]
    memory = tl.load(memory_ptr + b * memory_stride_b + n[:, None] * memory_stride_n + w[None, :] * memory_stride_w, mask=tile, other=0.0)
    place = b * dwritten_stride_b + n[:, None] * dwritten_stride_n + w[None, :] * dwritten_stride_w
    d = tl.load(dwritten_ptr + place, mask=tile, other=0.0).to(tl.float32)
    weights_ptr += b * weights_stride_b + n * weights_stride_n
    erase_ptr += b * erase_stride_b + w * erase_stride_w
    add_ptr += b * add_stride_b + w * add_stride_w
    for h in range(H):
        head = tl.cast(h, tl.int64)
        others = tl.full([BLOCK_N, BLOCK_W], 1.0, tl.float32)
        for g in range(H):
            other = tl.cast(g, tl.int64)
            factor = tl.load(weights_ptr + other * weights_stride_h, mask=n < N, other=0.0).to(tl.float32)[:, None]
            factor *= tl.load(erase_ptr + other * erase_stride_h, mask=w < W, other=0.0).to(tl.float32)[None, :]
            others *= tl.where(g == h, 1.0, 1 - factor)
        weights = tl.load(weights_ptr + head * weights_stride_h, mask=n < N, other=0.0).to(tl.float32)
        erase = tl.load(erase_ptr + head * erase_stride_h, mask=w < W, other=0.0).to(tl.float32)
        add = tl.load(add_ptr + head * add_stride_h, mask=w < W, other=0.0).to(tl.float32)
        dkept = d * memory.to(tl.float32) * others
        dweights = tl.sum(d * add[None, :] - dkept * erase[None, :], 1)
        if dweights_ptr is not None:
            store(dweights_ptr + (b * H + head) * N + n, dweights, mask=n < N)
        part = ((block * B + b) * H + head) * W + w
        if derase_part_ptr is not None:
            store(derase_part_ptr + part, -tl.sum(dkept * weights[:, None], 0), mask=w < W)
        if dadd_part_ptr is not None:
            store(dadd_part_ptr + part, tl.sum(d * weights[:, None], 0), mask=w < W)
    if dmemory_ptr is not None:
        for h in range(H):
            head = tl.cast(h, tl.int64)
            factor = tl.load(weights_ptr + head * weights_stride_h, mask=n < N, other=0.0).to(tl.float32)[:, None]
            d *= 1 - factor * tl.load(erase_ptr + head * erase_stride_h, mask=w < W, other=0.0).to(tl.float32)[None, :]
        store(dmemory_ptr + (b * N + n)[:, None] * W + w[None, :], d, mask=tile)


def supports(memory, weights, erase, add):
    return _launch.refuse_rows(1, memory.shape[2]) or refuse(memory)


def forward(written, memory, weights, erase, add):
    batch, count, width = memory.shape
    rows = _launch.memory_write(count, width)
    run(
        _memory_write_fwd_kernel, (batch * rows.splits,), written, memory, weights, erase, add, count, width, weights.shape[1],
        *written.stride(), *memory.stride(), *weights.stride(), *erase.stride(), *add.stride(),
        BLOCK_N=rows.block_n, BLOCK_W=rows.block_w, num_warps=rows.num_warps,
    )  # fmt: skip


def backward(dmemory, dweights, derase, dadd, dwritten, memory, weights, erase, add):
    batch, count, width = memory.shape
    rows = _launch.memory_write(count, width)
    parts = [None if t is None else t.new_empty(rows.splits, *t.shape, dtype=torch.float32) for t in (derase, dadd)]
    run(
        _memory_write_bwd_kernel, (batch * rows.splits,), dmemory, dweights, *parts, dwritten, memory, weights, erase, add,
        batch, count, width, weights.shape[1],
        *strides(dwritten, 3), *memory.stride(), *weights.stride(), *erase.stride(), *add.stride(),
        BLOCK_N=rows.block_n, BLOCK_W=rows.block_w, num_warps=rows.num_warps,
    )  # fmt: skip
    for gradient, part in zip((derase, dadd), parts, strict=True):
        if gradient is not None and part is not None:
            sum_splits(gradient, part)


def _aot(name, kernel, dtype):
    rows = _launch.memory_write(65536, 64)
    ones = {a: 1 for a in kernel.arg_names if a.endswith(("stride_w", "weights_stride_n"))}
    types = {a: "*fp32" for a in kernel.arg_names if a.endswith("part_ptr")}
    return aot(name, kernel, dtype, ones | dict(BLOCK_N=rows.block_n, BLOCK_W=rows.block_w), types, rows.num_warps)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        _aot("memory_write_fwd", _memory_write_fwd_kernel, dtype),
        _aot("memory_write_bwd", _memory_write_bwd_kernel, dtype),
    )
]
