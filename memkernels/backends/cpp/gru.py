"""gru on the CPU (csrc/cpu/recurrent.cpp)."""

from memkernels._C import gru as _forward
from memkernels._C import gru_backward as _backward
from memkernels._C import gru_recall as _recall
from memkernels.backends.cpp._heads import block_diagonal, diagonal_blocks


def supports(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse, num_heads, recompute, training):
    return None


def forward(
    output, h_n, gates, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse, num_heads, recompute, training
):
    if num_heads > 1:
        weight_hh = block_diagonal(weight_hh, num_heads, 3)
    _forward(output, h_n, gates, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse)


def backward(
    dinput, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh,
    reset, reset_h, lengths, output, gates, reverse, num_heads, recompute, training,
):  # fmt: skip
    dheads = dweight_hh
    if num_heads > 1:
        weight_hh = block_diagonal(weight_hh, num_heads, 3)
        dweight_hh = None if dheads is None else weight_hh.new_empty(weight_hh.shape)
    if recompute:
        gates = input.new_empty((*input.shape[:2], 4 * h0.shape[1]))
        _recall(output, gates, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse)
    _backward(
        dinput, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh,
        reset, reset_h, lengths, output, gates, reverse,
    )  # fmt: skip
    if num_heads > 1 and dheads is not None:
        diagonal_blocks(dweight_hh, num_heads, 3, dheads)
