"""The cases of all generated tests: SPECS x backend x dtype x sample, less what a backend says it cannot run (the header lists that)."""

from __future__ import annotations

import functools
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import memkernels
from memkernels.testing import compare, inputs, specs
from memkernels.testing.spec import OpSpec, Sample, Tensors

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
# A call in the interpreter takes a tenth of a second and more, so there most checks see the first sample of an op, in float32.
SHORT = INTERPRETED and os.environ.get("MEMKERNELS_INTERPRET_ALL") != "1"
# Their programs are many and small, one a query, row, page or tap, or scan, which the interpreter does element by element: a short run of
# the interpreter checks their accuracy alone.
MANY_PROGRAMS = (
    "allocation", "attention_varlen", "dnc_sequence", "hopfield_retrieve", "link_read", "link_step", "location_address", "ntm_sequence",
    "paged_attention", "product_key_search", "quantized_attention", "retrieval_attention", "segment_attention", "topk_read", "usage",
    "weighted_bag",
)  # fmt: skip
# Their references are hundreds of calls of torch, whose truths take seconds: the usual run sees half as many of their samples.
LONG_REFERENCES = ("dnc_sequence", "ntm_sequence")
# One op of each kind: several outputs, optional inputs and outputs, one output, integer inputs, a state over time, optional products.
KINDS = ("lstm_gates", "attention", "memory_write", "segment_attention", "rnn", "content_read")
DTYPES = compare.DTYPES


@dataclass(frozen=True, repr=False)
class Case:
    """One call of one op on one backend."""

    spec: OpSpec
    backend: str
    dtype: torch.dtype
    sample: Sample
    device: str = "cpu"

    def __str__(self) -> str:
        device = "" if self.device == "cpu" else f"-{self.device}"
        return f"{self.spec.name}-{self.backend}{device}-{str(self.dtype).removeprefix('torch.')}-{self.sample.name}"

    __repr__ = __str__

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.sample.options)

    def inputs(self, layout: str = "contiguous", seed: int = 0) -> Tensors:
        return inputs.laid_out(inputs.draw(self.spec, self.sample, self.dtype, seed, self.device), layout)

    def differentiable(self, given: Tensors) -> list[str]:
        return inputs.differentiable(self.spec, given)

    def call(self, given: Tensors) -> list[torch.Tensor]:
        """All output tensors of the public function on this backend."""
        with compare.using(self.backend):
            return inputs.tensors_of(self.spec.call(self.spec.function, dict(given), self.options))

    def evaluate(self, given: Tensors, gradient: str | None = "contiguous", seed: int = 0) -> dict[str, torch.Tensor]:
        """Outputs and gradients by name."""
        upstream = None if gradient is None else lambda outputs: inputs.upstream(outputs, self.dtype, gradient, seed)
        with compare.using(self.backend):
            return compare.evaluate(self.spec, given, self.options, upstream)

    def with_dims(self, **sizes: int) -> Case:
        return replace(
            self,
            sample=replace(
                self.sample, name="_".join([self.sample.name, *(f"{k}{v}" for k, v in sizes.items())]), dims={**self.sample.dims, **sizes}
            ),
        )

    def reason(self) -> str | None:
        """Why the backend cannot run it, or None."""
        return (
            _reasons(self.spec.name, self.sample.name, self.dtype, self.device)[self.backend.partition(":")[0]]
            if self._known
            else self._ask()
        )

    @property
    def _known(self) -> bool:
        return any(self.sample is s for s in self.spec.samples)

    def _ask(self) -> str | None:
        return compare.why_not(self.spec, self.inputs(), self.options, self.backend)


@functools.cache
def _reasons(op: str, sample: str, dtype: torch.dtype, device: str) -> dict[str, str | None]:
    spec = specs()[op]
    case = Case(spec, "reference", dtype, spec.sample(sample), device)
    return spec.call(lambda *a, **k: memkernels.explain(op, *a, **k), case.inputs(), case.options)


@functools.cache
def places(levels: str) -> list[tuple[str, str]]:
    """(backend label, device) pairs.

    levels: "best", "lower" (C++ kernels below the machine's best instruction set), "all", or "traced": where what is checked is the graph
    around the op, which knows no backend, the one that would run.
    """
    if levels == "lower":
        return [pair for pair in places("all") if pair not in places("best")]
    if INTERPRETED:
        return [("triton", "cpu")]
    found = ["reference", "cpp"] if memkernels.backends()["cpp"] is None else ["reference"]
    if levels == "traced":
        found = found[-1:]
    if levels == "all":
        found += [label for label in compare.labels() if label.startswith("cpp:")]
    pairs = [(label, "cpu") for label in found]
    if torch.cuda.is_available():
        pairs += [(name, "cuda") for name in ("cuda", "triton", "reference")]
    return pairs


def select(
    *, levels: str = "best", dtypes: Iterable[torch.dtype] = DTYPES, first: int | None = None, hard: bool = True, empty: bool = True,
    kernels_only: bool = False, short: int | None = 1,
) -> list[Any]:  # fmt: skip
    """pytest parameters: one Case each; `first` keeps that many samples of an op, `hard` and `empty` False leave out such samples.

    `short`: the most samples of an op in a short run of the interpreter, float32 alone; None: all of them.
    """
    found = []
    if SHORT and short is not None:
        first, dtypes = min(first or short, short), [d for d in dtypes if d == torch.float32]
    for spec in specs().values():
        waits = SHORT and short is not None and spec.name in MANY_PROGRAMS
        samples = [s for s in spec.samples if (hard or not s.hard) and (empty or all(s.dims.values()))][:first]
        if SHORT:  # a program of the interpreter takes milliseconds: hard values at large sizes wait for the long form
            samples = [s for s in samples if not s.hard or math.prod(s.dims.values()) < 10_000]
        for backend, device in places(levels):
            for dtype in dtypes:
                for sample in samples:
                    case = Case(spec, backend, dtype, sample, device)
                    if (kernels_only and backend == "reference") or case.reason() is not None:
                        continue
                    marks = [pytest.mark.gpu] if device == "cuda" else [pytest.mark.slow] if waits else []
                    found.append(pytest.param(case, id=str(case), marks=marks))
    return found


def short(parameters: list[Any], first: int) -> list[Any]:
    """Cases of later samples than an op's `first` ones belong to the long form (`make test-all`)."""
    found = []
    for p in parameters:
        spec = p.values[0].spec
        kept = (first + 1) // 2 if spec.name in LONG_REFERENCES else first
        late = spec.samples.index(p.values[0].sample) >= kept
        found.append(pytest.param(*p.values, id=p.id, marks=[*p.marks, pytest.mark.slow]) if late else p)
    return found


def but_long_references(parameters: list[Any]) -> list[Any]:
    """Cases of ops whose reference is hundreds of calls of torch belong to the long form."""
    slow = pytest.mark.slow
    return [pytest.param(*p.values, id=p.id, marks=[*p.marks, slow]) if p.values[0].spec.name in LONG_REFERENCES else p for p in parameters]


def of_each_kind(parameters: list[Any]) -> list[Any]:
    """Where an op adds nothing but its schema: one op of each kind of arguments and outputs, the others belong to the long form."""
    slow = pytest.mark.slow
    return [p if p.values[0].spec.name in KINDS else pytest.param(*p.values, id=p.id, marks=[*p.marks, slow]) for p in parameters]


def one_per_op(dtype: torch.dtype = torch.float64, **kwargs: Any) -> list[Any]:
    """The typical sample of every op on every place, in one dtype (float32 where Triton runs)."""
    return select(dtypes=(torch.float32,) if INTERPRETED else (dtype,), first=1, **kwargs)


def not_run() -> list[str]:
    """One line per op, backend and reason that keeps cases from being run here."""
    lines: Counter[str] = Counter()
    for name, reason in memkernels.backends().items():
        if reason is not None:
            lines[f"{name}: {reason}"] += 0
    for spec in specs().values():
        for backend, device in places("best"):
            for dtype in DTYPES:
                for sample in spec.samples:
                    reason = Case(spec, backend, dtype, sample, device).reason()
                    if reason is not None:
                        lines[f"{backend} {spec.name}: {reason}"] += 1
    return [f"{line} ({count} cases)" if count else line for line, count in lines.items()]
