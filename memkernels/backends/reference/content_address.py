"""content_address in plain torch: weights = softmax(strength * similarity(key, memory))."""

from memkernels.backends.reference._content import hide, similarity_backward, similarity_of, softmax, softmax_backward
from memkernels.backends.reference._math import compute


def _weigh(memory, key, strength, mask, similarity):
    similar = similarity_of(memory, key, similarity)
    return similar, *softmax(strength[..., None] * similar, mask)


def forward(memory, key, strength, mask, similarity):
    _, weights, stats = _weigh(hide(compute(memory), mask), compute(key), compute(strength), mask, similarity)
    return weights.to(memory.dtype), stats


def backward(dweights, memory, key, strength, mask, weights, stats, similarity):
    dtype, memory, key, strength = memory.dtype, hide(compute(memory), mask), compute(key), compute(strength)
    similar, weights, _ = _weigh(memory, key, strength, mask, similarity)  # the saved weights are rounded to the dtype of the call
    dweights = compute(dweights)
    if mask is not None:
        dweights = dweights.masked_fill(~mask[:, None], 0)
    dlogit = softmax_backward(dweights, weights)
    return tuple(d.to(dtype) for d in similarity_backward(dlogit, similar, memory, key, strength, similarity))
