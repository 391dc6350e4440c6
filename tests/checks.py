"""The checks of values and memory; the generated tests call them, and test_harness.py proves that each can fail."""

from __future__ import annotations

import gc
import itertools
import re
import weakref
from contextlib import contextmanager

import torch
from cases import SHORT, Case

from memkernels import _registry
from memkernels.testing import compare, inputs
from memkernels.testing.spec import ErrorCase, Tensors

POISON = (float("nan"),) if SHORT else (float("nan"), float("inf"), -float("inf"))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to the last bit, NaN and signed zeros included."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    return torch.equal(*(t.detach().clone(memory_format=torch.contiguous_format).flatten().view(torch.uint8) for t in (a, b)))


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], what: str) -> None:
    assert found.keys() == wanted.keys(), f"{what}: {list(found)} instead of {list(wanted)}"
    for name in wanted:
        assert same_bits(found[name], wanted[name]), f"{what}: {name} differs in its bits"


def copies(given: Tensors) -> Tensors:
    return {name: None if t is None else t.clone() for name, t in given.items()}


def assert_unchanged(given: Tensors, before: Tensors, what: str) -> None:
    for name, t in given.items():
        assert t is None or same_bits(t, before[name]), f"{what} changed input {name}"


@contextmanager
def threads(n: int):
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_accuracy(case: Case, layout: str = "contiguous", gradient: str | None = "contiguous", seed: int = 0, slack: float = 1) -> None:
    """Outputs and gradients against float64, within spec.tol (times slack) of the reference's own error; the inputs stay as they were."""
    given = case.inputs(seed=seed)
    before = copies(given)
    what = dict(layout=layout, gradient=gradient, seed=seed, device=case.device)
    rows = compare.measure(case.spec, case.sample, case.dtype, case.backend, inputs=given, drawn=True, **what)
    assert_unchanged(given, before, "the call")
    bad = [row for row in rows if not row.ratio <= row.limit * slack]
    assert not bad, f"layout {layout}, gradient {gradient}, seed {seed}\n" + compare.report(bad)


def check_outputs_fresh(case: Case) -> None:
    """Outputs are contiguous and share no memory with an input or with each other; gradients are contiguous."""
    for layout in ("contiguous", "transposed"):
        given = case.inputs(layout)
        before = {name: t.untyped_storage().data_ptr() for name, t in given.items() if t is not None and t.numel()}
        outputs = [t for t in case.call(given) if t.numel()]
        for i, t in enumerate(outputs):
            assert t.is_contiguous(), f"output {i} has strides {t.stride()} for shape {tuple(t.shape)}"
            owner = [name for name, pointer in before.items() if pointer == t.untyped_storage().data_ptr()]
            assert not owner, f"output {i} shares memory with input {owner[0]}"
        pointers = {t.untyped_storage().data_ptr() for t in outputs}
        assert len(pointers) == len(outputs), "two outputs share memory"
        for name, t in case.evaluate(given).items():
            assert t.is_contiguous(), f"{name} has strides {t.stride()} for shape {tuple(t.shape)}"


def check_gradients_kept(case: Case) -> None:
    """Backward leaves upstream gradients and inputs as they were and may run twice."""
    given = case.inputs()
    names = case.differentiable(given)
    leaves = {n: t.detach().requires_grad_() if n in names else t for n, t in given.items()}
    outputs = [t for t in case.call(leaves) if t.requires_grad]
    if not outputs:
        return
    upstream = inputs.upstream(outputs, case.dtype)
    before, kept = copies(given), [g.clone() for g in upstream]
    runs = [torch.autograd.grad(outputs, [leaves[n] for n in names], upstream, retain_graph=True, allow_unused=True) for _ in range(2)]
    assert_unchanged(given, before, "backward")
    assert all(same_bits(a, b) for a, b in zip(upstream, kept)), "backward changed an upstream gradient"
    for name, a, b in zip(names, *runs):
        assert (a is None and b is None) or same_bits(a, b), f"d {name} differs when backward runs again"


def check_deterministic(case: Case, runs: int) -> None:
    """The same bits every time, forward and backward."""
    given = case.inputs()
    first = case.evaluate(given)
    for i in range(runs - 1):
        assert_same(case.evaluate(given), first, f"run {i + 2}")


def check_thread_invariant(case: Case, counts: tuple[int, ...] = (1, 2, 3)) -> None:
    """The same bits whatever the number of threads."""
    given, found = case.inputs(), {}
    for n in counts:
        with threads(n):
            found[n] = case.evaluate(given)
    for n in counts[1:]:
        assert_same(found[n], found[counts[0]], f"{n} threads")


def row_letter(case: Case) -> str:
    name, axis = case.spec.rows[0]
    return case.spec.inputs[name].dims.split()[axis]


def row_axes(case: Case) -> dict[str, int]:
    """The axis of the rows in every input, output and gradient that has one."""
    letter = row_letter(case)
    shapes = [
        {**_input_shapes(c), **{n: t.shape for n, t in c.evaluate(c.inputs()).items()}}
        for c in (case.with_dims(**{letter: n}) for n in (11, 13))
    ]
    return {
        name: next(i for i, (a, b) in enumerate(zip(shape, shapes[1][name])) if (a, b) == (11, 13))
        for name, shape in shapes[0].items()
        if shape != shapes[1][name]
    }


def _input_shapes(case: Case) -> dict[str, torch.Size]:
    return {name: t.shape for name, t in case.inputs().items() if t is not None}


def check_batch_invariant(case: Case, sizes: tuple[int, ...] = (1, 2, 3, 8, 33)) -> None:
    """A row has the same bits whatever stands beside it: in a batch of any size, in any place."""
    axes = row_axes(case)
    whole_case = case.with_dims(**{row_letter(case): max(sizes)})
    given = whole_case.inputs()
    outputs = [n for n in case.evaluate(case.inputs()) if n in axes]
    weights = _row_gradients(whole_case, given)

    def run(begin: int, n: int) -> dict[str, torch.Tensor]:
        part = {name: t.narrow(axes[name], begin, n).clone() if t is not None and name in axes else t for name, t in given.items()}
        gradients = [None if g is None else g.narrow(axes[f"output {i}"], begin, n) for i, g in enumerate(weights)]
        with compare.using(case.backend):
            return compare.evaluate(case.spec, part, case.options, lambda _: gradients)

    whole = run(0, max(sizes))
    # What is drawn for a row depends on its place.
    drawn = [a.name for a in _registry.OPS[case.spec.name].inputs if a.by_row and given.get(a.name) is not None]
    for n in sizes:
        for begin in {0} if drawn else {0, max(sizes) - n}:
            part = run(begin, n)
            for name in outputs:
                wanted = whole[name].narrow(axes[name], begin, n)
                assert same_bits(part[name], wanted.contiguous()), (
                    f"{name}: rows {begin}..{begin + n} differ alone from within {max(sizes)} rows"
                )


def _row_gradients(case: Case, given: Tensors) -> list[torch.Tensor | None]:
    leaves = {n: t.detach().requires_grad_(n in case.differentiable(given)) if t is not None else t for n, t in given.items()}
    return inputs.upstream(case.call(leaves), case.dtype)


def check_row_poison(case: Case, rows: int = 5, bad: int = 2) -> None:
    """NaN or infinity in one row reaches no other row, forward or backward, not by one bit."""
    case = case.with_dims(**{row_letter(case): rows})
    axes, clean = row_axes(case), case.inputs()
    wanted = case.evaluate(clean)
    others = torch.tensor([i for i in range(rows) if i != bad], device=case.device)
    for (name, axis), value in itertools.product(case.spec.rows, POISON):
        if clean[name] is None or not clean[name].is_floating_point():
            continue
        poisoned = copies(clean)
        poisoned[name].select(axis, bad).fill_(value)
        found = case.evaluate(poisoned)
        for tensor in [n for n in wanted if n in axes]:
            a, b = (t[tensor].index_select(axes[tensor], others) for t in (found, wanted))
            assert same_bits(a, b), f"{value} in row {bad} of {name} reached another row of {tensor}"


def check_requires_grad(case: Case) -> None:
    """Every subset of inputs that need a gradient gets the same bits; without any, the same outputs and no graph."""
    given = case.inputs()
    wanted, names = case.evaluate(given), case.differentiable(given)
    subsets = [s for n in range(len(names) + 1) for s in itertools.combinations(names, n)]
    if len(subsets) > 64:  # frozen weights one at a time, alone, and in halves
        subsets = [s for s in subsets if len(s) in (0, 1, len(names) - 1)] + [tuple(names[::2]), tuple(names[1::2])]
    for subset in subsets:
        leaves = {n: t.detach().requires_grad_(n in subset) if t is not None else t for n, t in given.items()}
        outputs = case.call(leaves)
        live = [t for t in outputs if t.requires_grad]
        assert bool(live) == bool(subset and any(t.numel() >= 0 for t in outputs)), f"requires_grad {subset}: outputs say otherwise"
        found = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
        if live:
            upstream = [g for g in inputs.upstream(outputs, case.dtype) if g is not None]
            grads = torch.autograd.grad(live, [leaves[n] for n in subset], upstream, allow_unused=True)
            found |= {f"d {n}": torch.zeros_like(leaves[n]) if g is None else g for n, g in zip(subset, grads)}
        assert_same(found, {n: wanted[n] for n in found}, f"requires_grad {subset}")
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            assert_same(case.evaluate(given, None), {n: t for n, t in wanted.items() if n.startswith("output")}, type(mode).__name__)


def check_error(case: Case, error: ErrorCase) -> None:
    """A bad call raises the promised error and changes nothing."""
    given, options = dict(case.inputs()), case.options
    error.change(given, options)
    before = {n: t.clone() if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    try:
        with compare.using(case.backend):
            case.spec.call(case.spec.function, given, options)
    except Exception as found:
        assert type(found) is error.exception, f"{error.name}: raised {type(found).__name__}, not {error.exception.__name__}: {found}"
        assert re.search(error.regex, str(found)), f"{error.name}: {found!s} does not match {error.regex}"
    else:
        raise AssertionError(f"{error.name}: no error was raised")
    for name, t in given.items():
        assert not isinstance(t, torch.Tensor) or same_bits(t, before[name]), f"{error.name}: input {name} was changed"


def check_no_leak(case: Case, calls: int = 5 if SHORT else 20) -> None:
    """Nothing outlives a forward and backward: no graph, no saved tensor, no output."""
    given = case.inputs()
    names = case.differentiable(given)

    def once() -> list[weakref.ref]:
        leaves = {n: t.clone().requires_grad_() if n in names else t for n, t in given.items()}
        outputs = case.call(leaves)
        inputs.sum_outputs(outputs).backward()
        return [weakref.ref(t) for t in (*outputs, *(leaves[n] for n in names))]

    alive = [ref for _ in range(calls) for ref in once()]
    gc.collect()
    left = sum(ref() is not None for ref in alive)
    assert not left, f"{left} of {len(alive)} tensors are still alive after {calls} calls"
