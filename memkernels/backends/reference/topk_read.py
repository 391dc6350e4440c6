"""topk_read in plain torch: all scores, the k best of each query by a stable sort, softmax over them, the sum of their values.

Flat arguments: query "B Q D", key "B N D", value "B N V", mask bool "B N" or None, k, similarity, scale, few (of kernels alone).
"""

import torch

from memkernels.backends.reference._content import hide, similarity_of, softmax_backward
from memkernels.backends.reference._math import compute
from memkernels.backends.reference._softmax import masked_softmax
from memkernels.backends.reference.retrieval_attention import _gathered, _scattered
from memkernels.backends.reference.retrieval_attention import _weighted_rows as weighted_rows

EPS = 1e-6


def best(scores, k):
    """Index of the k best, best first, ties to the lowest; -1 where there is none, or its score is -inf."""
    index = torch.sort(scores.detach(), dim=-1, descending=True, stable=True).indices[..., :k]
    index = torch.where(scores.detach().gather(-1, index) == -torch.inf, -1, index)
    return torch.nn.functional.pad(index, (0, k - index.shape[-1]), value=-1)


def forward(query, key, value, mask, k, similarity, scale, few):
    with torch.no_grad():
        scores = similarity_of(hide(compute(key), mask), compute(query), similarity)
        index = best(scores if mask is None else scores.masked_fill(~mask[:, None], -torch.inf), k)
    weights, _ = _weights(compute(query), _rows(compute(key), query, index), index, similarity, scale)
    read = weighted_rows(weights, _rows(compute(value), query, index))
    return read.to(query.dtype), weights.to(query.dtype), index


def backward(dread, dweights, query, key, value, mask, index, k, similarity, scale, few):
    wide, rows = compute(query), _rows(compute(key), query, index)
    weights, score = _weights(wide, rows, index, similarity, scale)
    gradient, dvalue = torch.zeros_like(weights), torch.zeros_like(compute(value))
    if dread is not None:
        gradient = gradient + (_rows(compute(value), query, index) @ compute(dread)[..., None]).squeeze(-1)
        dvalue = _sum_rows(weights[..., None] * compute(dread)[..., None, :], value, query, index)
    if dweights is not None:
        gradient = gradient + torch.where(index >= 0, compute(dweights), 0)
    gradient = scale * softmax_backward(torch.where(weights > 0, gradient, 0), weights)
    dquery, drows = _score_backward(gradient, score, wide, rows, similarity)
    return dquery.to(query.dtype), _sum_rows(drows, key, query, index), dvalue


def _weights(query, rows, index, similarity, scale):
    """The softmax over the chosen rows, and their scores "B Q k"."""
    pairs = query.flatten(0, 1)[:, None], rows.flatten(0, 1)
    score = similarity_of(pairs[1], pairs[0], similarity).reshape(index.shape)
    present = index >= 0
    weights = masked_softmax(torch.where(present, scale * score, -torch.inf), present)[0]
    return torch.where(present, weights, 0), score


def _score_backward(d, score, query, rows, similarity):
    """-> dquery "B Q D", the gradients of the chosen rows "B Q k D"."""
    near = query[..., None, :]
    if similarity == "dot":
        return (d[..., None] * rows).sum(-2), d[..., None] * near
    if similarity == "l2":
        drows = -2 * d[..., None] * (rows - near)
        return -drows.sum(-2), drows
    squares, square = rows.square().sum(-1) + EPS, query.square().sum(-1, keepdim=True) + EPS
    along, dot = d * score, d / (squares.sqrt() * square.sqrt())
    dquery = (dot[..., None] * rows).sum(-2) - query * (along.sum(-1, keepdim=True) / square)
    return dquery, dot[..., None] * near - rows * (along / squares)[..., None]


def _rows(memory, query, index):
    """The chosen rows "B Q k W", 0 for what is absent."""
    return _gathered(memory[:, None], query[:, None], index[:, None])[:, 0]


def _sum_rows(gradient, memory, query, index):
    """The sum of what each chosen row "B Q k W" was given, in the shape and dtype of the memory."""
    return _scattered(gradient[:, None], memory[:, None], query[:, None], index[:, None])[:, 0]
