"""rnn on the CPU (csrc/cpu/recurrent.cpp)."""

from memkernels._C import rnn as _forward
from memkernels._C import rnn_backward as _backward
from memkernels.backends.cpp._heads import block_diagonal, diagonal_blocks


def supports(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, relu, reverse, num_heads, training):
    return None


def forward(output, h_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, relu, reverse, num_heads, training):
    if num_heads > 1:
        weight_hh = block_diagonal(weight_hh, num_heads, 1)
    _forward(output, h_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, relu, reverse)


def backward(
    dinput, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh,
    reset, reset_h, lengths, output, relu, reverse, num_heads, training,
):  # fmt: skip
    dheads = dweight_hh
    if num_heads > 1:
        weight_hh = block_diagonal(weight_hh, num_heads, 1)
        dweight_hh = None if dheads is None else weight_hh.new_empty(weight_hh.shape)
    _backward(
        dinput, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh,
        reset, reset_h, lengths, output, relu, reverse,
    )  # fmt: skip
    if num_heads > 1 and dheads is not None:
        diagonal_blocks(dweight_hh, num_heads, 1, dheads)
