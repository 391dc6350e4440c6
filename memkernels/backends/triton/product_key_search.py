"""product_key_search on Triton: the search of topk_read for both halves of all heads, then the best sums, a program a query and head.

Of the k best of both halves only pairs (a, b), counted from 1, with a b <= k compete; all sums of a query lie in registers, the others are
put last. A choice is one int64 of sum and index, as in topk_read. The gradient of a subkey sums the queries that chose it by an inverse
index: no atomics. Sums are float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, INTERPRETED, aot, lanes, precision, refuse, run, store, strides
from memkernels.backends.triton.topk_read import NOTHING, _topk_search_kernel, merged, pairs_of, rows_of, scores_of


@triton.jit
def _half(found_ptr, half, b, splits, B, SLOTS: tl.constexpr):
    """The best subkeys of one half, sorted, of all splits."""
    slot = lanes(SLOTS)
    found_ptr += (half * splits * B + b) * SLOTS
    best = tl.load(found_ptr + slot)
    for split in range(1, splits):
        best = merged(best, tl.load(found_ptr + tl.cast(split, tl.int64) * B * SLOTS + slot))
    return best


@triton.jit
def _product_key_kernel(scores_ptr, index_ptr, found_ptr, B, NH, S, K, splits, SLOTS: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    b, head = at // NH, at % NH
    first, second = _half(found_ptr, head * 2, b, splits, B, SLOTS), _half(found_ptr, head * 2 + 1, b, splits, B, SLOTS)
    place = tl.arange(0, SLOTS) + 1
    there = (first != NOTHING)[:, None] & (second != NOTHING)[None, :] & (place[:, None] * place[None, :] <= K)
    sums = scores_of(first)[:, None] + scores_of(second)[None, :]
    pairs = pairs_of(sums, rows_of(first)[:, None] * S + rows_of(second)[None, :])
    pairs = tl.where(there & (sums != float("-inf")), pairs, NOTHING)
    best = tl.topk(tl.reshape(pairs, [SLOTS * SLOTS]), SLOTS)
    slot = lanes(SLOTS)
    chosen = best != NOTHING
    store(scores_ptr + at * K + slot, tl.where(chosen, scores_of(best), float("-inf")), mask=slot < K)
    tl.store(index_ptr + at * K + slot, tl.where(chosen, rows_of(best), -1), mask=slot < K)


@triton.jit
def _product_key_query_kernel(
    dquery_ptr, dscores_ptr, index_ptr, subkeys_ptr, NH, S, K, D, dscores_stride_b, dscores_stride_h, dscores_stride_k,
    subkeys_stride_h, subkeys_stride_p, subkeys_stride_s, subkeys_stride_d, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A program owns one half of a query of a head: the sum of its chosen subkeys."""
    at, half = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    b, head = at // NH, at % NH
    slot, d = lanes(SLOTS), lanes(BLOCK_D)
    index = tl.load(index_ptr + at * K + slot, mask=slot < K, other=-1)
    there = index >= 0
    place = dscores_ptr + b * dscores_stride_b + head * dscores_stride_h + slot * dscores_stride_k
    gradient = tl.load(place, mask=there & (slot < K), other=0.0).to(tl.float32)
    row = tl.where(there, tl.where(half == 0, index // S, index % S), 0)
    place = (
        subkeys_ptr + head * subkeys_stride_h + half * subkeys_stride_p + row[:, None] * subkeys_stride_s + d[None, :] * subkeys_stride_d
    )
    rows = tl.load(place, mask=there[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    store(dquery_ptr + (at * 2 + half) * D + d, tl.sum(rows * gradient[:, None], 0), mask=d < D)


@triton.jit
def _product_key_subkeys_kernel(
    dsubkeys_ptr, start_ptr, order_ptr, dscores_ptr, query_ptr, NH, S, K, D, dscores_stride_b, dscores_stride_h, dscores_stride_k,
    query_stride_b, query_stride_h, query_stride_p, query_stride_d, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A subkey sums what its choices start[row] .. start[row + 1] in `order` give it; choices are numbered [B][NH][half][k]."""
    row = tl.program_id(0).to(tl.int64)
    head, half = row // S // 2, row // S % 2
    d = lanes(BLOCK_D)
    total = tl.zeros([BLOCK_D], tl.float32)
    for entry in range(tl.load(start_ptr + row), tl.load(start_ptr + (row + 1))):
        choice = tl.load(order_ptr + entry)
        slot, b = choice % K, choice // K // 2 // NH
        gradient = tl.load(dscores_ptr + b * dscores_stride_b + head * dscores_stride_h + slot * dscores_stride_k).to(tl.float32)
        place = query_ptr + b * query_stride_b + head * query_stride_h + half * query_stride_p + d * query_stride_d
        total += gradient * tl.load(place, mask=d < D, other=0.0).to(tl.float32)
    store(dsubkeys_ptr + row * D + d, total, mask=d < D)


MAX_SLOTS, MAX_SUBKEYS = 32, 46340  # all sums of a query in registers; an index in 31 bits


def supports(query, subkeys, k):
    if k > MAX_SLOTS:
        return f"k = {k} is over the limit of {MAX_SLOTS}, whose sums a program holds in registers"
    if subkeys.shape[2] > MAX_SUBKEYS:
        return f"{subkeys.shape[2]} subkeys are over the limit of {MAX_SUBKEYS}"
    if query.shape[3] > _launch.MAX_TOPK_WIDTH:
        return f"a row of {query.shape[3]} elements is over the limit of {_launch.MAX_TOPK_WIDTH}"
    return refuse(query)


def forward(scores, index, query, subkeys, k):
    (batch, heads, _, width), count = query.shape, subkeys.shape[2]
    launch = _launch.topk_read(batch * heads * 2, count, k, width, 1, INTERPRETED)
    halves, rows = query.flatten(1, 2), subkeys.flatten(0, 1)
    found = index.new_empty((2 * heads, launch.splits, batch, launch.slots))
    layouts = halves.stride(1), halves.stride(0), halves.stride(2), *rows.stride(), 0, 0
    run(
        _topk_search_kernel, (2 * heads * _launch.ceil_div(batch, launch.block_q), launch.splits), found, halves, rows, None,
        batch, count, width, launch.splits, launch.rows_per_split, *layouts, SIMILARITY="dot", BLOCK_Q=launch.block_q,
        BLOCK_N=launch.block_n, BLOCK_D=launch.block_d, SLOTS=launch.slots, PRECISION=precision(query.dtype), num_warps=launch.num_warps,
    )  # fmt: skip
    run(
        _product_key_kernel, (batch * heads,), scores, index, found, batch, heads, count, k, launch.splits,
        SLOTS=launch.slots, num_warps=4,
    )  # fmt: skip


def backward(dquery, dsubkeys, dscores, query, subkeys, index, k):
    (batch, heads, _, width), count = query.shape, subkeys.shape[2]
    dscores = query.new_zeros(()).expand(index.shape) if dscores is None else dscores
    launch = _launch.topk_read(batch * heads * 2, count, k, width, 1, INTERPRETED)
    if dquery is not None:
        run(
            _product_key_query_kernel, (batch * heads, 2), dquery, dscores, index, subkeys, heads, max(count, 1), k, width,
            *strides(dscores, 3), *subkeys.stride(), SLOTS=launch.slots, BLOCK_D=launch.block_d, num_warps=4,
        )  # fmt: skip
    if dsubkeys is None or not dsubkeys.numel():
        return
    # Sorted by subkey over halves and heads, stable, so in the order of the queries; what is absent comes past the last row.
    parts = torch.stack((index // count, index % count), 2)
    half = torch.arange(2 * heads, device=index.device).view(heads, 2, 1)
    flat = torch.where(index[:, :, None] >= 0, half * count + parts, 2 * heads * count).flatten()
    chosen, order = torch.sort(flat, stable=True)
    start = torch.searchsorted(chosen, torch.arange(2 * heads * count + 1, device=index.device))
    run(
        _product_key_subkeys_kernel, (2 * heads * count,), dsubkeys, start, order, dscores, query, heads, count, k, width,
        *strides(dscores, 3), *query.stride(), BLOCK_D=launch.block_d, num_warps=1,
    )  # fmt: skip


def _aot(name, kernel, dtype, warps):
    launch = _launch.topk_read(8192, 512, 32, 128, 1, False)
    blocks = {k: v for k, v in dict(SLOTS=launch.slots, BLOCK_D=launch.block_d).items() if k in kernel.arg_names}
    ones = {a: 1 for a in kernel.arg_names if a.endswith(("stride_d", "stride_k"))}
    types = dict(found_ptr="*i64", index_ptr="*i64", start_ptr="*i64", order_ptr="*i64")
    return aot(name, kernel, dtype, blocks | ones, types, warps)


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        _aot("product_key_search", _product_key_kernel, dtype, 4),
        _aot("product_key_query", _product_key_query_kernel, dtype, 4),
        _aot("product_key_subkeys", _product_key_subkeys_kernel, dtype, 1),
    )
]
