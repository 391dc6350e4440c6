"""Graph attention over compressed rows on Triton: out[i] = sum_e softmax(scale * q[i] . k[index[e]] + bias[e]) v[index[e]].

A program owns a row and walks over its edges, a tile of edges x heads x width at a time; near rows are gathered by pointer, once for all
heads of the tile. A row of more than `run` edges is split: programs beyond the rows own what lies of such a row in one chunk of `run`
edges, and a second kernel joins the parts in order. So work is split by edges and nothing depends on data that the host would wait for.
Backward: once along the nodes (dq, dbias), once along the sources of the transposed graph (dk, dv), each row written once, no atomics.
Bytes gathered an edge: forward s*NH*(D + V), backward twice that. Products and sums in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from memkernels.backends.triton import _launch
from memkernels.backends.triton._common import AOT_DTYPES, aot, lanes, refuse, run, store, strides


@triton.jit
def _piece(ptr_ptr, ends_ptr, rows, edges, RUN: tl.constexpr):
    """(row, first and last edge, whole, part): of a whole row, or of what lies of a long one in a chunk; both 0: nothing to do."""
    program = tl.program_id(0).to(tl.int64)
    own, at = program < rows, tl.maximum(program - rows, 0)
    row = tl.where(own, program, tl.load(ends_ptr + at))
    there = row >= 0
    row = tl.maximum(row, 0)
    first = tl.minimum(tl.maximum(tl.load(ptr_ptr + row), 0), edges)
    last = tl.minimum(tl.maximum(tl.load(ptr_ptr + (row + 1)), first), edges)
    long, chunk = last - first > RUN, at // 2
    whole, part = own & (last - first <= RUN), (program >= rows) & there & long
    first = tl.where(own, first, tl.maximum(first, chunk * RUN))
    last = tl.where(own, last, tl.minimum(last, (chunk + 1) * RUN))
    return row, first, tl.where(whole | part, last, first), tl.where(whole, 1, 0), tl.where(part, 1, 0)


@triton.jit
def _scores(own, near_ptr, near, h, d, bias_ptr, edge, live, scale, NH, D, near_stride_n, near_stride_h, near_stride_d, bias_stride_e,
            bias_stride_h):  # fmt: skip
    """Rows "E H D" of the near side, and scores "E H" against the own row, -inf where there is no edge for the head."""
    place = near[:, None, None] * near_stride_n + h[None, :, None] * near_stride_h + d[None, None, :] * near_stride_d
    inside = (h < NH)[:, None] & (d < D)[None, :]
    rows = tl.load(near_ptr + place, mask=live[:, None, None] & inside[None, :, :], other=0.0).to(tl.float32)
    scores, seen = tl.sum(rows * own[None, :, :], 2) * scale, live[:, None] & (h < NH)[None, :]
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + edge[:, None] * bias_stride_e + h[None, :] * bias_stride_h, mask=seen, other=0.0).to(tl.float32)
        seen = seen & (bias != float("-inf"))
        scores += bias
    return rows, tl.where(seen, scores, float("-inf"))


@triton.jit
def _weighted(weights, rows):
    """Sum over the edges of weights "E H" times rows "E H W"; a row of weight 0 may hold anything."""
    return tl.sum(tl.where((weights != 0)[:, :, None], weights[:, :, None] * rows, 0.0), 0)


@triton.jit
def _segment_fwd_kernel(
    out_ptr, lse_ptr, stats_ptr, exact_ptr, part_ptr, part_stats_ptr, query_ptr, key_ptr, value_ptr, bias_ptr, ptr_ptr, index_ptr, ends_ptr,
    rows, sources, edges, NH, D, V, scale, query_stride_n, query_stride_h, query_stride_d, key_stride_n, key_stride_h, key_stride_d,
    value_stride_n, value_stride_h, value_stride_v, bias_stride_e, bias_stride_h,
    RUN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, first, last, whole, part = _piece(ptr_ptr, ends_ptr, rows, edges, RUN)
    h, d, v = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H), lanes(BLOCK_D), lanes(BLOCK_V)
    place = row * query_stride_n + h[:, None] * query_stride_h + d[None, :] * query_stride_d
    query = tl.load(query_ptr + place, mask=(h < NH)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
    top, total = tl.full([BLOCK_H], float("-inf"), tl.float32), tl.zeros([BLOCK_H], tl.float32)
    acc = tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    for begin in range(first, last, BLOCK_E):
        e = tl.cast(begin, tl.int64) + lanes(BLOCK_E)
        live = e < last
        near = tl.minimum(tl.maximum(tl.load(index_ptr + e, mask=live, other=0), 0), sources - 1)
        _, scores = _scores(
            query, key_ptr, near, h, d, bias_ptr, e, live, scale, NH, D, key_stride_n, key_stride_h, key_stride_d, bias_stride_e,
            bias_stride_h,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(scores, 0))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights, keep = tl.exp(scores - shift[None, :]), tl.exp(top - shift)
        spot = near[:, None, None] * value_stride_n + h[None, :, None] * value_stride_h + v[None, None, :] * value_stride_v
        inside = live[:, None, None] & (h < NH)[None, :, None] & (v < V)[None, None, :]
        value = tl.load(value_ptr + spot, mask=inside, other=0.0).to(tl.float32)
        acc = tl.where((keep == 0)[:, None], 0.0, acc * keep[:, None]) + _weighted(weights, value)
        total, top = total * keep + tl.sum(weights, 0), new_top
    if part_ptr is not None:
        at, heads = (tl.program_id(0).to(tl.int64) - rows) * NH + h, h < part * NH
        store(part_ptr + at[:, None] * V + v[None, :], acc, mask=heads[:, None] & (v < V)[None, :])
        store(part_stats_ptr + at * 2, top, mask=heads)
        store(part_stats_ptr + (at * 2 + 1), total, mask=heads)
    _finish(out_ptr, lse_ptr, stats_ptr, exact_ptr, acc, top, total, row * NH + h, v, V, h < whole * NH)


@triton.jit
def _finish(out_ptr, lse_ptr, stats_ptr, exact_ptr, acc, top, total, at, v, V, heads):
    """Writes the outputs of one row from its sums."""
    tile = heads[:, None] & (v < V)[None, :]
    out, place = acc / tl.where(total == 0, 1.0, total)[:, None], at[:, None] * V + v[None, :]
    store(out_ptr + place, out, mask=tile)
    if exact_ptr is not None:
        store(exact_ptr + place, out, mask=tile)
    store(lse_ptr + at, top + tl.log(total), mask=heads)
    store(stats_ptr + at * 2, top, mask=heads)
    store(stats_ptr + (at * 2 + 1), total, mask=heads)


@triton.jit
def _parts(ptr_ptr, edges, RUN: tl.constexpr):
    """(row, first edge, first and last chunk) of a long row; no chunks if it is not long."""
    row = tl.program_id(0).to(tl.int64)
    first = tl.minimum(tl.maximum(tl.load(ptr_ptr + row), 0), edges)
    last = tl.minimum(tl.maximum(tl.load(ptr_ptr + (row + 1)), first), edges)
    begin = first // RUN
    return row, first, begin, tl.where(last - first > RUN, (last - 1) // RUN + 1, begin)


@triton.jit
def _segment_fwd_join_kernel(
    out_ptr, lse_ptr, stats_ptr, exact_ptr, part_ptr, part_stats_ptr, ptr_ptr, edges, NH, V,
    RUN: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    row, first, begin, end = _parts(ptr_ptr, edges, RUN)
    h, v = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H), lanes(BLOCK_V)
    top, total = tl.full([BLOCK_H], float("-inf"), tl.float32), tl.zeros([BLOCK_H], tl.float32)
    acc, tile = tl.zeros([BLOCK_H, BLOCK_V], tl.float32), (h < NH)[:, None] & (v < V)[None, :]
    for step in range(begin, end):
        chunk = tl.cast(step, tl.int64)
        at = (2 * chunk + tl.where(first <= chunk * RUN, 0, 1)) * NH + h
        part_top = tl.load(part_stats_ptr + at * 2, mask=h < NH, other=float("-inf"))
        new_top = tl.maximum(top, part_top)
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        keep, take = tl.exp(top - shift), tl.exp(part_top - shift)
        sums = tl.load(part_ptr + at[:, None] * V + v[None, :], mask=tile, other=0.0)
        acc = tl.where((keep == 0)[:, None], 0.0, acc * keep[:, None]) + tl.where((take == 0)[:, None], 0.0, sums * take[:, None])
        total = total * keep + tl.load(part_stats_ptr + (at * 2 + 1), mask=h < NH, other=0.0) * take
        top = new_top
    _finish(out_ptr, lse_ptr, stats_ptr, exact_ptr, acc, top, total, row * NH + h, v, V, h < tl.where(end > begin, NH, 0))


@triton.jit
def _segment_bwd_kernel(
    dleft_ptr, dright_ptr, dbias_ptr, part_left_ptr, part_right_ptr, own_left_ptr, own_right_ptr, near_left_ptr, near_right_ptr, bias_ptr,
    stats_ptr, delta_ptr, ptr_ptr, near_ptr, edge_ptr, ends_ptr, rows, near_rows, edges, NH, D, V, scale,
    own_left_stride_n, own_left_stride_h, own_left_stride_d, own_right_stride_n, own_right_stride_h, own_right_stride_v,
    near_left_stride_n, near_left_stride_h, near_left_stride_d, near_right_stride_n, near_right_stride_h, near_right_stride_v,
    bias_stride_e, bias_stride_h, SOURCES: tl.constexpr,
    RUN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """SOURCES: own rows are sources, near ones the nodes of their edges; else the other way round. Left: query, key; right: dout, value."""
    row, first, last, whole, part = _piece(ptr_ptr, ends_ptr, rows, edges, RUN)
    h, d, v = tl.program_id(1).to(tl.int64) * BLOCK_H + lanes(BLOCK_H), lanes(BLOCK_D), lanes(BLOCK_V)
    heads, left_tile, right_tile = h < NH, (h < NH)[:, None] & (d < D)[None, :], (h < NH)[:, None] & (v < V)[None, :]
    place = row * own_left_stride_n + h[:, None] * own_left_stride_h + d[None, :] * own_left_stride_d
    own_left = tl.load(own_left_ptr + place, mask=left_tile, other=0.0).to(tl.float32)
    if own_right_ptr is not None:
        place = row * own_right_stride_n + h[:, None] * own_right_stride_h + v[None, :] * own_right_stride_v
        own_right = tl.load(own_right_ptr + place, mask=right_tile, other=0.0).to(tl.float32)
    left, right = tl.zeros([BLOCK_H, BLOCK_D], tl.float32), tl.zeros([BLOCK_H, BLOCK_V], tl.float32)
    for begin in range(first, last, BLOCK_E):
        e = tl.cast(begin, tl.int64) + lanes(BLOCK_E)
        live = e < last
        near = tl.minimum(tl.maximum(tl.load(near_ptr + e, mask=live, other=0), 0), near_rows - 1)
        edge = e
        if edge_ptr is not None:
            edge = tl.load(edge_ptr + e, mask=live, other=0)
        rows_left, scores = _scores(
            own_left, near_left_ptr, near, h, d, bias_ptr, edge, live, scale, NH, D, near_left_stride_n, near_left_stride_h,
            near_left_stride_d, bias_stride_e, bias_stride_h,
        )  # fmt: skip
        seen = live[:, None] & heads[None, :]
        at = near[:, None] * NH + h[None, :] if SOURCES else row * NH + h[None, :] + 0 * e[:, None]
        top, total = tl.load(stats_ptr + at * 2, mask=seen, other=0.0), tl.load(stats_ptr + (at * 2 + 1), mask=seen, other=1.0)
        weights = tl.where(total == 0, 0.0, tl.exp(scores - tl.where(total == 0, 0.0, top)) / tl.where(total == 0, 1.0, total))
        gradient = -tl.load(delta_ptr + at, mask=seen, other=0.0)
        if own_right_ptr is not None:
            spot = near[:, None, None] * near_right_stride_n + h[None, :, None] * near_right_stride_h
            spot += v[None, None, :] * near_right_stride_v
            rows_right = tl.load(near_right_ptr + spot, mask=live[:, None, None] & right_tile[None, :, :], other=0.0).to(tl.float32)
            gradient += tl.sum(rows_right * own_right[None, :, :], 2)
            if SOURCES:
                right += _weighted(weights, rows_right)
        dscores = tl.where(weights == 0, 0.0, weights * gradient)
        if dbias_ptr is not None:
            store(dbias_ptr + edge[:, None] * NH + h[None, :], dscores, mask=seen)
        left += _weighted(dscores, rows_left)
    left_place, right_place = h[:, None] * D + d[None, :], h[:, None] * V + v[None, :]
    if part_left_ptr is not None:
        at = tl.program_id(0).to(tl.int64) - rows
        store(part_left_ptr + at * NH * D + left_place, left, mask=(h < part * NH)[:, None] & left_tile)
        store(part_right_ptr + at * NH * V + right_place, right, mask=(h < part * NH)[:, None] & right_tile)
    if dleft_ptr is not None:
        store(dleft_ptr + row * NH * D + left_place, left * scale, mask=(h < whole * NH)[:, None] & left_tile)
    if dright_ptr is not None:
        store(dright_ptr + row * NH * V + right_place, right, mask=(h < whole * NH)[:, None] & right_tile)


@triton.jit
def _segment_bwd_join_kernel(grad_ptr, part_ptr, ptr_ptr, edges, items, factor, RUN: tl.constexpr, BLOCK: tl.constexpr):
    """The gradient of a long row: its parts added up in order."""
    row, first, begin, end = _parts(ptr_ptr, edges, RUN)
    item = tl.program_id(1).to(tl.int64) * BLOCK + lanes(BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for step in range(begin, end):
        chunk = tl.cast(step, tl.int64)
        at = 2 * chunk + tl.where(first <= chunk * RUN, 0, 1)
        total += tl.load(part_ptr + at * items + item, mask=item < items, other=0.0)
    store(grad_ptr + row * items + item, total * factor, mask=item < tl.where(end > begin, items, 0))


def supports(query, key, value, ptr, index, edge_bias, scale, saving):
    width = max(query.shape[2], value.shape[2])
    if width > _launch.MAX_WIDTH:
        return f"a row of {width} elements is over the limit of {_launch.MAX_WIDTH}"
    return refuse(query)


def _tiles(launch):
    names = ("block_e", "block_h", "block_d", "block_v", "run")
    return {name.upper(): getattr(launch, name) for name in names} | {"num_warps": launch.num_warps}


def _ends(ptr, edges, launch):
    """The row that the first edge of each chunk belongs to, and the one that the last one does (-1: the same); None for one chunk."""
    if edges <= launch.run:
        return None
    first = torch.arange(0, edges, launch.run, device=ptr.device)
    ends = torch.searchsorted(ptr, torch.stack((first, (first + launch.run).clamp_max(edges) - 1), 1), right=True) - 1
    ends = ends.clamp(0, ptr.shape[0] - 2)
    ends[:, 1].masked_fill_(ends[:, 1] == ends[:, 0], -1)
    return ends


def forward(out, lse, stats, exact, query, key, value, ptr, index, edge_bias, scale, saving):
    (nodes, heads, width), (sources, _, value_width) = query.shape, value.shape
    launch, ptr, index = _launch.segment(heads, width, value_width), ptr.contiguous(), index.contiguous()
    edges = index.shape[0] if sources and nodes else 0
    ends, groups = _ends(ptr, edges, launch), _launch.ceil_div(heads, launch.block_h)
    pieces = 0 if ends is None else ends.numel()
    part = None if ends is None else stats.new_empty(pieces, heads, value_width)
    part_stats = None if ends is None else stats.new_empty(pieces, heads, 2)
    run(
        _segment_fwd_kernel, (nodes + pieces, groups), out, lse, stats, exact, part, part_stats, query, key, value, edge_bias, ptr, index,
        ptr if ends is None else ends, nodes, sources, edges, heads, width, value_width, float(scale), *query.stride(), *key.stride(),
        *value.stride(), *strides(edge_bias, 2), **_tiles(launch),
    )  # fmt: skip
    if pieces:
        run(
            _segment_fwd_join_kernel, (nodes, groups), out, lse, stats, exact, part, part_stats, ptr, edges, heads, value_width,
            RUN=launch.run, BLOCK_H=launch.block_h, BLOCK_V=launch.block_v, num_warps=launch.num_warps,
        )  # fmt: skip


def _along(dleft, dright, dbias, own, near, graph, shared, sources):
    """One backward pass. own, near: (left, right) parts; graph: ptr, near rows, edges (None: their place); sources: see the kernel."""
    (own_left, own_right), (near_left, near_right), (ptr, places, edge) = own, near, graph
    bias, stats, delta, value_width, scale = shared
    rows, heads, width = own_left.shape
    near_rows, launch = near_left.shape[0], _launch.segment(heads, width, value_width)
    edges = places.shape[0] if rows and near_rows else 0
    ends = _ends(ptr, edges, launch)
    pieces = 0 if ends is None else ends.numel()
    parts = [None if ends is None else stats.new_empty(pieces, heads, w) for w in (width, value_width)]
    run(
        _segment_bwd_kernel, (rows + pieces, _launch.ceil_div(heads, launch.block_h)), dleft, dright, dbias, *parts, own_left, own_right,
        near_left, near_right, bias, stats, delta, ptr, places, edge, ptr if ends is None else ends, rows, near_rows, edges, heads, width,
        value_width, scale, *own_left.stride(), *strides(own_right, 3), *near_left.stride(), *strides(near_right, 3), *strides(bias, 2),
        SOURCES=sources, **_tiles(launch),
    )  # fmt: skip
    for gradient, part, factor in ((dleft, parts[0], scale), (dright, parts[1], 1.0)):
        if gradient is not None and part is not None:
            items = part.shape[1] * part.shape[2]
            run(
                _segment_bwd_join_kernel, (rows, _launch.ceil_div(items, 128)), gradient, part, ptr, edges, items, factor, RUN=launch.run,
                BLOCK=128, num_warps=4,
            )  # fmt: skip


def backward(
    dquery, dkey, dvalue, dedge_bias, dout, dlse, query, key, value, ptr, index, edge_bias, out, stats, exact, scale, saving
):  # fmt: skip
    ptr, index, sources = ptr.contiguous(), index.contiguous(), key.shape[0]
    saved = out if exact is None or exact.dim() == 1 else exact
    delta = torch.zeros_like(stats[..., 0]) if dout is None else (dout.float() * saved.float()).sum(-1)
    delta = (delta if dlse is None else delta - dlse).contiguous()
    shared = edge_bias, stats, delta, value.shape[2], float(scale)
    nodes_own, sources_own = (query, dout), (key, None if dout is None else value)
    if dquery is not None or dedge_bias is not None:
        _along(dquery, None, dedge_bias, nodes_own, sources_own, (ptr, index, None), shared, False)
    if dkey is None and dvalue is None:
        return
    begins, order = torch.sort(index.clamp(0, max(sources - 1, 0)), stable=True)
    offsets = torch.searchsorted(begins, torch.arange(sources + 1, device=index.device))
    nodes = torch.searchsorted(ptr, order, right=True) - 1
    _along(dkey, dvalue, None, sources_own, nodes_own, (offsets, nodes, order), shared, True)


def _aot(name, kernel, dtype, absent=(), **constants):
    tiles = _tiles(_launch.segment(4, 16, 16))
    fixed = {a: 1 for a in kernel.arg_names if a.endswith(("stride_d", "stride_v", "bias_stride_h"))} | dict.fromkeys(absent)
    fixed |= {k: v for k, v in tiles.items() if k in kernel.arg_names} | constants
    types = dict.fromkeys(("ptr_ptr", "index_ptr", "ends_ptr", "near_ptr", "edge_ptr"), "*i64") | {"scale": "fp32", "factor": "fp32"}
    types |= {a: "*fp32" for a in kernel.arg_names if a.startswith(("lse", "stats", "exact", "part", "delta"))}
    return aot(f"segment_attention_{name}", kernel, dtype, fixed, types, tiles["num_warps"])


AOT = [
    entry
    for dtype in AOT_DTYPES
    for entry in (
        _aot("fwd", _segment_fwd_kernel, dtype),
        _aot("fwd_whole", _segment_fwd_kernel, dtype, ("exact_ptr", "part_ptr", "part_stats_ptr", "bias_ptr")),
        _aot("fwd_join", _segment_fwd_join_kernel, dtype),
        _aot("bwd_nodes", _segment_bwd_kernel, dtype, ("dright_ptr", "edge_ptr"), SOURCES=False),
        _aot("bwd_sources", _segment_bwd_kernel, dtype, ("dbias_ptr",), SOURCES=True),
        _aot("bwd_join", _segment_bwd_join_kernel, dtype, BLOCK=128),
    )
]
