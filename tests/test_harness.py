"""A suite is only trusted if it can fail: every bug planted here must be caught by the check that the generated tests use."""

from contextlib import nullcontext

import checks
import fuzz
import planted
import pytest
import test_ops_autograd
import test_ops_transforms
import test_threads
import torch
from cases import INTERPRETED, Case
from child import run_python
from planted import Sound, case_of

from memkernels.testing import compare, specs
from memkernels.testing.spec import ErrorCase

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(INTERPRETED, reason="plants its bugs in the C++ backend")]
OP = "memory_read"


def accuracy(sample="odd", dtype=torch.float32, **kwargs):
    return lambda op: checks.check_accuracy(case_of(sample, dtype, op), **kwargs)


CHILD = """
import guard, large, processes
from planted import *
def check(module, limit):
    with planted(module({op!r})):
        {check}
check(Sound, 240)
print("the sound one passed", flush=True)
check({bug}, 2)
"""
GUARD = f"guard.check_guarded(case_of('odd'), 'end', module=module({OP!r}))"
LARGE = "large.check_far_apart(case_of())"
FORK = "processes.check_fork([case_of()], limit)"
# The bug, the op it is planted in, the check that must catch it.
BUGS = {
    "IgnoresGradientStride": (OP, accuracy(gradient="every_second")),
    "IgnoresInputStride": (OP, accuracy(layout="transposed")),
    "DropsTail": (OP, accuracy()),
    "NoZeroInit": (OP, accuracy()),
    "ForgetsEmptyReduction": (OP, accuracy("no_rows")),
    "Races": (OP, lambda op: checks.check_deterministic(case_of("wide", op=op), 20)),
    "DependsOnThreads": (OP, lambda op: checks.check_thread_invariant(case_of("wide", op=op))),
    "DependsOnBatch": (OP, lambda op: checks.check_batch_invariant(case_of("wide", op=op))),
    "LeaksRows": (OP, lambda op: checks.check_row_poison(case_of(op=op))),
    "IgnoresMask": ("content_read", accuracy("masked_nan")),
    "HalfSums": (OP, accuracy("wide", dtype=torch.bfloat16)),
    "WritesItsInput": (OP, accuracy()),
    "WritesTheGradient": (OP, lambda op: checks.check_gradients_kept(case_of(op=op))),
    "NeedsBothGradients": (OP, lambda op: checks.check_requires_grad(case_of(op=op))),
    "ScalesByTheFirst": (OP, accuracy()),
    "KeepsOutputs": (OP, lambda op: checks.check_no_leak(case_of(op=op))),
    "SharesScratch": (OP, lambda op: test_threads.check_python_threads(case_of(op=op))),
}


IN_CHILD = {"ReadsPastTheEnd": (GUARD, "exit status -11"), "Offset32": (LARGE, "far apart"), "HangsAfterFork": (FORK, "still ran")}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bug_is_caught(bug):
    op, check = BUGS[bug]
    with planted.planted(Sound(op)):
        check(op)
    with planted.planted(getattr(planted, bug)(op)), pytest.raises((AssertionError, RuntimeError)):
        check(op)


@pytest.mark.parametrize("bug", IN_CHILD)
def test_planted_bug_is_caught_in_a_child(bug):
    check, says = IN_CHILD[bug]
    with pytest.raises(AssertionError, match=says) as caught:
        run_python(CHILD.format(op=OP, check=check, bug=bug))
    assert "the sound one passed" in str(caught.value)


@pytest.mark.parametrize("bug", ("IgnoresGradientStride", "IgnoresInputStride", "DropsTail", "NoZeroInit", "ScalesByTheFirst"))
def test_fuzz_finds(bug):
    """The fuzzer, told nothing of the bug, meets it among its first calls."""
    with planted.planted(getattr(planted, bug)(OP)), pytest.raises((AssertionError, RuntimeError)):
        fuzz.run(specs()[OP], 200, 0, (("cpp", "cpu"),))


@pytest.mark.slow
@pytest.mark.parametrize("bug", ("NeedsBothGradients", "DependsOnThreads"))
def test_long_fuzz_finds(bug):
    """What only its wider calls can: gradients of some inputs alone, several threads."""
    with planted.planted(getattr(planted, bug)(OP)), pytest.raises((AssertionError, RuntimeError)):
        fuzz.run(specs()[OP], 200, 0, (("cpp", "cpu"),), wider=True)


@pytest.mark.parametrize("wrap", ("from_sum", "cat_slice", "transposed", "every_second"))
def test_gradcheck_needs_the_wraps(wrap):
    """gradcheck alone passes a backward that ignores strides; wrapped, it does not."""
    case = case_of("typical", torch.float64)
    with planted.planted(planted.IgnoresGradientStride(OP)):
        test_ops_autograd.check_gradcheck(case, "contiguous")
        with pytest.raises((AssertionError, RuntimeError)):
            test_ops_autograd.check_gradcheck(case, wrap)


def test_output_that_is_an_input_is_caught():
    case = case_of(op="memory_write")
    with planted.planted(Sound("memory_write")):
        checks.check_outputs_fresh(case)
        with planted.output_is_an_input("memory_write"), pytest.raises((AssertionError, RuntimeError)):
            checks.check_outputs_fresh(case)


def opcheck_compares_strides() -> bool:
    """False where torch's opcheck compares strides on a GPU alone, as that of 2.11 does: there our own check is the one that finds them."""
    try:
        torch._prims_common.compare_tensor_meta(torch.empty(2, 3), torch.empty(3, 2).mT, check_strides=True)
    except (RuntimeError, AssertionError):
        return True
    return False


def test_wrong_strides_are_caught():
    case = case_of()
    with planted.planted(Sound(OP)):
        test_ops_autograd.check_opcheck(case, "test_faketensor")
        with planted.wrong_strides(OP):
            with pytest.raises(AssertionError):
                checks.check_outputs_fresh(case)
            with pytest.raises(Exception, match="test_faketensor") if opcheck_compares_strides() else nullcontext():
                test_ops_autograd.check_opcheck(case, "test_faketensor")


@pytest.mark.parametrize("change", (lambda g: 1.001 * g, lambda g: g.roll(1, -1)))
def test_wrong_reference_gradient_is_caught(change):
    case = case_of(dtype=torch.float64, backend="reference")
    for context, caught in ((nullcontext(), nullcontext()), (planted.reference_backward(OP, change), pytest.raises(AssertionError))):
        with context, caught:
            test_ops_autograd.test_reference_backward_is_the_gradient_of_its_forward(case)


def test_silently_zero_second_derivative_is_caught():
    case = case_of(dtype=torch.float64, backend="reference")
    test_ops_autograd.check_gradgradcheck(case, "contiguous")
    with planted.reference_backward(OP, torch.Tensor.detach), pytest.raises((AssertionError, RuntimeError)):
        test_ops_autograd.check_gradgradcheck(case, "contiguous")


def test_wrong_vmap_is_caught():
    case = case_of(dtype=torch.float64)
    with planted.planted(Sound(OP)):
        test_ops_transforms.test_vmap_of_one_input(case)
    with planted.rolled_vmap(OP), pytest.raises(AssertionError):
        test_ops_transforms.test_vmap_of_one_input(case)


def write_then_raise(inputs, options):
    inputs["memory"].requires_grad_(False)
    inputs["weights"] = inputs["weights"].long()


@pytest.mark.parametrize("error", ("partial write", "wrong type", "wrong text", "none"))
def test_bad_errors_are_caught(error):
    """A call that writes before it raises, raises something else, says something else, or does not raise."""
    spec = specs()[OP]
    wanted = {
        "wrong type": ErrorCase("", write_then_raise, ValueError, ""),
        "wrong text": ErrorCase("", write_then_raise, TypeError, "no such text"),
    }
    case = case_of(backend="reference")
    function = spec.function

    def call(f, inputs, options):
        if error == "partial write":
            inputs["memory"].zero_()
        return None if error == "none" else function(**inputs, **options)

    broken = Case(type(spec)(**{**vars(spec), "call": call}), case.backend, case.dtype, case.sample)
    good = ErrorCase("", write_then_raise, TypeError, "memory_read: weights")
    checks.check_error(case, good)
    with pytest.raises(AssertionError):
        checks.check_error(broken, wanted.get(error, good))


def test_verify_reports_a_broken_backend():
    sample = {row.status for row in compare.verify([OP], ["reference"], [torch.float32])}
    assert sample == {"ok"}
    with planted.planted(planted.DropsTail(OP)):
        rows = list(compare.verify([OP], ["cpp"], [torch.float32]))
    assert {row.status for row in rows} == {"ok", "fail"}
    assert all(row.reason and row.ratio > row.limit for row in rows if row.status == "fail")
    assert all(isinstance(row.json()["ratio"], (float, str)) for row in rows)
