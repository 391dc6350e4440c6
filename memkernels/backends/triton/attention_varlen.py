"""Softmax attention of sequences laid end to end, on Triton.

A program owns a block of queries (or of keys) of one sequence and head. Where sequences begin is read on the device: sequence s owns
blocks cu_seqlens[s] // BLOCK + s and on, which are enough for it whatever the lengths are, and a program finds its sequence by bisection;
so the host waits for nothing and knows no length. A sequence number S stands for the tokens past the last one.
Backward: one kernel owns keys (dk, dv), one owns queries (dq); scores are computed again in each, nothing is summed by atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._attention_bwd import FEW_KEYS, _attention_delta_kernel, no_moves, set_right
from memkernels.backends.triton._common import (
    AOT_DTYPES,
    INTERPRETED,
    aot,
    device_of,
    dot,
    lanes,
    precision,
    refuse,
    rounded,
    run,
    store,
    strides,
    tanh,
)


@triton.jit
def _sequence(starts_ptr, block, S, steps, tokens, BLOCK: tl.constexpr):
    """(sequence, its first token, how many it has, block within it)."""
    lo, hi = tl.cast(0, tl.int64), tl.cast(S, tl.int64) + 1
    for _ in range(steps):
        middle = (lo + hi) // 2
        right = tl.load(starts_ptr + middle) // BLOCK + middle <= block
        lo = tl.where(right, middle, lo)
        hi = tl.where(right, hi, middle)
    start = tl.load(starts_ptr + lo)
    end = tl.where(lo == S, tokens, tl.load(starts_ptr + tl.minimum(lo + 1, S)))
    return lo, start, end - start, block - (start // BLOCK + lo)


@triton.jit
def _span(starts_ptr, sequence, S):
    """(first token, how many) of a sequence on the other side; sequence S has none there."""
    start = tl.load(starts_ptr + sequence)
    return start, tl.load(starts_ptr + tl.minimum(sequence + 1, S)) - start


@triton.jit
def _logits(a, b, scale, softcap, CAPPED: tl.constexpr, PRECISION: tl.constexpr):
    logit = dot(a, tl.trans(b), tl.zeros([a.shape[0], b.shape[0]], tl.float32), PRECISION) * scale
    if CAPPED:
        logit = softcap * tanh(logit / softcap, False)
    return logit


@triton.jit
def _tile(ptr, row, rows, columns, stride_row, stride_column, BLOCK: tl.constexpr):
    column = lanes(BLOCK)
    tile = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(ptr + row[:, None] * stride_row + column[None, :] * stride_column, mask=tile, other=0.0)


@triton.jit
def _varlen_fwd_kernel(
    out_ptr, lse_ptr, stats_ptr, query_ptr, key_ptr, value_ptr, starts_q_ptr, starts_k_ptr, S, steps, NH, TQ, D, V, group,
    scale, softcap, left, right, query_stride_t, query_stride_h, query_stride_d, key_stride_t, key_stride_h, key_stride_d,
    value_stride_t, value_stride_h, value_stride_v, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, AT_END: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    head = program % NH
    sequence, start_q, Q, block = _sequence(starts_q_ptr, program // NH, S, steps, TQ, BLOCK_M)
    start_k, K = _span(starts_k_ptr, sequence, S)
    i, v = block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_V)
    query = _tile(query_ptr + start_q * query_stride_t + head * query_stride_h, i, Q, D, query_stride_t, query_stride_d, BLOCK_D)
    key_ptr += start_k * key_stride_t + (head // group) * key_stride_h
    value_ptr += start_k * value_stride_t + (head // group) * value_stride_h
    shift = K - Q if AT_END else K * 0
    begin, end = K * 0, tl.where(block * BLOCK_M < Q, K, 0)
    if WINDOWED:
        begin = tl.maximum(block * BLOCK_M + shift - left, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, tl.minimum((block + 1) * BLOCK_M, Q) + shift + right)
    acc, broken = tl.zeros([BLOCK_M, BLOCK_V], tl.float32), tl.zeros([BLOCK_M], tl.int32)
    total, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(begin, end, BLOCK_N):
        k = tl.cast(first, tl.int64) + lanes(BLOCK_N)
        logit = _logits(query, _tile(key_ptr, k, K, D, key_stride_t, key_stride_d, BLOCK_D), scale, softcap, CAPPED, PRECISION)
        seen = (i < Q)[:, None] & (k < K)[None, :]
        if WINDOWED:
            away = k[None, :] - i[:, None] - shift
            seen = seen & (away >= -left) & (away <= right)
        logit = tl.where(seen, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        zero_point = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, shrink = tl.exp(logit - zero_point[:, None]), tl.exp(top - zero_point)
        total, top = total * shrink + tl.sum(weights, 1), new_top
        value = _tile(value_ptr, k, K, V, value_stride_t, value_stride_v, BLOCK_V)
        if WINDOWED:  # a value that is not finite must not reach a query that does not see it by 0 * NaN
            bad = (value - value) != 0
            value = tl.where(bad, 0.0, value)
            hit = (tl.max(bad.to(tl.int32), 1) > 0)[None, :] & (weights != 0)
            broken = tl.maximum(broken, tl.max(hit.to(tl.int32), 1))
        acc = dot(rounded(weights, value.dtype), value, acc * shrink[:, None], PRECISION)
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    acc = tl.where((broken != 0)[:, None], float("nan"), acc)
    at = start_q + i
    store(out_ptr + (at * NH + head)[:, None] * V + v[None, :], acc, mask=(i < Q)[:, None] & (v < V)[None, :])
    tl.store(lse_ptr + at * NH + head, top + tl.log(total), mask=i < Q)
    tl.store(stats_ptr + (head * TQ + at) * 2, top, mask=i < Q)
    tl.store(stats_ptr + ((head * TQ + at) * 2 + 1), total, mask=i < Q)


@triton.jit
def _dlogits(logit, seen, top, total, dweights, delta, softcap, CAPPED: tl.constexpr):
    """(weights, gradients of the scores and of the products) of a tile; the numbers of queries lie along its axis of queries."""
    logit = tl.where(seen, logit, float("-inf"))
    weights = tl.exp(logit - tl.where(top == float("-inf"), 0.0, top)) / tl.where(total == 0, 1.0, total)
    plain = tl.where(seen, weights * (dweights - delta), 0.0)
    dlogit = plain
    if CAPPED:
        bent = logit / softcap
        dlogit = tl.where(seen, plain * (1 - bent * bent), 0.0)
    return weights, plain, dlogit


@triton.jit
def _numbers(stats_ptr, delta_ptr, at, head, here, NH, TQ):
    """(maximum, sum, delta) of queries."""
    place = (head * TQ + at) * 2
    top, total = tl.load(stats_ptr + place, mask=here, other=0.0), tl.load(stats_ptr + (place + 1), mask=here, other=1.0)
    return top, total, tl.load(delta_ptr + (at * NH + head), mask=here, other=0.0)


@triton.jit
def _varlen_dquery_kernel(
    dquery_ptr, moved_ptr, query_ptr, key_ptr, value_ptr, dout_ptr, stats_ptr, delta_ptr, starts_q_ptr, starts_k_ptr, S, steps, NH, TQ, D,
    V, most, group,
    scale, softcap, left, right, query_stride_t, query_stride_h, query_stride_d, key_stride_t, key_stride_h, key_stride_d,
    value_stride_t, value_stride_h, value_stride_v, dout_stride_t, dout_stride_h, dout_stride_v,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, AT_END: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With moved_ptr only the sums of ds and of p of each query, of blocks that see at most `most` keys."""
    program = tl.program_id(0).to(tl.int64)
    head = program % NH
    sequence, start_q, Q, block = _sequence(starts_q_ptr, program // NH, S, steps, TQ, BLOCK_M)
    start_k, K = _span(starts_k_ptr, sequence, S)
    i, d = block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_D)
    query = _tile(query_ptr + start_q * query_stride_t + head * query_stride_h, i, Q, D, query_stride_t, query_stride_d, BLOCK_D)
    dout = _tile(dout_ptr + start_q * dout_stride_t + head * dout_stride_h, i, Q, V, dout_stride_t, dout_stride_v, BLOCK_V)
    top, total, delta = _numbers(stats_ptr, delta_ptr, start_q + i, head, i < Q, NH, TQ)
    key_ptr += start_k * key_stride_t + (head // group) * key_stride_h
    value_ptr += start_k * value_stride_t + (head // group) * value_stride_h
    shift = K - Q if AT_END else K * 0
    begin, end = K * 0, tl.where(block * BLOCK_M < Q, K, 0)
    if WINDOWED:
        begin = tl.maximum(block * BLOCK_M + shift - left, 0) // BLOCK_N * BLOCK_N
        end = tl.minimum(end, tl.minimum((block + 1) * BLOCK_M, Q) + shift + right)
    few = end - begin <= most
    if moved_ptr is not None:
        end = tl.where(few, end, begin)
    dquery = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    moved, summed = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first in range(begin, end, BLOCK_N):
        k = tl.cast(first, tl.int64) + lanes(BLOCK_N)
        key = _tile(key_ptr, k, K, D, key_stride_t, key_stride_d, BLOCK_D)
        value = _tile(value_ptr, k, K, V, value_stride_t, value_stride_v, BLOCK_V)
        seen = (i < Q)[:, None] & (k < K)[None, :]
        if WINDOWED:
            away = k[None, :] - i[:, None] - shift
            seen = seen & (away >= -left) & (away <= right)
        dweights = dot(dout, tl.trans(value), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION)
        logit = _logits(query, key, scale, softcap, CAPPED, PRECISION)
        weights, plain, dlogit = _dlogits(logit, seen, top[:, None], total[:, None], dweights, delta[:, None], softcap, CAPPED)
        moved += tl.sum(plain, 1)
        summed += tl.sum(weights, 1)
        if WINDOWED:  # nor a key
            key = tl.where((key - key) != 0, 0.0, key)
        dquery = dot(rounded(dlogit, key.dtype), key, dquery, PRECISION)
    at = (start_q + i) * NH + head
    if moved_ptr is not None:
        tl.store(moved_ptr + at * 2, moved, mask=i < tl.where(few, Q, 0))
        tl.store(moved_ptr + (at * 2 + 1), summed, mask=i < tl.where(few, Q, 0))
    if dquery_ptr is not None:
        store(dquery_ptr + at[:, None] * D + d[None, :], dquery * scale, mask=(i < Q)[:, None] & (d < D)[None, :])


@triton.jit
def _varlen_dkey_kernel(
    dkey_ptr, dvalue_ptr, query_ptr, key_ptr, value_ptr, dout_ptr, stats_ptr, delta_ptr, starts_q_ptr, starts_k_ptr, S, steps,
    NH, TQ, TK, D, V, group,
    scale, softcap, left, right, query_stride_t, query_stride_h, query_stride_d, key_stride_t, key_stride_h, key_stride_d,
    value_stride_t, value_stride_h, value_stride_v, dout_stride_t, dout_stride_h, dout_stride_v,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr, AT_END: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tiles are keys x queries."""
    program, shared_heads = tl.program_id(0).to(tl.int64), NH // group
    shared = program % shared_heads
    sequence, start_k, K, block = _sequence(starts_k_ptr, program // shared_heads, S, steps, TK, BLOCK_N)
    start_q, Q = _span(starts_q_ptr, sequence, S)
    k, d, v = block * BLOCK_N + lanes(BLOCK_N), lanes(BLOCK_D), lanes(BLOCK_V)
    key = _tile(key_ptr + start_k * key_stride_t + shared * key_stride_h, k, K, D, key_stride_t, key_stride_d, BLOCK_D)
    value = _tile(value_ptr + start_k * value_stride_t + shared * value_stride_h, k, K, V, value_stride_t, value_stride_v, BLOCK_V)
    shift = K - Q if AT_END else K * 0
    begin, end = K * 0, tl.where(block * BLOCK_N < K, Q, 0)
    if WINDOWED:
        begin = tl.maximum(block * BLOCK_N - shift - right, 0) // BLOCK_M * BLOCK_M
        end = tl.minimum(end, tl.minimum((block + 1) * BLOCK_N, K) - shift + left)
    dkey, dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(group):
        head = shared * group + member
        queries, douts = (
            query_ptr + start_q * query_stride_t + head * query_stride_h,
            dout_ptr + start_q * dout_stride_t + head * dout_stride_h,
        )
        for first in range(begin, end, BLOCK_M):
            i = tl.cast(first, tl.int64) + lanes(BLOCK_M)
            query = _tile(queries, i, Q, D, query_stride_t, query_stride_d, BLOCK_D)
            dout = _tile(douts, i, Q, V, dout_stride_t, dout_stride_v, BLOCK_V)
            top, total, delta = _numbers(stats_ptr, delta_ptr, start_q + i, head, i < Q, NH, TQ)
            seen = (k < K)[:, None] & (i < Q)[None, :]
            if WINDOWED:
                away = k[:, None] - i[None, :] - shift
                seen = seen & (away >= -left) & (away <= right)
            dweights = dot(value, tl.trans(dout), tl.zeros([BLOCK_N, BLOCK_M], tl.float32), PRECISION)
            logit = _logits(key, query, scale, softcap, CAPPED, PRECISION)
            weights, _, dlogit = _dlogits(logit, seen, top[None, :], total[None, :], dweights, delta[None, :], softcap, CAPPED)
            dvalue = dot(rounded(weights, dout.dtype), dout, dvalue, PRECISION)
            dkey = dot(rounded(dlogit, query.dtype), query, dkey, PRECISION)
    row = (start_k + k) * shared_heads + shared
    if dkey_ptr is not None:
        store(dkey_ptr + row[:, None] * D + d[None, :], dkey * scale, mask=(k < K)[:, None] & (d < D)[None, :])
    if dvalue_ptr is not None:
        store(dvalue_ptr + row[:, None] * V + v[None, :], dvalue, mask=(k < K)[:, None] & (v < V)[None, :])


def supports(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal):
    width = max(query.shape[2], value.shape[2])
    if width > _launch.MAX_WIDTH:
        return f"a head of {width} elements is over the limit of {_launch.MAX_WIDTH}"
    return refuse(query)


TYPICAL = 4096  # tiles are those of sequences of this length, whatever is in the batch


def _launch_for(kernel, dtype, width, value_width, capability, interpreted=INTERPRETED):
    keys = TYPICAL // (4 if interpreted else 1)
    return _launch.attention(TYPICAL, keys, width, value_width, dtype == torch.float32, kernel, capability, interpreted)


def _options(launch, dtype, softcap, left, right, causal):
    kind = precision(dtype)
    return dict(
        CAPPED=bool(softcap), WINDOWED=left >= 0 or right >= 0, AT_END=causal == "bottom-right", BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, BLOCK_V=launch.block_v, PRECISION="ieee" if kind == "tf32x3" else kind,
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def _numbers_of(query, key, value, starts, scale, softcap, left, right, causal):
    """(S, steps of the bisection), sizes, and scale, cap and limits, where no limit is one that nothing reaches."""
    sequences, far = starts.shape[0] - 1, query.shape[0] + key.shape[0]
    sizes = query.shape[2], value.shape[2], max(query.shape[1] // max(key.shape[1], 1), 1)
    limits = far if left < 0 else min(left, far), far if right < 0 else min(right, far)
    return (sequences, (sequences + 1).bit_length()), sizes, (float(scale), float(softcap or 1), *limits)


def forward(out, lse, stats, query, key, value, cu_seqlens_q, cu_seqlens_k, *options):
    launch = _launch_for("forward", query.dtype, query.shape[2], value.shape[2], device_of(query.device).capability)
    starts = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    search, sizes, numbers = _numbers_of(query, key, value, starts[0], *options)
    blocks = query.shape[0] // launch.block_m + search[0] + 1
    run(
        _varlen_fwd_kernel, (blocks * query.shape[1],), out, lse, stats, query, key, value, *starts, *search, query.shape[1],
        query.shape[0], *sizes, *numbers, *query.stride(), *key.stride(), *value.stride(), **_options(launch, query.dtype, *options[1:]),
    )  # fmt: skip


def backward(dquery, dkey, dvalue, dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, out, stats, *options):
    (tokens, heads, width), value_width, capability = query.shape, value.shape[2], device_of(query.device).capability
    zeros = dout is None
    dout = out.new_zeros(()).expand(out.shape) if zeros else dout
    starts = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    search, sizes, numbers = _numbers_of(query, key, value, starts[0], *options)
    delta, before = stats.new_empty(tokens, heads), dlse if zeros else None
    dlse_strides = strides(before, 2)
    run(
        _attention_delta_kernel, (_launch.ceil_div(delta.numel(), 16),), delta, out, dout, before, 1, heads, value_width, delta.numel(),
        dout.stride(0), 0, dout.stride(1), dout.stride(2), dlse_strides[0], 0, dlse_strides[1], BLOCK=16,
        BLOCK_V=_launch.power_of_two(value_width, 16),
    )  # fmt: skip
    tensors = query, key, value, dout, stats, delta, *starts, *search
    layouts = *query.stride(), *key.stride(), *value.stride(), *dout.stride()
    if dquery is not None or (dkey is not None and not zeros):
        launch = _launch_for("dquery", query.dtype, width, value_width, capability)
        grid = ((tokens // launch.block_m + search[0] + 1) * heads,)
        tile = _options(launch, query.dtype, *options[1:])
        rest = *tensors, heads, tokens, *sizes[:2], FEW_KEYS, *sizes[2:], *numbers, *layouts
        if not zeros:  # queries that see few keys: see _attention_bwd.py
            moved = no_moves(delta)
            run(_varlen_dquery_kernel, grid, None, moved, *rest, **tile)
            set_right(delta, moved, dlse)
        if dquery is not None:
            run(_varlen_dquery_kernel, grid, dquery, None, *rest, **tile)
    if dkey is not None or dvalue is not None:
        launch = _launch_for("dkey", query.dtype, width, value_width, capability)
        grid = ((key.shape[0] // launch.block_n + search[0] + 1) * key.shape[1],)
        tile = _options(launch, query.dtype, *options[1:])
        run(_varlen_dkey_kernel, grid, dkey, dvalue, *tensors, heads, tokens, key.shape[0], *sizes, *numbers, *layouts, **tile)


def _aot(role, dtype, width, causal):
    kernel = {"forward": _varlen_fwd_kernel, "dquery": _varlen_dquery_kernel, "dkey": _varlen_dkey_kernel}[role]
    launch = _launch_for(role, dtype, width, width, (9, 0), False)
    constants = {k: v for k, v in _options(launch, dtype, 0.0, -1, 0 if causal else -1, "bottom-right").items() if k.isupper()}
    constants |= {a: 1 for a in ("query_stride_d", "key_stride_d", "value_stride_v", "dout_stride_v", "group") if a in kernel.arg_names}
    constants |= {"moved_ptr": None} if role == "dquery" else {}
    floats = dict.fromkeys(("lse_ptr", "stats_ptr", "delta_ptr"), "*fp32") | dict.fromkeys(("scale", "softcap"), "fp32")
    types = floats | dict.fromkeys(("starts_q_ptr", "starts_k_ptr"), "*i64")
    name = f"attention_varlen_{role}_D{width}" + ("_causal" if causal else "")
    expect = () if dtype == torch.float32 else ("mma",)
    return aot(name, kernel, dtype, constants, types, launch.num_warps, launch.num_stages, expect)


AOT = [_aot(role, dtype, 64, causal) for role in ("forward", "dquery", "dkey") for dtype in AOT_DTYPES for causal in (False, True)]
