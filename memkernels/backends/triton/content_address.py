"""content_address on Triton: the kernels of _content.py without the read."""

from memkernels.backends.triton import _content, _launch
from memkernels.backends.triton._common import refuse


def supports(memory, key, strength, mask, similarity):
    return _launch.refuse_rows(key.shape[1], memory.shape[2]) or refuse(memory)


def forward(weights, stats, memory, key, strength, mask, similarity):
    _content.forward(None, None, weights, stats, memory, key, strength, None, mask, similarity)


def backward(dmemory, dkey, dstrength, dweights, memory, key, strength, mask, weights, stats, similarity):
    _content.backward(dmemory, dkey, dstrength, None, None, dweights, memory, key, strength, None, mask, stats, None, similarity)


AOT = _content.entries("content_address", read=False)
