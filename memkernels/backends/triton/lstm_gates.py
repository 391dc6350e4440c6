"""The pointwise half of an LSTM step on Triton: c = f * c' + i * g, h = o * tanh(c).

A program owns a tile of rows x hidden units; backward computes the activations again. The peephole gradient leaves one partial a block
of rows, summed in a fixed order. Bytes an element: forward 7s, backward 13s. float32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, refuse, run, sigmoid, store, strides, sum_splits, tanh


@triton.jit
def _activations(gates_ptr, gate, tile, cell, peephole_ptr, peephole_stride_r, peephole_stride_h, h, H):
    """i, f, g and o without its peephole, which needs the new cell."""
    i = tl.load(gates_ptr, mask=tile, other=0.0).to(tl.float32)
    f = tl.load(gates_ptr + gate, mask=tile, other=0.0).to(tl.float32)
    g = tl.load(gates_ptr + 2 * gate, mask=tile, other=0.0).to(tl.float32)
    o = tl.load(gates_ptr + 3 * gate, mask=tile, other=0.0).to(tl.float32)
    if peephole_ptr is not None:
        i += tl.load(peephole_ptr + h * peephole_stride_h, mask=h < H, other=0.0).to(tl.float32)[None, :] * cell
        f += tl.load(peephole_ptr + peephole_stride_r + h * peephole_stride_h, mask=h < H, other=0.0).to(tl.float32)[None, :] * cell
    return sigmoid(i), sigmoid(f), tanh(g), o


@triton.jit
def _lstm_gates_fwd_kernel(
    h_ptr, c_ptr, gates_ptr, cell_ptr, peephole_ptr, B, H,
    gates_stride_b, gates_stride_h, cell_stride_b, cell_stride_h, peephole_stride_r, peephole_stride_h,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H)
    tile = (b < B)[:, None] & (h < H)[None, :]
    gate, third = tl.cast(H, tl.int64) * gates_stride_h, 2 * tl.cast(peephole_stride_r, tl.int64)
    cell = tl.load(cell_ptr + b[:, None] * cell_stride_b + h[None, :] * cell_stride_h, mask=tile, other=0.0).to(tl.float32)
    gates_ptr += b[:, None] * gates_stride_b + h[None, :] * gates_stride_h
    i, f, g, o = _activations(gates_ptr, gate, tile, cell, peephole_ptr, tl.cast(peephole_stride_r, tl.int64), peephole_stride_h, h, H)
    c = f * cell + i * g
    if peephole_ptr is not None:
        o += tl.load(peephole_ptr + third + h * peephole_stride_h, mask=h < H, other=0.0).to(tl.float32)[None, :] * c
    place = b[:, None] * H + h[None, :]
    store(h_ptr + place, sigmoid(o) * tanh(c), mask=tile)
    store(c_ptr + place, c, mask=tile)


@triton.jit
def _lstm_gates_bwd_kernel(
    dgates_ptr, dcell_ptr, dpeephole_part_ptr, dh_ptr, dc_ptr, gates_ptr, cell_ptr, peephole_ptr, B, H,
    dh_stride_b, dh_stride_h, dc_stride_b, dc_stride_h,
    gates_stride_b, gates_stride_h, cell_stride_b, cell_stride_h, peephole_stride_r, peephole_stride_h,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H)
    tile = (b < B)[:, None] & (h < H)[None, :]
    gate, row = tl.cast(H, tl.int64) * gates_stride_h, tl.cast(peephole_stride_r, tl.int64)
    cell = tl.load(cell_ptr + b[:, None] * cell_stride_b + h[None, :] * cell_stride_h, mask=tile, other=0.0).to(tl.float32)
    gates_ptr += b[:, None] * gates_stride_b + h[None, :] * gates_stride_h
    i, f, g, o = _activations(gates_ptr, gate, tile, cell, peephole_ptr, row, peephole_stride_h, h, H)
    c = f * cell + i * g
    if peephole_ptr is not None:
        peephole_o = tl.load(peephole_ptr + 2 * row + h * peephole_stride_h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        o += peephole_o * c
    o, bounded = sigmoid(o), tanh(c)
    dh, dc = tl.zeros([BLOCK_B, BLOCK_H], tl.float32), tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
    if dh_ptr is not None:
        dh = tl.load(dh_ptr + b[:, None] * dh_stride_b + h[None, :] * dh_stride_h, mask=tile, other=0.0).to(tl.float32)
    if dc_ptr is not None:
        dc = tl.load(dc_ptr + b[:, None] * dc_stride_b + h[None, :] * dc_stride_h, mask=tile, other=0.0).to(tl.float32)
    do = dh * bounded * o * (1 - o)
    dc += dh * o * (1 - bounded * bounded)
    if peephole_ptr is not None:
        dc += do * peephole_o
    di, df, dg, dcell = dc * g * i * (1 - i), dc * cell * f * (1 - f), dc * i * (1 - g * g), dc * f
    if peephole_ptr is not None:
        dcell += di * tl.load(peephole_ptr + h * peephole_stride_h, mask=h < H, other=0.0).to(tl.float32)[None, :]
        dcell += df * tl.load(peephole_ptr + row + h * peephole_stride_h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    if dgates_ptr is not None:
        dgates_ptr += (4 * b)[:, None] * H + h[None, :]
        store(dgates_ptr, di, mask=tile)
        store(dgates_ptr + tl.cast(H, tl.int64), df, mask=tile)
        store(dgates_ptr + tl.cast(H, tl.int64) * 2, dg, mask=tile)
        store(dgates_ptr + tl.cast(H, tl.int64) * 3, do, mask=tile)
    if dcell_ptr is not None:
        store(dcell_ptr + b[:, None] * H + h[None, :], dcell, mask=tile)
    if dpeephole_part_ptr is not None:
        part = dpeephole_part_ptr + tl.program_id(0).to(tl.int64) * 3 * H + h
        store(part, tl.sum(tl.where(tile, di * cell, 0.0), 0), mask=h < H)
        store(part + tl.cast(H, tl.int64), tl.sum(tl.where(tile, df * cell, 0.0), 0), mask=h < H)
        store(part + tl.cast(H, tl.int64) * 2, tl.sum(tl.where(tile, do * c, 0.0), 0), mask=h < H)


def supports(gates, cell, peephole):
    return refuse(gates)


def _grid(cell):
    blocks = _launch.pointwise(cell.shape[1])
    return (_launch.ceil_div(cell.shape[0], blocks.block_n), _launch.ceil_div(cell.shape[1], blocks.block_w)), dict(
        BLOCK_B=blocks.block_n, BLOCK_H=blocks.block_w, num_warps=blocks.num_warps
    )


def forward(h, c, gates, cell, peephole):
    grid, blocks = _grid(cell)
    tensors = (h, c, gates, cell, peephole)
    run(_lstm_gates_fwd_kernel, grid, *tensors, *cell.shape, *gates.stride(), *cell.stride(), *strides(peephole, 2), **blocks)


def backward(dgates, dcell, dpeephole, dh, dc, gates, cell, peephole):
    grid, blocks = _grid(cell)
    part = None if dpeephole is None else cell.new_empty(grid[0], 3, cell.shape[1], dtype=torch.float32)
    run(
        _lstm_gates_bwd_kernel, grid, dgates, dcell, part, dh, dc, gates, cell, peephole, *cell.shape,
        *strides(dh, 2), *strides(dc, 2), *gates.stride(), *cell.stride(), *strides(peephole, 2), **blocks,
    )  # fmt: skip
    if part is not None:
        sum_splits(dpeephole, part)


def _aot(name, kernel, dtype):
    blocks = _launch.pointwise(512)
    ones = {a: 1 for a in kernel.arg_names if a.endswith("stride_h")} | dict(BLOCK_B=blocks.block_n, BLOCK_H=blocks.block_w)
    return aot(name, kernel, dtype, ones, {"dpeephole_part_ptr": "*fp32"}, blocks.num_warps)


AOT = [
    _aot(name, kernel, dtype)
    for dtype in AOT_DTYPES
    for name, kernel in (("lstm_gates_fwd", _lstm_gates_fwd_kernel), ("lstm_gates_bwd", _lstm_gates_bwd_kernel))
]
