"""usage on Triton: out = (u + (1 - u)(1 - prod_h(1 - w_h))) prod_r(1 - f_r r_r).

A program owns a block of rows of one batch entry. In backward the product over the other heads is taken anew for each head, which is exact
where a factor is zero, and the sums for dfree_gate go to one partial a program, combined in a fixed order. Bytes a row: forward
H + R + 2 elements, backward at least 2 (H + R) + 3. float32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, device, lanes, refuse, run, store, strides, sum_splits

BLOCK = 256


@device
def left(weights_ptr, free_ptr, heads, but, n, N, weights_stride_h, weights_stride_n, free_stride_r, BLOCK_N: tl.constexpr):
    """The product over all heads but one of 1 - weights, or of 1 - free * weights."""
    product = tl.full([BLOCK_N], 1.0, tl.float32)
    for h in range(heads):
        head = tl.cast(h, tl.int64)
        weights = tl.load(weights_ptr + head * weights_stride_h + n * weights_stride_n, mask=n < N, other=0.0).to(tl.float32)
        if free_ptr is not None:
            weights *= tl.load(free_ptr + head * free_stride_r).to(tl.float32)
        product *= tl.where(h == but, 1.0, 1 - weights)
    return product


@triton.jit
def _usage_fwd_kernel(
    out_ptr, usage_ptr, write_ptr, read_ptr, free_ptr, N, H, R, usage_stride_b, usage_stride_n,
    write_stride_b, write_stride_h, write_stride_n, read_stride_b, read_stride_r, read_stride_n, free_stride_b, free_stride_r,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    b, n = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks * BLOCK_N + lanes(BLOCK_N)
    kept = left(write_ptr + b * write_stride_b, None, H, -1, n, N, write_stride_h, write_stride_n, 0, BLOCK_N)
    free_ptr += b * free_stride_b
    stays = left(read_ptr + b * read_stride_b, free_ptr, R, -1, n, N, read_stride_r, read_stride_n, free_stride_r, BLOCK_N)
    usage = tl.load(usage_ptr + b * usage_stride_b + n * usage_stride_n, mask=n < N, other=0.0).to(tl.float32)
    store(out_ptr + b * N + n, (usage + (1 - usage) * (1 - kept)) * stays, mask=n < N)


@triton.jit
def _usage_bwd_kernel(
    dusage_ptr, dwrite_ptr, dread_ptr, dfree_part_ptr, dout_ptr, usage_ptr, write_ptr, read_ptr, free_ptr, B, N, H, R,
    dout_stride_b, dout_stride_n, usage_stride_b, usage_stride_n, write_stride_b, write_stride_h, write_stride_n,
    read_stride_b, read_stride_r, read_stride_n, free_stride_b, free_stride_r, BLOCK_N: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(N, BLOCK_N)
    b, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    n = block * BLOCK_N + lanes(BLOCK_N)
    rows = n < N
    write_ptr += b * write_stride_b
    read_ptr += b * read_stride_b
    free_ptr += b * free_stride_b
    d = tl.load(dout_ptr + b * dout_stride_b + n * dout_stride_n, mask=rows, other=0.0).to(tl.float32)
    usage = tl.load(usage_ptr + b * usage_stride_b + n * usage_stride_n, mask=rows, other=0.0).to(tl.float32)
    kept = left(write_ptr, None, H, -1, n, N, write_stride_h, write_stride_n, 0, BLOCK_N)
    stays = left(read_ptr, free_ptr, R, -1, n, N, read_stride_r, read_stride_n, free_stride_r, BLOCK_N)
    if dusage_ptr is not None:
        store(dusage_ptr + b * N + n, d * stays * kept, mask=rows)
    if dwrite_ptr is not None:
        for h in range(H):
            others = left(write_ptr, None, H, h, n, N, write_stride_h, write_stride_n, 0, BLOCK_N)
            store(dwrite_ptr + (b * H + h) * N + n, d * stays * (1 - usage) * others, mask=rows)
    grown = usage + (1 - usage) * (1 - kept)
    for r in range(R):
        head = tl.cast(r, tl.int64)
        others = left(read_ptr, free_ptr, R, r, n, N, read_stride_r, read_stride_n, free_stride_r, BLOCK_N)
        dleft = -d * grown * others
        if dread_ptr is not None:
            store(dread_ptr + (b * R + head) * N + n, dleft * tl.load(free_ptr + head * free_stride_r).to(tl.float32), mask=rows)
        if dfree_part_ptr is not None:
            read = tl.load(read_ptr + head * read_stride_r + n * read_stride_n, mask=rows, other=0.0).to(tl.float32)
            store(dfree_part_ptr + (block * B + b) * R + head, tl.sum(dleft * read, 0))


def supports(usage, write_weights, read_weights, free_gate):
    return refuse(usage)


def forward(out, usage, write_weights, read_weights, free_gate):
    batch, rows = usage.shape
    run(
        _usage_fwd_kernel, (batch * _launch.ceil_div(rows, BLOCK),), out, usage, write_weights, read_weights, free_gate,
        rows, write_weights.shape[1], read_weights.shape[1], *usage.stride(), *write_weights.stride(), *read_weights.stride(),
        *free_gate.stride(), BLOCK_N=BLOCK, num_warps=4,
    )  # fmt: skip


def backward(dusage, dwrite_weights, dread_weights, dfree_gate, dout, usage, write_weights, read_weights, free_gate):
    batch, rows = usage.shape
    blocks = _launch.ceil_div(rows, BLOCK)
    part = None if dfree_gate is None else dfree_gate.new_empty(blocks, *dfree_gate.shape, dtype=torch.float32)
    run(
        _usage_bwd_kernel, (batch * blocks,), dusage, dwrite_weights, dread_weights, part, dout, usage, write_weights, read_weights,
        free_gate, batch, rows, write_weights.shape[1], read_weights.shape[1], *strides(dout, 2), *usage.stride(),
        *write_weights.stride(), *read_weights.stride(), *free_gate.stride(), BLOCK_N=BLOCK, num_warps=4,
    )  # fmt: skip
    if part is not None:
        sum_splits(dfree_gate, part)


def _aot(name, kernel, dtype):
    ones = {a: 1 for a in kernel.arg_names if a.endswith("stride_n")} | dict(BLOCK_N=BLOCK)
    return aot(name, kernel, dtype, ones, dict(dfree_part_ptr="*fp32"))


AOT = [
    entry for dtype in AOT_DTYPES for entry in (_aot("usage_fwd", _usage_fwd_kernel, dtype), _aot("usage_bwd", _usage_bwd_kernel, dtype))
]
