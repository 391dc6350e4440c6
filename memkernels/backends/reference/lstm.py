"""`lstm` in plain torch: the loop over T of one cell (`_lstm_cell.py`), products and sums for all steps at once around it."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memkernels.backends.reference._lstm_cell import Cell, normalise, normalise_backward
from memkernels.backends.reference._lstm_second import SecondOrder
from memkernels.backends.reference._math import compute
from memkernels.backends.reference._recurrence import Rows, blocks, each, products, projected, total, without_steps


class Call(NamedTuple):
    """The flat arguments of the op."""

    input: Any
    h0: Any
    c0: Any
    weight_ih: Any
    weight_hh: Any
    bias_ih: Any
    bias_hh: Any
    weight_hr: Any
    peephole: Any
    norm_weight: Any
    norm_bias: Any
    weight_co: Any
    reset: Any
    reset_h: Any
    reset_c: Any
    lengths: Any
    seed: Any
    reverse: bool
    num_heads: int
    zoneout_h: float
    zoneout_c: float
    recurrent_dropout: float
    expected: bool
    recompute: bool
    return_cells: bool
    training: bool


def forward(*flat):
    call = Call(*flat)
    dtype, rows = call.input.dtype, Rows(call.input.shape[0], call.reverse, call.reset, call.lengths)
    keep = call.training and not call.recompute
    (h_n, c_n), kept = _run(call, rows, Cell(call, rows), keep)
    if not rows.count:
        kept = [h_n.new_zeros(0, *h_n.shape), c_n.new_zeros(0, *c_n.shape), c_n.new_zeros(0, len(c_n), 4 * c_n.shape[1])]
    missing = h_n.new_zeros(0)
    results = (kept[0], h_n.clone(), c_n.clone(), kept[1] if keep or call.return_cells else missing, kept[2] if keep else missing)
    return tuple(r.to(dtype) for r in results)


def _run(call, rows, cell, keep):
    """((h_n, c_n), [h, c, and the activated gates if they are to be kept])."""
    x = each(cell.projected(rows.living(compute(call.input)), call.bias_ih, call.bias_hh))

    def step(t, h, c):
        return cell.step(t, x[t], h, c, keep)

    return rows.forward(step, [compute(call.h0), compute(call.c0)], [compute(call.reset_h), compute(call.reset_c)])


def backward(doutput, dh_n, dc_n, dcells, *flat):
    call, (output, cells, gates) = Call(*flat[:17], *flat[20:]), flat[17:20]
    dtype, rows = call.input.dtype, Rows(call.input.shape[0], call.reverse, call.reset, call.lengths)
    h0, c0 = compute(call.h0), compute(call.c0)
    dstates = [torch.zeros_like(s) if d is None else compute(d) for s, d in ((h0, dh_n), (c0, dc_n))]
    if not rows.count:
        return without_steps((*call[:12], *call[13:15]), dstates)
    cell = Cell(call, rows)
    if call.recompute:
        cells, gates = _run(call, rows, cell, True)[1][1:]
    h_old = rows.entering(h0, compute(output), compute(call.reset_h))
    c_old = rows.entering(c0, compute(cells), compute(call.reset_c))
    if cell.drop is not None:
        h_old = h_old * cell.drop
    i, f, g, o = compute(gates).unflatten(-1, (4, cell.hidden)).unbind(2)
    c_new = torch.addcmul(f * c_old, i, g) if call.zoneout_c else compute(cells)
    normal_c: Any = None
    normal_h: Any = None
    bounded = c_new
    if cell.norm is not None:
        normal_c, normal_h = normalise(c_new), normalise(h_old @ cell.weight.mT)
        bounded = normal_c[0] * cell.norm[2][0] + cell.norm[2][1]
    bounded = torch.tanh(bounded)
    slope_gates = torch.stack([g * i * (1 - i), c_old * f * (1 - f), i * (1 - g * g)], 2)
    slopes: list[Any] = [each(s) for s in (slope_gates, bounded * o * (1 - o), o * (1 - bounded * bounded), f)]
    slopes += [None if n is None else list(zip(*map(each, n))) for n in (normal_c, normal_h)]

    def step(t, dh, dc):
        return cell.step_backward(t, dh, dc, slopes)

    resets = call.reset_h is not None
    if call.recompute and not call.return_cells:
        dcells = None  # what stands for cells that were not asked for
    (dh0, dc0), (dz, dh, dy, dproduct), dresets = rows.backward(step, dstates, [compute(doutput), compute(dcells)], resets)
    dinput, dweight_ih, dnorm_x = _projected_backward(cell, rows.living(compute(call.input)), dz)
    dbias, dz_o = total(dz), dz[..., 3 * cell.hidden :]
    found = [dinput, dh0, dc0, dweight_ih, blocks(products(dproduct, h_old), 4, call.num_heads), dbias, dbias.clone()]
    found.append(None if cell.weight_hr is None else products(dh, o * bounded))
    found.append(None if cell.peephole is None else _peephole_backward(dz, c_old, c_new))
    if cell.norm is None:
        found += [None, None]
    else:
        found += [torch.cat([dnorm_x[0], total(dz * normal_h[0]), total(dy * normal_c[0])]), torch.cat([dnorm_x[1], total(dz), total(dy)])]
    found.append(None if cell.weight_co is None else products(dz_o, c_new))
    found += dresets or [None, None]
    return tuple(None if d is None else d.to(dtype) for d in found)


def second_order(cotangents, needs, doutput, dh_n, dc_n, dcells, *flat):
    call, saved, doutputs = Call(*flat[:17], *flat[20:]), flat[17:20], (doutput, dh_n, dc_n, dcells)
    changed = (call.weight_hr, call.peephole, call.norm_weight, call.weight_co)
    drawn = call.zoneout_h or call.zoneout_c or call.recurrent_dropout
    if drawn or call.recompute or not call.input.shape[0] or any(t is not None for t in changed):
        return None
    second = SecondOrder(call, cotangents, saved)
    (h_n, c_n), (h, c) = second.tangents()
    found = [h, h_n, c_n, c, *(second.gradients(needs[4:], doutputs) if True in needs[4:] else [None] * 14)]
    return [d if d is None else d.to(call.input.dtype) for d in found]


def _projected_backward(cell, seen, dz):
    """Gradients of the input, of weight_ih, and of gamma and beta of the input's layer norm."""
    ignored = cell.weight_co is not None
    dx, dnorm = dz[..., : 3 * cell.hidden] if ignored else dz, None
    if cell.norm is not None:
        normal, scale = normalise(projected(seen, cell.weight_ih))
        dnorm = [torch.nn.functional.pad(total(d), (0, cell.hidden if ignored else 0)) for d in (dx * normal, dx)]
        dx = normalise_backward(dx * cell.norm[0][0][: dx.shape[-1]], normal, scale)
    dweight = products(dx, seen)
    return dx @ cell.weight_ih, torch.nn.functional.pad(dweight, (0, 0, 0, cell.hidden)) if ignored else dweight, dnorm


def _peephole_backward(dz, c_old, c_new):
    i, f, _, o = dz.unflatten(-1, (4, c_old.shape[-1])).unbind(2)
    return torch.stack([total(i * c_old), total(f * c_old), total(o * c_new)])
