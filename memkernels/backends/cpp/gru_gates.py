"""gru_gates on the CPU (csrc/cpu/gru_gates.cpp)."""

from memkernels._C import gru_gates as _forward
from memkernels._C import gru_gates_backward as _backward
from memkernels._C import inner_contiguous


def supports(gates_input, gates_hidden, hidden):
    return None


def forward(h, gates_input, gates_hidden, hidden):
    _forward(h, *inner_contiguous(gates_input, gates_hidden, hidden))


def backward(dgates_input, dgates_hidden, dhidden, dh, gates_input, gates_hidden, hidden):
    _backward(dgates_input, dgates_hidden, dhidden, *inner_contiguous(dh, gates_input, gates_hidden, hidden))
