"""The spec of `content_read`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from memkernels.ops.content_read import content_read
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, mostly
from memkernels.testing.twists import all_masked, equal_rows, large_dots, nan_where_masked, sharp, wrong_similarity, zero_rows


def _eager(memory, key, strength, value=None, similarity="cosine", mask=None, return_weights=False):
    if similarity == "cosine":
        score = F.normalize(key, dim=-1) @ F.normalize(memory, dim=-1).mT
    else:
        score = key @ memory.mT if similarity == "dot" else -torch.cdist(key, memory).square()
    score = strength[..., None] * score
    weights = torch.softmax(score if mask is None else score.masked_fill(~mask[:, None], -torch.inf), -1)
    read = weights @ (memory if value is None else value)
    return (read, weights) if return_weights else read


def _wrong_value(inputs, options):
    inputs["value"] = inputs["memory"].new_zeros(2, 6, 3)


def _wrong_dtype(inputs, options):
    inputs["key"] = inputs["key"].long()


SMALL = dict(B=2, N=5, W=4, R=3, V=4)
SPEC = OpSpec(
    name="content_read",
    function=content_read,
    inputs={
        "memory": Input("B N W"),
        "key": Input("B R W"),
        "strength": Input("B R"),
        "value": Input("B N V", optional=True),
        "mask": Input("B N", mostly(0.7), torch.bool, optional=True),
    },
    samples=(
        Sample("typical", SMALL),
        Sample("dot", SMALL, dict(similarity="dot")),
        Sample("l2", SMALL, dict(similarity="l2")),
        Sample("value", dict(B=2, N=7, W=4, R=3, V=6), present=("value",)),
        Sample("weights", SMALL, dict(return_weights=True)),
        Sample("everything", dict(B=2, N=9, W=4, R=3, V=3), dict(similarity="l2", return_weights=True), ("value", "mask")),
        Sample("masked", dict(B=2, N=9, W=4, R=3, V=4), present=("mask",)),
        Sample("all_masked", SMALL, dict(return_weights=True), ("mask",), all_masked),
        Sample("all_masked_l2", SMALL, dict(similarity="l2"), ("mask", "value"), all_masked),
        Sample("masked_nan", dict(B=4, N=19, W=8, R=5, V=7), dict(return_weights=True), ("mask", "value"), nan_where_masked, hard=True),
        Sample("zero_rows", dict(B=4, N=17, W=6, R=5, V=6), twist=zero_rows),
        Sample("sharp", dict(B=2, N=7, W=5, R=2, V=5), twist=sharp, hard=True),
        Sample("large_dots", dict(B=2, N=256, W=64, R=3, V=64), dict(similarity="dot", return_weights=True), twist=large_dots, hard=True),
        Sample("equal_1e6", dict(B=2, N=64, W=8, R=2, V=8), dict(return_weights=True), ("value",), equal_rows(1e6), hard=True),
        Sample("equal_1e8", dict(B=2, N=600, W=8, R=2, V=8), dict(return_weights=True), ("value",), equal_rows(1e8), hard=True),
        Sample("one", dict(B=1, N=1, W=1, R=1, V=1)),
        Sample("odd", dict(B=3, N=37, W=19, R=2, V=19)),
        Sample("wide", dict(B=2, N=67, W=65, R=5, V=33), present=("value",)),
        Sample("no_batch", dict(SMALL, B=0)),
        Sample("no_rows", dict(SMALL, N=0), dict(return_weights=True)),
        Sample("no_width", dict(SMALL, W=0), present=("value",)),
        Sample("no_value_width", dict(SMALL, V=0), present=("value",)),
        Sample("no_heads", dict(SMALL, R=0)),
    ),
    bench=(
        Sample("B4_N65536", dict(B=4, N=65536, W=64, R=4, V=64)),
        Sample("B16_N4096", dict(B=16, N=4096, W=64, R=4, V=64)),
        Sample("B32_N128", dict(B=32, N=128, W=64, R=4, V=64)),
    ),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * (d["N"] * d["W"] + d["R"] * (2 * d["W"] + 1)),
    bytes_backward=lambda d, s: s * d["B"] * (2 * d["N"] * d["W"] + d["R"] * (3 * d["W"] + 2)),
    errors=(
        ErrorCase("value", _wrong_value, ValueError, r"content_read: value: expected .*N=5.*got .*6"),
        ErrorCase("similarity", wrong_similarity, ValueError, r"content_read: similarity: expected .*'cosine'.*got 'cos'"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"content_read: key: expected .*float64.*got .*int64"),
    ),
    rows=(("memory", 0), ("key", 0), ("strength", 0)),
)
