"""A whole LSTM layer over time on Triton.

Products over all steps (input @ weight_ih.T, and in backward dz with input, weights and states) are one matrix product each. The recurrent
part: a program owns a tile of batch rows x hidden units and, for each step, multiplies the state that enters it by its rows of weight_hh
and applies the gates. Where all hidden units fit one program it runs all T steps (the state goes through global memory, behind a barrier);
else one launch is one step. Lengths and resets are read on the device. float32 sums; c and dz stay float32 between steps.
Bytes a step: 4*s*H^2 of weights (cached), 16+7s a hidden unit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch, _matmul
from memkernels.backends.triton._common import (
    AOT_DTYPES,
    INTERPRETED,
    aot,
    dot,
    lanes,
    refuse,
    rounded,
    run,
    sigmoid,
    store,
    strides,
    sum_splits,
    tanh,
)


@triton.jit
def _masks(reset_ptr, lengths_ptr, t, b, B, reset_stride_t, reset_stride_b, lengths_stride):
    """(the row is not past its end, the state that enters step t stays)."""
    active = b < B
    if lengths_ptr is not None:
        active = active & (t < tl.load(lengths_ptr + b * lengths_stride, mask=active, other=0))
    kept = b < B
    if reset_ptr is not None:
        kept = (tl.load(reset_ptr + t * reset_stride_t + b * reset_stride_b, mask=b < B, other=0) == 0) | (active == 0)
    return active, kept


@triton.jit(do_not_specialize=["first", "last"])
def _lstm_fwd_kernel(
    output_ptr, cells_ptr, gates_ptr, h_state_ptr, c_state_ptr, projected_ptr, weight_ptr, reset_ptr, lengths_ptr, first, last, T, B, H,
    weight_stride_o, weight_stride_i, reset_stride_t, reset_stride_b, lengths_stride, REVERSE: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H)
    tile = (b < B)[:, None] & (h < H)[None, :]
    own = b[:, None] * H + h[None, :]
    gate, size = tl.cast(H, tl.int64), tl.cast(B, tl.int64) * H
    for step in range(first, last):
        t = tl.cast(T - 1 - step if REVERSE else step, tl.int64)
        active, kept = _masks(reset_ptr, lengths_ptr, t, b, B, reset_stride_t, reset_stride_b, lengths_stride)
        entering = h_state_ptr + (step % 2) * size
        projected = projected_ptr + t * size * 4 + 4 * b[:, None] * H + h[None, :]
        i, f = tl.load(projected, mask=tile, other=0.0), tl.load(projected + gate, mask=tile, other=0.0)
        g, o = tl.load(projected + 2 * gate, mask=tile, other=0.0), tl.load(projected + 3 * gate, mask=tile, other=0.0)
        for start in range(0, H, BLOCK_K):
            k = start + lanes(BLOCK_K)
            old = tl.load(entering + b[:, None] * H + k[None, :], mask=kept[:, None] & (k < H)[None, :], other=0.0)
            weight = weight_ptr + h[None, :] * weight_stride_o + k[:, None] * weight_stride_i
            part, down = (k < H)[:, None] & (h < H)[None, :], gate * weight_stride_o
            i = dot(old, tl.load(weight, mask=part, other=0.0), i, PRECISION)
            f = dot(old, tl.load(weight + down, mask=part, other=0.0), f, PRECISION)
            g = dot(old, tl.load(weight + 2 * down, mask=part, other=0.0), g, PRECISION)
            o = dot(old, tl.load(weight + 3 * down, mask=part, other=0.0), o, PRECISION)
        i, f, g, o = sigmoid(i), sigmoid(f), tanh(g), sigmoid(o)
        c_old = tl.load(c_state_ptr + own, mask=tile, other=0.0)
        c = f * tl.where(kept[:, None], c_old, 0.0) + i * g
        new = o * tanh(c)
        running = active[:, None]
        store(output_ptr + t * size + own, tl.where(running, new, 0.0), mask=tile)
        if cells_ptr is not None:
            store(cells_ptr + t * size + own, tl.where(running, c, 0.0), mask=tile)
        if gates_ptr is not None:
            gates = gates_ptr + t * size * 4 + 4 * b[:, None] * H + h[None, :]
            store(gates, tl.where(running, i, 0.0), mask=tile)
            store(gates + gate, tl.where(running, f, 0.0), mask=tile)
            store(gates + 2 * gate, tl.where(running, g, 0.0), mask=tile)
            store(gates + 3 * gate, tl.where(running, o, 0.0), mask=tile)
        unchanged = tl.load(entering + own, mask=tile, other=0.0)
        store(h_state_ptr + (1 - step % 2) * size + own, tl.where(running, rounded(new, unchanged.dtype), unchanged), mask=tile)
        store(c_state_ptr + own, tl.where(running, c, c_old), mask=tile)
        tl.debug_barrier()


@triton.jit(do_not_specialize=["first", "last"])
def _lstm_bwd_kernel(
    dz_ptr, dh_state_ptr, dc_state_ptr, doutput_ptr, dcells_ptr, cells_ptr, gates_ptr, c_first_ptr, weight_ptr, reset_ptr, lengths_ptr,
    first, last, T, B, H, doutput_stride_t, doutput_stride_b, doutput_stride_h, dcells_stride_t, dcells_stride_b, dcells_stride_h,
    c_first_stride_b, c_first_stride_h, weight_stride_o, weight_stride_i, reset_stride_t, reset_stride_b, lengths_stride,
    REVERSE: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Step s first takes dh from the dz of step s - 1; step T does only that."""
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + lanes(BLOCK_B)
    h = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H)
    tile = (b < B)[:, None] & (h < H)[None, :]
    own = b[:, None] * H + h[None, :]
    gate, size = tl.cast(H, tl.int64), tl.cast(B, tl.int64) * H
    for step in range(first, last):
        dh = tl.load(dh_state_ptr + own, mask=tile, other=0.0)
        if step > 0:
            t = tl.cast(step - 1 if REVERSE else T - step, tl.int64)
            active, kept = _masks(reset_ptr, lengths_ptr, t, b, B, reset_stride_t, reset_stride_b, lengths_stride)
            total = tl.zeros([BLOCK_B, BLOCK_H], tl.float32)
            for start in range(0, 4 * H, BLOCK_K):
                k = start + lanes(BLOCK_K)
                dz = tl.load(
                    dz_ptr + t * size * 4 + 4 * b[:, None] * H + k[None, :], mask=(b < B)[:, None] & (k < 4 * H)[None, :], other=0.0
                )
                weight = weight_ptr + k[:, None] * weight_stride_o + h[None, :] * weight_stride_i
                total = dot(dz, tl.load(weight, mask=(k < 4 * H)[:, None] & (h < H)[None, :], other=0.0), total, PRECISION)
            dh = tl.where(active[:, None], tl.where(kept[:, None], total, 0.0), dh)
            store(dh_state_ptr + own, dh, mask=tile)
        if step < T:
            t = tl.cast(step if REVERSE else T - 1 - step, tl.int64)
            active, kept = _masks(reset_ptr, lengths_ptr, t, b, B, reset_stride_t, reset_stride_b, lengths_stride)
            before = t + 1 if REVERSE else t - 1
            from_first = b < 0
            if before < 0 or before >= T:
                from_first = b >= 0
            elif REVERSE and lengths_ptr is not None:
                from_first = before >= tl.load(lengths_ptr + b * lengths_stride, mask=b < B, other=0)
            c_first = tl.load(
                c_first_ptr + b[:, None] * c_first_stride_b + h[None, :] * c_first_stride_h, mask=tile & from_first[:, None], other=0.0
            )
            c_before = tl.load(cells_ptr + before * size + own, mask=tile & (from_first == 0)[:, None], other=0.0)
            c_old = tl.where(kept[:, None], tl.where(from_first[:, None], c_first, c_before).to(tl.float32), 0.0)
            gates = gates_ptr + t * size * 4 + 4 * b[:, None] * H + h[None, :]
            i, f = tl.load(gates, mask=tile, other=0.0).to(tl.float32), tl.load(gates + gate, mask=tile, other=0.0).to(tl.float32)
            g, o = (
                tl.load(gates + 2 * gate, mask=tile, other=0.0).to(tl.float32),
                tl.load(gates + 3 * gate, mask=tile, other=0.0).to(tl.float32),
            )
            bounded = tanh(tl.load(cells_ptr + t * size + own, mask=tile, other=0.0).to(tl.float32))
            dc_old = tl.load(dc_state_ptr + own, mask=tile, other=0.0)
            dc = dc_old
            if doutput_ptr is not None:
                place = t * doutput_stride_t + b[:, None] * doutput_stride_b + h[None, :] * doutput_stride_h
                dh += tl.load(doutput_ptr + place, mask=tile, other=0.0).to(tl.float32)
            if dcells_ptr is not None:
                place = t * dcells_stride_t + b[:, None] * dcells_stride_b + h[None, :] * dcells_stride_h
                dc += tl.load(dcells_ptr + place, mask=tile, other=0.0).to(tl.float32)
            dc += dh * o * (1 - bounded * bounded)
            running = active[:, None]
            dz = dz_ptr + t * size * 4 + 4 * b[:, None] * H + h[None, :]
            store(dz, tl.where(running, dc * g * i * (1 - i), 0.0), mask=tile)
            store(dz + gate, tl.where(running, dc * c_old * f * (1 - f), 0.0), mask=tile)
            store(dz + 2 * gate, tl.where(running, dc * i * (1 - g * g), 0.0), mask=tile)
            store(dz + 3 * gate, tl.where(running, dh * bounded * o * (1 - o), 0.0), mask=tile)
            store(dc_state_ptr + own, tl.where(running, tl.where(kept[:, None], dc * f, 0.0), dc_old), mask=tile)
        tl.debug_barrier()


def supports(
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h, reset_c,
    lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, return_cells, training,
):  # fmt: skip
    if weight_hr is peephole is norm_weight is weight_co is reset_h is None and num_heads == 1 and not recompute:
        return "knows no zoneout or recurrent dropout" if zoneout_h or zoneout_c or recurrent_dropout else refuse(input)
    return "knows no peephole, layer_norm, output_gate, weight_hr, reset_state, num_heads or recompute"


def _launch_steps(kernel, steps, count, tensors, sizes, *args, reverse, dtype):
    """All steps in one launch, or one launch a step."""
    _, batch, hidden = sizes
    grid = _launch.ceil_div(batch, steps.block_b), _launch.ceil_div(hidden, steps.block_h)
    ranges = [(0, count)] if steps.persistent else [(s, s + 1) for s in range(count)]
    for first, last in ranges:
        run(
            kernel, grid, *tensors, first, last, *sizes, *args, REVERSE=reverse, BLOCK_B=steps.block_b, BLOCK_H=steps.block_h,
            BLOCK_K=steps.block_k, PRECISION=_matmul.product_precision(dtype), num_warps=steps.num_warps,
        )  # fmt: skip


def forward(
    output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias,
    weight_co, reset, reset_h, reset_c, lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute,
    return_cells, training,
):  # fmt: skip
    (count, batch, width), hidden, dtype = input.shape, weight_hh.shape[1], input.dtype
    projected = input.new_empty(count * batch, 4 * hidden, dtype=torch.float32)
    _matmul.matmul(projected, input.reshape(count * batch, width), weight_ih.mT, dtype, bias_ih, bias_hh)
    h_state = input.new_empty(2, batch, hidden)
    h_state[0].copy_(h0)
    c_state = c0.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
    tensors = (
        output, cells, gates, h_state, c_state, projected, weight_hh, reset, lengths
    )  # fmt: skip
    _launch_steps(
        _lstm_fwd_kernel, _launch.lstm(hidden, dtype == torch.float32, INTERPRETED), count, tensors, (count, batch, hidden),
        *weight_hh.stride(), *strides(reset, 2), *strides(lengths, 1), reverse=reverse, dtype=dtype,
    )  # fmt: skip
    h_n.copy_(h_state[count % 2])
    c_n.copy_(c_state)


def _entering(h0, output, reset, lengths, reverse):
    """The state that entered each step, "T B H"."""
    count = output.shape[0]
    entering = torch.cat([output[1:], h0[None]] if reverse else [h0[None], output[:-1]])
    if reverse and lengths is not None:
        starts = torch.arange(1, count + 1, device=output.device)[:, None] >= lengths
        entering = torch.where(starts[..., None], h0, entering)
    return entering if reset is None else entering.masked_fill_(reset[..., None], 0)


def backward(
    dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dpeephole, dnorm_weight, dnorm_bias, dweight_co,
    dreset_h, dreset_c, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole,
    norm_weight, norm_bias, weight_co, reset, reset_h, reset_c, lengths, seed, output, cells, gates, reverse, num_heads,
    zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, return_cells, training,
):  # fmt: skip
    (count, batch, width), hidden, dtype = input.shape, weight_hh.shape[1], input.dtype
    dz = input.new_empty(count * batch, 4 * hidden, dtype=torch.float32)
    dh, dc = (
        torch.zeros(batch, hidden, dtype=torch.float32, device=input.device) if d is None
        else d.to(torch.float32, copy=True, memory_format=torch.contiguous_format) for d in (dh_n, dc_n)
    )  # fmt: skip
    dcells = dcells if training or return_cells else None
    tensors = dz, dh, dc, doutput, dcells, cells, gates, c0, weight_hh, reset, lengths
    _launch_steps(
        _lstm_bwd_kernel, _launch.lstm(hidden, dtype == torch.float32, INTERPRETED), count + 1, tensors, (count, batch, hidden),
        *strides(doutput, 3), *strides(dcells, 3), *c0.stride(), *weight_hh.stride(),
        *strides(reset, 2), *strides(lengths, 1), reverse=reverse, dtype=dtype,
    )  # fmt: skip
    for gradient, found in ((dh0, dh), (dc0, dc)):
        if gradient is not None:
            gradient.copy_(found)
    if dinput is not None:
        _matmul.matmul(dinput.view(count * batch, width), dz, weight_ih, dtype)
    if dweight_ih is not None:
        _matmul.matmul(dweight_ih, dz.mT, input.reshape(count * batch, width), dtype)
    if dweight_hh is not None:
        entering = _entering(h0, output, reset, lengths, reverse) if count else output
        _matmul.matmul(dweight_hh, dz.mT, entering.reshape(count * batch, hidden), dtype)
    for gradient in (dbias_ih, dbias_hh):
        if gradient is not None:
            sum_splits(gradient, dz)


def _aot(name, kernel, dtype, hidden):
    steps = _launch.lstm(hidden, dtype == torch.float32)
    constants = dict(
        REVERSE=False, BLOCK_B=steps.block_b, BLOCK_H=steps.block_h, BLOCK_K=steps.block_k, PRECISION=_matmul.product_precision(dtype),
        reset_ptr=None, lengths_ptr=None, dcells_ptr=None, reset_stride_t=0, reset_stride_b=0, lengths_stride=0,
    )  # fmt: skip
    constants |= {a: 1 for a in kernel.arg_names if a.endswith(("stride_h", "stride_i"))}
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = {f"{a}_ptr": "*fp32" for a in ("c_state", "projected", "dz", "dh_state", "dc_state")}
    return aot(f"{name}_H{hidden}", kernel, dtype, constants, types, steps.num_warps)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        *_matmul.entries(dtype),
        *(
            _aot(name, kernel, dtype, hidden)
            for hidden in (64, 512)
            for name, kernel in (("lstm_fwd", _lstm_fwd_kernel), ("lstm_bwd", _lstm_bwd_kernel))
        ),
    )
]
