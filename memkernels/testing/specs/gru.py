"""The spec of `gru`."""

from __future__ import annotations

import torch
from torch.nn.functional import linear

from memkernels.ops.gru import gru
from memkernels.testing.recurrent import BIAS, LAYER_BENCH, LAYER_SAMPLES, fused, layer_errors, layer_inputs, loop, recurrent, state_errors
from memkernels.testing.spec import OpSpec, Sample


def _eager(
    input, h0, weight_ih, weight_hh, bias_ih=None, bias_hh=None, reset=None, reset_state=None, num_heads=1, recompute=False, **others
):
    def step(t, x, h):
        if num_heads == 1:
            return (torch.gru_cell(x, h, weight_ih, weight_hh, bias_ih, bias_hh),)
        xr, xz, xn = linear(x, weight_ih, bias_ih).chunk(3, -1)
        z_h = recurrent(h, weight_hh, 3, num_heads)
        hr, hz, hn = (z_h if bias_hh is None else z_h + bias_hh).chunk(3, -1)
        r, z = torch.sigmoid(xr + hr), torch.sigmoid(xz + hz)
        return ((1 - z) * torch.tanh(xn + r * hn) + z * h,)

    (output,), (h_n,) = loop(step, input, (h0,), reset, None if reset_state is None else (reset_state,), **others)
    return output, h_n


def _torch(input, h0, *args, recompute=False, **kwargs):
    output, (h_n,) = fused(torch.gru, input, (h0,), *args, **kwargs)
    return output, h_n


def _call(function, inputs, options):
    return function(inputs["input"], inputs["h0"], **{k: v for k, v in inputs.items() if k not in ("input", "h0")}, **options)


def _recomputed(name, dims, present=BIAS, **options):
    return Sample(name, dims, dict(recompute=True, **options), present)


SPEC = OpSpec(
    name="gru",
    function=gru,
    inputs=layer_inputs(3),
    samples=(
        *LAYER_SAMPLES,
        _recomputed("recompute", dict(T=4, B=3, I=3, H=4), (*BIAS, "reset")),
        _recomputed("recompute_heads", dict(T=3, B=2, I=2, H=4, HD=2), (*BIAS, "reset", "reset_state"), num_heads=2, reverse=True),
    ),
    bench=LAYER_BENCH,
    peers={"eager": _eager, "torch": _torch},
    bytes=lambda d, s: s * (d["T"] * d["B"] * (d["I"] + d["H"]) + 3 * d["H"] * (d["I"] + d["H"])),
    bytes_backward=lambda d, s: s * (d["T"] * d["B"] * (2 * d["I"] + 6 * d["H"]) + 6 * d["H"] * (d["I"] + d["H"])),
    call=_call,
    errors=(*layer_errors("gru", 3), *state_errors("gru")),
    rows=(("input", 1), ("h0", 0)),
    gaps=("On a GPU, lengths outside 0..T are clamped instead of refused.",),
)
