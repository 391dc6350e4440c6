"""A whole LSTM layer over time on Triton, with every option; see _recurrence_fwd for the formulae's parts and who owns what.

Products over all steps (input @ weight_ih.T, and in backward dz with input, weights and states) are one matrix product each. Where a
program cannot hold a head (more than 128 units, 64 in float32), or holds only a part of a row of which layer norm, output_gate="cell" or a
projection need all, a step is one launch or several. Bytes a hidden unit and step: forward 16 + 6s, backward 16 + 6s, and the weights
where they do not stay on the chip.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memkernels.backends.triton import _cells, _matmul, _recurrence, _recurrence_aot
from memkernels.backends.triton._common import AOT_DTYPES, refuse


class Call(NamedTuple):
    """The flat arguments of the op."""

    input: torch.Tensor
    h0: torch.Tensor
    c0: torch.Tensor
    weight_ih: torch.Tensor
    weight_hh: torch.Tensor
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

    def layer(self) -> _recurrence.Layer:
        small: Any = {
            name: None if (t := getattr(self, name)) is None else t.contiguous()
            for name in ("lengths", "peephole", "norm_weight", "norm_bias", "weight_co", "weight_hr")
        }
        return _recurrence.Layer(
            _cells.LSTM.value, self.input.shape[0], self.input.shape[1], self.c0.shape[1], self.h0.shape[1], self.num_heads,
            self.input.dtype, self.weight_hh.contiguous(), self.h0.contiguous(), self.reverse, self.reset, self.reset_h,
            c0=self.c0.contiguous(),
            reset_c=self.reset_c, seed=self.seed, zoneout=(self.zoneout_h, self.zoneout_c), expected=self.expected,
            dropout=self.recurrent_dropout, **small,
        )  # fmt: skip

    def used(self) -> int:
        """Rows of weight_ih that count: output_gate="cell" ignores those of o."""
        return self.weight_ih.shape[0] if self.weight_co is None else 3 * self.c0.shape[1]


def supports(*call):
    return refuse(call[0])


def _norm(call, begin, end):
    return call.norm_weight[begin:end].float(), call.norm_bias[begin:end].float()


def _raw_input(call, layer):
    """W_ih x of the gates that see x."""
    used = call.used()
    raw = call.input.new_empty(layer.steps * layer.batch, used, dtype=torch.float32)
    _matmul.matmul(raw, call.input.reshape(raw.shape[0], call.weight_ih.shape[1]), call.weight_ih[:used].mT, layer.dtype)
    return raw


def _project(call, layer):
    """The input's part of the gates, both biases in it."""
    projected = call.input.new_empty(layer.steps * layer.batch, 4 * layer.hidden, dtype=torch.float32)
    if call.norm_weight is None and call.weight_co is None:
        x = call.input.reshape(projected.shape[0], call.weight_ih.shape[1])
        _matmul.matmul(projected, x, call.weight_ih.mT, layer.dtype, call.bias_ih, call.bias_hh)
        return projected
    raw, used = _raw_input(call, layer), call.used()
    if call.norm_weight is not None:
        raw = torch.layer_norm(raw, (used,), *_norm(call, 0, used))
    projected[:, :used] = raw
    projected[:, used:] = 0
    for bias in (call.bias_ih, call.bias_hh):
        if bias is not None:
            projected += bias
    return projected


def forward(output, h_n, c_n, cells, gates, *flat):
    call = Call(*flat)
    layer = call.layer()
    projected, c_state = _project(call, layer), _recurrence.state_of(call.c0, call.c0)
    h_n.copy_(call.h0)
    _recurrence.forward(layer, output, h_n, projected, cells_ptr=cells, gates_ptr=gates, c_state_ptr=c_state)
    c_n.copy_(c_state)


def _rebuilt(call, layer, raw):
    """(cells, gates) from the outputs: all gates by one product a weight, cells by a scan."""
    total, hidden = _project(call, layer), layer.hidden
    total += raw if call.norm_weight is None else torch.layer_norm(raw, (4 * hidden,), *_norm(call, 4 * hidden, 8 * hidden))
    cells = total.new_empty(layer.steps, layer.batch, hidden)
    gates, c_state = torch.empty_like(total), _recurrence.state_of(call.c0, call.c0)
    _recurrence.scan(layer, total, cells_ptr=cells, gates_ptr=gates, c_state_ptr=c_state)
    if call.weight_co is not None:
        c_new = _new_cells(layer, gates, layer.entered(cells, layer.c0, layer.reset_c, False))
        inner = torch.empty_like(c_new)
        _matmul.matmul(inner, c_new, layer.weight_co.mT, layer.dtype)
        inner += total[:, 3 * hidden :]
        gates[:, 3 * hidden :] = torch.sigmoid(inner if call.peephole is None else inner + call.peephole[2] * c_new)
    return cells, gates


def _new_cells(layer, gates, c_old):
    """Before zoneout."""
    i, f, g, _ = gates.view(layer.steps * layer.batch, 4 * layer.hidden).float().chunk(4, 1)
    return f * c_old + i * g


class Gradients(NamedTuple):
    """Of the inputs that have one, in the order of the declaration; None where nobody needs it."""

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
    reset_h: Any
    reset_c: Any


def backward(*flat):
    want, (doutput, dh_n, dc_n, dcells) = Gradients(*flat[:14]), flat[14:18]
    call, (output, cells, gates) = Call(*flat[18:35], *flat[38:]), flat[35:38]
    layer = call.layer()
    call = call._replace(input=_recurrence.living(layer, call.input))
    rows, hidden = layer.steps * layer.batch, layer.hidden
    normed = call.norm_weight is not None
    new = lambda width: call.input.new_empty(rows, width, dtype=torch.float32)  # noqa: E731
    dz, dh, dc = new(4 * hidden), _recurrence.state_of(dh_n, call.h0), _recurrence.state_of(dc_n, call.c0)
    entered = layer.entered(output, layer.h0, layer.reset_h, layer.dropout > 0)
    raw = None
    if normed or call.recompute:
        raw = new(4 * hidden)
        _matmul.hidden_product(raw, entered, layer.weight, hidden, layer.heads, layer.dtype)
    if call.recompute:
        cells, gates = _rebuilt(call, layer, raw)
    dhidden = new(4 * hidden) if normed else dz
    dnormed = new(hidden) if normed else None
    dnew = None if call.weight_hr is None else new(layer.state).view(layer.steps, layer.batch, layer.state)
    _recurrence.backward(
        layer, dz, dhidden, dh, doutput, dc_state_ptr=dc, dnew_ptr=dnew, dnormed_ptr=dnormed, dcells_ptr=dcells, output_ptr=output,
        cells_ptr=cells, gates_ptr=gates, c0_ptr=layer.c0, raw_ptr=raw, dreset_h_ptr=want.reset_h, dreset_c_ptr=want.reset_c,
    )  # fmt: skip
    for gradient, found in ((want.h0, dh), (want.c0, dc)):
        if gradient is not None:
            gradient.copy_(found)
    _input_side(call, layer, want, dz)
    if want.weight_hh is not None:
        _matmul.weight_gradient(want.weight_hh, dhidden, entered, hidden, layer.heads, layer.dtype)
    for gradient in (want.bias_ih, want.bias_hh):
        _recurrence.total(gradient, dz)
    _cell_side(call, layer, want, dz, raw, dnormed, dnew, cells, gates)


def _norm_backward(d, raw, weight, input_too):
    """Gradients of (the values before a layer norm, if asked for, its weight, its bias)."""
    shape = (raw.shape[1],)
    _, mean, scale = torch.native_layer_norm(raw, shape, None, None, 1e-5)
    return torch.ops.aten.native_layer_norm_backward(d, raw, shape, mean, scale, weight, weight, [input_too, True, True])


def _input_side(call, layer, want, dz):
    """Gradients of the input, of weight_ih and of the input's layer norm."""
    used = call.used()
    d = dz[:, :used]
    if call.norm_weight is not None:
        d, *dnorm = _norm_backward(d.contiguous(), _raw_input(call, layer), _norm(call, 0, used)[0], True)
        for gradient, found in zip((want.norm_weight, want.norm_bias), dnorm, strict=True):
            if gradient is not None:
                gradient[: 4 * layer.hidden].zero_()
                gradient[:used] = found
    _recurrence.input_gradients(layer, want.input, want.weight_ih, d, call.input, call.weight_ih)


def _cell_side(call, layer, want, dz, raw, dnormed, dnew, cells, gates):
    """Gradients of what acts on the cell, and of the hidden part's layer norm."""
    hidden, normed = layer.hidden, call.norm_weight is not None
    if all(d is None for d in (want.weight_hr, want.peephole, want.norm_weight, want.norm_bias, want.weight_co)):
        return
    c_old = layer.entered(cells, layer.c0, layer.reset_c, False)
    c_new = _new_cells(layer, gates, c_old)
    if normed:
        found = (
            _norm_backward(dz, raw, _norm(call, 4 * hidden, 8 * hidden)[0], False),
            _norm_backward(dnormed, c_new, _norm(call, 8 * hidden, 9 * hidden)[0], False),
        )
        for i, gradient in ((1, want.norm_weight), (2, want.norm_bias)):
            if gradient is not None:
                gradient[4 * hidden :] = torch.cat([part[i] for part in found])
    if want.weight_hr is not None:
        bounded = torch.layer_norm(c_new, (hidden,), *_norm(call, 8 * hidden, 9 * hidden)) if normed else c_new
        memory = gates.view(len(c_new), 4 * hidden)[:, 3 * hidden :] * torch.tanh(bounded)
        _matmul.matmul(want.weight_hr, dnew.view(len(memory), layer.state).mT, memory, layer.dtype)
    if want.weight_co is not None:
        _matmul.matmul(want.weight_co, dz[:, 3 * hidden :].mT, c_new, layer.dtype)
    if want.peephole is not None:
        di, df, _, do = dz.chunk(4, 1)
        want.peephole.copy_(torch.stack([(di * c_old).sum(0), (df * c_old).sum(0), (do * c_new).sum(0)]))


OPTIONS = {
    "ragged": (64, "lengths order reset reset_h reset_c dreset_h dreset_c"),
    "drawn": (64, "seed peephole dcells"),
    "rows": (32, "norm_weight norm_bias weight_co weight_hr dnew dnormed raw"),
}
AOT = [
    entry
    for dtype in AOT_DTYPES
    for backward in (False, True)
    for entry in (
        *(_recurrence_aot.entry("lstm", _cells.LSTM.value, backward, dtype, hidden) for hidden in (64, 128, 512)),
        *(_recurrence_aot.entry(f"lstm_{name}", _cells.LSTM.value, backward, dtype, *call) for name, call in OPTIONS.items()),
    )
] + [entry for dtype in AOT_DTYPES for entry in _matmul.entries(dtype)]
