"""Attention in plain torch: softmax(scale * q . k, capped, + mask) @ v over the keys a query may see.

Flat arguments: query "B NH Q D", key "B NHk K D", value "B NHk K V", attn_mask None or 4-D with size 1 where it broadcasts, its batch
size a divisor of B (row b uses mask row b // (B // Bm)), sink None or "NH" (one more score per row, of a value that is 0), lengths_k None
or int64 "B" (keys past it are not seen), seed None or int64 "B" (_dropout.py), scale, softcap (0 = none: scores s become
softcap * tanh(s / softcap)), dropout_p, left, right (limits of the window around where the query stands, -1 = none; causal is right = 0),
causal: "top-left", query i stands at key i, or "bottom-right", at key i + K - Q, with lengths_k at key i + lengths_k[b] - Q.
"""

import torch

from memkernels.backends.reference._dropout import kept
from memkernels.backends.reference._math import compute
from memkernels.backends.reference._softmax import log_sum_exp


def forward(query, key, value, attn_mask, sink, lengths_k, seed, scale, softcap, dropout_p, left, right, causal):
    key, value = _cut(key, lengths_k), _cut(value, lengths_k)
    scores, seen, _ = _scores(query, key, attn_mask, lengths_k, scale, softcap, left, right, causal)
    weights, top, total, _ = _softmax(scores, seen, sink)
    lse = log_sum_exp(top, total).squeeze(-1)
    stats = torch.cat((top, total), -1).detach()
    return _weighted(weights * kept(seed, dropout_p, scores), _per_head(value, query)).to(query.dtype), lse, stats


def backward(
    dout, dlse, query, key, value, attn_mask, sink, lengths_k, seed, out, stats, scale, softcap, dropout_p, left, right, causal
):  # fmt: skip
    key, value = _cut(key, lengths_k), _cut(value, lengths_k)
    scores, seen, slope = _scores(query, key, attn_mask, lengths_k, scale, softcap, left, right, causal)
    (weights, _, _, own), factor = _softmax(scores, seen, sink), kept(seed, dropout_p, scores)
    keys, values = _per_head(key, query), _per_head(value, query)
    dscores, dvalues, dsink = torch.zeros_like(weights), torch.zeros_like(values), None
    less = weights.new_zeros(())
    if dout is not None:
        dweights = torch.where(seen, compute(dout) @ values.mT, 0) * factor
        less = (weights * dweights).sum(-1, keepdim=True)
        dscores = weights * (dweights - less)
        dvalues = (weights * factor).mT @ compute(dout)
    if dlse is not None:
        less = less - dlse[..., None]
        dscores = dscores + torch.where(seen, weights * dlse[..., None], 0)
    if sink is not None:
        dsink = (-own * less).sum((0, 2, 3)).to(sink.dtype)
    dmask = _to_mask(dscores, attn_mask) if attn_mask is not None and attn_mask.is_floating_point() else None
    if slope is not None:
        dscores = dscores * slope
    dquery = scale * _weighted(dscores, keys)
    dkey = scale * dscores.mT @ compute(query)
    return dquery.to(query.dtype), _grouped(dkey, key), _grouped(dvalues, value), dmask, dsink


def _length(lengths_k, n_key):
    return lengths_k.clamp(0, n_key)[:, None, None, None]


def _cut(rows, lengths_k):
    """Keys or values past the end of their sequence hold anything: here they are 0."""
    if lengths_k is None:
        return rows
    n_key = rows.shape[2]
    return rows.masked_fill(torch.arange(n_key, device=rows.device)[:, None] >= _length(lengths_k, n_key), 0)


def _per_head(tensor, query):
    """A key or value "B NHk K D" for each query head: head h reads h // (NH // NHk)."""
    heads, shared = query.shape[1], tensor.shape[1]
    return compute(tensor) if heads == shared else compute(tensor).repeat_interleave(heads // shared, 1)


def _grouped(gradient, tensor):
    """The sum over the query heads that share a key head, in the shape and dtype of `tensor`."""
    heads, shared = gradient.shape[1], tensor.shape[1]
    return (gradient if heads == shared else gradient.unflatten(1, (shared, heads // shared)).sum(2)).to(tensor.dtype)


def _scores(query, key, attn_mask, lengths_k, scale, softcap, left, right, causal):
    """Scores "B NH Q K", -inf where a query may not look; where it may (full shape); the slope of the cap there, None without."""
    scores, slope = scale * (compute(query) @ _per_head(key, query).mT), None
    batch, _, n_query, n_key = scores.shape
    places = torch.arange(n_key, device=query.device)
    length = n_key if lengths_k is None else _length(lengths_k, n_key)
    away = places - torch.arange(n_query, device=query.device)[:, None] - (length - n_query if causal == "bottom-right" else 0)
    seen = torch.ones_like(away, dtype=torch.bool) & (places < length)
    if left >= 0:
        seen = seen & (away >= -left)
    if right >= 0:
        seen = seen & (away <= right)
    if softcap:
        bounded = torch.tanh(scores / softcap)
        scores, slope = softcap * bounded, 1 - bounded * bounded
    if attn_mask is not None:
        mask = compute(attn_mask)
        if mask.shape[0] not in (1, batch):
            mask = mask.repeat_interleave(batch // mask.shape[0], 0)
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            scores, seen = scores + mask, seen & (mask != -torch.inf)
    seen = seen.expand(scores.shape)
    return scores.masked_fill(~seen, -torch.inf), seen, None if slope is None else slope.masked_fill(~seen, 0)


def _softmax(scores, seen, sink):
    """Weights, the maximum of the scores, the sum of exp(score - maximum), and the sink's weight, the sink counting in all.

    0, -inf and 0 where a query sees no key and there is no sink.
    """
    top = scores.detach().amax(-1, keepdim=True) if scores.shape[-1] else scores.detach().sum(-1, keepdim=True) - torch.inf
    if sink is not None:
        extra = compute(sink)[:, None, None]
        top = torch.maximum(top, extra.detach())
    blind = top == -torch.inf
    base = top.masked_fill(blind, 0)
    powers = torch.where(seen, torch.exp(scores - base), 0)
    total = powers.sum(-1, keepdim=True)
    own = None
    if sink is not None:
        own = torch.where(extra == -torch.inf, 0, torch.exp(extra - base))
        total = total + own
    share = total.masked_fill(blind, 1)
    return powers / share, top, total, None if own is None else own / share


def _weighted(weights, rows):
    """weights @ rows, where a row that is not finite counts only if its weight is not 0 (0 * NaN must not reach the sum)."""
    broken = ~rows.isfinite()
    reached = (weights != 0).to(rows.dtype) @ broken.to(rows.dtype) > 0
    return (weights @ rows.masked_fill(broken, 0)).masked_fill(reached, torch.nan)


def _to_mask(dscores, mask):
    """Summed over the axes along which the mask broadcasts."""
    if mask.shape[0] not in (1, dscores.shape[0]):
        dscores = dscores.unflatten(0, (mask.shape[0], -1)).sum(1)
    return dscores.sum_to_size(mask.shape).to(mask.dtype)
