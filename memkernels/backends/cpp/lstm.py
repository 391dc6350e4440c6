"""lstm on the CPU: csrc/cpu/recurrent.cpp, and csrc/cpu/lstm_options.cpp where a step needs whole rows or draws lots."""

from memkernels._C import LstmNumbers
from memkernels._C import lstm as _forward
from memkernels._C import lstm_backward as _backward
from memkernels._C import lstm_options as _options
from memkernels._C import lstm_options_backward as _options_backward
from memkernels._C import lstm_options_recall as _options_recall
from memkernels._C import lstm_recall as _recall
from memkernels.backends.cpp._heads import block_diagonal, diagonal_blocks


def supports(*flat):
    return None


def _plain(weight_hr, peephole, norm_weight, weight_co, zoneout_h, zoneout_c, recurrent_dropout):
    return weight_hr is peephole is norm_weight is weight_co is None and not (zoneout_h or zoneout_c or recurrent_dropout)


def forward(
    output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias,
    weight_co, reset, reset_h, reset_c, lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute,
    return_cells, training,
):  # fmt: skip
    if not _plain(weight_hr, peephole, norm_weight, weight_co, zoneout_h, zoneout_c, recurrent_dropout):
        inputs = (
            input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h,
            reset_c, lengths, seed,
        )  # fmt: skip
        numbers = LstmNumbers(reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected)
        return _options((output, h_n, c_n, cells, gates), inputs, numbers)
    if num_heads > 1:
        weight_hh = block_diagonal(weight_hh, num_heads, 4)
    _forward(
        output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, reset_c, lengths, reverse
    )


def backward(
    dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dpeephole, dnorm_weight, dnorm_bias, dweight_co,
    dreset_h, dreset_c, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole,
    norm_weight, norm_bias, weight_co, reset, reset_h, reset_c, lengths, seed, output, cells, gates, reverse, num_heads,
    zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, return_cells, training,
):  # fmt: skip
    plain = _plain(weight_hr, peephole, norm_weight, weight_co, zoneout_h, zoneout_c, recurrent_dropout)
    if recompute:
        dcells = dcells if return_cells else None  # else a placeholder
        cells, gates = (input.new_empty((*input.shape[:2], width)) for width in (c0.shape[1], 4 * c0.shape[1]))
    if not plain:
        inputs = (
            input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h,
            reset_c, lengths, seed,
        )  # fmt: skip
        numbers = LstmNumbers(reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected)
        if recompute:
            _options_recall(cells, gates, output, inputs, numbers)
        gradients = (
            dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dpeephole, dnorm_weight, dnorm_bias, dweight_co,
            dreset_h, dreset_c,
        )  # fmt: skip
        return _options_backward(gradients, (doutput, dh_n, dc_n, dcells), inputs, (output, cells, gates), numbers)
    dheads = dweight_hh
    if num_heads > 1:
        weight_hh = block_diagonal(weight_hh, num_heads, 4)
        dweight_hh = None if dheads is None else weight_hh.new_empty(weight_hh.shape)
    if recompute:
        _recall(output, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, reset_c, lengths, reverse)
    _backward(
        dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, dreset_c, doutput, dh_n, dc_n, dcells, input, h0, c0,
        weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, reset_c, lengths, output, cells, gates, reverse,
    )  # fmt: skip
    if num_heads > 1 and dheads is not None:
        diagonal_blocks(dweight_hh, num_heads, 4, dheads)
