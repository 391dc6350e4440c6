"""memory_write and memory_write_ on the CPU (csrc/cpu/memory_write.cpp)."""

from memkernels._C import inner_contiguous
from memkernels._C import memory_write as _forward
from memkernels._C import memory_write_backward as _backward


def supports(memory, weights, erase, add):
    return None


def forward(written, memory, weights, erase, add):
    inputs = inner_contiguous(memory, weights, erase, add)
    if written.shape[-1] <= 1 or written.stride(-1) == 1:
        _forward(written, *inputs)
    else:  # in place on a memory whose last dimension is strided
        dense = written.new_empty(written.shape)
        _forward(dense, *inputs)
        written.copy_(dense)


def backward(dmemory, dweights, derase, dadd, dwritten, memory, weights, erase, add):
    _backward(dmemory, dweights, derase, dadd, *inner_contiguous(dwritten, memory, weights, erase, add))
