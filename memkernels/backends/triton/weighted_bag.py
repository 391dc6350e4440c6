"""Weighted bags on Triton: out[b] = sum_j weight[b, j] table[index[b, j]], with a gradient of the table that is a sum by segments.

Forward: a program owns a bag and a strip of columns, and gathers a tile of rows at a time by pointer. Backward: places are sorted by row on
the device (stable), a program owns a row of the table and a strip of columns, and adds up what its places give it in their order, so each
row is written once, no atomics; dweight by programs that own places of a bag. An index outside the table counts as absent.
Bytes a place: forward s*D; backward 2*s*D (dout, table), and s*D a row of the table. Sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, refuse, run, store


@triton.jit
def _named(index_ptr, bag, first, J, K, index_stride_b, index_stride_j, BLOCK_J: tl.constexpr):
    """Places of a tile, the rows they name, and whether there is such a row."""
    j = tl.cast(first, tl.int64) + lanes(BLOCK_J)
    row = tl.load(index_ptr + bag * index_stride_b + j * index_stride_j, mask=j < J, other=-1)
    return j, row, (row >= 0) & (row < K)


@triton.jit
def _bag_fwd_kernel(
    out_ptr, table_ptr, index_ptr, weight_ptr, K, J, D, table_stride_k, table_stride_d, index_stride_b, index_stride_j, weight_stride_b,
    weight_stride_j, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    bag, d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_D + lanes(BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, J, BLOCK_J):
        j, row, there = _named(index_ptr, bag, first, J, K, index_stride_b, index_stride_j, BLOCK_J)
        weight = tl.load(weight_ptr + bag * weight_stride_b + j * weight_stride_j, mask=there, other=0.0).to(tl.float32)
        place = row[:, None] * table_stride_k + d[None, :] * table_stride_d
        rows = tl.load(table_ptr + place, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * rows, 0)
    store(out_ptr + bag * D + d, total, mask=d < D)


@triton.jit
def _bag_bwd_table_kernel(
    dtable_ptr, dout_ptr, weight_ptr, order_ptr, start_ptr, J, D, dout_stride_b, dout_stride_d, weight_stride_b, weight_stride_j,
    BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row, d = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64) * BLOCK_D + lanes(BLOCK_D)
    begin, end = tl.load(start_ptr + row), tl.load(start_ptr + (row + 1))
    total = tl.zeros([BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK_J):
        e = tl.cast(first, tl.int64) + lanes(BLOCK_J)
        at = tl.load(order_ptr + e, mask=e < end, other=0)
        bag = at // J
        place = bag * weight_stride_b + (at - bag * J) * weight_stride_j
        weight = tl.load(weight_ptr + place, mask=e < end, other=0.0).to(tl.float32)
        place = bag[:, None] * dout_stride_b + d[None, :] * dout_stride_d
        dout = tl.load(dout_ptr + place, mask=(e < end)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(weight[:, None] * dout, 0)
    store(dtable_ptr + row * D + d, total, mask=d < D)


@triton.jit
def _bag_bwd_weight_kernel(
    dweight_ptr, dout_ptr, table_ptr, index_ptr, K, J, D, dout_stride_b, dout_stride_d, table_stride_k, table_stride_d, index_stride_b,
    index_stride_j, BLOCK_J: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(J, BLOCK_J)
    bag, block = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks
    j, row, there = _named(index_ptr, bag, block * BLOCK_J, J, K, index_stride_b, index_stride_j, BLOCK_J)
    total = tl.zeros([BLOCK_J], tl.float32)
    for first in range(0, D, BLOCK_D):
        d = tl.cast(first, tl.int64) + lanes(BLOCK_D)
        dout = tl.load(dout_ptr + bag * dout_stride_b + d * dout_stride_d, mask=d < D, other=0.0).to(tl.float32)
        place = row[:, None] * table_stride_k + d[None, :] * table_stride_d
        rows = tl.load(table_ptr + place, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total += tl.sum(tl.where(there[:, None], rows * dout[None, :], 0.0), 1)
    store(dweight_ptr + bag * J + j, total, mask=j < J)


def supports(table, index, weight):
    return refuse(table)


def _tiles(width):
    launch = _launch.weighted_bag(width)
    return dict(BLOCK_J=launch.block_j, BLOCK_D=launch.block_d, num_warps=launch.num_warps)


def forward(out, table, index, weight):
    (rows, width), (bags, places), tiles = table.shape, index.shape, _tiles(table.shape[1])
    grid = bags, _launch.ceil_div(width, tiles["BLOCK_D"])
    run(
        _bag_fwd_kernel, grid, out, table, index, weight, rows, places, width, *table.stride(), *index.stride(), *weight.stride(), **tiles
    )  # fmt: skip


def backward(dtable, dweight, dout, table, index, weight):
    (rows, width), (bags, places), tiles = table.shape, index.shape, _tiles(table.shape[1])
    if dtable is not None:
        named, order = torch.sort(index.flatten(), stable=True)
        start = torch.searchsorted(named, torch.arange(rows + 1, device=index.device))
        grid = rows, _launch.ceil_div(width, tiles["BLOCK_D"])
        run(
            _bag_bwd_table_kernel, grid, dtable, dout, weight, order, start, places, width, *dout.stride(), *weight.stride(), **tiles
        )  # fmt: skip
    if dweight is not None:
        run(
            _bag_bwd_weight_kernel, (bags * _launch.ceil_div(places, tiles["BLOCK_J"]),), dweight, dout, table, index, rows, places, width,
            *dout.stride(), *table.stride(), *index.stride(), **tiles,
        )  # fmt: skip


def _aot(name, kernel, dtype):
    tiles = _tiles(256)
    fixed = {a: 1 for a in kernel.arg_names if a.endswith(("stride_d", "stride_j"))} | {k: v for k, v in tiles.items() if k != "num_warps"}
    types = dict.fromkeys(("index_ptr", "order_ptr", "start_ptr"), "*i64")
    return aot(f"weighted_bag_{name}", kernel, dtype, fixed, types, tiles["num_warps"])


AOT = [
    _aot(name, kernel, dtype)
    for dtype in AOT_DTYPES
    for name, kernel in (("fwd", _bag_fwd_kernel), ("bwd_table", _bag_bwd_table_kernel), ("bwd_weight", _bag_bwd_weight_kernel))
]
