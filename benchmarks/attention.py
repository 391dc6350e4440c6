"""The speeds promised for attention and its family (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from target import BF16, Target

from memkernels.bench.peers import invoke
from memkernels.bench.row import Row
from memkernels.bench.runner import Call, Case, alternating
from memkernels.testing.inputs import draw
from memkernels.testing.spec import Sample, specs


def _shared(*axes):
    """The float mask has size 1 along these axes."""

    def twist(tensors):
        mask = tensors["attn_mask"]
        for axis in axes:
            mask = mask.narrow(axis, 0, 1)
        return {"attn_mask": mask}

    return twist


def _attention(b, q, k, d=64, v=64, **options):
    name = f"B{b}_Q{q}_K{k}" if q != k else f"B{b}_S{q}"
    name += f"_V{v}" if v != d else ""
    return Sample(name + ("_causal" if options.get("is_causal") else ""), dict(B=b, NH=8, NHk=8, Q=q, K=k, D=d, V=v), options)


def attention_targets() -> Iterator[Target]:
    """Rows of the ops that read and write keys and values by softmax."""
    square = [_attention(b, s, s, **options) for b, s in ((2, 1024), (1, 4096)) for options in ({}, dict(is_causal=True))]
    for dtype, forward, training in ((torch.float32, 1.1, 1.1), (BF16, 1.8, 2.5)):
        for sample in square:
            yield Target("attention", sample, "forward", dict(sdpa=forward), dtype)
            yield Target("attention", sample, "fwd+bwd", dict(sdpa=training), dtype)
    for sample, axes in ((square[0], (0,)), (square[2], (0, 1))):
        masked = dataclasses.replace(sample, name=sample.name + "_mask", present=("attn_mask",), twist=_shared(*axes))
        yield Target("attention", masked, "fwd+bwd", dict(sdpa=2))
    for b, s in ((2, 1024), (1, 4096)):
        for mode in ("forward", "fwd+bwd"):
            yield Target("attention", _attention(b, s, s, 64, 96), mode, dict(sdpa=2))
    yield Target("attention", _attention(1, 4, 65536), "forward", dict(sdpa=1.5))
    yield Target("attention", _attention(1, 4, 65536), "fwd+bwd", dict(sdpa=3))
    yield from _graphs()


def _graphs() -> Iterator[Target]:
    """Graph attention against the form that materialises every edge's rows; hubs must cost no more than as many edges elsewhere."""
    uniform, power_law = specs()["segment_attention"].bench
    for sample in (uniform, power_law):
        yield Target("segment_attention", sample, "fwd+bwd", dict(eager=8))
        yield Target("segment_attention", sample, "fwd+bwd peak", dict(peak=0.2), rows=_peak)
    yield Target("segment_attention", power_law, "fwd+bwd", {"uniform degrees": 1 / 1.5}, rows=_against_uniform)


def _peak(case: Case, seconds: float) -> Iterable[Row]:
    """Peak memory beyond inputs, outputs and gradients, over that of eager; `ms` and `peer_ms` are megabytes here."""
    (row,) = case.rows(["fwd+bwd"], ["eager"], seconds)
    mine, theirs = row.extra_mb, row.peer_extra_mb
    ratio = None if mine is None or not theirs else mine / theirs
    numbers = dict(ms=mine or 0.0, peer_ms=theirs, ratio=ratio, gb_s=None, floor=None)
    yield dataclasses.replace(row, mode="fwd+bwd peak", peer="", note="MB, not ms", **numbers)


def _against_uniform(case: Case, seconds: float) -> Iterable[Row]:
    """`peer_ms` is the same number of edges spread evenly."""
    case.check()
    uniform, function = specs()["segment_attention"].bench[0], invoke(case.spec)
    calls = [Call(case.spec, function, s, draw(case.spec, s, case.dtype)) for s in (case.sample, uniform)]

    def both(call):
        return lambda: lambda: call.gradients(call.train())

    mine, even = alternating([both(call) for call in calls], seconds)
    yield dataclasses.replace(case.row("fwd+bwd", mine, "uniform degrees", even, ""), ratio=even / mine)
