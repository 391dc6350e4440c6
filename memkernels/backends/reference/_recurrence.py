"""The loop over time of every recurrent op, written once: rows that end, resets, both directions, heads, and the gradient of all that.

A cell adds its step: forward (t, *states that enter) -> (new states, other things to keep), backward (t, *gradients of the new
states) -> (gradients of the states that enter, other things to keep). Everything that can be done for all steps at once is.
"""

from __future__ import annotations

from typing import Any

import torch

States = list[Any] | tuple[Any, ...]  # tensors, some None


class Rows:
    """Which rows run at a step and which start again there: `alive` and `starts`, "T B 1" or None for all and none."""

    def __init__(self, count: int, reverse: bool, reset: torch.Tensor | None, lengths: torch.Tensor | None):
        self.count, self.reverse = count, reverse
        self.alive: Any = None
        self.starts: Any = None
        if lengths is not None:
            self.alive = (torch.arange(count, device=lengths.device)[:, None] < lengths)[..., None]
            self.ends = (torch.arange(1, count + 1, device=lengths.device)[:, None] >= lengths)[..., None]
        if reset is not None:
            self.starts = reset[..., None] if self.alive is None else reset[..., None] & self.alive

    def order(self, backwards: bool = False) -> range:
        return range(self.count - 1, -1, -1) if self.reverse != backwards else range(self.count)

    def living(self, values: torch.Tensor) -> torch.Tensor:
        """Zero past the end of a row, where anything may stand, NaN included."""
        return values if self.alive is None else values.masked_fill(~self.alive, 0)

    def entering(self, first: torch.Tensor, states: torch.Tensor, reset_state: torch.Tensor | None) -> torch.Tensor:
        """The state that entered each step, "T B H", from the initial state and the states after each step."""
        found = torch.cat([states[1:], first[None]] if self.reverse else [first[None], states[:-1]])
        if self.reverse and self.alive is not None:
            found = torch.where(self.ends, first, found)
        if self.starts is not None:
            found = found.masked_fill(self.starts, 0) if reset_state is None else torch.where(self.starts, reset_state, found)
        return self.living(found)

    def forward(self, step: Any, states: States, reset_states: States) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """(final states, what was kept of every step as "T B ..."): first the new states, then what the step returned beside them."""
        alive, starts, resets = each(self.alive), each(self.starts), [each(r) for r in reset_states]
        kept: list[Any] = [None] * self.count
        for t in self.order():
            old = list(states)
            if starts is not None:
                states = [s.masked_fill(starts[t], 0) if r is None else torch.where(starts[t], r[t], s) for s, r in zip(states, resets)]
            new, beside = step(t, *states)
            kept[t] = (*new, *beside)
            states = new if alive is None else [torch.where(alive[t], n, o) for n, o in zip(new, old)]
        return list(states), [self.living(torch.stack(column)) for column in zip(*kept)]

    def backward(
        self, step: Any, dstates: States, dkept: States, resets: bool
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
        """From the gradients of the final states and of the states of every step: (gradients of the initial states, what the steps
        returned as "T B ...", gradients of the states to reset to, if asked for)."""
        alive, starts = each(self.alive), each(self.starts)
        dsteps = [each(d) for d in dkept]
        kept: list[Any] = [None] * self.count
        crossing: list[Any] = [None] * self.count
        for t in self.order(backwards=True):
            carried = [d if s is None else d + s[t] for d, s in zip(dstates, dsteps)]
            if alive is not None:
                carried = [d.masked_fill(~alive[t], 0) for d in carried]
            found, kept[t] = step(t, *carried)
            if starts is not None:
                crossing[t] = found
                found = [d.masked_fill(starts[t], 0) for d in found]
            dstates = found if alive is None else [torch.where(alive[t], d, old) for d, old in zip(found, dstates)]
        stacked = [torch.stack(column) for column in zip(*kept)]
        if not resets:
            return list(dstates), stacked, []
        return list(dstates), stacked, [torch.stack(c).masked_fill(~self.starts, 0) for c in zip(*crossing)]


def each(values: torch.Tensor | None) -> Any:
    """The slices of all steps: the gradient of one unbind is one stack, that of T selections T tensors of full size."""
    return None if values is None else values.unbind(0)


def dense(weight: torch.Tensor, gates: int, num_heads: int) -> torch.Tensor:
    """The recurrent weights of all heads as one matrix with zeros between the heads."""
    if num_heads == 1:
        return weight
    rows, width = weight.shape
    heads = torch.eye(num_heads, dtype=torch.bool, device=weight.device)[:, None, :, None]
    blocks = weight.reshape(gates, num_heads, rows // (gates * num_heads), 1, width)
    return torch.where(heads, blocks, torch.zeros_like(blocks)).reshape(rows, num_heads * width)


def blocks(gradient: torch.Tensor, gates: int, num_heads: int) -> torch.Tensor:
    """The transpose of `dense`: what lies on the block diagonal."""
    if num_heads == 1:
        return gradient
    rows, width = gradient.shape[0], gradient.shape[1] // num_heads
    split = gradient.reshape(gates, num_heads, rows // (gates * num_heads), num_heads, width)
    return split.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).reshape(rows, width)


def projected(seen: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """seen weight^T of all steps, as one product of matrices: of three dimensions torch makes one or many of them, whose last bits differ,
    by who requires a gradient."""
    return (seen.flatten(0, 1) @ weight.mT).unflatten(0, seen.shape[:2])


def products(dz: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
    """Sum over all steps and rows of the outer products: the gradient of a weight."""
    return dz.flatten(0, 1).mT @ seen.flatten(0, 1)


def summed(*pairs: tuple[torch.Tensor | None, torch.Tensor | None]) -> torch.Tensor | None:
    """The sum of the products of pairs of matrices, of those pairs that are whole; None without any."""
    found = None
    for left, right in pairs:
        if left is not None and right is not None:
            found = left @ right if found is None else found.addmm_(left, right)
    return found


def total(dz: torch.Tensor) -> torch.Tensor:
    return dz.sum((0, 1))


def without_steps(inputs: States, dstates: States) -> tuple[torch.Tensor | None, ...]:
    """The gradients of a call of no steps, whose inputs are: input, initial states, others. The states pass, nothing else matters."""
    found = [None if t is None else torch.zeros_like(t) for t in inputs]
    found[1 : 1 + len(dstates)] = [d.to(inputs[0].dtype) for d in dstates]
    return tuple(found)
