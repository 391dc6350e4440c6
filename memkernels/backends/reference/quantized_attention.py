"""Attention over an int8 memory in plain torch: softmax(scale * q . (key_scale key)) @ (value_scale value) over lengths_k keys."""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._softmax import log_sum_exp, masked_softmax


def forward(query, key, value, key_scale, value_scale, lengths_k, scale):
    scores, seen = _scores(query, _rows(key, key_scale, query, lengths_k), lengths_k, scale)
    weights, top, total = masked_softmax(scores, seen)
    out = weights @ _rows(value, value_scale, query, lengths_k)
    return out.to(query.dtype), log_sum_exp(top, total).squeeze(-1), torch.cat((top, total), -1).detach(), out.detach().clone()


def backward(dout, dlse, query, key, value, key_scale, value_scale, lengths_k, stats, total, scale):
    keys = _rows(key, key_scale, query, lengths_k)
    scores, seen = _scores(query, keys, lengths_k, scale)
    weights, _, _ = masked_softmax(scores, seen)
    dscores = torch.zeros_like(weights)
    if dout is not None:
        dweights = compute(dout) @ _rows(value, value_scale, query, lengths_k).mT
        dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    if dlse is not None:
        dscores = dscores + torch.where(seen, weights * dlse[..., None], 0)
    return ((scale * dscores @ keys).to(query.dtype),)


def _seen(lengths_k, n_key):
    """Which keys an entry sees, "B 1 K"."""
    return (torch.arange(n_key, device=lengths_k.device) < lengths_k[:, None])[:, None]


def _rows(rows, scale, query, lengths_k):
    """The memory as floating rows, for each query head: head h reads h // (NH // NHk); rows beyond a length are 0."""
    if lengths_k is not None:
        scale = torch.where(_seen(lengths_k, scale.shape[-1]), scale, 0)
    wide = rows.to(scale.dtype) * scale[..., None]
    heads, shared = query.shape[1], rows.shape[1]
    return wide if heads == shared else wide.repeat_interleave(heads // shared, 1)


def _scores(query, keys, lengths_k, scale):
    scores = scale * (compute(query) @ keys.mT)
    if lengths_k is None:
        return scores, torch.ones_like(scores, dtype=torch.bool)
    seen = _seen(lengths_k, scores.shape[-1])[:, :, None].expand(scores.shape)
    return scores.masked_fill(~seen, -torch.inf), seen
