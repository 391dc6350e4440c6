"""lstm on the CPU (csrc/cpu/lstm.cpp)."""

from memkernels import _C
from memkernels.backends._layout import inner_contiguous as inner


def supports(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse, return_cells, training):
    return None


def forward(
    output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse, return_cells, training
):
    _C.lstm(
        output, h_n, c_n, cells if training or return_cells else None, gates if training else None, inner(input), inner(h0), inner(c0),
        inner(weight_ih), inner(weight_hh), inner(bias_ih), inner(bias_hh), reset, lengths, reverse,
    )  # fmt: skip


def backward(
    dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh,
    bias_ih, bias_hh, reset, lengths, output, cells, gates, reverse, return_cells, training,
):  # fmt: skip
    _C.lstm_backward(
        dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, inner(doutput), inner(dh_n), inner(dc_n), inner(dcells),
        inner(input), inner(h0), inner(c0), inner(weight_ih), inner(weight_hh), bias_ih, bias_hh, reset, lengths, output, cells, gates,
        reverse,
    )  # fmt: skip
