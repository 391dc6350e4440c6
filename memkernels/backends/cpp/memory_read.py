"""memory_read on the CPU (csrc/cpu/memory_read.cpp)."""

from memkernels._C import memory_read as forward
from memkernels._C import memory_read_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(memory, weights):
    return None
