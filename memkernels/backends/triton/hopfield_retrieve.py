"""Retrieval from a modern Hopfield network on Triton: xi <- softmax(beta xi key^T) key, step by step, then the read of the values.

Forward: a program owns a block of queries, whose states stay in registers for all steps, and walks over the patterns with an online softmax
once a step; when all its rows have come to rest it skips to the read. Backward: attention's own kernels, step by step, on float32 copies.
Bytes a step and block of queries: s*N*D from the L2 cache. Products of float32 states, softmax and sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends import _hopfield
from memkernels.backends.triton import _launch
from memkernels.backends.triton import attention as _attention
from memkernels.backends.triton._common import AOT_DTYPES, aot, dot, lanes, precision, refuse, run, store, strides


@triton.jit
def _read(xi, factor, key_ptr, rows_ptr, mask_ptr, limit, N, D, V, key_stride_n, key_stride_d, rows_stride_n, rows_stride_v, mask_stride_n,
          BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """softmax(factor xi key^T) rows over the first `limit` patterns (N, or 0: nothing is done), maximum and sum of the softmax."""
    d, v = lanes(xi.shape[1]), lanes(BLOCK_V)
    acc = tl.zeros([xi.shape[0], BLOCK_V], tl.float32)
    top, total = tl.full([xi.shape[0]], float("-inf"), tl.float32), tl.zeros([xi.shape[0]], tl.float32)
    for start in range(0, limit, BLOCK_N):
        n = tl.cast(start, tl.int64) + lanes(BLOCK_N)
        seen = n < N
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + n * mask_stride_n, mask=n < N, other=0) != 0)
        place = n[:, None] * key_stride_n + d[None, :] * key_stride_d
        key = tl.load(key_ptr + place, mask=seen[:, None] & (d < D)[None, :], other=0.0)
        zero = tl.zeros([xi.shape[0], BLOCK_N], tl.float32)
        scores = tl.where(seen[None, :], dot(xi, tl.trans(key), zero, PRECISION) * factor[:, None], float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, keep = tl.exp(scores - shift[:, None]), tl.exp(top - shift)
        total, top = total * keep + tl.sum(weights, 1), new_top
        place = n[:, None] * rows_stride_n + v[None, :] * rows_stride_v
        rows = tl.load(rows_ptr + place, mask=seen[:, None] & (v < V)[None, :], other=0.0)
        acc = dot(weights, rows, acc * keep[:, None], PRECISION)
    return acc / tl.where(total == 0, 1.0, total)[:, None], top, total


@triton.jit
def _hopfield_fwd_kernel(
    read_ptr, exact_ptr, states_ptr, stats_ptr, moves_ptr, query_ptr, key_ptr, beta_ptr, value_ptr, mask_ptr, B, Q, N, D, V, steps, scale,
    tolerance, query_stride_b, query_stride_q, query_stride_d, key_stride_b, key_stride_n, key_stride_d, beta_stride_b, beta_stride_q,
    value_stride_b, value_stride_n, value_stride_v, mask_stride_b, mask_stride_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK_M)
    b, i = tl.program_id(0).to(tl.int64) // blocks, tl.program_id(0).to(tl.int64) % blocks * BLOCK_M + lanes(BLOCK_M)
    d, v, row = lanes(BLOCK_D), lanes(BLOCK_V), b * Q + i
    tile, rows = (i < Q)[:, None] & (d < D)[None, :], tl.cast(B, tl.int64) * Q
    place = b * query_stride_b + i[:, None] * query_stride_q + d[None, :] * query_stride_d
    xi = tl.load(query_ptr + place, mask=tile, other=0.0).to(tl.float32)
    factor = tl.full([BLOCK_M], 1.0, tl.float32) * scale
    if beta_ptr is not None:
        factor *= tl.load(beta_ptr + b * beta_stride_b + i * beta_stride_q, mask=i < Q, other=0.0).to(tl.float32)
    key_ptr += b * key_stride_b
    value_ptr += b * value_stride_b
    if mask_ptr is not None:
        mask_ptr += b * mask_stride_b
    far, moves = tl.where(i < Q, 1, 0), tl.zeros([BLOCK_M], tl.int64)
    for step in range(0, steps - 1):
        limit = tl.where(tl.max(far, 0) > 0, N, 0)
        found, top, total = _read(
            xi, factor, key_ptr, key_ptr, mask_ptr, limit, N, D, D, key_stride_n, key_stride_d, key_stride_n, key_stride_d, mask_stride_n,
            BLOCK_N, BLOCK_D, PRECISION,
        )  # fmt: skip
        found = tl.where((far > 0)[:, None], found, xi)
        moves += far.to(tl.int64)
        if tolerance > 0:
            moved = tl.sum((found - xi) * (found - xi), 1)
            far = tl.where(moved >= tolerance * tolerance, far, 0)
        xi = found
        at = tl.cast(step, tl.int64) * rows + row
        store(states_ptr + at[:, None] * D + d[None, :], xi, mask=tile)
        store(stats_ptr + at * 2, top, mask=i < Q)
        store(stats_ptr + (at * 2 + 1), total, mask=i < Q)
    read, top, total = _read(
        xi, factor, key_ptr, value_ptr, mask_ptr, N, N, D, V, key_stride_n, key_stride_d, value_stride_n, value_stride_v, mask_stride_n,
        BLOCK_N, BLOCK_V, PRECISION,
    )  # fmt: skip
    out = row[:, None] * V + v[None, :]
    store(read_ptr + out, read, mask=(i < Q)[:, None] & (v < V)[None, :])
    if exact_ptr is not None:
        store(exact_ptr + out, read, mask=(i < Q)[:, None] & (v < V)[None, :])
    at = (tl.cast(steps, tl.int64) - 1) * rows + row
    store(stats_ptr + at * 2, top, mask=i < Q)
    store(stats_ptr + (at * 2 + 1), total, mask=i < Q)
    tl.store(moves_ptr + row, moves, mask=i < Q)


def supports(query, key, beta, value, mask, scale, steps, tolerance, return_state):
    width = query.shape[2] if value is None else max(query.shape[2], value.shape[2])
    if width > MAX_WIDTH:
        return f"a pattern of {width} elements is over the limit of {MAX_WIDTH}"
    return refuse(query)


MAX_WIDTH = 256  # states, sums and a tile of patterns lie in registers together


def _tiles(launch, dtype):
    names = ("block_m", "block_n", "block_d", "block_v", "num_warps", "num_stages")
    named = {name if name.startswith("num") else name.upper(): getattr(launch, name) for name in names}
    return {**named, "PRECISION": precision(dtype)}


def forward(
    read, state, states, stats, moves, exact, query, key, beta, value, mask, scale, steps, tolerance, return_state
):  # fmt: skip
    (batch, queries, width), values = query.shape, key if value is None else value
    launch = _launch.hopfield(queries, width, values.shape[2], query.dtype == torch.float32)
    run(
        _hopfield_fwd_kernel, (batch * _launch.ceil_div(queries, launch.block_m),), read, exact, states, stats, moves, query, key, beta,
        values, mask, batch, queries, key.shape[1], width, values.shape[2], steps, float(scale), float(tolerance), *query.stride(),
        *key.stride(), *strides(beta, 2), *values.stride(), *strides(mask, 2), **_tiles(launch, query.dtype),
    )  # fmt: skip
    if state is not None:
        state.copy_(states[-1] if steps > 1 else query)


def backward(
    dquery, dkey, dbeta, dvalue, dread, dstate, query, key, beta, value, mask, read, states, stats, moves, exact, scale, steps, tolerance,
    return_state,
):  # fmt: skip
    saved = read if exact is None or exact.dim() == 1 else exact, states, stats, moves
    dstate = dstate if return_state else None
    gradients, inputs = (dquery, dkey, dbeta, dvalue), (query, key, beta, value, mask)
    _hopfield.backward(_step_backward, gradients, dread, dstate, inputs, saved, scale, steps, tolerance)


def _step_backward(dquery, dkey, dvalue, dout, query, key, value, mask, out, stats, scale):
    """That of attention, of a single head."""
    tensors = (dquery, dkey, dvalue, dout, query, key, value, out, stats)
    dquery, dkey, dvalue, dout, query, key, value, out, stats = (t if t is None else t[:, None] for t in tensors)
    mask = None if mask is None else mask[:, None, None]
    _attention.backward(
        dquery, dkey, dvalue, None, None, dout, None, query, key, value, mask, None, None, None, out, stats, scale, 0.0, 0.0, -1, -1,
        "top-left",
    )  # fmt: skip


def _aot(dtype, every):
    tiles = _tiles(_launch.hopfield(512, 64, 64, dtype == torch.float32), dtype)
    ones = [a for a in _hopfield_fwd_kernel.arg_names if a.endswith(("stride_d", "stride_v", "mask_stride_n", "beta_stride_q"))]
    fixed = (
        dict.fromkeys(ones, 1)
        | {k: v for k, v in tiles.items() if k.isupper()}
        | ({} if every else dict.fromkeys(("beta_ptr", "mask_ptr")))
    )
    types = dict.fromkeys(("exact_ptr", "states_ptr", "stats_ptr"), "*fp32") | {"moves_ptr": "*i64", "mask_ptr": "*i1"}
    name = f"hopfield_fwd{'_every' if every else ''}"
    return aot(
        name, _hopfield_fwd_kernel, dtype, fixed, types | dict(scale="fp32", tolerance="fp32"), tiles["num_warps"], tiles["num_stages"]
    )


AOT = [_aot(dtype, every) for dtype in AOT_DTYPES for every in (False, True)]
