"""content_read on the CPU (csrc/cpu/content.cpp)."""

from memkernels._C import content_read as _forward
from memkernels._C import content_read_backward as _backward
from memkernels._C import inner_contiguous


def supports(memory, key, strength, value, mask, similarity, return_weights):
    return None


def forward(read, weights, lse, total, memory, key, strength, value, mask, similarity, return_weights):
    inputs = inner_contiguous(memory, key, strength, value, mask)
    _forward(read, weights, lse, total, *inputs, similarity, return_weights)


def backward(
    dmemory, dkey, dstrength, dvalue, dread, dweights, memory, key, strength, value, mask, weights, lse, total, similarity, return_weights
):
    inputs = inner_contiguous(dread, dweights if return_weights else None, memory, key, strength, value, mask)
    _backward(dmemory, dkey, dstrength, dvalue, *inputs, lse, total, similarity)
