"""content_read on Triton: the kernels of _content.py."""

from memkernels.backends.triton import _content, _launch
from memkernels.backends.triton._common import refuse


def supports(memory, key, strength, value, mask, similarity, return_weights):
    widths = (memory.shape[2],) if value is None else (memory.shape[2], value.shape[2])
    return _launch.refuse_rows(key.shape[1], *widths) or refuse(memory)


def forward(read, weights, stats, total, memory, key, strength, value, mask, similarity, return_weights):
    _content.forward(read, total, weights, stats, memory, key, strength, value, mask, similarity)


def backward(
    dmemory, dkey, dstrength, dvalue, dread, dweights, memory, key, strength, value, mask, weights, stats, total, similarity, return_weights
):
    dweights = dweights if return_weights else None
    _content.backward(dmemory, dkey, dstrength, dvalue, dread, dweights, memory, key, strength, value, mask, stats, total, similarity)


AOT = _content.entries("content_read", read=True)
