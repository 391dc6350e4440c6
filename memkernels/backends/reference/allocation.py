"""allocation in plain torch: a[phi_j] = (1 - s[phi_j]) prod_{i<j} s[phi_i] with s = eps + (1 - eps) u, rows by ascending s."""

import torch

from memkernels.backends.reference._math import compute


def _sorted(usage, eps):
    """The order of the rows, their s in that order, and the products of all s before each."""
    s = eps + (1 - eps) * usage
    order = torch.sort(s.detach(), dim=1, stable=True).indices
    s = s.gather(1, order)
    return order, s, torch.cat([torch.ones_like(s[:, :1]), s], 1).cumprod(1)[:, :-1]


def _head(usage, eps):
    order, s, before = _sorted(usage, eps)
    return torch.zeros_like(s).scatter(1, order, (1 - s) * before)


def _heads(usage, gates, eps):
    """The usage that each head sees and its allocation."""
    seen, found = [], []
    for gate in gates.unbind(1):
        seen.append(usage)
        found.append(_head(usage, eps))
        usage = usage + (1 - usage) * (gate[:, None] * found[-1])
    return seen, found


def forward(usage, write_gates, eps):
    dtype, usage = usage.dtype, compute(usage)
    if write_gates is None:
        return (_head(usage, eps).to(dtype),)
    _, found = _heads(usage, compute(write_gates), eps)
    return ((torch.stack(found, 1) if found else usage.new_zeros(usage.shape[0], 0, usage.shape[1])).to(dtype),)


def _later(s, amounts):
    """sum_{k>j} amounts_k prod_{j<i<k} s_i, by doubling: reach 1, 2, 4, ... rows."""
    nothing = torch.zeros_like(s[:, :1])
    factor, total = torch.cat([s, nothing], 1)[:, 1:], torch.cat([amounts, nothing], 1)[:, 1:]
    reach = 1
    while reach < s.shape[1]:
        gap = torch.zeros_like(s[:, :reach])
        total = total + factor * torch.cat([total[:, reach:], gap], 1)
        factor = factor * torch.cat([factor[:, reach:], gap], 1)
        reach *= 2
    return total


def _head_backward(d, usage, eps):
    """The gradient of usage from that of one head's allocation."""
    order, s, before = _sorted(usage, eps)
    d = d.gather(1, order)
    return (1 - eps) * torch.zeros_like(s).scatter(1, order, before * (_later(s, d * (1 - s)) - d))


def backward(dout, usage, write_gates, eps):
    dtype, d, usage = usage.dtype, compute(dout), compute(usage)
    if write_gates is None:
        return _head_backward(d, usage, eps).to(dtype), None
    gates = compute(write_gates)
    seen, found = _heads(usage, gates, eps)
    dusage, dgates = torch.zeros_like(usage), []
    for h in reversed(range(len(seen))):
        gate, free = gates[:, h, None], 1 - seen[h]
        dgates.append((dusage * free * found[h]).sum(1))
        da = d[:, h] + dusage * free * gate
        dusage = dusage * (1 - gate * found[h]) + _head_backward(da, seen[h], eps)
    stacked = torch.stack(dgates[::-1], 1) if dgates else torch.zeros_like(gates)
    return dusage.to(dtype), stacked.to(dtype)
