"""`rnn` in plain torch."""

from __future__ import annotations

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._recurrence import Rows, blocks, dense, each, products, projected, total, without_steps


def forward(input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, relu, reverse, num_heads, training):
    dtype, rows = input.dtype, Rows(input.shape[0], reverse, reset, lengths)
    weight = dense(compute(weight_hh), 1, num_heads).mT
    x = projected(rows.living(compute(input)), compute(weight_ih))
    for bias in (bias_ih, bias_hh):
        x = x if bias is None else x + compute(bias)
    z = each(x)
    activation = torch.relu if relu else torch.tanh

    def step(t, h):
        return (activation(torch.addmm(z[t], h, weight)),), ()

    (h_n,), kept = rows.forward(step, [compute(h0)], [compute(reset_h)])
    output = kept[0] if kept else x.new_zeros(0, *h_n.shape)
    return output.to(dtype), h_n.to(dtype, copy=True)


def backward(
    doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, output, relu, reverse, num_heads, training
):
    dtype, rows = input.dtype, Rows(input.shape[0], reverse, reset, lengths)
    first, output = compute(h0), compute(output)
    start = torch.zeros_like(first) if dh_n is None else compute(dh_n)
    if not rows.count:
        return without_steps((input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_h), [start])
    weight, seen = dense(compute(weight_hh), 1, num_heads), rows.living(compute(input))
    slope = each(output <= 0 if relu else 1 - output * output)

    def step(t, dh):
        dz = dh.masked_fill(slope[t], 0) if relu else dh * slope[t]
        return (dz @ weight,), (dz,)

    (dh0,), (dz,), resets = rows.backward(step, [start], [compute(doutput)], reset_h is not None)
    dbias = total(dz).to(dtype)
    old = rows.entering(first, output, compute(reset_h))
    return (
        (dz @ compute(weight_ih)).to(dtype), dh0.to(dtype), products(dz, seen).to(dtype),
        blocks(products(dz, old), 1, num_heads).to(dtype), None if bias_ih is None else dbias, None if bias_hh is None else dbias.clone(),
        resets[0].to(dtype) if resets else None,
    )  # fmt: skip
