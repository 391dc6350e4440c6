"""topk_read on Triton: scores by tiles, a running top-k of each query in registers, then softmax and gathers.

A score and its row are one int64 (score in an order-preserving form above, complement of the row below), so that sorting such pairs ranks
them: larger scores first, ties to the lowest row, and the result is the same however the rows were split. A search program owns BLOCK_Q
queries and a run of rows; a tile in which nothing beats what a query has costs its product and one comparison. 2 s (D + V) bytes a chosen
row, s D a row and BLOCK_Q queries. Gradients of the memory go by an inverse index, as in retrieval_attention: no atomics. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, INTERPRETED, aot, dot, lanes, precision, refuse, run, store, strides

NOTHING = tl.constexpr(-(2**63))


@triton.jit
def pairs_of(score, row):
    """(score, row) as one number; NaN before all numbers, -0 as +0."""
    bits = tl.where(score == score, (score + 0.0).to(tl.int32, bitcast=True), 0x7FC00000)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - row)


@triton.jit
def scores_of(pairs):
    ordered = (pairs >> 32).to(tl.int32)
    return (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def rows_of(pairs):
    return 0x7FFFFFFF - (pairs & 0x7FFFFFFF)


@triton.jit
def merged(best, pairs):
    """The best of two sets that are sorted along the last dimension, sorted."""
    return tl.sort(tl.maximum(best, tl.flip(pairs, len(pairs.shape) - 1)), descending=True)


@triton.jit
def _topk_search_kernel(
    found_ptr, query_ptr, key_ptr, mask_ptr, Q, N, D, splits, rows_per_split,
    query_stride_b, query_stride_q, query_stride_d, key_stride_b, key_stride_n, key_stride_d, mask_stride_b, mask_stride_n,
    SIMILARITY: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, SLOTS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """found[b, split, q, SLOTS]: the best rows of a split, sorted; NOTHING where there are fewer."""
    groups, split = tl.cdiv(Q, BLOCK_Q), tl.program_id(1).to(tl.int64)
    b, group = tl.program_id(0).to(tl.int64) // groups, tl.program_id(0).to(tl.int64) % groups
    q, d = group * BLOCK_Q + lanes(BLOCK_Q), lanes(BLOCK_D)
    query_ptr += b * query_stride_b
    key_ptr += b * key_stride_b
    at = query_ptr + q[:, None] * query_stride_q + d[None, :] * query_stride_d
    query = tl.load(at, mask=(q < Q)[:, None] & (d < D)[None, :], other=0.0)
    norm = tl.zeros([BLOCK_Q], tl.float32)
    if SIMILARITY == "cosine":
        wide_query = query.to(tl.float32)
        norm = tl.sqrt(tl.sum(wide_query * wide_query, 1) + 1e-6)
    best = tl.full([BLOCK_Q, SLOTS], NOTHING, tl.int64)
    worst = tl.full([BLOCK_Q], NOTHING, tl.int64)
    last = tl.minimum((split + 1) * rows_per_split, N)
    for first in range(split * rows_per_split, last, BLOCK_N):
        n = first + lanes(BLOCK_N)
        there = n < last
        if mask_ptr is not None:
            there = there & (tl.load(mask_ptr + b * mask_stride_b + n * mask_stride_n, mask=there, other=0) != 0)
        score = tl.zeros([BLOCK_Q, BLOCK_N], tl.float32)
        if SIMILARITY == "l2":  # differences, not a product: nothing cancels
            for j in range(0, D):
                a = tl.load(query_ptr + q * query_stride_q + tl.cast(j, tl.int64) * query_stride_d, mask=q < Q, other=0.0)
                x = tl.load(key_ptr + n * key_stride_n + tl.cast(j, tl.int64) * key_stride_d, mask=there, other=0.0)
                away = a.to(tl.float32)[:, None] - x.to(tl.float32)[None, :]
                score -= away * away
        else:
            place = key_ptr + n[:, None] * key_stride_n + d[None, :] * key_stride_d
            key = tl.load(place, mask=there[:, None] & (d < D)[None, :], other=0.0)
            score = dot(query, tl.trans(key), score, PRECISION)
            if SIMILARITY == "cosine":
                wide_key = key.to(tl.float32)
                score = score / (norm[:, None] * tl.sqrt(tl.sum(wide_key * wide_key, 1) + 1e-6)[None, :])
        rows = tl.zeros([BLOCK_Q, BLOCK_N], tl.int64) + n[None, :]
        pairs = tl.where(there[None, :] & (score != float("-inf")), pairs_of(score, rows), NOTHING)
        better = tl.max((tl.max(pairs, 1) > worst).to(tl.int32), 0)
        if better > 0:
            best = merged(best, tl.topk(pairs, SLOTS))
            worst = tl.min(best, 1)
    slot = lanes(SLOTS)
    at = found_ptr + ((b * splits + split) * Q + q[:, None]) * SLOTS + slot[None, :]
    tl.store(at, best, mask=(q < Q)[:, None])


@triton.jit
def _topk_finish_kernel(
    read_ptr, weights_ptr, index_ptr, found_ptr, value_ptr, Q, K, V, splits, scale, value_stride_b, value_stride_n, value_stride_v,
    SLOTS: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A program owns a query: its best rows of all splits, softmax, the sum of their values."""
    at = tl.program_id(0).to(tl.int64)
    b, q = at // Q, at % Q
    slot, v = lanes(SLOTS), lanes(BLOCK_V)
    found_ptr += (b * splits * Q + q) * SLOTS
    best = tl.load(found_ptr + slot)
    for split in range(1, splits):
        best = merged(best, tl.load(found_ptr + tl.cast(split, tl.int64) * Q * SLOTS + slot))
    there = (best != NOTHING) & (slot < K)
    score = tl.where(there, scores_of(best) * scale, float("-inf"))
    top = tl.max(score, 0)
    weights = tl.where(there, tl.exp(score - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0, 1.0, total)
    row = tl.where(there, rows_of(best), 0)
    store(weights_ptr + at * K + slot, weights, mask=slot < K)
    tl.store(index_ptr + at * K + slot, tl.where(there, row, -1), mask=slot < K)
    heavy = there & (weights != 0)
    values = tl.load(
        value_ptr + b * value_stride_b + row[:, None] * value_stride_n + v[None, :] * value_stride_v,
        mask=heavy[:, None] & (v < V)[None, :], other=0.0,
    ).to(tl.float32)  # fmt: skip
    store(read_ptr + at * V + v, tl.sum(values * weights[:, None], 0), mask=v < V)


@triton.jit
def _topk_gradient_kernel(
    dquery_ptr, given_ptr, dread_ptr, dweights_ptr, query_ptr, key_ptr, value_ptr, index_ptr, Q, K, N, D, V, scale,
    query_stride_b, query_stride_q, query_stride_d, key_stride_b, key_stride_n, key_stride_d,
    value_stride_b, value_stride_n, value_stride_v, dread_stride_b, dread_stride_q, dread_stride_v,
    dweights_stride_b, dweights_stride_q, dweights_stride_k,
    SIMILARITY: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """dquery of one query; of each choice its weight and the factors that the query and the row have in the row's gradient."""
    at = tl.program_id(0).to(tl.int64)
    b, q = at // Q, at % Q
    slot, d, v = lanes(SLOTS), lanes(BLOCK_D), lanes(BLOCK_V)
    row = tl.load(index_ptr + at * K + slot, mask=slot < K, other=-1)
    there = (row >= 0) & (row < N)
    row = tl.where(there, row, 0)
    place = query_ptr + b * query_stride_b + q * query_stride_q + d * query_stride_d
    query = tl.load(place, mask=d < D, other=0.0).to(tl.float32)
    place = key_ptr + b * key_stride_b + row[:, None] * key_stride_n + d[None, :] * key_stride_d
    keys = tl.load(place, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    square = tl.sum(query * query, 0) + 1e-6
    squares = tl.sum(keys * keys, 1) + 1e-6
    norms = tl.sqrt(squares) * tl.sqrt(square)
    if SIMILARITY == "l2":
        away = keys - tl.where((d < D)[None, :], query[None, :], 0.0)
        score = -tl.sum(away * away, 1)
    else:
        score = tl.sum(keys * query[None, :], 1)
        if SIMILARITY == "cosine":
            score = score / norms
    logit = tl.where(there, score * scale, float("-inf"))
    top = tl.max(logit, 0)
    weights = tl.where(there, tl.exp(logit - tl.where(top == float("-inf"), 0.0, top)), 0.0)
    total = tl.sum(weights, 0)
    weights = weights / tl.where(total == 0, 1.0, total)
    heavy = there & (weights != 0)
    gradient = tl.zeros([SLOTS], tl.float32)
    if dread_ptr is not None:
        place = dread_ptr + b * dread_stride_b + q * dread_stride_q + v * dread_stride_v
        dread = tl.load(place, mask=v < V, other=0.0).to(tl.float32)
        place = value_ptr + b * value_stride_b + row[:, None] * value_stride_n + v[None, :] * value_stride_v
        values = tl.load(place, mask=heavy[:, None] & (v < V)[None, :], other=0.0).to(tl.float32)
        gradient += tl.sum(values * dread[None, :], 1)
    if dweights_ptr is not None:
        place = dweights_ptr + b * dweights_stride_b + q * dweights_stride_q + slot * dweights_stride_k
        gradient += tl.load(place, mask=heavy & (slot < K), other=0.0).to(tl.float32)
    mean = tl.sum(tl.where(heavy, weights * gradient, 0.0), 0)
    gradient = tl.where(heavy, scale * (weights * (gradient - mean)), 0.0)
    of_query, of_row = gradient, tl.zeros([SLOTS], tl.float32)  # what they are multiplied by in the gradient of the row
    own = tl.sum(of_row, 0)
    if SIMILARITY == "l2":
        of_query, of_row = 2 * gradient, -2 * gradient
        own = tl.sum(of_row, 0)
    if SIMILARITY == "cosine":
        of_query, of_row = gradient / norms, tl.where(heavy, -gradient * score / squares, 0.0)
        own = -tl.sum(tl.where(heavy, gradient * score, 0.0), 0) / square
    if given_ptr is not None:
        place = (at * K + slot) * 3
        tl.store(given_ptr + place, weights, mask=slot < K)
        tl.store(given_ptr + (place + 1), of_query, mask=slot < K)
        tl.store(given_ptr + (place + 2), of_row, mask=slot < K)
    if dquery_ptr is not None:
        dquery = tl.sum(tl.where(heavy[:, None], keys, 0.0) * of_query[:, None], 0)
        if SIMILARITY != "dot":
            dquery += own * query
        store(dquery_ptr + at * D + d, dquery, mask=d < D)


@triton.jit
def _topk_memory_kernel(
    dkey_ptr, dvalue_ptr, start_ptr, order_ptr, given_ptr, query_ptr, dread_ptr, key_ptr, Q, K, N, D, V,
    query_stride_b, query_stride_q, query_stride_d, dread_stride_b, dread_stride_q, dread_stride_v,
    key_stride_b, key_stride_n, key_stride_d, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """A row of the memory sums what its choices start[row] .. start[row + 1] in `order` give it."""
    row = tl.program_id(0).to(tl.int64)
    d, v = lanes(BLOCK_D), lanes(BLOCK_V)
    dkey, dvalue = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_V], tl.float32)
    own = 0.0
    for entry in range(tl.load(start_ptr + row), tl.load(start_ptr + (row + 1))):
        choice = tl.load(order_ptr + entry)
        weight, of_query = tl.load(given_ptr + choice * 3), tl.load(given_ptr + (choice * 3 + 1))
        own += tl.load(given_ptr + (choice * 3 + 2))
        b, q = choice // K // Q, choice // K % Q
        query = tl.load(query_ptr + b * query_stride_b + q * query_stride_q + d * query_stride_d, mask=d < D, other=0.0)
        dkey += tl.where(weight == 0, 0.0, of_query * query.to(tl.float32))
        if dread_ptr is not None:
            dread = tl.load(dread_ptr + b * dread_stride_b + q * dread_stride_q + v * dread_stride_v, mask=v < V, other=0.0)
            dvalue += tl.where(weight == 0, 0.0, weight * dread.to(tl.float32))
    if dkey_ptr is not None:
        place = key_ptr + row // N * key_stride_b + row % N * key_stride_n + d * key_stride_d
        key = tl.load(place, mask=d < D, other=0.0).to(tl.float32)
        store(dkey_ptr + row * D + d, dkey + tl.where(own == 0, 0.0, own * key), mask=d < D)
    if dvalue_ptr is not None:
        store(dvalue_ptr + row * V + v, dvalue, mask=v < V)


def supports(query, key, value, mask, k, similarity, scale, few):
    width = max(query.shape[2], value.shape[2])
    if k > _launch.MAX_SLOTS:
        return f"k = {k} is over the limit of {_launch.MAX_SLOTS}, what a program sorts in registers"
    if width > _launch.MAX_TOPK_WIDTH:
        return f"a row of {width} elements is over the limit of {_launch.MAX_TOPK_WIDTH}"
    if key.shape[1] >= 2**31:
        return f"{key.shape[1]} rows are over the limit of 2^31 - 1"
    return refuse(query)


def forward(read, weights, index, query, key, value, mask, k, similarity, scale, few):
    (batch, queries, width), rows = query.shape, key.shape[1]
    launch = _launch.topk_read(batch * queries, rows, k, width, value.shape[2], INTERPRETED)
    found = index.new_empty((batch, launch.splits, queries, launch.slots))
    layouts = *query.stride(), *key.stride(), *strides(mask, 2)
    grid = batch * _launch.ceil_div(queries, launch.block_q), launch.splits
    run(
        _topk_search_kernel, grid, found, query, key, mask, queries, rows, width, launch.splits, launch.rows_per_split, *layouts,
        SIMILARITY=similarity, BLOCK_Q=launch.block_q, BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, SLOTS=launch.slots,
        PRECISION=precision(query.dtype), num_warps=launch.num_warps,
    )  # fmt: skip
    run(
        _topk_finish_kernel, (batch * queries,), read, weights, index, found, value, queries, k, value.shape[2], launch.splits,
        float(scale), *value.stride(), SLOTS=launch.slots, BLOCK_V=launch.block_v, num_warps=1,
    )  # fmt: skip


def backward(dquery, dkey, dvalue, dread, dweights, query, key, value, mask, index, k, similarity, scale, few):
    (batch, queries, width), rows, value_width = query.shape, key.shape[1], value.shape[2]
    launch = _launch.topk_read(batch * queries, rows, k, width, value_width, INTERPRETED)
    wanted = dkey is not None or dvalue is not None
    given = query.new_empty((*index.shape, 3), dtype=torch.float32) if wanted else None
    layouts = *query.stride(), *key.stride(), *value.stride(), *strides(dread, 3), *strides(dweights, 3)
    blocks = dict(BLOCK_D=launch.block_d, BLOCK_V=launch.block_v)
    run(
        _topk_gradient_kernel, (batch * queries,), dquery, given, dread, dweights, query, key, value, index, queries, k, rows, width,
        value_width, float(scale), *layouts, SIMILARITY=similarity, SLOTS=launch.slots, **blocks, num_warps=4,
    )  # fmt: skip
    if not wanted:
        return
    # Sorted by memory row over all entries, stable, so in the order of the queries; what is absent comes past the last row.
    entry = torch.arange(batch, device=index.device).view(batch, 1, 1)
    flat = torch.where(index >= 0, entry * rows + index, batch * rows).flatten()
    chosen, order = torch.sort(flat, stable=True)
    start = torch.searchsorted(chosen, torch.arange(batch * rows + 1, device=index.device))
    run(
        _topk_memory_kernel, (batch * rows,), dkey, dvalue, start, order, given, query, dread, key, queries, k, rows, width, value_width,
        *query.stride(), *strides(dread, 3), *key.stride(), **blocks, num_warps=1,
    )  # fmt: skip


def _aot(name, kernel, dtype, **constants):
    launch = _launch.topk_read(256, 65536, 32, 64, 64, False)
    every = dict(
        BLOCK_Q=launch.block_q, BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, BLOCK_V=launch.block_v, SLOTS=launch.slots,
        PRECISION=precision(dtype),
    )  # fmt: skip
    ones = {a: 1 for a in kernel.arg_names if a.endswith(("stride_d", "stride_v"))}
    types = dict(found_ptr="*i64", index_ptr="*i64", start_ptr="*i64", order_ptr="*i64", mask_ptr="*i1", given_ptr="*fp32", scale="fp32")
    warps = launch.num_warps if "search" in name else 4 if "gradient" in name else 1
    return aot(name, kernel, dtype, {k: v for k, v in every.items() if k in kernel.arg_names} | ones | constants, types, warps)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        _aot("topk_search", _topk_search_kernel, dtype, SIMILARITY="dot", mask_ptr=None, mask_stride_b=0, mask_stride_n=0),
        _aot("topk_search_cosine_mask", _topk_search_kernel, dtype, SIMILARITY="cosine"),
        _aot("topk_search_l2", _topk_search_kernel, dtype, SIMILARITY="l2"),
        _aot("topk_finish", _topk_finish_kernel, dtype),
        _aot("topk_gradient_cosine", _topk_gradient_kernel, dtype, SIMILARITY="cosine"),
        _aot("topk_memory", _topk_memory_kernel, dtype),
    )
]
