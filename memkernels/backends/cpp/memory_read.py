"""memory_read on the CPU (csrc/cpu/memory_read.cpp)."""

from memkernels._C import inner_contiguous
from memkernels._C import memory_read as _forward
from memkernels._C import memory_read_backward as _backward


def supports(memory, weights):
    return None


def forward(read, memory, weights):
    _forward(read, *inner_contiguous(memory, weights))


def backward(dmemory, dweights, dread, memory, weights):
    _backward(dmemory, dweights, *inner_contiguous(dread, memory, weights))
