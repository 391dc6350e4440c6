"""The spec of `content_address`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memkernels.ops.content_address import content_address
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, mostly
from memkernels.testing.twists import READ_SIZES, all_masked, equal_rows, large_dots, nan_where_masked, sharp, wrong_similarity, zero_rows


def _eager(memory, key, strength, similarity="cosine", mask=None):
    if similarity == "cosine":
        score = F.normalize(key, dim=-1) @ F.normalize(memory, dim=-1).mT
    else:
        score = key @ memory.mT if similarity == "dot" else -torch.cdist(key, memory).square()
    score = strength[..., None] * score
    return torch.softmax(score if mask is None else score.masked_fill(~mask[:, None], -torch.inf), -1)


def _wrong_width(inputs, options):
    inputs["key"] = inputs["key"].new_zeros(2, 3, 6)


def _wrong_mask(inputs, options):
    inputs["mask"] = inputs["memory"].new_ones(2, 5)


def _wrong_dtype(inputs, options):
    inputs["strength"] = inputs["strength"].long()


SPEC = OpSpec(
    name="content_address",
    function=content_address,
    inputs={
        "memory": Input("B N W"),
        "key": Input("B R W"),
        "strength": Input("B R"),
        "mask": Input("B N", mostly(0.7), torch.bool, optional=True),
    },
    samples=(
        Sample("typical", dict(B=2, N=5, W=4, R=3)),
        Sample("dot", dict(B=2, N=5, W=4, R=3), dict(similarity="dot")),
        Sample("l2", dict(B=2, N=5, W=4, R=3), dict(similarity="l2")),
        Sample("masked", dict(B=2, N=9, W=4, R=3), present=("mask",)),
        Sample("all_masked", dict(B=2, N=5, W=4, R=2), present=("mask",), twist=all_masked),
        Sample("all_masked_l2", dict(B=2, N=5, W=4, R=2), dict(similarity="l2"), present=("mask",), twist=all_masked),
        Sample("masked_nan", dict(B=4, N=19, W=8, R=5), present=("mask",), twist=nan_where_masked, hard=True),
        Sample("zero_rows", dict(B=4, N=17, W=6, R=5), twist=zero_rows),
        Sample("sharp", dict(B=2, N=7, W=5, R=2), twist=sharp, hard=True),
        Sample("large_dots", dict(B=2, N=256, W=64, R=3), dict(similarity="dot"), twist=large_dots, hard=True),
        Sample("equal_1e6", dict(B=2, N=64, W=8, R=2), twist=equal_rows(1e6), hard=True),
        Sample("equal_1e8", dict(B=2, N=600, W=8, R=2), twist=equal_rows(1e8), hard=True),
        *READ_SIZES,
    ),
    bench=(Sample("B4_N65536", dict(B=4, N=65536, W=64, R=4)), Sample("B32_N128", dict(B=32, N=128, W=64, R=4))),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * (d["N"] * d["W"] + d["R"] * (d["N"] + d["W"] + 1)),
    bytes_backward=lambda d, s: s * d["B"] * (2 * d["N"] * d["W"] + d["R"] * (2 * d["N"] + 2 * d["W"] + 2)),
    errors=(
        ErrorCase("width", _wrong_width, ValueError, r"content_address: key: expected .*W=4.*got .*6"),
        ErrorCase("mask", _wrong_mask, TypeError, r"content_address: mask: expected bool, got float64"),
        ErrorCase("similarity", wrong_similarity, ValueError, r"content_address: similarity: expected .*'cosine'.*got 'cos'"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"content_address: strength: expected .*float64.*got .*int64"),
    ),
    rows=(("memory", 0), ("key", 0), ("strength", 0)),
)
