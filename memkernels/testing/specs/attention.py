"""The spec of `attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memkernels.ops.attention import attention
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, mostly


def _call(function, inputs, options):
    given = dict(inputs)
    visible = given.pop("visible", None)  # a boolean mask, which the function takes as attn_mask
    if visible is not None:
        given["attn_mask"] = visible
    if options.get("dropout_p"):
        torch.manual_seed(0)  # every call drops the same weights
    return function(**given, **options)


def _sdpa(query, key, value, attn_mask=None, visible=None, **options):
    options = _without_plain(options)
    mask = visible if attn_mask is None else attn_mask
    return F.scaled_dot_product_attention(query, key, value, mask, **options)


def _eager(query, key, value, attn_mask=None, is_causal=False, scale=None, enable_gqa=False, **options):
    _without_plain(options)
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * (max(query.shape[-1], 1) ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores.masked_fill(~torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril(), -torch.inf)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, -1) @ value


_PLAIN = {"window": None, "causal": "top-left", "return_lse": False, "softcap": None, "sink": None, "lengths_k": None}


def _without_plain(options):
    """The options that torch has too; the others must be as in the plain formula."""
    lacking = [name for name, plain in _PLAIN.items() if options.get(name, plain) != plain]
    if lacking:
        raise NotImplementedError(", ".join(lacking))
    return {name: given for name, given in options.items() if name not in _PLAIN}


def _blind(inputs):
    """The first query sees nothing."""
    name = "visible" if inputs["visible"] is not None else "attn_mask"
    mask = inputs[name].clone()
    mask[..., :1, :] = False if mask.dtype == torch.bool else -torch.inf
    return {**inputs, name: mask}


def _shared(*axes):
    """The mask has size 1 along these axes: it broadcasts."""

    def twist(inputs):
        name = "visible" if inputs["visible"] is not None else "attn_mask"
        mask = inputs[name]
        for axis in axes:
            mask = mask.narrow(axis, 0, 1)
        return {**inputs, name: mask}

    return twist


def _peaked(inputs):
    """Scores in the hundreds: one key takes all."""
    return {**inputs, "query": 20 * inputs["query"], "key": 10 * inputs["key"]}


def near_equal(*names, after=None):
    """A twist that makes all rows of these inputs nearly the same: what a query's score can change is little beside what it sees."""

    def twist(inputs):
        made = {**inputs, **(after(inputs) if after else {})}
        for name in names:
            rows = made[name]
            made[name] = (torch.linspace(-2, 3, rows.shape[-1]).to(rows) + 1e-3 * rows).to(rows.dtype)
        return made

    return twist


def _lengths(shape, dtype, generator):
    """Lengths; a twist brings K in."""
    return torch.arange(shape[0])


def _ragged(tensors):
    """Lengths from K down to 0 in steps of about a third: a full row, partial ones, an empty one."""
    batch, keys = tensors["key"].shape[0], tensors["key"].shape[2]
    return {"lengths_k": torch.tensor([max(keys - b * ((keys + 2) // 3), 0) for b in range(batch)], dtype=torch.int64)}


def _ragged_blind(inputs):
    return _blind({**inputs, **_ragged(inputs)})


def _deep_sink(inputs):
    """One head's sink takes all, another's nothing."""
    sink = inputs["sink"].clone()
    sink[0], sink[-1] = 60, -60
    return {**inputs, "sink": sink}


def _masked(value, rows=slice(None), keys=slice(None)):
    """The additive mask is `value`, or the lowest number of its dtype, for these queries and keys."""

    def twist(inputs):
        mask = inputs["attn_mask"].clone()
        mask[..., rows, keys] = max(value, torch.finfo(mask.dtype).min)
        return {**inputs, "attn_mask": mask}

    return twist


def _far(share):
    """Scores of about 1e7; each run of `share` keys has the same ones, and differs where the query is 0.

    So weights are 1 / share in any dtype, while no gradient is a sum that cancels.
    """

    def twist(inputs):
        query, key, half = 4e3 * inputs["query"], 2e3 * inputs["key"], inputs["key"].shape[-1] // 2
        query[..., half:] = 0
        n = key.shape[-2] // share * share
        key[..., :n, :half] = key[..., :n:share, :half].repeat_interleave(share, -2)
        return {**inputs, "query": query, "key": key}

    return twist


LOWEST = -1.8e308
_SOME = dict(window=(250, 40), causal="bottom-right", enable_gqa=True, return_lse=True)
_EVERY = dict(softcap=2.0, window=(9, 1), causal="bottom-right", enable_gqa=True, return_lse=True)


def _sizes(B=2, NH=2, Q=5, K=7, D=4, V=None, NHk=None):
    return dict(B=B, NH=NH, NHk=NH if NHk is None else NHk, Q=Q, K=K, D=D, V=D if V is None else V)


def _wrong_width(inputs, options):
    inputs["key"] = inputs["key"].new_zeros(*inputs["key"].shape[:3], inputs["key"].shape[3] + 1)


def _wrong_heads(inputs, options):
    inputs["query"] = inputs["query"].new_zeros(2, 3, 5, 4)


def _wrong_mask(inputs, options):
    inputs["attn_mask"] = inputs["query"].new_zeros(5, 6)


def _wrong_mask_dtype(inputs, options):
    inputs["attn_mask"] = inputs["query"].new_zeros(5, 7).long()


def _wrong_sink(inputs, options):
    inputs["sink"] = inputs["query"].new_zeros(3)


def _wrong_sink_dtype(inputs, options):
    inputs["sink"] = torch.zeros(2, dtype=torch.int64)


def _wrong_lengths(inputs, options):
    inputs["lengths_k"] = torch.tensor([7, 8])


def _wrong_lengths_dtype(inputs, options):
    inputs["lengths_k"] = torch.tensor([7, 7], dtype=torch.int16)


def _wrong_dtype(inputs, options):
    inputs["value"] = inputs["value"].long()


SPEC = OpSpec(
    name="attention",
    function=attention,
    inputs={
        "query": Input("B NH Q D"),
        "key": Input("B NHk K D"),
        "value": Input("B NHk K V"),
        "attn_mask": Input("B NH Q K", optional=True),
        "visible": Input("B NH Q K", mostly(0.6), torch.bool, optional=True),
        "sink": Input("NH", optional=True),
        "lengths_k": Input("B", _lengths, torch.int64, optional=True),
    },
    samples=(
        Sample("typical", _sizes()),
        Sample("causal", _sizes(Q=9, K=9), dict(is_causal=True)),
        Sample("lse", _sizes(Q=3, K=5), dict(return_lse=True)),
        Sample("one", _sizes(B=1, NH=1, Q=1, K=1, D=1)),
        Sample("wide_value", _sizes(Q=6, K=19, D=5, V=21), dict(scale=0.3)),
        Sample("groups", _sizes(B=1, NH=6, NHk=2, Q=4, K=6, D=3), dict(enable_gqa=True, return_lse=True)),
        Sample("float_mask", _sizes(), present=("attn_mask",)),
        Sample("shared_mask", _sizes(), dict(is_causal=True), ("attn_mask",), _shared(0, 1)),
        Sample("key_mask", _sizes(), {}, ("attn_mask",), _shared(1, 2)),
        Sample("row_mask", _sizes(), {}, ("attn_mask",), _shared(0, 3)),
        Sample("bool_mask", _sizes(), present=("visible",)),
        Sample("padding", _sizes(), {}, ("visible",), _shared(1, 2)),
        Sample("blind", _sizes(), dict(return_lse=True), ("visible",), _blind),
        Sample("blind_float", _sizes(), dict(return_lse=True), ("attn_mask",), _blind),
        Sample("bottom_right", _sizes(Q=3, K=8), dict(is_causal=True, causal="bottom-right")),
        Sample("bottom_right_blind", _sizes(Q=8, K=3), dict(is_causal=True, causal="bottom-right", return_lse=True)),
        Sample("window", _sizes(Q=9, K=8), dict(window=(2, 1))),
        Sample("window_causal", _sizes(Q=5, K=17), dict(window=(3, None), is_causal=True, causal="bottom-right")),
        Sample("softcap", _sizes(Q=6, K=9), dict(softcap=1.5, is_causal=True)),
        Sample("softcap_mask", _sizes(Q=4, K=20, D=5, V=3), dict(softcap=2.0, scale=-0.7, return_lse=True), ("attn_mask",), _shared(0)),
        Sample("sink", _sizes(Q=6, K=5), dict(window=(1, 0), return_lse=True), ("sink",)),
        Sample("sink_blind", _sizes(Q=3), dict(return_lse=True), ("sink", "visible"), _blind),
        Sample("sink_row_mask", _sizes(), dict(softcap=3.0, return_lse=True), ("sink", "attn_mask"), _shared(0, 3)),
        Sample("sink_no_keys", _sizes(K=0), dict(return_lse=True), ("sink",)),
        Sample("lengths", _sizes(B=4, Q=3, K=10), dict(return_lse=True), ("lengths_k",), _ragged),
        Sample(
            "lengths_end", _sizes(B=4, Q=5, K=9), dict(is_causal=True, causal="bottom-right"), ("lengths_k", "attn_mask"), _ragged_blind
        ),
        Sample("every", _sizes(3, 4, 7, 20, 5, 3, NHk=2), _EVERY, ("attn_mask", "sink", "lengths_k"), _ragged),
        Sample("every_block", _sizes(2, 2, 70, 300, 40, 24), {**_EVERY, "window": (150, 20)}, ("sink", "lengths_k"), _ragged),
        Sample("every_few", _sizes(2, 2, 2, 2100, 8), dict(softcap=2.0), ("sink", "lengths_k", "visible"), _ragged),
        Sample("deep_sink", _sizes(Q=6, K=40, D=16), dict(return_lse=True), ("sink",), _deep_sink, hard=True),
        Sample("capped", _sizes(Q=6, K=40, D=16), dict(softcap=20.0, return_lse=True), twist=_peaked, hard=True),
        Sample("blocks", _sizes(B=1, Q=131, K=149, D=17), dict(is_causal=True, return_lse=True)),
        Sample("blocks_mask", _sizes(B=1, NH=3, Q=70, K=200, D=64, V=40), dict(return_lse=True), ("attn_mask",), _shared(1)),
        Sample("few_queries", _sizes(B=1, Q=2, K=2100, D=8), dict(return_lse=True)),
        Sample("some_queries", _sizes(2, 4, 19, 300, 20, 17, 2), _SOME, ("sink", "lengths_k"), _ragged),
        Sample("wide", _sizes(B=1, NH=1, Q=3, K=35, D=300, V=270)),
        Sample("peaked", _sizes(Q=6, K=40, D=16), dict(return_lse=True), twist=_peaked, hard=True),
        Sample("near_equal", _sizes(1, 1, 20, 20, 16), dict(is_causal=True, return_lse=True), (), near_equal("value"), hard=True),
        Sample("lowest_rows", _sizes(), dict(return_lse=True), ("attn_mask",), _masked(LOWEST, slice(2)), hard=True),
        Sample("lowest_keys", _sizes(K=9), {}, ("attn_mask",), _masked(LOWEST, keys=slice(0, None, 2)), hard=True),
        Sample("lowest_late", _sizes(Q=40, K=300, D=8), {}, ("attn_mask",), _masked(LOWEST, keys=slice(130)), hard=True),
        Sample("lowest_blocks", _sizes(B=1, Q=40, K=600, D=16), {}, ("attn_mask",), _masked(LOWEST), hard=True),
        Sample("mask_1e9", _sizes(Q=3, K=200), {}, ("attn_mask",), _masked(-1e9), hard=True),
        Sample("mask_1e38", _sizes(Q=20, K=64), dict(window=(40, 30)), ("attn_mask",), _masked(-1e38), hard=True),
        Sample("mask_1e38_few", _sizes(B=1, Q=2, K=2100, D=8), {}, ("attn_mask",), _masked(-1e38), hard=True),
        Sample("far", _sizes(B=1, Q=20, K=300, D=16), dict(return_lse=True), twist=_far(2), hard=True),
        Sample("far_equal", _sizes(B=1, Q=20, K=300, D=16), twist=_far(300), hard=True),
        Sample("far_few", _sizes(B=1, Q=2, K=300, D=16), twist=_far(300), hard=True),
        Sample("far_few_mask", _sizes(B=1, Q=2, K=300, D=16), {}, ("attn_mask",), _far(2), hard=True),
        Sample("no_batch", _sizes(B=0)),
        Sample("no_heads", _sizes(NH=0)),
        Sample("no_queries", _sizes(Q=0)),
        Sample("no_keys", _sizes(K=0), dict(return_lse=True)),
        Sample("no_width", _sizes(D=0, V=4)),
        Sample("no_value_width", _sizes(V=0), dict(return_lse=True)),
    ),
    bench=(
        Sample("B2_S1024", _sizes(2, 8, 1024, 1024, 64)),
        Sample("B2_S1024_causal", _sizes(2, 8, 1024, 1024, 64), dict(is_causal=True)),
        Sample("B1_S4096", _sizes(1, 8, 4096, 4096, 64)),
        Sample("B1_S4096_causal", _sizes(1, 8, 4096, 4096, 64), dict(is_causal=True)),
        Sample("B2_S1024_mask", _sizes(2, 8, 1024, 1024, 64), {}, ("attn_mask",), _shared(0)),
        Sample("B2_S1024_V96", _sizes(2, 8, 1024, 1024, 64, 96)),
        Sample("Q4_K65536", _sizes(1, 8, 4, 65536, 64)),
    ),
    peers={"eager": _eager, "sdpa": _sdpa},
    bytes=lambda d, s: s * d["B"] * (d["NH"] * d["Q"] * (d["D"] + d["V"]) + d["NHk"] * d["K"] * (d["D"] + d["V"])),
    bytes_backward=lambda d, s: 2 * s * d["B"] * (d["NH"] * d["Q"] * (d["D"] + d["V"]) + d["NHk"] * d["K"] * (d["D"] + d["V"])),
    call=_call,
    errors=(
        ErrorCase("scale", lambda i, o: o.update(scale=float("nan")), ValueError, r"attention: scale: expected a finite number, got nan"),
        ErrorCase("width", _wrong_width, ValueError, r"attention: key: expected .*D=4.*got .*5"),
        ErrorCase("heads", _wrong_heads, ValueError, r"attention: key: expected 3 heads.*got .*2, 2, 7, 4"),
        ErrorCase("mask", _wrong_mask, ValueError, r"attention: attn_mask: expected .*\(2, 2, 5, 7\), got .*\(5, 6\)"),
        ErrorCase("mask_dtype", _wrong_mask_dtype, TypeError, r"attention: attn_mask: expected bool or floating, got int64"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"attention: value: expected .*float64.*got .*int64"),
        ErrorCase("dropout", lambda i, o: o.update(dropout_p=1.5), ValueError, r"attention: dropout_p: expected .*got 1.5"),
        ErrorCase("corner", lambda i, o: o.update(causal="left"), ValueError, r"attention: causal: expected .*'top-left'.*got 'left'"),
        ErrorCase("softcap", lambda i, o: o.update(softcap=0.0), ValueError, r"attention: softcap: expected .*above 0.*got 0.0"),
        ErrorCase("sink", _wrong_sink, ValueError, r"attention: sink: expected .*NH=2, got shape \(3,\)"),
        ErrorCase("sink_dtype", _wrong_sink_dtype, TypeError, r"attention: sink: expected a floating dtype, got int64"),
        ErrorCase("lengths", _wrong_lengths, ValueError, r"attention: lengths_k: expected values in 0..K=7, got 7..8"),
        ErrorCase("lengths_dtype", _wrong_lengths_dtype, TypeError, r"attention: lengths_k: expected int64 or int32, got int16"),
        ErrorCase("window", lambda i, o: o.update(window=(-2, 0)), ValueError, r"attention: window: expected .*got \(-2, 0\)"),
    ),
    gaps=(
        "On a GPU, lengths_k outside 0..K are clamped instead of refused.",
        "In half precision, where a query sees over 128 keys of nearly equal values, `out` rounded shows in the gradients of its scores.",
    ),
    rows=(("query", 0), ("key", 0), ("value", 0)),
)
