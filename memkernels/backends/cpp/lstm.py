"""lstm on the CPU (csrc/cpu/lstm.cpp)."""

from memkernels._C import lstm as _forward
from memkernels._C import lstm_backward as _backward


def supports(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse, return_cells, training):
    return None


def forward(
    output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse, return_cells, training
):
    _forward(output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse)


def backward(
    dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh,
    bias_ih, bias_hh, reset, lengths, output, cells, gates, reverse, return_cells, training,
):  # fmt: skip
    _backward(
        dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh,
        bias_ih, bias_hh, reset, lengths, output, cells, gates, reverse,
    )  # fmt: skip
