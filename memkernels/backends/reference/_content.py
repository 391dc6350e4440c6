"""The mathematics that content_address and content_read share: similarity, masked softmax and their gradients."""

import torch

EPS = 1e-6  # inside both square roots of the cosine: a zero row has finite gradients in every dtype


def hide(rows, mask):
    """`rows` "B N W" with masked rows zeroed, so that a NaN in one reaches nothing."""
    return rows if mask is None else rows.masked_fill(~mask[..., None], 0)


def similarity_of(memory, key, similarity, eps=EPS):
    """`c` "B R N"."""
    if similarity == "l2":
        return -(key[:, :, None] - memory[:, None]).square().sum(-1)
    dot = key @ memory.mT
    if similarity == "dot":
        return dot
    return dot / (_norm(key, eps)[:, :, None] * _norm(memory, eps)[:, None])


def softmax(logit, mask):
    """Weights, and (maximum, sum of exp(logit - maximum)); masked rows weigh exactly 0, with nothing to attend the two are (-inf, 0)."""
    if mask is not None:
        logit = logit.masked_fill(~mask[:, None], -torch.inf)
    if logit.shape[-1] == 0:
        return logit, logit.new_tensor((-torch.inf, 0.0)).expand(*logit.shape[:-1], 2).clone()
    top = logit.detach().amax(-1, keepdim=True)
    nothing = top == -torch.inf
    powers = torch.exp(logit - top.masked_fill(nothing, 0))
    total = powers.sum(-1, keepdim=True)
    return powers / total.masked_fill(nothing, 1), torch.cat((top, total), -1).detach()


def softmax_backward(dweights, weights):
    return weights * (dweights - (dweights * weights).sum(-1, keepdim=True))


def similarity_backward(dlogit, similar, memory, key, strength, similarity, eps=EPS):
    """-> dmemory, dkey, dstrength, where logit = strength * similar."""
    dstrength = (dlogit * similar).sum(-1)
    d = dlogit * strength[..., None]
    if similarity == "dot":
        return d.mT @ key, d @ memory, dstrength
    if similarity == "l2":
        return 2 * (d.mT @ key - memory * d.sum(1)[..., None]), 2 * (d @ memory - key * d.sum(2)[..., None]), dstrength
    norm_memory, norm_key = _norm(memory, eps)[..., None], _norm(key, eps)[..., None]
    dot = d / (norm_key * norm_memory.mT)
    along = d * similar
    dmemory = dot.mT @ key - memory * (along.sum(1)[..., None] / norm_memory.square())
    dkey = dot @ memory - key * (along.sum(2)[..., None] / norm_key.square())
    return dmemory, dkey, dstrength


def _norm(rows, eps):
    return (rows.square().sum(-1) + eps).sqrt()
