"""content_read on the CPU (csrc/cpu/content.cpp)."""

from memkernels._C import content_read as forward
from memkernels._C import content_read_backward as _backward

__all__ = ["backward", "forward", "supports"]


def supports(memory, key, strength, value, mask, similarity, return_weights):
    return None


def backward(
    dmemory, dkey, dstrength, dvalue, dread, dweights, memory, key, strength, value, mask, weights, stats, total, similarity, return_weights
):
    dweights = dweights if return_weights else None
    _backward(dmemory, dkey, dstrength, dvalue, dread, dweights, memory, key, strength, value, mask, stats, total, similarity)
