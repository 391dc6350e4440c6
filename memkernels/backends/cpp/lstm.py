"""lstm on the CPU (csrc/cpu/lstm.cpp)."""

from memkernels._C import lstm as _forward
from memkernels._C import lstm_backward as _backward


def supports(
    input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias, weight_co, reset, reset_h, reset_c,
    lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, return_cells, training,
):  # fmt: skip
    if weight_hr is peephole is norm_weight is weight_co is reset_h is None and num_heads == 1 and not recompute:
        return "knows no zoneout or recurrent dropout" if zoneout_h or zoneout_c or recurrent_dropout else None
    return "knows no peephole, layer_norm, output_gate, weight_hr, reset_state, num_heads or recompute"


def forward(
    output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole, norm_weight, norm_bias,
    weight_co, reset, reset_h, reset_c, lengths, seed, reverse, num_heads, zoneout_h, zoneout_c, recurrent_dropout, expected, recompute,
    return_cells, training,
):  # fmt: skip
    _forward(output, h_n, c_n, cells, gates, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse)


def backward(
    dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dweight_hr, dpeephole, dnorm_weight, dnorm_bias, dweight_co,
    dreset_h, dreset_c, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, weight_hr, peephole,
    norm_weight, norm_bias, weight_co, reset, reset_h, reset_c, lengths, seed, output, cells, gates, reverse, num_heads,
    zoneout_h, zoneout_c, recurrent_dropout, expected, recompute, return_cells, training,
):  # fmt: skip
    _backward(
        dinput, dh0, dc0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh,
        bias_ih, bias_hh, reset, lengths, output, cells, gates, reverse,
    )  # fmt: skip
