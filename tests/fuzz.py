"""Random calls of an op, drawn from its spec: sizes, options, dtypes, layouts, special values, gradients asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import checks
import hypothesis
import torch
from cases import DTYPES, Case, places
from hypothesis import strategies as st

from memkernels.testing import GRADIENT_LAYOUTS, LAYOUTS, compare, inputs
from memkernels.testing.spec import OpSpec, Tensors

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)
SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 1.0)
# A tiny tensor makes the reference exact by luck, so the bar of fuzzed calls is this much wider; a wrong tail or stride misses it by far.
WIDER = 8.0
ABSOLUTE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True, repr=False)
class Call:
    """One fuzzed call; its text is enough to run it again."""

    case: Case
    layouts: tuple[str, ...]
    gradient: str
    special: tuple[int, float] | None
    seed: int

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self.case.sample.dims.items())
        return f"{self.case} [{sizes}] layouts {self.layouts}, gradient {self.gradient}, special {self.special}, seed {self.seed}"

    def inputs(self) -> Tensors:
        given = self.case.inputs(seed=self.seed)
        for i, (name, layout) in enumerate(zip(given, self.layouts)):
            t = given[name]
            if t is None:
                continue
            if self.special is not None and self.special[0] == i and t.is_floating_point() and t.numel():
                t.view(-1)[:: max(1, t.numel() // 3)] = self.special[1]
            given[name] = LAYOUTS[layout](t)
        return given


def families(spec: OpSpec, dims: dict[str, int]) -> list[list[str]]:
    """Letters that begin alike (query heads NH, key heads NHk) change together."""
    heads = [letter for letter in dims if not any(letter != other and letter.startswith(other) for other in dims)]
    return [[letter for letter in dims if letter.startswith(head)] for head in heads]


@st.composite
def calls(draw: Any, spec: OpSpec, backends: tuple[tuple[str, str], ...] = ()) -> Call:
    sample = draw(st.sampled_from([s for s in spec.samples if not s.hard]))
    dims = dict(sample.dims)
    for family in families(spec, dims):
        if len(family) == 1 and draw(st.booleans()):
            dims[family[0]] = draw(st.sampled_from(SIZES))
        elif len(family) > 1 and draw(st.booleans()):
            factor = draw(st.integers(0, 3))
            dims.update({letter: factor * dims[letter] for letter in family})
    backend, device = draw(st.sampled_from(backends or places("all")))
    case = Case(spec, backend, draw(st.sampled_from(DTYPES)), replace(sample, dims=dims), device)
    layouts = tuple(draw(st.sampled_from(sorted(LAYOUTS))) for _ in spec.inputs)
    special = draw(st.none() | st.tuples(st.integers(0, len(spec.inputs) - 1), st.sampled_from(SPECIAL)))
    return Call(case, layouts, draw(st.sampled_from(sorted(GRADIENT_LAYOUTS))), special, draw(st.integers(0, 999)))


def check_call(call: Call) -> bool:
    """Runs it, unless the backend refuses; its inputs stay as they were, and its errors within the wider bar."""
    case = call.case
    try:
        given = call.inputs()
    except (IndexError, RuntimeError):
        return False  # the twist of the sample has nothing to twist at this size
    if compare.why_not(case.spec, given, case.options, case.backend) is not None:
        return False
    before = checks.copies(given)
    rows = compare.measure(
        case.spec, case.sample, case.dtype, case.backend, gradient=call.gradient, seed=call.seed, device=case.device, inputs=given, draws=1
    )
    checks.assert_unchanged(given, before, "the call")
    largest = max([1.0, *(float(t.abs().max()) for t in inputs.tensors_of(list(given.values())) if t.is_floating_point() and t.numel())])
    rows = [row for row in rows if not (math.isinf(row.error) and math.isinf(row.reference_error))]  # too large for the dtype
    bad = [row for row in rows if not (row.ratio <= WIDER * row.limit or row.error <= ABSOLUTE[case.dtype] * largest)]
    if bad and _rounding_decides(case, given):
        return False
    assert not bad, f"{call}\n{compare.report(bad)}"
    return True


def _rounding_decides(case: Case, given: Tensors) -> bool:
    """Whether rounding, of the inputs or of the arithmetic, makes the op choose otherwise: then several choices are right."""
    generator = torch.Generator().manual_seed(0)

    def moved(t: torch.Tensor | None, size: float) -> torch.Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        exact = t.double()
        if not t.numel():
            return exact
        return exact + size * exact.abs().max() * torch.randn(t.shape, generator=generator, dtype=exact.dtype)

    def chosen(tensors: Tensors) -> list[torch.Tensor]:
        with compare.using("reference"):
            outputs = inputs.tensors_of(case.spec.call(case.spec.function, tensors, case.options))
        return [t for t in outputs if not t.is_floating_point()]

    here = chosen({n: moved(t, 0.0) for n, t in given.items()})
    size = 4 * torch.finfo(case.dtype).eps
    others = [chosen(dict(given)), *(chosen({n: moved(t, size) for n, t in given.items()}) for _ in range(4))]
    return any(not torch.equal(a, b) for other in others for a, b in zip(here, other, strict=True))


def run(spec: OpSpec, examples: int, seed: int, backends: tuple[tuple[str, str], ...] = ()) -> None:
    """So many drawn calls; hypothesis shrinks the first that fails and prints it."""
    counts = {True: 0, False: 0}

    @hypothesis.seed(seed)
    @hypothesis.settings(
        max_examples=examples,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=list(hypothesis.HealthCheck),
        derandomize=False,
    )
    @hypothesis.given(calls(spec, backends))
    def fuzzed(call: Call) -> None:
        counts[check_call(call)] += 1

    fuzzed()
    assert counts[True] > examples // 10, f"only {counts[True]} of {sum(counts.values())} drawn calls could run"
