"""memory_write in plain torch: memory * prod_h(1 - w_h e_h^T) + sum_h w_h a_h^T."""

from memkernels.backends.reference._math import compute, other_factors


def _kept(weights, erase):
    """What one head keeps of each element: "B H N W"."""
    return 1 - weights[..., None] * erase[:, :, None]


def forward(memory, weights, erase, add):
    dtype, memory, weights, erase, add = memory.dtype, *(compute(t) for t in (memory, weights, erase, add))
    return ((memory * _kept(weights, erase).prod(1) + weights.mT @ add).to(dtype),)


def backward(dwritten, memory, weights, erase, add):
    dtype, d, memory, weights, erase, add = memory.dtype, *(compute(t) for t in (dwritten, memory, weights, erase, add))
    kept = _kept(weights, erase)
    dkept = (d * memory)[:, None] * other_factors(kept)
    dweights = add @ d.mT - (dkept * erase[:, :, None]).sum(3)
    derase = -(dkept * weights[..., None]).sum(2)
    return (d * kept.prod(1)).to(dtype), dweights.to(dtype), derase.to(dtype), (weights @ d).to(dtype)
