"""content_address on the CPU (csrc/cpu/content.cpp)."""

from memkernels._C import content_address as _forward
from memkernels._C import content_address_backward as _backward
from memkernels._C import inner_contiguous


def supports(memory, key, strength, mask, similarity):
    return None


def forward(weights, lse, memory, key, strength, mask, similarity):
    _forward(weights, lse, *inner_contiguous(memory, key, strength, mask), similarity)


def backward(dmemory, dkey, dstrength, dweights, memory, key, strength, mask, weights, lse, similarity):
    inputs = inner_contiguous(dweights, memory, key, strength, mask)
    _backward(dmemory, dkey, dstrength, *inputs, lse, similarity)
