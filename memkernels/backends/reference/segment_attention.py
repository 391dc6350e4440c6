"""Graph attention in plain torch: gather the rows of every edge, softmax over the edges of a node, sum them up.

Flat arguments: query "Nd NH D", key "Ns NH D", value "Ns NH V", ptr int64 "Nd+1", index int64 "E", edge_bias None or "E NH", scale,
saving (whether `exact` is wanted: out of the half types before it is rounded).
"""

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._softmax import log_sum_exp


def forward(query, key, value, ptr, index, edge_bias, scale, saving):
    node = _node(ptr, index)
    scores, seen = _scores(query, key, node, index, edge_bias, scale)
    weights, top, total = _softmax(scores, seen, node, query.shape[0])
    rows = _unless(weights == 0, compute(value)[index])
    out = _summed(weights[..., None] * rows, node, query.shape[0])
    exact = out.detach() if saving and out.dtype != query.dtype else out.new_zeros(0)
    return out.to(query.dtype), log_sum_exp(top, total), torch.stack((top, total), -1).detach(), exact


def backward(dout, dlse, query, key, value, ptr, index, edge_bias, out, stats, exact, scale, saving):
    node, nodes, sources = _node(ptr, index), query.shape[0], key.shape[0]
    scores, seen = _scores(query, key, node, index, edge_bias, scale)
    weights, _, _ = _softmax(scores, seen, node, nodes)
    absent = weights == 0
    dscores, dvalue = torch.zeros_like(weights), torch.zeros_like(value)
    if dout is not None:
        dout = _unless(absent, compute(dout)[node])
        dweights = (dout * _unless(absent, compute(value)[index])).sum(-1)
        dscores = weights * (dweights - _summed(weights * dweights, node, nodes)[node])
        dvalue = _summed(weights[..., None] * dout, index, sources)
    if dlse is not None:
        dscores = dscores + weights * dlse[node].masked_fill(absent, 0)
    dquery = scale * _summed(dscores[..., None] * _unless(absent, compute(key)[index]), node, nodes)
    dkey = scale * _summed(dscores[..., None] * _unless(absent, compute(query)[node]), index, sources)
    dbias = None if edge_bias is None else dscores.to(edge_bias.dtype)
    return dquery.to(query.dtype), dkey.to(key.dtype), dvalue.to(value.dtype), dbias


def _node(ptr, index):
    """The node that each edge belongs to."""
    edges = torch.arange(index.shape[0], device=index.device)
    return torch.searchsorted(ptr.contiguous(), edges, right=True) - 1


def _scores(query, key, node, index, edge_bias, scale):
    """Scores "E NH", -inf where an edge is taken away from a head, and where it is not."""
    seen = torch.ones(1, dtype=torch.bool, device=query.device) if edge_bias is None else edge_bias != -torch.inf
    scores = scale * (_unless(~seen, compute(query)[node]) * _unless(~seen, compute(key)[index])).sum(-1)
    if edge_bias is not None:
        scores = scores + compute(edge_bias)
    return scores, seen


def _softmax(scores, seen, node, nodes):
    """Weights, and of each node the maximum of its scores and the sum of exp(score - maximum): -inf and 0 where it sees no edge."""
    lowest = scores.new_full((nodes, *scores.shape[1:]), -torch.inf)
    top = lowest.scatter_reduce(0, node[:, None].expand(scores.shape), scores.detach(), "amax")
    blind = top == -torch.inf
    powers = torch.where(seen, torch.exp(scores - top.masked_fill(blind, 0)[node]), 0)
    total = _summed(powers, node, nodes)
    return powers / total.masked_fill(blind, 1)[node], top, total


def _summed(rows, group, groups):
    """The rows of each group added up, in their order."""
    return rows.new_zeros(groups, *rows.shape[1:]).index_add(0, group, rows)


def _unless(absent, rows):
    """Rows "E NH width", 0 where `absent` "E NH": what stands there must not reach a sum, not even as 0 * NaN."""
    return rows.masked_fill(absent[..., None], 0)
