"""nn.LSTM and nn.LSTMCell against torch.nn: values, gradients, every option, state_dicts, packed sequences, resets."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from memkernels import nn

TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-11), torch.float32: dict(rtol=1e-4, atol=1e-5)}


def twins(*args, dtype=torch.float64, **kwargs):
    """torch's module and ours with the same weights."""
    torch.manual_seed(0)
    theirs = torch.nn.LSTM(*args, **kwargs, dtype=dtype)
    ours = nn.LSTM(*args, **kwargs, dtype=dtype)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def flat(result):
    output, (h, c) = result
    return (output.data if hasattr(output, "batch_sizes") else output), h, c


def assert_same(theirs, ours, x, hx=None, dtype=torch.float64, reference_input=None, **kwargs):
    """Same outputs, and same gradients of a random projection of all of them to input, state and parameters."""
    leaves = []
    for module, given in ((theirs, reference_input if reference_input is not None else x), (ours, x)):
        own = given.detach().clone().requires_grad_()
        state = None if hx is None else tuple(t.detach().clone().requires_grad_() for t in hx)
        result = flat(module(own, state, **(kwargs if module is ours else {})))
        torch.manual_seed(1)
        sum((r * torch.randn(r.shape, dtype=dtype)).sum() for r in result).backward()
        grads = [own.grad, *(t.grad for t in state or ()), *(p.grad for p in module.parameters())]
        leaves.append([*result, *grads])
    for a, b in zip(*leaves, strict=True):
        torch.testing.assert_close(b, a, **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [*itertools.product((1, 3), (True, False), (True, False), (True, False), (0, 3))])
def test_every_option(options, dtype):
    layers, bias, batch_first, bidirectional, proj_size = options
    kwargs = dict(num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, proj_size=proj_size)
    theirs, ours = twins(5, 7, **kwargs, dtype=dtype)
    x = torch.randn(4, 4, 5, dtype=dtype)
    n = layers * (2 if bidirectional else 1)
    hx = torch.randn(n, 4, proj_size or 7, dtype=dtype), torch.randn(n, 4, 7, dtype=dtype)
    assert_same(theirs, ours, x, hx, dtype)
    assert_same(theirs, ours, x, None, dtype)
    assert_same(theirs, ours, x[0], (hx[0][:, 0], hx[1][:, 0]), dtype)
    assert_same(theirs, ours, x[0], None, dtype)


@pytest.mark.parametrize("options", [*itertools.product((1, 2), (True, False), (0, 3), (True, False), (True, False))])
def test_packed_sequence(options):
    layers, bidirectional, proj_size, batch_first, enforce_sorted = options
    theirs, ours = twins(5, 7, num_layers=layers, bidirectional=bidirectional, proj_size=proj_size, batch_first=batch_first)
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    n = layers * (2 if bidirectional else 1)
    hx = torch.randn(n, 4, proj_size or 7, dtype=torch.float64), torch.randn(n, 4, 7, dtype=torch.float64)
    for state in (None, hx):
        results = []
        for module in (theirs, ours):
            own = x.clone().requires_grad_()
            packed = pack_padded_sequence(own, lengths, batch_first=True, enforce_sorted=enforce_sorted)
            output, (h, c) = module(packed, state)
            assert torch.equal(output.batch_sizes, packed.batch_sizes)
            assert (output.unsorted_indices is None) == enforce_sorted
            padded, again = pad_packed_sequence(output, batch_first=batch_first)
            assert again.tolist() == lengths
            module.zero_grad()
            (padded.square().sum() + h.sin().sum() + c.cos().sum()).backward()
            results.append([padded, h, c, own.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_lengths_mean_what_packing_means(batch_first, proj_size):
    theirs, ours = twins(5, 7, 2, bidirectional=True, proj_size=proj_size, batch_first=batch_first)
    lengths = torch.tensor([4, 1, 6, 4])
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    expected, state = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    expected = pad_packed_sequence(expected, batch_first=batch_first)[0]
    output, got = ours(x if batch_first else x.transpose(0, 1), lengths=lengths)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(got, state)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("proj_size", [0, 3])
def test_reset_starts_an_episode(batch_first, proj_size):
    theirs, ours = twins(5, 7, 2, proj_size=proj_size, batch_first=batch_first)
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 0] = reset[0, 4] = reset[1, 2] = True
    hx = torch.randn(2, 2, proj_size or 7, dtype=torch.float64), torch.randn(2, 2, 7, dtype=torch.float64)
    given = (x, reset) if batch_first else (x.transpose(0, 1), reset.transpose(0, 1))
    output, (h, c) = ours(given[0], hx, reset=given[1])
    output = output if batch_first else output.transpose(0, 1)
    for row, pieces in enumerate((((0, 4, None), (4, 6, None)), ((0, 2, hx), (2, 6, None)))):
        for start, end, state in pieces:
            own = None if state is None else tuple(s[:, row] for s in state)
            expected, last = theirs(x[row, start:end], own)
            torch.testing.assert_close(output[row, start:end], expected)
        torch.testing.assert_close((h[:, row], c[:, row]), last)


def test_reset_in_a_packed_sequence_is_in_the_callers_order():
    _, ours = twins(5, 7, 2, batch_first=True)
    x, lengths = torch.randn(3, 6, 5, dtype=torch.float64), torch.tensor([2, 6, 4])
    reset = torch.rand(3, 6) < 0.4
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    output, state = ours(packed, reset=reset)
    expected, expected_state = ours(x, reset=reset, lengths=lengths)
    torch.testing.assert_close(pad_packed_sequence(output, batch_first=True)[0], expected)
    torch.testing.assert_close(state, expected_state)
    with pytest.raises(ValueError, match="lengths: expected None"):
        ours(packed, lengths=lengths)


def test_dropout_between_layers():
    theirs, ours = twins(5, 64, 2, dropout=0.5)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    one = nn.LSTM(5, 64, dtype=torch.float64)
    one.load_state_dict({k: v for k, v in ours.state_dict().items() if k.endswith("l0")})
    first = one(x)[0]
    second = nn.LSTM(64, 64, dtype=torch.float64)
    second.load_state_dict({k.replace("l1", "l0"): v for k, v in ours.state_dict().items() if k.endswith("l1")})
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(first, 0.5)
    assert 0.4 < (dropped == 0).double().mean() < 0.6
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x)[0], second(dropped)[0])
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])


def test_state_dict_both_ways_and_same_initialisation():
    for kwargs in (dict(), dict(num_layers=2, bidirectional=True, proj_size=3), dict(bias=False)):
        torch.manual_seed(5)
        theirs = torch.nn.LSTM(5, 7, **kwargs)
        torch.manual_seed(5)
        ours = nn.LSTM(5, 7, **kwargs)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
        buffer = io.BytesIO()
        torch.save(ours.state_dict(), buffer)
        buffer.seek(0)
        theirs.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
        assert repr(ours) == repr(theirs)
        assert ours.flatten_parameters() is None
        assert isinstance(ours, torch.nn.RNNBase) and len(ours.all_weights) == len(theirs.all_weights)


def test_copies_and_functional_call():
    _, ours = twins(5, 7, 2)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    expected = ours(x)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x)[0], expected)
    doubled = {k: 2 * v for k, v in ours.state_dict().items()}
    got = torch.func.functional_call(ours, doubled, (x,))[0]
    other = copy.deepcopy(ours)
    other.load_state_dict(doubled)
    assert torch.equal(got, other(x)[0]) and not torch.equal(got, expected)
    assert ours.float()(x.float())[0].dtype == torch.float32


def test_tied_and_parametrised_weights():
    _, ours = twins(7, 7, 2)
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    ours.weight_hh_l1 = ours.weight_hh_l0
    ours(x)[0].sum().backward()
    both = ours.weight_hh_l0.grad
    assert len(list(ours.parameters())) == 7
    untied = twins(7, 7, 2)[1]
    with torch.no_grad():
        untied.weight_hh_l1.copy_(untied.weight_hh_l0)
    untied(x)[0].sum().backward()
    torch.testing.assert_close(both, untied.weight_hh_l0.grad + untied.weight_hh_l1.grad)
    torch.nn.utils.parametrizations.weight_norm(untied, "weight_hh_l0")
    torch.testing.assert_close(untied(x)[0], ours(x)[0])
    untied(x)[0].sum().backward()
    assert untied.parametrizations.weight_hh_l0.original1.grad is not None


@pytest.mark.parametrize("kwargs", [dict(), dict(num_layers=2, bidirectional=True, dropout=0.1), dict(proj_size=3)])
def test_compiles_into_one_graph(kwargs):
    ours = nn.LSTM(5, 7, **kwargs).eval()
    x = torch.randn(4, 3, 5, requires_grad=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    results = []
    for module in (ours, compiled):
        output, (h, c) = module(x)
        results.append((output, h, c, *torch.autograd.grad(output.square().sum() + c.sum(), [x, *ours.parameters()])))
    torch.testing.assert_close(results[1], results[0])


def test_second_order_and_ensembles():
    ours = nn.LSTM(2, 3, dtype=torch.float64)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))
    models = [nn.LSTM(2, 3, dtype=torch.float64) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    got = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,))[0])(params, buffers)
    torch.testing.assert_close(got, torch.stack([m(x)[0] for m in models]))


def test_autocast_runs_in_bfloat16():
    ours = nn.LSTM(5, 7, 2, bidirectional=True)
    x = torch.randn(4, 3, 5)
    expected = ours(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = ours(x, (torch.zeros(4, 3, 7), torch.zeros(4, 3, 7)))
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.03)


def test_empty_sizes():
    ours = nn.LSTM(5, 7, 2, bidirectional=True)
    output, (h, c) = ours(torch.randn(4, 0, 5))
    assert output.shape == (4, 0, 14) and h.shape == c.shape == (4, 0, 7)
    assert ours(torch.randn(0, 2, 5))[0].shape == (0, 2, 14)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(4, 0),
        lambda m: m(4, 3, dropout=2.0),
        lambda m: m(4, 3, proj_size=3),
        lambda m: m(4, 3)(torch.randn(2)),
        lambda m: m(4, 3)(torch.randn(2, 2, 2, 4)),
        lambda m: m(4, 3)(torch.randn(2, 2, 5)),
        lambda m: m(4, 3)(torch.randn(2, 2, 4, dtype=torch.float64)),
        lambda m: m(4, 3)(torch.randn(2, 2, 4), (torch.randn(1, 2, 3), torch.randn(1, 3, 3))),
        lambda m: m(4, 3)(torch.randn(2, 2, 4), (torch.randn(2, 2, 3), torch.randn(1, 2, 3))),
        lambda m: m(4, 3)(torch.randn(2, 2, 4), (torch.randn(2, 3), torch.randn(2, 3))),
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises((ValueError, RuntimeError)) as caught:
        call(torch.nn.LSTM)
    with pytest.raises(type(caught.value)) as ours:
        call(nn.LSTM)
    assert str(ours.value) == str(caught.value)


def test_packed_input_of_another_size_is_an_error():
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        nn.LSTM(4, 3)(pack_sequence([torch.randn(2, 5)]))
