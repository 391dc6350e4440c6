"""The one place that touches private names of torch, each with the reason it is needed (tests/test_compat.py watches them)."""

from __future__ import annotations

import ctypes
import os
from typing import Any

import torch
from torch.autograd import forward_ad


def functorch_active() -> bool:
    """True inside torch.func transforms (vmap, grad, jvp ...), where `requires_grad` says nothing."""
    return torch._C._are_functorch_transforms_active()


def forward_ad_active() -> bool:
    """True inside a forward-mode AD level."""
    return forward_ad._current_level >= 0


_AUTOCAST = ("cpu", "cuda", "xpu", "mps")


def autocast_enabled(device: str) -> bool:
    """torch.is_autocast_enabled raises for devices that know no autocast, meta among them."""
    return device in _AUTOCAST and torch.is_autocast_enabled(device)


def dlpack_exchange_api() -> Any:
    """The PyCapsule of the DLPack C exchange API (torch >= 2.10)."""
    return torch.Tensor.__dlpack_c_exchange_api__  # type: ignore[attr-defined]


def _libtorch_symbol(name: str) -> int:
    library = ctypes.CDLL(os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_cpu.so"))
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    if address is None:
        raise ImportError(f"libtorch_cpu exports no {name}")
    return address


def torch_parallel_for_address() -> int:
    """Address of `torch_parallel_for` in torch's stable C shim (torch >= 2.10)."""
    return _libtorch_symbol("torch_parallel_for")


def torch_num_threads_address() -> int:
    """Address of `torch_get_num_threads` in torch's stable C shim (torch >= 2.10)."""
    return _libtorch_symbol("torch_get_num_threads")


PLAIN = {torch.Tensor: True, torch.nn.Parameter: True}  # classes of tensors that nobody has overloaded
_PLAIN_ARGUMENTS = frozenset({*PLAIN, type(None), bool, int, float, str})


def plain_call(args: tuple[Any, ...]) -> bool:
    """True if nobody looks at or changes this call: no transform, forward-mode level, autocast, mode, profiler or tensor subclass.

    Such a call needs none of what the dispatcher does, which is half of what a small call costs.
    """
    return not (
        torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._is_any_autocast_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._autograd._profiler_enabled()
    ) and _PLAIN_ARGUMENTS.issuperset(map(type, args))


def batched_gradient(tensors: tuple[Any, ...]) -> bool:
    """True inside `torch.autograd.grad(..., is_grads_batched=True)`, which hides a batch in tensors that look plain."""
    return True in [t is not None and torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors]


def eager_apply(function: type[torch.autograd.Function]) -> Any:
    """`function.apply` for plain tensors outside functorch: without binding default arguments, 9 us of a call."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
