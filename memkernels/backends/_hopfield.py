"""The backward of hopfield_retrieve on any backend: its steps are attention, whose backward kernels give the gradients, last step first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

# (dquery, dkey, dvalue, dout, query, key, value, mask, out, stats, scale) -> None, tensors "B rows width", mask "B rows"
AttentionBackward = Callable[..., None]


def backward(
    attention: AttentionBackward,
    gradients: Any,
    dread: Any,
    dstate: Any,
    inputs: Any,
    saved: Any,
    scale: float,
    steps: int,
    tolerance: float,
) -> None:
    """Gradients of query, key, beta and value (None where nobody needs one) from what forward saved (exact, states, stats, moves).

    Everything is summed in the dtype of the statistics. A row at rest hands its gradient on, as it does its state; without a tolerance
    none rests.
    """
    dquery, dkey, dbeta, dvalue = gradients
    (query, key, beta, value, mask), (exact, states, stats, moves) = inputs, saved
    wide = stats.dtype
    keys, factor = key.to(wide), None if beta is None else beta.to(wide)[..., None]
    values, visited = keys if value is None else value.to(wide), [query.to(wide), *states]

    def step(s: int, upstream: Any, rows: Any, out: Any, want_key: bool, want_rows: bool) -> tuple[Any, ...]:
        """What a read of `rows` by the weights of step s gives to its state, to beta, to the patterns and to the rows."""
        xi = visited[s]
        scaled = xi if factor is None else factor * xi
        found = [
            scaled.new_empty(scaled.shape),
            keys.new_empty(keys.shape) if want_key else None,
            rows.new_empty(rows.shape) if want_rows else None,
        ]
        attention(*found, upstream, scaled, keys, rows, mask, out, stats[s], scale)
        if factor is None:
            return found[0], None, *found[1:]
        return factor * found[0], (found[0] * xi).sum(-1), *found[1:]

    upstream = torch.zeros_like(exact) if dread is None else dread.to(wide)
    own_value, want_key = value is not None, dkey is not None
    dxi, dfactor, dkeys, dvalues = step(steps - 1, upstream, values, exact, want_key, dvalue is not None if own_value else want_key)
    if not own_value and want_key:
        dkeys += dvalues
    if dstate is not None:
        dxi = dxi + dstate.to(wide)
    for s in range(steps - 2, -1, -1):
        far = (moves > s)[..., None] if tolerance > 0 else None
        if far is not None and far.is_cpu and not bool(far.any()):  # on a GPU it would take a wait to learn that
            continue
        found = step(s, dxi if far is None else dxi.masked_fill(~far, 0), keys, states[s], want_key, want_key)
        dxi = found[0] if far is None else found[0] + dxi.masked_fill(far, 0)
        dfactor = None if dfactor is None else dfactor + found[1]
        if want_key:
            dkeys.add_(found[2]).add_(found[3])
    for gradient, total in ((dquery, dxi), (dkey, dkeys), (dbeta, dfactor), (dvalue, dvalues)):
        if gradient is not None:
            gradient.copy_(total)
