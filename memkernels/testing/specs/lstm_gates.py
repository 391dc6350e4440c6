"""The spec of `lstm_gates`."""

from __future__ import annotations

import torch

from memkernels.ops.lstm_gates import lstm_gates
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample


def _eager(gates, cell, peephole=None):
    zi, zf, zg, zo = gates.chunk(4, -1)
    pi, pf, po = (0.0, 0.0, 0.0) if peephole is None else peephole.unbind(0)
    c = torch.sigmoid(zf + pf * cell) * cell + torch.sigmoid(zi + pi * cell) * torch.tanh(zg)
    return torch.sigmoid(zo + po * c) * torch.tanh(c), c


def _saturate(tensors):
    return {"gates": tensors["gates"] * 40}


def _wrong_gates(inputs, options):
    inputs["gates"] = inputs["gates"].new_zeros(2, 13)


def _wrong_cell(inputs, options):
    inputs["cell"] = inputs["cell"][:, :-1]


def _wrong_dtype(inputs, options):
    inputs["cell"] = inputs["cell"].long()


_PEEPHOLE = ("peephole",)

SPEC = OpSpec(
    name="lstm_gates",
    function=lstm_gates,
    inputs={"gates": Input("B 4H"), "cell": Input("B H"), "peephole": Input("3 H", optional=True)},
    samples=(
        Sample("typical", dict(B=3, H=5)),
        Sample("peephole", dict(B=3, H=5), present=_PEEPHOLE),
        Sample("one", dict(B=1, H=1), present=_PEEPHOLE),
        Sample("odd", dict(B=7, H=37)),
        Sample("odd_peephole", dict(B=5, H=67), present=_PEEPHOLE),
        Sample("saturated", dict(B=2, H=19), twist=_saturate, hard=True),
        Sample("no_batch", dict(B=0, H=4), present=_PEEPHOLE),
        Sample("no_hidden", dict(B=2, H=0), present=_PEEPHOLE),
    ),
    bench=(Sample("B32_H512", dict(B=32, H=512)), Sample("B4096_H512_peephole", dict(B=4096, H=512), present=_PEEPHOLE)),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * d["H"] * 7,
    bytes_backward=lambda d, s: s * d["B"] * d["H"] * 12,
    errors=(
        ErrorCase("gates", _wrong_gates, ValueError, r"lstm_gates: gates: expected \[B 4H\].*got shape \(2, 13\)"),
        ErrorCase("cell", _wrong_cell, ValueError, r"lstm_gates: cell: expected \[B H\] with B=3, H=5, got shape \(3, 4\)"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"lstm_gates: cell: expected .*float64.*got .*int64"),
    ),
    rows=(("gates", 0), ("cell", 0)),
)
