"""The softmax over a union of parts, of which each gives its attention and its log-sum-exp, in plain torch.

weight_s = exp(lse_s - lse), lse = log sum_s exp(lse_s), out = sum_s weight_s out_s. A part of weight 0 counts for nothing, whatever it
holds. No output is kept for backward: the weights are a few operations a row.
"""

import torch

from memkernels.backends.reference._math import compute


def forward(outs, lses):
    weights, lse = _weights(lses)
    out = (weights[..., None] * _counted(compute(outs), weights)).sum(0)
    return out.to(outs.dtype), lse


def backward(dout, dlse, outs, lses):
    weights, _ = _weights(lses)
    douts, dlses = compute(torch.zeros_like(outs)), torch.zeros_like(weights)
    if dout is not None:
        upstream = compute(dout).expand(outs.shape)
        douts = weights[..., None] * _counted(upstream, weights)
        dots = (_counted(compute(outs), weights) * _counted(upstream, weights)).sum(-1)
        dlses = weights * (dots - (weights * dots).sum(0))
    if dlse is not None:
        dlses = dlses + weights * dlse.expand(weights.shape).masked_fill(weights == 0, 0)
    return douts.to(outs.dtype), dlses.to(lses.dtype)


def _weights(lses):
    """Of each part in each row, and the log-sum-exp of the union: all 0 and -inf where no part saw anything."""
    lses = compute(lses)
    if lses.shape[0] == 0:
        return lses, lses.sum(0) - torch.inf
    top = lses.detach().amax(0)
    blind = top == -torch.inf
    powers = torch.exp(lses - top.masked_fill(blind, 0))
    total = powers.sum(0).masked_fill(blind, 1)
    return powers / total, top + total.log()


def _counted(rows, weights):
    """The rows, 0 where their weight is 0: 0 * NaN must not reach a sum."""
    return rows.masked_fill((weights == 0)[..., None], 0)
