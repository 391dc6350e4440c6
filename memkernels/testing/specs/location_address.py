"""The spec of `location_address`."""

from __future__ import annotations

from functools import partial

import torch

from memkernels.ops.location_address import location_address
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, distribution, unit


def _sharpness(shape, dtype, generator):
    """At least 1, as 1 + softplus of a head's output is."""
    return (1 + 2 * torch.rand(shape, dtype=torch.float64, generator=generator)).to(dtype)


def _eager(content, previous, gate, shift, sharpen):
    gated = torch.lerp(previous, content, gate[..., None])
    reach = shift.shape[-1] // 2
    shifted = sum(shift[..., reach + j, None] * gated.roll(j, -1) for j in range(-reach, reach + 1))
    return torch.softmax(sharpen[..., None] * shifted.log(), -1)


def _sharpest(most, inputs):
    return {**inputs, "sharpen": torch.full_like(inputs["sharpen"], most)}


def _one_hot(inputs):
    """Weights, gates and taps of exactly 0 and 1, so that shifted weights are exactly 0; the last head has no weight at all."""
    made = {}
    for name in ("content", "previous", "shift"):
        made[name] = torch.zeros_like(inputs[name])
        made[name][..., 1] = 1
    made["content"][:, -1], made["previous"][:, -1] = 0, 0
    gate = inputs["gate"].clone()
    gate[:, 0] = 1
    return {**inputs, **made, "gate": gate}


def _denormal(inputs):
    """Half of the weights lie below the normal range."""
    tiny = torch.finfo(inputs["content"].dtype).tiny / 8
    made = {name: inputs[name].clone() for name in ("content", "previous")}
    for weights in made.values():
        weights[..., ::2] = tiny
    return {**inputs, **made}


def _even_taps(inputs, options):
    inputs["shift"] = inputs["shift"].new_zeros(2, 3, 4)


def _wrong_rows(inputs, options):
    inputs["previous"] = inputs["previous"].new_zeros(2, 3, 6)


def _wrong_dtype(inputs, options):
    inputs["gate"] = inputs["gate"].long()


SPEC = OpSpec(
    name="location_address",
    function=location_address,
    inputs={
        "content": Input("B R N", distribution),
        "previous": Input("B R N", distribution),
        "gate": Input("B R", unit),
        "shift": Input("B R 2S+1", distribution),
        "sharpen": Input("B R", _sharpness),
    },
    samples=(
        Sample("typical", dict(B=2, R=3, N=7, S=1)),
        Sample("still", dict(B=2, R=1, N=5, S=0)),
        Sample("around_twice", dict(B=2, R=3, N=4, S=5)),
        Sample("odd", dict(B=3, R=2, N=83, S=2)),
        Sample("one_hot", dict(B=2, R=3, N=19, S=1), twist=_one_hot, hard=True),
        Sample("sharpest", dict(B=2, R=2, N=37, S=1), twist=partial(_sharpest, 1000.0), hard=True),
        Sample("denormal", dict(B=2, R=2, N=17, S=1), twist=_denormal, hard=True),
        Sample("no_rows", dict(B=2, R=3, N=0, S=1)),
    ),
    bench=(
        Sample("B32_R4_N1024", dict(B=32, R=4, N=1024, S=1)),
        Sample("B4_R4_N65536", dict(B=4, R=4, N=65536, S=1)),
        Sample("B32_R4_N128_S16", dict(B=32, R=4, N=128, S=16)),
    ),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * d["R"] * (3 * d["N"] + 2 * d["S"] + 3),
    bytes_backward=lambda d, s: s * d["B"] * d["R"] * (5 * d["N"] + 4 * d["S"] + 6),
    errors=(
        ErrorCase("taps", _even_taps, ValueError, r"location_address: shift: expected .*2S\+1.*got .*4"),
        ErrorCase("rows", _wrong_rows, ValueError, r"location_address: previous: expected .*N=7.*got .*6"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"location_address: gate: expected .*float64.*got .*int64"),
    ),
    rows=(("content", 0), ("previous", 0), ("gate", 0), ("shift", 0), ("sharpen", 0)),
)
