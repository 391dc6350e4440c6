"""One `OpSpec` per op: what tests, fuzz, benchmarks, `memkernels verify` and the docs tables are generated from."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from memkernels._flops import backward_flops
from memkernels._registry import capture

Tensors = dict[str, torch.Tensor | None]


def normal(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Standard normal values."""
    return torch.randn(shape, dtype=torch.float64, generator=generator).to(dtype)


def unit(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Uniform in [0, 1)."""
    return torch.rand(shape, dtype=torch.float64, generator=generator).to(dtype)


def distribution(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Non-negative, sums to 1 over the last dimension: what a read or write weighting is."""
    return torch.softmax(torch.randn(shape, dtype=torch.float64, generator=generator), -1).to(dtype)


def mostly(probability: float) -> Callable[..., torch.Tensor]:
    """Booleans that are True with this probability."""

    def draw(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
        return torch.rand(shape, dtype=torch.float64, generator=generator) < probability

    return draw


@dataclass(frozen=True)
class Input:
    """One tensor argument: its dims ("T B 4H": factor and letter, or a number, e.g. "3 H"), and how values are drawn."""

    dims: str
    draw: Callable[[tuple[int, ...], torch.dtype, torch.Generator], torch.Tensor] = normal
    dtype: torch.dtype | None = None  # None: the dtype of the call, and differentiable
    optional: bool = False
    wide: bool = False  # float32 where the call is in a half type

    def dtype_in(self, dtype: torch.dtype) -> torch.dtype:
        """What it is in a call of this dtype."""
        return self.dtype or (torch.float32 if self.wide and dtype.itemsize == 2 else dtype)

    def shape(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(size(term, dims) for term in self.dims.split())


def size(term: str, dims: Mapping[str, int]) -> int:
    """The size of one term such as "B", "4H", "2S+1" or "3"; letters that are not given ("HP") stand for those they begin with ("H")."""
    match = re.fullmatch(r"(\d*)([A-Za-z]*)(?:\+(\d+))?", term)
    if match is None or not (match[1] or match[2]):
        raise ValueError(f"dims: cannot read {term!r}")
    letters = match[2]
    while len(letters) > 1 and letters not in dims:
        letters = letters[:-1]
    return int(match[1] or 1) * (dims[letters] if letters else 1) + int(match[3] or 0)


@dataclass(frozen=True)
class Sample:
    """A small named case: sizes, options, which optional inputs are present, and an optional twist of the drawn values."""

    name: str
    dims: Mapping[str, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    present: tuple[str, ...] = ()  # optional inputs that are passed
    twist: Callable[[Tensors], Tensors] | None = None  # e.g. saturate, mask a row, zero a key (returns the changed inputs)
    hard: bool = False  # values at the edge of the range: checked to be finite and right, not for gradcheck


@dataclass(frozen=True)
class ErrorCase:
    """A bad call: `change(inputs, options)` edits a good sample in place; the call must raise `exception` matching `regex`."""

    name: str
    change: Callable[[dict[str, Any], dict[str, Any]], None]
    exception: type[Exception]
    regex: str


@dataclass(frozen=True)
class OpSpec:
    """Everything the generated checks need to know of an op.

    Args:
        name: op name, as in `torch.ops.memkernels.<name>`.
        function: the public function.
        inputs: the tensor arguments by name, in order; drawn with `memkernels.testing.inputs.draw`.
        samples: small cases, T=1, B=0, odd sizes, every option among them. The first one is the plain typical case.
        bench: realistic sizes for the benchmark suite (samples too; large).
        peers: name -> plain function of the same (inputs, options) that returns the same outputs; "eager" is always there.
        bytes: (dims, itemsize) -> bytes that forward must move at least; `bytes_backward` likewise for backward alone.
        call: (function, inputs, options) -> outputs; for functions whose arguments are not one tensor a name.
        errors: bad calls.
        tol: how many times the error of the same-dtype reference is allowed, forward and backward.
        rows: (input name, axis) pairs along which the op is independent: one poisoned row leaves the others bitwise unchanged.
        gaps: known differences, each a sentence; shown in the docs.
    """

    name: str
    function: Callable[..., Any]
    inputs: Mapping[str, Input]
    samples: tuple[Sample, ...]
    bench: tuple[Sample, ...]
    peers: Mapping[str, Callable[..., Any]]
    bytes: Callable[[Mapping[str, int], int], float]
    bytes_backward: Callable[[Mapping[str, int], int], float]
    call: Callable[[Callable[..., Any], dict[str, Any], dict[str, Any]], Any] = lambda f, inputs, options: f(**inputs, **options)
    errors: tuple[ErrorCase, ...] = ()
    tol: tuple[float, float] = (2.0, 3.0)
    rows: tuple[tuple[str, int], ...] = ()
    gaps: tuple[str, ...] = ()

    def flops(self, sample: Sample) -> tuple[int, int]:
        """Floating operations of the matrix products of forward, and of backward for all gradients."""
        given = {
            name: torch.empty(i.shape(sample.dims), dtype=i.dtype_in(torch.float32), device="meta")
            for name, i in self.inputs.items()
            if not i.optional or name in sample.present
        }
        op, flat = capture(self.call, self.function, given, dict(sample.options))
        return op.flops(*flat), backward_flops(op.products(*flat), (a.name for a in op.inputs if a.differentiable))

    def sample(self, name: str) -> Sample:
        return next(s for s in (*self.samples, *self.bench) if s.name == name)


@cache
def specs() -> dict[str, OpSpec]:
    """All op specs by name, in the order of their file names."""
    package = importlib.import_module("memkernels.testing.specs")
    found = (importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__))
    return {module.SPEC.name: module.SPEC for module in found}
