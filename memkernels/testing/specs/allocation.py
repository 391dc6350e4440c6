"""The spec of `allocation`."""

from __future__ import annotations

import torch

from memkernels.ops.allocation import allocation
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, unit

HEADS = ("write_gates",)


def _one_head(usage, eps):
    s, order = torch.sort(eps + (1 - eps) * usage, dim=1, stable=True)
    before = torch.cumprod(torch.cat([torch.ones_like(s[:, :1]), s], 1), 1)[:, :-1]
    return ((1 - s) * before).gather(1, order.argsort(1))


def _eager(usage, write_gates=None, eps=1e-6):
    if write_gates is None:
        return _one_head(usage, eps)
    found = []
    for gate in write_gates.unbind(1):
        found.append(_one_head(usage, eps))
        usage = usage + (1 - usage) * gate[:, None] * found[-1]
    return torch.stack(found, 1) if found else usage.new_zeros(len(usage), 0, usage.shape[1])


def _ends(inputs):
    """Rows in full use and in none, several of each: ties, and factors that are exactly zero."""
    usage = inputs["usage"].clone()
    usage[:, ::3], usage[:, 1:3] = 1, 0
    return {**inputs, "usage": usage}


def _ties(inputs):
    usage = inputs["usage"].clone()
    usage[0], usage[1:] = 0.5, (4 * usage[1:]).round() / 4
    return {**inputs, "usage": usage}


def _wrong_gates(inputs, options):
    inputs["write_gates"] = inputs["usage"].new_zeros(3, 2)


def _wrong_eps(inputs, options):
    options["eps"] = 1.0


def _wrong_dtype(inputs, options):
    inputs["usage"] = inputs["usage"].long()


SPEC = OpSpec(
    name="allocation",
    function=allocation,
    inputs={"usage": Input("B N", unit), "write_gates": Input("B H", unit, optional=True)},
    samples=(
        Sample("typical", dict(B=2, N=5)),
        Sample("heads", dict(B=2, N=5, H=3), present=HEADS),
        Sample("ends", dict(B=2, N=7), dict(eps=0.0), twist=_ends, hard=True),
        Sample("one", dict(B=1, N=1, H=2), present=HEADS),
        Sample("ties", dict(B=2, N=37), twist=_ties, hard=True),
        Sample("odd", dict(B=3, N=37), dict(eps=0.01)),
        Sample("no_heads", dict(B=2, N=5, H=0), present=HEADS),
    ),
    bench=(Sample("B32_N1024", dict(B=32, N=1024)), Sample("B8_N512_H2", dict(B=8, N=512, H=2), present=HEADS)),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * d["N"] * (1 + d.get("H", 1)),
    bytes_backward=lambda d, s: s * d["B"] * d["N"] * (2 + d.get("H", 1)),
    errors=(
        ErrorCase("gates", _wrong_gates, ValueError, r"allocation: write_gates: expected .*B=2.*got .*3"),
        ErrorCase("eps", _wrong_eps, ValueError, r"allocation: eps: expected a number in \[0, 1\), got 1.0"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"allocation: usage: expected float64.*got int64"),
    ),
    rows=(("usage", 0), ("write_gates", 0)),
)
