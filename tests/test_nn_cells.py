"""nn.LSTMCell, nn.GRUCell and nn.RNNCell against torch.nn's."""

import copy
import pickle

import pytest
import torch

from memkernels import nn
from tests.recurrent import KINDS, like, parts

kinds = pytest.mark.parametrize("kind", KINDS)


def cell(kind, *args, library=nn, **kwargs):
    name, extra = KINDS[kind]
    torch.manual_seed(0)
    return getattr(library, name + "Cell")(*args, **extra, **kwargs)


def state(kind, *shape, dtype=torch.float32):
    h = torch.randn(shape, dtype=dtype)
    return (h, torch.randn(shape, dtype=dtype)) if kind == "LSTM" else h


@kinds
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_is_torchs(kind, dtype, bias, batched, with_state):
    theirs, ours = (cell(kind, 5, 7, bias=bias, dtype=dtype, library=library) for library in (torch.nn, nn))
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    batch = (3,) if batched else ()
    x, hx = torch.randn(*batch, 5, dtype=dtype), state(kind, *batch, 7, dtype=dtype) if with_state else None
    results = []
    for module in (theirs, ours):
        own = x.clone().requires_grad_()
        start = like(hx, [t.clone().requires_grad_() for t in parts(hx)])
        found = parts(module(own, start))
        sum(t.square().sum() + t.sin().sum() for t in found).backward()
        results.append([*found, own.grad, *(t.grad for t in parts(start)), *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6 if dtype == torch.float32 else 1e-12)


@kinds
def test_is_a_cell_of_torch_and_copies(kind):
    ours, theirs = cell(kind, 5, 7), cell(kind, 5, 7, library=torch.nn)
    assert isinstance(ours, type(theirs)) and repr(ours) == repr(theirs)
    x, zeros = torch.randn(2, 5), like(state(kind, 1), [torch.zeros(2, 7)] * len(parts(state(kind, 1))))
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        torch.testing.assert_close(other(x), ours(x), rtol=0, atol=0)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = parts(ours(x, zeros))[0]
    torch.testing.assert_close(h.float(), parts(ours(x))[0], atol=0.03, rtol=0.03)


@kinds
def test_second_order(kind):
    ours = cell(kind, 2, 3, dtype=torch.float64)
    hx = parts(state(kind, 2, 3, dtype=torch.float64))
    leaves = [torch.randn(2, 2, dtype=torch.float64), *hx]
    for leaf in leaves:
        leaf.requires_grad_()

    def call(x, *hx):
        return ours(x, hx if kind == "LSTM" else hx[0])

    assert torch.autograd.gradcheck(call, leaves) and torch.autograd.gradgradcheck(call, leaves)


@kinds
def test_positional_arguments(kind):
    args = (5, 7, False, *KINDS[kind][1].values())
    name = KINDS[kind][0] + "Cell"
    assert repr(getattr(nn, name)(*args)) == repr(getattr(torch.nn, name)(*args))


@pytest.mark.parametrize("hidden", [0, 3])
@kinds
def test_empty_sizes(kind, hidden):
    theirs, ours = (cell(kind, 0 if hidden else 5, hidden, library=library) for library in (torch.nn, nn))
    x = torch.randn(2, ours.input_size)
    torch.testing.assert_close(ours(x), theirs(x))
    assert parts(ours(x[:0]))[0].shape == (0, hidden)


BAD_CALLS = [
    lambda m, s: m(torch.randn(2, 2, 5)),
    lambda m, s: m(torch.randn(2, 4)),
    lambda m, s: m(torch.randn(4)),
    lambda m, s: m(torch.randn(2, 5), s(2, 6)),
    lambda m, s: m(torch.randn(2, 5), s(3, 7)),
    lambda m, s: m(torch.randn(2, 5), s(1, 7)),
    lambda m, s: m(torch.randn(2, 5), s(7)),
    lambda m, s: m(torch.randn(5), s(2, 7)),
    lambda m, s: m(torch.randn(5), s(6)),
    lambda m, s: m(torch.randn(2, 5), s(2, 7, 1)),
]


@kinds
@pytest.mark.parametrize("call", BAD_CALLS)
def test_errors_are_torchs(kind, call):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        call(cell(kind, 5, 7, library=torch.nn), lambda *shape: state(kind, *shape))
    with pytest.raises(type(theirs.value)) as ours:
        call(cell(kind, 5, 7), lambda *shape: state(kind, *shape))
    assert str(ours.value) == str(theirs.value)


def test_errors_of_the_constructors():
    for name in ("LSTMCell", "GRUCell", "RNNCell"):
        with pytest.raises(TypeError, match=f"{name}: hidden_size: expected an integer"):
            getattr(nn, name)(4, 3.0)
    with pytest.raises(RuntimeError, match="Unknown nonlinearity: sin"):
        nn.RNNCell(4, 3, nonlinearity="sin")(torch.randn(2, 4))
