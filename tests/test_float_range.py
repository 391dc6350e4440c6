"""Layers at the ends of a float's range: infinite, largest and smallest numbers, which kernels that split their operands could lose."""

import pytest
import torch
from cases import INTERPRETED, Case, places

import memkernels
from memkernels.testing import compare, specs
from memkernels.testing.recurrent import BIAS
from memkernels.testing.spec import Sample

pytestmark = pytest.mark.skipif(INTERPRETED, reason="numbers that the interpreter's NumPy warns of")
DIMS = dict(T=40, B=3, I=40, H=20)
ops = pytest.mark.parametrize("op", ("lstm", "gru", "rnn"))
kernels = pytest.mark.parametrize("backend", [label for label, device in places("all") if device == "cpu" and label != "reference"])


def run(op, backend, inputs, upstream=None):
    """Output and gradients by name."""
    case = Case(specs()[op], backend, inputs["input"].dtype, Sample("one", DIMS, {}, BIAS), "cpu")
    given = {n: t.detach().requires_grad_() if t is not None and t.is_floating_point() else t for n, t in inputs.items()}
    output = case.call(given)[0]
    names = case.differentiable(given)
    grads = torch.autograd.grad(output, [given[n] for n in names], torch.ones_like(output) if upstream is None else upstream)
    return {"output": output.detach(), **dict(zip(names, grads))}


def draw(op):
    return Case(specs()[op], "reference", torch.float32, Sample("one", DIMS, {}, BIAS), "cpu").inputs()


def same_where_finite(found, expected):
    """Whether 0 or the smallest number meets an infinite one decides between NaN and infinity, and is not compared."""
    for name, value in expected.items():
        assert torch.equal(found[name].isfinite(), value.isfinite()), name
        torch.testing.assert_close(found[name][value.isfinite()], value[value.isfinite()], rtol=1e-4, atol=1e-5)


@kernels
@ops
def test_infinite_and_largest_numbers(op, backend):
    """An infinite number in one row, the largest in another: as in plain torch, and the third row does not notice."""
    inputs = draw(op)
    undisturbed = run(op, backend, inputs)["output"]
    inputs["input"][1, 0, 3] = torch.inf
    inputs["input"][2, 1, 7] = torch.finfo(torch.float32).max
    expected, found = run(op, "reference", inputs), run(op, backend, inputs)
    same_where_finite(found, expected)
    torch.testing.assert_close(found["output"], expected["output"], rtol=1e-4, atol=1e-5, equal_nan=True)
    assert torch.equal(found["output"][:, 2], undisturbed[:, 2])


@kernels
def test_a_closed_gate_lets_nothing_through(backend):
    """However large: a gate is 0, not the smallest normal number."""
    closed, large = torch.full((3, 80), -200.0), torch.full((3, 20), 1e30)
    leaves = [t.clone().requires_grad_() for t in (closed, large, closed[:, :60], large)]
    gates, cell, gates_input, hidden = leaves
    with compare.using(backend):
        from_hidden = torch.cat([torch.zeros(3, 40), hidden], -1)
        outputs = (*memkernels.lstm_gates(gates, cell), memkernels.gru_gates(gates_input, from_hidden, hidden))
        gradients = torch.autograd.grad([t.sum() for t in outputs], leaves)
    assert all((t == 0).all() for t in (*outputs[:2], *gradients)) and (outputs[2] == -1).all()


@kernels
@ops
def test_an_infinite_weight_and_upstream_gradient(op, backend):
    inputs = draw(op)
    upstream = torch.ones(DIMS["T"], DIMS["B"], DIMS["H"])
    upstream[3, 1, 2] = -torch.inf
    expected, found = run(op, "reference", inputs, upstream), run(op, backend, inputs, upstream)
    same_where_finite(found, expected)
    inputs["weight_ih"][1, 4] = torch.inf
    torch.testing.assert_close(
        run(op, backend, inputs)["output"], run(op, "reference", inputs)["output"], rtol=1e-4, atol=1e-5, equal_nan=True
    )


@kernels
@ops
def test_an_infinite_gradient_at_a_reset(op, backend):
    """The state that enters is zero there, and zero times an infinite gradient is NaN."""
    inputs = draw(op)
    inputs["reset"] = torch.zeros(DIMS["T"], DIMS["B"], dtype=torch.bool)
    inputs["reset"][2, 1] = True
    upstream = torch.ones(DIMS["T"], DIMS["B"], DIMS["H"])
    upstream[2, 1, 1] = torch.inf
    expected, found = run(op, "reference", inputs, upstream), run(op, backend, inputs, upstream)
    for name, value in expected.items():
        assert torch.equal(found[name].isfinite(), value.isfinite()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@kernels
@ops
def test_an_infinite_input_in_half_precision(op, backend, dtype):
    """H is no multiple of a vector: units that do not exist must not turn it into NaN."""
    inputs = {n: t if t is None else t.to(dtype) for n, t in draw(op).items()}
    inputs["input"][0, 0, 0] = torch.inf
    found, expected = (run(op, label, inputs)["output"] for label in (backend, "reference"))
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05, equal_nan=True)


@pytest.mark.parametrize("scale", (1e-28, 1e-12, 1e12, 1e28))
@kernels
@ops
def test_gradients_of_any_size_are_accurate(op, backend, scale):
    """Inputs and upstream gradients far from one: the same relative accuracy."""
    inputs = draw(op)
    inputs["weight_ih"] *= 1 / scale if scale > 1 else 1.0
    inputs["input"] *= scale
    upstream = torch.full((DIMS["T"], DIMS["B"], DIMS["H"]), min(1.0, scale))
    wide = {n: None if t is None else t.double() for n, t in inputs.items()}
    expected, found = run(op, "reference", wide, upstream.double()), run(op, backend, inputs, upstream)
    for name in ("output", "input", "weight_hh", "bias_ih", *(("weight_ih",) if scale > 1e-20 else ())):
        error = (found[name].double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 2e-6, f"{name}: {error:.2g}"
