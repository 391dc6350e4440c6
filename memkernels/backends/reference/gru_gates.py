"""`gru_gates` in plain torch."""

from __future__ import annotations

import torch

from memkernels.backends.reference._math import compute


def _activate(gates_input, gates_hidden):
    """r, z, n, and what r gates."""
    xr, xz, xn = gates_input.chunk(3, -1)
    hr, hz, hn = gates_hidden.chunk(3, -1)
    r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
    return r, z, torch.tanh(xn + r * hn), hn


def forward(gates_input, gates_hidden, hidden):
    old = compute(hidden)
    _, z, n, _ = _activate(compute(gates_input), compute(gates_hidden))
    return ((n + z * (old - n)).to(hidden.dtype),)


def backward(dh, gates_input, gates_hidden, hidden):
    dtype = hidden.dtype
    old = compute(hidden)
    r, z, n, hn = _activate(compute(gates_input), compute(gates_hidden))
    dh = torch.zeros_like(old) if dh is None else compute(dh)
    dn = dh * (1 - z) * (1 - n * n)
    dr, dz = dn * hn * r * (1 - r), dh * (old - n) * z * (1 - z)
    return torch.cat([dr, dz, dn], -1).to(dtype), torch.cat([dr, dz, dn * r], -1).to(dtype), (dh * z).to(dtype)
