"""`gru` in plain torch."""

from __future__ import annotations

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._recurrence import Rows, blocks, dense, each, products, projected, total, without_steps


def forward(
    input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, reverse, num_heads, recompute, training
):  # fmt: skip
    dtype, rows, hidden = input.dtype, Rows(input.shape[0], reverse, reset, lengths), h0.shape[1]
    keep = training and not recompute
    h_n, kept = _run(rows, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_h, num_heads, keep)
    if not rows.count:
        kept = [h_n.new_zeros(0, len(h_n), hidden), h_n.new_zeros(0, len(h_n), 4 * hidden)]
    return kept[0].to(dtype), h_n.to(dtype, copy=True), kept[1].to(dtype) if keep else h_n.new_zeros(0, dtype=dtype)


def _run(rows, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_h, num_heads, keep):
    """(h_n, [h, and the gates r, z, n, h_n if they are to be kept])."""
    hidden, bias = h0.shape[1], compute(bias_hh)
    weight = dense(compute(weight_hh), 3, num_heads).mT
    x = projected(rows.living(compute(input)), compute(weight_ih))
    if bias_ih is not None:
        x = x + compute(bias_ih)
    rz, last = (each(part) for part in x.split([2 * hidden, hidden], -1))

    def step(t, h):
        from_h = h @ weight if bias is None else torch.addmm(bias, h, weight)
        gated, hn = from_h.split([2 * hidden, hidden], -1)
        gates = torch.sigmoid(rz[t] + gated)
        r, z = gates.chunk(2, -1)
        n = torch.tanh(torch.addcmul(last[t], r, hn))
        return (torch.lerp(n, h, z),), (torch.cat([gates, n, hn], -1),) if keep else ()

    (h_n,), kept = rows.forward(step, [compute(h0)], [compute(reset_h)])
    return h_n, kept


def backward(
    doutput, dh_n, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset, reset_h, lengths, output, gates, reverse, num_heads,
    recompute, training,
):  # fmt: skip
    dtype, rows, hidden = input.dtype, Rows(input.shape[0], reverse, reset, lengths), h0.shape[1]
    start = torch.zeros_like(compute(h0)) if dh_n is None else compute(dh_n)
    if not rows.count:
        return without_steps((input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_h), [start])
    if recompute:
        gates = _run(rows, input, h0, weight_ih, weight_hh, bias_ih, bias_hh, reset_h, num_heads, True)[1][1]
    weight, seen = dense(compute(weight_hh), 3, num_heads), rows.living(compute(input))
    old = rows.entering(compute(h0), compute(output), compute(reset_h))
    r, z, n, hn = compute(gates).unflatten(-1, (4, hidden)).unbind(2)
    slope_n = (1 - z) * (1 - n * n)
    slope = each(torch.stack([slope_n * hn * r * (1 - r), (old - n) * z * (1 - z), slope_n * r], 2))
    through = each(z)

    def step(t, dh):
        dz = (dh[:, None] * slope[t]).flatten(1)
        return (torch.addmm(dh * through[t], dz, weight),), (dz, dh)

    (dh0,), (dz, dh), resets = rows.backward(step, [start], [compute(doutput)], reset_h is not None)
    dx = torch.cat([dz[..., : 2 * hidden], dh * slope_n], -1)
    return (
        (dx @ compute(weight_ih)).to(dtype), dh0.to(dtype), products(dx, seen).to(dtype),
        blocks(products(dz, old), 3, num_heads).to(dtype), None if bias_ih is None else total(dx).to(dtype),
        None if bias_hh is None else total(dz).to(dtype),
        resets[0].to(dtype) if resets else None,
    )  # fmt: skip
