"""gru_gates on the CPU (csrc/cpu/gru_gates.cpp)."""

from memkernels._C import gru_gates as forward
from memkernels._C import gru_gates_backward as backward

__all__ = ["backward", "forward", "supports"]


def supports(gates_input, gates_hidden, hidden):
    return None
