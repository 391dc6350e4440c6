"""Softmax attention on Triton: out = softmax(scale * q . k + mask) @ v over the keys a query sees.

Forward: a program owns a block of queries of one head and walks over the keys with an online softmax; blocks that every query of the
program sees entirely skip the mask. Few queries over many keys are split over the keys, and the parts combined in order.
From Hopper on, keys and values of 16 bits come by TMA where their layout allows it; on Blackwell, where all queries see all keys, loads,
products and softmax are warps of their own (not on Hopper: Triton 3.9's pass NVGPUWarpSpecialization fails on two products in a loop).
Backward (_attention_bwd.py): one kernel owns blocks of keys (dk, dv), one owns blocks of queries (dq, and the mask's gradient); scores
are computed again in each, so nothing is summed by atomics. float32 softmax and sums; 16-bit weights are rounded before they meet
the values, as the matrix instructions need. Operations: forward 4*Q*K*D a head, backward 14*Q*K*D.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from memkernels.backends.triton import _attention_bwd, _launch
from memkernels.backends.triton._attention import (
    MASK_STRIDES,
    capped,
    contiguous,
    dropout,
    dropout_arguments,
    entry,
    join_sink,
    limits,
    mask_arguments,
    masked,
    pull,
    supports,
    tiles,
)
from memkernels.backends.triton._common import INTERPRETED, NAMES, aot, device_of, dot, lanes, rounded, run, store

__all__ = ["AOT", "backward", "forward", "supports"]


@triton.jit
def _walk(
    acc, total, top, broken, query, i, head, key_ptr, value_ptr, entry, shared, mask_ptr, seed, lo, hi, Q, K, D, V, scale, softcap,
    threshold, inverse, low, high, key_stride_k, key_stride_d, value_stride_k, value_stride_v, mask_stride_q, mask_stride_k,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    """Online softmax over keys lo .. hi. MASKED: not every key of a block is seen by every query. TMA: keys and values are descriptors.

    SPECIAL: the only loop, over all keys, and cut into warps that load, multiply and do the rest."""
    d, v = lanes(query.shape[1]), lanes(acc.shape[1])
    for start in tl.range(lo, hi, BLOCK_N, warp_specialize=SPECIAL):
        k = tl.cast(start, tl.int64) + lanes(BLOCK_N)
        if TMA:
            key = key_ptr.load([entry, shared, tl.cast(start, tl.int32), 0]).reshape(BLOCK_N, query.shape[1])
        else:
            key = tl.load(
                key_ptr + k[:, None] * key_stride_k + d[None, :] * key_stride_d, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0
            )
        zero = tl.zeros([query.shape[0], BLOCK_N], tl.float32)
        logit = dot(query, tl.trans(key), zero, PRECISION) * scale
        if CAPPED:
            logit, _ = capped(logit, softcap)
        if SPECIAL:
            logit = tl.where((k < K)[None, :], logit, float("-inf"))
        if MASKED:
            logit = masked(logit, i[:, None], k[None, :], mask_ptr, mask_stride_q, mask_stride_k, Q, K, low, high, WINDOWED)
        new_top = tl.maximum(top, tl.max(logit, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(logit - shift[:, None])
        shrink = tl.exp(top - shift)
        total, top = total * shrink + tl.sum(weights, 1), new_top
        if seed is not None:
            weights *= dropout(seed, head, i[:, None], k[None, :], threshold, inverse)
        if TMA:
            value = value_ptr.load([entry, shared, tl.cast(start, tl.int32), 0]).reshape(BLOCK_N, acc.shape[1])
        else:
            place = k[:, None] * value_stride_k + v[None, :] * value_stride_v
            value = tl.load(value_ptr + place, mask=(k < K)[:, None] & (v < V)[None, :], other=0.0)
        if MASKED:  # a value that is not finite must not reach a query that does not see it by 0 * NaN
            bad = (value - value) != 0
            value = tl.where(bad, 0.0, value)
            hit = (tl.max(bad.to(tl.int32), 1) > 0)[None, :] & (weights != 0)
            broken = tl.maximum(broken, tl.max(hit.to(tl.int32), 1))
        acc = dot(rounded(weights, value.dtype), value, acc * shrink[:, None], PRECISION)
    return acc, total, top, broken


@triton.jit
def _attention_fwd_kernel(
    out_ptr, lse_ptr, stats_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, sink_ptr, lengths_ptr, seed_ptr,
    B, NH, Q, K, D, V, group, mask_group, splits, chunk, scale, softcap, threshold, inverse, low, high, pull,
    query_stride_b, query_stride_h, query_stride_q, query_stride_d,
    key_stride_b, key_stride_h, key_stride_k, key_stride_d, value_stride_b, value_stride_h, value_stride_k, value_stride_v,
    mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
    TMA: tl.constexpr, SPECIAL: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(Q, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    block, split, row = (
        blocks - 1 - program % blocks,
        (program // blocks) % splits,
        program // blocks // splits,
    )  # longest causal block first
    b, head = row // NH, row % NH
    K, low, high = entry(lengths_ptr, b, K, low, high, pull)
    i, d, v = block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_D), lanes(BLOCK_V)
    place = b * query_stride_b + head * query_stride_h + i[:, None] * query_stride_q + d[None, :] * query_stride_d
    query = tl.load(query_ptr + place, mask=(i < Q)[:, None] & (d < D)[None, :], other=0.0)
    at_entry, shared = tl.cast(b, tl.int32), tl.cast(head // group, tl.int32)
    if not TMA:
        key_ptr += b * key_stride_b + (head // group) * key_stride_h
        value_ptr += b * value_stride_b + (head // group) * value_stride_h
    seed = None
    if mask_ptr is not None:
        mask_ptr += (b // mask_group) * mask_stride_b + head * mask_stride_h
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + b)
    first, last = block * BLOCK_M, tl.minimum((block + 1) * BLOCK_M, Q) - 1
    begin = tl.maximum(split * chunk, first + low) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.minimum((split + 1) * chunk, K), last + high + 1)
    begin = tl.minimum(begin, tl.maximum(end, 0))
    # Blocks in between are seen entirely by all queries of this program.
    clear = tl.minimum(tl.maximum(tl.cdiv(last + low, BLOCK_N) * BLOCK_N, begin), tl.maximum(end, begin))
    clear_end = tl.maximum(tl.minimum(end, first + high + 1) // BLOCK_N * BLOCK_N, clear)
    if mask_ptr is not None:
        clear = begin
        clear_end = begin
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    broken = tl.zeros([BLOCK_M], tl.int32)
    if WINDOWED:
        acc, total, top, broken = _walk(
            acc, total, top, broken, query, i, head, key_ptr, value_ptr, at_entry, shared, mask_ptr, seed, begin, clear, Q, K, D, V,
            scale, softcap, threshold, inverse, low, high, key_stride_k, key_stride_d, value_stride_k, value_stride_v, mask_stride_q,
            mask_stride_k, True, CAPPED, WINDOWED, BLOCK_N, PRECISION, TMA, False,
        )  # fmt: skip
    else:
        clear = begin
    if SPECIAL:
        clear = 0
        clear_end = K
    if mask_ptr is None:
        acc, total, top, broken = _walk(
            acc, total, top, broken, query, i, head, key_ptr, value_ptr, at_entry, shared, mask_ptr, seed, clear, clear_end, Q, K, D,
            V, scale, softcap, threshold, inverse, low, high, key_stride_k, key_stride_d, value_stride_k, value_stride_v, mask_stride_q,
            mask_stride_k, False, CAPPED, WINDOWED, BLOCK_N, PRECISION, TMA, SPECIAL,
        )  # fmt: skip
    if not SPECIAL:
        acc, total, top, broken = _walk(
            acc, total, top, broken, query, i, head, key_ptr, value_ptr, at_entry, shared, mask_ptr, seed, clear_end, end, Q, K, D, V,
            scale, softcap, threshold, inverse, low, high, key_stride_k, key_stride_d, value_stride_k, value_stride_v, mask_stride_q,
            mask_stride_k, True, CAPPED, WINDOWED, BLOCK_N, PRECISION, TMA, False,
        )  # fmt: skip
    if sink_ptr is not None:
        top, total, shrink = join_sink(sink_ptr, head, top, total)
        acc *= shrink[:, None]
    acc = acc / tl.where(total == 0, 1.0, total)[:, None]
    acc = tl.where((broken != 0)[:, None], float("nan"), acc)
    at = ((split * B + b) * NH + head) * Q + i
    store(out_ptr + at[:, None] * V + v[None, :], acc, mask=(i < Q)[:, None] & (v < V)[None, :])
    if lse_ptr is not None:
        store(lse_ptr + at, top + tl.log(total), mask=i < Q)
    store(stats_ptr + at * 2, top, mask=i < Q)
    store(stats_ptr + (at * 2 + 1), total, mask=i < Q)


@triton.jit
def _attention_combine_kernel(
    out_ptr, lse_ptr, stats_ptr, out_part_ptr, stats_part_ptr, sink_ptr, rows, NH, Q, V, splits, BLOCK_V: tl.constexpr
):  # fmt: skip
    """One query: the softmax over the union of the splits, in their order."""
    row, v = tl.program_id(0).to(tl.int64), lanes(BLOCK_V)
    top, total = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    out = tl.zeros([BLOCK_V], tl.float32)
    for split in range(splits):
        at = tl.cast(split, tl.int64) * rows + row
        part_top = tl.load(stats_part_ptr + at * 2)
        new_top = tl.maximum(top, part_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, grow = tl.exp(top - shift), tl.exp(part_top - shift) * tl.load(stats_part_ptr + (at * 2 + 1))
        out = out * shrink + tl.load(out_part_ptr + at * V + v, mask=v < V, other=0.0) * grow
        total, top = total * shrink + grow, new_top
    if sink_ptr is not None:
        top, total, shrink = join_sink(sink_ptr, row // Q % NH, top, total)
        out *= shrink
    store(out_ptr + row * V + v, out / tl.where(total == 0, 1.0, total), mask=v < V)
    store(lse_ptr + row, top + tl.log(total))
    store(stats_ptr + row * 2, top)
    store(stats_ptr + (row * 2 + 1), total)


def _descriptor(tensor, rows, columns):
    """By which TMA loads blocks of rows, or None: it takes rows of one piece that lie at multiples of 16 bytes, none expanded."""
    step, least = 16 // tensor.element_size(), _launch.ceil_div(tensor.shape[3], 8) * 8
    strides = [stride if size > 1 else least for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True)]
    if tensor.stride(3) != 1 or 0 in tensor.shape or any(s <= 0 or s % step for s in strides) or tensor.data_ptr() % 16:
        return None
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns])


def _plan(query, key, value, simple):
    """(tiles, descriptors of keys and values or None, SPECIAL); `simple`: every query sees every key, without dropout."""
    queries, keys, width, value_width, wide = query.shape[2], key.shape[2], query.shape[3], value.shape[3], query.dtype == torch.float32
    capability = device_of(query.device).capability
    for kernel in ("special", "forward") if simple and capability[0] == 10 else ("forward",):
        launch = _launch.attention(queries, keys, width, value_width, wide, kernel, capability, INTERPRETED)
        if _launch.by_tma(launch, wide, capability, queries):
            both = _descriptor(key, launch.block_n, launch.block_d), _descriptor(value, launch.block_n, launch.block_v)
            if None not in both:
                return launch, both, kernel == "special"
    return launch, None, False


def forward(out, lse, stats, query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, causal):
    (batch, heads, queries, width), keys, value_width = query.shape, key.shape[2], value.shape[3]
    simple = attn_mask is None and lengths_k is None and seed is None and left < 0 and right < 0
    launch, both, special = _plan(query, key, value, simple)
    split = launch.splits > 1
    out_part = out.new_empty(launch.splits, *out.shape, dtype=torch.float32) if split else out
    stats_part = stats.new_empty(launch.splits, *stats.shape) if split else stats
    mask_group, *mask_strides = mask_arguments(attn_mask, batch)
    run(
        _attention_fwd_kernel, (batch * heads * launch.splits * _launch.ceil_div(queries, launch.block_m),),
        out_part, None if split else lse, stats_part, query, *(both or (key, value)), attn_mask, None if split else contiguous(sink),
        contiguous(lengths_k), seed, batch, heads, queries, keys, width, value_width, max(heads // max(key.shape[1], 1), 1), mask_group,
        launch.splits, launch.chunk, float(scale), float(softcap), *dropout_arguments(dropout_p),
        *limits(queries, keys, left, right, causal), pull(causal), *query.stride(), *key.stride(), *value.stride(), *mask_strides,
        **tiles(launch, query.dtype, left, right, softcap), TMA=both is not None, SPECIAL=special,
    )  # fmt: skip
    if split:
        run(
            _attention_combine_kernel, (lse.numel(),), out, lse, stats, out_part, stats_part, contiguous(sink), lse.numel(), heads,
            queries, value_width, launch.splits, BLOCK_V=launch.block_v,
        )  # fmt: skip


backward = _attention_bwd.backward


def _aot(dtype, width, causal, queries=4096, ampere=False, every=False, tma=0):
    """`tma`: by TMA, for this capability alone."""
    special, capability = tma == 100 and not causal, (8, 0) if ampere else (9, 0)
    kernel = "special" if special else "forward"
    launch = _launch.attention(queries, 4096, width, width, dtype == torch.float32, kernel, capability)
    sizes = (
        dict.fromkeys(("mask_ptr", "seed_ptr") + (() if every else ("sink_ptr", "lengths_ptr")))
        | dict.fromkeys(MASK_STRIDES, 0)
        | dict(splits=launch.splits)
    )
    ones = dict.fromkeys(("query_stride_d", "key_stride_d", "value_stride_v", "group", "mask_group"), 1)
    constants = {k: v for k, v in tiles(launch, dtype, -1, 0 if causal else -1, float(every)).items() if k.isupper()} | sizes | ones
    constants |= dict(TMA=tma > 0, SPECIAL=special)
    if launch.splits > 1:
        constants["lse_ptr"] = None
    types = {
        "lse_ptr": "*fp32",
        "lengths_ptr": "*i64",
        "stats_ptr": "*fp32",
        "scale": "fp32",
        "softcap": "fp32",
        "inverse": "fp32",
        "threshold": "i32",
    } | ({"out_ptr": "*fp32"} if launch.splits > 1 else {})
    if tma:
        types |= dict.fromkeys(("key_ptr", "value_ptr"), f"tensordesc<{NAMES[dtype]}[1,1,{launch.block_n},{launch.block_d}]>")
    name = (
        f"attention_fwd_D{width}"
        + ("_causal" if causal else "")
        + ("_every" if every else "")
        + (f"_Q{queries}" if queries != 4096 else "")
        + (f"_tma{tma}" if tma else "")
    )
    expect: tuple[str, ...] = ("wgmma",) if dtype != torch.float32 and queries >= 64 else ()
    if tma:
        expect = ("tma", "wgmma") if tma == 90 else ("tma", "tcgen05", "warp_specialize") if special else ("tma", "tcgen05")
    entry = aot(
        name + ("_ampere" if ampere else ""), _attention_fwd_kernel, dtype, constants, types, launch.num_warps, launch.num_stages, expect
    )
    return replace(entry, capabilities=(tma,) if tma else (80,) if ampere else (90,) if every else (90, 100))


AOT = [
    entry
    for dtype in NAMES
    for entry in (
        *(_aot(dtype, width, causal, ampere=ampere) for width in (64, 128) for causal in (False, True) for ampere in (False, True)),
        _aot(dtype, 64, False, queries=16),
        *_attention_bwd.entries(dtype),
    )
] + [
    *(_aot(torch.bfloat16, width, causal, tma=sm) for width in (64, 128) for causal in (False, True) for sm in (90, 100)),
    _aot(torch.bfloat16, 64, True, every=True),
    _aot(torch.bfloat16, 128, True, queries=100),
    *_attention_bwd.every(torch.bfloat16),
]
