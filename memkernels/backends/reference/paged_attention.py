"""Attention of queries to keys that lie in pages, in plain torch: the pages are gathered, then the dense formula.

Flat arguments: query "B NH Q D", key_pages "P S NHk D", value_pages "P S NHk V", page_table int64 "B M", lengths int64 "B", scale,
is_causal. Key j of row b is key_pages[page_table[b, j // S], j % S], for j < lengths[b]; what else a page holds, and entries of the table
behind the last page of a row, reach nothing. Causal: query i stands at key lengths[b] - Q + i. stats "B NH Q 2" as in attention.
"""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._softmax import log_sum_exp, masked_softmax
from memkernels.backends.reference.attention import _grouped, _per_head, _weighted


def forward(query, key_pages, value_pages, page_table, lengths, scale, is_causal):
    keys, values = (_gathered(t, page_table, lengths) for t in (key_pages, value_pages))
    weights, top, total = masked_softmax(*_scores(query, keys, lengths, scale, is_causal))
    stats = torch.cat((top, total), -1).detach()
    return _weighted(weights, _per_head(values, query)).to(query.dtype), log_sum_exp(top, total).squeeze(-1), stats


def backward(dout, dlse, query, key_pages, value_pages, page_table, lengths, out, stats, scale, is_causal):
    keys, values = (_gathered(t, page_table, lengths) for t in (key_pages, value_pages))
    scores, seen = _scores(query, keys, lengths, scale, is_causal)
    weights, per_key, per_value = masked_softmax(scores, seen)[0], _per_head(keys, query), _per_head(values, query)
    dscores, dvalues = torch.zeros_like(weights), torch.zeros_like(per_value)
    if dout is not None:
        dweights = torch.where(seen, compute(dout) @ per_value.mT, 0)
        dscores = torch.where(seen, weights * (dweights - (weights * dweights).sum(-1, keepdim=True)), 0)
        dvalues = _weighted(weights.mT, compute(dout))
    if dlse is not None:
        dscores = dscores + torch.where(seen, weights * dlse[..., None], 0)
    dquery = scale * _weighted(dscores, per_key)
    dkeys = _grouped(scale * _weighted(dscores.mT, compute(query)), keys)
    return dquery.to(query.dtype), _to_pages(dkeys, key_pages, page_table), _to_pages(_grouped(dvalues, values), value_pages, page_table)


def _gathered(pages, page_table, lengths):
    """The keys or values "B NHk K D" of all rows, 0 from the end of a row on."""
    (batch, most), size = page_table.shape, pages.shape[1]
    held = compute(pages) if pages.shape[0] else compute(pages).new_zeros(1, *pages.shape[1:])
    rows = held[page_table.clamp(0, held.shape[0] - 1)].reshape(batch, most * size, *pages.shape[2:])
    used = torch.arange(most * size, device=pages.device) < lengths[:, None]
    return torch.where(used[..., None, None], rows, 0).transpose(1, 2)


def _to_pages(gradient, pages, page_table):
    """Each page's gradient summed over the places that it has in the table, in their order."""
    count = pages.shape[0]
    rows = gradient.transpose(1, 2).reshape(page_table.numel(), *pages.shape[1:])
    zeros = rows.new_zeros(max(count, 1), *pages.shape[1:])
    return zeros.index_add(0, page_table.clamp(0, max(count - 1, 0)).reshape(-1), rows)[:count].to(pages.dtype)


def _scores(query, keys, lengths, scale, is_causal):
    """Scores "B NH Q K", -inf where a query may not look, and where it may."""
    scores = scale * (compute(query) @ _per_head(keys, query).mT)
    last = lengths[:, None] - 1
    if is_causal:
        last = last - query.shape[2] + 1 + torch.arange(query.shape[2], device=query.device)
    seen = (torch.arange(keys.shape[2], device=query.device) <= last[..., None])[:, None].expand(scores.shape)
    return scores.masked_fill(~seen, -torch.inf), seen
