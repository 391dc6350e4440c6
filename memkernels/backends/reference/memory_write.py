"""memory_write in plain torch: memory * prod_h(1 - w_h e_h^T) + sum_h w_h a_h^T."""

import torch

from memkernels.backends.reference._math import compute


def _kept(weights, erase):
    """What one head keeps of each element: "B H N W"."""
    return 1 - weights[..., None] * erase[:, :, None]


def _other_heads(kept):
    """Product over all heads but h, by prefix and suffix products: exact where a factor is zero."""
    one = kept.new_ones(kept.shape[0], 1, *kept.shape[2:])
    before = torch.cat([one, kept], 1).cumprod(1)[:, :-1]
    after = torch.cat([kept, one], 1).flip(1).cumprod(1).flip(1)[:, 1:]
    return before * after


def forward(memory, weights, erase, add):
    dtype, memory, weights, erase, add = memory.dtype, *(compute(t) for t in (memory, weights, erase, add))
    return ((memory * _kept(weights, erase).prod(1) + weights.mT @ add).to(dtype),)


def backward(dwritten, memory, weights, erase, add):
    dtype, d, memory, weights, erase, add = memory.dtype, *(compute(t) for t in (dwritten, memory, weights, erase, add))
    kept = _kept(weights, erase)
    dkept = (d * memory)[:, None] * _other_heads(kept)
    dweights = add @ d.mT - (dkept * erase[:, :, None]).sum(3)
    derase = -(dkept * weights[..., None]).sum(2)
    return (d * kept.prod(1)).to(dtype), dweights.to(dtype), derase.to(dtype), (weights @ d).to(dtype)
