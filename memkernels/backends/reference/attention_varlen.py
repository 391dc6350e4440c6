"""Attention of sequences laid end to end, in plain torch: the dense formula with the sequences as a mask.

Flat arguments: query "Tq NH D", key "Tk NHk D", value "Tk NHk V", cu_seqlens_q and cu_seqlens_k int64 "S+1" (where each sequence begins,
and the end of the last one), scale, softcap (0: none), left, right (limits of the window around where a query stands, -1 = none; causal is
right = 0), causal: "top-left", query i of a sequence stands at its key i, or "bottom-right", its last query at its last key. Tokens past
the end of the last sequence see nothing and are seen by nobody. Shapes depend on no value. stats "NH Tq 2" as in attention.
"""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._softmax import log_sum_exp, masked_softmax
from memkernels.backends.reference.attention import _grouped, _per_head, _weighted


def forward(query, key, value, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal):
    rows, keys, values = (_heads_first(t) for t in (query, key, value))
    scores, seen, _ = _scores(rows, keys, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal)
    weights, top, total = masked_softmax(scores, seen)
    out = _weighted(weights, _per_head(values, rows))
    stats = torch.cat((top, total), -1).detach()
    return out[0].transpose(0, 1).to(query.dtype), log_sum_exp(top, total).squeeze(-1)[0].mT, stats[0]


def backward(dout, dlse, query, key, value, cu_seqlens_q, cu_seqlens_k, out, stats, scale, softcap, left, right, causal):
    rows, keys, values = (_heads_first(t) for t in (query, key, value))
    scores, seen, slope = _scores(rows, keys, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal)
    weights, per_key, per_value = masked_softmax(scores, seen)[0], _per_head(keys, rows), _per_head(values, rows)
    dscores, dvalues = torch.zeros_like(weights), torch.zeros_like(per_value)
    if dout is not None:
        dout = compute(_heads_first(dout))
        dweights = torch.where(seen, dout @ per_value.mT, 0)
        dscores = torch.where(seen, weights * (dweights - (weights * dweights).sum(-1, keepdim=True)), 0)
        dvalues = _weighted(weights.mT, dout)
    if dlse is not None:
        dscores = dscores + torch.where(seen, weights * dlse.mT[None, ..., None], 0)
    dscores = dscores if slope is None else torch.where(seen, dscores * slope, 0)
    dquery = scale * _weighted(dscores, per_key)
    dkey = _grouped(scale * _weighted(dscores.mT, compute(rows)), keys)
    return tuple(t[0].transpose(0, 1) for t in (dquery.to(query.dtype), dkey, _grouped(dvalues, values)))


def _heads_first(tensor):
    return tensor.transpose(0, 1)[None]


def _places(cu_seqlens, tokens):
    """Of each token its sequence (the last number: none), its place there, and the length of the sequence."""
    last, token = cu_seqlens.shape[0] - 1, torch.arange(tokens, device=cu_seqlens.device)
    sequence = (token[:, None] >= cu_seqlens[1:]).sum(-1)
    start = cu_seqlens[sequence]
    return sequence, token - start, cu_seqlens[(sequence + 1).clamp(max=last)] - start


def _scores(query, key, cu_seqlens_q, cu_seqlens_k, scale, softcap, left, right, causal):
    """Scores "1 NH Tq Tk", -inf where a query may not look; where it may; the slope of the cap, None without one."""
    scores, slope = scale * (compute(query) @ _per_head(key, query).mT), None
    if softcap:
        bent = torch.tanh(scores / softcap)
        scores, slope = softcap * bent, 1 - bent * bent
    of_query, stands, queries = _places(cu_seqlens_q, query.shape[2])
    of_key, at, _ = _places(cu_seqlens_k, key.shape[2])
    if causal == "bottom-right":
        ends = cu_seqlens_k[(of_query + 1).clamp(max=cu_seqlens_k.shape[0] - 1)]
        stands = stands + ends - cu_seqlens_k[of_query] - queries
    away = at - stands[:, None]
    seen = (of_query[:, None] == of_key) & (of_key < cu_seqlens_k.shape[0] - 1)
    if left >= 0:
        seen = seen & (away >= -left)
    if right >= 0:
        seen = seen & (away <= right)
    seen = seen.expand(scores.shape)
    return scores.masked_fill(~seen, -torch.inf), seen, slope
