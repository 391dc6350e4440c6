"""Retrieval from a modern Hopfield network in plain torch: xi <- softmax(beta xi key^T) key, step by step, then the read.

Flat arguments: query "B Q D", key "B N D", beta None or "B Q", value None (the patterns) or "B N V", mask None or bool "B N", scale (beta
is scale times that tensor), steps, tolerance (a row that a step moves by less moves no more), return_state.
"""

import torch

from memkernels.backends.reference._content import hide, softmax, softmax_backward
from memkernels.backends.reference._math import compute


def forward(query, key, beta, value, mask, scale, steps, tolerance, return_state):
    keys, values, factor = _widened(query, key, beta, value, mask, scale)
    states, moved = _states(compute(query), keys, factor, mask, steps, tolerance)
    found = [softmax(factor[..., None] * (xi @ keys.mT), mask) for xi in states]
    read = found[-1][0] @ values
    return (
        read.to(query.dtype),
        states[-1].to(query.dtype).clone() if return_state else query.new_empty(0),
        torch.stack(states[1:]).detach() if steps > 1 else read.new_empty(0, *query.shape),
        torch.stack([stats for _, stats in found]),
        torch.stack(moved).sum(0) if moved else torch.zeros_like(factor, dtype=torch.int64),
        read.detach().clone() if read.dtype != query.dtype else query.new_empty(0),
    )


def backward(
    dread, dstate, query, key, beta, value, mask, read, states, stats, moves, exact, scale, steps, tolerance, return_state
):  # fmt: skip
    keys, values, factor = _widened(query, key, beta, value, mask, scale)
    states, moved = _states(compute(query), keys, factor, mask, steps, tolerance)
    upstream = values.new_zeros(*query.shape[:2], values.shape[2]) if dread is None else compute(dread)
    dxi, dkeys, dvalues, dfactor = _step_backward(upstream, states[-1], keys, values, factor, mask)
    if dstate is not None and return_state:
        dxi = dxi + compute(dstate)
    for xi, far in zip(states[-2::-1], moved[::-1], strict=True):
        upstream, stays = dxi.masked_fill(~far[..., None], 0), dxi.masked_fill(far[..., None], 0)
        dxi, by_score, by_sum, df = _step_backward(upstream, xi, keys, keys, factor, mask)
        dxi, dkeys, dfactor = dxi + stays, dkeys + by_score + by_sum, dfactor + df
    if value is None:
        dkeys = dkeys + dvalues
    dbeta, dvalue = None if beta is None else (scale * dfactor).to(beta.dtype), None if value is None else dvalues.to(value.dtype)
    return dxi.to(query.dtype), dkeys.to(key.dtype), dbeta, dvalue


def _widened(query, key, beta, value, mask, scale):
    keys = hide(compute(key), mask)
    factor = compute(query).new_full((), scale).expand(query.shape[:2]) if beta is None else scale * compute(beta)
    return keys, keys if value is None else hide(compute(value), mask), factor


def _states(query, keys, factor, mask, steps, tolerance):
    """xi[0] to xi[steps - 1], and which rows moved to get to the later ones."""
    states, moved, far = [query], [], torch.ones_like(factor, dtype=torch.bool)
    for _ in range(steps - 1):
        weights, _ = softmax(factor[..., None] * (states[-1] @ keys.mT), mask)
        states.append(torch.where(far[..., None], weights @ keys, states[-1]))
        moved.append(far)
        if tolerance > 0:
            far = far & ((states[-1] - states[-2]).detach().square().sum(-1) >= tolerance**2)
    return states, moved


def _step_backward(upstream, xi, keys, rows, factor, mask):
    """What a read of `rows` gives to its state, to the patterns, to the rows and to the factor."""
    weights, _ = softmax(factor[..., None] * (xi @ keys.mT), mask)
    dproducts = softmax_backward(upstream @ rows.mT, weights)
    dscaled = dproducts @ keys
    return factor[..., None] * dscaled, (factor[..., None] * dproducts).mT @ xi, weights.mT @ upstream, (dscaled * xi).sum(-1)
