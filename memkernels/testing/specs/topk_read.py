"""The spec of `topk_read`."""

from __future__ import annotations

import torch

from memkernels.ops.topk_read import topk_read
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, mostly
from memkernels.testing.twists import all_masked, wrong_similarity


def _eager(query, key, value, k, similarity="dot", scale=None, mask=None):
    """matmul, topk, softmax, gather; not for more slots than rows, nor where all scores are equal."""
    if k > key.shape[1] or not query.shape[2]:
        raise NotImplementedError("more slots than rows, and an order of ties")
    if scale is None:
        scale = query.shape[-1] ** -0.5 if similarity == "dot" else 1.0
    if similarity == "cosine":
        query, key = (t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6) for t in (query, key))
    score = -torch.cdist(query, key).square() if similarity == "l2" else query @ key.mT
    found = torch.topk(score if mask is None else score.masked_fill(~mask[:, None], -torch.inf), k)
    weights = torch.softmax(scale * found.values, -1)
    rows = value.gather(1, found.indices.flatten(1)[..., None].expand(-1, -1, value.shape[2])).unflatten(1, found.indices.shape[1:])
    return (weights[..., None, :] @ rows).squeeze(-2), weights, found.indices


def _ties(inputs):
    """Small whole numbers, whose sums are exact in any order, and every row four times."""
    query, key = (inputs[name].mul(2).round() for name in ("query", "key"))
    key = key[:, : (key.shape[1] + 3) // 4].repeat(1, 4, 1)[:, : key.shape[1]]
    return {**inputs, "query": query, "key": key}


def _edges(inputs):
    """A zero query, a zero row and rows of which all but one are masked and hold NaN; the first entry sees nothing."""
    masked = all_masked(inputs)
    masked["mask"][1] = False
    masked["mask"][1, 2] = True
    query, key = inputs["query"].clone(), inputs["key"].clone()
    query[:, 0], key[:, 0] = 0, 0
    hidden = ~masked["mask"][..., None]
    return {**masked, "query": query, "key": key.masked_fill(hidden, torch.nan), "value": inputs["value"].masked_fill(hidden, torch.nan)}


def _near_epsilon(inputs):
    """Norms near the epsilon of the cosine, where even rows along one line differ in it."""
    return {**inputs, "query": inputs["query"] / 1000, "key": inputs["key"] / 1000}


def _peaked(inputs):
    """Scores of about a thousand."""
    return {**inputs, "query": 20 * inputs["query"], "key": 20 * inputs["key"]}


def _wrong_value(inputs, options):
    inputs["value"] = inputs["value"].new_zeros(2, 8, 3)


def _slots(k):
    return lambda inputs, options: options.update(k=k)


def _mask_dtype(inputs, options):
    inputs["mask"] = torch.ones(2, 9)


SMALL = dict(B=2, Q=3, N=9, D=4, V=5)
LONG = dict(B=2, Q=2, N=700, D=5, V=3)
SPEC = OpSpec(
    name="topk_read",
    function=topk_read,
    inputs={
        "query": Input("B Q D"),
        "key": Input("B N D"),
        "value": Input("B N V"),
        "mask": Input("B N", mostly(0.7), torch.bool, optional=True),
    },
    samples=(
        Sample("typical", SMALL, dict(k=3)),
        Sample("cosine", dict(SMALL, Q=19), dict(k=4, similarity="cosine", scale=5.0), ("mask",), _near_epsilon),
        Sample("l2", dict(SMALL, Q=10, N=40), dict(k=6, similarity="l2", scale=0.4), ("mask",)),
        Sample("more_slots_than_rows", SMALL, dict(k=12, similarity="l2")),
        Sample("many_rows", LONG, dict(k=70)),
        Sample("panels", dict(B=1, Q=35, N=161, D=19, V=18), dict(k=7, similarity="cosine"), (), _near_epsilon),
        Sample("ties", dict(B=2, Q=11, N=50, D=3, V=4), dict(k=9), (), _ties, hard=True),
        Sample("ties_few", dict(B=2, Q=2, N=90, D=3, V=4), dict(k=9, similarity="l2"), (), _ties, hard=True),
        Sample("edges", dict(SMALL, B=3), dict(k=4, similarity="cosine"), ("mask",), _edges, hard=True),
        Sample("peaked", dict(SMALL, Q=12, N=64, D=16), dict(k=5, scale=1.0), (), _peaked, hard=True),
        Sample("no_batch", dict(SMALL, B=0), dict(k=3)),
        Sample("no_rows", dict(SMALL, N=0), dict(k=3), ("mask",)),
        Sample("no_width", dict(SMALL, D=0), dict(k=3, similarity="cosine")),
    ),
    bench=(
        Sample("Q256_N65536", dict(B=1, Q=256, N=65536, D=64, V=64), dict(k=32)),
        Sample("Q1_N1048576", dict(B=1, Q=1, N=1 << 20, D=64, V=64), dict(k=32)),
    ),
    peers={"eager": _eager},
    bytes=lambda d, s: s * d["B"] * (d["N"] * d["D"] + d["Q"] * (d["D"] + d["V"])),
    bytes_backward=lambda d, s: s * d["B"] * (d["N"] + 2 * d["Q"]) * (d["D"] + d["V"]),
    errors=(
        ErrorCase("value", _wrong_value, ValueError, r"topk_read: value: expected .*N=9.*got .*8"),
        ErrorCase("similarity", wrong_similarity, ValueError, r"topk_read: similarity: expected .*'cosine'.*got 'cos'"),
        ErrorCase("no_slots", _slots(0), ValueError, r"topk_read: k: expected 1 to 4096, got 0"),
        ErrorCase("many_slots", _slots(4097), ValueError, r"topk_read: k: expected 1 to 4096, got 4097"),
        ErrorCase("slots", _slots(2.0), TypeError, r"topk_read: k: expected an integer, got float"),
        ErrorCase("scale", lambda i, o: o.update(scale=float("nan")), ValueError, r"topk_read: scale: expected a finite number, got nan"),
        ErrorCase("mask", _mask_dtype, TypeError, r"topk_read: mask: expected bool, got float32"),
    ),
    rows=(("query", 0), ("key", 0), ("value", 0)),
)
