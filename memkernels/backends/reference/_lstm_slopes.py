"""The slopes of a plain LSTM step, for all steps: how z moves c and h, and how that changes as z and the entering c move."""

from __future__ import annotations

import torch

SPAN = 1 << 16  # elements of a state that are worked on at a time, small enough for a cache


class Slopes:
    """`by_gate`: how c moves with z_i, z_f, z_g, and h with z_o. `through`: how h moves with c. `forget`: how c moves with c'."""

    def __init__(self, gates: torch.Tensor, cells: torch.Tensor, c_old: torch.Tensor):
        self.gates, self.c_old = gates.unflatten(-1, (4, cells.shape[-1])), c_old
        self.forget, self.by_gate = self.gates[:, :, 1], torch.empty_like(self.gates)
        self.bounded, self.through = torch.empty_like(cells), torch.empty_like(cells)
        for t in self.spans():
            gates, slopes, y = self.gates[t], self.by_gate[t], torch.tanh(cells[t], out=self.bounded[t])
            i, _, g, o = gates.unbind(2)
            torch.mul(o, 1 - y * y, out=self.through[t])
            torch.sub(gates, gates.square(), out=slopes)
            for gate, factor in ((0, g), (1, c_old[t]), (3, y)):
                slopes[:, :, gate] *= factor
            torch.mul(i, 1 - g * g, out=slopes[:, :, 2])

    def spans(self) -> list[slice]:
        steps = max(1, SPAN // max(self.c_old[0].numel(), 1))
        return [slice(t, t + steps) for t in range(0, len(self.c_old), steps)]

    def moved(self, dz: torch.Tensor, c: torch.Tensor, c_old: torch.Tensor, dh: torch.Tensor, dc: torch.Tensor) -> list[torch.Tensor]:
        """What the slopes change by as dz, c and c' move, times the adjoints of h and c: of `through`, `forget`, and by gate in `dz`."""
        found = [torch.empty_like(c), torch.empty_like(c)]
        for t in self.spans():
            gates, z, y, (through, forget) = self.gates[t], dz[t], self.bounded[t], (f[t] for f in found)
            bend, s_y = torch.rsub(gates, 1, alpha=2), 1 - y * y
            bend[:, :, 2] -= 1
            by_gate = bend.mul_(self.by_gate[t]).mul_(z)
            s_i, s_f, _, s_o = (gates - gates.square()).unbind(2)
            g, o = gates[:, :, 2], gates[:, :, 3]
            across, move_y = s_i * (1 - g * g), s_y * c[t]
            for gate, slope, move in ((0, across, z[:, :, 2]), (1, s_f, c_old[t]), (2, across, z[:, :, 0]), (3, s_o, move_y)):
                by_gate[:, :, gate].addcmul_(slope, move)
            torch.mul(s_o, s_y, out=through).mul_(z[:, :, 3]).addcmul_(o * y, move_y, value=-2).mul_(dh[t])
            torch.mul(dc[t], s_f, out=forget).mul_(z[:, :, 1])
            torch.mul(by_gate[:, :, :3], dc[t][:, :, None], out=z[:, :, :3])
            torch.mul(by_gate[:, :, 3], dh[t], out=z[:, :, 3])
        return found
