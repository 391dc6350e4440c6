"""The explicit gradient of a gradient against differentiating the reference, over every sample of an op that has one."""

import random

import pytest
import torch
from cases import DTYPES, INTERPRETED, Case, select
from flat import flat_call, of_tensors

from memkernels import _backends, _registry
from memkernels.testing import inputs

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(INTERPRETED, reason="needs float64, which Triton kernels do not take")]
EXPLICIT = [name for name, op in _registry.OPS.items() if hasattr(op.reference, "second_order")]


def cases(dtypes, **kwargs):
    return [p for p in select(dtypes=dtypes, **kwargs) if p.values[0].spec.name in EXPLICIT]


def covered(case: Case) -> bool:
    """Whether the explicit pass takes this call, as the files of the op say."""
    op, args = flat_call(case, case.inputs())
    given = dict(zip((a.name for a in op.inputs), args))
    plain = all(given.get(name) is None for name in ("weight_hr", "peephole", "norm_weight", "weight_co", "seed"))
    return plain and not case.options.get("recompute") and "zoneout" not in case.options and given["input"].shape[0] > 0


class Counted:
    """What a reference's `second_order` found, with `allowed` False nothing."""

    def __init__(self, monkeypatch, case, allowed=True):
        self.used, module = 0, _backends.reference(case.spec.name)
        explicit = module.second_order

        def count(*args):
            found = explicit(*args) if allowed else None
            self.used += found is not None
            return found

        monkeypatch.setattr(module, "second_order", count)


def gradients(case: Case, dtype: torch.dtype, seed: int):
    """Gradients of a random part of the gradients, with respect to a random part of the inputs and upstream gradients."""
    chance, generator = random.Random(seed), inputs.generator("second order", seed)
    some = lambda things: [t for t in things if chance.random() < 0.8] or things[:1]  # noqa: E731
    draw = lambda t: torch.randn(t.shape, dtype=torch.float64, generator=generator).to(case.dtype).to(dtype)  # noqa: E731
    function, tensors = of_tensors(
        case, {n: t if t is None or not t.is_floating_point() else t.to(dtype) for n, t in case.inputs().items()}
    )
    leaves = [t.requires_grad_() for t in tensors]
    outputs = some(list(function(*leaves)))
    upstream = [draw(t).requires_grad_(chance.random() < 0.7) for t in outputs]
    wanted = some(leaves)
    first = [g for g in torch.autograd.grad(outputs, wanted, upstream, create_graph=True, allow_unused=True) if g is not None]
    first = some([g for g in first if g.requires_grad])
    targets = some([*wanted, *(u for u in upstream if u.requires_grad)])
    return torch.autograd.grad(first, targets, [draw(g) for g in first], allow_unused=True)


def as_zeros(found, like):
    return [torch.zeros_like(b if b is not None else torch.zeros(())) if a is None else a for a, b in zip(found, like)]


@pytest.mark.parametrize("case", cases(DTYPES[:1]))
def test_exact(case, monkeypatch):
    for seed in range(4):
        with monkeypatch.context() as patch:
            counted = Counted(patch, case)
            found = gradients(case, case.dtype, seed)
        with monkeypatch.context() as patch:
            Counted(patch, case, allowed=False)
            wanted = gradients(case, case.dtype, seed)
        assert counted.used == covered(case)
        for a, b in zip(as_zeros(found, wanted), as_zeros(wanted, found)):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def relative(found, right):
    """The largest error as a part of the largest value, summed over tensors."""
    largest = lambda t: t.abs().max().item() if t.numel() else 0.0  # noqa: E731
    return sum(largest(a.double() - b) / max(largest(b), 1e-300) for a, b in zip(found, right))


@pytest.mark.parametrize("case", [p for p in cases(DTYPES[1:], hard=False, empty=False) if covered(p.values[0])])
def test_accuracy(case, monkeypatch):
    """At most 3 times the error against float64 that differentiating the reference has in the same dtype."""
    errors = [0.0, 0.0]
    for seed in range(2):
        found = gradients(case, case.dtype, seed)
        with monkeypatch.context() as patch:
            Counted(patch, case, allowed=False)
            generic = gradients(case, case.dtype, seed)
            exact = as_zeros(gradients(case, torch.float64, seed), found)
        assert all(a is None or a.dtype == case.dtype for a in found)
        errors = [e + relative(as_zeros(t, exact), exact) for e, t in zip(errors, (found, generic))]
    assert errors[0] <= 3 * errors[1]


@pytest.mark.parametrize("case", cases(DTYPES[:1], first=1))
def test_third_order(case):
    """A second order that is asked for a graph of itself is the reference's, and the third is right."""
    function, tensors = of_tensors(case, case.inputs())

    def second(*leaves):
        first = torch.autograd.grad(sum(t.pow(2).sum() for t in function(*leaves)), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, create_graph=True)

    assert torch.autograd.gradcheck(second, [t.requires_grad_() for t in tensors], fast_mode=True)


@pytest.mark.parametrize("case", cases(DTYPES[:1], first=1))
def test_batched(case):
    """A batch of cotangents at once goes through the reference."""
    function, tensors = of_tensors(case, case.inputs())
    leaves = [t.requires_grad_() for t in tensors]
    first = torch.autograd.grad(sum(t.pow(2).sum() for t in function(*leaves)), leaves, create_graph=True)
    cotangents = [torch.randn(3, *g.shape, dtype=g.dtype) for g in first]
    batched = torch.autograd.grad(first, leaves, cotangents, retain_graph=True, is_grads_batched=True)
    for i in range(3):
        for a, b in zip(torch.autograd.grad(first, leaves, [c[i] for c in cotangents], retain_graph=True), batched):
            torch.testing.assert_close(a, b[i])
