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

SPAN = 1 << 16  # elements of a state that are worked on at a time, small enough for a cache


class SecondOrder:
    """One call. `slopes`: how c moves with z_i, z_f, z_g, and h with z_o; `through`: how h moves with c."""

    def __init__(self, call: Any, moves: Any, saved: Any):
        self.rows = rows = Rows(call.input.shape[0], call.reverse, call.reset, call.lengths)
        self.shape, self.hidden, self.num_heads = call.input.shape, call.c0.shape[1], call.num_heads
        output, self.cells, gates = (compute(t) for t in saved)
        self.seen, self.resets = _flat(rows.living(compute(call.input))), call.reset_h is not None
        self.h_old = rows.entering(compute(call.h0), output, compute(call.reset_h))
        self.c_old = rows.entering(compute(call.c0), self.cells, compute(call.reset_c))
        self.weight_ih, self.weight_hh = compute(call.weight_ih), dense(compute(call.weight_hh), 4, call.num_heads)
        self.gates = gates.unflatten(-1, (4, self.hidden))
        self.bounded, self.through = torch.empty_like(self.cells), torch.empty_like(self.cells)
        self.slopes = torch.empty_like(self.gates)
        for t in self._spans():
            self._slopes(t)
        self._take(moves)

    def _spans(self) -> list[slice]:
        steps = max(1, SPAN // max(self.c_old[0].numel(), 1))
        return [slice(t, t + steps) for t in range(0, self.shape[0], steps)]

    def _slopes(self, t: slice) -> None:
        (i, _, g, o), y = self.gates[t].unbind(2), torch.tanh(self.cells[t], out=self.bounded[t])
        torch.mul(o, 1 - y * y, out=self.through[t])
        slopes = torch.sub(self.gates[t], self.gates[t].square(), out=self.slopes[t])
        for gate, factor in enumerate((g, self.c_old[t], None, y)):
            if factor is not None:
                slopes[:, :, gate] *= factor
        torch.mul(i, 1 - g * g, out=slopes[:, :, 2])

    def _take(self, moves: Any) -> None:
        x, h0, c0, self.move_ih, move_hh, *biases = (compute(m) for m in moves[:7])
        self.move_seen = None if x is None else _flat(self.rows.living(x))
        self.move_hh = None if move_hh is None else dense(move_hh, 4, self.num_heads)
        self.move_bias = sum(b for b in biases if b is not None)
        self.move_states = [torch.zeros_like(s[0]) if m is None else m for m, s in ((h0, self.h_old), (c0, self.c_old))]
        self.move_resets = [compute(m) for m in moves[-2:]]

    def tangents(self) -> tuple[Any, Any]:
        """(final h and c, h and c of every step) as they move."""
        dz = summed((self.seen, _turned(self.move_ih)), (self.move_seen, self.weight_ih.mT), (_flat(self.h_old), _turned(self.move_hh)))
        dz = torch.zeros_like(_flat(self.slopes.flatten(2))) if dz is None else dz
        dz += self.move_bias
        self.dz = dz = dz.view(self.slopes.shape)
        weight, forget, through = self.weight_hh.mT.contiguous(), each(self.gates[:, :, 1]), each(self.through)
        (z_i, z_f, z_g, z_o), (s_i, s_f, s_g, s_o) = ([each(part) for part in t.unbind(2)] for t in (dz, self.slopes))
        z = each(dz.flatten(2))

        def step(t, h, c):
            z[t].addmm_(h, weight)
            c = torch.mul(forget[t], c).addcmul_(s_i[t], z_i[t]).addcmul_(s_f[t], z_f[t]).addcmul_(s_g[t], z_g[t])
            return (torch.mul(s_o[t], z_o[t]).addcmul_(c, through[t]), c), ()

        final, (h, c) = self.rows.forward(step, self.move_states, self.move_resets)
        self.move_cells = c
        self.move_h, self.move_c = (self.rows.entering(*given) for given in zip(self.move_states, (h, c), self.move_resets))
        return final, (h, c)


    def adjoints(self, doutputs: Any) -> Any:
        """Backward again: gradients of the gates' arguments, of h, of c, of every step."""
        doutput, dh_n, dc_n, dcells = (compute(d) for d in doutputs)
        dstates = [torch.zeros_like(s) if d is None else d for d, s in zip((dh_n, dc_n), self.move_states)]
        dh_all, dc_all = (
            torch.zeros_like(s) if d is None else self.rows.living(d).clone() for d, s in ((doutput, self.h_old), (dcells, self.c_old))
        )
        dz = self.slopes.clone()
        z, z_c, z_o = each(dz.flatten(2)), each(dz[:, :, :3]), each(dz[:, :, 3])
        h_all, c_all, c_wide = each(dh_all), each(dc_all), each(dc_all.unsqueeze(2))
        forget, through = each(self.gates[:, :, 1]), each(self.through)

        def step(t, dh, dc):
            dh = h_all[t].add_(dh)
            dc = c_all[t].addcmul_(dh, through[t]).add_(dc)
            z_c[t].mul_(c_wide[t])
            z_o[t].mul_(dh)
            return (torch.mm(z[t], self.weight_hh), dc * forget[t]), ()

        self.rows.backward(step, dstates, [None, None], False)
        return _flat(dz.flatten(2)), dh_all, dc_all

    def _moved_slopes(self, t: slice, dh: torch.Tensor, dc: torch.Tensor, dz: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How slopes move, times the adjoints that they meet: those of z in `dz`, those of (`through`, the forget gate)."""
        gates, z, y = self.gates[t], self.dz[t], self.bounded[t]
        (i, _, g, o), (z_i, z_f, z_g, z_o) = gates.unbind(2), z.unbind(2)
        s_i, s_f, _, s_o = (gates - gates.square()).unbind(2)
        s_y, bend = 1 - y * y, torch.rsub(gates, 1, alpha=2)
        bend[:, :, 2] -= 1
        move_y, across = s_y * self.move_cells[t], s_i * (1 - g * g)
        torch.mul(self.slopes[t], bend, out=dz).mul_(z)
        dz[:, :, 0].addcmul_(across, z_g)
        dz[:, :, 1].addcmul_(s_f, self.move_c[t])
        dz[:, :, 2].addcmul_(across, z_i)
        dz[:, :, 3].addcmul_(s_o, move_y)
        dz[:, :, :3] *= dc[:, :, None]
        dz[:, :, 3] *= dh
        return (s_o * s_y).mul_(z_o).addcmul_(o * y, move_y, value=-2).mul_(dh), (dc * s_f).mul_(z_f)

    def adjoint_tangents(self, adjoints: Any) -> Any:
        """How the adjoints move: (of the initial h and c, of the gates' arguments, of the states to reset to)."""
        adjoint, dh, dc = adjoints
        dz = torch.empty_like(self.slopes)
        by_c, by_old = (torch.cat(parts) for parts in zip(*(self._moved_slopes(t, dh[t], dc[t], dz[t]) for t in self._spans())))
        by_weight = summed((adjoint, self.move_hh))
        by_weight = torch.zeros_like(self.h_old) if by_weight is None else by_weight.view(self.h_old.shape)
        z, z_c, z_o, s_c, s_o = (each(p) for p in (dz.flatten(2), dz[:, :, :3], dz[:, :, 3], self.slopes[:, :, :3], self.slopes[:, :, 3]))
        c_new, c_wide, c_old, h_old = each(by_c), each(by_c.unsqueeze(2)), each(by_old), each(by_weight)
        forget, through = each(self.gates[:, :, 1]), each(self.through)

        def step(t, dh, dc):
            dc = c_new[t].addcmul_(dh, through[t]).add_(dc)
            z_c[t].addcmul_(c_wide[t], s_c[t])
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
