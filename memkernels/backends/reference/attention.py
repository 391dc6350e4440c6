"""Attention in plain torch: softmax(scale * q . k + mask) @ v over the keys a query may see.

Flat arguments: query "B NH Q D", key "B NHk K D", value "B NHk K V", attn_mask None or 4-D with size 1 where it broadcasts, its batch
size a divisor of B (row b uses mask row b // (B // Bm)), seed None or int64 "B", scale, dropout_p, left, right (limits of the window
around where the query stands, -1 = none; causal is right = 0), causal: "top-left", query i stands at key i, or "bottom-right", at
key i + K - Q.

Dropout is a hash of (seed[b], head h, query q, key k), all words 32 bits, sums and products modulo 2^32, `>>` logical:
    mix(x): x ^= x >> 16; x *= 0x85EBCA6B; x ^= x >> 13; x *= 0xC2B2AE35; x ^= x >> 16
    a = mix(mix(low(seed) + q * 0x9E3779B9) + h * 0x9E3779B9);  c = mix(a ^ high(seed))               one pair a row
    x = a + k * 0x9E3779B9; x ^= x >> 16; x *= 0x85EBCA6B; x ^= c; x ^= x >> 13; x *= 0xC2B2AE35; x ^= x >> 16
    kept if x >= floor(dropout_p * 2^32), a kept weight is multiplied by 1 / (1 - dropout_p); dropout_p = 1 keeps nothing.
"""

import torch

from memkernels.backends.reference._math import compute

WORD, GOLDEN, FIRST, SECOND = 0xFFFFFFFF, 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35


def forward(query, key, value, attn_mask, seed, scale, dropout_p, left, right, causal):
    scores, seen = _scores(query, key, attn_mask, scale, left, right, causal)
    weights, top, total = _softmax(scores, seen)
    lse = (top + total.log()).squeeze(-1)
    stats = torch.cat((top, total), -1).detach()
    return _weighted(weights * _kept(seed, dropout_p, scores), _per_head(value, query)).to(query.dtype), lse, stats


def backward(dout, dlse, query, key, value, attn_mask, seed, out, stats, scale, dropout_p, left, right, causal):
    scores, seen = _scores(query, key, attn_mask, scale, left, right, causal)
    (weights, _, _), kept = _softmax(scores, seen), _kept(seed, dropout_p, scores)
    keys, values = _per_head(key, query), _per_head(value, query)
    dscores, dvalues = torch.zeros_like(weights), torch.zeros_like(values)
    if dout is not None:
        dweights = torch.where(seen, compute(dout) @ values.mT, 0) * kept
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
        dvalues = (weights * kept).mT @ compute(dout)
    if dlse is not None:
        dscores = dscores + torch.where(seen, weights * dlse[..., None], 0)
    dquery = scale * _weighted(dscores, keys)
    dkey = scale * dscores.mT @ compute(query)
    dmask = _to_mask(dscores, attn_mask) if attn_mask is not None and attn_mask.is_floating_point() else None
    return dquery.to(query.dtype), _grouped(dkey, key), _grouped(dvalues, value), dmask


def _per_head(tensor, query):
    """A key or value "B NHk K D" for each query head: head h reads h // (NH // NHk)."""
    heads, shared = query.shape[1], tensor.shape[1]
    return compute(tensor) if heads == shared else compute(tensor).repeat_interleave(heads // shared, 1)


def _grouped(gradient, tensor):
    """The sum over the query heads that share a key head, in the shape and dtype of `tensor`."""
    heads, shared = gradient.shape[1], tensor.shape[1]
    return (gradient if heads == shared else gradient.unflatten(1, (shared, heads // shared)).sum(2)).to(tensor.dtype)


def _scores(query, key, attn_mask, scale, left, right, causal):
    """Scores "B NH Q K", -inf where a query may not look, and where it may (full shape)."""
    scores = scale * (compute(query) @ _per_head(key, query).mT)
    batch, _, n_query, n_key = scores.shape
    stands = torch.arange(n_query, device=query.device)[:, None] + (n_key - n_query if causal == "bottom-right" else 0)
    away = torch.arange(n_key, device=query.device) - stands
    seen = torch.ones_like(away, dtype=torch.bool)
    if left >= 0:
        seen = seen & (away >= -left)
    if right >= 0:
        seen = seen & (away <= right)
    if attn_mask is not None:
        mask = compute(attn_mask)
        if mask.shape[0] not in (1, batch):
            mask = mask.repeat_interleave(batch // mask.shape[0], 0)
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            scores, seen = scores + mask, seen & (mask != -torch.inf)
    seen = seen.expand(scores.shape)
    return scores.masked_fill(~seen, -torch.inf), seen


def _softmax(scores, seen):
    """Weights, the maximum of the scores, and the sum of exp(score - maximum): 0, -inf and 0 where a query sees no key."""
    if scores.shape[-1] == 0:
        nothing = scores.sum(-1, keepdim=True)
        return scores, nothing - torch.inf, nothing
    top = scores.detach().amax(-1, keepdim=True)
    blind = top == -torch.inf
    powers = torch.where(seen, torch.exp(scores - top.masked_fill(blind, 0)), 0)
    total = powers.sum(-1, keepdim=True)
    return powers / total.masked_fill(blind, 1), top, total


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


def _kept(seed, dropout_p, scores):
    """What each weight is multiplied by: 0 or 1 / (1 - dropout_p)."""
    if not dropout_p:
        return 1.0
    if dropout_p == 1:
        return 0.0
    _, n_head, n_query, n_key = scores.shape
    head, query, key = (torch.arange(n, device=seed.device) for n in (n_head, n_query, n_key))
    seed = seed[:, None, None]
    a = _mix((_mix(((seed & WORD) + query * GOLDEN) & WORD) + head[:, None] * GOLDEN) & WORD)
    c = _mix(a ^ (seed >> 32 & WORD))
    x = (a[..., None] + key * GOLDEN) & WORD
    x = ((x ^ (x >> 16)) * FIRST & WORD) ^ c[..., None]
    x = (x ^ (x >> 13)) * SECOND & WORD
    return ((x ^ (x >> 16)) >= int(dropout_p * 2**32)).to(scores.dtype) / (1 - dropout_p)


def _mix(x):
    x = (x ^ (x >> 16)) * FIRST & WORD
    x = (x ^ (x >> 13)) * SECOND & WORD
    return x ^ (x >> 16)
