"""`ntm_sequence` in plain torch: the loop over T of one step (`_ntm_step.py`); the gradients of weights are taken for all steps at once."""

from __future__ import annotations

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._ntm_step import Machine, State

N_STATE, N_WEIGHTS = 7, 16


def _run(inputs, form):
    """The machine, the states before and after every step, and what backward needs of each."""
    x, memory, read_weights, write_weights, reads, h, c, *weights = (compute(t) for t in inputs)
    machine = Machine(*[*weights, form])
    states, kept = [State(memory, torch.cat([read_weights, write_weights], 1), reads, h, c)], []
    for step in x:
        after, parts = machine.step(step, states[-1])
        states.append(after)
        kept.append(parts)
    return machine, states, kept


def _stack(parts, like, *shape):
    return torch.stack(parts) if parts else like.new_zeros(0, *shape)


def forward(*flat):
    inputs, form, dtype = flat[:-1], flat[-1], flat[0].dtype
    machine, states, kept = _run(inputs, form)
    first, last, after = states[0], states[-1], states[1:]
    hidden = _stack([s.h for s in after], last.h, *last.h.shape)
    reads = _stack([s.reads for s in after], last.reads, *last.reads.shape)
    weights = _stack([s.weights for s in after], last.weights, *last.weights.shape)
    nothing = first.h.new_zeros(len(first.h), flat[0].shape[2])
    rows = torch.stack([*(k[0] for k in kept), torch.cat([nothing, last.reads.flatten(1), last.h], 1)])
    gates = _stack([torch.cat(k[1], -1) for k in kept], last.h, len(last.h), 4 * last.h.shape[1])
    cells = _stack([s.c for s in after], last.c, *last.c.shape)
    heads = _stack([_packed(k[3], k[-1]) for k in kept], last.h, len(last.h), sum(machine.sizes) + 2 * last.weights.shape[1])
    public = tuple(t.to(dtype) for t in (hidden, reads, last.memory))
    return *public, weights, last.c.to(dtype), *(t.detach().clone() for t in (rows, gates, cells, heads))


def _packed(activated, stats):
    key, strength, gate, sharpen, shift, erase, add = activated
    scalars = torch.cat([torch.stack([strength, gate, sharpen], -1), shift], -1)
    return torch.cat([t.flatten(1) for t in (key, scalars, erase, add, stats)], -1)


def backward(dhidden, dreads, dmemory, dweights, dcell, *rest):
    inputs, form = rest[:N_WEIGHTS], rest[-1]
    machine, states, kept = _run(inputs, form)
    d = State(*(torch.zeros_like(t) for t in states[0]))
    d = d._replace(memory=d.memory if dmemory is None else compute(dmemory), c=d.c if dcell is None else compute(dcell))
    dx: list[torch.Tensor] = []
    dgates: list[torch.Tensor] = []
    draws: list[torch.Tensor] = []
    for t in reversed(range(len(kept))):
        arrived = dict(weights=dweights, reads=dreads, h=dhidden)
        d = d._replace(**{name: getattr(d, name) + compute(g[t]) for name, g in arrived.items() if g is not None})
        step, d, gates, draw = machine.step_backward(d, states[t], states[t + 1], kept[t])
        dx.insert(0, step)
        dgates.insert(0, gates)
        draws.insert(0, draw)
    dx = _stack(dx, d.h, *inputs[0].shape[1:])
    read, write = d.weights.split((machine.readers, machine.writers), 1)
    gradients = (dx, d.memory, read, write, d.reads, d.h, d.c, *_of_weights(machine, inputs, states, kept, dgates, draws))
    return tuple(g.to(i.dtype) for g, i in zip(gradients, inputs, strict=True))


def _of_weights(machine, inputs, states, kept, dgates, draws):
    shapes = [t.shape for t in inputs[N_STATE:]]
    if not kept:
        return [torch.zeros_like(compute(t)) for t in inputs[N_STATE:]]
    gates, draw = torch.cat(dgates), torch.cat(draws)
    dcontroller = gates.mT @ torch.cat([k[0] for k in kept])
    h = torch.cat([s.h for s in states[1:]])
    dheads = draw.mT @ torch.cat([h, h.new_ones(len(h), 1)], 1)
    (_, features), (_, heads, width), (_, hidden) = shapes[:3]
    d_ih, d_rh, d_hh = dcontroller.split((features, heads * width, hidden), 1)
    parts = dheads.split([shapes[i].numel() // shapes[i][-1] for i in (4, 6, 5, 7, 8)])
    key, writing, scalars, write_scalars, vectors = parts
    found = (d_ih, d_rh, d_hh, gates.sum(0), key, scalars, writing, write_scalars, vectors)
    return [g.reshape(shape) for g, shape in zip(found, shapes, strict=True)]
