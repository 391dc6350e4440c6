"""The spec of `lstm`. HP is the width of h (P in the docs), HPD that of one head; each is H, or HP, where it is not given."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import layer_norm as normed
from torch.nn.functional import linear

from memkernels.ops.lstm import lstm
from memkernels.testing.recurrent import (
    BIAS,
    LAYER_BENCH,
    LENGTHS,
    RESET,
    bounded,
    first_step,
    fused,
    layer_errors,
    learned,
    loop,
    ragged,
    recurrent,
    saturate,
    weight,
)
from memkernels.testing.spec import ErrorCase, Input, OpSpec, Sample, normal


def _scale(shape, dtype, generator):
    """Around 1."""
    return (1 + 0.3 * torch.randn(shape, dtype=torch.float64, generator=generator)).to(dtype)


def _seed(shape, dtype, generator):
    return torch.full(shape, 0x1234567_89ABCDEF)


def _mixed_bits(x):
    x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
    x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
    return x ^ (x >> 16)


def _events(seed, stream, t, p, like):
    """Which (row, unit) are zoned out or dropped at a step, number by number."""
    low, high, found = seed % 2**32, (seed >> 32) % 2**32, torch.zeros(like.shape, dtype=torch.bool)
    for b in range(like.shape[0]):
        row = _mixed_bits(_mixed_bits(low ^ (stream * 0x9E3779B9 % 2**32)) ^ high)
        row = _mixed_bits((_mixed_bits((row + t) % 2**32) + b * 0x85EBCA6B) % 2**32)
        for j in range(like.shape[1]):
            found[b, j] = _mixed_bits((row + (j + 1) * 0x9E3779B9) % 2**32) >> 8 < round(p * 2**24)
    return found.to(like.device)


def _zoned(p, old, new, seed, stream, t, training):
    if not p:
        return new
    return torch.where(_events(seed, stream, t, p, old), old, new) if training else p * old + (1 - p) * new


def _variant(weight_ih, weight_hh, bias_ih, bias_hh, o):
    """One step with options, formula by formula."""
    hidden, seed = weight_ih.shape[0] // 4, None if o["seed"] is None else int(o["seed"])
    norm, p, in_cell = o["layer_norm"], o["peephole"], o["output_gate"] == "cell"
    gamma, beta = ([None] * 3, [None] * 3) if norm is None else (n.split([4 * hidden, 4 * hidden, hidden]) for n in norm)

    def norm_of(x, k):
        n = x.shape[-1]
        return x if norm is None else normed(x, (n,), gamma[k][:n], beta[k][:n], 1e-5)

    def step(t, x, h, c):
        drop = o["recurrent_dropout"] if o["training"] else 0.0
        seen = h.masked_fill(_events(seed, 2, 0, drop, h), 0) / (1 - drop) if drop else h
        from_x = norm_of(linear(x, weight_ih[: 3 * hidden] if in_cell else weight_ih), 0)
        from_x = torch.cat([from_x, torch.zeros_like(c)], -1) if in_cell else from_x
        z = from_x + norm_of(recurrent(seen, weight_hh, 4, o["num_heads"]), 1)
        for bias in (bias_ih, bias_hh):
            z = z if bias is None else z + bias
        z_i, z_f, z_g, z_o = z.chunk(4, -1)
        if p is not None:
            z_i, z_f = z_i + p[0] * c, z_f + p[1] * c
        c_new = torch.sigmoid(z_f) * c + torch.sigmoid(z_i) * torch.tanh(z_g)
        z_o = z_o + linear(c_new, o["weight_co"]) if in_cell else z_o
        z_o = z_o if p is None else z_o + p[2] * c_new
        h_new = torch.sigmoid(z_o) * torch.tanh(norm_of(c_new, 2))
        h_new = h_new if o["weight_hr"] is None else linear(h_new, o["weight_hr"])
        return (
            _zoned(o["zoneout"][0], h, h_new, seed, 0, t, o["training"]),
            _zoned(o["zoneout"][1], c, c_new, seed, 1, t, o["training"]),
        )

    return step


_DEFAULTS: dict[str, Any] = dict(
    peephole=None, layer_norm=None, zoneout=(0.0, 0.0), recurrent_dropout=0.0, output_gate="standard", weight_co=None, weight_hr=None,
    num_heads=1, training=True, seed=None,
)  # fmt: skip


def _eager(
    input, state, weight_ih, weight_hh, bias_ih=None, bias_hh=None, reset=None, reset_state=None, lengths=None, reverse=False,
    recompute=False, return_cells=False, **options,
):  # fmt: skip
    options = {**_DEFAULTS, **options}
    variant = _variant(weight_ih, weight_hh, bias_ih, bias_hh, options)
    plain = all(options[k] is v or options[k] == v for k, v in _DEFAULTS.items() if k != "training")

    def step(t, x, h, c):
        return torch.lstm_cell(x, (h, c), weight_ih, weight_hh, bias_ih, bias_hh) if plain else variant(t, x, h, c)

    (output, cells), final = loop(step, input, tuple(state), reset, reset_state, lengths, reverse)
    return (output, tuple(final), cells) if return_cells else (output, tuple(final))


def _torch(input, state, *args, recompute=False, weight_hr=None, **kwargs):
    kwargs = {k: v for k, v in kwargs.items() if k not in _DEFAULTS or v != _DEFAULTS[k]}
    output, final = fused(torch.lstm, input, state, *args, **kwargs)
    return output, tuple(final)


_PAIRS = {"state": ("h0", "c0"), "reset_state": ("reset_h", "reset_c"), "layer_norm": ("norm_weight", "norm_bias")}


def _call(function, inputs, options):
    if inputs.get("seed") is None and ("zoneout" in options or "recurrent_dropout" in options):
        torch.manual_seed(0)  # every call draws the same seed
    rest = {k: v for k, v in inputs.items() if k not in ("input", *(name for pair in _PAIRS.values() for name in pair))}
    pairs = {name: tuple(inputs[k] for k in pair) for name, pair in _PAIRS.items() if inputs.get(pair[0]) is not None}
    return function(inputs["input"], pairs.pop("state"), **rest, **pairs, **options)


def _changed(values=None, **options):
    """A bad call: values of inputs from the others, options."""

    def edit(inputs, given):
        inputs.update(values(inputs) if values else {})
        given.update(options)

    return edit


_ERRORS = (
    ErrorCase(
        "reset_state",
        _changed(lambda i: dict(reset_h=i["h0"], reset_c=i["c0"])),
        ValueError,
        r"lstm: reset_state: expected None without reset",
    ),
    ErrorCase("zoneout", _changed(zoneout=(0.5, 1.5)), ValueError, r"lstm: zoneout: expected probabilities in 0\.\.1, got 1\.5"),
    ErrorCase("zoneout_pair", _changed(zoneout=0.5), TypeError, r"lstm: zoneout: expected a pair of probabilities, got 0\.5"),
    ErrorCase("dropout", _changed(recurrent_dropout=1.0), ValueError, r"lstm: recurrent_dropout: expected .*below 1, got 1\.0"),
    ErrorCase("output_gate", _changed(output_gate="new"), ValueError, r"lstm: output_gate: expected one of 'standard', 'cell', got 'new'"),
    ErrorCase(
        "no_weight_co", _changed(output_gate="cell"), ValueError, r"lstm: weight_co: expected a tensor with output_gate='cell', got None"
    ),
    ErrorCase(
        "weight_co",
        _changed(lambda i: dict(weight_co=i["weight_hh"][:4])),
        ValueError,
        r"lstm: weight_co: expected None with output_gate='standard', got a tensor",
    ),
    ErrorCase(
        "peephole",
        _changed(lambda i: dict(peephole=i["weight_hh"])),
        ValueError,
        r"lstm: peephole: expected \[3 H\] with .*got shape \(16, 4\)",
    ),
    ErrorCase(
        "layer_norm",
        _changed(lambda i: dict(norm_weight=i["bias_ih"], norm_bias=i["bias_ih"])),
        ValueError,
        r"lstm: layer_norm_gamma: expected \[9H\] with .*H=4.*got shape \(16,\)",
    ),
    ErrorCase(
        "weight_hr",
        _changed(lambda i: dict(weight_hr=i["weight_hh"][:2])),
        ValueError,
        r"lstm: h0: expected \[B P\] with .*P=2, got shape \(2, 4\)",
    ),
    ErrorCase(
        "seed", _changed(lambda i: dict(seed=i["c0"])), ValueError, r"lstm: seed: expected 1 dimensions \[1\], got 2 with shape \(2, 4\)"
    ),
)

_RESETS = ("reset", "reset_h", "reset_c")
_NORM = ("norm_weight", "norm_bias")
_DRAWN = dict(zoneout=(0.3, 0.4), recurrent_dropout=0.25)
_ALL = (*BIAS, "reset", "lengths")
_EVERY = (*BIAS, *_RESETS, *_NORM, "weight_hr", "peephole", "weight_co", "lengths", "seed")
_EVERYTHING = dict(output_gate="cell", num_heads=2, reverse=True, return_cells=True, **_DRAWN)


def _ragged_rows(tensors):
    return {**ragged(tensors), **first_step(*_RESETS[1:])(tensors)}


_OPTIONS = (
    Sample("reset_state", dict(T=4, B=3, I=2, H=3), present=(*BIAS, *_RESETS)),
    Sample("reset_rows", dict(T=4, B=3, I=2, H=3), dict(reverse=True), (*BIAS, *_RESETS, "lengths"), _ragged_rows),
    Sample("reset_learned", dict(T=4, B=3, I=2, H=3), present=(*BIAS, *_RESETS), twist=learned(*_RESETS[1:])),
    Sample("peephole", dict(T=3, B=2, I=3, H=4), dict(return_cells=True), (*BIAS, "peephole")),
    Sample("layer_norm", dict(T=3, B=2, I=2, H=4), present=(*BIAS, *_NORM)),
    # Equal inputs would make its rows constant, where a norm is ill-conditioned.
    Sample("layer_norm_all", dict(T=4, B=5, I=3, H=4), dict(reverse=True), (*_ALL, *_NORM), ragged, hard=True),
    Sample("output_gate", dict(T=3, B=2, I=3, H=4), dict(output_gate="cell"), (*BIAS, "weight_co")),
    Sample("output_gate_norm", dict(T=3, B=2, I=2, H=3), dict(output_gate="cell"), (*_NORM, "weight_co", "peephole", "reset")),
    Sample("projection", dict(T=3, B=2, I=3, H=4, HP=2), present=(*BIAS, "weight_hr")),
    Sample("wider_projection", dict(T=3, B=2, I=3, H=2, HP=4, HPD=2), dict(num_heads=2), (*BIAS, "weight_hr", "reset")),
    Sample("zoneout", dict(T=4, B=3, I=2, H=4), dict(zoneout=(0.4, 0.3), return_cells=True), (*BIAS, "seed")),
    Sample("zoneout_ends", dict(T=4, B=3, I=2, H=4), dict(zoneout=(0.0, 1.0)), (*_ALL, "seed"), ragged),
    Sample("expected", dict(T=4, B=3, I=2, H=4), dict(training=False, **_DRAWN), (*BIAS, "reset")),
    Sample("dropout", dict(T=4, B=3, I=2, H=5), dict(recurrent_dropout=0.5), (*BIAS, "seed", "reset")),
    Sample("heads", dict(T=3, B=2, I=3, H=6, HPD=2), dict(num_heads=3), BIAS),
    Sample("recompute", dict(T=4, B=3, I=3, H=4), dict(recompute=True), (*BIAS, "reset")),
    Sample("recompute_cells", dict(T=4, B=5, I=2, H=3), dict(recompute=True, return_cells=True, reverse=True), _ALL, ragged),
    Sample("recompute_all", dict(T=3, B=4, I=2, H=4, HP=2, HPD=1), dict(recompute=True, **_EVERYTHING), _EVERY, ragged),
    Sample("every_odd", dict(T=5, B=17, I=19, H=36, HP=24, HPD=12), _EVERYTHING, _EVERY, ragged),
    Sample("most_odd", dict(T=5, B=17, I=19, H=37), dict(recompute=True, **_DRAWN), (*_ALL, "peephole", *_NORM, "seed"), ragged),
    Sample("heads_wide", dict(T=4, B=9, I=33, H=132, HPD=44), dict(num_heads=3), (*_ALL, *_RESETS[1:], "peephole"), ragged),
    Sample("norm_no_steps", dict(T=0, B=2, I=3, H=4, HP=2), dict(return_cells=True), (*BIAS, *_RESETS, *_NORM, "weight_hr", "peephole")),
    Sample("norm_no_batch", dict(T=3, B=0, I=3, H=4, HP=2), dict(zoneout=(0.5, 0.5)), (*BIAS, *_RESETS, *_NORM, "weight_hr", "seed")),
)  # fmt: skip


SPEC = OpSpec(
    name="lstm",
    function=lstm,
    inputs={
        "input": Input("T B I"),
        "h0": Input("B HP", bounded),
        "c0": Input("B H", normal),
        "weight_ih": Input("4H I", weight),
        "weight_hh": Input("4H HPD", weight),
        "bias_ih": Input("4H", bounded, optional=True),
        "bias_hh": Input("4H", bounded, optional=True),
        "weight_hr": Input("HP H", weight, optional=True),
        "peephole": Input("3 H", bounded, optional=True),
        "norm_weight": Input("9H", _scale, optional=True),
        "norm_bias": Input("9H", bounded, optional=True),
        "weight_co": Input("H H", weight, optional=True),
        "reset": RESET,
        "reset_h": Input("T B HP", bounded, optional=True),
        "reset_c": Input("T B H", normal, optional=True),
        "lengths": LENGTHS,
        "seed": Input("1", _seed, torch.int64, optional=True),
    },
    samples=(
        Sample("typical", dict(T=3, B=2, I=3, H=4), present=BIAS),
        Sample("everything", dict(T=3, B=2, I=2, H=2, HP=2, HPD=1), _EVERYTHING, _EVERY, ragged),
        Sample("no_bias", dict(T=2, B=3, I=2, H=3)),
        Sample("one", dict(T=1, B=1, I=1, H=1), dict(return_cells=True), present=BIAS),
        Sample("one_bias", dict(T=3, B=3, I=3, H=4), present=("bias_hh",)),
        Sample("reset", dict(T=4, B=3, I=3, H=4), dict(return_cells=True), present=(*BIAS, "reset")),
        Sample("lengths", dict(T=3, B=7, I=3, H=4), dict(return_cells=True), present=(*BIAS, "lengths"), twist=ragged),
        Sample("reverse", dict(T=3, B=4, I=3, H=5), dict(reverse=True), present=BIAS),
        Sample("reverse_all", dict(T=3, B=7, I=3, H=4), dict(reverse=True, return_cells=True), present=_ALL, twist=ragged),
        Sample("odd", dict(T=5, B=17, I=19, H=37), present=_ALL, twist=ragged),
        Sample("wide", dict(T=9, B=5, I=70, H=130), dict(reverse=True), present=BIAS),
        *_OPTIONS,
        Sample("saturated", dict(T=3, B=2, I=3, H=5), present=BIAS, twist=saturate, hard=True),
        Sample("no_steps", dict(T=0, B=2, I=3, H=4), dict(return_cells=True), present=BIAS),
        Sample("no_batch", dict(T=3, B=0, I=3, H=4), present=BIAS),
        Sample("no_input", dict(T=3, B=2, I=0, H=4), present=BIAS),
        Sample("no_hidden", dict(T=3, B=2, I=3, H=0), present=BIAS),
    ),
    bench=(
        *LAYER_BENCH,
        Sample("T128_B32_H512", dict(T=128, B=32, I=512, H=512), present=BIAS),
        Sample("T512_B1_H256", dict(T=512, B=1, I=256, H=256), present=BIAS),
        Sample("T100_B1_H512", dict(T=100, B=1, I=512, H=512), present=BIAS),
        Sample("T512_B8_H128_layer_norm", dict(T=512, B=8, I=128, H=128), present=(*BIAS, *_NORM)),
        Sample("T128_B16_H256_recompute", dict(T=128, B=16, I=256, H=256), dict(recompute=True), BIAS),
    ),
    peers={"eager": _eager, "torch": _torch},
    bytes=lambda d, s: s * (d["T"] * d["B"] * (d["I"] + d["H"]) + 4 * d["H"] * (d["I"] + d["H"])),
    bytes_backward=lambda d, s: s * (d["T"] * d["B"] * (2 * d["I"] + 7 * d["H"]) + 8 * d["H"] * (d["I"] + d["H"])),
    call=_call,
    errors=(*layer_errors("lstm", 4), *_ERRORS),
    rows=(("input", 1), ("h0", 0), ("c0", 0)),
    gaps=("On a GPU, lengths outside 0..T are clamped instead of refused.",),
)
