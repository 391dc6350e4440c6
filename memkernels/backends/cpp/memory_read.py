"""memory_read on the CPU (csrc/cpu/memory_read.cpp)."""

from memkernels import _C
from memkernels.backends._layout import inner_contiguous


def supports(memory, weights):
    return None


def forward(read, memory, weights):
    _C.memory_read(read, inner_contiguous(memory), inner_contiguous(weights))


def backward(dmemory, dweights, dread, memory, weights):
    _C.memory_read_backward(dmemory, dweights, inner_contiguous(dread), inner_contiguous(memory), inner_contiguous(weights))
