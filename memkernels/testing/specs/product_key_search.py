"""The spec of `product_key_search`."""

from __future__ import annotations

import torch

from memkernels.ops.product_key_search import product_key_search
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample


def _eager(query, subkeys, k):
    """Two products, two topk, all sums, the last topk; not for more keys than there are subkeys, nor where all scores are equal."""
    if k > subkeys.shape[2] or not query.shape[3]:
        raise NotImplementedError("more keys than subkeys, and an order of ties")
    found = torch.topk(torch.einsum("bhpd,hpsd->bhps", query, subkeys), k)
    sums = found.values[:, :, 0, :, None] + found.values[:, :, 1, None]
    scores, place = torch.topk(sums.flatten(2), k)
    first, second = (found.indices[:, :, p].gather(-1, at) for p, at in ((0, place // k), (1, place % k)))
    return scores, first * subkeys.shape[2] + second


def _ties(inputs):
    """Small whole numbers, of which every sum is exact."""
    return {name: t.round() for name, t in inputs.items()}


def _eighths(inputs):
    """Multiples of 1/8, of which every score is exact in float32: the order does not hang on how a sum was rounded."""
    return {name: (8 * t).round() / 8 for name, t in inputs.items()}


def _peaked(inputs):
    """One subkey of each half towers over the others, which are equal; equal scores stay equal in any order of a sum."""
    inputs = _eighths(inputs)
    subkeys = inputs["subkeys"][:, :, :1].expand_as(inputs["subkeys"]).clone()
    subkeys[:, :, 1] *= 100
    return {**inputs, "subkeys": subkeys}


def _wrong_heads(inputs, options):
    inputs["subkeys"] = inputs["subkeys"].new_zeros(2, 2, 7, 4)


def _one_half(inputs, options):
    inputs["query"] = inputs["query"].new_zeros(2, 3, 1, 4)


def _slots(k):
    return lambda inputs, options: options.update(k=k)


SMALL = dict(B=2, NH=3, S=7, D=4)
SPEC = OpSpec(
    name="product_key_search",
    function=product_key_search,
    inputs={"query": Input("B NH 2 D"), "subkeys": Input("NH 2 S D")},
    samples=(
        Sample("typical", SMALL, dict(k=3)),
        Sample("more_than_subkeys", dict(SMALL, S=5), dict(k=11)),
        Sample("more_than_keys", dict(SMALL, S=3), dict(k=12), hard=True),  # scores of -inf
        Sample("ties", dict(B=17, NH=2, S=90, D=3), dict(k=20), (), _ties, hard=True),
        Sample("peaked", dict(B=5, NH=1, S=40, D=8), dict(k=6), (), _peaked, hard=True),
        Sample("no_batch", dict(SMALL, B=0), dict(k=3)),
        Sample("blocks", dict(B=31, NH=2, S=150, D=19), dict(k=32)),
        Sample("many", dict(B=3, NH=1, S=90, D=5), dict(k=200)),
        Sample("no_subkeys", dict(SMALL, S=0), dict(k=3)),
        Sample("no_width", dict(SMALL, D=0), dict(k=5)),
    ),
    bench=(Sample("B1024_S512_k32", dict(B=1024, NH=4, S=512, D=128), dict(k=32), (), _eighths),),
    peers={"eager": _eager},
    bytes=lambda d, s: s * 2 * d["NH"] * d["D"] * (d["B"] + d["S"]),
    bytes_backward=lambda d, s: s * 4 * d["NH"] * d["D"] * (d["B"] + d["S"]),
    errors=(
        ErrorCase("heads", _wrong_heads, ValueError, r"product_key_search: subkeys: expected .*NH=3.*got .*2, 2, 7, 4"),
        ErrorCase("half", _one_half, ValueError, r"product_key_search: query: expected \[B NH 2 D\].*got .*2, 3, 1, 4"),
        ErrorCase("no_slots", _slots(0), ValueError, r"product_key_search: k: expected 1 to 4096, got 0"),
        ErrorCase("slots", _slots(True), TypeError, r"product_key_search: k: expected an integer, got bool"),
    ),
    rows=(("query", 0),),
    gaps=("On a GPU, where unequal sums of halves round to one score and k cuts among them, not always the lowest index is kept.",),
)
