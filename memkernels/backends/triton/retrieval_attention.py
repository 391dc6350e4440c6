"""retrieval_attention on Triton: one softmax over the local context and each query's own memories.

The local context goes through attention's kernels; its maxima and sums are then joined with the memories, backward goes back through them
with the joint ones, and with a delta that the ds of all a query sees have set right (_attention_bwd.py). A program here owns one query and
gathers its rows by pointers, BLOCK_K of them at a time: 2 s k (D + V) bytes a query and pass, twice in backward, the second time from the
cache. The memory's gradients go by an inverse index: retrievals sorted by row (stable, so in the order of the queries), and a program owns
a row of the memory, which it writes once. Nothing waits for the device and nothing is summed by atomics; sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton import attention as _local
from memkernels.backends.triton._attention_bwd import Call, first_delta, gradients
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, refuse, run, store, strides


@triton.jit
def _slots(index_ptr, bias_ptr, first, K, N, index_stride_k, bias_stride_k, BLOCK_K: tl.constexpr):
    """Row numbers, which of them are there, and their bias, of slots `first` and on."""
    slot = first + lanes(BLOCK_K)
    row = tl.load(index_ptr + slot * index_stride_k, mask=slot < K, other=-1)
    there = (row >= 0) & (row < N)
    bias = tl.zeros([BLOCK_K], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + slot * bias_stride_k, mask=there, other=0.0).to(tl.float32)
        there = there & (bias != float("-inf"))
    return slot, row, there, bias


@triton.jit
def _rows(memory_ptr, row, there, n, limit, stride_n, stride_w):
    """The gathered rows, 0 for what is not there."""
    return tl.load(memory_ptr + row[:, None] * stride_n + n[None, :] * stride_w, mask=there[:, None] & (n < limit)[None, :], other=0.0).to(
        tl.float32
    )


@triton.jit
def _retrieval_fwd_kernel(
    out_ptr, lse_ptr, stats_ptr, local_ptr, query_ptr, memory_key_ptr, memory_value_ptr, index_ptr, bias_ptr,
    NH, Q, K, N, D, V, group, scale,
    query_stride_b, query_stride_h, query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_n, key_stride_d,
    value_stride_b, value_stride_h, value_stride_n, value_stride_v, index_stride_b, index_stride_h, index_stride_q, index_stride_k,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """`stats` and `local` hold the local part; `local` may be `out`."""
    at = tl.program_id(0).to(tl.int64)
    b, head, i = at // Q // NH, at // Q % NH, at % Q
    d, v = lanes(BLOCK_D), lanes(BLOCK_V)
    place = b * query_stride_b + head * query_stride_h + i * query_stride_q
    query = tl.load(query_ptr + place + d * query_stride_d, mask=d < D, other=0.0).to(tl.float32)
    memory_key_ptr += b * key_stride_b + (head // group) * key_stride_h
    memory_value_ptr += b * value_stride_b + (head // group) * value_stride_h
    index_ptr += b * index_stride_b + head * index_stride_h + i * index_stride_q
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + head * bias_stride_h + i * bias_stride_q
    top, total = tl.load(stats_ptr + at * 2), tl.load(stats_ptr + (at * 2 + 1))
    acc = tl.load(local_ptr + at * V + v, mask=v < V, other=0.0).to(tl.float32) * total
    for first in range(0, K, BLOCK_K):
        _, row, there, bias = _slots(index_ptr, bias_ptr, first, K, N, index_stride_k, bias_stride_k, BLOCK_K)
        keys = _rows(memory_key_ptr, row, there, d, D, key_stride_n, key_stride_d)
        score = tl.where(there, tl.sum(keys * query[None, :], 1) * scale + bias, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, weights = tl.exp(top - shift), tl.exp(score - shift)
        values = _rows(memory_value_ptr, row, there & (weights != 0), v, V, value_stride_n, value_stride_v)
        acc = acc * shrink + tl.sum(values * weights[:, None], 0)
        total, top = total * shrink + tl.sum(weights, 0), new_top
    tl.debug_barrier()  # every warp has its own copy of the local numbers, which are now replaced
    store(out_ptr + at * V + v, acc / tl.where(total == 0, 1.0, total), mask=v < V)
    tl.store(lse_ptr + at, top + tl.log(total))
    tl.store(stats_ptr + at * 2, top)
    tl.store(stats_ptr + (at * 2 + 1), total)


@triton.jit
def _gradient(
    query, dout, memory_key_ptr, memory_value_ptr, index_ptr, bias_ptr, first, K, N, D, V, d, v, scale, top, total, delta,
    key_stride_n, key_stride_d, value_stride_n, value_stride_v, index_stride_k, bias_stride_k, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """(slots, which have a weight, their keys, weights, ds) of slots `first` and on."""
    slot, row, there, bias = _slots(index_ptr, bias_ptr, first, K, N, index_stride_k, bias_stride_k, BLOCK_K)
    keys = _rows(memory_key_ptr, row, there, d, D, key_stride_n, key_stride_d)
    score = tl.sum(keys * query[None, :], 1) * scale + bias
    weights = tl.where(there, tl.exp(score - top) / total, 0.0)
    there = there & (weights != 0)
    values = _rows(memory_value_ptr, row, there, v, V, value_stride_n, value_stride_v)
    return slot, there, keys, weights, tl.where(there, weights * (tl.sum(values * dout[None, :], 1) - delta), 0.0)


@triton.jit
def _retrieval_bwd_kernel(
    dquery_ptr, dbias_ptr, weights_ptr, dscores_ptr, stats_ptr, delta_ptr, moved_ptr, dlse_ptr, dout_ptr, query_ptr,
    memory_key_ptr, memory_value_ptr, index_ptr, bias_ptr, NH, Q, K, N, D, V, group, scale,
    query_stride_b, query_stride_h, query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_n, key_stride_d,
    value_stride_b, value_stride_h, value_stride_n, value_stride_v, index_stride_b, index_stride_h, index_stride_q, index_stride_k,
    bias_stride_b, bias_stride_h, bias_stride_q, bias_stride_k, dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dquery = scale ds key, dbias = ds; weights and ds for the memory's gradients; and delta set right: see _attention_bwd.py."""
    at = tl.program_id(0).to(tl.int64)
    b, head, i = at // Q // NH, at // Q % NH, at % Q
    d, v = lanes(BLOCK_D), lanes(BLOCK_V)
    place = b * query_stride_b + head * query_stride_h + i * query_stride_q
    query = tl.load(query_ptr + place + d * query_stride_d, mask=d < D, other=0.0).to(tl.float32)
    place = b * dout_stride_b + head * dout_stride_h + i * dout_stride_q
    dout = tl.load(dout_ptr + place + v * dout_stride_v, mask=v < V, other=0.0).to(tl.float32)
    memory_key_ptr += b * key_stride_b + (head // group) * key_stride_h
    memory_value_ptr += b * value_stride_b + (head // group) * value_stride_h
    index_ptr += b * index_stride_b + head * index_stride_h + i * index_stride_q
    if bias_ptr is not None:
        bias_ptr += b * bias_stride_b + head * bias_stride_h + i * bias_stride_q
    top, total, delta = tl.load(stats_ptr + at * 2), tl.load(stats_ptr + (at * 2 + 1)), tl.load(delta_ptr + at)
    top, total = tl.where(top == float("-inf"), 0.0, top), tl.where(total == 0, 1.0, total)
    if moved_ptr is not None:
        moved, summed = tl.load(moved_ptr + at * 2), tl.load(moved_ptr + (at * 2 + 1))
        for first in range(0, K, BLOCK_K):
            _, _, _, weights, dscore = _gradient(
                query, dout, memory_key_ptr, memory_value_ptr, index_ptr, bias_ptr, first, K, N, D, V, d, v, scale, top, total, delta,
                key_stride_n, key_stride_d, value_stride_n, value_stride_v, index_stride_k, bias_stride_k, BLOCK_K,
            )  # fmt: skip
            moved += tl.sum(dscore, 0)
            summed += tl.sum(weights, 0)
        delta += moved / tl.where(summed == 0, 1.0, summed)
        if dlse_ptr is not None:
            delta -= tl.load(dlse_ptr + at)
        tl.debug_barrier()  # every warp has its own copy of the old one
        tl.store(delta_ptr + at, delta)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, K, BLOCK_K):
        slot, there, keys, weights, dscore = _gradient(
            query, dout, memory_key_ptr, memory_value_ptr, index_ptr, bias_ptr, first, K, N, D, V, d, v, scale, top, total, delta,
            key_stride_n, key_stride_d, value_stride_n, value_stride_v, index_stride_k, bias_stride_k, BLOCK_K,
        )  # fmt: skip
        acc += tl.sum(tl.where(there[:, None], keys, 0.0) * dscore[:, None], 0)
        if dbias_ptr is not None:
            store(dbias_ptr + at * K + slot, dscore, mask=slot < K)
        if weights_ptr is not None:
            tl.store(weights_ptr + at * K + slot, weights, mask=slot < K)
            tl.store(dscores_ptr + at * K + slot, dscore, mask=slot < K)
    if dquery_ptr is not None:
        tl.store(dquery_ptr + at * D + d, acc * scale, mask=d < D)


@triton.jit
def _retrieval_memory_kernel(
    dkey_ptr, dvalue_ptr, start_ptr, order_ptr, weights_ptr, dscores_ptr, query_ptr, dout_ptr, NH, Q, K, D, V, scale,
    query_stride_b, query_stride_h, query_stride_q, query_stride_d, dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row of the memory sums what its retrievals start[row] .. start[row + 1] in `order` give it."""
    row = tl.program_id(0).to(tl.int64)
    d, v = lanes(BLOCK_D), lanes(BLOCK_V)
    dkey, dvalue = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    for entry in range(tl.load(start_ptr + row), tl.load(start_ptr + (row + 1))):
        retrieval = tl.load(order_ptr + entry)
        weight, dscore = tl.load(weights_ptr + retrieval), tl.load(dscores_ptr + retrieval)
        at = retrieval // K
        b, head, i = at // Q // NH, at // Q % NH, at % Q
        place = b * query_stride_b + head * query_stride_h + i * query_stride_q
        query = tl.load(query_ptr + place + d * query_stride_d, mask=d < D, other=0.0).to(tl.float32)
        place = b * dout_stride_b + head * dout_stride_h + i * dout_stride_q
        dout = tl.load(dout_ptr + place + v * dout_stride_v, mask=v < V, other=0.0).to(tl.float32)
        dkey += tl.where(weight == 0, 0.0, dscore * query)
        dvalue += tl.where(weight == 0, 0.0, weight * dout)
    if dkey_ptr is not None:
        store(dkey_ptr + row * D + d, dkey * scale, mask=d < D)
    if dvalue_ptr is not None:
        store(dvalue_ptr + row * V + v, dvalue, mask=v < V)


def supports(query, key, value, memory_key, memory_value, index, memory_bias, scale, left, right):
    width = max(query.shape[3], value.shape[3])
    if width > _launch.MAX_WIDTH:
        return f"a head of {width} elements is over the limit of {_launch.MAX_WIDTH}"
    return refuse(query)


def _tiles(launch):
    return dict(BLOCK_K=launch.block_k, BLOCK_D=launch.block_d, BLOCK_V=launch.block_v, num_warps=launch.num_warps)


def _call(query, value, memory_key, memory_value, index, memory_bias, scale):
    """Grid, sizes and strides that forward and backward share."""
    (batch, heads, queries, width), group = query.shape, max(query.shape[1] // max(memory_key.shape[1], 1), 1)
    sizes = heads, queries, index.shape[3], memory_key.shape[2], width, value.shape[3], group, float(scale)
    layouts = *query.stride(), *memory_key.stride(), *memory_value.stride(), *index.stride(), *strides(memory_bias, 4)
    return (batch * heads * queries,), sizes, layouts


def forward(out, lse, stats, query, key, value, memory_key, memory_value, index, memory_bias, scale, left, right):
    local = out if out.dtype == torch.float32 else stats.new_empty(out.shape)  # rounded once, after the join
    _local.forward(local, lse, stats, query, key, value, None, None, None, None, scale, 0.0, 0.0, left, right, "top-left")
    grid, sizes, layouts = _call(query, value, memory_key, memory_value, index, memory_bias, scale)
    launch = _launch.retrieval(index.shape[3], query.shape[3], value.shape[3])
    tensors = query, memory_key, memory_value, index, memory_bias
    run(_retrieval_fwd_kernel, grid, out, lse, stats, local, *tensors, *sizes, *layouts, **_tiles(launch))


def backward(
    dquery, dkey, dvalue, dmemory_key, dmemory_value, dmemory_bias, dout, dlse,
    query, key, value, memory_key, memory_value, index, memory_bias, out, stats, scale, left, right,
):  # fmt: skip
    zeros = dout is None
    dout = out.new_zeros(()).expand(out.shape) if zeros else dout
    delta = first_delta(dout, dlse if zeros else None, out, stats)
    local = Call(dout, query, key, value, None, None, None, stats, delta, scale, 0.0, 0.0, left, right, "top-left")
    moved = None
    if not zeros:
        moved = stats.new_zeros(stats.shape)
        local.dquery(None, None, moved, key.shape[2])
    wanted = dmemory_key is not None or dmemory_value is not None
    weights, dscores = (stats.new_empty(index.shape) if wanted else None for _ in range(2))
    retrieved = None if dquery is None else stats.new_empty(dquery.shape)
    grid, sizes, layouts = _call(query, value, memory_key, memory_value, index, memory_bias, scale)
    launch = _launch.retrieval(index.shape[3], query.shape[3], value.shape[3])
    run(
        _retrieval_bwd_kernel, grid, retrieved, dmemory_bias, weights, dscores, stats, delta, moved,
        None if dlse is None else dlse.contiguous(), dout,
        query, memory_key, memory_value, index, memory_bias, *sizes, *layouts, *dout.stride(), **_tiles(launch),
    )  # fmt: skip
    keys = None if retrieved is None else torch.empty_like(retrieved)
    gradients(local, keys, dkey, dvalue, None)
    if keys is not None and retrieved is not None:
        torch.add(keys, retrieved, out=dquery)
    if not wanted:
        return
    batch, shared, rows = memory_key.shape[:3]
    heads, queries, slots = index.shape[1:]
    # Sorted by memory row over all heads; what is absent comes last, past the last row.
    head = torch.arange(batch * shared, device=index.device).view(batch, shared, 1).expand(-1, -1, heads // max(shared, 1))
    flat = head.reshape(batch, heads, 1, 1) * rows + index
    flat = torch.where((index >= 0) & (index < rows), flat, batch * shared * rows).flatten()
    found, order = torch.sort(flat, stable=True)
    start = torch.searchsorted(found, torch.arange(batch * shared * rows + 1, device=index.device))
    run(
        _retrieval_memory_kernel, (batch * shared * rows,), dmemory_key, dmemory_value, start, order, weights, dscores, query, dout,
        heads, queries, slots, query.shape[3], value.shape[3], float(scale), *query.stride(), *dout.stride(),
        BLOCK_D=launch.block_d, BLOCK_V=launch.block_v, num_warps=1,
    )  # fmt: skip


def _aot(name, kernel, dtype, **constants):
    launch = _launch.retrieval(32, 64, 64)
    blocks = {k: v for k, v in _tiles(launch).items() if k in kernel.arg_names}
    ones = {a: 1 for a in kernel.arg_names if a.endswith(("stride_d", "stride_v", "stride_k")) or a == "group"}
    types = {f"{a}_ptr": "*fp32" for a in ("lse", "stats", "local", "weights", "dscores", "delta", "moved", "dlse")}
    types |= {"dquery_ptr": "*fp32"} if kernel is _retrieval_bwd_kernel else {}
    types |= dict(index_ptr="*i64", start_ptr="*i64", order_ptr="*i64", scale="fp32")
    warps = launch.num_warps if "BLOCK_K" in blocks else 1
    return aot(name, kernel, dtype, blocks | ones | constants, types, warps)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        _aot("retrieval_fwd", _retrieval_fwd_kernel, dtype, bias_ptr=None, bias_stride_b=0, bias_stride_h=0, bias_stride_q=0),
        _aot("retrieval_fwd_bias", _retrieval_fwd_kernel, dtype),
        _aot("retrieval_bwd_bias", _retrieval_bwd_kernel, dtype),
        _aot("retrieval_memory", _retrieval_memory_kernel, dtype),
    )
]
