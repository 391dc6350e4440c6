"""Argument checks shared by all ops: every message names op, argument, expected and got."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import torch

from memkernels._compat import PLAIN, autocast_enabled, jit_tracing

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class BackendError(RuntimeError):
    """A backend was asked for by name and cannot run this call."""


def fail(op: str, argument: str, expected: str, got: Any, error: type[Exception] = ValueError) -> None:
    raise error(f"{op}: {argument}: expected {expected}, got {got}")


_TERMS: dict[str, tuple[tuple[int, str, int], ...]] = {}  # a dict, not lru_cache: Dynamo warns of that


def _terms(dims: str) -> tuple[tuple[int, str, int], ...]:
    """ "B 4H 2S+1" -> ((1, "B", 0), (4, "H", 0), (2, "S", 1)); a plain number has no letter."""
    if dims in _TERMS:
        return _TERMS[dims]
    found = []
    for term in dims.split():
        match = re.fullmatch(r"(\d*)([A-Za-z]*)(?:\+(\d+))?", term)
        assert match is not None, dims
        found.append((int(match[1] or 1), match[2], int(match[3] or 0)))
    _TERMS[dims] = tuple(found)
    return _TERMS[dims]


def check_tensor(op: str, argument: str, got: Any) -> None:
    if not isinstance(got, torch.Tensor):
        fail(op, argument, "a tensor", type(got).__name__, TypeError)


def check_dims(op: str, **arguments: tuple[Any, str]) -> dict[str, int]:
    """Match each (tensor, "B N W") with named sizes; None is skipped. Returns the sizes.

    Raises:
        TypeError: something is not a tensor. ValueError: rank or size differ; the message says which dimension.
    """
    sizes: dict[str, int] = {}
    for name, (tensor, dims) in arguments.items():
        if tensor is None:
            continue
        check_tensor(op, name, tensor)
        terms = _terms(dims)
        shape = tensor.shape
        if len(shape) != len(terms):
            fail(op, name, f"{len(terms)} dimensions [{dims}]", f"{len(shape)} with shape {tuple(shape)}")
        for (factor, letter, plus), got in zip(terms, shape):
            if not letter:
                wanted = factor + plus
            elif letter in sizes:
                wanted = factor * sizes[letter] + plus
            elif factor == 1 and not plus:
                sizes[letter] = got
                continue
            else:
                sizes[letter] = (got - plus) // factor
                wanted = factor * sizes[letter] + plus
            if got != wanted:
                known = ", ".join(f"{k}={v}" for k, v in sizes.items())
                fail(op, name, f"[{dims}] with {known}", f"shape {tuple(shape)}")
    return sizes


def check_floating(op: str, **tensors: torch.Tensor | None) -> bool:
    """All given tensors share one floating dtype and one device; under autocast float32 and the half types may mix; False if they do."""
    first, same = None, True
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            if tensor.dtype not in FLOATS:
                fail(op, name, "float64, float32, bfloat16 or float16", _dtype(tensor.dtype), TypeError)
            first = tensor
        elif tensor.dtype != first.dtype:
            if not _autocast_unifies(tensor, first):
                fail(op, name, _dtype(first.dtype), _dtype(tensor.dtype), TypeError)
            same = False
        if tensor.device != first.device:
            fail(op, name, f"device {first.device}", f"device {tensor.device}")
    return same


def _key(*tensors: Any) -> Any:
    """What the checks of a call depend on, hashable; None unless all tensors are plain."""
    try:
        return tuple([t if t is None else (t.shape, t.dtype, t.device, t.layout, PLAIN[t.__class__]) for t in tensors])
    except (KeyError, AttributeError, RuntimeError):  # a subclass, no tensor, a tensor without sizes
        return None


key_of: Callable[..., Any] = _key  # the C++ backend, once imported, puts a faster one here


class Signature:
    """What the tensors of an op must be: `Signature("content_read", memory="B N W", ..., mask=("B N | None", torch.bool))`.

    Dims name the sizes; a tensor without a dtype of its own is floating, all such of one dtype. Calling it with the tensors, in this
    order, returns the sizes or raises. Plain tensors with the shapes and types of a call that passed before are only looked up, which
    is most of what checks cost.
    """

    _MOST = 4096  # calls remembered; a program with ever new shapes starts over

    def __init__(self, op: str, **tensors: str | tuple[str, torch.dtype]):
        self.op = op
        dims = {name: what if isinstance(what, str) else what[0] for name, what in tensors.items()}
        self.dims = {name: text.removesuffix(" | None") for name, text in dims.items()}
        self.optional = {name for name, text in dims.items() if text.endswith(" | None")}
        self.fixed = {name: what[1] for name, what in tensors.items() if not isinstance(what, str)}
        self.passed: dict[Any, dict[str, int]] = {}

    def __call__(self, *tensors: Any) -> dict[str, int]:
        if torch.compiler.is_compiling() or jit_tracing():  # a trace names and records what checks read, the same each time
            return self.check(tensors)[0]
        key = key_of(*tensors)
        sizes = self.passed.get(key)
        if sizes is None:
            sizes, same = self.check(tensors)
            if same and key is not None:
                if len(self.passed) >= self._MOST:
                    self.passed.clear()
                self.passed[key] = sizes
        return sizes

    def known(self, *tensors: Any) -> dict[str, int] | None:
        """The sizes if a call like this has passed before."""
        return None if torch.compiler.is_compiling() or jit_tracing() else self.passed.get(key_of(*tensors))

    def check(self, tensors: tuple[Any, ...]) -> tuple[dict[str, int], bool]:
        """The sizes, and whether all floating dtypes agree."""
        op = self.op
        given = dict(zip(self.dims, tensors, strict=True))
        for name, tensor in given.items():
            if tensor is not None or name not in self.optional:
                check_tensor(op, name, tensor)
                check_dense(op, name, tensor)
        sizes = check_dims(op, **{name: (tensor, self.dims[name]) for name, tensor in given.items()})
        same = check_floating(op, **{name: tensor for name, tensor in given.items() if name not in self.fixed})
        for name, dtype in self.fixed.items():
            check_dtype(op, name, given[name], dtype, tensors[0])
        return sizes, same


def check_dense(op: str, name: str, tensor: torch.Tensor) -> None:
    if tensor.layout is not torch.strided or tensor.is_nested:
        kind = "a nested tensor" if tensor.is_nested else f"layout {str(tensor.layout).removeprefix('torch.')}"
        fail(op, name, "a dense strided tensor", kind, TypeError)


def _autocast_unifies(tensor: torch.Tensor, first: torch.Tensor) -> bool:
    lower = tensor.dtype in FLOATS and torch.float64 not in (tensor.dtype, first.dtype)
    return lower and autocast_enabled(first.device.type)


def check_dtype(op: str, argument: str, tensor: torch.Tensor | None, dtype: torch.dtype, like: torch.Tensor) -> None:
    """`tensor` is None, or has this dtype and the device of `like`."""
    if tensor is None:
        return
    if tensor.dtype != dtype:
        fail(op, argument, _dtype(dtype), _dtype(tensor.dtype), TypeError)
    if tensor.device != like.device:
        fail(op, argument, f"device {like.device}", f"device {tensor.device}")


def as_index(op: str, argument: str, got: Any) -> Any:
    """Indices, offsets or lengths as int64, from int64 or int32, on their own device: nothing waits."""
    if got.__class__ is not torch.Tensor:
        check_tensor(op, argument, got)
    if got.dtype == torch.int64:
        return got
    if got.dtype != torch.int32:
        fail(op, argument, "int64 or int32", _dtype(got.dtype), TypeError)
    check_dense(op, argument, got)
    return got.long()


def check_number(op: str, argument: str, got: Any) -> Any:
    """A number (a symbolic one under torch.compile, NumPy's, a tensor of one element that needs no gradient), as one of Python's."""
    if isinstance(got, (int, float, torch.SymInt, torch.SymFloat)):
        return got
    tensor = isinstance(got, torch.Tensor) and got.dim() == 0 and not got.requires_grad and not got.is_complex()
    if not tensor and not isinstance(got, Real):
        fail(op, argument, "a number", type(got).__name__, TypeError)
    return float(got)


def check_finite(op: str, argument: str, got: Any) -> Any:
    """A number, neither infinite nor NaN."""
    number = check_number(op, argument, got)
    if not -float("inf") < number < float("inf"):
        fail(op, argument, "a finite number", number)
    return number


def check_flag(op: str, argument: str, got: Any) -> None:
    if not isinstance(got, (bool, torch.SymBool)):
        fail(op, argument, "True or False", repr(got), TypeError)


def check_choice(op: str, argument: str, got: Any, choices: Iterable[Any]) -> None:
    choices = tuple(choices)
    if got not in choices:
        fail(op, argument, "one of " + ", ".join(repr(c) for c in choices), repr(got))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
