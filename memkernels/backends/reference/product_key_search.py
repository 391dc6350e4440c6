"""product_key_search in plain torch: scores of both halves, the k subkeys of the first that have the best sums, the best of all their sums.

The k best keys lie in those k rows, also where unequal sums round to one score: each other row has k keys before its best.

Flat arguments: query "B NH 2 D", subkeys "NH 2 S D", k.
"""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference.topk_read import best


def forward(query, subkeys, k):
    count = subkeys.shape[2]
    one, other = torch.einsum("bhpd,hpsd->bhps", compute(query), compute(subkeys)).unbind(2)
    if not count:
        none = one.new_full((*one.shape[:2], k), -torch.inf)
        return none.to(query.dtype), torch.full_like(none, -1, dtype=torch.int64)
    rows = best(torch.where(one == -torch.inf, -torch.inf, one + other.amax(-1, keepdim=True)), min(k, count)).sort(-1).values
    scores = torch.where(rows < 0, -torch.inf, one.gather(-1, rows.clamp(min=0)))[..., None]
    absent = (scores == -torch.inf) | (other == -torch.inf)[:, :, None]
    sums = torch.where(absent, -torch.inf, scores + other[:, :, None]).flatten(2)
    chosen = best(sums, k)
    absent, chosen = chosen < 0, chosen.clamp(min=0)
    index = rows.gather(-1, chosen // count) * count + chosen % count
    return torch.where(absent, -torch.inf, sums.gather(-1, chosen)).to(query.dtype), torch.where(absent, -1, index)


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
