"""content_address on the CPU (csrc/cpu/content.cpp)."""

from memkernels._C import content_address as forward
from memkernels._C import content_address_backward as _backward

__all__ = ["backward", "forward", "supports"]


def supports(memory, key, strength, mask, similarity):
    return None


def backward(dmemory, dkey, dstrength, dweights, memory, key, strength, mask, weights, stats, similarity):
    _backward(dmemory, dkey, dstrength, dweights, memory, key, strength, mask, stats, similarity)
