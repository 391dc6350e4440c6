"""lstm_gates on the CPU (csrc/cpu/lstm_gates.cpp)."""

from memkernels._C import lstm_gates as forward
from memkernels._C import lstm_gates_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(gates, cell, peephole):
    return None
