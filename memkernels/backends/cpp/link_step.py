"""link_step on the CPU (csrc/cpu/link.cpp)."""

from memkernels._C import link_step as forward
from memkernels._C import link_step_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(link, precedence, write_weights, read_weights):
    return None
