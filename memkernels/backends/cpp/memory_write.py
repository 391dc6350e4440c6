"""memory_write and memory_write_ on the CPU (csrc/cpu/memory_write.cpp)."""

from memkernels._C import memory_write as _forward
from memkernels._C import memory_write_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(memory, weights, erase, add):
    return None


def forward(written, memory, weights, erase, add):
    if written.shape[-1] <= 1 or written.stride(-1) == 1:
        _forward(written, memory, weights, erase, add)
    else:  # in place on a memory whose last dimension is strided
        dense = written.new_empty(written.shape)
        _forward(dense, memory, weights, erase, add)
        written.copy_(dense)
