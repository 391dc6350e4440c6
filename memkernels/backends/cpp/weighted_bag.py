"""weighted_bag on the CPU (csrc/cpu/weighted_bag.cpp)."""

from memkernels._C import weighted_bag as forward
from memkernels._C import weighted_bag_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(table, index, weight):
    return None
