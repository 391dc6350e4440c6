"""content_read in plain torch: softmax(strength * similarity(key, memory)) @ value, where value defaults to memory."""

from memkernels.backends.reference._content import hide, similarity_backward, similarity_of, softmax, softmax_backward
from memkernels.backends.reference._math import compute


def forward(memory, key, strength, value, mask, similarity, return_weights):
    dtype, rows, key, strength = memory.dtype, hide(compute(memory), mask), compute(key), compute(strength)
    weights, stats = softmax(strength[..., None] * similarity_of(rows, key, similarity), mask)
    total = weights @ (rows if value is None else hide(compute(value), mask))
    return total.to(dtype), weights.to(dtype) if return_weights else memory.new_empty(0), stats, total.clone()


def backward(dread, dweights, memory, key, strength, value, mask, weights, stats, total, similarity, return_weights):
    dtype, rows, key, strength = memory.dtype, hide(compute(memory), mask), compute(key), compute(strength)
    values = rows if value is None else hide(compute(value), mask)
    similar = similarity_of(rows, key, similarity)
    weights, _ = softmax(strength[..., None] * similar, mask)
    gradient = similar.new_zeros(similar.shape)
    if dread is not None:
        gradient = gradient + compute(dread) @ values.mT
    if dweights is not None and return_weights:
        gradient = gradient + (compute(dweights) if mask is None else compute(dweights).masked_fill(~mask[:, None], 0))
    dmemory, dkey, dstrength = similarity_backward(softmax_backward(gradient, weights), similar, rows, key, strength, similarity)
    dvalue = values.new_zeros(values.shape) if dread is None else weights.mT @ compute(dread)
    if value is None:
        return (dmemory + dvalue).to(dtype), dkey.to(dtype), dstrength.to(dtype), None
    return dmemory.to(dtype), dkey.to(dtype), dstrength.to(dtype), dvalue.to(dtype)
