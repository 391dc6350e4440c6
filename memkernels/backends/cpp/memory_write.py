"""memory_write and memory_write_ on the CPU (csrc/cpu/memory_write.cpp)."""

from memkernels import _C
from memkernels.backends._layout import inner_contiguous


def supports(memory, weights, erase, add):
    return None


def forward(written, memory, weights, erase, add):
    inputs = (inner_contiguous(t) for t in (memory, weights, erase, add))
    if written.shape[-1] <= 1 or written.stride(-1) == 1:
        _C.memory_write(written, *inputs)
    else:  # in place on a memory whose last dimension is strided
        dense = written.new_empty(written.shape)
        _C.memory_write(dense, *inputs)
        written.copy_(dense)


def backward(dmemory, dweights, derase, dadd, dwritten, memory, weights, erase, add):
    _C.memory_write_backward(dmemory, dweights, derase, dadd, *(inner_contiguous(t) for t in (dwritten, memory, weights, erase, add)))
