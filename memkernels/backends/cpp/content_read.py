"""content_read on the CPU (csrc/cpu/content.cpp)."""

from memkernels import _C
from memkernels.backends._layout import inner_contiguous


def supports(memory, key, strength, value, mask, similarity, return_weights):
    return None


def forward(read, weights, lse, total, memory, key, strength, value, mask, similarity, return_weights):
    inputs = (inner_contiguous(t) for t in (memory, key, strength, value, mask))
    _C.content_read(read, weights, lse, total, *inputs, similarity, return_weights)


def backward(
    dmemory, dkey, dstrength, dvalue, dread, dweights, memory, key, strength, value, mask, weights, lse, total, similarity, return_weights
):
    inputs = (inner_contiguous(t) for t in (dread, dweights if return_weights else None, memory, key, strength, value, mask))
    _C.content_read_backward(dmemory, dkey, dstrength, dvalue, *inputs, lse, total, similarity)
