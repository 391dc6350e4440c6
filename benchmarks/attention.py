"""The speeds promised for attention and its family (read by targets.py)."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator

import torch
from target import BF16, Target

from memkernels.testing.spec import Sample


def _shared(*axes):
    """The float mask has size 1 along these axes."""

    def twist(tensors):
        mask = tensors["attn_mask"]
        for axis in axes:
            mask = mask.narrow(axis, 0, 1)
        return {"attn_mask": mask}

    return twist


def _attention(b, q, k, d=64, v=64, heads=8, **options):
    name = f"B{b}_Q{q}_K{k}" if q != k else f"B{b}_S{q}"
    name += (f"_V{v}" if v != d else "") + (f"_NH{heads}" if heads != 8 else "")
    return Sample(name + ("_causal" if options.get("is_causal") else ""), dict(B=b, NH=heads, NHk=heads, Q=q, K=k, D=d, V=v), options)


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
    for dtype in (torch.float32, BF16, torch.float16):
        for queries, heads in itertools.product((1, 4, 16), (8, 1)):
            few = _attention(1, queries, 65536, heads=heads)
            yield Target("attention", few, "forward", dict(sdpa=2 if heads == 8 else 3), dtype)
            yield Target("attention", few, "fwd+bwd", dict(sdpa=5), dtype)
    for mode in ("forward", "fwd+bwd"):  # the peers read the memory widened to float32
        yield Target("quantized_attention", _attention(1, 4, 65536), mode, dict(sdpa=2, attention=1.5))
