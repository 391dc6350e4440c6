"""The spec of `merge_attention`."""

from __future__ import annotations

import torch

from memkernels.ops.merge_attention import merge_attention
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample


def _call(function, inputs, options):
    outs, lses, form = inputs["outs"], inputs["lses"], options.get("form")
    if form == "sequences" and len(outs):
        return function(list(outs), list(lses))
    if form == "one lead":
        return _unfolded(function(outs.flatten(1, 3), lses.flatten(1, 3)), lses)
    if form == "four leads":
        return _unfolded(function(outs.unsqueeze(2), lses.unsqueeze(2)), lses)
    return function(outs, lses)


def _unfolded(result, lses):
    """The leading dimensions of the spec again; what is no pair of tensors (a question about the call) stays."""
    if isinstance(result, dict) or not isinstance(result[0], torch.Tensor):
        return result
    out, lse = result
    return out.reshape(*lses.shape[1:], out.shape[-1]), lse.reshape(lses.shape[1:])


def _eager(outs, lses):
    outs, lses = (t if isinstance(t, torch.Tensor) else torch.stack(t) for t in (outs, lses))
    lse = torch.logsumexp(lses, 0)
    return ((lses - lse).exp().unsqueeze(-1) * outs).sum(0).to(outs.dtype), lse


def _blind(inputs):
    """The first part sees nothing and holds garbage; no part sees anything for the first query."""
    outs, lses = inputs["outs"].clone(), inputs["lses"].clone()
    lses[0], lses[..., :1] = -torch.inf, -torch.inf
    outs[0] = torch.nan
    return {"outs": outs, "lses": lses}


def _far(inputs):
    """One part outweighs the others by more than any dtype resolves, at a log-sum-exp of 1e6."""
    lses = inputs["lses"].clone()
    lses[-1] += 300
    return {**inputs, "lses": lses + 1e6}


def _sizes(S=3, B=2, NH=2, Q=3, V=4):
    return dict(S=S, B=B, NH=NH, Q=Q, V=V)


def _wrong_lses(inputs, options):
    inputs["lses"] = inputs["lses"].new_zeros(3, 2, 2, 4)


def _wrong_dtype(inputs, options):
    inputs["lses"] = inputs["lses"].half()


def _wrong_part(inputs, options):
    inputs["outs"] = [inputs["outs"][0], inputs["outs"][1][..., :3]]


def _no_part(inputs, options):
    inputs["outs"] = []


SPEC = OpSpec(
    name="merge_attention",
    function=merge_attention,
    inputs={"outs": Input("S B NH Q V"), "lses": Input("S B NH Q", wide=True)},
    samples=(
        Sample("typical", _sizes()),
        Sample("sequences", _sizes(S=2, V=5), dict(form="sequences")),
        Sample("one", _sizes(1, 1, 1, 1, 1)),
        Sample("one_lead", _sizes(Q=1), dict(form="one lead")),
        Sample("four_leads", _sizes(V=3), dict(form="four leads")),
        Sample("rows", _sizes(S=4, B=1, Q=67, V=19)),
        Sample("many", _sizes(S=17, Q=2, V=33)),
        Sample("wide", _sizes(B=1, NH=1, V=300)),
        Sample("blind", _sizes(), twist=_blind, hard=True),
        Sample("far", _sizes(Q=20), twist=_far, hard=True),
        Sample("no_parts", _sizes(S=0)),
        Sample("no_batch", _sizes(B=0)),
        Sample("no_heads", _sizes(NH=0)),
        Sample("no_queries", _sizes(Q=0)),
        Sample("no_width", _sizes(V=0)),
    ),
    bench=(Sample("S4_B4_Q1024", _sizes(4, 4, 8, 1024, 64)), Sample("S4_B4_Q1024_list", _sizes(4, 4, 8, 1024, 64), dict(form="sequences"))),
    peers={"eager": _eager},
    bytes=lambda d, s: d["B"] * d["NH"] * d["Q"] * ((d["S"] + 1) * (d["V"] * s + 4)),
    bytes_backward=lambda d, s: d["B"] * d["NH"] * d["Q"] * ((2 * d["S"] + 1) * (d["V"] * s + 4)),
    call=_call,
    errors=(
        ErrorCase("lses", _wrong_lses, ValueError, r"merge_attention: lses: expected .*Q=3.*got .*4"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"merge_attention: lses: expected float64, got float16"),
        ErrorCase("part", _wrong_part, ValueError, r"merge_attention: outs\[1\]: expected shape \(2, 2, 3, 4\).*got \(2, 2, 3, 3\)"),
        ErrorCase("none", _no_part, ValueError, r"merge_attention: outs: expected at least one tensor, got an empty sequence"),
    ),
    rows=(("outs", 1), ("lses", 1)),
)
