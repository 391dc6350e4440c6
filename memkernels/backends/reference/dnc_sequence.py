"""`dnc_sequence` in plain torch: the loop over T of one step (`_dnc_step.py`); the gradients of weights are taken for all steps at once."""

from __future__ import annotations

import math
from typing import Any

import torch

from memkernels.backends.reference._dnc_interface import Layout, Options
from memkernels.backends.reference._dnc_step import State, step, step_backward
from memkernels.backends.reference._math import compute

N_STATE, N_INPUTS = 7, 16


class _Controller:
    """An LSTM on [x, reads', h'] and the interface, linear in its h; c is clamped before it is carried on."""

    def __init__(self, weight_ih, weight_rh, weight_hh, bias, weight_interface, bias_interface, clip):
        self.weight, self.bias = torch.cat([weight_ih, weight_rh.flatten(1), weight_hh], 1), bias
        self.interface, self.interface_bias, self.clip = weight_interface, bias_interface, clip

    def step(self, x, reads, h, c):
        """-> the interface vector, h, c, and (row, gates, c before the clamp)."""
        row = torch.cat([x, reads.flatten(1), h], 1)
        i, f, g, o = (row @ self.weight.mT + self.bias).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        cell = f * c + i * g
        h = o * cell.tanh()
        return h @ self.interface.mT + self.interface_bias, h, cell.clamp(-self.clip, self.clip), (row, (i, f, g, o), cell)

    def step_backward(self, draw, dh, dc, before, kept):
        """-> the gradients of the row, of c before and of the gates' sums."""
        _, (i, f, g, o), cell = kept
        dh, bent = dh + draw @ self.interface, cell.tanh()
        dc = dc * (cell.abs() <= self.clip) + dh * o * (1 - bent * bent)
        parts = [dc * g * i * (1 - i), dc * before * f * (1 - f), dc * i * (1 - g * g), dh * bent * o * (1 - o)]
        dgates = torch.cat(parts, -1)
        return dgates @ self.weight, dc * f, dgates


def _run(inputs, options):
    """For every step what it started from and what it found: (state, controller's state, raw, interface, reads, parts, controller's)."""
    x, *rest = (compute(t) for t in inputs)
    state, (reads, h, c), weights = State(*rest[:6]), rest[6:9], rest[9:]
    layout = Layout(state.read.shape[1], state.write.shape[1], state.memory.shape[2], options)
    controller = None if h is None else _Controller(*[*weights, options.clip or math.inf])
    kept, raw, of_controller = [], None, None
    for row in x:
        old = c
        if controller is None:
            raw = row
        else:
            raw, h, c, of_controller = controller.step(row, reads, h, c)
        ask = layout.activated(raw)
        reads, after, parts = step(state, ask, options)
        kept.append((state, old, raw, ask, reads, parts, of_controller, h, after))
        state = after
    return layout, controller, kept, (state, reads, h, c)


def _stack(parts, like, *shape):
    return torch.stack(parts) if parts else like.new_zeros(0, *shape)


def forward(*flat):
    inputs, options, dtype = flat[:N_INPUTS], Options(*flat[N_INPUTS:]), flat[0].dtype
    layout, controller, kept, (last, reads, h, c) = _run(inputs, options)
    batch, readers, writers, width = len(last.memory), last.read.shape[1], last.write.shape[1], last.memory.shape[2]
    rows = last.memory.shape[1]
    every = [k[-1] for k in kept]
    weights = _stack([torch.cat([s.read, s.write], 1) for s in every], last.usage, batch, readers + writers, rows)
    asked = _stack([layout.packed(k[3]) for k in kept], last.usage, batch, sum(layout.sizes))
    usages = _stack([s.usage for s in every], last.usage, *last.usage.shape)
    precedences = _stack([s.precedence for s in every], last.usage, *last.precedence.shape)
    followed = _stack([torch.stack(k[5][5], 1) for k in kept], last.usage, batch, 2, readers, writers, rows)
    all_reads = _stack([k[4] for k in kept], last.usage, batch, readers, width).to(dtype)
    ends = [t.to(dtype) for t in (last.memory, last.usage, last.link, last.precedence)]
    saved = [asked, usages, precedences, followed]
    if controller is None:
        nothing = last.usage.new_zeros(0)
        return all_reads, nothing.to(dtype), *ends, weights, nothing.to(dtype), *(t.detach().clone() for t in saved), *[nothing] * 3
    final = torch.cat([h.new_zeros(batch, flat[0].shape[2]), reads.flatten(1), h], 1)
    saved += [torch.stack([*(k[6][0] for k in kept), final]), _stack([torch.cat(k[6][1], -1) for k in kept], h, batch, 4 * h.shape[1])]
    saved += [_stack([k[6][2] for k in kept], h, *h.shape)]
    all_hidden = _stack([k[7] for k in kept], h, *h.shape)
    return all_reads, all_hidden.to(dtype), *ends, weights, c.to(dtype), *(t.detach().clone() for t in saved)


def backward(dreads, dhidden, dmemory, dusage, dlink, dprecedence, dweights, dcell, *rest):
    inputs, options = rest[:N_INPUTS], Options(*rest[-len(Options._fields) :])
    layout, controller, kept, (last, _, h, c) = _run(inputs, options)
    arrived = (dmemory, dusage, dlink, dprecedence, None, None)
    d = State(*(torch.zeros_like(t) if g is None else compute(g) for t, g in zip(last, arrived)))
    of_reads: Any = last.memory.new_zeros(len(last.memory), last.read.shape[1], last.memory.shape[2])
    dh: Any = None
    dc: Any = None
    if controller is not None:
        dh, dc = torch.zeros_like(h), torch.zeros_like(c) if dcell is None else compute(dcell)
    found: list[Any] = []
    draws: list[Any] = []
    dgates: list[Any] = []
    for t, (before, old, raw, ask, _, parts, of_controller, _, after) in reversed(list(enumerate(kept))):
        if dweights is not None:
            read, write = compute(dweights[t]).split((d.read.shape[1], d.write.shape[1]), 1)
            d = d._replace(read=d.read + read, write=d.write + write)
        of_reads = of_reads if dreads is None else of_reads + compute(dreads[t])
        d, dask = step_backward(of_reads, d, before, after, ask, parts, options)
        draw = layout.slopes(raw, ask, dask)
        draws.insert(0, draw)
        if controller is None:
            of_reads = torch.zeros_like(of_reads)
            found.insert(0, draw)
            continue
        dh = dh if dhidden is None else dh + compute(dhidden[t])
        row, dc, gates = controller.step_backward(draw, dh, dc, old, of_controller)
        dgates.insert(0, gates)
        width, hidden = of_reads.shape[1] * of_reads.shape[2], dh.shape[1]
        x, of_reads, dh = row.split((row.shape[1] - width - hidden, width, hidden), -1)
        of_reads = of_reads.unflatten(-1, d.read.shape[1:2] + d.memory.shape[2:])
        found.insert(0, x)
    dx = _stack(found, d.usage, *inputs[0].shape[1:])
    gradients = [dx, *d] + ([None] * 9 if controller is None else [of_reads, dh, dc, *_of_weights(inputs, kept, dgates, draws)])
    return tuple(None if i is None else g.to(i.dtype) for g, i in zip(gradients, inputs, strict=True))


def _of_weights(inputs, kept, dgates, draws):
    shapes = [t.shape for t in inputs[10:]]
    if not kept:
        return [torch.zeros_like(compute(t)) for t in inputs[10:]]
    gates, draw = torch.cat(dgates), torch.cat(draws)
    dcontroller = gates.mT @ torch.cat([k[6][0] for k in kept])
    parts = dcontroller.split((shapes[0][1], shapes[1][1:].numel(), shapes[2][1]), 1)
    found = (*parts, gates.sum(0), draw.mT @ torch.cat([k[7] for k in kept]), draw.sum(0))
    return [g.reshape(shape) for g, shape in zip(found, shapes, strict=True)]
