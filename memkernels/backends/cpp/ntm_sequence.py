"""ntm_sequence on the CPU (csrc/cpu/ntm_sequence.cpp), which takes everything but input and memory contiguous."""

from memkernels._C import ntm_sequence as _forward
from memkernels._C import ntm_sequence_backward as _backward


def supports(*call):
    return None


def _dense(tensors):
    return [t if t is None else t.contiguous() for t in tensors]


def forward(*call):
    outputs, (input, memory, *rest), form = call[:9], call[9:25], call[25]
    _forward(outputs, [input, memory, *_dense(rest)], form == "graves")


def backward(*call):
    gradients, upstream, (input, memory, *rest) = call[:16], call[16:21], call[21:37]
    _backward(gradients, _dense(upstream), [input, memory, *_dense(rest)], call[37:42], call[42] == "graves")
