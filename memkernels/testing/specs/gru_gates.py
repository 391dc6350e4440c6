"""The spec of `gru_gates`."""

from __future__ import annotations

import torch

from memkernels.ops.gru_gates import gru_gates
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample


def _eager(gates_input, gates_hidden, hidden):
    xr, xz, xn = gates_input.chunk(3, -1)
    hr, hz, hn = gates_hidden.chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    return (1 - z) * torch.tanh(xn + r * hn) + z * hidden


def _saturate(tensors):
    return {"gates_input": tensors["gates_input"] * 40}


def _wrong_gates(inputs, options):
    inputs["gates_hidden"] = inputs["gates_hidden"][:, :-1]


def _wrong_hidden(inputs, options):
    inputs["hidden"] = inputs["hidden"][:, :-1]


def _wrong_dtype(inputs, options):
    inputs["hidden"] = inputs["hidden"].long()


SPEC = OpSpec(
    name="gru_gates",
    function=gru_gates,
    inputs={"gates_input": Input("B 3H"), "gates_hidden": Input("B 3H"), "hidden": Input("B H")},
    samples=(
        Sample("typical", dict(B=3, H=5)),
        Sample("one", dict(B=1, H=1)),
        Sample("odd", dict(B=7, H=37)),
        Sample("wide", dict(B=5, H=67)),
        Sample("saturated", dict(B=2, H=19), twist=_saturate, hard=True),
        Sample("no_batch", dict(B=0, H=4)),
        Sample("no_hidden", dict(B=2, H=0)),
    ),
    bench=(Sample("B32_H512", dict(B=32, H=512)), Sample("B4096_H512", dict(B=4096, H=512))),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * d["H"] * 8,
    bytes_backward=lambda d, s: s * d["B"] * d["H"] * 15,
    errors=(
        ErrorCase("gates", _wrong_gates, ValueError, r"gru_gates: gates_hidden: expected \[B 3H\] with B=3, H=5, got shape \(3, 14\)"),
        ErrorCase("hidden", _wrong_hidden, ValueError, r"gru_gates: hidden: expected \[B H\] with B=3, H=5, got shape \(3, 4\)"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"gru_gates: hidden: expected .*float64.*got .*int64"),
    ),
    rows=(("gates_input", 0), ("gates_hidden", 0), ("hidden", 0)),
)
