"""The spec of `quantized_attention`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memkernels.ops.attention import attention
from memkernels.ops.quantized_attention import quantized_attention
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample


def _rows(shape, dtype, generator):
    return torch.randint(-127, 128, shape, generator=generator)


def _scale(shape, dtype, generator):
    return 0.005 + 0.02 * torch.rand(shape, generator=generator)


def _lengths(shape, dtype, generator):
    return torch.zeros(shape, dtype=torch.int64)  # the twists know K


def _call(function, inputs, options):
    """The scales have float32, which a float64 query wants as float64."""
    wide = torch.float64 if inputs["query"].dtype == torch.float64 else torch.float32
    return function(**{name: t.to(wide) if name.endswith("_scale") else t for name, t in inputs.items()}, **options)


def _floating(query, rows, scale):
    """The memory as floating rows, for each query head."""
    rows = (rows * scale[..., None]).to(query.dtype)
    return rows.repeat_interleave(query.shape[1] // max(rows.shape[1], 1), 1)


def _eager(query, key, value, key_scale, value_scale, lengths_k=None, scale=None, return_lse=False):
    scale = max(query.shape[-1], 1) ** -0.5 if scale is None else scale
    scores = query @ _floating(query, key, key_scale).mT * scale
    if lengths_k is not None:
        scores = scores.masked_fill(torch.arange(key.shape[2]) >= lengths_k[:, None, None, None], -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num() @ _floating(query, value, value_scale)
    return (out, torch.logsumexp(scores, -1)) if return_lse else out


def _widened(function):
    """`function` of the memory as floating rows."""

    def call(query, key, value, key_scale, value_scale, lengths_k=None, scale=None, return_lse=False):
        if lengths_k is not None or return_lse:
            raise NotImplementedError("lengths_k, return_lse")
        return function(query, _floating(query, key, key_scale), _floating(query, value, value_scale), scale=scale)

    return call


def _set_lengths(*lengths):
    """These lengths, over and over, none beyond K."""

    def twist(inputs):
        given = torch.tensor([lengths[b % len(lengths)] for b in range(len(inputs["query"]))], dtype=torch.int64)
        return {**inputs, "lengths_k": given.clamp(max=inputs["key"].shape[2])}

    return twist


def _unseen_nan(inputs):
    """Scales beyond the lengths are NaN."""
    inputs = _set_lengths(3, 0, 5)(inputs)
    lengths = inputs["lengths_k"]
    beyond = torch.arange(inputs["key"].shape[2]) >= lengths[:, None, None]
    return {**inputs, **{name: inputs[name].masked_fill(beyond, torch.nan) for name in ("key_scale", "value_scale")}}


def _peaked(inputs):
    """Scores in the hundreds: one key takes all."""
    return {**inputs, "query": 100 * inputs["query"]}


def _zero_rows(inputs):
    """Rows of zeros, as quantize_rows writes them."""
    return {**inputs, "key": inputs["key"] * 0, "key_scale": inputs["key_scale"] * 0}


def _sizes(B=2, NH=2, Q=3, K=7, D=4, V=None, NHk=None):
    return dict(B=B, NH=NH, NHk=NH if NHk is None else NHk, Q=Q, K=K, D=D, V=D if V is None else V)


def _change(name, change):
    def apply(inputs, options):
        inputs[name] = change(inputs[name])

    return apply


def _bytes(d, s):
    return d["B"] * (s * d["NH"] * d["Q"] * (d["D"] + d["V"]) + d["NHk"] * d["K"] * (d["D"] + d["V"] + 8))


_LENGTHS = ("lengths_k",)
SPEC = OpSpec(
    name="quantized_attention",
    function=quantized_attention,
    inputs={
        "query": Input("B NH Q D"),
        "key": Input("B NHk K D", _rows, torch.int8),
        "value": Input("B NHk K V", _rows, torch.int8),
        "key_scale": Input("B NHk K", _scale, torch.float32),
        "value_scale": Input("B NHk K", _scale, torch.float32),
        "lengths_k": Input("B", _lengths, torch.int64, optional=True),
    },
    samples=(
        Sample("typical", _sizes(), dict(return_lse=True)),
        Sample("groups", _sizes(B=1, NH=6, NHk=2, Q=2, K=20, D=19, V=3)),
        Sample("lengths", _sizes(), dict(return_lse=True, scale=0.3), _LENGTHS, _set_lengths(4, 1, 5, 0)),
        Sample("lengths_edge", _sizes(B=5, NH=1, K=70), dict(return_lse=True), _LENGTHS, _set_lengths(0, 1, 70, 64, 65)),
        Sample("unseen_nan", _sizes(), dict(return_lse=True), _LENGTHS, _unseen_nan),
        Sample("one", _sizes(B=1, NH=1, Q=1, K=1, D=1)),
        Sample("tiles", _sizes(B=1, NH=1, Q=5, K=130, D=65, V=33), dict(return_lse=True)),
        Sample("many_queries", _sizes(B=1, NH=2, NHk=1, Q=37, K=66, D=5)),
        Sample("splits", _sizes(B=1, NH=1, Q=2, K=4200, D=3), dict(return_lse=True)),
        Sample("peaked", _sizes(K=40, D=16), dict(return_lse=True), twist=_peaked, hard=True),
        Sample("zero_rows", _sizes(), dict(return_lse=True), twist=_zero_rows),
        Sample("negative_scale", _sizes(K=20), dict(scale=-0.5)),
        Sample("no_batch", _sizes(B=0)),
        Sample("no_heads", _sizes(NH=0)),
        Sample("no_queries", _sizes(Q=0)),
        Sample("no_keys", _sizes(K=0), dict(return_lse=True)),
        Sample("no_width", _sizes(D=0, V=4)),
        Sample("no_value_width", _sizes(V=0), dict(return_lse=True)),
    ),
    bench=(Sample("Q4_K65536", _sizes(1, 8, 4, 65536, 64)),),
    peers={"eager": _eager, "sdpa": _widened(F.scaled_dot_product_attention), "attention": _widened(attention)},
    bytes=_bytes,
    bytes_backward=_bytes,
    call=_call,
    errors=(
        ErrorCase("scale", lambda i, o: o.update(scale=float("nan")), ValueError, r"scale: expected a finite number, got nan"),
        ErrorCase("key", _change("key", lambda t: t[..., :3]), ValueError, r"quantized_attention: key: expected .*D=4.*got .*3\)"),
        ErrorCase("scale", _change("key_scale", lambda t: t[..., :3]), ValueError, r"quantized_attention: key_scale: expected .*got .*3\)"),
        ErrorCase("heads", _change("query", lambda t: t.new_zeros(2, 3, 3, 4)), ValueError, r"key: expected a divisor of 3 heads, got"),
        ErrorCase("dtype", _change("value", lambda t: t.float()), TypeError, r"quantized_attention: value: expected int8, got float32"),
        ErrorCase("lengths", _change("lengths_k", lambda t: torch.ones(2)), TypeError, r"lengths_k: expected int64 or int32, got float32"),
        ErrorCase("range", _change("lengths_k", lambda t: torch.tensor([0, 99])), ValueError, r"lengths_k: expected values in 0..K=.*99"),
        ErrorCase(
            "flag", lambda i, o: o.update(return_lse=1), TypeError, r"quantized_attention: return_lse: expected True or False, got 1"
        ),
    ),
    rows=(("query", 0),),
)
