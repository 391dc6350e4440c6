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


_PLAIN = (torch.Tensor, torch.nn.Parameter)


def intercepted(args: tuple[Any, ...]) -> bool:
    """True where somebody looks at the calls: a dispatch mode is active or a tensor subclass is among the arguments."""
    if torch._C._len_torch_dispatch_stack():
        return True
    return any([isinstance(a, torch.Tensor) and type(a) not in _PLAIN for a in args])


def below_autograd(op: Any, *args: Any) -> Any:
    """Call an op below the autograd keys, where no gradient is recorded: what torch.library's own wrappers do."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)


def eager_apply(function: type[torch.autograd.Function]) -> Any:
    """`function.apply` for plain tensors outside functorch: without binding default arguments, 9 us of a call."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]
