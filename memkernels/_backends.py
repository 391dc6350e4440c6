"""Which backend runs a call: order, reasons, and the user's explicit choice."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator
from contextvars import ContextVar
from functools import cache
from types import ModuleType
from typing import Any

import torch

from memkernels import _config
from memkernels._checks import BackendError, check_choice, fail

NAMES = ("cuda", "triton", "cpp", "reference")
ORDER = {"cuda": ("cuda", "triton", "reference"), "cpu": ("cpp", "reference")}

forced: ContextVar[str | None] = ContextVar("memkernels_backend", default=None)
_TRITON_INTERPRET = _config.triton_interpret()
_FORCED_BY_ENVIRONMENT = _config.forced_backend()
if _FORCED_BY_ENVIRONMENT is not None:
    check_choice("MEMKERNELS_BACKEND", "value", _FORCED_BY_ENVIRONMENT, NAMES)


@contextlib.contextmanager
def backend(name: str | None) -> Iterator[None]:
    """Force every op called inside to use one backend; None goes back to automatic choice.

    Two computations are always the reference's, whatever is forced, because no kernel has them: a call under forward-mode AD
    (`torch.func.jvp`, `jacfwd`, `hessian`, `torch.autograd.forward_ad`), and the gradient of a gradient (the second backward after
    `create_graph=True`). The same holds for a call inside a torch.func transform that torch.compile traces. Inside forward-mode
    AD `explain` says so.

    Args:
        name: "cuda", "triton", "cpp", "reference" or None.

    Raises:
        ValueError: unknown name, at once. BackendError: from the op, with the reason, when the backend cannot run the call.

    Example:
        >>> import torch, memkernels as mk
        >>> with mk.backend("reference"):
        ...     mk.memory_read(torch.ones(1, 2, 3), torch.ones(1, 1, 2)).tolist()
        [[[2.0, 2.0, 2.0]]]
    """
    check_choice("backend", "name", name, (*NAMES, None))
    token = forced.set(name)
    try:
        yield
    finally:
        forced.reset(token)


@cache
def package(name: str) -> ModuleType | str:
    """The backend's package, or the reason why it is not there."""
    try:
        return importlib.import_module(f"memkernels.backends.{name}")
    except (ImportError, OSError) as error:
        return str(error)


def backends() -> dict[str, str | None]:
    """Every backend with None when it is there, or with the reason why it is not.

    Example:
        >>> import memkernels as mk
        >>> mk.backends()["reference"] is None
        True
    """
    return {name: found if isinstance(found := package(name), str) else _no_device(name) for name in NAMES}


def _no_device(name: str) -> str | None:
    on_cpu = name in ("cpp", "reference") or (name == "triton" and _TRITON_INTERPRET)
    return None if on_cpu or torch.cuda.is_available() else "no CUDA device"


def forced_name() -> str | None:
    """The backend that the user forces here, by `backend()` or by the environment."""
    return forced.get() or _FORCED_BY_ENVIRONMENT


@cache
def kernel(name: str, op: str) -> ModuleType | str:
    """The backend's module of an op, or the reason why there is none."""
    found = package(name)
    if isinstance(found, str):
        return found
    module = f"memkernels.backends.{name}.{op}"
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"has no kernel for {op}" if error.name == module else str(error)
    except ImportError as error:
        return str(error)


def refusal(name: str, op: str, device: str, args: tuple[Any, ...]) -> str | None:
    """Why this backend cannot run this call, or None."""
    found = kernel(name, op)
    if isinstance(found, str):
        return found
    if name == "reference":
        return None
    if name not in ORDER.get(device, ()) and not (name == "triton" and _TRITON_INTERPRET):
        return f"does not run on {device} tensors"
    return found.supports(*args)


@cache
def _candidates(op: str, device: str) -> tuple[tuple[ModuleType, bool], ...]:
    """The backends that may run an op on a device, best first, and whether each is the reference."""
    found = ((kernel(name, op), name == "reference") for name in ORDER.get(device, ("reference",)))
    return tuple((module, is_reference) for module, is_reference in found if not isinstance(module, str))


def choose(op: str, device: str, args: tuple[Any, ...]) -> tuple[ModuleType, bool]:
    """The backend's module for a call, and whether it is the reference: the forced one or raise, else the first that does not refuse."""
    name = forced.get() or _FORCED_BY_ENVIRONMENT
    if name is not None:
        reason = refusal(name, op, device, args)
        if reason is not None:
            raise BackendError(f"{op}: backend {name!r} cannot run this call: {reason}")
        return kernel(name, op), name == "reference"  # type: ignore[return-value]
    for module, is_reference in _candidates(op, device):
        if is_reference or module.supports(*args) is None:
            break
    return module, is_reference


def cpu_level(level: str | None = None) -> str | None:
    """The instruction-set level of the C++ kernels; with an argument, set it first.

    Args:
        level: "baseline", "avx2", "avx512" or "amx"; None leaves it as it is.

    Returns:
        The level in use, or None when the C++ extension is not built.

    Raises:
        TypeError: not a name. ValueError: unknown level, or one this CPU does not have.
        BackendError: a level was given and there is no extension.
    """
    if level is not None and not isinstance(level, str):
        fail("cpu_level", "level", "a level's name or None", repr(level), TypeError)
    found = package("cpp")
    if isinstance(found, str):
        if level is not None:
            raise BackendError(f"cpu_level: backend 'cpp' is not there: {found}")
        return None
    return found.cpu_level(level)


def empty_cache() -> None:
    """Give the memory of large CPU outputs that are gone back to the system.

    The C++ kernels keep blocks of 4 MB or more for later outputs, at most `MEMKERNELS_KEEP_MB` in all (by default a sixteenth of the
    memory of the machine or its container): new pages cost about as much as filling them. Does nothing without the extension.
    """
    found = package("cpp")
    if not isinstance(found, str):
        found.release_kept_memory()


def reference(op: str) -> ModuleType:
    return importlib.import_module(f"memkernels.backends.reference.{op}")
