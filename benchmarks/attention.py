"""The speeds promised for attention and its family (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from target import BF16, Target

from memkernels.bench.peers import invoke
from memkernels.bench.row import Row
from memkernels.bench.runner import Call, Case, interleaved
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
    yield from _varlen()
    yield from _paged()


def _varlen() -> Iterator[Target]:
    """Ragged sequences, against a loop of torch's calls and against one call on padded rows with a mask."""
    for sample in specs()["attention_varlen"].bench:
        for dtype, loop, padded in ((torch.float32, 1.25, 3), (BF16, 1.5, 3)):
            yield Target("attention_varlen", sample, "forward", dict(sdpa=loop, padded=padded), dtype)
            yield Target("attention_varlen", sample, "fwd+bwd", dict(sdpa=loop, padded=padded), dtype)


def _paged() -> Iterator[Target]:
    """Decoding: one query a row."""
    for sample in specs()["paged_attention"].bench:
        for dtype in (torch.float32, BF16):
            yield Target("paged_attention", sample, "forward", {"sdpa": 1.5}, dtype, rows=gathered)


def gathered(case: Case, seconds: float) -> Iterable[Row]:
    """Against torch's attention on keys that were gathered from their pages before: that is not timed."""
    case.check()
    inputs = draw(case.spec, case.sample, case.dtype)
    rows = {n: inputs[n][inputs["page_table"]].flatten(1, 2).transpose(1, 2).contiguous() for n in ("key_pages", "value_pages")}

    def sdpa(query, key_pages, value_pages, page_table, lengths):
        return F.scaled_dot_product_attention(query, *rows.values(), enable_gqa=query.shape[1] != key_pages.shape[2])

    def invoke_sdpa(given, options):
        return sdpa(**given)

    calls = [Call(case.spec, function, case.sample, inputs) for function in (invoke(case.spec), invoke_sdpa)]
    mine, theirs = interleaved(calls, "forward", "cpu", seconds)
    yield case.row("forward", mine, "sdpa", theirs, "the peer is given gathered keys")
