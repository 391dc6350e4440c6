"""The spec of `paged_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memkernels.ops.paged_attention import paged_attention
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample
from memkernels.testing.specs.attention import near_equal


def _zeros(shape, dtype, generator):
    """No row has a key; a twist then fills the table."""
    return torch.zeros(shape, dtype=torch.int64)


def shared(inputs):
    """Pages all over the pool, some in several rows; lengths from full to none, most of them ending inside a page."""
    (rows, most), (pages, size) = inputs["page_table"].shape, inputs["key_pages"].shape[:2]
    b, m, full = torch.arange(rows), torch.arange(most), most * size if pages else 0
    lengths = torch.where(b % 5 == 3, 0, (full - (b * 5) % max(full, 1)).clamp(min=0))
    return {"page_table": (5 * b[:, None] + 3 * m + b[:, None] // 2) % max(pages, 1), "lengths": lengths}


def full(inputs):
    """Every row has M pages of its own as long as there are any, in no order, all of them full."""
    (rows, most), (pages, size) = inputs["page_table"].shape, inputs["key_pages"].shape[:2]
    place = torch.arange(rows * most).reshape(rows, most)
    return {"page_table": place * 7919 % max(pages, 1), "lengths": torch.full((rows,), most * size if pages else 0)}


def _unseen(inputs):
    """What no row may look at: entries of the table behind the last page, and NaN in slots that are not used."""
    given = {**inputs, **shared(inputs)}
    table, lengths, size = given["page_table"], given["lengths"], given["key_pages"].shape[1]
    used = torch.zeros(given["key_pages"].shape[:2], dtype=torch.bool)
    for row, length in zip(table, lengths.tolist()):
        for j in range(length):
            used[row[j // size], j % size] = True
        row[-(-length // size) :] = -(10**12)
    lost = {name: given[name].masked_fill(~used[..., None, None], float("nan")) for name in ("key_pages", "value_pages")}
    return {**given, **lost}


def _peaked(inputs):
    """Scores in the hundreds: one key takes all."""
    return {**inputs, **full(inputs), "query": 20 * inputs["query"], "key_pages": 10 * inputs["key_pages"]}


def _rows(pages, page_table, length, group):
    """The keys of one row, "NH K D"."""
    size = pages.shape[1]
    count = -(-length // size) if length else 0
    rows = pages[page_table[:count]].reshape(count * size, *pages.shape[2:])[:length]
    return rows.transpose(0, 1).repeat_interleave(group, 0)


def _eager(query, key_pages, value_pages, page_table, lengths, scale=None, is_causal=False, return_lse=False):
    """Row by row."""
    group = query.shape[1] // max(key_pages.shape[2], 1)
    scale = max(query.shape[3], 1) ** -0.5 if scale is None else scale
    outs, lses = [], []
    for rows, table, length in zip(query, page_table, lengths.tolist()):
        key, value = (_rows(t, table, length, group) for t in (key_pages, value_pages))
        scores = rows @ key.mT * scale
        if is_causal:
            stands = length - rows.shape[1] + torch.arange(rows.shape[1], device=rows.device)
            scores = scores.masked_fill(torch.arange(length, device=rows.device) > stands[:, None], -torch.inf)
        outs.append(torch.softmax(scores, -1).nan_to_num(0.0) @ value)
        lses.append(torch.logsumexp(scores.to(torch.float64 if scores.dtype == torch.float64 else torch.float32), -1))
    out = torch.stack(outs) if outs else query.new_zeros(*query.shape[:3], value_pages.shape[3])
    lse = torch.stack(lses) if lses else out.new_zeros(query.shape[:3])
    return (out, lse) if return_lse else out


def _sdpa(query, key_pages, value_pages, page_table, lengths, **options):
    """The pages of rows of one length gathered, then torch's attention."""
    if options.get("is_causal") or options.get("return_lse") or len(set(lengths.tolist())) != 1:
        raise NotImplementedError("is_causal, return_lse or lengths that differ")
    count = -(-int(lengths[0]) // key_pages.shape[1])
    key, value = (
        t[page_table[:, :count]].flatten(1, 2)[:, : int(lengths[0])].transpose(1, 2).contiguous() for t in (key_pages, value_pages)
    )
    return F.scaled_dot_product_attention(query, key, value, scale=options.get("scale"), enable_gqa=query.shape[1] != key.shape[1])


def _sizes(B=3, NH=2, Q=1, P=6, S=4, M=3, D=4, V=None, NHk=None):
    return dict(B=B, NH=NH, NHk=NH if NHk is None else NHk, Q=Q, P=P, S=S, M=M, D=D, V=D if V is None else V)


def _wrong_heads(inputs, options):
    inputs["query"] = inputs["query"].new_zeros(3, 3, 1, 4)


def _replaced(name, values):
    def change(inputs, options):
        inputs[name] = torch.tensor(values)

    return change


def _pages(row, page):
    def change(inputs, options):
        inputs["page_table"][row, 0] = page

    return change


def _tokens(d):
    return d["B"] * (d["NH"] * d["Q"] + d["NHk"] * d["M"] * d["S"]) * (d["D"] + d["V"])


SPEC = OpSpec(
    name="paged_attention",
    function=paged_attention,
    inputs={
        "query": Input("B NH Q D"),
        "key_pages": Input("P S NHk D"),
        "value_pages": Input("P S NHk V"),
        "page_table": Input("B M", _zeros, torch.int64),
        "lengths": Input("B", _zeros, torch.int64),
    },
    samples=(
        Sample("typical", _sizes(), {}, (), shared),
        Sample("queries", _sizes(B=4, Q=5, D=5, V=3), {}, (), shared),
        Sample("groups", _sizes(NH=6, NHk=2, S=16, M=5, D=17), dict(scale=0.1, return_lse=True), (), shared),
        Sample("causal", _sizes(B=5, Q=3), dict(is_causal=True, return_lse=True), (), shared),
        Sample("many_rows", _sizes(NH=20, NHk=1, S=3, M=30, D=8), {}, (), shared),
        Sample("negative_scale", _sizes(NH=1, S=70, M=2), dict(scale=-0.5, return_lse=True), (), shared),
        Sample("runs", _sizes(B=2, NH=1, P=40, S=32, M=37, D=8), dict(return_lse=True), (), shared),
        Sample("one", _sizes(B=1, NH=1, P=1, S=1, M=1, D=1), {}, (), full),
        Sample("empty", _sizes(), dict(return_lse=True)),
        Sample("unseen", _sizes(B=4, Q=2), dict(return_lse=True), (), _unseen, hard=True),
        Sample("peaked", _sizes(B=1, P=9, M=9, D=16, Q=2), {}, (), _peaked, hard=True),
        Sample("near_equal", _sizes(B=1, NH=1, P=6, S=32, M=5, D=16), {}, (), near_equal("value_pages", after=full), hard=True),
        Sample("no_pages", _sizes(P=0), {}, (), shared),
        Sample("no_table", _sizes(M=0), dict(return_lse=True), (), shared),
    ),
    bench=(
        Sample("B32_K4096", _sizes(32, 8, 1, 8192, 16, 256, 64), {}, (), full),
        Sample("B32_K4096_groups", _sizes(32, 32, 1, 8192, 16, 256, 64, NHk=8), {}, (), full),
    ),
    peers={"eager": _eager, "sdpa": _sdpa},
    bytes=lambda d, s: s * _tokens(d),
    bytes_backward=lambda d, s: 2 * s * _tokens(d),
    errors=(
        ErrorCase("scale", lambda i, o: o.update(scale=-float("inf")), ValueError, r"scale: expected a finite number, got -inf"),
        ErrorCase("heads", _wrong_heads, ValueError, r"paged_attention: key_pages: expected a divisor of 3 heads, got .*6, 4, 2, 4"),
        ErrorCase("lengths", _replaced("lengths", [1, 13, 2]), ValueError, r"lengths: expected .*0\.\.M\*S=12, got 1\.\.13"),
        ErrorCase("rows", _replaced("lengths", [1, 3]), ValueError, r"paged_attention: lengths: expected \[B\] with .*B=3"),
        ErrorCase("high", _pages(1, 6), IndexError, r"page_table: expected pages in 0\.\.5, got 6"),
        ErrorCase("low", _pages(0, -1), IndexError, r"page_table: expected pages.*got -1 in row 0"),
        ErrorCase("dtype", _replaced("page_table", [[0.5] * 3] * 3), TypeError, r"page_table: expected int64 or int32, got float32"),
        ErrorCase("lengths_dtype", lambda i, o: i.update(lengths=i["lengths"].short()), TypeError, r"lengths: expected int64 or .*int16"),
    ),
    rows=(("query", 0),),
)  # fmt: skip
