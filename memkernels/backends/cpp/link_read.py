"""link_read on the CPU (csrc/cpu/link.cpp)."""

from memkernels._C import link_read as forward
from memkernels._C import link_read_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(link, read_weights):
    return None
