"""Content addressing on Triton, for content_address and content_read: weights = softmax(strength * c(key, memory)), read = weights @ value.

Forward: a program owns one split of the rows of one batch entry, holds all heads and reads each row once: similarity, online softmax,
weighted sum. Each split leaves (maximum, sum, weighted sum); a second kernel combines them in order of the splits. Weights, if asked for,
are written as logits and then normalised. Backward: a program owns one split, reads its rows once and writes their gradients; the sums
over rows that dkey and dstrength are leave one partial a split. Tiles are laid out rows x heads, so that no result of a dot is ever
transposed. Bytes: forward s*N*W, backward 2*s*N*W (3*s*N*W with dweights). Products exact in float32 (see _common.precision), sums float32.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, precision, run, store, strides, sum_splits

EPS = tl.constexpr(1e-6)


@triton.jit
def _similar(memory, key, key_ptr, key_stride_r, key_stride_w, R, W, key_norm, SIMILARITY: tl.constexpr, PRECISION: tl.constexpr):
    """c "rows x heads" and the norms of the rows.

    Forward and backward must agree to the last bit: where one row has all the weight, a difference would be multiplied by strength.
    """
    norm = tl.full([memory.shape[0]], 1.0, tl.float32)
    if SIMILARITY == "l2":
        r, w = lanes(key.shape[0]), lanes(key.shape[1])
        similar = tl.zeros([memory.shape[0], key.shape[0]], tl.float32)
        for i in range(R):  # differences before squares: no cancellation where a row is near the key
            row = tl.load(key_ptr + tl.cast(i, tl.int64) * key_stride_r + w * key_stride_w, mask=w < W, other=0.0).to(tl.float32)
            away = memory - row[None, :]
            similar = tl.where((r == i)[None, :], -tl.sum(away * away, 1)[:, None], similar)
    else:
        similar = tl.dot(memory, tl.trans(key), input_precision=PRECISION)
    if SIMILARITY == "cosine":
        norm = tl.sqrt(tl.sum(memory * memory, 1) + EPS)
        similar /= norm[:, None] * key_norm[None, :]
    return similar, norm


@triton.jit
def _load_heads(key_ptr, strength_ptr, r, w, R, W, key_stride_r, key_stride_w, strength_stride_r, SIMILARITY: tl.constexpr):
    """Keys "heads x columns", their strengths and their norms."""
    key = tl.load(key_ptr + r[:, None] * key_stride_r + w[None, :] * key_stride_w, mask=(r < R)[:, None] & (w < W)[None, :], other=0.0)
    key = key.to(tl.float32)
    strength = tl.load(strength_ptr + r * strength_stride_r, mask=r < R, other=0.0).to(tl.float32)
    norm = tl.full([key.shape[0]], 1.0, tl.float32)
    if SIMILARITY == "cosine":
        norm = tl.sqrt(tl.sum(key * key, 1) + EPS)
    return key, strength, norm


@triton.jit
def _load_rows(pointer, n, columns, seen, width, stride_n, stride_column):
    """A tile of rows, zero where a row is not seen."""
    place = n[:, None] * stride_n + columns[None, :] * stride_column
    return tl.load(pointer + place, mask=seen[:, None] & (columns < width)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _content_fwd_kernel(
    maximum_ptr, sum_ptr, part_ptr, logit_ptr, memory_ptr, key_ptr, strength_ptr, value_ptr, mask_ptr, B, N, R, W, V, splits, chunk,
    memory_stride_b, memory_stride_n, memory_stride_w, key_stride_b, key_stride_r, key_stride_w, strength_stride_b, strength_stride_r,
    value_stride_b, value_stride_n, value_stride_v, mask_stride_b, mask_stride_n, SIMILARITY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, split = tl.program_id(0).to(tl.int64) // splits, tl.program_id(0).to(tl.int64) % splits
    r, w, v = lanes(BLOCK_R), lanes(BLOCK_W), lanes(BLOCK_V)
    key_ptr += b * key_stride_b
    strength_ptr += b * strength_stride_b
    key, strength, key_norm = _load_heads(key_ptr, strength_ptr, r, w, R, W, key_stride_r, key_stride_w, strength_stride_r, SIMILARITY)
    top, total = tl.full([BLOCK_R], float("-inf"), tl.float32), tl.zeros([BLOCK_R], tl.float32)
    read = tl.zeros([BLOCK_V, BLOCK_R], tl.float32)
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, N), BLOCK_N):
        n = first + lanes(BLOCK_N)
        seen = n < N
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + b * mask_stride_b + n * mask_stride_n, mask=seen, other=0) != 0)
        memory = _load_rows(memory_ptr + b * memory_stride_b, n, w, seen, W, memory_stride_n, memory_stride_w)
        similar, _ = _similar(memory, key, key_ptr, key_stride_r, key_stride_w, R, W, key_norm, SIMILARITY, PRECISION)
        logit = tl.where(seen[:, None], similar * strength[None, :], float("-inf"))
        if logit_ptr is not None:
            store(logit_ptr + (b * R + r)[None, :] * N + n[:, None], logit, mask=(r < R)[None, :] & (n < N)[:, None])
        new_top = tl.maximum(top, tl.max(logit, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp(logit - shift[None, :])
        shrink = tl.exp(top - shift)
        total, top = total * shrink + tl.sum(weights, 0), new_top
        if part_ptr is not None:
            value = memory
            if value_ptr is not None:
                value = _load_rows(value_ptr + b * value_stride_b, n, v, seen, V, value_stride_n, value_stride_v)
            read = tl.dot(tl.trans(value), weights, read * shrink[None, :], input_precision=PRECISION)
    head = (split * B + b) * R + r
    store(maximum_ptr + head, top, mask=r < R)
    store(sum_ptr + head, total, mask=r < R)
    if part_ptr is not None:
        store(part_ptr + head[None, :] * V + v[:, None], read, mask=(r < R)[None, :] & (v < V)[:, None])


@triton.jit
def _content_combine_kernel(read_ptr, total_ptr, stats_ptr, maximum_ptr, sum_ptr, part_ptr, heads, V, splits, BLOCK_V: tl.constexpr):
    """One head: the softmax over the union of the splits."""
    head, v = tl.program_id(0).to(tl.int64), lanes(BLOCK_V)
    top, total = tl.full([], float("-inf"), tl.float32), tl.zeros([], tl.float32)
    read = tl.zeros([BLOCK_V], tl.float32)
    for split in range(splits):
        place = tl.cast(split, tl.int64) * heads + head
        part_top = tl.load(maximum_ptr + place)
        new_top = tl.maximum(top, part_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink, grow = tl.exp(top - shift), tl.exp(part_top - shift)
        total, top = total * shrink + tl.load(sum_ptr + place) * grow, new_top
        if part_ptr is not None:
            read = read * shrink + tl.load(part_ptr + place * V + v, mask=v < V, other=0.0) * grow
    store(stats_ptr + head * 2, top)
    store(stats_ptr + (head * 2 + 1), total)
    if part_ptr is not None:
        read /= tl.where(total == 0, 1.0, total)
        store(read_ptr + head * V + v, read, mask=v < V)
        store(total_ptr + head * V + v, read, mask=v < V)


@triton.jit
def _content_weights_kernel(weights_ptr, logit_ptr, stats_ptr, N, BLOCK: tl.constexpr):
    """weights = exp(logit - maximum) / sum; 0 where nothing is seen."""
    blocks = tl.cdiv(N, BLOCK)
    head = tl.program_id(0).to(tl.int64) // blocks
    n = (tl.program_id(0).to(tl.int64) % blocks) * BLOCK + lanes(BLOCK)
    logit = tl.load(logit_ptr + head * N + n, mask=n < N, other=float("-inf"))
    top, total = tl.load(stats_ptr + head * 2), tl.load(stats_ptr + (head * 2 + 1))
    store(weights_ptr + head * N + n, tl.where(logit == float("-inf"), 0.0, tl.exp(logit - top) / total), mask=n < N)


@triton.jit
def _content_bwd_kernel(
    dmemory_ptr, dvalue_ptr, dkey_part_ptr, dsum_part_ptr, delta_part_ptr, memory_ptr, key_ptr, strength_ptr, value_ptr, mask_ptr,
    stats_ptr, delta_ptr, total_ptr, dread_ptr, dweights_ptr, B, N, R, W, V, splits, chunk,
    memory_stride_b, memory_stride_n, memory_stride_w, key_stride_b, key_stride_r, key_stride_w, strength_stride_b, strength_stride_r,
    value_stride_b, value_stride_n, value_stride_v, mask_stride_b, mask_stride_n,
    dread_stride_b, dread_stride_r, dread_stride_v, dweights_stride_b, dweights_stride_r, dweights_stride_n, SIMILARITY: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_V: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b, split = tl.program_id(0).to(tl.int64) // splits, tl.program_id(0).to(tl.int64) % splits
    r, w, v = lanes(BLOCK_R), lanes(BLOCK_W), lanes(BLOCK_V)
    key_ptr += b * key_stride_b
    strength_ptr += b * strength_stride_b
    key, strength, key_norm = _load_heads(key_ptr, strength_ptr, r, w, R, W, key_stride_r, key_stride_w, strength_stride_r, SIMILARITY)
    top = tl.load(stats_ptr + (b * R + r) * 2, mask=r < R, other=float("inf"))
    sums = tl.load(stats_ptr + ((b * R + r) * 2 + 1), mask=r < R, other=1.0)
    inverse = 1.0 / tl.where(sums == 0, 1.0, sums)
    if dread_ptr is not None:
        dread_ptr += b * dread_stride_b + r[:, None] * dread_stride_r + v[None, :] * dread_stride_v
        dread = tl.load(dread_ptr, mask=(r < R)[:, None] & (v < V)[None, :], other=0.0).to(tl.float32)
    if delta_ptr is not None:
        delta = tl.load(delta_ptr + b * R + r, mask=r < R, other=0.0)
    elif delta_part_ptr is None:
        # dread . read, by the same dot as dread . value below: where one row has all the weight, their difference is exactly zero.
        total = tl.load(total_ptr + (b * R + r)[:, None] * V + v[None, :], mask=(r < R)[:, None] & (v < V)[None, :], other=0.0)
        delta = tl.sum(tl.where(r[:, None] == r[None, :], tl.dot(total, tl.trans(dread), input_precision=PRECISION), 0.0), 0)
    dkey = tl.zeros([BLOCK_W, BLOCK_R], tl.float32)
    dstrength, dsum = tl.zeros([BLOCK_R], tl.float32), tl.zeros([BLOCK_R], tl.float32)
    for first in range(split * chunk, tl.minimum((split + 1) * chunk, N), BLOCK_N):
        n = first + lanes(BLOCK_N)
        seen = n < N
        if mask_ptr is not None:
            seen = seen & (tl.load(mask_ptr + b * mask_stride_b + n * mask_stride_n, mask=seen, other=0) != 0)
        memory = _load_rows(memory_ptr + b * memory_stride_b, n, w, seen, W, memory_stride_n, memory_stride_w)
        similar, norm = _similar(memory, key, key_ptr, key_stride_r, key_stride_w, R, W, key_norm, SIMILARITY, PRECISION)
        weights = tl.where(seen[:, None], tl.exp(similar * strength[None, :] - top[None, :]) * inverse[None, :], 0.0)
        gradient = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        if dweights_ptr is not None:
            place = b * dweights_stride_b + n[:, None] * dweights_stride_n + r[None, :] * dweights_stride_r
            gradient += tl.load(dweights_ptr + place, mask=seen[:, None] & (r < R)[None, :], other=0.0).to(tl.float32)
        if dread_ptr is not None:
            value = memory
            if value_ptr is not None:
                value = _load_rows(value_ptr + b * value_stride_b, n, v, seen, V, value_stride_n, value_stride_v)
            gradient = tl.dot(value, tl.trans(dread), gradient, input_precision=PRECISION)
        if delta_part_ptr is not None:
            dstrength += tl.sum(tl.where(seen[:, None], weights * gradient, 0.0), 0)
            dsum += tl.sum(weights, 0)
        else:
            dlogit = tl.where(seen[:, None], weights * (gradient - delta[None, :]), 0.0)
            dstrength += tl.sum(dlogit * similar, 0)
            ddot = dlogit * strength[None, :]
            along = ddot * similar
            if SIMILARITY == "cosine":
                ddot /= norm[:, None]
            if SIMILARITY == "l2":
                ddot *= 2
                dsum += tl.sum(ddot, 0)
            dkey = tl.dot(tl.trans(memory), ddot, dkey, input_precision=PRECISION)
            if dmemory_ptr is not None:
                dmemory = tl.dot(ddot / key_norm[None, :], key, input_precision=PRECISION)
                if SIMILARITY == "cosine":
                    dmemory -= memory * (tl.sum(along, 1) / (norm * norm))[:, None]
                if SIMILARITY == "l2":
                    dmemory -= memory * tl.sum(ddot, 1)[:, None]
                if dread_ptr is not None and value_ptr is None:
                    dmemory = tl.dot(weights, dread, dmemory, input_precision=PRECISION)
                store(dmemory_ptr + (b * N + n)[:, None] * W + w[None, :], dmemory, mask=(n < N)[:, None] & (w < W)[None, :])
            if dvalue_ptr is not None:
                dvalue = tl.dot(weights, dread, input_precision=PRECISION)
                store(dvalue_ptr + (b * N + n)[:, None] * V + v[None, :], dvalue, mask=(n < N)[:, None] & (v < V)[None, :])
    head = (split * B + b) * R + r
    if delta_part_ptr is not None:
        store(delta_part_ptr + (2 * split * B + b) * R + r, dstrength, mask=r < R)
        store(delta_part_ptr + ((2 * split + 1) * B + b) * R + r, dsum, mask=r < R)
    else:
        store(dkey_part_ptr + head[None, :] * W + w[:, None], dkey, mask=(r < R)[None, :] & (w < W)[:, None])
        store(dsum_part_ptr + head * 2, dstrength, mask=r < R)
        store(dsum_part_ptr + (head * 2 + 1), dsum, mask=r < R)


@triton.jit
def _content_dkey_kernel(
    dkey_ptr, dstrength_ptr, dkey_part_ptr, dsum_part_ptr, key_ptr, strength_ptr, heads, R, W, splits,
    key_stride_b, key_stride_r, key_stride_w, strength_stride_b, strength_stride_r, SIMILARITY: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """One head: sums the splits in order, then adds what does not depend on the rows one by one."""
    head, w = tl.program_id(0).to(tl.int64), lanes(BLOCK_W)
    b, r = head // R, head % R
    dkey = tl.zeros([BLOCK_W], tl.float32)
    dstrength, dsum = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
    for split in range(splits):
        place = tl.cast(split, tl.int64) * heads + head
        dkey += tl.load(dkey_part_ptr + place * W + w, mask=w < W, other=0.0)
        dstrength += tl.load(dsum_part_ptr + place * 2)
        dsum += tl.load(dsum_part_ptr + (place * 2 + 1))
    key = tl.load(key_ptr + b * key_stride_b + r * key_stride_r + w * key_stride_w, mask=w < W, other=0.0).to(tl.float32)
    if SIMILARITY == "cosine":
        square = tl.sum(key * key, 0) + EPS
        strength = tl.load(strength_ptr + b * strength_stride_b + r * strength_stride_r).to(tl.float32)
        dkey = dkey / tl.sqrt(square) - key * (strength * dstrength / square)
    elif SIMILARITY == "l2":
        dkey -= key * dsum
    if dkey_ptr is not None:
        store(dkey_ptr + head * W + w, dkey, mask=w < W)
    if dstrength_ptr is not None:
        store(dstrength_ptr + head, dstrength)


def _tiles(rows, dtype, similarity):
    # The operands of three tf32 products lie in shared memory, which is too small for those of the largest tiles.
    large = rows.block_r * max(rows.block_w, rows.block_v) > _launch.MAX_TILE // 2
    return dict(
        SIMILARITY=similarity, BLOCK_R=rows.block_r, BLOCK_N=rows.block_n, BLOCK_W=rows.block_w, BLOCK_V=rows.block_v,
        PRECISION="ieee" if large and dtype != torch.float32 else precision(dtype), num_warps=rows.num_warps,
    )  # fmt: skip


def _rows(memory, key, value, backward):
    return _launch.content(memory.shape[1], key.shape[1], memory.shape[2], None if value is None else value.shape[2], backward)


def forward(read, total, weights, stats, memory, key, strength, value, mask, similarity):
    """`read` and `total` None: no read. `weights` None: no weights."""
    (batch, heads, width), count = key.shape, memory.shape[1]
    value_width = 0 if read is None else read.shape[2]
    rows = _rows(memory, key, value, backward=False)
    new = memory.new_empty
    top, sums = new(rows.splits, batch, heads, dtype=torch.float32), new(rows.splits, batch, heads, dtype=torch.float32)
    part = None if read is None else new(rows.splits, batch, heads, value_width, dtype=torch.float32)
    logit = None if weights is None else new(batch, heads, count, dtype=torch.float32)
    run(
        _content_fwd_kernel, (batch * rows.splits,), top, sums, part, logit, memory, key, strength, value, mask,
        batch, count, heads, width, value_width, rows.splits, rows.chunk,
        *memory.stride(), *key.stride(), *strength.stride(), *strides(value, 3), *strides(mask, 2),
        **_tiles(rows, memory.dtype, similarity),
    )  # fmt: skip
    run(
        _content_combine_kernel,
        (batch * heads,),
        read,
        total,
        stats,
        top,
        sums,
        part,
        batch * heads,
        value_width,
        rows.splits,
        BLOCK_V=rows.block_v,
    )
    if weights is not None:
        run(_content_weights_kernel, (batch * heads * _launch.ceil_div(count, 1024),), weights, logit, stats, count, BLOCK=1024)


def backward(dmemory, dkey, dstrength, dvalue, dread, dweights, memory, key, strength, value, mask, stats, total, similarity):
    (batch, heads, width), count = key.shape, memory.shape[1]
    value_width = 0 if total is None else total.shape[2]
    rows = _rows(memory, key, value, backward=True)
    if dread is None and dvalue is not None:
        dvalue.zero_()
        dvalue = None

    def launch(gradients, parts, delta_part, delta):
        run(
            _content_bwd_kernel, (batch * rows.splits,), *gradients, *parts, delta_part, memory, key, strength, value, mask,
            stats, delta, total, dread, dweights, batch, count, heads, width, value_width, rows.splits, rows.chunk,
            *memory.stride(), *key.stride(), *strength.stride(), *strides(value, 3), *strides(mask, 2),
            *strides(dread, 3), *strides(dweights, 3),
            **_tiles(rows, memory.dtype, similarity),
        )  # fmt: skip

    delta = None
    if dweights is not None:  # the saved weights are rounded, so weights . dweights takes a pass of its own
        sums, delta_part = stats.new_empty(2, batch, heads), stats.new_empty(rows.splits, 2, batch, heads)
        launch((None, None), (None, None), delta_part, None)
        sum_splits(sums, delta_part)
        delta = sums[0] / sums[1].clamp_min(torch.finfo(torch.float32).tiny)
    parts = stats.new_empty(rows.splits, batch, heads, width), stats.new_empty(rows.splits, batch, heads, 2)
    launch((dmemory, dvalue), parts, None, delta)
    run(
        _content_dkey_kernel, (batch * heads,), dkey, dstrength, *parts, key, strength, batch * heads, heads, width, rows.splits,
        *key.stride(), *strength.stride(), SIMILARITY=similarity, BLOCK_W=rows.block_w,
    )  # fmt: skip


def entries(name, read):
    """What is compiled ahead of time for content_address (`read` False) and content_read."""
    found = []
    kernels = _content_fwd_kernel, _content_bwd_kernel
    usual = product(AOT_DTYPES, ("cosine", "dot", "l2") if read else ("cosine",), kernels, [4])
    for dtype, similarity, kernel, heads in [*usual, *product(AOT_DTYPES, ["dot"], kernels, [64, 128] if read else [])]:
        rows = _launch.content(65536, heads, 64, None, kernel is _content_bwd_kernel)
        absent = {"mask_ptr", "value_ptr", "dvalue_ptr", "delta_part_ptr"}
        absent |= {"logit_ptr", "dweights_ptr", "delta_ptr"} if read else {"part_ptr", "dread_ptr", "total_ptr"}
        constants = {k: v for k, v in _tiles(rows, dtype, similarity).items() if k.isupper()} | {
            a: None for a in kernel.arg_names if a in absent
        }
        constants |= {a: 1 for a in kernel.arg_names if a.endswith(("stride_w", "dread_stride_v", "dweights_stride_n"))}
        types = {f"{a}_ptr": "*fp32" for a in ("maximum", "sum", "part", "logit", "stats", "delta", "total", "dkey_part", "dsum_part")}
        direction = "bwd" if kernel is _content_bwd_kernel else "fwd"
        title = f"{name}_{direction}_{similarity}" + (f"_R{heads}" if heads > 4 else "")
        entry = aot(title, kernel, dtype, constants, types, rows.num_warps)
        found.append(replace(entry, stack=800) if heads > 4 else entry)
    return found
