"""The gradient of `lstm`'s gradient, for calls without options that change the step.

With d the upstream gradients and v the cotangents of the gradients J(x)^T d: the gradient of d is the tangent J(x) v, that of the
inputs is the tangent of J(x)^T d along v. So: the tangents of all steps, their adjoints once more, the tangents of the adjoints.
`move_<input>` is the cotangent of the gradient of an input: the direction in which that input moves.
"""

from __future__ import annotations

from typing import Any

import torch

from memkernels.backends.reference._math import compute
from memkernels.backends.reference._recurrence import Rows, blocks, dense, each, summed


class SecondOrder:
    """One call. `slopes`: how c moves with z_i, z_f, z_g, and h with z_o; `through`: how h moves with c."""

    def __init__(self, call: Any, moves: Any, saved: Any):
        self.rows = rows = Rows(call.input.shape[0], call.reverse, call.reset, call.lengths)
        self.shape, self.hidden, self.num_heads = call.input.shape, call.c0.shape[1], call.num_heads
        output, cells, gates = (compute(t) for t in saved)
        self.seen, self.resets = _flat(rows.living(compute(call.input))), call.reset_h is not None
        self.h_old = rows.entering(compute(call.h0), output, compute(call.reset_h))
        self.c_old = rows.entering(compute(call.c0), cells, compute(call.reset_c))
        self.weight_ih, self.weight_hh = compute(call.weight_ih), dense(compute(call.weight_hh), 4, call.num_heads)
        self.gates, self.bounded = gates.unflatten(-1, (4, self.hidden)), torch.tanh(cells)
        i, f, g, o = self.gates.unbind(2)
        self.forget, self.through = f, o * (1 - self.bounded * self.bounded)
        self.slopes = torch.stack([g * i * (1 - i), self.c_old * f * (1 - f), i * (1 - g * g), self.bounded * o * (1 - o)], 2)
        self._take(moves)

    def _take(self, moves: Any) -> None:
        x, h0, c0, self.move_ih, move_hh, *biases = (compute(m) for m in moves[:7])
        self.move_seen = None if x is None else _flat(self.rows.living(x))
        self.move_hh = None if move_hh is None else dense(move_hh, 4, self.num_heads)
        self.move_biases = [b for b in biases if b is not None]
        self.move_states = [torch.zeros_like(s[0]) if m is None else m for m, s in ((h0, self.h_old), (c0, self.c_old))]
        self.move_resets = [compute(m) for m in moves[-2:]]

    def tangents(self) -> tuple[Any, Any]:
        """(final h and c, h and c of every step) as they move."""
        dz = summed((self.seen, _turned(self.move_ih)), (self.move_seen, self.weight_ih.mT), (_flat(self.h_old), _turned(self.move_hh)))
        dz = torch.zeros_like(self.slopes) if dz is None else dz.view(self.slopes.shape)
        for bias in self.move_biases:
            dz += bias.view(4, self.hidden)
        weight, forget, through = self.weight_hh.mT.contiguous(), each(self.forget), each(self.through)
        (z_i, z_f, z_g, z_o), (s_i, s_f, s_g, s_o) = ([each(part) for part in t.unbind(2)] for t in (dz, self.slopes))
        z = each(dz.flatten(2))

        def step(t, h, c):
            z[t].addmm_(h, weight)
            c = torch.mul(forget[t], c).addcmul_(s_i[t], z_i[t]).addcmul_(s_f[t], z_f[t]).addcmul_(s_g[t], z_g[t])
            return (torch.mul(s_o[t], z_o[t]).addcmul_(c, through[t]), c), ()

        final, (h, c) = self.rows.forward(step, self.move_states, self.move_resets)
        self.dz, self.moved_cells = dz, c
        self.move_h, self.move_c = (self.rows.entering(*given) for given in zip(self.move_states, (h, c), self.move_resets))
        return final, (h, c)

    def _parts(self, dz: torch.Tensor) -> Any:
        """Of every step: all of dz, what moves c of it, what moves h, and the slopes of both."""
        return [each(part) for part in (dz.flatten(2), dz[:, :, :3], dz[:, :, 3], self.slopes[:, :, :3], self.slopes[:, :, 3])]

    def adjoints(self, doutputs: Any) -> Any:
        """Backward again: gradients of the gates' arguments, of h, of c, of every step."""
        doutput, dh_n, dc_n, dcells = (compute(d) for d in doutputs)
        dstates = [torch.zeros_like(s) if d is None else d for d, s in zip((dh_n, dc_n), self.move_states)]
        dz = torch.empty_like(self.slopes)
        (z, z_c, z_o, s_c, s_o), forget, through = self._parts(dz), each(self.forget), each(self.through)

        def step(t, dh, dc):
            dc = torch.addcmul(dc, dh, through[t])
            torch.mul(dc[:, None], s_c[t], out=z_c[t])
            torch.mul(dh, s_o[t], out=z_o[t])
            return (z[t] @ self.weight_hh, dc * forget[t]), (dh, dc)

        dh, dc = self.rows.backward(step, dstates, [doutput, dcells], False)[1]
        return _flat(dz.flatten(2)), dh, dc

    def _moved_slopes(self, dh: torch.Tensor, dc: torch.Tensor) -> Any:
        """How slopes move, times the adjoints that they meet: (slopes of z, `through`, `forget`)."""
        (i, f, g, o), y, (z_i, z_f, z_g, z_o) = self.gates.unbind(2), self.bounded, self.dz.unbind(2)
        s_i, s_f, s_g, s_o, s_y = i * (1 - i), f * (1 - f), 1 - g * g, o * (1 - o), 1 - y * y
        move_y, move_f = s_y * self.moved_cells, s_f * z_f
        by_gate = (
            dc * s_i * (s_g * z_g + g * (1 - 2 * i) * z_i),
            dc * (s_f * self.move_c + self.c_old * (1 - 2 * f) * move_f),
            dc * s_g * (s_i * z_i - 2 * i * g * z_g),
            dh * s_o * (move_y + y * (1 - 2 * o) * z_o),
        )
        return torch.stack(by_gate, 2), dh * (s_o * s_y * z_o - 2 * o * y * move_y), dc * move_f

    def adjoint_tangents(self, adjoints: Any) -> Any:
        """How the adjoints move: (of the initial h and c, of the gates' arguments, of the states to reset to)."""
        adjoint, dh, dc = adjoints
        dz, by_c, by_old = self._moved_slopes(dh, dc)
        by_weight = summed((adjoint, self.move_hh))
        by_weight = torch.zeros_like(by_c) if by_weight is None else by_weight.view(by_c.shape)
        (z, z_c, z_o, s_c, s_o), forget, through = self._parts(dz), each(self.forget), each(self.through)
        c_new, c_old, h_old = each(by_c), each(by_old), each(by_weight)

        def step(t, dh, dc):
            dc = c_new[t].addcmul_(dh, through[t]).add_(dc)
            z_c[t].addcmul_(dc[:, None], s_c[t])
            z_o[t].addcmul_(dh, s_o[t])
            return (h_old[t].addmm_(z[t], self.weight_hh), c_old[t].addcmul_(dc, forget[t])), ()

        dstates, _, dresets = self.rows.backward(step, [torch.zeros_like(s) for s in self.move_states], [None, None], self.resets)
        return dstates, _flat(dz.flatten(2)), dresets or [None, None]

    def gradients(self, needs: Any, adjoint: torch.Tensor, moved: Any) -> list[torch.Tensor | None]:
        """Of the differentiable inputs; `moved`: what `adjoint_tangents` found."""
        (dh0, dc0), dz, dresets = moved
        x, weight_ih, weight_hh = needs[0], needs[3], needs[4]
        dx = summed((dz, self.weight_ih), (adjoint, self.move_ih)) if x else None
        dweight_ih = summed((dz.mT, self.seen), (adjoint.mT, self.move_seen)) if weight_ih else None
        dweight_hh = summed((dz.mT, _flat(self.h_old)), (adjoint.mT, _flat(self.move_h))) if weight_hh else None
        dbias = dz.sum(0) if needs[5] or needs[6] else None
        return [
            None if dx is None else dx.view(self.shape),
            dh0,
            dc0,
            dweight_ih,
            None if dweight_hh is None else blocks(dweight_hh, 4, self.num_heads),
            dbias,
            dbias,
            *[None] * 5,
            *dresets,
        ]


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(0, 1)


def _turned(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.mT
