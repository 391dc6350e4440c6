"""lstm_gates on the CPU (csrc/cpu/lstm_gates.cpp)."""

from memkernels import _C
from memkernels.backends._layout import inner_contiguous as inner


def supports(gates, cell, peephole):
    return None


def forward(h, c, gates, cell, peephole):
    _C.lstm_gates(h, c, inner(gates), inner(cell), inner(peephole))


def backward(dgates, dcell, dpeephole, dh, dc, gates, cell, peephole, c):
    _C.lstm_gates_backward(dgates, dcell, dpeephole, inner(dh), inner(dc), inner(gates), inner(cell), inner(peephole))
