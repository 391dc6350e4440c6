"""`lstm_gates` in plain torch."""

from __future__ import annotations

import torch

from memkernels.backends.reference._math import compute


def _activate(z, old, peephole, c=None):
    """Gate activations; c is computed when it is not given."""
    zi, zf, zg, zo = z.chunk(4, -1)
    if peephole is not None:
        zi, zf = zi + peephole[0] * old, zf + peephole[1] * old
    i, f, g = torch.sigmoid(zi), torch.sigmoid(zf), torch.tanh(zg)
    if c is None:
        c = f * old + i * g
    o = torch.sigmoid(zo if peephole is None else zo + peephole[2] * c)
    return i, f, g, o, c


def forward(gates, cell, peephole):
    _, _, _, o, c = _activate(compute(gates), compute(cell), compute(peephole))
    return (o * torch.tanh(c)).to(gates.dtype), c.to(gates.dtype)


def backward(dh, dc, gates, cell, peephole):
    dtype = gates.dtype
    old, p = compute(cell), compute(peephole)
    i, f, g, o, c = _activate(compute(gates), old, p)
    dh = torch.zeros_like(old) if dh is None else compute(dh)
    dc = torch.zeros_like(old) if dc is None else compute(dc)
    tc = torch.tanh(c)
    do = dh * tc * o * (1 - o)
    dc = dc + dh * o * (1 - tc * tc)
    if p is not None:
        dc = dc + do * p[2]
    di, df, dg = dc * g * i * (1 - i), dc * old * f * (1 - f), dc * i * (1 - g * g)
    dold, dp = dc * f, None
    if p is not None:
        dold = dold + di * p[0] + df * p[1]
        dp = torch.stack([(di * old).sum(0), (df * old).sum(0), (do * c).sum(0)]).to(dtype)
    return torch.cat([di, df, dg, do], -1).to(dtype), dold.to(dtype), dp
