"""The spec of `lstm`."""

from __future__ import annotations

from typing import Any

import torch

from memkernels.ops.lstm import lstm
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, mostly


def _weight(shape, dtype, generator):
    """Uniform in +-sqrt(1 / last dimension), the scale of torch.nn.LSTM: larger weights make a long recurrence chaotic."""
    values = torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1
    return (values / max(shape[-1], 1) ** 0.5).to(dtype)


def _cell(shape, dtype, generator):
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def _hidden(shape, dtype, generator):
    return (torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1).to(dtype)


def _lengths(shape, dtype, generator):
    """Row b is b steps long; `_ragged` then brings T in."""
    return torch.arange(shape[0])


def _ragged(tensors):
    """Lengths from T down to 0, then up again: full, empty and partial rows."""
    steps, batch = tensors["input"].shape[:2]
    return {"lengths": torch.tensor([abs(steps - b % (2 * steps + 1)) for b in range(batch)], device=tensors["input"].device)}


def _saturate(tensors):
    return {"input": tensors["input"] * 60}


def _eager(input, state, weight_ih, weight_hh, bias_ih=None, bias_hh=None, reset=None, lengths=None, reverse=False, return_cells=False):
    h, c = state
    out: list[Any] = [None] * len(input)
    cells: list[Any] = [None] * len(input)
    for t in reversed(range(len(input))) if reverse else range(len(input)):
        if reset is not None:
            starts = reset[t] if lengths is None else reset[t] & (t < lengths)
            h, c = (torch.where(starts[:, None], torch.zeros_like(v), v) for v in (h, c))
        h_new, c_new = torch.lstm_cell(input[t], (h, c), weight_ih, weight_hh, bias_ih, bias_hh)
        if lengths is None:
            h, c, out[t], cells[t] = h_new, c_new, h_new, c_new
        else:
            on = (t < lengths)[:, None]
            h, c = torch.where(on, h_new, h), torch.where(on, c_new, c)
            out[t], cells[t] = torch.where(on, h_new, 0), torch.where(on, c_new, 0)
    empty = input.new_zeros(0, *h.shape)
    result = (torch.stack(out) if out else empty, (h, c))
    return (*result, torch.stack(cells) if cells else empty) if return_cells else result


def _torch(input, state, weight_ih, weight_hh, bias_ih=None, bias_hh=None, **options):
    """What torch.nn.LSTM calls; for the bench sizes, which have neither resets nor lengths."""
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    output, h_n, c_n = torch.lstm(
        input, [s[None] for s in state], weights, bias_ih is not None, 1, 0.0, torch.is_grad_enabled(), False, False
    )
    return output, (h_n[0], c_n[0])


def _call(function, inputs, options):
    rest = {k: v for k, v in inputs.items() if k not in ("input", "h0", "c0")}
    return function(inputs["input"], (inputs["h0"], inputs["c0"]), **rest, **options)


def _wrong_weight(inputs, options):
    inputs["weight_ih"] = inputs["weight_ih"][:, :-1]


def _wrong_state(inputs, options):
    inputs["h0"] = inputs["h0"][:-1]


def _wrong_dtype(inputs, options):
    inputs["weight_hh"] = inputs["weight_hh"].long()


def _wrong_reset(inputs, options):
    inputs["reset"] = torch.zeros(inputs["input"].shape[:2], dtype=torch.int64)


def _wrong_lengths(inputs, options):
    inputs["lengths"] = torch.full((inputs["input"].shape[1],), inputs["input"].shape[0] + 1)


_BIAS = ("bias_ih", "bias_hh")
_ALL = (*_BIAS, "reset", "lengths")


def _flops(d):
    return 8 * d["T"] * d["B"] * d["H"] * (d["I"] + d["H"])


SPEC = OpSpec(
    name="lstm",
    function=lstm,
    inputs={
        "input": Input("T B I"),
        "h0": Input("B H", _hidden),
        "c0": Input("B H", _cell),
        "weight_ih": Input("4H I", _weight),
        "weight_hh": Input("4H H", _weight),
        "bias_ih": Input("4H", _hidden, optional=True),
        "bias_hh": Input("4H", _hidden, optional=True),
        "reset": Input("T B", mostly(0.3), torch.bool, optional=True),
        "lengths": Input("B", _lengths, torch.int64, optional=True),
    },
    samples=(
        Sample("typical", dict(T=3, B=2, I=3, H=4), present=_BIAS),
        Sample("no_bias", dict(T=2, B=3, I=2, H=3)),
        Sample("one", dict(T=1, B=1, I=1, H=1), dict(return_cells=True), present=_BIAS),
        Sample("one_bias", dict(T=3, B=3, I=3, H=4), present=("bias_hh",)),
        Sample("reset", dict(T=4, B=3, I=3, H=4), dict(return_cells=True), present=(*_BIAS, "reset")),
        Sample("lengths", dict(T=3, B=7, I=3, H=4), dict(return_cells=True), present=(*_BIAS, "lengths"), twist=_ragged),
        Sample("reverse", dict(T=3, B=4, I=3, H=5), dict(reverse=True), present=_BIAS),
        Sample("reverse_all", dict(T=3, B=7, I=3, H=4), dict(reverse=True, return_cells=True), present=_ALL, twist=_ragged),
        Sample("odd", dict(T=5, B=17, I=19, H=37), present=_ALL, twist=_ragged),
        Sample("wide", dict(T=9, B=5, I=70, H=130), dict(reverse=True), present=_BIAS),
        Sample("saturated", dict(T=3, B=2, I=3, H=5), present=_BIAS, twist=_saturate, hard=True),
        Sample("no_steps", dict(T=0, B=2, I=3, H=4), dict(return_cells=True), present=_BIAS),
        Sample("no_batch", dict(T=3, B=0, I=3, H=4), present=_BIAS),
        Sample("no_input", dict(T=3, B=2, I=0, H=4), present=_BIAS),
        Sample("no_hidden", dict(T=3, B=2, I=3, H=0), present=_BIAS),
    ),
    bench=(
        Sample("T128_B16_H256", dict(T=128, B=16, I=256, H=256), present=_BIAS),
        Sample("T128_B32_H512", dict(T=128, B=32, I=512, H=512), present=_BIAS),
        Sample("T512_B1_H256", dict(T=512, B=1, I=256, H=256), present=_BIAS),
    ),
    peers={"eager": _eager, "torch": _torch},
    bytes=lambda d, s: s * (d["T"] * d["B"] * (d["I"] + d["H"]) + 4 * d["H"] * (d["I"] + d["H"])),
    bytes_backward=lambda d, s: s * (d["T"] * d["B"] * (2 * d["I"] + 7 * d["H"]) + 8 * d["H"] * (d["I"] + d["H"])),
    flops=_flops,
    call=_call,
    errors=(
        ErrorCase("weight", _wrong_weight, ValueError, r"lstm: weight_ih: expected \[4H I\] with .*I=3.*got shape \(16, 2\)"),
        ErrorCase("state", _wrong_state, ValueError, r"lstm: h0: expected \[B H\] with .*B=2.*got shape \(1, 4\)"),
        ErrorCase("dtype", _wrong_dtype, TypeError, r"lstm: weight_hh: expected float64, got int64"),
        ErrorCase("reset", _wrong_reset, TypeError, r"lstm: reset: expected bool, got int64"),
        ErrorCase("lengths", _wrong_lengths, ValueError, r"lstm: lengths: expected values in 0\.\.T=3, got 4\.\.4"),
    ),
    rows=(("input", 1), ("h0", 0), ("c0", 0)),
    gaps=("On a GPU, lengths outside 0..T are clamped instead of refused.",),
)
