"""What the ops are measured against: the specs' own peers, torch.compile of eager, the op itself without one of its inputs or options."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from memkernels.testing.spec import OpSpec, specs

Invoke = Callable[[dict[str, Any], dict[str, Any]], Any]  # (inputs, options) -> outputs

# Eager is a loop over time steps or sequences there: torch.compile unrolls it and takes minutes.
NOT_COMPILED = ("attention_varlen", "dnc_sequence", "gru", "lstm", "ntm_sequence", "rnn")


def invoke(spec: OpSpec) -> Invoke:
    """The op itself."""
    return partial(spec.call, spec.function)


def check_peers(names: Iterable[str]) -> None:
    """Raises ValueError for a name that no op has a peer of; one that only some have is left out for the others."""
    known = {"compile", *(name for spec in specs().values() for name in spec.peers)}
    for name in names:
        if name not in known and not name.startswith(("without ", "sdpa:")):
            raise ValueError(f'bench: peers: expected {", ".join(sorted(known))}, "without INPUT" or "sdpa:BACKEND", got {name!r}')


def peer(spec: OpSpec, name: str) -> Invoke | None:
    """A peer by name; None where the op has no such peer.

    Args:
        spec: the op.
        name: "compile" (torch.compile of eager), "without <name>" (the op with that input or option left out), a name in spec.peers, or
            "sdpa:<backend>" for one of torch's own attention backends ("sdpa:FLASH_ATTENTION").
    """
    if name.startswith("without "):
        left_out = name.removeprefix("without ")
        if left_out not in spec.inputs:
            return lambda inputs, options: spec.call(spec.function, inputs, {k: v for k, v in options.items() if k != left_out})
        return lambda inputs, options: spec.call(spec.function, {**inputs, left_out: None}, options)
    if name.startswith("sdpa:") and "sdpa" in spec.peers:
        return _one_sdpa(spec, name.removeprefix("sdpa:"))
    if name != "compile":
        return partial(spec.call, spec.peers[name]) if name in spec.peers else None
    if spec.name in NOT_COMPILED or "eager" not in spec.peers:
        return None
    torch.compiler.reset()
    eager = spec.peers["eager"]

    def call(inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        return spec.call(eager, inputs, options)

    return torch.compile(call, dynamic=False)


def _one_sdpa(spec: OpSpec, backend: str) -> Invoke:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(inputs: dict[str, Any], options: dict[str, Any]) -> Any:
        with sdpa_kernel(getattr(SDPBackend, backend)):
            return spec.call(spec.peers["sdpa"], inputs, options)

    return call
