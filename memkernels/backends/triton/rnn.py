"""A whole RNN layer over time on Triton: h = tanh or relu (W_ih x + b_ih + W_hh h' + b_hh); see _recurrence_fwd for who owns what.

The input's part is one product over all steps. Bytes a hidden unit and step: forward 4 + s, backward 4 + 3s, and weight_hh where it does
not stay on the chip.
"""

from __future__ import annotations

import torch

from memkernels.backends.triton import _cells, _matmul, _recurrence, _recurrence_aot
from memkernels.backends.triton._common import AOT_DTYPES, refuse


def supports(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, relu, reverse, num_heads, training):
    return refuse(input)


def _layer(input, h0, weight_hh, reset, reset_h, lengths, relu, reverse, num_heads):
    hidden = h0.shape[1]
    cell = _cells.RELU.value if relu else _cells.TANH.value
    return _recurrence.Layer(
        cell, input.shape[0], input.shape[1], hidden, hidden, num_heads, input.dtype, weight_hh.contiguous(), h0.contiguous(), reverse,
        reset, reset_h, None if lengths is None else lengths.contiguous(),
    )  # fmt: skip


def forward(
    output, h_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, relu, reverse, num_heads, training
):  # fmt: skip
    layer = _layer(input, h0, weight_hh, reset, reset_h, lengths, relu, reverse, num_heads)
    projected = input.new_empty(layer.steps * layer.batch, layer.hidden, dtype=torch.float32)
    _matmul.matmul(projected, input.reshape(projected.shape[0], input.shape[2]), weight_ih.mT, input.dtype, bias_ih, bias_hh)
    h_n.copy_(h0)
    _recurrence.forward(layer, output, h_n, projected)


def backward(
    dinput, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh,
    reset, reset_h, lengths, output, relu, reverse, num_heads, training,
):  # fmt: skip
    layer = _layer(input, h0, weight_hh, reset, reset_h, lengths, relu, reverse, num_heads)
    dz = input.new_empty(layer.steps * layer.batch, layer.hidden, dtype=torch.float32)
    dh = _recurrence.state_of(dh_n, h0)
    _recurrence.backward(layer, dz, dz, dh, doutput, dreset_h_ptr=dreset_h, output_ptr=output)
    if dh0 is not None:
        dh0.copy_(dh)
    _recurrence.input_gradients(layer, dinput, dweight_ih, dz, _recurrence.living(layer, input), weight_ih)
    if dweight_hh is not None:
        entered = layer.entered(output, layer.h0, reset_h, False)
        _matmul.weight_gradient(dweight_hh, dz, entered, layer.hidden, num_heads, input.dtype)
    for gradient in (dbias_ih, dbias_hh):
        _recurrence.total(gradient, dz)


AOT = [
    _recurrence_aot.entry("rnn", _cells.TANH.value, backward, dtype, hidden)
    for dtype in AOT_DTYPES
    for hidden in (64, 512)
    for backward in (False, True)
]
