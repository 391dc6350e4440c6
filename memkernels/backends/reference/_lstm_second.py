"""The gradient of `lstm`'s gradient, for calls without options that change the step.

With d the upstream gradients and v the cotangents of the gradients J(x)^T d: the gradient of d is the tangent J(x) v, that of the
inputs is the tangent of J(x)^T d along v. So: the tangents of all steps, their adjoints once more, the tangents of the adjoints.
`move_<input>` is the cotangent of the gradient of an input: the direction in which that input moves.
"""

from __future__ import annotations

from typing import Any

import torch

from memkernels.backends.reference._lstm_slopes import Slopes
from memkernels.backends.reference._math import compute
from memkernels.backends.reference._recurrence import Rows, blocks, dense, each, summed


class SecondOrder:
    """One call; first `tangents`, then the others, which need them."""

    def __init__(self, call: Any, moves: Any, saved: Any):
        self.rows = rows = Rows(call.input.shape[0], call.reverse, call.reset, call.lengths)
        self.shape, self.num_heads, self.resets = call.input.shape, call.num_heads, call.reset_h is not None
        output, cells, gates = (compute(t) for t in saved)
        self.seen = _flat(rows.living(compute(call.input)))
        self.h_old = rows.entering(compute(call.h0), output, compute(call.reset_h))
        self.slopes = Slopes(gates, cells, rows.entering(compute(call.c0), cells, compute(call.reset_c)))
        self.weight_ih, self.weight_hh = compute(call.weight_ih), dense(compute(call.weight_hh), 4, call.num_heads)
        x, h0, c0, self.move_ih, move_hh, *biases = (compute(m) for m in moves[:7])
        self.move_seen = None if x is None else _flat(rows.living(x))
        self.move_hh = None if move_hh is None else dense(move_hh, 4, call.num_heads)
        self.move_bias = sum(b for b in biases if b is not None)
        self.move_states = [torch.zeros_like(cells[0]) if m is None else m for m in (h0, c0)]
        self.move_resets = [compute(m) for m in moves[-2:]]
        self.through, self.forget = each(self.slopes.through), each(self.slopes.forget)
        self.by_c, self.by_o = each(self.slopes.by_gate[:, :, :3]), each(self.slopes.by_gate[:, :, 3])

    def tangents(self) -> tuple[Any, Any]:
        """(final h and c, h and c of every step) as they move."""
        dz = summed((self.seen, _turned(self.move_ih)), (self.move_seen, self.weight_ih.mT), (_flat(self.h_old), _turned(self.move_hh)))
        dz = torch.zeros_like(self.slopes.by_gate).flatten(0, 1).flatten(1) if dz is None else dz
        dz += self.move_bias
        self.dz = dz = dz.view(self.slopes.by_gate.shape)
        weight, forget, through, z = self.weight_hh.mT.contiguous(), self.forget, self.through, each(dz.flatten(2))
        (z_i, z_f, z_g, z_o), (s_i, s_f, s_g, s_o) = ([each(part) for part in t.unbind(2)] for t in (dz, self.slopes.by_gate))

        def step(t, h, c):
            z[t].addmm_(h, weight)
            c = torch.mul(forget[t], c).addcmul_(s_i[t], z_i[t]).addcmul_(s_f[t], z_f[t]).addcmul_(s_g[t], z_g[t])
            return (torch.mul(s_o[t], z_o[t]).addcmul_(c, through[t]), c), ()

        final, self.moved = self.rows.forward(step, self.move_states, self.move_resets)
        self.move_h, self.move_c = (self.rows.entering(*given) for given in zip(self.move_states, self.moved, self.move_resets))
        return final, self.moved

    def adjoints(self, doutputs: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Backward again: gradients of the gates' arguments, of h, of c, of every step."""
        doutput, dh_n, dc_n, dcells = (compute(d) for d in doutputs)
        dstates = [torch.zeros_like(s) if d is None else d for d, s in zip((dh_n, dc_n), self.move_states)]
        dh_all, dc_all = (torch.zeros_like(self.h_old) if d is None else self.rows.living(d).clone() for d in (doutput, dcells))
        dz = self.slopes.by_gate.clone()
        z, z_c, z_o, h_all = each(dz.flatten(2)), each(dz[:, :, :3]), each(dz[:, :, 3]), each(dh_all)
        c_all, c_wide, forget, through = each(dc_all), each(dc_all.unsqueeze(2)), self.forget, self.through

        def step(t, dh, dc):
            dh = h_all[t].add_(dh)
            dc = c_all[t].addcmul_(dh, through[t]).add_(dc)
            z_c[t].mul_(c_wide[t])
            z_o[t].mul_(dh)
            return (torch.mm(z[t], self.weight_hh), dc * forget[t]), ()

        self.rows.backward(step, dstates, [None, None], False)
        return _flat(dz.flatten(2)), dh_all, dc_all

    def adjoint_tangents(self, adjoint: torch.Tensor, dh: torch.Tensor, dc: torch.Tensor) -> Any:
        """How the adjoints move: (of the initial h and c, of the gates' arguments, of the states to reset to)."""
        dz, (by_c, by_old) = self.dz, self.slopes.moved(self.dz, self.moved[1], self.move_c, dh, dc)
        by_weight = summed((adjoint, self.move_hh))
        h_old = each(torch.zeros_like(self.h_old) if by_weight is None else by_weight.view(self.h_old.shape))
        z, z_c, z_o, c_old = each(dz.flatten(2)), each(dz[:, :, :3]), each(dz[:, :, 3]), each(by_old)
        c_new, c_wide, forget, through = each(by_c), each(by_c.unsqueeze(2)), self.forget, self.through

        def step(t, dh, dc):
            dc = c_new[t].addcmul_(dh, through[t]).add_(dc)
            z_c[t].addcmul_(c_wide[t], self.by_c[t])
            z_o[t].addcmul_(dh, self.by_o[t])
            return (h_old[t].addmm_(z[t], self.weight_hh), c_old[t].addcmul_(dc, forget[t])), ()

        dstates, _, dresets = self.rows.backward(step, [torch.zeros_like(s) for s in self.move_states], [None, None], self.resets)
        return dstates, _flat(dz.flatten(2)), dresets if self.resets else (None, None)

    def gradients(self, needs: Any, doutputs: Any) -> list[torch.Tensor | None]:
        """Of the differentiable inputs."""
        adjoint, dh, dc = self.adjoints(doutputs)
        dstates, dz, dresets = self.adjoint_tangents(adjoint, dh, dc)
        dx = summed((dz, self.weight_ih), (adjoint, self.move_ih)) if needs[0] else None
        dweight_ih = summed((dz.mT, self.seen), (adjoint.mT, self.move_seen)) if needs[3] else None
        dweight_hh = summed((dz.mT, _flat(self.h_old)), (adjoint.mT, _flat(self.move_h))) if needs[4] else None
        dbias = dz.sum(0) if needs[5] or needs[6] else None
        dx = None if dx is None else dx.view(self.shape)
        dweight_hh = None if dweight_hh is None else blocks(dweight_hh, 4, self.num_heads)
        return [dx, *dstates, dweight_ih, dweight_hh, dbias, None if dbias is None else dbias.clone(), *[None] * 5, *dresets]


def _flat(t: torch.Tensor) -> torch.Tensor:
    return t.flatten(0, 1)


def _turned(t: torch.Tensor | None) -> torch.Tensor | None:
    return None if t is None else t.mT
