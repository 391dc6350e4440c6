"""`lstm` in plain torch: a loop over T, with its gradient written out."""

from __future__ import annotations

from typing import Any

import torch

from memkernels.backends.reference._math import compute


def _keep(condition, t):
    """`t` where the condition holds, exact zero elsewhere (NaN included)."""
    return torch.where(condition[:, None], t, torch.zeros_like(t))


def _kept(reset, active):
    """Rows whose state enters the step; a reset past the end of a row means nothing."""
    return ~reset if active is None else ~(reset & active)


def _steps(count, reverse):
    return range(count - 1, -1, -1) if reverse else range(count)


def forward(input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths, reverse, return_cells, training):
    dtype, count = input.dtype, input.shape[0]
    w_hh = compute(weight_hh)
    projected = compute(input) @ compute(weight_ih).mT
    for bias in (bias_ih, bias_hh):
        projected = projected if bias is None else projected + compute(bias)
    h, c = compute(h0), compute(c0)
    empty = h.new_zeros(0)
    output: list[Any] = [None] * count
    cells: list[Any] = [None] * count
    gates: list[Any] = [None] * count
    for t in _steps(count, reverse):
        active = None if lengths is None else t < lengths
        if reset is not None:
            h, c = _keep(_kept(reset[t], active), h), _keep(_kept(reset[t], active), c)
        zi, zf, zg, zo = (projected[t] + h @ w_hh.mT).chunk(4, -1)
        i, f, g, o = torch.sigmoid(zi), torch.sigmoid(zf), torch.tanh(zg), torch.sigmoid(zo)
        c_new = f * c + i * g
        h_new = o * torch.tanh(c_new)
        output[t], cells[t], gates[t] = h_new, c_new, torch.cat([i, f, g, o], -1)
        if active is None:
            h, c = h_new, c_new
        else:
            output[t], cells[t], gates[t] = (_keep(active, v) for v in (output[t], cells[t], gates[t]))
            h, c = torch.where(active[:, None], h_new, h), torch.where(active[:, None], c_new, c)
    h_all = torch.stack(output) if count else h.new_zeros(0, *h.shape)
    c_all = torch.stack(cells) if count else h_all
    g_all = torch.stack(gates) if count else h.new_zeros(0, h.shape[0], 4 * h.shape[1])
    results = (h_all, h.clone(), c.clone(), c_all if training or return_cells else empty, g_all if training else empty)
    return tuple(r.to(dtype) for r in results)


def backward(
    doutput, dh_n, dc_n, dcells, input, h0, c0, weight_ih, weight_hh, bias_ih, bias_hh, reset, lengths,
    output, cells, gates, reverse, return_cells, training,
):  # fmt: skip
    dtype, count = input.dtype, input.shape[0]
    first, before = (count - 1, 1) if reverse else (0, -1)
    w_ih, w_hh = compute(weight_ih), compute(weight_hh)
    h_start, c_start = compute(h0), compute(c0)
    output, cells, gates = compute(output), compute(cells), compute(gates)
    dh = torch.zeros_like(h_start) if dh_n is None else compute(dh_n)
    dc = torch.zeros_like(c_start) if dc_n is None else compute(dc_n)
    dz_steps: list[Any] = [None] * count
    entering_steps: list[Any] = [None] * count
    for t in _steps(count, not reverse):
        h, c = (h_start, c_start) if t == first else (output[t + before], cells[t + before])
        active = None if lengths is None else t < lengths
        if reverse and lengths is not None and t != first:
            # A row that ends before step t + 1 starts here, from the initial state.
            started = (t + 1 < lengths)[:, None]
            h, c = torch.where(started, h, h_start), torch.where(started, c, c_start)
        if reset is not None:
            h, c = _keep(_kept(reset[t], active), h), _keep(_kept(reset[t], active), c)
        entering_steps[t] = h
        i, f, g, o = gates[t].chunk(4, -1)
        tanh_c = torch.tanh(cells[t])
        dh_t = dh if doutput is None else dh + compute(doutput[t])
        dc_t = dc if dcells is None else dc + compute(dcells[t])
        dc_t = dc_t + dh_t * o * (1 - tanh_c * tanh_c)
        do = dh_t * tanh_c * o * (1 - o)
        dz_t = torch.cat([dc_t * g * i * (1 - i), dc_t * c * f * (1 - f), dc_t * i * (1 - g * g), do], -1)
        dz_steps[t] = dz_t if active is None else _keep(active, dz_t)
        dh_old, dc_old = dz_steps[t] @ w_hh, dc_t * f
        if reset is not None:
            dh_old, dc_old = _keep(_kept(reset[t], active), dh_old), _keep(_kept(reset[t], active), dc_old)
        dh = dh_old if active is None else torch.where(active[:, None], dh_old, dh)
        dc = dc_old if active is None else torch.where(active[:, None], dc_old, dc)
    dz = torch.stack(dz_steps).flatten(0, 1) if count else h_start.new_zeros(0, w_hh.shape[0])
    entering = torch.stack(entering_steps).flatten(0, 1) if count else h_start.new_zeros(0, w_hh.shape[1])
    dbias = dz.sum(0).to(dtype)
    dinput = (dz @ w_ih).reshape(input.shape).to(dtype)
    seen = compute(input)
    if lengths is not None and count:
        # What lies past the end of a row may be anything, NaN included.
        alive = torch.arange(count, device=lengths.device)[:, None] < lengths
        seen = torch.where(alive[:, :, None], seen, torch.zeros_like(seen))
    dw_ih = (dz.mT @ seen.reshape(-1, input.shape[2])).to(dtype) if input.numel() else torch.zeros_like(weight_ih)
    dw_hh = (dz.mT @ entering).to(dtype)
    return (
        dinput, dh.to(dtype), dc.to(dtype), dw_ih, dw_hh,
        None if bias_ih is None else dbias, None if bias_hh is None else dbias.clone(),
    )  # fmt: skip
