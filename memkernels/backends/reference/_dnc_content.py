"""Content weights of a Differentiable Neural Computer's heads and their gradient: the cosine's three forms, masks of keys."""

import torch

from memkernels.backends.reference._content import EPS, softmax_backward


def _root(square):
    """The square root, with gradient 0 at 0 instead of infinity."""
    return torch.where(square > 0, torch.where(square > 0, square, 1).sqrt(), 0)


def _half_over(root):
    """The slope of the root."""
    return torch.where(root > 0, 0.5 / torch.where(root > 0, root, 1), 0)


def _parts(memory, keys, mask, cosine):
    """Cosines and their denominators "B H N", norms of keys and rows, the squared mask, the keys as the dot products see them."""
    squared = None if mask is None else mask.square()
    seen = keys if mask is None else keys * squared
    rows = memory.square().sum(-1)[:, None] if mask is None else squared @ memory.square().mT
    inside, outside = (0.0 if cosine == "product" else EPS), (0.0 if cosine == "roots" else EPS)
    of_key, of_row = _root((keys * seen).sum(-1, keepdim=True) + inside), _root(rows + inside)
    norm = of_key * of_row + outside
    return (seen @ memory.mT) / norm, norm, of_key, of_row, squared, seen


def forward(memory, keys, strengths, mask, cosine):
    return torch.softmax(strengths[..., None] * _parts(memory, keys, mask, cosine)[0], -1)


def backward(dweights, weights, memory, keys, strengths, mask, cosine):
    """-> dmemory, dkeys, dstrengths, dmask."""
    similar, norm, of_key, of_row, squared, seen = _parts(memory, keys, mask, cosine)
    dlogit = softmax_backward(dweights, weights)
    dstrengths = (dlogit * similar).sum(-1)
    ddot = dlogit * strengths[..., None] / norm
    dnorm = -ddot * similar
    dkey = (dnorm * of_row).sum(-1, keepdim=True) * _half_over(of_key)  # of the squared norms
    drow = dnorm * of_key * _half_over(of_row)
    along = ddot @ memory
    dkeys = along + 2 * dkey * keys
    if mask is None:
        return ddot.mT @ keys + 2 * memory * drow.sum(1)[..., None], dkeys, dstrengths, None
    dsquared = keys * along + drow @ memory.square() + dkey * keys.square()
    return ddot.mT @ seen + 2 * memory * (drow.mT @ squared), squared * dkeys, dstrengths, 2 * mask * dsquared
