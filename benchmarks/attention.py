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
    name += (f"_D{d}" if d != 64 else "") + (f"_V{v}" if v != d else "") + (f"_NH{heads}" if heads != 8 else "")
    name += ("_dropout" if "dropout_p" in options else "") + ("_causal" if options.get("is_causal") else "")
    return Sample(name, dict(B=b, NH=heads, NHk=heads, Q=q, K=k, D=d, V=v), options)


def attention_targets() -> Iterator[Target]:
    """Rows of the ops that read and write keys and values by softmax."""
    sizes, causal = ((2, 1024, 64), (1, 4096, 64), (1, 4096, 128)), dict(is_causal=True)
    square = [_attention(b, s, s, d, d, **options) for b, s, d in sizes for options in ({}, causal)]
    for dtype, bars in ((torch.float32, {"forward": 1.25, "fwd+bwd": 1.25}), (BF16, {"forward": 2, "backward": 3.5, "fwd+bwd": 2.5})):
        for sample, (mode, bar) in itertools.product(square, bars.items()):
            yield Target("attention", sample, mode, dict(sdpa=bar), dtype)
    for sample, axes in ((square[0], (0,)), (square[2], (0, 1))):
        masked = dataclasses.replace(sample, name=sample.name + "_mask", present=("attn_mask",), twist=_shared(*axes))
        yield Target("attention", masked, "fwd+bwd", dict(sdpa=3))
    yield Target("attention", _attention(2, 1024, 1024, dropout_p=0.1), "fwd+bwd", dict(sdpa=3))
    for b, s in ((2, 1024), (1, 4096)):
        for mode in ("forward", "fwd+bwd"):
            yield Target("attention", _attention(b, s, s, 64, 96), mode, dict(sdpa=3))
    for dtype in (torch.float32, BF16):
        for queries, heads in itertools.product((1, 4, 16), (8, 1)):
            few = _attention(1, queries, 65536, heads=heads)
            yield Target("attention", few, "forward", dict(sdpa=2 if heads == 8 else 3), dtype)
            yield Target("attention", few, "fwd+bwd", dict(sdpa=5), dtype)
