"""lstm_gates on CUDA devices (csrc/cuda/lstm_gates.cu)."""

from memkernels import _C_cuda
from memkernels.backends._layout import inner_contiguous
from memkernels.backends.cuda import refuse_device, scratch


def supports(gates, cell, peephole):
    return refuse_device(cell.device)


def forward(h, c, gates, cell, peephole):
    _C_cuda.lstm_gates(h, c, inner_contiguous(gates), inner_contiguous(cell), inner_contiguous(peephole))


def backward(dgates, dcell, dpeephole, dh, dc, gates, cell, peephole):
    sums = None if dpeephole is None else scratch(_C_cuda.lstm_gates_scratch(*cell.shape), cell)
    inputs = (inner_contiguous(t) for t in (dh, dc, gates, cell, peephole))
    _C_cuda.lstm_gates_backward(dgates, dcell, dpeephole, *inputs, sums)
