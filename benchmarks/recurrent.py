"""The promises of the recurrent family: lstm, gru, rnn against torch's layers and against the loops people write instead."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from target import BF16, Target

from memkernels.bench.memory import saved_bytes
from memkernels.bench.peers import invoke, peer
from memkernels.bench.row import Row
from memkernels.bench.runner import Call, Case, alternating
from memkernels.testing.inputs import draw
from memkernels.testing.recurrent import BIAS, spread
from memkernels.testing.spec import Sample, mostly

NORM = ("norm_weight", "norm_bias")


def _layer(t: int, b: int, h: int, *present: str, name: str = "", twist=None, **options) -> Sample:
    label = f"T{t}_B{b}_H{h}" + (f"_{name}" if name else "")
    return Sample(label, dict(T=t, B=b, I=h, H=h), options, (*BIAS, *present), twist)


SIZES = (_layer(128, 16, 256), _layer(128, 16, 512), _layer(128, 64, 512))


def recurrent_targets() -> Iterator[Target]:
    """All of them, in the order of the tables of issues 2 and 3."""
    for sample in SIZES:
        for dtype, inference, training in ((torch.float32, 1.0, 1.2), (BF16, 3, 4)):
            yield Target("lstm", sample, "forward", dict(torch=inference), dtype)
            yield Target("lstm", sample, "fwd+bwd", dict(torch=training), dtype)
    for dtype, inference, training in ((torch.float32, 0.95, 1.1), (BF16, 2, 2.5)):
        yield Target("lstm", _layer(128, 32, 512), "forward", dict(torch=inference), dtype)
        yield Target("lstm", _layer(128, 32, 512), "fwd+bwd", dict(torch=training), dtype)
    yield Target("lstm", _layer(512, 1, 256), "forward", dict(torch=1.2))
    yield Target("lstm", _layer(100, 1, 512), "forward", dict(torch=1.3))
    for op, dtype, bar in (("gru", torch.float32, 2), ("gru", BF16, 4), ("rnn", torch.float32, 2)):
        for sample in SIZES:
            yield Target(op, sample, "forward", dict(torch=bar), dtype)
            yield Target(op, sample, "fwd+bwd", dict(torch=bar), dtype)
    for op in ("lstm", "gru"):
        for t, b, h, bar in ((512, 16, 256, 6), (2000, 8, 128, 15)):
            ragged = _layer(t, b, h, "lengths", name="ragged", twist=spread)
            yield Target(op, ragged, "fwd+bwd", {"torch": bar, "per token": 1 / 1.15})
        reset = _layer(512, 8, 128, "reset", name="reset")
        yield Target(op, reset, "fwd+bwd", {"eager": 8, "without reset": 1 / 1.05}, inputs=dict(reset=mostly(0.01)))
    yield Target("lstm", _layer(512, 8, 128, *NORM, name="layer_norm"), "fwd+bwd", dict(eager=10))
    yield Target("lstm", SIZES[0], "double backward", dict(backward=5), rows=double_backward)
    recomputed = _layer(128, 16, 256, name="recompute", recompute=True)
    yield Target("lstm", recomputed, "fwd+bwd", {"without recompute": 1 / 1.25})
    yield Target("lstm", recomputed, "saved bytes", dict(saved=0.3), rows=saved)


def double_backward(case: Case, seconds: float) -> Iterable[Row]:
    """The backward of a backward, over the time of one backward: `peer_ms` is that one."""
    case.check()
    call = Call(case.spec, invoke(case.spec), case.sample, draw(case.spec, case.sample, case.dtype))
    outputs = call.train()
    call.gradients(outputs)
    directions = [torch.randn_like(t) for t in call.wanted]

    def first():
        outputs = call.train()
        return lambda: call.gradients(outputs)

    def second():
        gradients = torch.autograd.grad(call.train(), call.wanted, call.upstream, create_graph=True)
        return lambda: torch.autograd.grad(gradients, call.wanted, directions)

    one, two = alternating([first, second], seconds)
    row = case.row("double backward", two, "", one, "")
    yield dataclasses.replace(row, ratio=two / one, gb_s=None, floor=None)


def saved(case: Case, seconds: float) -> Iterable[Row]:
    """Bytes kept for backward beside inputs and weights, over those of torch; `ms` and `peer_ms` are megabytes here."""
    case.check()
    theirs = peer(case.spec, "torch")
    assert theirs is not None
    inputs = draw(case.spec, case.sample, case.dtype)
    calls = [Call(case.spec, function, case.sample, inputs) for function in (invoke(case.spec), theirs)]
    mine, torchs = (saved_bytes(call.train, call.wanted) for call in calls)
    row = case.row("saved bytes", mine * 1e-9, "", torchs * 1e-9, "MB, not ms")
    yield dataclasses.replace(row, ratio=mine / torchs, gb_s=None, floor=None)
