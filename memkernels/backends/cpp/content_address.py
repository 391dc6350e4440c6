"""content_address on the CPU (csrc/cpu/content.cpp)."""

from memkernels import _C
from memkernels.backends._layout import inner_contiguous


def supports(memory, key, strength, mask, similarity):
    return None


def forward(weights, lse, memory, key, strength, mask, similarity):
    _C.content_address(weights, lse, *(inner_contiguous(t) for t in (memory, key, strength, mask)), similarity)


def backward(dmemory, dkey, dstrength, dweights, memory, key, strength, mask, weights, lse, similarity):
    inputs = (inner_contiguous(t) for t in (dweights, memory, key, strength, mask))
    _C.content_address_backward(dmemory, dkey, dstrength, *inputs, lse, similarity)
