"""One step of a Neural Turing Machine and its gradient, in plain torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from memkernels.backends.reference import location_address, memory_write
from memkernels.backends.reference._content import similarity_backward, similarity_of, softmax_backward


class State(NamedTuple):
    """What a step hands to the next; of backward, the gradients of it."""

    memory: Any
    weights: Any  # B R+U N
    reads: Any
    h: Any
    c: Any


class Machine:
    """The weights of a call as two matrices, and what its form means."""

    def __init__(self, weight_ih, weight_rh, weight_hh, bias, read_key, read_scalars, write_key, write_scalars, write_vectors, form):
        self.controller, self.bias = torch.cat([weight_ih, weight_rh.flatten(1), weight_hh], 1), bias
        parts = (read_key, write_key, read_scalars, write_scalars, write_vectors.flatten(0, 1))
        self.heads = torch.cat([p.flatten(0, 1) for p in parts])
        self.readers, self.writers = len(read_key), len(write_key)
        every, self.width, self.scalars = self.readers + self.writers, read_key.shape[1], read_scalars.shape[1]
        self.sizes = [every * self.width, every * self.scalars, self.writers * self.width, self.writers * self.width]
        self.graves = form == "graves"
        self.eps, self.floor = (1e-6, 0.0) if self.graves else (1e-16, 1e-16)

    def activated(self, raw):
        """key, strength, gate, sharpen, shift, erase, add of all heads."""
        key, scalars, erase, add = (t.unflatten(-1, shape) for t, shape in zip(raw.split(self.sizes, -1), self._shapes))
        strength, sharpen = F.softplus(scalars[..., 0]) + float(self.graves), 1 + F.softplus(scalars[..., 2])
        add = add.tanh() if self.graves else add
        return key, strength, scalars[..., 1].sigmoid(), sharpen, torch.softmax(scalars[..., 3:], -1), erase.sigmoid(), add

    @property
    def _shapes(self):
        every, write = self.readers + self.writers, (self.writers, self.width)
        return (every, self.width), (every, self.scalars), write, write

    def slopes(self, raw, activated, gradients):
        """The gradient of `raw` from those of what `activated` returns."""
        dkey, dstrength, dgate, dsharpen, dshift, derase, dadd = gradients
        _, _, gate, _, shift, erase, add = activated
        scalars = raw.split(self.sizes, -1)[1].unflatten(-1, self._shapes[1])
        bent = scalars[..., ::2][..., :2].sigmoid()
        three = torch.stack([dstrength * bent[..., 0], dgate * gate * (1 - gate), dsharpen * bent[..., 1]], -1)
        dscalars = torch.cat([three, softmax_backward(dshift, shift)], -1)
        dadd = dadd * (1 - add * add) if self.graves else dadd
        return torch.cat([t.flatten(1) for t in (dkey, dscalars, derase * erase * (1 - erase), dadd)], -1)

    def step(self, x, before):
        """-> state after, and what backward needs of this step."""
        row = torch.cat([x, before.reads.flatten(1), before.h], 1)
        i, f, g, o = (row @ self.controller.mT + self.bias).chunk(4, -1)
        i, f, g, o = i.sigmoid(), f.sigmoid(), g.tanh(), o.sigmoid()
        c = f * before.c + i * g
        h = o * c.tanh()
        raw = h @ self.heads[:, :-1].mT + self.heads[:, -1]
        activated = key, strength, gate, sharpen, shift, erase, add = self.activated(raw)
        similar = similarity_of(before.memory, key, "cosine", self.eps)
        content = torch.softmax(strength[..., None] * similar, -1)
        weights, stats = location_address.forward(content, before.weights, gate, shift, sharpen, self.floor)
        (memory,) = memory_write.forward(before.memory, weights[:, self.readers :], erase, add)
        reads = weights[:, : self.readers] @ (memory if self.graves else before.memory)
        after = State(memory, weights, reads, h, c)
        return after, (row, (i, f, g, o), raw, activated, similar, content, stats)

    def step_backward(self, d, before, after, kept):
        """From the gradients of the state after: of the input, of the state before, of the controller's gates and of the heads."""
        _, (i, f, g, o), raw, activated, similar, content, _ = kept
        key, strength, gate, sharpen, shift, erase, add = activated
        source, dsource = (after if self.graves else before).memory, after.weights[:, : self.readers].mT @ d.reads
        dwritten = d.memory + dsource if self.graves else d.memory
        dmemory, dwrite, derase, dadd = memory_write.backward(dwritten, before.memory, after.weights[:, self.readers :], erase, add)
        dmemory = dmemory if self.graves else dmemory + dsource
        dweights = d.weights + torch.cat([d.reads @ source.mT, dwrite], 1)
        given = content, before.weights, gate, shift, sharpen, after.weights, None, self.floor
        dcontent, dprevious, dgate, dshift, dsharpen = location_address.backward(dweights, *given)
        dlogit = softmax_backward(dcontent, content)
        more, dkey, dstrength = similarity_backward(dlogit, similar, before.memory, key, strength, "cosine", self.eps)
        draw = self.slopes(raw, activated, (dkey, dstrength, dgate, dsharpen, dshift, derase, dadd))
        dh, bent = d.h + draw @ self.heads[:, :-1], after.c.tanh()
        dc = d.c + dh * o * (1 - bent * bent)
        parts = [dc * g * i * (1 - i), dc * before.c * f * (1 - f), dc * i * (1 - g * g), dh * bent * o * (1 - o)]
        dgates = torch.cat(parts, -1)
        drow = dgates @ self.controller
        read, hidden = self.readers * self.width, dh.shape[1]
        dx, dreads, dh = drow.split((drow.shape[1] - read - hidden, read, hidden), -1)
        return dx, State(dmemory + more, dprevious, dreads.unflatten(-1, d.reads.shape[1:]), dh, dc * f), dgates, draw
