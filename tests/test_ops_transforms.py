"""Every op under torch.compile, torch.export, torch.func and autocast, generated from the specs; the truth is the plain reference."""

import pytest
import torch
from cases import DTYPES, INTERPRETED, Case, of_each_kind, one_per_op, select, short
from flat import flat_call, of_tensors, plain_torch
from torch.func import grad, hessian, jacrev, jvp, vmap

from memkernels import _registry
from memkernels.testing import compare, inputs, specs

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(INTERPRETED, reason="the interpreter has no float64 and cannot be traced")]
CLOSE = {torch.float64: dict(rtol=1e-9, atol=1e-9), torch.float32: dict(rtol=1e-4, atol=1e-5)}
TRANSFORMED = select(dtypes=DTYPES[:1], hard=False, empty=False, first=3)


def close(found, wanted, dtype=torch.float64):
    found, wanted = inputs.tensors_of(found), inputs.tensors_of(wanted)
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b, **CLOSE[dtype])


def against_plain(case, transform, given=None):
    """The transform of the op equals the transform of the plain reference."""
    function, tensors = of_tensors(case, case.inputs() if given is None else given)
    found = transform(function, tensors)
    with plain_torch():
        close(found, transform(function, tensors))


def loss_of(function):
    return lambda *tensors: inputs.sum_outputs(function(*tensors))


def everything(tensors):
    return tuple(range(len(tensors)))


@pytest.mark.parametrize("case", TRANSFORMED)
def test_grad(case):
    against_plain(case, lambda f, t: grad(loss_of(f), everything(t))(*t))


@pytest.mark.parametrize("case", TRANSFORMED)
def test_jvp(case):
    against_plain(case, lambda f, t: jvp(f, tuple(t), tuple(torch.ones_like(x) for x in t)))


@pytest.mark.parametrize("case", one_per_op())
def test_jacrev(case):
    against_plain(case, lambda f, t: jacrev(loss_of(f), everything(t))(*t))
    against_plain(case, lambda f, t: jacrev(f)(*t))


@pytest.mark.parametrize("case", one_per_op())
def test_hessian(case):
    against_plain(case, lambda f, t: hessian(loss_of(f))(*t))
    against_plain(case, lambda f, t: jacrev(jacrev(loss_of(f)))(*t))


def stacked(tensors, dim):
    return [torch.stack([t, 2 * t, t - 0.5], dim if t.ndim >= dim else -1) for t in tensors]


@pytest.mark.parametrize("dim", (0, 1))
@pytest.mark.parametrize("case", TRANSFORMED)
def test_vmap(case, dim):
    def mapped(f, t):
        dims = tuple(dim if x.ndim >= dim else x.ndim for x in t)
        return vmap(f, in_dims=dims)(*stacked(t, dim))

    against_plain(case, mapped)


@pytest.mark.parametrize("case", TRANSFORMED)
def test_vmap_of_one_input(case):
    """The others are shared by the mapped calls."""
    _, tensors = of_tensors(case, case.inputs())
    for i in range(len(tensors)):
        dims = tuple(0 if j == i else None for j in range(len(tensors)))
        mapped = [torch.stack([t, 2 * t]) if dim == 0 else t for t, dim in zip(tensors, dims)]
        against_plain(case, lambda f, t, dims=dims, mapped=mapped: vmap(f, in_dims=dims)(*mapped))
        against_plain(case, lambda f, t, dims=dims, mapped=mapped: vmap(grad(loss_of(f), everything(t)), in_dims=dims)(*mapped))


@pytest.mark.parametrize("case", TRANSFORMED)
def test_vmap_of_grad_and_grad_of_vmap(case):
    against_plain(case, lambda f, t: vmap(grad(loss_of(f), everything(t)))(*stacked(t, 0)))
    against_plain(case, lambda f, t: grad(lambda *x: inputs.sum_outputs(vmap(f)(*x)), everything(t))(*stacked(t, 0)))


@pytest.mark.parametrize("case", one_per_op())
def test_nested_vmap(case):
    against_plain(case, lambda f, t: vmap(vmap(f))(*(torch.stack([x, x + 1]) for x in stacked(t, 0))))


def compiled(case, **kwargs):
    torch._dynamo.reset()
    function, tensors = of_tensors(case, case.inputs(), forced=False)
    with compare.using(case.backend):
        fast = torch.compile(function, fullgraph=True, **kwargs)
        for scale in (1.0, 1.5):
            leaves = [(t * scale).requires_grad_() for t in tensors]
            found, wanted = fast(*leaves), function(*leaves)
            close(found, wanted, case.dtype)
            upstream = inputs.upstream(wanted, case.dtype)
            close(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(wanted, leaves, upstream), case.dtype)


@pytest.mark.parametrize("case", short(select(dtypes=DTYPES[1:2], hard=False, empty=False, first=2), 1))
def test_compile(case):
    compiled(case, backend="aot_eager", dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:2], hard=False))
def test_compile_all_samples(case):
    compiled(case, backend="aot_eager", dynamic=False)
    compiled(case, backend="aot_eager", dynamic=True)


@pytest.mark.slow
@pytest.mark.parametrize("case", one_per_op(DTYPES[1]))
def test_compile_with_inductor(case):
    compiled(case)


@pytest.mark.parametrize("case", one_per_op(DTYPES[1], levels="traced"))
def test_compile_dynamic(case):
    """One graph for every size, but for the width of the first input, a constant of a model: two graphs serve four sizes."""
    torch._dynamo.reset()
    width = next(iter(case.spec.inputs.values())).dims.split()[-1]
    letters = [letter for letter, n in case.sample.dims.items() if n > 1 and letter != width]
    graphs = []

    def counting(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    with compare.using(case.backend):
        fast = torch.compile(
            lambda given: case.spec.call(case.spec.function, given, case.options), fullgraph=True, dynamic=True, backend=counting
        )
        for extra in (0, 1, 2, 5):
            bigger = case.with_dims(**{letter: case.sample.dims[letter] + extra for letter in letters})
            given = {n: t for n, t in bigger.inputs().items() if t is not None}
            close(fast(given), case.spec.call(case.spec.function, dict(given), case.options), case.dtype)
    assert len(graphs) <= 2, f"{len(graphs)} graphs for four sizes"


@pytest.mark.parametrize("case", of_each_kind(one_per_op(levels="traced")))
def test_compile_of_vmap_of_grad(case):
    """torch drops a custom backward here without a word; the router must not let it."""
    torch._dynamo.reset()
    function, tensors = of_tensors(case, case.inputs(), forced=False)
    transform = vmap(grad(loss_of(function), everything(tensors)))
    with compare.using(case.backend):
        close(torch.compile(transform, backend="aot_eager")(*stacked(tensors, 0)), transform(*stacked(tensors, 0)))


@pytest.mark.parametrize("case", of_each_kind(one_per_op(levels="traced")))
def test_compile_with_a_graph_break_inside_a_transform(case):
    """Dynamo then compiles what lies below the break frame by frame, with the transform active."""
    torch._dynamo.reset()
    function, tensors = of_tensors(case, case.inputs(), forced=False)

    def broken(*given):
        torch._dynamo.graph_break()
        return function(*given)

    transform = vmap(grad(loss_of(broken), everything(tensors)))
    with compare.using(case.backend):
        close(torch.compile(transform, backend="aot_eager")(*stacked(tensors, 0)), transform(*stacked(tensors, 0)))


class Wrapped(torch.nn.Module):
    """The op of one case as a module of its first differentiable input; the others, or what is added to an only one, are parameters."""

    def __init__(self, function, tensors):
        super().__init__()
        self.function, self.weights = function, torch.nn.ParameterList([t.clone() for t in tensors[1:]])
        self.added = torch.nn.ParameterList([] if tensors[1:] else [torch.zeros_like(tensors[0])])

    def forward(self, first):
        return self.function(sum(self.added, first), *self.weights)


def train(model, first):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(inputs.sum_outputs(model(first)).square())
        losses[-1].backward()
        optimizer.step()
    return [loss.detach() for loss in losses]


@pytest.mark.parametrize("case", one_per_op(DTYPES[1]))
def test_export_then_train(case):
    """The exported graph holds the op, and trains as the module does."""
    function, tensors = of_tensors(case, case.inputs(), forced=False)
    op, _ = flat_call(case, case.inputs())
    with compare.using(case.backend):
        exported = torch.export.export(Wrapped(function, tensors), (tensors[0],))
        assert any(node.target is op.op for node in exported.graph.nodes)
        found, wanted = train(exported.module(), tensors[0]), train(Wrapped(function, tensors), tensors[0])
    assert wanted[0] != wanted[-1]
    close(found, wanted, torch.float32)


@pytest.mark.parametrize("case", select(dtypes=DTYPES[1:2], hard=False, empty=False, first=3))
def test_autocast(case):
    """Under autocast the op equals the op of inputs cast by its policy; gradients come back in the dtype of the inputs."""
    given = case.inputs()
    op, _ = flat_call(case, given)
    target = torch.bfloat16 if op.autocast == "matmul" else torch.float32
    with torch.autocast(case.device, dtype=torch.bfloat16):
        found = case.evaluate(given)
    wanted = Case(case.spec, case.backend, target, case.sample, case.device).evaluate(compare.make.cast(case.spec, given, target))
    for name, t in found.items():
        if name.startswith("output"):
            assert t.dtype == wanted[name].dtype
            torch.testing.assert_close(t, wanted[name], rtol=0, atol=0)
        else:
            assert t.dtype == torch.float32
    mixed = {n: t.bfloat16() if i % 2 and n in case.differentiable(given) else t for i, (n, t) in enumerate(given.items())}
    with torch.autocast(case.device, dtype=torch.bfloat16):
        for name, t in case.evaluate(mixed).items():
            assert t.isfinite().all(), f"{name} of inputs of mixed dtypes"
            if name.startswith("d "):
                assert t.dtype == mixed[name[2:]].dtype


def test_every_spec_is_an_op_and_every_op_has_a_spec():
    assert set(specs()) == set(_registry.OPS)
    for name, spec in specs().items():
        assert spec.name == name and spec.samples and spec.bench and "eager" in spec.peers
        assert len({s.name for s in (*spec.samples, *spec.bench)}) == len(spec.samples) + len(spec.bench), (
            f"{name}: two samples of one name"
        )
