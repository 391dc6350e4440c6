"""Softmax attention to keys that lie in pages, on Triton.

Forward: a program owns a run of keys of one row and key head; all query heads of the group are the rows of its tile, so a page is read
once for them. The runs are joined in order (_attention_combine_kernel). Backward: dq by programs that own queries; dk and dv by programs
that own slots of a page and walk over its places in the table, sorted on the device, in the order of the rows: no atomics, no host wait.
A page number that is out of range is one that nobody sees.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._attention_bwd import first_delta, no_moves, set_right
from memkernels.backends.triton._common import AOT_DTYPES, aot, dot, lanes, precision, refuse, rounded, run, store
from memkernels.backends.triton.attention import _attention_combine_kernel

CHUNK = 1024  # keys of a run


@triton.jit
def _group_rows(ptr, row, rows, Q, columns, stride_h, stride_q, stride_column, BLOCK: tl.constexpr):
    """Queries of a group: row r is query r % Q of its head r // Q."""
    column = lanes(BLOCK)
    place = (row // Q * stride_h + row % Q * stride_q)[:, None] + column[None, :] * stride_column
    return tl.load(ptr + place, mask=(row < rows)[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _paged_tile(ptr, page, slot, there, columns, stride_page, stride_slot, stride_column, BLOCK: tl.constexpr):
    column = lanes(BLOCK)
    place = (page * stride_page + slot * stride_slot)[:, None] + column[None, :] * stride_column
    return tl.load(ptr + place, mask=there[:, None] & (column < columns)[None, :], other=0.0)


@triton.jit
def _page(table_ptr, k, length, P, S):
    """(page, whether key k of a row is there)."""
    page = tl.load(table_ptr + k // S, mask=k < length, other=-1)
    return page, (page >= 0) & (page < P)


@triton.jit
def _paged_fwd_kernel(
    out_part_ptr, stats_part_ptr, query_ptr, key_ptr, value_ptr, table_ptr, lengths_ptr, B, NH, Q, P, S, M, D, V, group, blocks, chunk,
    scale, query_stride_b, query_stride_h, query_stride_q, query_stride_d, key_stride_p, key_stride_s, key_stride_h, key_stride_d,
    value_stride_p, value_stride_s, value_stride_h, value_stride_v, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program, shared_heads = tl.program_id(0).to(tl.int64), NH // group
    block, shared, b = program % blocks, program // blocks % shared_heads, program // blocks // shared_heads % B
    split = program // blocks // shared_heads // B
    row, v = block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_V)
    length = tl.minimum(tl.load(lengths_ptr + b), tl.cast(M, tl.int64) * S)
    query_ptr += b * query_stride_b + shared * group * query_stride_h
    query = _group_rows(query_ptr, row, group * Q, Q, D, query_stride_h, query_stride_q, query_stride_d, BLOCK_D)
    acc, broken = tl.zeros([BLOCK_M, BLOCK_V], tl.float32), tl.zeros([BLOCK_M], tl.int32)
    total, top = tl.zeros([BLOCK_M], tl.float32), tl.full([BLOCK_M], float("-inf"), tl.float32)
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, length), BLOCK_N):
        k = tl.cast(first, tl.int64) + lanes(BLOCK_N)
        page, there = _page(table_ptr + b * M, k, length, P, S)
        key = _paged_tile(key_ptr + shared * key_stride_h, page, k % S, there, D, key_stride_p, key_stride_s, key_stride_d, BLOCK_D)
        logit = dot(query, tl.trans(key), tl.zeros([BLOCK_M, BLOCK_N], tl.float32), PRECISION) * scale
        seen = (row < group * Q)[:, None] & there[None, :]
        if CAUSAL:
            seen = seen & (k[None, :] <= (length - Q + row % Q)[:, None])
        logit = tl.where(seen, logit, float("-inf"))
        new_top = tl.maximum(top, tl.max(logit, 1))
        zero_point = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, shrink = tl.exp(logit - zero_point[:, None]), tl.exp(top - zero_point)
        total, top = total * shrink + tl.sum(weights, 1), new_top
        value = _paged_tile(
            value_ptr + shared * value_stride_h, page, k % S, there, V, value_stride_p, value_stride_s, value_stride_v, BLOCK_V
        )
        if CAUSAL:  # a value that is not finite must not reach a query that does not see it by 0 * NaN
            bad = (value - value) != 0
            value = tl.where(bad, 0.0, value)
            hit = (tl.max(bad.to(tl.int32), 1) > 0)[None, :] & (weights != 0)
            broken = tl.maximum(broken, tl.max(hit.to(tl.int32), 1))
        acc = dot(rounded(weights, value.dtype), value, acc * shrink[:, None], PRECISION)
    acc = tl.where((broken != 0)[:, None], float("nan"), acc / tl.where(total == 0, 1.0, total)[:, None])
    at = ((split * B + b) * NH + shared * group) * Q + row
    tl.store(out_part_ptr + at[:, None] * V + v[None, :], acc, mask=(row < group * Q)[:, None] & (v < V)[None, :])
    tl.store(stats_part_ptr + at * 2, top, mask=row < group * Q)
    tl.store(stats_part_ptr + (at * 2 + 1), total, mask=row < group * Q)


@triton.jit
def _gradient_tile(logit, seen, top, total, dweights, delta):
    """(weights, gradient of the scores); the numbers of queries lie along the axis of queries."""
    logit = tl.where(seen, logit, float("-inf"))
    weights = tl.exp(logit - tl.where(top == float("-inf"), 0.0, top)) / tl.where(total == 0, 1.0, total)
    return weights, tl.where(seen, weights * (dweights - delta), 0.0)


@triton.jit
def _paged_dquery_kernel(
    dquery_ptr, moved_ptr, query_ptr, key_ptr, value_ptr, table_ptr, lengths_ptr, dout_ptr, stats_ptr, delta_ptr,
    NH, Q, P, S, M, D, V, group, blocks, scale, query_stride_b, query_stride_h, query_stride_q, query_stride_d,
    key_stride_p, key_stride_s, key_stride_h, key_stride_d, value_stride_p, value_stride_s, value_stride_h, value_stride_v,
    dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """With moved_ptr the sums of ds and of p of each query."""
    program, shared_heads = tl.program_id(0).to(tl.int64), NH // group
    block, shared, b = program % blocks, program // blocks % shared_heads, program // blocks // shared_heads
    row, d = block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_D)
    here, at = row < group * Q, (b * NH + shared * group) * Q + row
    length = tl.minimum(tl.load(lengths_ptr + b), tl.cast(M, tl.int64) * S)
    query_ptr += b * query_stride_b + shared * group * query_stride_h
    dout_ptr += b * dout_stride_b + shared * group * dout_stride_h
    query = _group_rows(query_ptr, row, group * Q, Q, D, query_stride_h, query_stride_q, query_stride_d, BLOCK_D)
    dout = _group_rows(dout_ptr, row, group * Q, Q, V, dout_stride_h, dout_stride_q, dout_stride_v, BLOCK_V)
    top, total = tl.load(stats_ptr + at * 2, mask=here, other=0.0), tl.load(stats_ptr + (at * 2 + 1), mask=here, other=1.0)
    delta, dquery = tl.load(delta_ptr + at, mask=here, other=0.0), tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    moved, summed = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    for first in range(length * 0, length, BLOCK_N):
        k = tl.cast(first, tl.int64) + lanes(BLOCK_N)
        page, there = _page(table_ptr + b * M, k, length, P, S)
        key = _paged_tile(key_ptr + shared * key_stride_h, page, k % S, there, D, key_stride_p, key_stride_s, key_stride_d, BLOCK_D)
        value = _paged_tile(
            value_ptr + shared * value_stride_h, page, k % S, there, V, value_stride_p, value_stride_s, value_stride_v, BLOCK_V
        )
        seen = here[:, None] & there[None, :]
        if CAUSAL:
            seen = seen & (k[None, :] <= (length - Q + row % Q)[:, None])
        zero = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        logit, dweights = dot(query, tl.trans(key), zero, PRECISION) * scale, dot(dout, tl.trans(value), zero, PRECISION)
        weights, dlogit = _gradient_tile(logit, seen, top[:, None], total[:, None], dweights, delta[:, None])
        moved += tl.sum(dlogit, 1)
        summed += tl.sum(weights, 1)
        if CAUSAL:  # nor a key
            key = tl.where((key - key) != 0, 0.0, key)
        dquery = dot(rounded(dlogit, key.dtype), key, dquery, PRECISION)
    if moved_ptr is not None:
        tl.store(moved_ptr + at * 2, moved, mask=here)
        tl.store(moved_ptr + (at * 2 + 1), summed, mask=here)
    if dquery_ptr is not None:
        store(dquery_ptr + at[:, None] * D + d[None, :], dquery * scale, mask=here[:, None] & (d < D)[None, :])


@triton.jit
def _paged_dkey_kernel(
    dkey_ptr, dvalue_ptr, query_ptr, key_ptr, value_ptr, lengths_ptr, dout_ptr, stats_ptr, delta_ptr, place_ptr, first_ptr,
    NH, Q, P, S, M, D, V, group, blocks, scale, query_stride_b, query_stride_h, query_stride_q, query_stride_d,
    key_stride_p, key_stride_s, key_stride_h, key_stride_d, value_stride_p, value_stride_s, value_stride_h, value_stride_v,
    dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v, CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Places first_ptr[p] to first_ptr[p + 1] of place_ptr are those of page p in the table; tiles are keys x queries."""
    program, shared_heads = tl.program_id(0).to(tl.int64), NH // group
    block, shared, p = program % blocks, program // blocks % shared_heads, program // blocks // shared_heads
    slot, d, v = block * BLOCK_N + lanes(BLOCK_N), lanes(BLOCK_D), lanes(BLOCK_V)
    key = _paged_tile(key_ptr + shared * key_stride_h, p, slot, slot < S, D, key_stride_p, key_stride_s, key_stride_d, BLOCK_D)
    value = _paged_tile(value_ptr + shared * value_stride_h, p, slot, slot < S, V, value_stride_p, value_stride_s, value_stride_v, BLOCK_V)
    dkey, dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for index in range(tl.load(first_ptr + p), tl.load(first_ptr + (p + 1))):
        place = tl.load(place_ptr + tl.cast(index, tl.int64))
        b, k = place // M, place % M * S + slot
        length = tl.load(lengths_ptr + b)
        queries = query_ptr + b * query_stride_b + shared * group * query_stride_h
        douts = dout_ptr + b * dout_stride_b + shared * group * dout_stride_h
        for start in range(0, group * Q, BLOCK_M):
            row = tl.cast(start, tl.int64) + lanes(BLOCK_M)
            here, at = row < group * Q, (b * NH + shared * group) * Q + row
            query = _group_rows(queries, row, group * Q, Q, D, query_stride_h, query_stride_q, query_stride_d, BLOCK_D)
            dout = _group_rows(douts, row, group * Q, Q, V, dout_stride_h, dout_stride_q, dout_stride_v, BLOCK_V)
            top, total = tl.load(stats_ptr + at * 2, mask=here, other=0.0), tl.load(stats_ptr + (at * 2 + 1), mask=here, other=1.0)
            delta = tl.load(delta_ptr + at, mask=here, other=0.0)
            seen = here[None, :] & ((slot < S) & (k < length))[:, None]
            if CAUSAL:
                seen = seen & (k[:, None] <= (length - Q + row % Q)[None, :])
            zero = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            logit, dweights = dot(key, tl.trans(query), zero, PRECISION) * scale, dot(value, tl.trans(dout), zero, PRECISION)
            weights, dlogit = _gradient_tile(logit, seen, top[None, :], total[None, :], dweights, delta[None, :])
            dvalue = dot(rounded(weights, dout.dtype), dout, dvalue, PRECISION)
            dkey = dot(rounded(dlogit, query.dtype), query, dkey, PRECISION)
    row = (p * S + slot) * shared_heads + shared
    if dkey_ptr is not None:
        store(dkey_ptr + row[:, None] * D + d[None, :], dkey * scale, mask=(slot < S)[:, None] & (d < D)[None, :])
    if dvalue_ptr is not None:
        store(dvalue_ptr + row[:, None] * V + v[None, :], dvalue, mask=(slot < S)[:, None] & (v < V)[None, :])


def supports(query, key_pages, value_pages, page_table, lengths, scale, is_causal):
    width = max(query.shape[3], value_pages.shape[3])
    if width > _launch.MAX_WIDTH:
        return f"a head of {width} elements is over the limit of {_launch.MAX_WIDTH}"
    return refuse(query)


def _tiles(rows, width, value_width, dtype, is_causal, keys=64):
    """Of a group of `rows` queries: tiles that fit the registers at every width."""
    block_d, block_v = _launch.power_of_two(width, 16), _launch.power_of_two(value_width, 16)
    narrow, kind = max(block_d, block_v) <= 128, precision(dtype)
    return dict(
        CAUSAL=is_causal, BLOCK_M=min(_launch.power_of_two(rows, 16), 32 if narrow else 16),
        BLOCK_N=min(keys, (64 if dtype != torch.float32 else 32) if narrow else 16), BLOCK_D=block_d, BLOCK_V=block_v,
        PRECISION="ieee" if kind == "tf32x3" else kind, num_warps=4 if narrow and dtype != torch.float32 else 8, num_stages=2,
    )  # fmt: skip


def _sizes(query, key_pages, value_pages, page_table, tile):
    group = max(query.shape[1] // max(key_pages.shape[2], 1), 1)
    blocks = _launch.ceil_div(group * query.shape[2], tile["BLOCK_M"])
    sizes = query.shape[1], query.shape[2], *key_pages.shape[:2], page_table.shape[1], query.shape[3], value_pages.shape[3], group
    return sizes, blocks


def _rows_of(query, key_pages):
    return max(query.shape[1] // max(key_pages.shape[2], 1), 1) * query.shape[2]


def forward(out, lse, stats, query, key_pages, value_pages, page_table, lengths, scale, is_causal):
    tile = _tiles(_rows_of(query, key_pages), query.shape[3], value_pages.shape[3], query.dtype, is_causal)
    sizes, blocks = _sizes(query, key_pages, value_pages, page_table, tile)
    splits = max(_launch.ceil_div(page_table.shape[1] * key_pages.shape[1], CHUNK), 1)
    out_part, stats_part = stats.new_empty(splits, *out.shape), stats.new_empty(splits, *stats.shape)
    run(
        _paged_fwd_kernel, (blocks * key_pages.shape[2] * query.shape[0] * splits,), out_part, stats_part, query, key_pages, value_pages,
        page_table.contiguous(), lengths.contiguous(), query.shape[0], *sizes, blocks, CHUNK, float(scale),
        *query.stride(), *key_pages.stride(), *value_pages.stride(), **tile,
    )  # fmt: skip
    run(
        _attention_combine_kernel, (lse.numel(),), out, lse, stats, out_part, stats_part, None, lse.numel(), 1, 1, out.shape[3],
        splits,
        BLOCK_V=tile["BLOCK_V"],
    )  # fmt: skip


def _places(page_table, lengths, pages, slots):
    """The places in the table of every page, in order, and where those of each page begin; what is not used comes last."""
    at = torch.arange(page_table.shape[1], device=page_table.device) * slots
    used = (at < lengths[:, None]) & (page_table >= 0) & (page_table < pages)
    found, places = torch.where(used, page_table, pages).flatten().sort(stable=True)
    return places, torch.searchsorted(found, torch.arange(pages + 1, device=page_table.device))


def backward(dquery, dkey, dvalue, dout, dlse, query, key_pages, value_pages, page_table, lengths, out, stats, scale, is_causal):
    (batch, _, _, width), value_width = query.shape, value_pages.shape[3]
    zeros = dout is None
    dout = out.new_zeros(()).expand(out.shape) if zeros else dout
    rows, delta = _rows_of(query, key_pages), first_delta(dout, dlse if zeros else None, out, stats)
    layouts = *query.stride(), *key_pages.stride(), *value_pages.stride(), *dout.stride()
    lengths, table = lengths.contiguous(), page_table.contiguous()

    def along_queries(dquery, moved):
        tile = _tiles(rows, width, value_width, query.dtype, is_causal)
        sizes, blocks = _sizes(query, key_pages, value_pages, page_table, tile)
        tensors = query, key_pages, value_pages, table, lengths, dout, stats, delta
        grid = (blocks * key_pages.shape[2] * batch,)
        run(_paged_dquery_kernel, grid, dquery, moved, *tensors, *sizes, blocks, float(scale), *layouts, **tile)

    if not zeros:  # see _attention_bwd.py
        moved = no_moves(delta)
        along_queries(None, moved)
        set_right(delta, moved, dlse)
    if dquery is not None:
        along_queries(dquery, None)
    if dkey is not None or dvalue is not None:
        pages, slots = key_pages.shape[:2]
        tile = _tiles(rows, width, value_width, query.dtype, is_causal, _launch.power_of_two(slots, 16))
        sizes, _ = _sizes(query, key_pages, value_pages, page_table, tile)
        blocks, places = _launch.ceil_div(slots, tile["BLOCK_N"]), _places(table, lengths, pages, slots)
        tensors = query, key_pages, value_pages, lengths, dout, stats, delta, *places
        grid = (blocks * key_pages.shape[2] * pages,)
        run(_paged_dkey_kernel, grid, dkey, dvalue, *tensors, *sizes, blocks, float(scale), *layouts, **tile)


def _aot(role, dtype, is_causal):
    kernel = {"forward": _paged_fwd_kernel, "dquery": _paged_dquery_kernel, "dkey": _paged_dkey_kernel}[role]
    tile = _tiles(16, 64, 64, dtype, is_causal, 16 if role == "dkey" else 64)
    constants = {k: v for k, v in tile.items() if k.isupper()}
    constants |= {"moved_ptr": None} if role == "dquery" else {}
    constants |= {a: 1 for a in ("query_stride_d", "key_stride_d", "value_stride_v", "dout_stride_v") if a in kernel.arg_names}
    types = dict.fromkeys(("out_part_ptr", "stats_part_ptr", "stats_ptr", "delta_ptr", "moved_ptr"), "*fp32") | {"scale": "fp32"}
    types |= dict.fromkeys(("table_ptr", "lengths_ptr", "place_ptr", "first_ptr"), "*i64")
    name = f"paged_attention_{role}" + ("_causal" if is_causal else "")
    return aot(name, kernel, dtype, constants, types, tile["num_warps"], tile["num_stages"], () if dtype == torch.float32 else ("mma",))


AOT = [_aot(role, dtype, is_causal) for role in ("forward", "dquery", "dkey") for dtype in AOT_DTYPES for is_causal in (False, True)]
