"""product_key_search in plain torch: scores of both halves, the best of each, the best of their sums.

Flat arguments: query "B NH 2 D", subkeys "NH 2 S D", k.
"""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference.topk_read import best


def forward(query, subkeys, k):
    halves = torch.einsum("bhpd,hpsd->bhps", compute(query), compute(subkeys))
    count = min(k, subkeys.shape[2])
    found = best(halves, count)
    scores = torch.where(found < 0, -torch.inf, halves.gather(-1, found.clamp(min=0)) if count else halves)
    one, other = _pairs(found)
    index = one * subkeys.shape[2] + other
    sums = sum(_pairs(scores))
    order = index.argsort(-1)
    sums = torch.where((one < 0) | (other < 0), -torch.inf, sums).gather(-1, order)
    chosen = best(sums, k)
    absent = chosen < 0
    if not index.shape[-1]:
        return absent.to(query.dtype) * -torch.inf, chosen
    index = index.gather(-1, order).gather(-1, chosen.clamp(min=0)).masked_fill(absent, -1)
    return torch.where(absent, -torch.inf, sums.gather(-1, chosen.clamp(min=0))).to(query.dtype), index


def _pairs(halves):
    """Of "B NH 2 C" the first and the second of every pair, "B NH C*C" each."""
    shape = (*halves.shape[:2], halves.shape[3], halves.shape[3])
    return halves[:, :, 0, :, None].expand(shape).flatten(2), halves[:, :, 1, None, :].expand(shape).flatten(2)


def backward(dscores, query, subkeys, index, k):
    given = compute(query).new_zeros((*query.shape[:3], max(subkeys.shape[2], 1)))
    if dscores is not None:
        d = torch.where(index < 0, 0, compute(dscores))[:, :, None].expand(-1, -1, 2, -1)
        rows = index.clamp(min=0)
        parts = torch.stack((rows // max(subkeys.shape[2], 1), rows % max(subkeys.shape[2], 1)), 2)
        given = given.scatter_add(-1, parts, d)
    given = given[..., : subkeys.shape[2]]
    dquery = torch.einsum("bhps,hpsd->bhpd", given, compute(subkeys))
    return dquery.to(query.dtype), torch.einsum("bhps,bhpd->hpsd", given, compute(query)).to(query.dtype)
