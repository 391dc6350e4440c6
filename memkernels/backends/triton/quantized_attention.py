"""Attention of few queries over an int8 memory on Triton: out = softmax(scale key_scale (q . key)) @ (value_scale value).

A program owns a block of the query rows that share a key head, and a run of keys: the memory is read once in each direction, whatever the
number of query heads. Parts of a run are combined in order (forward: _attention_combine_kernel, backward: sum_splits). Bytes of a key are
exact in every query dtype, so their products with a 16-bit query are exact too; weights stay float32, as scales would leave float16's
range. Bytes: forward and backward D + V + 8 a key and key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import (
    AOT_DTYPES,
    INTERPRETED,
    aot,
    dot,
    lanes,
    precision,
    refuse,
    rounded,
    run,
    store,
    strides,
    sum_splits,
)
from memkernels.backends.triton.attention import _attention_combine_kernel

__all__ = ["AOT", "backward", "forward", "supports"]


@triton.jit
def _place(NH, NHk, Q, K, lengths_ptr, splits, chunk, BLOCK_M: tl.constexpr):
    """Of a program: entry, key head, split, its rows (head, query, place in [NH][Q], which exist) and its keys begin .. end, and whether
    the entry sees a single key in all."""
    group = NH // NHk
    rows = group * Q
    blocks = tl.cdiv(rows, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    split, row = program // blocks % splits, program // blocks // splits
    b, shared = row // NHk, row % NHk
    r = program % blocks * BLOCK_M + lanes(BLOCK_M)
    seen = tl.cast(K, tl.int64)
    if lengths_ptr is not None:
        seen = tl.minimum(seen, tl.load(lengths_ptr + b))
    end = tl.minimum((split + 1) * chunk, seen)
    return b, shared, split, shared * group + r // Q, r % Q, r < rows, split * chunk, end, seen == 1


@triton.jit
def _bytes(ptr, k, column, end, width, stride_k, stride_column):
    """Rows k of the memory in float32, 0 from `end` on."""
    place = k[:, None] * stride_k + column[None, :] * stride_column
    return tl.load(ptr + place, mask=(k < end)[:, None] & (column < width)[None, :], other=0).to(tl.float32)


@triton.jit
def _quantized_attention_fwd_kernel(
    part_ptr, stats_ptr, query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, lengths_ptr, B, NH, NHk, Q, K, D, V, splits, chunk,
    scale, query_stride_b, query_stride_h, query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_k, key_stride_d,
    value_stride_b, value_stride_h, value_stride_k, value_stride_v, key_scale_stride_b, key_scale_stride_h, key_scale_stride_k,
    value_scale_stride_b, value_scale_stride_h, value_scale_stride_k,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, shared, split, head, i, exists, begin, end, _ = _place(NH, NHk, Q, K, lengths_ptr, splits, chunk, BLOCK_M)
    d, v = lanes(BLOCK_D), lanes(BLOCK_V)
    query_ptr += b * query_stride_b + (head * query_stride_h + i * query_stride_q)[:, None]
    query = tl.load(query_ptr + d[None, :] * query_stride_d, mask=exists[:, None] & (d < D)[None, :], other=0.0)
    key_ptr += b * key_stride_b + shared * key_stride_h
    value_ptr += b * value_stride_b + shared * value_stride_h
    key_scale_ptr += b * key_scale_stride_b + shared * key_scale_stride_h
    value_scale_ptr += b * value_scale_stride_b + shared * value_scale_stride_h
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    powers, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    for start in range(begin, end, BLOCK_N):
        k = tl.cast(start, tl.int64) + lanes(BLOCK_N)
        key = _bytes(key_ptr, k, d, end, D, key_stride_k, key_stride_d)
        factor = tl.load(key_scale_ptr + k * key_scale_stride_k, mask=k < end, other=0.0) * scale
        logit = dot(query, tl.trans(rounded(key, query.dtype)), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * factor[None, :]
        logit = tl.where((k < end)[None, :], logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, shrink = tl.exp(logit - shift[:, None]), tl.exp(top - shift)
        powers, top = powers * shrink + tl.sum(weights, 1), new_top
        weights *= tl.load(value_scale_ptr + k * value_scale_stride_k, mask=k < end, other=0.0)[None, :]
        value = _bytes(value_ptr, k, v, end, V, value_stride_k, value_stride_v)
        acc = dot(weights, value, acc * shrink[:, None], PRECISION)
    at = ((split * B + b) * NH + head) * Q + i
    store(part_ptr + at[:, None] * V + v[None, :], acc / tl.where(powers == 0, 1.0, powers)[:, None], exists[:, None] & (v < V)[None, :])
    store(stats_ptr + at * 2, top, mask=exists)
    store(stats_ptr + (at * 2 + 1), powers, mask=exists)


@triton.jit
def _quantized_attention_bwd_kernel(
    part_ptr, stats_ptr, total_ptr, query_ptr, key_ptr, value_ptr, key_scale_ptr, value_scale_ptr, lengths_ptr, dout_ptr, dlse_ptr,
    B, NH, NHk, Q, K, D, V, splits, chunk, scale,
    query_stride_b, query_stride_h, query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_k, key_stride_d,
    value_stride_b, value_stride_h, value_stride_k, value_stride_v, key_scale_stride_b, key_scale_stride_h, key_scale_stride_k,
    value_scale_stride_b, value_scale_stride_h, value_scale_stride_k,
    dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v, dlse_stride_b, dlse_stride_h, dlse_stride_q,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, shared, split, head, i, exists, begin, end, single = _place(NH, NHk, Q, K, lengths_ptr, splits, chunk, BLOCK_M)
    d, v = lanes(BLOCK_D), lanes(BLOCK_V)
    tile_d, tile_v = exists[:, None] & (d < D)[None, :], exists[:, None] & (v < V)[None, :]
    query_ptr += b * query_stride_b + (head * query_stride_h + i * query_stride_q)[:, None]
    query = tl.load(query_ptr + d[None, :] * query_stride_d, mask=tile_d, other=0.0)
    dout_ptr += b * dout_stride_b + (head * dout_stride_h + i * dout_stride_q)[:, None]
    dout = tl.load(dout_ptr + v[None, :] * dout_stride_v, mask=tile_v, other=0.0)
    at = (b * NH + head) * Q + i
    delta = tl.sum(tl.load(total_ptr + at[:, None] * V + v[None, :], mask=tile_v, other=0.0) * dout.to(tl.float32), 1)
    # Of a single key the weight is 1 whatever the query: values and `out` are left out, to add exactly 0 and no rounding error.
    delta = tl.where(single, 0.0, delta)
    heard = tl.where(single, begin, end)
    if dlse_ptr is not None:
        dlse_ptr += b * dlse_stride_b + head * dlse_stride_h + i * dlse_stride_q
        delta -= tl.load(dlse_ptr, mask=exists, other=0.0)
    top = tl.load(stats_ptr + at * 2, mask=exists, other=0.0)
    unit = 1 / tl.load(stats_ptr + (at * 2 + 1), mask=exists, other=1.0)
    key_ptr += b * key_stride_b + shared * key_stride_h
    value_ptr += b * value_stride_b + shared * value_stride_h
    key_scale_ptr += b * key_scale_stride_b + shared * key_scale_stride_h
    value_scale_ptr += b * value_scale_stride_b + shared * value_scale_stride_h
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        k = tl.cast(start, tl.int64) + lanes(BLOCK_N)
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        key = _bytes(key_ptr, k, d, end, D, key_stride_k, key_stride_d)
        value = _bytes(value_ptr, k, v, end, V, value_stride_k, value_stride_v)
        factor = tl.load(key_scale_ptr + k * key_scale_stride_k, mask=k < end, other=0.0) * scale
        value_factor = tl.load(value_scale_ptr + k * value_scale_stride_k, mask=k < heard, other=0.0)
        logit = dot(query, tl.trans(rounded(key, query.dtype)), zero, PRECISION) * factor[None, :]
        weights = tl.exp(tl.where((k < end)[None, :], logit, float("-inf")) - top[:, None]) * unit[:, None]
        dweights = dot(dout, tl.trans(rounded(value, dout.dtype)), zero, PRECISION) * value_factor[None, :]
        acc = dot(weights * (dweights - delta[:, None]) * factor[None, :], key, acc, PRECISION)
    store(part_ptr + ((split * B * NH * Q + at)[:, None] * D + d[None, :]), acc, mask=tile_d)


def supports(query, key, value, key_scale, value_scale, lengths_k, scale):
    width = max(query.shape[3], value.shape[3])
    if width > _launch.MAX_WIDTH:
        return f"a head of {width} elements is over the limit of {_launch.MAX_WIDTH}"
    return refuse(query)


def _launch_of(query, key, value):
    rows = query.shape[1] // max(key.shape[1], 1) * query.shape[2]
    return _launch.quantized_attention(rows, key.shape[2], query.shape[3], value.shape[3], query.dtype == torch.float32, INTERPRETED)


def _arguments(launch, query, key, value, key_scale, value_scale, scale):
    sizes = *query.shape[:2], key.shape[1], query.shape[2], *key.shape[2:], value.shape[3]
    layouts = *query.stride(), *key.stride(), *value.stride(), *key_scale.stride(), *value_scale.stride()
    return *sizes, launch.splits, launch.chunk, float(scale), *layouts


def _tiles(launch, dtype):
    return dict(
        BLOCK_M=launch.block_m, BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, BLOCK_V=launch.block_v, PRECISION=precision(dtype),
        num_warps=launch.num_warps, num_stages=launch.num_stages,
    )  # fmt: skip


def _grid(launch, query, key):
    rows = query.shape[1] // max(key.shape[1], 1) * query.shape[2]
    return (query.shape[0] * key.shape[1] * launch.splits * _launch.ceil_div(rows, launch.block_m),)


def forward(out, lse, stats, total, query, key, value, key_scale, value_scale, lengths_k, scale):
    launch = _launch_of(query, key, value)
    part, stats_part = total.new_empty(launch.splits, *total.shape), stats.new_empty(launch.splits, *stats.shape)
    run(
        _quantized_attention_fwd_kernel, _grid(launch, query, key), part, stats_part, query, key, value, key_scale, value_scale,
        _contiguous(lengths_k), *_arguments(launch, query, key, value, key_scale, value_scale, scale), **_tiles(launch, query.dtype),
    )  # fmt: skip
    run(
        _attention_combine_kernel, (lse.numel(),), total, lse, stats, part, stats_part, None, lse.numel(), 1, 1, value.shape[3],
        launch.splits, BLOCK_V=launch.block_v,
    )  # fmt: skip
    out.copy_(total)


def backward(dquery, dout, dlse, query, key, value, key_scale, value_scale, lengths_k, stats, total, scale):
    launch = _launch_of(query, key, value)
    dout = query.new_zeros(()).expand(total.shape) if dout is None else dout
    part = stats.new_empty(launch.splits, *dquery.shape)
    run(
        _quantized_attention_bwd_kernel, _grid(launch, query, key), part, stats, total, query, key, value, key_scale, value_scale,
        _contiguous(lengths_k), dout, dlse, *_arguments(launch, query, key, value, key_scale, value_scale, scale), *dout.stride(),
        *strides(dlse, 3), **_tiles(launch, query.dtype),
    )  # fmt: skip
    sum_splits(dquery, part)


def _contiguous(lengths_k):
    return None if lengths_k is None else lengths_k.contiguous()


def _aot(kernel, role, dtype, rows=4, width=64):
    launch = _launch.quantized_attention(rows, 65536, width, width, dtype == torch.float32)
    constants = {name: value for name, value in _tiles(launch, dtype).items() if name.isupper()}
    constants |= dict.fromkeys(("query_stride_d", "key_stride_d", "value_stride_v", "key_scale_stride_k", "value_scale_stride_k"), 1)
    constants |= {name: 1 for name in ("dout_stride_v",) if name in kernel.arg_names}
    wide = ("part_ptr", "stats_ptr", "total_ptr", "key_scale_ptr", "value_scale_ptr", "dlse_ptr")
    types = dict.fromkeys(wide, "*fp32") | dict(key_ptr="*i8", value_ptr="*i8", lengths_ptr="*i64", scale="fp32")
    name = f"quantized_attention_{role}" + (f"_M{rows}_D{width}" if rows > 16 else "")
    return aot(name, kernel, dtype, constants, types, launch.num_warps, launch.num_stages)


AOT = [
    _aot(kernel, role, dtype, *sizes)
    for dtype in AOT_DTYPES
    for kernel, role in ((_quantized_attention_fwd_kernel, "fwd"), (_quantized_attention_bwd_kernel, "bwd"))
    for sizes in ((), (32, 128))
]
