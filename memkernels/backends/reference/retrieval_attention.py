"""retrieval_attention in plain torch: one softmax over the local keys that a query sees and over the memories it has retrieved.

Flat arguments: query "B NH Q D", key "B NHk K D", value "B NHk K V", memory_key "B NHk N D", memory_value "B NHk N V", index int64
"B NH Q k", memory_bias "B NH Q k" or None, scale, left, right (limits of the window around query i, which stands at key i; -1 = none;
causal is right = 0). An index outside 0 .. N - 1 and a bias of -inf are absent memories.
"""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._softmax import log_sum_exp, masked_softmax
from memkernels.backends.reference.attention import _grouped as grouped
from memkernels.backends.reference.attention import _per_head as per_head
from memkernels.backends.reference.attention import _weighted as weighted


def forward(query, key, value, memory_key, memory_value, index, memory_bias, scale, left, right):
    scores, seen, _ = _scores(query, key, memory_key, index, memory_bias, scale, left, right)
    weights, top, total = masked_softmax(scores, seen)
    lse = log_sum_exp(top, total).squeeze(-1)
    local, retrieved = weights.split((key.shape[2], index.shape[3]), -1)
    out = weighted(local, per_head(value, query)) + _weighted_rows(retrieved, _gathered(memory_value, query, index))
    return out.to(query.dtype), lse, torch.cat((top, total), -1).detach()


def backward(dout, dlse, query, key, value, memory_key, memory_value, index, memory_bias, out, stats, scale, left, right):
    scores, seen, keys = _scores(query, key, memory_key, index, memory_bias, scale, left, right)
    weights, sizes = masked_softmax(scores, seen)[0], (key.shape[2], index.shape[3])
    local, retrieved = weights.split(sizes, -1)
    dscores = torch.zeros_like(weights)
    dvalue, dmemory_value = torch.zeros_like(compute(value)), torch.zeros_like(compute(memory_value))
    if dout is not None:
        wide = compute(dout)
        products = wide @ per_head(value, query).mT, (_gathered(memory_value, query, index) @ wide[..., None]).squeeze(-1)
        dweights = torch.where(seen, torch.cat(products, -1), 0)
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        dvalue = grouped(local.mT @ wide, value)
        dmemory_value = _scattered(retrieved[..., None] * wide[..., None, :], memory_value, query, index)
    if dlse is not None:
        dscores = dscores + torch.where(seen, weights * dlse[..., None], 0)
    dlocal, dretrieved = dscores.split(sizes, -1)
    dquery = scale * (weighted(dlocal, per_head(key, query)) + _weighted_rows(dretrieved, keys))
    dkey = grouped(scale * dlocal.mT @ compute(query), key)
    dmemory_key = _scattered(scale * dretrieved[..., None] * compute(query)[..., None, :], memory_key, query, index)
    dbias = None if memory_bias is None else dretrieved.to(memory_bias.dtype)
    return dquery.to(query.dtype), dkey, dvalue, dmemory_key, dmemory_value, dbias


def _scores(query, key, memory_key, index, memory_bias, scale, left, right):
    """Scores of the keys, then of the memories, -inf for what is not there; what is there; and the retrieved keys."""
    scores = scale * (compute(query) @ per_head(key, query).mT)
    away = torch.arange(scores.shape[3], device=query.device) - torch.arange(scores.shape[2], device=query.device)[:, None]
    seen = torch.ones_like(away, dtype=torch.bool)
    if left >= 0:
        seen = seen & (away >= -left)
    if right >= 0:
        seen = seen & (away <= right)
    scores, seen = scores.masked_fill(~seen, -torch.inf), seen.expand(scores.shape)
    keys = _gathered(memory_key, query, index)
    retrieved, present = scale * (keys @ compute(query)[..., None]).squeeze(-1), _present(index, memory_key)
    if memory_bias is not None:
        retrieved, present = retrieved + compute(memory_bias), present & (memory_bias != -torch.inf)
    retrieved = retrieved.masked_fill(~present, -torch.inf)
    return torch.cat((scores, retrieved), -1), torch.cat((seen, present), -1), keys


def _present(index, memory):
    return (index >= 0) & (index < memory.shape[2])


def _places(index, memory, width):
    """Row numbers for gather and scatter, "B NH Qk W"; what is absent stands at row 0."""
    return torch.where(_present(index, memory), index, 0).flatten(2)[..., None].expand(-1, -1, -1, width)


def _gathered(memory, query, index):
    """The retrieved rows "B NH Q k W", 0 for what is absent."""
    rows = per_head(memory, query)
    if rows.shape[2] == 0:
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1))
    found = rows.gather(2, _places(index, memory, rows.shape[3])).unflatten(2, index.shape[2:])
    return found.masked_fill(~_present(index, memory)[..., None], 0)


def _scattered(gradient, memory, query, index):
    """The sum of what each retrieval "B NH Q k W" gives to its row, in the shape and dtype of the memory."""
    gradient = gradient.masked_fill(~_present(index, memory)[..., None], 0)
    rows = gradient.new_zeros(*query.shape[:2], max(memory.shape[2], 1), memory.shape[3])
    rows = rows.scatter_add(2, _places(index, memory, memory.shape[3]), gradient.flatten(2, 3))
    return grouped(rows[:, :, : memory.shape[2]], memory)


def _weighted_rows(weights, rows):
    """Each query's sum over its own rows "B NH Q k W"; a row with weight 0 counts nothing, whatever it holds."""
    return (weights[..., None] * rows.masked_fill((weights == 0)[..., None], 0)).sum(-2)
