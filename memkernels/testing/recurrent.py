"""What the specs of the recurrent ops share: how inputs are drawn, a plain loop over time, the peers of torch, bad calls."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from memkernels.testing.spec import ErrorCase, Input, Sample, Tensors, mostly

BIAS = ("bias_ih", "bias_hh")


def weight(shape, dtype, generator):
    """Uniform in +-sqrt(1 / last dimension), the scale of torch.nn.LSTM: larger weights make a long recurrence chaotic."""
    values = torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1
    return (values / max(shape[-1], 1) ** 0.5).to(dtype)


def bounded(shape, dtype, generator):
    """Uniform in -1..1."""
    return (torch.rand(shape, dtype=torch.float64, generator=generator) * 2 - 1).to(dtype)


def _lengths(shape, dtype, generator):
    """Row b is b steps long; a twist then brings T in."""
    return torch.arange(shape[0])


RESET = Input("T B", mostly(0.3), torch.bool, optional=True)
LENGTHS = Input("B", _lengths, torch.int64, optional=True)


def layer_inputs(gates: int) -> dict[str, Input]:
    """The inputs of a layer with one state; HD is the width of a head, H where it is not given."""
    rows = "H" if gates == 1 else f"{gates}H"
    return {
        "input": Input("T B I"),
        "h0": Input("B H", bounded),
        "weight_ih": Input(f"{rows} I", weight),
        "weight_hh": Input(f"{rows} HD", weight),
        "bias_ih": Input(rows, bounded, optional=True),
        "bias_hh": Input(rows, bounded, optional=True),
        "reset": RESET,
        "reset_state": Input("T B H", bounded, optional=True),
        "lengths": LENGTHS,
    }


def ragged(tensors: Tensors) -> Tensors:
    """Lengths from T down to 0, then up again: full, empty and partial rows."""
    steps, batch = tensors["input"].shape[:2]  # type: ignore[union-attr]
    return {"lengths": torch.tensor([abs(steps - b % (2 * steps + 1)) for b in range(batch)], dtype=torch.int64)}


def spread(tensors: Tensors) -> Tensors:
    """Lengths spread evenly over 10..T, the first row full: what a batch of sentences or episodes looks like."""
    steps, batch = tensors["input"].shape[:2]  # type: ignore[union-attr]
    return {"lengths": torch.linspace(steps, min(10, steps), batch).long()}


def saturate(tensors: Tensors) -> Tensors:
    return {"input": tensors["input"].mul(60)}  # type: ignore[union-attr]


def first_step(*names: str) -> Callable[[Tensors], Tensors]:
    """States to reset to that are the same at every step, "B H"."""
    return lambda tensors: {name: tensors[name][0] for name in names}  # type: ignore[index]


def learned(*names: str) -> Callable[[Tensors], Tensors]:
    """States to reset to that are the same at every step and in every row, "H"."""
    return lambda tensors: {name: tensors[name][0, 0] for name in names}  # type: ignore[index]


def loop(step, input, states, reset=None, reset_states=None, lengths=None, reverse=False):
    """step(t, x, *states) -> states, over time: ([states of all steps, "T B ..."], states at the end)."""
    kept: list[Any] = [None] * len(input)
    for t in reversed(range(len(input))) if reverse else range(len(input)):
        old = states
        if reset is not None:
            starts = (reset[t] if lengths is None else reset[t] & (t < lengths))[:, None]
            resets = [torch.zeros_like(s) for s in states]
            for k, r in enumerate(reset_states or ()):
                resets[k] = r[t] if r.dim() == 3 else r
            states = [torch.where(starts, r, s) for r, s in zip(resets, states)]
        states = step(t, input[t], *states)
        kept[t] = states
        if lengths is not None:
            on = (t < lengths)[:, None]
            kept[t] = [torch.where(on, s, 0) for s in states]
            states = [torch.where(on, s, o) for s, o in zip(states, old)]
    stacked = [torch.stack(column) for column in zip(*kept)]
    return stacked or [s.new_zeros(0, *s.shape) for s in states], states


def recurrent(h, weight_hh, gates, num_heads=1):
    """h' @ weight_hh.T, head by head."""
    if num_heads == 1:
        return h @ weight_hh.mT
    heads = weight_hh.reshape(gates, num_heads, -1, weight_hh.shape[1])
    return torch.einsum("bnd,gnud->bgnu", h.reshape(len(h), num_heads, -1), heads).flatten(1)


def fused(function, input, states, weight_ih, weight_hh, bias_ih=None, bias_hh=None, lengths=None, reverse=False, **others):
    """What torch.nn.LSTM, GRU and RNN call; a ragged batch as PackedSequence. Returns (output, final states)."""
    if reverse or any(v not in (None, 1, False, 0.0) for v in others.values() if not isinstance(v, torch.Tensor)):
        raise NotImplementedError("torch has no such option")
    if any(isinstance(v, torch.Tensor) for v in others.values()):
        raise NotImplementedError("torch has no such input")
    weights = [w for w in (weight_ih, weight_hh, bias_ih, bias_hh) if w is not None]
    tail = (weights, bias_ih is not None, 1, 0.0, torch.is_grad_enabled(), False)
    if lengths is None:
        states = [s[None] for s in states]
        output, *final = function(input, states if len(states) > 1 else states[0], *tail, False)
        return output, [s[0] for s in final]
    packed = torch.nn.utils.rnn.pack_padded_sequence(input, lengths.cpu(), enforce_sorted=False)
    states = [s.index_select(0, packed.sorted_indices)[None] for s in states]
    data, *final = function(packed.data, packed.batch_sizes, states if len(states) > 1 else states[0], *tail)
    output = torch.nn.utils.rnn.pad_packed_sequence(packed._replace(data=data), total_length=len(input))[0]
    return output, [s[0].index_select(0, packed.unsorted_indices) for s in final]


def _changed(name: str, change: Callable[[Any], Any]) -> Callable[..., None]:
    def edit(inputs: dict[str, Any], options: dict[str, Any]) -> None:
        inputs[name] = change(inputs)

    return edit


def _option(name: str, value: Any) -> Callable[..., None]:
    return lambda inputs, options: options.update({name: value})


def layer_errors(op: str, gates: int) -> tuple[ErrorCase, ...]:
    """Bad calls of any layer, edited from its first sample: T=3, B=2, I=3, H=4."""
    rows, width = "H" if gates == 1 else f"{gates}H", 4 * gates
    shape = rf"got shape \({width}, 2\)"
    return (
        ErrorCase(
            "weight",
            _changed("weight_ih", lambda i: i["weight_ih"][:, :-1]),
            ValueError,
            rf"{op}: weight_ih: expected \[{rows} I\] with .*I=3.*{shape}",
        ),
        ErrorCase(
            "state", _changed("h0", lambda i: i["h0"][:-1]), ValueError, rf"{op}: h0: expected \[B H\] with .*B=2.*got shape \(1, 4\)"
        ),
        ErrorCase(
            "dtype", _changed("weight_hh", lambda i: i["weight_hh"].long()), TypeError, rf"{op}: weight_hh: expected float64, got int64"
        ),
        ErrorCase(
            "reset", _changed("reset", lambda i: torch.zeros(3, 2, dtype=torch.int64)), TypeError, rf"{op}: reset: expected bool, got int64"
        ),
        ErrorCase(
            "lengths",
            _changed("lengths", lambda i: torch.tensor([4, 4])),
            ValueError,
            rf"{op}: lengths: expected values in 0\.\.T=3, got 4\.\.4",
        ),
        ErrorCase("heads", _option("num_heads", 3), ValueError, rf"{op}: num_heads: expected a divisor of H=4, got 3"),
        ErrorCase("heads_type", _option("num_heads", 2.0), TypeError, rf"{op}: num_heads: expected an int, got 2.0"),
        ErrorCase("width_of_heads", _option("num_heads", 2), ValueError, rf"{op}: weight_hh: expected \[{rows} H/2\] with H=4, got shape"),
        ErrorCase("flag", _option("reverse", 1), TypeError, rf"{op}: reverse: expected True or False, got 1"),
    )


def state_errors(op: str) -> tuple[ErrorCase, ...]:
    """Bad states to reset to, of a layer with one state."""

    def with_reset(value: Any) -> Callable[..., None]:
        return lambda inputs, options: inputs.update(reset=torch.ones(3, 2, dtype=torch.bool), reset_state=value)

    return (
        ErrorCase(
            "reset_state", _changed("reset_state", lambda i: i["h0"]), ValueError, rf"{op}: reset_state: expected None without reset"
        ),
        ErrorCase(
            "reset_shape", with_reset(torch.zeros(3)), ValueError, rf"{op}: reset_state: expected \[H\], \[B H\] or .*got shape \(3,\)"
        ),
        ErrorCase("reset_dtype", with_reset(torch.zeros(4)), TypeError, rf"{op}: reset_state: expected float64, got float32"),
    )


LAYER_SAMPLES = (
    Sample("typical", dict(T=3, B=2, I=3, H=4), present=BIAS),
    Sample(
        "everything", dict(T=3, B=3, I=2, H=4, HD=2), dict(reverse=True, num_heads=2), (*BIAS, "reset", "reset_state", "lengths"), ragged
    ),
    Sample("no_bias", dict(T=2, B=3, I=2, H=3)),
    Sample("one", dict(T=1, B=1, I=1, H=1), present=BIAS),
    Sample("one_bias", dict(T=3, B=3, I=3, H=4), present=("bias_hh",)),
    Sample("reset", dict(T=4, B=3, I=3, H=4), present=(*BIAS, "reset")),
    Sample("reset_state", dict(T=4, B=3, I=3, H=4), present=(*BIAS, "reset", "reset_state")),
    Sample("reset_rows", dict(T=4, B=3, I=3, H=4), present=(*BIAS, "reset", "reset_state"), twist=first_step("reset_state")),
    Sample("reset_learned", dict(T=4, B=3, I=3, H=4), present=(*BIAS, "reset", "reset_state"), twist=learned("reset_state")),
    Sample("lengths", dict(T=3, B=7, I=3, H=4), present=(*BIAS, "lengths"), twist=ragged),
    Sample("reverse", dict(T=3, B=4, I=3, H=5), dict(reverse=True), present=BIAS),
    Sample("reverse_ragged", dict(T=3, B=7, I=3, H=4), dict(reverse=True), (*BIAS, "reset", "lengths"), ragged),
    Sample("heads", dict(T=3, B=2, I=3, H=6, HD=2), dict(num_heads=3), present=BIAS),
    Sample("heads_odd", dict(T=5, B=17, I=19, H=36, HD=9), dict(num_heads=4), (*BIAS, "reset", "lengths"), ragged),
    Sample("odd", dict(T=5, B=17, I=19, H=37), present=(*BIAS, "reset", "reset_state", "lengths"), twist=ragged),
    Sample("wide", dict(T=9, B=5, I=70, H=130), dict(reverse=True), present=BIAS),
    Sample("saturated", dict(T=3, B=2, I=3, H=5), present=BIAS, twist=saturate, hard=True),
    Sample("no_steps", dict(T=0, B=2, I=3, H=4), present=(*BIAS, "reset", "reset_state")),
    Sample("no_batch", dict(T=3, B=0, I=3, H=4), present=BIAS),
    Sample("no_input", dict(T=3, B=2, I=0, H=4), present=BIAS),
    Sample("no_hidden", dict(T=3, B=2, I=3, H=0), present=BIAS),
)
LAYER_BENCH = (
    Sample("T128_B16_H256", dict(T=128, B=16, I=256, H=256), present=BIAS),
    Sample("T128_B16_H512", dict(T=128, B=16, I=512, H=512), present=BIAS),
    Sample("T128_B64_H512", dict(T=128, B=64, I=512, H=512), present=BIAS),
    Sample("T512_B16_H256_ragged", dict(T=512, B=16, I=256, H=256), present=(*BIAS, "lengths"), twist=spread),
    Sample("T2000_B8_H128_ragged", dict(T=2000, B=8, I=128, H=128), present=(*BIAS, "lengths"), twist=spread),
    Sample("T512_B8_H128_reset", dict(T=512, B=8, I=128, H=128), present=(*BIAS, "reset")),
)
