"""lstm_gates on the CPU (csrc/cpu/lstm_gates.cpp)."""

from memkernels._C import inner_contiguous
from memkernels._C import lstm_gates as _forward
from memkernels._C import lstm_gates_backward as _backward


def supports(gates, cell, peephole):
    return None


def forward(h, c, gates, cell, peephole):
    _forward(h, c, *inner_contiguous(gates, cell, peephole))


def backward(dgates, dcell, dpeephole, dh, dc, gates, cell, peephole, c):
    _backward(dgates, dcell, dpeephole, *inner_contiguous(dh, dc, gates, cell, peephole))
