"""A whole GRU layer over time on Triton: r, z = s(x + h), n = tanh(xn + r * hn), h = (1 - z) * n + z * h'.

_recurrence_fwd says who owns what. The input's part is one product over all steps. Bytes a hidden unit and step: forward 12 + 5s, backward
24 + 7s, and weight_hh where it does not stay on the chip.
"""

from __future__ import annotations

import torch

from memkernels.backends.triton import _cells, _matmul, _recurrence, _recurrence_aot
from memkernels.backends.triton._common import AOT_DTYPES, refuse


def supports(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse, num_heads, recompute, training):
    return refuse(input)


def _layer(input, h0, weight_hh, reset, reset_h, lengths, reverse, num_heads):
    hidden = h0.shape[1]
    return _recurrence.Layer(
        _cells.GRU.value, input.shape[0], input.shape[1], hidden, hidden, num_heads, input.dtype, weight_hh.contiguous(),
        h0.contiguous(), reverse, reset, reset_h, None if lengths is None else lengths.contiguous(),
    )  # fmt: skip


def _project(layer, input, weight_ih, bias_ih, bias_hh):
    """(the input's part of the gates with the hidden biases of r and z, that of n: it stands inside r * (...))."""
    projected = input.new_empty(layer.steps * layer.batch, 3 * layer.hidden, dtype=torch.float32)
    shift = inner = None
    if bias_hh is not None:
        shift, inner = bias_hh.clone(memory_format=torch.contiguous_format), bias_hh[2 * layer.hidden :].contiguous()
        shift[2 * layer.hidden :] = 0
    _matmul.matmul(projected, input.reshape(projected.shape[0], weight_ih.shape[1]), weight_ih.mT, layer.dtype, bias_ih, shift)
    return projected, inner


def forward(
    output, h_n, gates, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse, num_heads, recompute, training
):  # fmt: skip
    layer = _layer(input, h0, weight_hh, reset, reset_h, lengths, reverse, num_heads)
    projected, inner = _project(layer, input, weight_ih, bias_ih, bias_hh)
    h_n.copy_(h0)
    _recurrence.forward(layer, output, h_n, projected, gates_ptr=gates, bias_ptr=inner)


def _gates(layer, entered, input, weight_ih, bias_ih, bias_hh):
    """r, z, n and the hidden part of n, of all steps at once."""
    projected, inner = _project(layer, input, weight_ih, bias_ih, bias_hh)
    hidden = torch.empty_like(projected)
    _matmul.hidden_product(hidden, entered, layer.weight, layer.hidden, layer.heads, layer.dtype)
    (xr, xz, xn), (hr, hz, hn) = projected.chunk(3, 1), hidden.chunk(3, 1)
    hn = hn if inner is None else hn + inner
    r = torch.sigmoid(xr + hr)
    return torch.cat([r, torch.sigmoid(xz + hz), torch.tanh(xn + r * hn), hn], 1)


def backward(
    dinput, dh0, dweight_ih, dweight_hh, dbias_ih, dbias_hh, dreset_h, doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh,
    reset, reset_h, lengths, output, gates, reverse, num_heads, recompute, training,
):  # fmt: skip
    layer = _layer(input, h0, weight_hh, reset, reset_h, lengths, reverse, num_heads)
    dz, dhidden = (input.new_empty(layer.steps * layer.batch, 3 * layer.hidden, dtype=torch.float32) for _ in range(2))
    dh, input = _recurrence.state_of(dh_n, h0), _recurrence.living(layer, input)
    entered = None
    if recompute or dweight_hh is not None:
        entered = layer.entered(output, layer.h0, reset_h, False)
    if recompute:
        gates = _gates(layer, entered, input, weight_ih, bias_ih, bias_hh)
    _recurrence.backward(layer, dz, dhidden, dh, doutput, dreset_h_ptr=dreset_h, output_ptr=output, gates_ptr=gates)
    if dh0 is not None:
        dh0.copy_(dh)
    _recurrence.input_gradients(layer, dinput, dweight_ih, dz, input, weight_ih)
    if dweight_hh is not None:
        _matmul.weight_gradient(dweight_hh, dhidden, entered, layer.hidden, num_heads, input.dtype)
    _recurrence.total(dbias_ih, dz)
    _recurrence.total(dbias_hh, dhidden)


AOT = [
    _recurrence_aot.entry("gru", _cells.GRU.value, backward, dtype, hidden)
    for dtype in AOT_DTYPES
    for hidden in (64, 512)
    for backward in (False, True)
]
