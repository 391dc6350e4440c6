"""One step of `lstm` with all its options, forward and backward."""

from __future__ import annotations

import torch

from memkernels.backends.reference import _random
from memkernels.backends.reference._math import compute
from memkernels.backends.reference._recurrence import dense, each, projected

EPSILON = 1e-5  # of layer norm


def normalise(x):
    """(x with mean 0 and variance 1 in every row, 1 / its deviation)."""
    centred = x - x.mean(-1, keepdim=True)
    scale = torch.rsqrt((centred * centred).mean(-1, keepdim=True) + EPSILON)
    return centred * scale, scale


def normalise_backward(d, normal, scale):
    return scale * (d - d.mean(-1, keepdim=True) - normal * (d * normal).mean(-1, keepdim=True))


def _mixed(keep, old, new):
    """`keep`: None, a mask of units that keep their old value, or the share of the old value."""
    if keep is None:
        return new
    return torch.where(keep, old, new) if isinstance(keep, torch.Tensor) else keep * old + (1 - keep) * new


def _parted(keep, d):
    """The gradients of the old and the new value that `_mixed` mixes."""
    if keep is None:
        return None, d
    return (d.masked_fill(~keep, 0), d.masked_fill(keep, 0)) if isinstance(keep, torch.Tensor) else (keep * d, (1 - keep) * d)


def _plus(d, other):
    return d if other is None else d + other


class Cell:
    """The weights of a call in their compute dtype, and the masks that it draws."""

    def __init__(self, call, rows):
        self.hidden = hidden = call.c0.shape[1]
        self.weight = dense(compute(call.weight_hh), 4, call.num_heads)
        self.weight_ih = compute(call.weight_ih) if call.weight_co is None else compute(call.weight_ih)[: 3 * hidden]
        self.weight_hr, self.weight_co, self.peephole = compute(call.weight_hr), compute(call.weight_co), compute(call.peephole)
        self.norm = None
        if call.norm_weight is not None:
            parts = ([4 * hidden, 4 * hidden, hidden], -1)
            self.norm = tuple(zip(compute(call.norm_weight).split(*parts), compute(call.norm_bias).split(*parts)))
        self.keep_h = self._zoneout(call, rows, _random.ZONEOUT_H, call.zoneout_h, call.h0.shape[1])
        self.keep_c = self._zoneout(call, rows, _random.ZONEOUT_C, call.zoneout_c, hidden)
        self.drop = None
        if call.recurrent_dropout:
            p = call.recurrent_dropout
            dropped = _random.events(call.seed, _random.RECURRENT_DROPOUT, p, 1, *call.h0.shape)[0]
            self.drop = (~dropped).to(self.weight.dtype) / (1 - p)

    @staticmethod
    def _zoneout(call, rows, stream, p, units):
        if not p:
            return [None] * rows.count
        if call.expected:
            return [p] * rows.count
        return each(_random.events(call.seed, stream, p, rows.count, call.input.shape[1], units))

    def projected(self, seen, *biases):
        """What the input adds to the gates of all steps."""
        x = projected(seen, self.weight_ih)
        if self.norm is not None:
            gamma, beta = (part[: x.shape[-1]] for part in self.norm[0])
            x = normalise(x)[0] * gamma + beta
        if self.weight_co is not None:
            x = torch.nn.functional.pad(x, (0, self.hidden))
        for bias in biases:
            x = x if bias is None else x + compute(bias)
        return x

    def step(self, t, x, h, c, keep):
        """((h, c), (activated gates,) if they are to be kept)."""
        seen, p, hidden = h if self.drop is None else h * self.drop, self.peephole, self.hidden
        if self.norm is None:
            z = torch.addmm(x, seen, self.weight.mT)
        else:
            gamma, beta = self.norm[1]
            z = x + normalise(seen @ self.weight.mT)[0] * gamma + beta
        z_if, z_g, z_o = z.split([2 * hidden, hidden, hidden], -1)
        if p is not None:
            z_if = z_if + (c[:, None] * p[:2]).flatten(1)
        forgets, g = torch.sigmoid(z_if), torch.tanh(z_g)
        i, f = forgets.chunk(2, -1)
        c_new = torch.addcmul(f * c, i, g)
        if p is not None:
            z_o = z_o + p[2] * c_new
        if self.weight_co is not None:
            z_o = torch.addmm(z_o, c_new, self.weight_co.mT)
        o = torch.sigmoid(z_o)
        h_new = o * torch.tanh(c_new if self.norm is None else normalise(c_new)[0] * self.norm[2][0] + self.norm[2][1])
        if self.weight_hr is not None:
            h_new = h_new @ self.weight_hr.mT
        states = _mixed(self.keep_h[t], h, h_new), _mixed(self.keep_c[t], c, c_new)
        return states, (torch.cat([forgets, g, o], -1),) if keep else ()

    def step_backward(self, t, dh, dc, slopes):
        """((dh', dc'), (dz, d of h before zoneout, d of tanh's argument, d of the product with h'))."""
        slope_gates, slope_o, slope_y, f, normal_c, normal_h = slopes
        p = self.peephole
        stay_h, dh = _parted(self.keep_h[t], dh)
        stay_c, dc = _parted(self.keep_c[t], dc)
        dq = dh if self.weight_hr is None else dh @ self.weight_hr
        do, dy = dq * slope_o[t], dq * slope_y[t]
        if self.norm is None:
            dc = dc + dy
        else:
            dc = dc + normalise_backward(dy * self.norm[2][0], *normal_c[t])
        if self.weight_co is not None:
            dc = torch.addmm(dc, do, self.weight_co)
        if p is not None:
            dc = torch.addcmul(dc, do, p[2])
        dgates = dc[:, None] * slope_gates[t]
        dc_old = dc * f[t]
        if p is not None:
            dc_old = dc_old + (dgates[:, :2] * p[:2]).sum(1)
        dz = torch.cat([dgates.flatten(1), do], -1)
        dproduct = dz if self.norm is None else normalise_backward(dz * self.norm[1][0], *normal_h[t])
        dh_old = dproduct @ self.weight
        if self.drop is not None:
            dh_old = dh_old * self.drop
        return (_plus(dh_old, stay_h), _plus(dc_old, stay_c)), (dz, dh, dy, dproduct)
