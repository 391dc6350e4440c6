"""What the ops are measured against: the specs' own peers, torch.compile of eager, and torch's fused modules."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from memkernels.testing.spec import OpSpec, Sample


def peer_function(spec: OpSpec, name: str, sample: Sample) -> Callable[..., Any] | None:
    """The peer's function, called like the op; None where the op has no such peer."""
    if name == "compile":
        eager = spec.peers.get("eager")
        if eager is None:
            return None
        torch.compiler.reset()
        return torch.compile(eager, dynamic=False)
    if name in spec.peers:
        return spec.peers[name]
    maker = NAMED.get((spec.name, name))
    return None if maker is None else maker(sample)


def _sdpa(sample: Sample) -> Callable[..., Any]:
    """torch.nn.functional.scaled_dot_product_attention on the arguments it shares with the op."""
    shared = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

    def call(query, key, value, **options):
        return F.scaled_dot_product_attention(query, key, value, **{k: v for k, v in options.items() if k in shared})

    return call


def _nn_lstm(sample: Sample) -> Callable[..., Any]:
    """torch.nn.LSTM's kernel, called as torch.nn.LSTM calls it, on the caller's own weights."""

    def call(input, *arguments, **named):
        flat = lstm_arguments(input, *arguments, **named)
        weights = [w for w in (flat["weight_ih"], flat["weight_hh"], flat["bias_ih"], flat["bias_hh"]) if w is not None]
        state = tuple(s.unsqueeze(0) for s in (flat["h0"], flat["c0"]))
        found = torch.lstm(input, state, weights, len(weights) == 4, 1, 0.0, torch.is_grad_enabled(), False, False)
        return found[0], (found[1][0], found[2][0])

    return call


def lstm_arguments(input, state=None, weight_ih=None, weight_hh=None, bias_ih=None, bias_hh=None, **rest):
    """The arguments of mk.lstm by name, the state filled in."""
    hidden = weight_hh.shape[1]
    h0, c0 = state if state is not None else (input.new_zeros(input.shape[1], hidden),) * 2
    return dict(h0=h0, c0=c0, weight_ih=weight_ih, weight_hh=weight_hh, bias_ih=bias_ih, bias_hh=bias_hh, **rest)


def _lstm_cell_loop(sample: Sample) -> Callable[..., Any]:
    """The loop over torch's LSTM cell that reinforcement-learning code writes to reset the state inside a sequence."""

    def call(input, *arguments, reset=None, **named):
        flat = lstm_arguments(input, *arguments, **named)
        h, c = flat["h0"], flat["c0"]
        found = []
        for t in range(input.shape[0]):
            if reset is not None:
                keep = (~reset[t]).to(input.dtype).unsqueeze(-1)
                h, c = h * keep, c * keep
            h, c = torch.lstm_cell(input[t], (h, c), flat["weight_ih"], flat["weight_hh"], flat["bias_ih"], flat["bias_hh"])
            found.append(h)
        return torch.stack(found), (h, c)

    return call


def _without_reset(sample: Sample) -> Callable[..., Any]:
    """mk.lstm itself without the reset mask: what the resets cost."""
    import memkernels

    def call(input, *arguments, reset=None, **named):
        return memkernels.lstm(input, *arguments, **named)

    return partial(call)


NAMED: dict[tuple[str, str], Callable[[Sample], Callable[..., Any]]] = {
    ("attention", "sdpa"): _sdpa,
    ("lstm", "torch.nn.LSTM"): _nn_lstm,
    ("lstm", "LSTMCell loop"): _lstm_cell_loop,
    ("lstm", "without resets"): _without_reset,
}
