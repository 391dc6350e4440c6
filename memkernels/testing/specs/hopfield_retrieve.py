"""The spec of `hopfield_retrieve`."""

from __future__ import annotations

import torch

from memkernels.ops.hopfield_retrieve import hopfield_retrieve
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, mostly, unit


def _eager(query, key, beta, value=None, mask=None, steps=1, tolerance=None, return_weights=False):
    """The loop that packages for Hopfield networks run, without their wait for the device after each step."""
    factor = beta[..., None] if isinstance(beta, torch.Tensor) and beta.dim() else beta
    hidden = None if mask is None else ~mask[:, None]

    def weights_of(xi):
        scores = factor * (xi @ key.mT)
        return torch.softmax(scores if hidden is None else scores.masked_fill(hidden, -torch.inf), -1)

    moving = None
    for _ in range(steps - 1):
        found = weights_of(query) @ key
        if moving is not None:
            found = torch.where(moving, found, query)
        if tolerance:
            far = (found - query).norm(dim=-1, keepdim=True) >= tolerance
            moving = far if moving is None else moving & far
        query = found
    weights = weights_of(query)
    read = weights @ (key if value is None else value)
    return (read, weights) if return_weights else read


def _call(function, inputs, options):
    """A number as beta is an option, a tensor an input."""
    beta = inputs.get("beta")
    rest = {name: t for name, t in inputs.items() if name != "beta"}
    return function(**rest, **{**options, "beta": options.get("beta") if beta is None else beta})


def _near_patterns(inputs):
    """Even queries start at a pattern, where they come to rest, the others between all of them."""
    query, key = inputs["query"], inputs["key"]
    key = 6 * key / key.norm(dim=-1, keepdim=True).clamp(min=0.1)
    query[:, ::2] = key[:, : query.shape[1]][:, ::2][:, : query[:, ::2].shape[1]]
    return {**inputs, "key": key, "query": query}


def _hidden_nan(inputs):
    inputs["key"][~inputs["mask"]], inputs["value"][~inputs["mask"]] = torch.nan, torch.inf
    return inputs


def _none_seen(inputs):
    inputs["mask"][0] = False
    return inputs


def _sharp(inputs):
    """Scores in the thousands."""
    return {**inputs, "query": 30 * inputs["query"], "key": 20 * inputs["key"]}


def _sizes(B=2, Q=3, N=5, D=4, V=4):
    return dict(B=B, Q=Q, N=N, D=D, V=V)


def _wrong_value(inputs, options):
    inputs["value"] = inputs["key"].new_zeros(2, 6, 3)


def _wrong_beta(inputs, options):
    inputs["beta"] = inputs["query"].new_zeros(2, 4)


BENCH = _sizes(8, 512, 1024, 64, 64)
SPEC = OpSpec(
    name="hopfield_retrieve",
    function=hopfield_retrieve,
    inputs={
        "query": Input("B Q D"),
        "key": Input("B N D"),
        "beta": Input("B Q", unit, optional=True),
        "value": Input("B N V", optional=True),
        "mask": Input("B N", mostly(0.7), torch.bool, optional=True),
    },
    samples=(
        Sample("typical", _sizes(), dict(beta=0.7, steps=3)),
        Sample("everything", _sizes(N=9, V=3), dict(steps=3, tolerance=1e-3, return_weights=True), ("beta", "value", "mask")),
        Sample("one_step", _sizes(N=7), dict(beta=0.5)),
        Sample("rest", _sizes(Q=6, N=8), dict(beta=1.0, steps=5, tolerance=0.02), (), _near_patterns),
        Sample("odd", _sizes(Q=37, N=150, D=19, V=35), dict(beta=0.2, steps=2), ("value", "mask")),
        Sample("few", _sizes(B=1, Q=2, N=300, D=16), dict(steps=2), ("beta",)),
        Sample("hidden_nan", _sizes(N=9, V=3), dict(beta=0.4, steps=2, return_weights=True), ("value", "mask"), _hidden_nan, hard=True),
        Sample("none_seen", _sizes(), dict(beta=0.4, steps=2), ("mask",), _none_seen, hard=True),
        Sample("sharp", _sizes(Q=5, N=20), dict(beta=1.0, steps=3), (), _sharp, hard=True),
        Sample("no_patterns", _sizes(N=0), dict(beta=1.0, steps=2)),
        Sample("no_width", _sizes(D=0), dict(beta=1.0, steps=2, return_weights=True), ("value",)),
    ),
    bench=(Sample("B8_Q512_N1024_D64_steps5", BENCH, dict(beta=0.125, steps=5)),),
    peers={"eager": _eager},
    call=_call,
    bytes=lambda d, s: s * d["B"] * (d["Q"] * (d["D"] + d["V"]) + d["N"] * (d["D"] + d["V"])),
    bytes_backward=lambda d, s: 2 * s * d["B"] * (d["Q"] * (d["D"] + d["V"]) + d["N"] * (d["D"] + d["V"])),
    errors=(
        ErrorCase("value", _wrong_value, ValueError, r"hopfield_retrieve: value: expected .*N=5.*got .*6"),
        ErrorCase("beta", _wrong_beta, ValueError, r"hopfield_retrieve: beta: expected .*Q=3.*got .*4\)"),
        ErrorCase("no_beta", lambda i, o: o.update(beta=None), TypeError, r"hopfield_retrieve: beta: expected a number, got NoneType"),
        ErrorCase("far_beta", lambda i, o: o.update(beta=float("inf")), ValueError, r"hopfield_retrieve: beta: expected a finite number"),
        ErrorCase("steps", lambda i, o: o.update(steps=0), ValueError, r"hopfield_retrieve: steps: expected at least 1, got 0"),
        ErrorCase("tolerance", lambda i, o: o.update(tolerance=-1.0), ValueError, r"hopfield_retrieve: tolerance: expected .*got -1"),
    ),
    rows=(("query", 0), ("key", 0)),
)
