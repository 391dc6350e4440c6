"""The spec of `rnn`."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from memkernels.ops.rnn import rnn
from memkernels.testing.recurrent import (
    BIAS,
    LAYER_BENCH,
    LAYER_SAMPLES,
    fused,
    layer_errors,
    layer_inputs,
    loop,
    ragged,
    recurrent,
    state_errors,
)
from memkernels.testing.spec import ErrorCase, OpSpec, Sample


def _eager(
    input, h0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, nonlinearity="tanh", reset=None, reset_state=None, num_heads=1, **others
):
    cell = torch.rnn_relu_cell if nonlinearity == "relu" else torch.rnn_tanh_cell

    def step(t, x, h):
        if num_heads == 1:
            return (cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh),)
        z = linear(x, weight_ih, bias_ih) + recurrent(h, weight_hh, 1, num_heads)
        return (getattr(torch, nonlinearity)(z if bias_hh is None else z + bias_hh),)

    (output,), (h_n,) = loop(step, input, (h0,), reset, None if reset_state is None else (reset_state,), **others)
    return output, h_n


def _torch(input, h0, *args, nonlinearity="tanh", **kwargs):
    output, (h_n,) = fused(torch.rnn_relu if nonlinearity == "relu" else torch.rnn_tanh, input, (h0,), *args, **kwargs)
    return output, h_n


def _call(function, inputs, options):
    return function(inputs["input"], inputs["h0"], **{k: v for k, v in inputs.items() if k not in ("input", "h0")}, **options)


def _wrong_nonlinearity(inputs, options):
    options["nonlinearity"] = "sigmoid"


_RELU = dict(nonlinearity="relu")
_ALL = (*BIAS, "reset", "reset_state", "lengths")

SPEC = OpSpec(
    name="rnn",
    function=rnn,
    inputs=layer_inputs(1),
    samples=(
        *LAYER_SAMPLES,
        Sample("relu", dict(T=3, B=2, I=3, H=4), _RELU, BIAS),
        Sample("relu_all", dict(T=3, B=4, I=2, H=4, HD=2), dict(num_heads=2, **_RELU), _ALL, ragged),
        Sample("relu_odd", dict(T=5, B=17, I=19, H=37), dict(reverse=True, **_RELU), _ALL, ragged),
    ),
    bench=LAYER_BENCH,
    peers={"eager": _eager, "torch": _torch},
    bytes=lambda d, s: s * (d["T"] * d["B"] * (d["I"] + d["H"]) + d["H"] * (d["I"] + d["H"])),
    bytes_backward=lambda d, s: s * (d["T"] * d["B"] * (2 * d["I"] + 2 * d["H"]) + 2 * d["H"] * (d["I"] + d["H"])),
    call=_call,
    errors=(
        *layer_errors("rnn", 1),
        *state_errors("rnn"),
        ErrorCase("nonlinearity", _wrong_nonlinearity, ValueError, r"rnn: nonlinearity: expected one of 'tanh', 'relu', got 'sigmoid'"),
    ),
    rows=(("input", 1), ("h0", 0)),
    gaps=("On a GPU, lengths outside 0..T are clamped instead of refused.",),
)
