"""Gradients of every op, generated from the specs: gradcheck, double backward, the explicit reference backward, opcheck."""

import checks
import pytest
import torch
from cases import DTYPES, INTERPRETED, but_long_references, select, short
from flat import backward_arguments, flat_call, of_tensors
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint

from memkernels import _backends
from memkernels.testing import compare, inputs

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(INTERPRETED, reason="needs float64, which Triton kernels do not take")]
FLOAT64 = DTYPES[:1]
SMALL = 150  # elements of all inputs together, for a Jacobian column by column

# What is done with the outputs decides the strides of the gradient that arrives.
WRAPS = {
    "contiguous": lambda outputs: outputs,
    "from_sum": lambda outputs: tuple(t.sum() for t in outputs),
    "cat_slice": lambda outputs: tuple(torch.cat([t, torch.zeros_like(t)], -1) if t.ndim else t for t in outputs),
    "transposed": lambda outputs: tuple(t.mT if t.ndim >= 2 else t for t in outputs),
    "every_second": lambda outputs: tuple(torch.stack([t, torch.zeros_like(t)], -1) for t in outputs),
    "partial": lambda outputs: outputs[-1:],
}


def wrapped(case, wrap):
    function, tensors = of_tensors(case, case.inputs())
    return (lambda *t: WRAPS[wrap](function(*t))), tuple(t.requires_grad_() for t in tensors)


def small(parameters):
    return [p for p in parameters if sum(t.numel() for t in p.values[0].inputs().values() if t is not None) <= SMALL]


def check_gradcheck(case, wrap):
    function, tensors = wrapped(case, wrap)
    assert gradcheck(function, tensors, fast_mode=wrap != "contiguous", check_batched_grad=wrap == "contiguous", nondet_tol=0.0)


def check_gradgradcheck(case, wrap):
    function, tensors = wrapped(case, wrap)
    assert gradgradcheck(function, tensors, fast_mode=True)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("case", short(small(select(dtypes=FLOAT64, hard=False, empty=False)), 20))
def test_gradcheck(case, wrap):
    check_gradcheck(case, wrap)


@pytest.mark.slow
@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("case", small(select(dtypes=FLOAT64, levels="all", hard=False, empty=False)))
def test_gradcheck_slow_mode(case, wrap):
    function, tensors = wrapped(case, wrap)
    assert gradcheck(function, tensors, check_batched_grad=True, check_forward_ad=True, nondet_tol=0.0)


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("case", short(small(select(dtypes=FLOAT64, hard=False, empty=False)), 8))
def test_gradgradcheck(case, wrap):
    check_gradgradcheck(case, wrap)


@pytest.mark.slow
@pytest.mark.parametrize("case", small(select(dtypes=FLOAT64, hard=False, empty=False)))
def test_gradgradcheck_slow_mode(case):
    function, tensors = wrapped(case, "contiguous")
    assert gradgradcheck(function, tensors)


@pytest.mark.parametrize("case", small(select(dtypes=FLOAT64, first=2)))
def test_forward_mode(case):
    function, tensors = wrapped(case, "contiguous")
    assert gradcheck(function, tensors, fast_mode=True, check_forward_ad=True, check_backward_ad=False, check_undefined_grad=False)


REFERENCE = [p for p in select(dtypes=FLOAT64, hard=False) if p.values[0].backend == "reference" and p.values[0].device == "cpu"]


@pytest.mark.parametrize("case", REFERENCE)
def test_reference_is_the_formula(case):
    """The reference agrees with the plain formula of the spec wherever that is finite (a masked row makes plain softmax NaN)."""
    given = case.inputs()
    found = case.call(given)
    try:
        plain = inputs.tensors_of(case.spec.call(case.spec.peers["eager"], dict(given), case.options))
    except NotImplementedError as gap:
        pytest.skip(f"the plain formula of {case.spec.name} has no such option: {gap}")
    assert len(found) == len(plain)
    for a, b in zip(found, plain):
        assert a.shape == b.shape
        finite = b.isfinite()
        torch.testing.assert_close(a[finite], b[finite], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", REFERENCE)
def test_reference_backward_is_the_gradient_of_its_forward(case):
    op, args = flat_call(case, case.inputs())
    module = _backends.reference(op.name)
    outputs = module.forward(*args)
    assert isinstance(outputs, tuple) and len(outputs) == len(op.outputs)
    *flat, needs = backward_arguments(op, args, tuple(t.detach() for t in outputs))
    explicit = module.backward(*flat)
    assert len(explicit) == len(needs)
    leaves = [t for t, a in zip(args, op.inputs) if a.differentiable]
    live = [(t, g) for t, g in zip([t for t, o in zip(outputs, op.outputs) if o.differentiable], flat) if t.requires_grad]
    wanted = torch.autograd.grad([t for t, _ in live], [t for t, n in zip(leaves, needs) if n], [g for _, g in live], allow_unused=True)
    for found, right, leaf in zip([g for g, n in zip(explicit, needs) if n], wanted, [t for t, n in zip(leaves, needs) if n]):
        torch.testing.assert_close(found.expand(leaf.shape), torch.zeros_like(leaf) if right is None else right, rtol=1e-9, atol=1e-9)


def check_opcheck(case, tests):
    for layout in ("contiguous", "transposed", "expanded"):
        op, args = flat_call(case, case.inputs(layout))
        with compare.using(case.backend):
            torch.library.opcheck(op.op, args, test_utils=tests)
            torch.library.opcheck(op.backward_op, tuple(backward_arguments(op, args, op.op(*args))), test_utils=tests)


@pytest.mark.parametrize("case", short(select(dtypes=DTYPES[1:2]), 8))
def test_opcheck(case):
    check_opcheck(case, ("test_schema", "test_autograd_registration", "test_faketensor"))


@pytest.mark.parametrize("case", but_long_references(select(levels="traced", dtypes=DTYPES[1:2], first=1)))
def test_opcheck_aot(case):
    check_opcheck(case, "test_aot_dispatch_dynamic")


@pytest.mark.slow
@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:2]))
def test_opcheck_aot_of_all_samples(case):
    check_opcheck(case, "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:2], hard=False, empty=False, first=3))
def test_checkpoint(case):
    """Non-reentrant checkpointing recomputes the same bits."""
    function, tensors = of_tensors(case, case.inputs())
    upstream = None
    found = []
    for run in (function, lambda *t: checkpoint(function, *t, use_reentrant=False)):
        leaves = [t.detach().requires_grad_() for t in tensors]
        outputs = run(*leaves)
        upstream = upstream or inputs.upstream(outputs, case.dtype)
        found.append(torch.autograd.grad(outputs, leaves, upstream))
    assert all(checks.same_bits(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:2], hard=False, empty=False, first=1))
def test_second_derivative_of_the_raw_backward_op_raises(case):
    """Not zeros with a warning: the raw op says to call the public function."""
    op, args = flat_call(case, case.inputs())
    with compare.using(case.backend):
        flat = backward_arguments(op, args, op.op(*args))
        flat[0] = flat[0].requires_grad_()
        outputs = op.backward_op(*flat)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    with pytest.raises(RuntimeError, match=f"{op.name}_backward"):
        inputs.sum_outputs(outputs).backward()
