"""out = a @ b + biases in float32 sums: an element's bits depend on its own row and column only, which cuBLAS does not promise."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton._common import aot, dot, lanes, run, store, strides, tf32_allowed
from memkernels.backends.triton._launch import ceil_div


@triton.jit
def matmul_kernel(
    out_ptr, a_ptr, b_ptr, bias_ptr, other_bias_ptr, M, N, K,
    out_stride_m, a_stride_m, a_stride_k, b_stride_k, b_stride_n, bias_stride, other_bias_stride,
    out_stride_g, a_stride_g, b_stride_g, a_groups, b_groups,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Group g of the grid's second axis: the g-th block of out, of a and of b, the last two counted in a circle."""
    columns, group = tl.cdiv(N, BLOCK_N), tl.program_id(1).to(tl.int64)
    out_ptr += group * out_stride_g
    a_ptr += (group % a_groups) * a_stride_g
    b_ptr += (group % b_groups) * b_stride_g
    m = (tl.program_id(0).to(tl.int64) // columns) * BLOCK_M + lanes(BLOCK_M)
    n = (tl.program_id(0).to(tl.int64) % columns) * BLOCK_N + lanes(BLOCK_N)
    a_ptr += m[:, None] * a_stride_m
    b_ptr += n[None, :] * b_stride_n
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + lanes(BLOCK_K)
        a = tl.load(a_ptr + k[None, :] * a_stride_k, mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + k[:, None] * b_stride_k, mask=(k < K)[:, None] & (n < N)[None, :], other=0.0)
        total = dot(a, b, total, PRECISION)
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n * bias_stride, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if other_bias_ptr is not None:
        total += tl.load(other_bias_ptr + n * other_bias_stride, mask=n < N, other=0.0).to(tl.float32)[None, :]
    store(out_ptr + m[:, None] * out_stride_m + n[None, :], total, mask=(m < M)[:, None] & (n < N)[None, :])


TILES = dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32)


def product_precision(dtype: torch.dtype) -> str:
    """For products of which one factor is a 16-bit value (exact in tf32), or float32 at torch's own switch."""
    return "ieee" if dtype == torch.float32 and not tf32_allowed() else "tf32"


def _run(out, a, b, sizes, dtype, bias=None, other_bias=None, groups=1, along=(0, 0, 0, 1, 1)):
    m, n, k = sizes
    grid = ceil_div(m, TILES["BLOCK_M"]) * ceil_div(n, TILES["BLOCK_N"]), groups
    run(
        matmul_kernel, grid, out, a, b, bias, other_bias, m, n, k, out.stride(0), *a.stride(), *b.stride(), *strides(bias, 1),
        *strides(other_bias, 1), *along, **TILES, PRECISION=product_precision(dtype), num_warps=4,
    )  # fmt: skip


def matmul(out, a, b, dtype, bias=None, other_bias=None):
    """out "M N" (its rows contiguous) = a "M K" @ b "K N" + bias "N" + other_bias "N"; `dtype` is that of the call."""
    (m, k), n = a.shape, b.shape[1]
    _run(out, a, b, (m, n, k), dtype, bias, other_bias)


def hidden_product(out, states, weight, hidden, heads, dtype):
    """out "M GH" = states "M P" times a contiguous weight "GH P/heads": the rows of a head times the states of that head."""
    units, share, groups = hidden // heads, weight.shape[1], weight.shape[0] // max(hidden, 1) * heads
    _run(out, states, weight.mT, (states.shape[0], units, share), dtype, None, None, groups, (units, share, units * share, heads, groups))


def weight_gradient(out, d, states, hidden, heads, dtype):
    """out, like that weight, from d "M GH" and states "M P"."""
    units, share, groups = hidden // heads, out.shape[1], out.shape[0] // max(hidden, 1) * heads
    _run(out, d.mT, states, (units, share, d.shape[0]), dtype, None, None, groups, (units * share, units, share, groups, heads))


def entries(dtype):
    """The three products of lstm: input @ weight.T, dz @ weight, dz.T @ input."""
    common = dict(TILES, PRECISION=product_precision(dtype), other_bias_ptr=None, bias_stride=1, other_bias_stride=0)
    common |= dict(a_groups=1, b_groups=1)
    wide = {"out_ptr": "*fp32"}
    return [
        aot("lstm_project", matmul_kernel, dtype, dict(common, a_stride_k=1, b_stride_k=1), wide),
        aot("lstm_dinput", matmul_kernel, dtype, dict(common, bias_ptr=None, a_stride_k=1, b_stride_n=1), {"a_ptr": "*fp32"}),
        aot("lstm_dweight", matmul_kernel, dtype, dict(common, bias_ptr=None, a_stride_m=1, b_stride_n=1), {"a_ptr": "*fp32"}),
    ]
