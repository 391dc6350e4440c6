"""The pointwise half of a GRU step on Triton: h = (1 - z) * n + z * hidden, n = tanh(xn + r * hn).

A program owns a tile of rows x hidden units; backward computes the activations again. Bytes an element: forward 8s, backward 15s. float32
inside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, refuse, run, sigmoid, store, strides, tanh


@triton.jit
def _parts(gates_input_ptr, gates_hidden_ptr, input_stride_h, hidden_stride_h, tile, H):
    """r, z, n and the hidden part of n's pre-activation."""
    down, across = tl.cast(H, tl.int64) * input_stride_h, tl.cast(H, tl.int64) * hidden_stride_h
    r = tl.load(gates_input_ptr, mask=tile, other=0.0).to(tl.float32) + tl.load(gates_hidden_ptr, mask=tile, other=0.0).to(tl.float32)
    z = tl.load(gates_input_ptr + down, mask=tile, other=0.0).to(tl.float32)
    z += tl.load(gates_hidden_ptr + across, mask=tile, other=0.0).to(tl.float32)
    n = tl.load(gates_input_ptr + 2 * down, mask=tile, other=0.0).to(tl.float32)
    hidden_n = tl.load(gates_hidden_ptr + 2 * across, mask=tile, other=0.0).to(tl.float32)
    r = sigmoid(r)
    return r, sigmoid(z), tanh(n + r * hidden_n), hidden_n


@triton.jit
def _gru_gates_fwd_kernel(
    h_ptr, gates_input_ptr, gates_hidden_ptr, hidden_ptr, B, H, input_stride_b, input_stride_h, gates_stride_b, gates_stride_h,
    hidden_stride_b, hidden_stride_h, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H)
    tile = (b < B)[:, None] & (h < H)[None, :]
    gates_input_ptr += b[:, None] * input_stride_b + h[None, :] * input_stride_h
    gates_hidden_ptr += b[:, None] * gates_stride_b + h[None, :] * gates_stride_h
    _, z, n, _ = _parts(gates_input_ptr, gates_hidden_ptr, input_stride_h, gates_stride_h, tile, H)
    old = tl.load(hidden_ptr + b[:, None] * hidden_stride_b + h[None, :] * hidden_stride_h, mask=tile, other=0.0).to(tl.float32)
    store(h_ptr + b[:, None] * H + h[None, :], (1 - z) * n + z * old, mask=tile)


@triton.jit
def _gru_gates_bwd_kernel(
    dgates_input_ptr, dgates_hidden_ptr, dhidden_ptr, dh_ptr, gates_input_ptr, gates_hidden_ptr, hidden_ptr, B, H, dh_stride_b, dh_stride_h,
    input_stride_b, input_stride_h, gates_stride_b, gates_stride_h, hidden_stride_b, hidden_stride_h,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H)
    tile = (b < B)[:, None] & (h < H)[None, :]
    gates_input_ptr += b[:, None] * input_stride_b + h[None, :] * input_stride_h
    gates_hidden_ptr += b[:, None] * gates_stride_b + h[None, :] * gates_stride_h
    r, z, n, hidden_n = _parts(gates_input_ptr, gates_hidden_ptr, input_stride_h, gates_stride_h, tile, H)
    old = tl.load(hidden_ptr + b[:, None] * hidden_stride_b + h[None, :] * hidden_stride_h, mask=tile, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + b[:, None] * dh_stride_b + h[None, :] * dh_stride_h, mask=tile, other=0.0).to(tl.float32)
    dn = dh * (1 - z) * (1 - n * n)
    dr, dz = dn * hidden_n * r * (1 - r), dh * (old - n) * z * (1 - z)
    place, gate = 3 * b[:, None] * H + h[None, :], tl.cast(H, tl.int64)
    if dgates_input_ptr is not None:
        store(dgates_input_ptr + place, dr, mask=tile)
        store(dgates_input_ptr + place + gate, dz, mask=tile)
        store(dgates_input_ptr + place + 2 * gate, dn, mask=tile)
    if dgates_hidden_ptr is not None:
        store(dgates_hidden_ptr + place, dr, mask=tile)
        store(dgates_hidden_ptr + place + gate, dz, mask=tile)
        store(dgates_hidden_ptr + place + 2 * gate, dn * r, mask=tile)
    if dhidden_ptr is not None:
        store(dhidden_ptr + b[:, None] * H + h[None, :], dh * z, mask=tile)


def supports(gates_input, gates_hidden, hidden):
    return refuse(gates_input)


def _grid(hidden):
    blocks = _launch.pointwise(hidden.shape[1])
    return (_launch.ceil_div(hidden.shape[0], blocks.block_n), _launch.ceil_div(hidden.shape[1], blocks.block_w)), dict(
        BLOCK_B=blocks.block_n, BLOCK_H=blocks.block_w, num_warps=blocks.num_warps
    )


def forward(h, gates_input, gates_hidden, hidden):
    grid, blocks = _grid(hidden)
    tensors = (gates_input, gates_hidden, hidden)
    run(_gru_gates_fwd_kernel, grid, h, *tensors, *hidden.shape, *(s for t in tensors for s in t.stride()), **blocks)


def backward(dgates_input, dgates_hidden, dhidden, dh, gates_input, gates_hidden, hidden):
    grid, blocks = _grid(hidden)
    tensors = (gates_input, gates_hidden, hidden)
    run(
        _gru_gates_bwd_kernel, grid, dgates_input, dgates_hidden, dhidden, dh, *tensors, *hidden.shape, *strides(dh, 2),
        *(s for t in tensors for s in t.stride()), **blocks,
    )  # fmt: skip


def _aot(name, kernel, dtype):
    blocks = _launch.pointwise(512)
    ones = {a: 1 for a in kernel.arg_names if a.endswith("stride_h")} | dict(BLOCK_B=blocks.block_n, BLOCK_H=blocks.block_w)
    return aot(name, kernel, dtype, ones, None, blocks.num_warps)


AOT = [
    _aot(name, kernel, dtype)
    for dtype in AOT_DTYPES
    for name, kernel in (("gru_gates_fwd", _gru_gates_fwd_kernel), ("gru_gates_bwd", _gru_gates_bwd_kernel))
]
