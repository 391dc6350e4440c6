"""Random calls of an op, drawn from its spec: sizes, options, dtypes, layouts, special values, gradients asked for.

The long form draws wider: large sizes, options of two samples at once, one tensor given twice, int32 indices, any layout of upstream
gradients, several threads, and gradients of some inputs alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import checks
import hypothesis
import torch
from cases import DTYPES, Case, places
from hypothesis import strategies as st

from memkernels.testing import GRADIENT_LAYOUTS, LAYOUTS, compare, inputs
from memkernels.testing.spec import OpSpec, Sample, Tensors

SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33)
LARGE = (47, 63, 64, 65, 100, 127, 129, 200, 257, 300)  # beyond a block of the kernels; two dimensions of a call at most
ELEMENTS = 200_000  # the most of all inputs of a call with a large dimension
SPECIAL = (0.0, -0.0, 1e-40, -1e-40, 1.0)
# A tiny tensor makes the reference exact by luck, so the bar of fuzzed calls is this much wider; a wrong tail or stride misses it by far.
WIDER = 8.0
ABSOLUTE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@dataclass(frozen=True)
class Wider:
    """What the long form draws beyond a call's usual parts."""

    twins: tuple[int, int] | None  # places of two inputs that are one tensor, where shape and dtype allow
    int32: bool
    threads: int
    needs: int  # bit i: the gradient of the i-th differentiable input is asked for alone, or with others

    def with_twins(self, given: Tensors) -> Tensors:
        if self.twins is None:
            return given
        a, b = (list(given)[i] for i in self.twins)
        first, second = given[a], given[b]
        if first is None or second is None or first.shape != second.shape or first.dtype != second.dtype or not first.is_floating_point():
            return given
        return {**given, b: first}


@dataclass(frozen=True, repr=False)
class Call:
    """One fuzzed call; its text is enough to run it again."""

    case: Case
    layouts: tuple[str, ...]
    gradient: str
    special: tuple[int, float] | None
    seed: int
    wider: Wider | None = None

    def __repr__(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self.case.sample.dims.items())
        text = f"{self.case} [{sizes}] layouts {self.layouts}, gradient {self.gradient}, special {self.special}, seed {self.seed}"
        return f"{text}, options {self.case.options}, present {self.case.sample.present}, {self.wider}" if self.wider else text

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # what hypothesis prints, or it shows the whole spec
        printer.text(repr(self))

    def inputs(self) -> Tensors:
        given = self.case.inputs(seed=self.seed)
        if self.wider is not None and self.wider.int32:
            given = {n: t.int() if t is not None and t.dtype == torch.int64 else t for n, t in given.items()}
        for i, (name, layout) in enumerate(zip(given, self.layouts)):
            t = given[name]
            if t is None:
                continue
            if self.special is not None and self.special[0] == i and t.is_floating_point() and t.numel():
                t.view(-1)[:: max(1, t.numel() // 3)] = self.special[1]
            given[name] = LAYOUTS[layout](t)
        return given if self.wider is None else self.wider.with_twins(given)


def families(spec: OpSpec, dims: dict[str, int]) -> list[list[str]]:
    """Letters that begin alike (query heads NH, key heads NHk) change together."""
    heads = [letter for letter in dims if not any(letter != other and letter.startswith(other) for other in dims)]
    return [[letter for letter in dims if letter.startswith(head)] for head in heads]


def mixed(sample: Sample, other: Sample, options: Sequence[bool], present: Sequence[bool]) -> Sample:
    """The sample with some of another one's options, and some of both one's optional inputs."""
    merged = {**sample.options, **{k: v for (k, v), taken in zip(other.options.items(), options) if taken}}
    names = dict.fromkeys((*sample.present, *other.present))
    twists = [s.twist for s in (sample, other) if s.twist is not None]

    def twist(tensors: Tensors) -> Tensors:
        for change in twists:
            tensors = {**tensors, **change(tensors)}
        return tensors

    kept = tuple(name for name, there in zip(names, present) if there)
    lacking = {k: n for k, n in other.dims.items() if not k.startswith(tuple(sample.dims))}
    return replace(sample, dims={**sample.dims, **lacking}, options=merged, present=kept, twist=twist if twists else None)


@st.composite
def wider_calls(draw: Any, spec: OpSpec, backends: tuple[tuple[str, str], ...] = ()) -> Call:
    """A call as usual, and with what the long form draws."""
    call: Call = draw(calls(spec, backends))
    sample = call.case.sample
    if draw(st.integers(0, 2)) == 0:
        other = draw(st.sampled_from([s for s in spec.samples if not s.hard]))
        flags = st.lists(st.booleans(), min_size=len(spec.inputs), max_size=len(spec.inputs))
        sample = mixed(sample, other, draw(flags), draw(flags))
    alone = [family[0] for family in families(spec, dict(sample.dims)) if len(family) == 1]
    for _ in range(draw(st.sampled_from((0, 0, 0, 0, 1, 1, 2))) if alone else 0):
        grown = {**sample.dims, draw(st.sampled_from(alone)): draw(st.sampled_from(LARGE))}
        present = [wanted for name, wanted in spec.inputs.items() if not wanted.optional or name in sample.present]
        if sum(math.prod(wanted.shape(grown)) for wanted in present) <= ELEMENTS:
            sample = replace(sample, dims=grown)
    place = st.integers(0, len(spec.inputs) - 1)
    needs = st.integers(1, 2 ** len(spec.inputs) - 1)
    wider = Wider(draw(st.none() | st.tuples(place, place)), draw(st.booleans()), draw(st.integers(1, 3)), draw(needs))
    gradient = draw(st.sampled_from(sorted({**LAYOUTS, **GRADIENT_LAYOUTS})))
    return replace(call, case=replace(call.case, sample=sample), gradient=gradient, wider=wider)


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


def runnable(call: Call) -> Tensors | None:
    """The inputs of the call; None where the drawn parts make none, or the op or its backend refuses them."""
    case, unusual = call.case, call.wider is not None
    nothing: tuple[type[Exception], ...] = (IndexError, RuntimeError)
    if unusual:
        nothing += (AttributeError, KeyError, TypeError, ValueError)
    try:
        given = call.inputs()
    except nothing:
        return None  # the twist of the sample has nothing to twist at this size, or among these inputs
    try:
        return given if compare.why_not(case.spec, given, case.options, case.backend) is None else None
    except (IndexError, TypeError, ValueError) as refusal:
        if unusual and str(refusal).startswith(f"{case.spec.name}: "):  # two options that exclude one another
            return None
        raise


def check_part(call: Call, given: Tensors) -> None:
    """Gradients of some inputs alone, with several threads, are to the last bit those of all inputs with one thread.

    The reference with one thread too: how torch's BLAS adds up long products depends on their number."""
    assert call.wider is not None
    case, names = call.case, inputs.differentiable(call.case.spec, given)
    some = [name for i, name in enumerate(names) if call.wider.needs >> i & 1]
    whole = _leaves(given, names)
    with checks.threads(1):
        outputs = case.call(whole)
        upstream = inputs.upstream(outputs, case.dtype, call.gradient, call.seed)
        wanted = _gradients(outputs, upstream, whole, names)
    part = _leaves(given, some)
    several = 1 if case.backend == "reference" else call.wider.threads
    with checks.threads(several):
        found = _gradients(case.call(part), upstream, part, some)
    checks.assert_same(found, {name: wanted[name] for name in found}, f"{call}\ngradients of {some} alone, {several} threads")


def _leaves(given: Tensors, names: Sequence[str]) -> Tensors:
    return {n: t.detach().requires_grad_(n in names) if t is not None and t.is_floating_point() else t for n, t in given.items()}


def _gradients(
    outputs: Sequence[torch.Tensor], upstream: Sequence[torch.Tensor | None], leaves: Tensors, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Outputs, and gradients of the named inputs."""
    result = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    pairs = [(t, g) for t, g in zip(outputs, upstream) if g is not None and t.requires_grad]
    if pairs and names:
        wanted = [leaves[n] for n in names]
        grads = torch.autograd.grad([t for t, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True)
        result |= {f"d {n}": torch.zeros_like(t) if g is None else g for n, t, g in zip(names, wanted, grads)}
    return result


def check_call(call: Call) -> bool:
    """Runs it, unless the backend refuses; its inputs stay as they were, and its errors within the wider bar."""
    case = call.case
    given = runnable(call)
    if given is None:
        return False
    before = checks.copies(given)
    rows = compare.measure(
        case.spec, case.sample, case.dtype, case.backend, gradient=call.gradient, seed=call.seed, device=case.device, inputs=given, draws=1
    )
    checks.assert_unchanged(given, before, "the call")
    if call.wider is not None:
        check_part(call, given)
    largest = max([1.0, *(float(t.abs().max()) for t in inputs.tensors_of(list(given.values())) if t.is_floating_point() and t.numel())])
    rows = [row for row in rows if not (math.isinf(row.error) and math.isinf(row.reference_error))]  # too large for the dtype
    bad = [row for row in rows if not (row.ratio <= WIDER * row.limit or row.error <= ABSOLUTE[case.dtype] * largest)]
    if bad and _rounding_decides(case, given):
        return False
    if bad and case.dtype == torch.float64:
        moved = _moved_by_rounding(call, given)
        bad = [row for row in bad if not row.error <= WIDER * moved.get(row.tensor, 0.0)]
    assert not bad, f"{call}\n{compare.report(bad)}"
    return True


def _moved(given: Tensors, size: float, generator: torch.Generator) -> Tensors:
    """In float64, each tensor moved by noise of this size, relative to its largest element."""

    def moved(t: torch.Tensor | None) -> torch.Tensor | None:
        if t is None or not t.is_floating_point():
            return t
        exact = t.double()
        if not t.numel():
            return exact
        return exact + size * exact.abs().max() * torch.randn(t.shape, generator=generator, dtype=exact.dtype)

    return {n: moved(t) for n, t in given.items()}


def _moved_by_rounding(call: Call, given: Tensors) -> dict[str, float]:
    """How far the reference's own results move when its inputs do by a unit in the last place.

    The truth of float64 is the reference's, whose error is not known: gradients of 1e5 through 31 steps move by 1e-6.
    """
    generator, names = torch.Generator().manual_seed(0), inputs.differentiable(call.case.spec, given)

    def results(tensors: Tensors) -> dict[str, torch.Tensor]:
        leaves = _leaves(tensors, names)
        with compare.using("reference"):
            outputs = inputs.tensors_of(call.case.spec.call(call.case.spec.function, leaves, call.case.options))
            return _gradients(outputs, inputs.upstream(outputs, call.case.dtype, call.gradient, call.seed), leaves, names)

    here, found = results(given), dict[str, float]()
    for _ in range(4):
        there = results(_moved(given, torch.finfo(torch.float64).eps, generator))
        for name, t in here.items():
            if t.numel() and t.is_floating_point():
                found[name] = max(found.get(name, 0.0), float((t - there[name]).abs().max()))
    return found


def _rounding_decides(case: Case, given: Tensors) -> bool:
    """Whether rounding, of the inputs or of the arithmetic, makes the op choose otherwise: then several choices are right."""
    generator = torch.Generator().manual_seed(0)

    def chosen(tensors: Tensors) -> list[torch.Tensor]:
        with compare.using("reference"):
            outputs = inputs.tensors_of(case.spec.call(case.spec.function, tensors, case.options))
        return [t for t in outputs if not t.is_floating_point()]

    here = chosen(_moved(given, 0.0, generator))
    size = 4 * torch.finfo(case.dtype).eps
    others = [chosen(dict(given)), *(chosen(_moved(given, size, generator)) for _ in range(4))]
    return any(not torch.equal(a, b) for other in others for a, b in zip(here, other, strict=True))


def run(
    spec: OpSpec, examples: int, seed: int, backends: tuple[tuple[str, str], ...] = (), wider: bool = False,
    check: Callable[[Call], bool] = check_call,
) -> None:  # fmt: skip
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
    @hypothesis.given((wider_calls if wider else calls)(spec, backends))
    def fuzzed(call: Call) -> None:
        counts[check(call)] += 1

    fuzzed()
    assert counts[True] > examples // 10, f"only {counts[True]} of {sum(counts.values())} drawn calls could run"
