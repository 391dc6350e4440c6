"""The one place that touches private names of torch, each with the reason it is needed (tests/test_compat.py watches them)."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd import forward_ad
from torch.utils import _pytree


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


def no_autocast(device: str) -> Any:
    """A context without autocast; torch.autocast refuses the devices that know none, meta among them, even to turn it off."""
    return torch.autocast(device, enabled=False) if autocast_enabled(device) else contextlib.nullcontext()


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


def jit_tracing() -> bool:
    """True inside torch.jit.trace; public `torch.jit.is_tracing` costs three times as much."""
    return torch._C._get_tracing_state() is not None


# True where somebody looks at or changes calls: a transform, autocast, a mode, a profiler, a trace.
WATCHERS = (
    torch._C._are_functorch_transforms_active,
    torch._C._is_any_autocast_enabled,
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._autograd._profiler_enabled,
    torch._C._get_tracing_state,
)


def plain_call(args: tuple[Any, ...]) -> bool:
    """True if nobody looks at or changes this call: no transform, forward-mode level, autocast, mode, trace, profiler or tensor subclass.

    Such a call needs none of what the dispatcher does, which is half of what a small call costs.
    """
    return not (forward_ad_active() or any(watcher() for watcher in WATCHERS)) and _PLAIN_ARGUMENTS.issuperset(map(type, args))


ROUTED, PLAIN_CALL, RECORDED = range(3)


def _call_kind(args: tuple[Any, ...], inputs: int) -> int:
    """ROUTED: the dispatcher must see the call. Else PLAIN_CALL, or RECORDED if one of the first `inputs` arguments wants a gradient.

    What looks plain may hide a sign (`z.conj().imag`) or a batch (the gradients of `is_grads_batched=True`).
    """
    tensors = [t for t in args[:inputs] if t is not None]
    if not plain_call(args) or True in [t.is_neg() or torch._C._functorch.is_legacy_batchedtensor(t) for t in tensors]:
        return ROUTED
    return RECORDED if torch.is_grad_enabled() and True in [t.requires_grad for t in tensors] else PLAIN_CALL


def general_empty(like: torch.Tensor, shape: tuple[int, ...] | None, dtype: torch.dtype | None) -> torch.Tensor:
    """A contiguous tensor on the device of `like`; its shape and dtype are those of `like` where they are None."""
    if shape is None and dtype is None:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return like.new_empty(like.shape if shape is None else shape, dtype=dtype)


def _empties(like: torch.Tensor, *shapes_and_dtypes: Any) -> tuple[torch.Tensor | None, ...]:
    """`general_empty` for each pair of a shape and a dtype; None for a shape that is None."""
    pairs = zip(shapes_and_dtypes[::2], shapes_and_dtypes[1::2], strict=True)
    return tuple([None if shape is None else general_empty(like, shape, dtype) for shape, dtype in pairs])


def _empty_gradients(inputs: tuple[Any, ...], places: tuple[int, ...], needs: Sequence[bool]) -> list[torch.Tensor | None]:
    """A contiguous tensor like each of the inputs at these places that needs a gradient, None for the others."""
    return [general_empty(inputs[i], None, None) if need else None for i, need in zip(places, needs)]


ANY, RISING, SPANNING = range(3)
_SERIAL = 1 << 14  # elements that torch goes over without its threads, for which a forked child would wait for ever


def _integers_fit(tensor: torch.Tensor, low: int, high: int, order: int) -> bool | None:
    """Whether all integers of a tensor lie in low..high; RISING: also the first is low and none is less than the one before; SPANNING:
    also the last is high. None where looking is not free: not on a CPU, or no plain call."""
    if tensor.device.type != "cpu" or not plain_call((tensor,)):
        return None
    flat = tensor.reshape(-1)
    if any(int(piece.min()) < low or int(piece.max()) > high for piece in flat.split(_SERIAL) if len(piece)):
        return False
    if order == ANY:
        return True
    steps = zip(flat[1:].split(_SERIAL), flat[:-1].split(_SERIAL), strict=True)
    rising = len(flat) > 0 and int(flat[0]) == low and all(bool((after >= before).all()) for after, before in steps)
    return rising and (order == RISING or int(flat[-1]) == high)


# What compiled code of torch allocates with: without parsing of arguments and dispatch, a third of the time of `torch.empty`.
empty_strided_cpu = torch._C._dynamo.guards._empty_strided_cpu  # type: ignore[attr-defined]

deterministic = torch._C._get_deterministic_algorithms  # what the public function, one of Python's, calls

# The C++ backend, once imported, puts faster ones here.
call_kind: Callable[[tuple[Any, ...], int], int] = _call_kind
integers_fit: Callable[[torch.Tensor, int, int, int], bool | None] = _integers_fit
empty: Callable[[torch.Tensor, tuple[int, ...] | None, torch.dtype | None], torch.Tensor] = general_empty
empties: Callable[..., tuple[torch.Tensor | None, ...]] = _empties
empty_gradients: Callable[[tuple[Any, ...], tuple[int, ...], Sequence[bool]], list[torch.Tensor | None]] = _empty_gradients


def eager_apply(function: type[torch.autograd.Function]) -> Any:
    """`function.apply` for plain tensors outside functorch: without binding default arguments, 9 us of a call."""
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


@functools.cache
def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` as a call that Dynamo never looks into. Only where functorch is active, which has imported Dynamo already."""
    return torch.compiler.disable(function)


def register_namedtuple(kind: type[Any]) -> None:
    """Let torch.export save and load graphs whose inputs or outputs hold this named tuple; torch has a public way for dataclasses only."""
    _pytree._register_namedtuple(kind, serialized_type_name=f"{kind.__module__}.{kind.__qualname__}")
    torch.serialization.add_safe_globals([kind])


def argument_names(packet: Any) -> list[str]:
    """The names of the arguments of an op, in order."""
    return [argument.name for argument in packet.default._schema.arguments]


def values_known(tensor: torch.Tensor) -> bool:
    """False for a tensor without values: a fake one, of a trace, or one on the meta device."""
    return type(tensor) in PLAIN and not tensor.is_meta


def has_hooks(module: torch.nn.Module) -> bool:
    """Whether a call of the module does more than its `forward`."""
    return bool(module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks)
