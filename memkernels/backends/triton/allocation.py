"""allocation on Triton: a_j = (1 - s_j) prod_{i<j} s_i over rows in the order of ascending s = eps + (1 - eps) u.

A program owns a batch entry: it sorts s and row number, packed in 64 bits each, in registers, and takes the products, in backward also
Q_j = sum_{k>j} da_k (1 - s_k) prod_{j<i<k} s_i, by associative scans: no division. Heads with gates take turns, a launch each; backward
first computes their usages again. Bytes a row and head: forward 2 elements, backward 3 and three float32. float32 inside.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, device, lanes, refuse, run, store

MAX_ROWS = 4096


@triton.jit
def _exclusive(p, e, q, f):
    """Of pairs (product, product of all but the last)."""
    return p * q, p * f


@triton.jit
def _later(s, c, t, q, s_left, c_left, t_left, q_left):
    """What lies to the right, then its left neighbour: F = c + s x of all, Q = q + t x of all but the leftmost."""
    return s_left * s, c_left + s_left * c, t_left * s, q_left + t_left * c


@device
def _order(usage_ptr, stride_n, eps, N, BLOCK_N: tl.constexpr):
    """Row numbers by ascending s, ties lowest first, NaN and then what is no row at the end."""
    n = lanes(BLOCK_N)
    usage = tl.load(usage_ptr + n * stride_n, mask=n < N, other=0.0).to(tl.float32)
    s = eps + (1 - eps) * usage + 0.0  # -0 becomes 0
    bits = s.to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    key = tl.where((n < N) & (s == s), key, 0x7FFFFFFF)
    return tl.sort(key.to(tl.int64) * 4294967296 + n) & 0xFFFFFFFF


@device
def by_usage(usage_ptr, stride_n, eps, N, BLOCK_N: tl.constexpr):
    """Row numbers by ascending s, and in that order their usage, s, and the products of all s before."""
    row = _order(usage_ptr, stride_n, eps, N, BLOCK_N)
    usage = tl.load(usage_ptr + row * stride_n, mask=row < N, other=1.0).to(tl.float32)
    s = eps + (1 - eps) * usage
    _, before = tl.associative_scan((s, tl.full([BLOCK_N], 1.0, tl.float32)), 0, _exclusive)
    return row, usage, s, before


@device
def usage_after(usage, gate, found):
    """What the next head sees."""
    return usage + (1 - usage) * (gate * found)


@device
def handed_back(d, later, usage, gate, found, rows):
    """From the gradient of the usage that the next head sees: of this head's allocation, usage and gate."""
    dgate = tl.sum(tl.where(rows, later * (1 - usage) * found, 0.0), 0)
    return d + later * (1 - usage) * gate, later * (1 - gate * found), dgate


@device
def usage_slope(d, s, before, eps, BLOCK_N: tl.constexpr):
    """The gradient of usage from that of the allocation, in the order of the rows."""
    one = tl.full([BLOCK_N], 1.0, tl.float32)
    _, _, _, after = tl.associative_scan((s, d * (1 - s), one, 0 * one), 0, _later, reverse=True)
    return (1 - eps) * before * (after - d)


@triton.jit
def _allocation_fwd_kernel(
    out_ptr, next_ptr, usage_ptr, gates_ptr, eps, N, out_stride_b, usage_stride_b, usage_stride_n, gates_stride_b, BLOCK_N: tl.constexpr
):
    b = tl.program_id(0).to(tl.int64)
    usage_ptr += b * usage_stride_b
    row, usage, s, before = by_usage(usage_ptr, usage_stride_n, eps, N, BLOCK_N)
    rows, found = row < N, (1 - s) * before
    store(out_ptr + b * out_stride_b + row, found, mask=rows)
    if next_ptr is not None:
        gate = tl.load(gates_ptr + b * gates_stride_b).to(tl.float32)
        store(next_ptr + b * N + row, usage_after(usage, gate, found), mask=rows)


@triton.jit
def _allocation_bwd_kernel(
    dusage_ptr, dgates_ptr, dout_ptr, later_ptr, usage_ptr, gates_ptr, eps, N,
    dout_stride_b, dout_stride_n, usage_stride_b, usage_stride_n, gates_stride_b, dgates_stride_b, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One head: `later` is the gradient of the usage that the next head saw, None for the last one."""
    b = tl.program_id(0).to(tl.int64)
    usage_ptr += b * usage_stride_b
    row, usage, s, before = by_usage(usage_ptr, usage_stride_n, eps, N, BLOCK_N)
    rows = row < N
    d = tl.load(dout_ptr + b * dout_stride_b + row * dout_stride_n, mask=rows, other=0.0).to(tl.float32)
    dusage = tl.zeros([BLOCK_N], tl.float32)
    if later_ptr is not None:
        later = tl.load(later_ptr + b * N + row, mask=rows, other=0.0)
        gate = tl.load(gates_ptr + b * gates_stride_b).to(tl.float32)
        d, dusage, dgate = handed_back(d, later, usage, gate, (1 - s) * before, rows)
        if dgates_ptr is not None:
            store(dgates_ptr + b * dgates_stride_b, dgate)
    store(dusage_ptr + b * N + row, dusage + usage_slope(d, s, before, eps, BLOCK_N), mask=rows)


def supports(usage, write_gates, eps):
    if usage.shape[1] > MAX_ROWS:
        return f"{usage.shape[1]} rows are over the limit of {MAX_ROWS}"
    return refuse(usage)


def _tiles(rows):
    return dict(BLOCK_N=_launch.power_of_two(rows, 2), num_warps=4 if rows <= 1024 else 8)


def _heads(found, usage, gates, eps):
    """Forward of some heads, and the float32 usage that each one sees."""
    batch, rows = usage.shape
    seen = [usage]
    for h, out in enumerate(found):
        last = h + 1 == len(found)
        after = None if last else usage.new_empty(batch, rows, dtype=torch.float32)
        gate = None if gates is None else gates[:, h]
        run(
            _allocation_fwd_kernel, (batch,), out, after, seen[-1], gate, eps, rows, out.stride(0), *seen[-1].stride(),
            0 if gate is None else gate.stride(0), **_tiles(rows),
        )  # fmt: skip
        if not last:
            seen.append(after)
    return seen


def forward(out, usage, write_gates, eps):
    if out.numel():
        _heads([out] if write_gates is None else out.unbind(1), usage, write_gates, eps)


def backward(dusage, dwrite_gates, dout, usage, write_gates, eps):
    batch, rows = usage.shape
    heads = 1 if write_gates is None else write_gates.shape[1]
    if not heads or not usage.numel():
        for gradient in (dusage, dwrite_gates):
            if gradient is not None:
                gradient.zero_()
        return
    # The allocation of the last head is not needed, but the usage that it sees is.
    scratch = usage.new_empty(heads, batch, rows, dtype=torch.float32)
    seen, later = [usage] if heads == 1 else _heads(scratch, usage, write_gates, eps), None
    if dwrite_gates is not None:
        dwrite_gates[:, -1].zero_()
    for h in reversed(range(heads)):
        d = dout if write_gates is None else dout[:, h]
        gate = None if write_gates is None else write_gates[:, h]
        dgate = None if dwrite_gates is None else dwrite_gates[:, h]
        target = dusage if h == 0 and dusage is not None else usage.new_empty(batch, rows, dtype=torch.float32)
        run(
            _allocation_bwd_kernel, (batch,), target, dgate, d, later, seen[h], gate, eps, rows, *d.stride(), *seen[h].stride(),
            0 if gate is None else gate.stride(0), 0 if dgate is None else dgate.stride(0), **_tiles(rows),
        )  # fmt: skip
        later = target


def _aot(name, kernel, dtype):
    pointers = dict(next_ptr="*fp32", later_ptr="*fp32", eps="fp32")
    return aot(name, kernel, dtype, dict(usage_stride_n=1, BLOCK_N=1024), pointers)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (_aot("allocation_fwd", _allocation_fwd_kernel, dtype), _aot("allocation_bwd", _allocation_bwd_kernel, dtype))
]
