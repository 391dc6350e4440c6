"""The spec of `usage`."""

from __future__ import annotations

import torch

from memkernels.ops.usage import usage
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution, unit


def _call(function, inputs, options):
    """The gradient of the write weights is let through unless a call says otherwise: every input has one to check."""
    return function(**inputs, **{"write_gradient": True, **options})


def _eager(usage, write_weights, read_weights, free_gate, write_gradient=False):
    written = write_weights if write_gradient else write_weights.detach()
    usage = usage + (1 - usage) * (1 - torch.prod(1 - written, 1))
    return usage * torch.prod(1 - free_gate[..., None] * read_weights, 1)


def _ends(inputs):
    """Rows in full use and in none; a head that writes one row alone; heads that free all they read."""
    usage, write, read, free = (inputs[name].clone() for name in ("usage", "write_weights", "read_weights", "free_gate"))
    usage[:, 0], usage[:, 1:3], free[:, :2] = 1, 0, 1
    write[:, 0], read[:, :2] = 0, 0
    write[:, 0, 2], read[:, :2, 0] = 1, 1
    return dict(usage=usage, write_weights=write, read_weights=read, free_gate=free)


def _wrong_heads(inputs, options):
    inputs["free_gate"] = inputs["free_gate"].new_zeros(2, 4)


def _wrong_dtype(inputs, options):
    inputs["read_weights"] = inputs["read_weights"].half()


def _wrong_flag(inputs, options):
    options["write_gradient"] = "yes"


SPEC = OpSpec(
    name="usage",
    function=usage,
    inputs={
        "usage": Input("B N", unit),
        "write_weights": Input("B H N", distribution),
        "read_weights": Input("B R N", distribution),
        "free_gate": Input("B R", unit),
    },
    samples=(
        Sample("typical", dict(B=2, N=5, H=2, R=3)),
        Sample("ends", dict(B=2, N=5, H=2, R=3), twist=_ends),
        Sample("odd", dict(B=3, N=37, H=1, R=5)),
        Sample("no_heads", dict(B=2, N=5, H=0, R=0)),
    ),
    bench=(Sample("B32_N1024", dict(B=32, N=1024, H=1, R=4)),),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * d["N"] * (2 + d["H"] + d["R"]),
    bytes_backward=lambda d, s: s * d["B"] * d["N"] * (3 + d["H"] + 2 * d["R"]),
    call=_call,
    errors=(
        ErrorCase("heads", _wrong_heads, ValueError, r"usage: free_gate: expected .*R=3.*got .*4"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"usage: read_weights: expected float64, got float16"),
        ErrorCase("flag", _wrong_flag, TypeError, r"usage: write_gradient: expected True or False, got 'yes'"),
    ),
    rows=(("usage", 0), ("write_weights", 0), ("read_weights", 0), ("free_gate", 0)),
)
