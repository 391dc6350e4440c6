"""lstm on the CPU: plain ones in csrc/cpu/lstm.cpp, those with options in csrc/cpu/lstm_options.cpp."""

from memkernels._C import LstmNumbers
from memkernels._C import lstm as _forward
from memkernels._C import lstm_backward as _backward
from memkernels._C import lstm_options as _options
from memkernels._C import lstm_options_backward as _options_backward
from memkernels._C import lstm_recall as _recall


def supports(*flat):
    return None


def _plain(weight_hr, peephole, norm_weight, weight_co, reset_h, num_heads, zoneout_h, zoneout_c, recurrent_dropout):
    """Whether each unit's step needs nothing but its own gates."""
    return weight_hr is peephole is norm_weight is weight_co is reset_h is None and num_heads == 1 and not (
        zoneout_h or zoneout_c or recurrent_dropout
    )


def forward(
    output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias,
    weight_co, reset, reset_h, reset_c, lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute,
    return_cells, training,
):  # fmt: skip
    if _plain(weight_hr, peephole, norm_weight, weight_co, reset_h, num_heads, zoneout_h, zoneout_c, recurrent_dropout):
        return _forward(output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse)
    inputs = (
        input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h,
        reset_c, lengths, seed,
    )  # fmt: skip
    numbers = LstmNumbers(reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected)
    _options((output, h_n, c_n, cells, gates), inputs, numbers)


def backward(
    dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dpeephole, dnorm_weight, dnorm_bias, dweight_co,
    dreset_h, dreset_c, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole,
    norm_weight, norm_bias, weight_co, reset, reset_h, reset_c, lengths, seed, output, cells, gates, reverse, num_heads,
    zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, return_cells, training,
):  # fmt: skip
    inputs = (
        input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h,
        reset_c, lengths, seed,
    )  # fmt: skip
    numbers = LstmNumbers(reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected)
    if recompute:
        cells, gates = c0.new_empty((*input.shape[:2], c0.shape[1])), c0.new_empty((*input.shape[:2], 4 * c0.shape[1]))
        _recall(cells, gates, output, inputs, numbers)
    if _plain(weight_hr, peephole, norm_weight, weight_co, reset_h, num_heads, zoneout_h, zoneout_c, recurrent_dropout):
        return _backward(
            dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh,
            bias_ih, bias_hh, reset, lengths, output, cells, gates, reverse,
        )  # fmt: skip
    gradients = (
        dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dpeephole, dnorm_weight, dnorm_bias, dweight_co,
        dreset_h, dreset_c,
    )  # fmt: skip
    _options_backward(gradients, (doutput, dh_n, dc_n, dcells), inputs, (output, cells, gates), numbers)
