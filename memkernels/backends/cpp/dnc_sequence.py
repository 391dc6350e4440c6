"""dnc_sequence on the CPU (csrc/cpu/dnc_sequence.cpp), which takes everything but input and memory contiguous."""

import math

from memkernels._C import dnc_sequence as _forward
from memkernels._C import dnc_sequence_backward as _backward


def supports(*call):
    return None


def _dense(tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def _options(key_mask, sharpen_links, deallocate, write_gradient, strength, cosine, bounded, clip):
    return [key_mask, sharpen_links, deallocate, write_gradient, bounded], strength, cosine, clip or math.inf


def forward(*call):
    outputs, (input, memory, *rest), options = call[:15], call[15:31], call[31:]
    _forward(outputs, [input, memory, *_dense(rest)], *_options(*options))


def backward(*call):
    gradients, upstream, (input, memory, *rest), saved, options = call[:16], call[16:24], call[24:40], call[40:48], call[48:]
    _backward(gradients, _dense(upstream), [input, memory, *_dense(rest)], saved, *_options(*options))
