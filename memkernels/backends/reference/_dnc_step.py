"""One step of a Differentiable Neural Computer and its gradient, in plain torch: the references of its parts, one after the other."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memkernels.backends.reference import _dnc_content as content
from memkernels.backends.reference import allocation, link_step, memory_write, usage
from memkernels.backends.reference._content import EPS, softmax_backward
from memkernels.backends.reference._math import other_factors


class State(NamedTuple):
    """What a step of the memory hands to the next; of backward, the gradients of it."""

    memory: Any
    usage: Any
    link: Any
    precedence: Any
    write: Any
    read: Any


def _kept(before, ask):
    """What the read heads leave of each row, "B R N"."""
    return 1 - ask["free_gate"][..., None] * before.read


def _seen(before, options):
    """The write weights as usage sees them."""
    return before.write if options.write_gradient else before.write.detach()


def _sharpened(weights, sharpness):
    return torch.softmax(sharpness[..., None, None] * (weights + EPS).log(), -1)


def step(before, ask, options):
    """-> reads, the state after, and what backward needs of this step."""
    (used,) = usage.forward(before.usage, _seen(before, options), before.read, ask["free_gate"])
    (free,) = allocation.forward(used, ask["allocation_gate"] * ask["write_gate"], EPS)
    wanted = content.forward(before.memory, ask["write_keys"], ask["write_strengths"], ask.get("write_mask"), options.cosine)
    write = ask["write_gate"][..., None] * (wanted + ask["allocation_gate"][..., None] * (free - wanted))
    kept = before.memory * _kept(before, ask).prod(1)[..., None] if options.deallocate else before.memory
    (memory,) = memory_write.forward(kept, write, ask["erase"], ask["add"])
    link, precedence, *followed = link_step.forward(before.link, before.precedence, write, before.read)
    ways = followed
    if options.sharpen_links:
        ways = [_sharpened(d, s) for d, s in zip(followed, ask["link_sharpness"].unbind(-1))]
    similar = content.forward(memory, ask["read_keys"], ask["read_strengths"], ask.get("read_mask"), options.cosine)
    back, forth, by_content = _modes(ask["read_modes"], write.shape[1])
    read = by_content * similar + (back * ways[1]).sum(2) + (forth * ways[0]).sum(2)
    return read @ memory, State(memory, used, link, precedence, write, read), (free, wanted, kept, ways, similar, followed)


def _modes(modes, heads):
    back, forth, by_content = modes.split((heads, heads, 1), 2)
    return back[..., None], forth[..., None], by_content


def step_backward(dreads, d, before, after, ask, parts, options):
    """From the gradients of reads and of the state after: of the state before, and of the interface by name."""
    free, wanted, kept, ways, similar, followed = parts
    back, forth, by_content = _modes(ask["read_modes"], free.shape[1])
    dread, dask = d.read + dreads @ after.memory.mT, {}
    over_heads = dread[:, :, None]
    dmodes = [(over_heads * ways[1]).sum(-1), (over_heads * ways[0]).sum(-1), (dread * similar).sum(-1, keepdim=True)]
    dask["read_modes"] = torch.cat(dmodes, 2)
    dways = [forth * over_heads, back * over_heads]
    if options.sharpen_links:
        dlogits = [softmax_backward(g, way) for g, way in zip(dways, ways)]
        sharpness = ask["link_sharpness"].unbind(-1)
        dask["link_sharpness"] = torch.stack([(g * (f + EPS).log()).sum((2, 3)) for g, f in zip(dlogits, followed)], -1)
        dways = [s[..., None, None] * g / (f + EPS) for s, g, f in zip(sharpness, dlogits, followed)]
    given: Any = (ask["read_keys"], ask["read_strengths"], ask.get("read_mask"), options.cosine)
    more, dask["read_keys"], dask["read_strengths"], dask["read_mask"] = content.backward(by_content * dread, similar, after.memory, *given)
    dmemory = d.memory + after.read.mT @ dreads + more
    dmemory, dwrite, dask["erase"], dask["add"] = memory_write.backward(dmemory, kept, after.write, ask["erase"], ask["add"])
    given = before.link, before.precedence, after.write, before.read
    dlink, dprecedence, more, dread = link_step.backward(d.link, d.precedence, dways[0], dways[1], *given)
    dwrite = d.write + dwrite + more
    gate, wgate = ask["allocation_gate"], ask["write_gate"]
    mixed = wanted + gate[..., None] * (free - wanted)
    dmixed = wgate[..., None] * dwrite
    dusage, dgates = allocation.backward(gate[..., None] * dmixed, after.usage, gate * wgate, EPS)
    dask["write_gate"] = (dwrite * mixed).sum(-1) + dgates * gate
    dask["allocation_gate"] = (dmixed * (free - wanted)).sum(-1) + dgates * wgate
    dfree: Any = 0.0
    if options.deallocate:
        left = _kept(before, ask)
        dleft = (dmemory * before.memory).sum(-1)[:, None] * other_factors(left)
        dread, dfree = dread - dleft * ask["free_gate"][..., None], -(dleft * before.read).sum(2)
        dmemory = dmemory * left.prod(1)[..., None]
    given = ask["write_keys"], ask["write_strengths"], ask.get("write_mask"), options.cosine
    more, dask["write_keys"], dask["write_strengths"], dask["write_mask"] = content.backward(
        (1 - gate[..., None]) * dmixed, wanted, before.memory, *given
    )
    given = before.usage, _seen(before, options), before.read, ask["free_gate"]
    dusage, dwrite, more_read, found = usage.backward(d.usage + dusage, *given)
    dask["free_gate"] = dfree + found
    dwrite = dwrite if options.write_gradient else torch.zeros_like(dwrite)
    return State(dmemory + more, dusage, dlink, dprecedence, dwrite, dread + more_read), dask
