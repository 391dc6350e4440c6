"""The backward of attention: see attention.py. With p = exp(s - maximum) / sum, delta = dout . out - dlse, ds = p * (dout . v - delta):
dv = p^T dout, dq = scale * ds k, dk = scale * ds^T q, dmask = ds summed over what the mask broadcasts along. With a softcap the ds of
query and key is multiplied by its slope; a sink of weight p gets -p * delta, summed over the rows of its head.
A delta that is off, because `out` is rounded, shows in the sum of p * (dout . v - dout . out) over what a query sees, which should be 0:
queries that see few keys, whose ds may be little but that, have theirs set right by one more pass over their keys (set_right()).
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._attention import (
    MASK_STRIDES,
    capped,
    contiguous,
    dropout,
    dropout_arguments,
    entry,
    limits,
    mask_arguments,
    masked,
    pull,
    tiles,
)
from memkernels.backends.triton._common import INTERPRETED, aot, device_of, dot, lanes, rounded, run, store, strides, sum_splits


@triton.jit
def _attention_delta_kernel(
    delta_ptr, out_ptr, dout_ptr, dlse_ptr, NH, Q, V, rows, dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v,
    dlse_stride_b, dlse_stride_h, dlse_stride_q, BLOCK: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, v = tl.program_id(0).to(tl.int64) * BLOCK + lanes(BLOCK), lanes(BLOCK_V)
    b, head, i = row // Q // NH, row // Q % NH, row % Q
    tile = (row < rows)[:, None] & (v < V)[None, :]
    place = (b * dout_stride_b + head * dout_stride_h + i * dout_stride_q)[:, None] + v[None, :] * dout_stride_v
    out = tl.load(out_ptr + row[:, None] * V + v[None, :], mask=tile, other=0.0).to(tl.float32)
    delta = tl.sum(out * tl.load(dout_ptr + place, mask=tile, other=0.0).to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + b * dlse_stride_b + head * dlse_stride_h + i * dlse_stride_q, mask=row < rows, other=0.0)
    tl.store(delta_ptr + row, delta, mask=row < rows)


@triton.jit
def _row(stats_ptr, delta_ptr, i, Q):
    """(maximum, 1 / sum, delta) of queries; a query past the end has weight 0, a blind one has nothing to subtract."""
    top = tl.load(stats_ptr + i * 2, mask=i < Q, other=float("inf"))
    total = tl.load(stats_ptr + (i * 2 + 1), mask=i < Q, other=1.0)
    delta = tl.load(delta_ptr + i, mask=i < Q, other=0.0)
    return tl.where(top == float("-inf"), 0.0, top), 1.0 / tl.where(total == 0, 1.0, total), delta


@triton.jit
def _walk_queries(
    dkey, dvalue, key, value, k, head, query_ptr, dout_ptr, stats_ptr, delta_ptr, mask_ptr, seed, lo, hi,
    Q, K, D, V, scale, softcap, threshold, inverse, low, high,
    query_stride_q, query_stride_d, dout_stride_q, dout_stride_v, mask_stride_q, mask_stride_k,
    MASKED: tl.constexpr, CAPPED: tl.constexpr, WINDOWED: tl.constexpr, BLOCK_M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Adds what queries lo .. hi of one head give to a block of keys; tiles are keys x queries."""
    d, v = lanes(key.shape[1]), lanes(value.shape[1])
    for start in range(lo, hi, BLOCK_M):
        i = tl.cast(start, tl.int64) + lanes(BLOCK_M)
        place = i[:, None] * query_stride_q + d[None, :] * query_stride_d
        query = tl.load(query_ptr + place, mask=(i < Q)[:, None] & (d < D)[None, :], other=0.0)
        dout = tl.load(
            dout_ptr + i[:, None] * dout_stride_q + v[None, :] * dout_stride_v, mask=(i < Q)[:, None] & (v < V)[None, :], other=0.0
        )
        top, inverse_sum, delta = _row(stats_ptr, delta_ptr, i, Q)
        zero = tl.zeros([key.shape[0], BLOCK_M], tl.float32)
        logit = dot(key, tl.trans(query), zero, PRECISION) * scale
        slope = 1.0
        if CAPPED:
            logit, slope = capped(logit, softcap)
        if MASKED:
            logit = masked(logit, i[None, :], k[:, None], mask_ptr, mask_stride_q, mask_stride_k, Q, K, low, high, WINDOWED)
        weights = tl.exp(logit - top[None, :]) * inverse_sum[None, :]
        dweights = dot(value, tl.trans(dout), zero, PRECISION)
        if seed is not None:
            kept = dropout(seed, head, i[None, :], k[:, None], threshold, inverse)
            dweights *= kept
            dvalue = dot(rounded(weights * kept, dout.dtype), dout, dvalue, PRECISION)
        else:
            dvalue = dot(rounded(weights, dout.dtype), dout, dvalue, PRECISION)
        dlogit = weights * (dweights - delta[None, :]) * slope
        if MASKED:
            dlogit = tl.where(logit == float("-inf"), 0.0, dlogit)
        dkey = dot(rounded(dlogit, query.dtype), query, dkey, PRECISION)
    return dkey, dvalue


@triton.jit
def _attention_dkey_kernel(
    dkey_ptr, dvalue_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, lengths_ptr, seed_ptr, dout_ptr, stats_ptr, delta_ptr,
    NH, Q, K, D, V, group, mask_group, scale, softcap, threshold, inverse, low, high, pull,
    query_stride_b, query_stride_h, query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_k, key_stride_d,
    value_stride_b, value_stride_h, value_stride_k, value_stride_v, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(K, BLOCK_N)
    block, row = tl.program_id(0).to(tl.int64) % blocks, tl.program_id(0).to(tl.int64) // blocks
    b, shared = row // (NH // group), row % (NH // group)
    k, d, v = block * BLOCK_N + lanes(BLOCK_N), lanes(BLOCK_D), lanes(BLOCK_V)
    keys, values = (k < K)[:, None] & (d < D)[None, :], (k < K)[:, None] & (v < V)[None, :]
    all_keys, last = K, tl.minimum((block + 1) * BLOCK_N, K) - 1
    K, low, high = entry(lengths_ptr, b, K, low, high, pull)
    exists = (k < K)[:, None]
    key = tl.load(
        key_ptr + b * key_stride_b + shared * key_stride_h + k[:, None] * key_stride_k + d[None, :] * key_stride_d,
        mask=keys & exists,
        other=0.0,
    )
    value_ptr += b * value_stride_b + shared * value_stride_h
    value = tl.load(value_ptr + k[:, None] * value_stride_k + v[None, :] * value_stride_v, mask=values & exists, other=0.0)
    seed = None
    if seed_ptr is not None:
        seed = tl.load(seed_ptr + b)
    first, stop = block * BLOCK_N, Q
    if lengths_ptr is not None:  # a block past the end has nothing to do
        last = tl.minimum(last, K - 1)
        stop = tl.where(first < K, stop, 0)
    begin, end = tl.maximum(first - high, 0) // BLOCK_M * BLOCK_M, tl.minimum(last - low + 1, stop)
    clear = tl.minimum(tl.maximum(tl.cdiv(last - high, BLOCK_M) * BLOCK_M, begin), tl.maximum(end, begin))
    clear_end = tl.maximum(tl.minimum(end, first - low + 1) // BLOCK_M * BLOCK_M, clear)
    dkey, dvalue = tl.zeros([BLOCK_N, BLOCK_D], tl.float32), tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    for member in range(group):
        head = shared * group + member
        queries, douts = query_ptr + b * query_stride_b + head * query_stride_h, dout_ptr + b * dout_stride_b + head * dout_stride_h
        stats, deltas = stats_ptr + (b * NH + head) * Q * 2, delta_ptr + (b * NH + head) * Q
        if mask_ptr is not None:
            masks = mask_ptr + (b // mask_group) * mask_stride_b + head * mask_stride_h
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, k, head, queries, douts, stats, deltas, masks, seed, begin, end, Q, K, D, V, scale,
                softcap, threshold, inverse, low, high, query_stride_q, query_stride_d, dout_stride_q, dout_stride_v, mask_stride_q,
                mask_stride_k, True, CAPPED, WINDOWED, BLOCK_M, PRECISION,
            )  # fmt: skip
        elif WINDOWED:
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, k, head, queries, douts, stats, deltas, None, seed, begin, clear, Q, K, D, V, scale,
                softcap, threshold, inverse, low, high, query_stride_q, query_stride_d, dout_stride_q, dout_stride_v, mask_stride_q,
                mask_stride_k, True, CAPPED, WINDOWED, BLOCK_M, PRECISION,
            )  # fmt: skip
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, k, head, queries, douts, stats, deltas, None, seed, clear, clear_end, Q, K, D, V, scale,
                softcap, threshold, inverse, low, high, query_stride_q, query_stride_d, dout_stride_q, dout_stride_v, mask_stride_q,
                mask_stride_k, False, CAPPED, WINDOWED, BLOCK_M, PRECISION,
            )  # fmt: skip
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, k, head, queries, douts, stats, deltas, None, seed, clear_end, end, Q, K, D, V, scale,
                softcap, threshold, inverse, low, high, query_stride_q, query_stride_d, dout_stride_q, dout_stride_v, mask_stride_q,
                mask_stride_k, True, CAPPED, WINDOWED, BLOCK_M, PRECISION,
            )  # fmt: skip
        else:
            dkey, dvalue = _walk_queries(
                dkey, dvalue, key, value, k, head, queries, douts, stats, deltas, None, seed, 0, stop, Q, K, D, V, scale,
                softcap, threshold, inverse, low, high, query_stride_q, query_stride_d, dout_stride_q, dout_stride_v, mask_stride_q,
                mask_stride_k, False, CAPPED, WINDOWED, BLOCK_M, PRECISION,
            )  # fmt: skip
    if lengths_ptr is not None:
        dkey, dvalue = tl.where(exists, dkey, 0.0), tl.where(exists, dvalue, 0.0)
    if dkey_ptr is not None:
        store(dkey_ptr + (row * all_keys + k)[:, None] * D + d[None, :], dkey * scale, mask=keys)
    if dvalue_ptr is not None:
        store(dvalue_ptr + (row * all_keys + k)[:, None] * V + v[None, :], dvalue, mask=values)


@triton.jit
def _attention_dquery_kernel(
    dquery_part_ptr, dmask_ptr, moved_ptr, query_ptr, key_ptr, value_ptr, mask_ptr, lengths_ptr, seed_ptr, dout_ptr, stats_ptr, delta_ptr,
    B, NH, Q, K, D, V, most, group, mask_group, splits, chunk, scale, softcap, threshold, inverse, low, high, pull,
    query_stride_b, query_stride_h, query_stride_q, query_stride_d, key_stride_b, key_stride_h, key_stride_k, key_stride_d,
    value_stride_b, value_stride_h, value_stride_k, value_stride_v, mask_stride_b, mask_stride_h, mask_stride_q, mask_stride_k,
    dout_stride_b, dout_stride_h, dout_stride_q, dout_stride_v, CAPPED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of queries; with dmask_ptr (a mask of the full shape) also ds, which is its gradient.

    With moved_ptr only the sums of ds and of p of each query, of blocks that see at most `most` keys."""
    blocks = tl.cdiv(Q, BLOCK_M)
    program = tl.program_id(0).to(tl.int64)
    block, split, row = blocks - 1 - program % blocks, (program // blocks) % splits, program // blocks // splits
    b, head = row // NH, row % NH
    all_keys = K
    K, low, high = entry(lengths_ptr, b, K, low, high, pull)
    i, d, v = block * BLOCK_M + lanes(BLOCK_M), lanes(BLOCK_D), lanes(BLOCK_V)
    queries = (i < Q)[:, None] & (d < D)[None, :]
    query_ptr += b * query_stride_b + head * query_stride_h
    query = tl.load(query_ptr + i[:, None] * query_stride_q + d[None, :] * query_stride_d, mask=queries, other=0.0)
    dout_ptr += b * dout_stride_b + head * dout_stride_h
    dout = tl.load(dout_ptr + i[:, None] * dout_stride_q + v[None, :] * dout_stride_v, mask=(i < Q)[:, None] & (v < V)[None, :], other=0.0)
    top, inverse_sum, delta = _row(stats_ptr + row * Q * 2, delta_ptr + row * Q, i, Q)
    key_ptr += b * key_stride_b + (head // group) * key_stride_h
    value_ptr += b * value_stride_b + (head // group) * value_stride_h
    if mask_ptr is not None:
        mask_ptr += (b // mask_group) * mask_stride_b + head * mask_stride_h
    first, last = block * BLOCK_M, tl.minimum((block + 1) * BLOCK_M, Q) - 1
    begin = tl.maximum(split * chunk, first + low) // BLOCK_N * BLOCK_N
    end = tl.minimum(tl.minimum((split + 1) * chunk, K), last + high + 1)
    if dmask_ptr is not None:
        begin, end = split * chunk, tl.minimum((split + 1) * chunk, all_keys)
    few = end - begin <= most
    if moved_ptr is not None:
        end = tl.where(few, end, begin)
        moved, summed = tl.zeros([BLOCK_M], tl.float32), tl.zeros([BLOCK_M], tl.float32)
    dquery, zero = tl.zeros([BLOCK_M, BLOCK_D], tl.float32), tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(begin, end, BLOCK_N):
        k = tl.cast(start, tl.int64) + lanes(BLOCK_N)
        key = tl.load(key_ptr + k[:, None] * key_stride_k + d[None, :] * key_stride_d, mask=(k < K)[:, None] & (d < D)[None, :], other=0.0)
        place = k[:, None] * value_stride_k + v[None, :] * value_stride_v
        value = tl.load(value_ptr + place, mask=(k < K)[:, None] & (v < V)[None, :], other=0.0)
        logit = dot(query, tl.trans(key), zero, PRECISION) * scale
        slope = 1.0
        if CAPPED:
            logit, slope = capped(logit, softcap)
        logit = masked(logit, i[:, None], k[None, :], mask_ptr, mask_stride_q, mask_stride_k, Q, K, low, high, WINDOWED)
        dweights = dot(dout, tl.trans(value), zero, PRECISION)
        if seed_ptr is not None:
            dweights *= dropout(tl.load(seed_ptr + b), head, i[:, None], k[None, :], threshold, inverse)
        dlogit = tl.where(logit == float("-inf"), 0.0, tl.exp(logit - top[:, None]) * (inverse_sum[:, None] * (dweights - delta[:, None])))
        if dmask_ptr is not None:
            store(dmask_ptr + (row * Q + i)[:, None] * all_keys + k[None, :], dlogit, mask=(i < Q)[:, None] & (k < all_keys)[None, :])
        if moved_ptr is not None:
            moved += tl.sum(dlogit, 1)
            summed += tl.sum(tl.exp(logit - top[:, None]) * inverse_sum[:, None], 1)
        if CAPPED:
            dlogit = tl.where(logit == float("-inf"), 0.0, dlogit * slope)
        if mask_ptr is not None or WINDOWED:  # a key that is not finite must not reach a query that does not see it by 0 * NaN
            key = tl.where((key - key) != 0, 0.0, key)
        dquery = dot(rounded(dlogit, key.dtype), key, dquery, PRECISION)
    if moved_ptr is not None:
        tl.store(moved_ptr + (row * Q + i) * 2, moved, mask=i < tl.where(few, Q, 0))
        tl.store(moved_ptr + ((row * Q + i) * 2 + 1), summed, mask=i < tl.where(few, Q, 0))
    if dquery_part_ptr is not None:
        at = (split * B * NH + row) * Q + i
        store(dquery_part_ptr + at[:, None] * D + d[None, :], dquery * scale, mask=queries)


FEW_KEYS = 128  # of queries that see more, a delta that is off by a rounding moves little


def first_delta(dout, dlse, out, stats):
    """dout . out (- dlse) of contiguous outputs "B NH Q"."""
    (_, heads, queries, width), delta = out.shape, stats.new_empty(stats.shape[:3])
    run(
        _attention_delta_kernel, (_launch.ceil_div(delta.numel(), 16),), delta, out, dout, dlse, heads, queries, width, delta.numel(),
        *dout.stride(), *strides(dlse, 3), BLOCK=16, BLOCK_V=_launch.power_of_two(width, 16),
    )  # fmt: skip
    return delta


class Call:
    """What the kernels of one backward share; options as in backward()."""

    def __init__(self, dout, query, key, value, attn_mask, lengths_k, seed, stats, delta, scale, softcap, dropout_p, left, right, causal):
        (self.batch, heads, self.queries, width), self.keys, value_width = query.shape, key.shape[2], value.shape[3]
        self.key, self.stats, self.windows = key, stats, (left, right, softcap)
        self.widths, self.query = (width, value_width), query
        mask_group, *mask_strides = mask_arguments(attn_mask, self.batch)
        self.tensors = query, key, value, attn_mask, contiguous(lengths_k), seed, dout, stats, delta
        limit = limits(self.queries, self.keys, left, right, causal)
        self.numbers = float(scale), float(softcap), *dropout_arguments(dropout_p), *limit, pull(causal)
        self.layouts = *query.stride(), *key.stride(), *value.stride(), *mask_strides, *dout.stride()
        self.sizes, self.groups = (heads, self.queries, self.keys, *self.widths), (max(heads // max(key.shape[1], 1), 1), mask_group)

    def launch(self, kernel):
        """The tiles, as they are and as arguments."""
        wide, capability = self.query.dtype == torch.float32, device_of(self.query.device).capability
        launch = _launch.attention(self.queries, self.keys, *self.widths, wide, kernel, capability, INTERPRETED)
        return launch, tiles(launch, self.query.dtype, *self.windows)

    def dkey(self, dkey, dvalue):
        launch, options = self.launch("dkey")
        grid = (self.batch * self.key.shape[1] * _launch.ceil_div(self.keys, launch.block_n),)
        run(_attention_dkey_kernel, grid, dkey, dvalue, *self.tensors, *self.sizes, *self.groups, *self.numbers, *self.layouts, **options)

    def dquery(self, part, dmask, moved=None, most=0):
        launch, options = self.launch("dquery")
        splits, chunk = (launch.splits, launch.chunk) if moved is None else (1, max(self.keys, 1))
        grid = (self.batch * self.sizes[0] * splits * _launch.ceil_div(self.queries, launch.block_m),)
        run(
            _attention_dquery_kernel, grid, part, dmask, moved, *self.tensors, self.batch, *self.sizes, most, *self.groups, splits, chunk,
            *self.numbers, *self.layouts, **options,
        )  # fmt: skip


def backward(
    dquery, dkey, dvalue, dmask, dsink, dout, dlse, query, key, value, attn_mask, sink, lengths_k, seed, out, stats, scale, softcap,
    dropout_p, left, right, causal,
):  # fmt: skip
    few = dout is not None and (key.shape[2] <= FEW_KEYS or left >= 0 or right >= 0 or lengths_k is not None)  # some may see few keys
    dout = out.new_zeros(()).expand(out.shape) if dout is None else dout
    delta = first_delta(dout, None if few else dlse, out, stats)
    call = Call(dout, query, key, value, attn_mask, lengths_k, seed, stats, delta, scale, softcap, dropout_p, left, right, causal)
    if few:
        moved = no_moves(delta)
        call.dquery(None, None, moved, FEW_KEYS)
        set_right(delta, moved, dlse, sink is not None)
    rest = None if sink is None else _sink_rows(sink, stats, delta)
    if dsink is not None:
        dsink.copy_(rest.sum((0, 2)))  # type: ignore[union-attr]
    if dmask is not None and attn_mask.shape[3] == 1:
        # A constant added to all scores of a query moves its log-sum-exp, less what the sink takes of it, and nothing else; the sum of
        # ds would only show rounding.
        moved = torch.zeros_like(delta) if dlse is None else dlse.masked_fill(stats[..., 1] == 0, 0)
        _sum_to_mask(dmask, (moved if rest is None else moved - rest)[..., None])
        dmask = None
    gradients(call, dquery, dkey, dvalue, dmask)


def no_moves(delta):
    """For each query the sums that set_right() takes, as if its delta were exact."""
    moved = delta.new_zeros(*delta.shape, 2)  # not from numbers of the host: a copy waits for the device, and no CUDA graph can hold it
    moved[..., 1].fill_(1)
    return moved


def set_right(delta, moved, dlse, sink=False):
    """delta = exact delta, from that without dlse: by p * (dout . v - delta) and p, summed over what a query sees (a sink has value 0)."""
    by, total = moved.unbind(-1)
    if sink:
        delta.mul_(total).add_(by)
    else:
        delta += by / total.masked_fill(total == 0, 1)
    if dlse is not None:
        delta -= dlse


def gradients(call, dquery, dkey, dvalue, dmask):
    """Those of query, key, value and of a mask that has more than one element a query."""
    if dkey is not None or dvalue is not None:
        call.dkey(dkey, dvalue)
    if dquery is None and dmask is None:
        return
    (launch, _), full, part = call.launch("dquery"), None, None
    if dmask is not None:
        shape = call.batch, *call.sizes[:3]
        full = dmask if dmask.shape == shape else call.stats.new_empty(shape)
    if dquery is not None:
        part = dquery[None] if launch.splits == 1 else call.stats.new_empty(launch.splits, *dquery.shape)
    call.dquery(part, full)
    if part is not None and launch.splits > 1:
        sum_splits(dquery, part)
    if full is not dmask:
        _sum_to_mask(dmask, full)


def _sink_rows(sink, stats, delta):
    """ds of the sink in every row."""
    shift = stats[..., 0].masked_fill(stats[..., 0] == -torch.inf, 0)
    weights = torch.exp(sink.float()[:, None] - shift) / stats[..., 1].masked_fill(stats[..., 1] == 0, 1)
    return -weights * delta


def _sum_to_mask(dmask, full):
    """dmask = ds summed over the batch entries, heads, queries or keys that share an element of the mask."""
    if dmask.shape[0] not in (1, full.shape[0]):
        full = full.unflatten(0, (dmask.shape[0], -1)).sum(1)
    dmask.copy_(full.sum_to_size(dmask.shape))


def entries(dtype):
    """What is compiled ahead of time."""
    cases = product((64, 128), (False, True), ("dkey", "dquery"), (False, True))
    return [_aot(dtype, *case) for case in cases]


def every(dtype):
    """The same with softcap and lengths."""
    return [_aot(dtype, 64, True, role, False, every=True) for role in ("dkey", "dquery")]


def _aot(dtype, width, causal, role, ampere, every=False):
    kernel = _attention_dkey_kernel if role == "dkey" else _attention_dquery_kernel
    launch = _launch.attention(4096, 4096, width, width, dtype == torch.float32, role, (8, 0) if ampere else (9, 0))
    absent = dict.fromkeys(("mask_ptr", "seed_ptr", "dmask_ptr", "moved_ptr") + (() if every else ("lengths_ptr",))) | dict.fromkeys(
        MASK_STRIDES, 0
    )
    ones = dict.fromkeys(("query_stride_d", "key_stride_d", "value_stride_v", "dout_stride_v", "group", "mask_group", "splits"), 1)
    constants = {k: v for k, v in tiles(launch, dtype, -1, 0 if causal else -1, float(every)).items() if k.isupper()} | absent | ones
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    types = dict.fromkeys(("stats_ptr", "delta_ptr"), "*fp32") | dict.fromkeys(("scale", "softcap", "inverse"), "fp32")
    types |= dict(lengths_ptr="*i64", threshold="i32")
    name = f"attention_{role}_D{width}" + ("_causal" if causal else "") + ("_every" if every else "") + ("_ampere" if ampere else "")
    expect = () if dtype == torch.float32 else ("wgmma",) if launch.block_n >= 64 else ("mma",)
    entry = aot(name, kernel, dtype, constants, types, launch.num_warps, launch.num_stages, expect)
    return replace(entry, capabilities=(80,) if ampere else (90,) if every else (90, 100))
