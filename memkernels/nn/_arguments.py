"""Checks of constructor arguments that torch.nn's own constructors leave to chance."""

from __future__ import annotations

from collections.abc import Container
from numbers import Integral, Real
from typing import Any

import torch

from memkernels._checks import check_dense, check_floating, check_tensor, fail


def check_integers(owner: str, **arguments: Any) -> None:
    """Integers, and not True or False."""
    for name, got in arguments.items():
        if isinstance(got, bool) or not isinstance(got, Integral):
            fail(owner, name, "an integer", repr(got), TypeError)


def check_sizes(owner: str, least: int = 1, **arguments: Any) -> None:
    """Integers of at least `least`."""
    check_integers(owner, **arguments)
    for name, got in arguments.items():
        if got < least:
            fail(owner, name, "a positive integer" if least == 1 else f"at least {least}", got)


def check_probability(owner: str, argument: str, got: Any) -> None:
    """A number from 0 to 1."""
    if isinstance(got, bool) or not isinstance(got, Real):
        fail(owner, argument, "a number in [0, 1]", repr(got), TypeError)
    if not 0 <= got <= 1:
        fail(owner, argument, "a number in [0, 1]", got)


def check_inputs(owner: str, optional: Container[str] = (), **inputs: Any) -> None:
    """Dense tensors; those named in `optional` may be None."""
    for name, got in inputs.items():
        if got is not None or name not in optional:
            check_tensor(owner, name, got)
            check_dense(owner, name, got)


def state_pair(owner: str, hx: Any) -> tuple[Any, Any] | None:
    """(h, c) of an LSTM, or None."""
    if hx is None:
        return None
    if not isinstance(hx, (tuple, list)) or len(hx) != 2:
        got = f"{len(hx)} of them" if isinstance(hx, (tuple, list)) else type(hx).__name__
        fail(owner, "hx", "a tuple of two tensors (h, c)", got, TypeError)
    return hx[0], hx[1]


def plain_like(parameter: torch.Tensor) -> torch.Tensor:
    """An empty tensor of this dtype on this device, to make others from: no shard where FSDP has made one of the parameter."""
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device)


def time_first(owner: str, input: Any, features: int, batch_first: bool, parameters: torch.Tensor) -> torch.Tensor:
    """The checked input of a layer, "T B I"; it comes as "B T I" with `batch_first`."""
    check_inputs(owner, input=input, parameters=parameters)  # a quantized Linear has a method for a weight
    if input.dim() != 3 or input.shape[-1] != features:
        fail(owner, "input", f"[{'B T I' if batch_first else 'T B I'}] with I={features}", f"shape {tuple(input.shape)}")
    check_floating(owner, parameters=parameters, input=input)
    return input.transpose(0, 1) if batch_first else input


def refuse_script(module: torch.nn.Module) -> torch.nn.Module:
    """What torch.jit.script asks a module for: an error that says so, in place of one about some annotation inside."""
    raise NotImplementedError(
        f"{module._get_name()}: torch.jit.script: expected torch.jit.trace, torch.export or torch.compile, got a request for TorchScript"
    )
