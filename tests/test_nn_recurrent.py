"""nn.LSTM, nn.GRU and nn.RNN against torch.nn: values, gradients, every argument, state_dicts, packed sequences, resets."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence, pad_packed_sequence

from memkernels import nn
from tests.recurrent import KINDS, TOLERANCE, assert_same, flat, like, make, parts, random_state, select, twins

kinds = pytest.mark.parametrize("kind", KINDS)
PROJECTED = [*itertools.product(KINDS, [0]), ("LSTM", 3)]
projected = pytest.mark.parametrize(("kind", "proj_size"), PROJECTED)


def projection(proj_size):
    return {"proj_size": proj_size} if proj_size else {}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("options", [*itertools.product((1, 3), (True, False), (True, False), (True, False))])
@projected
def test_every_argument(kind, proj_size, options, dtype):
    layers, bias, batch_first, bidirectional = options
    kwargs = dict(num_layers=layers, bias=bias, batch_first=batch_first, bidirectional=bidirectional, **projection(proj_size))
    theirs, ours = twins(kind, 5, 7, **kwargs, dtype=dtype)
    x = torch.randn(4, 4, 5, dtype=dtype)
    hx = random_state(ours, 4)
    assert_same(theirs, ours, x, hx)
    assert_same(theirs, ours, x, None)
    assert_same(theirs, ours, x[0], select(hx, 1, 0))
    assert_same(theirs, ours, x[0], None)


@pytest.mark.parametrize("options", [*itertools.product((1, 2), (True, False), (True, False), (True, False))])
@projected
def test_packed_sequence(kind, proj_size, options):
    layers, bidirectional, batch_first, enforce_sorted = options
    theirs, ours = twins(kind, 5, 7, num_layers=layers, bidirectional=bidirectional, batch_first=batch_first, **projection(proj_size))
    lengths = [6, 4, 4, 1] if enforce_sorted else [4, 1, 6, 4]
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    for state in (None, random_state(ours, 4)):
        results = []
        for module in (theirs, ours):
            own = x.clone().requires_grad_()
            packed = pack_padded_sequence(own, lengths, batch_first=True, enforce_sorted=enforce_sorted)
            output, last = module(packed, state)
            assert torch.equal(output.batch_sizes, packed.batch_sizes)
            assert (output.unsorted_indices is None) == enforce_sorted
            padded, again = pad_packed_sequence(output, batch_first=batch_first)
            assert again.tolist() == lengths
            module.zero_grad()
            (padded.square().sum() + sum(t.sin().sum() for t in parts(last))).backward()
            results.append([padded, *parts(last), own.grad, *(p.grad for p in module.parameters())])
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(b, a, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("batch_first", [True, False])
@projected
def test_lengths_mean_what_packing_means(kind, proj_size, batch_first):
    theirs, ours = twins(kind, 5, 7, 2, bidirectional=True, batch_first=batch_first, **projection(proj_size))
    lengths = torch.tensor([4, 1, 6, 4])
    x = torch.randn(4, 6, 5, dtype=torch.float64)
    expected, state = theirs(pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False))
    expected = pad_packed_sequence(expected, batch_first=batch_first)[0]
    output, got = ours(x if batch_first else x.transpose(0, 1), lengths=lengths)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(got, state)


@pytest.mark.parametrize("batch_first", [True, False])
@projected
def test_reset_starts_an_episode(kind, proj_size, batch_first):
    theirs, ours = twins(kind, 5, 7, 2, batch_first=batch_first, **projection(proj_size))
    x = torch.randn(2, 6, 5, dtype=torch.float64)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 0] = reset[0, 4] = reset[1, 2] = True
    hx = random_state(ours, 2)
    given = (x, reset) if batch_first else (x.transpose(0, 1), reset.transpose(0, 1))
    output, last = ours(given[0], hx, reset=given[1])
    output = output if batch_first else output.transpose(0, 1)
    for row, pieces in enumerate((((0, 4, None), (4, 6, None)), ((0, 2, hx), (2, 6, None)))):
        for start, end, state in pieces:
            expected, final = theirs(x[row, start:end], select(state, 1, row))
            torch.testing.assert_close(output[row, start:end], expected)
        torch.testing.assert_close(select(last, 1, row), final)


@projected
def test_reset_to_given_and_learned_states(kind, proj_size):
    """One state a row, one a step and row, and learned ones, against a loop over steps in torch's module."""
    torch.manual_seed(2)
    ours = make(kind, 5, 7, 2, learned_reset=True, **projection(proj_size))
    names = ["reset_h", "reset_c"][: len(parts(random_state(ours)))]
    plain = make(kind, 5, 7, 2, library=torch.nn, **projection(proj_size))
    plain.load_state_dict({k: v for k, v in ours.state_dict().items() if not k.startswith("reset")}, strict=True)
    for name, p in ours.named_parameters():
        if name.startswith("reset"):
            assert torch.count_nonzero(p) == 0
            torch.nn.init.normal_(p)
    x, reset, hx = torch.randn(5, 3, 5, dtype=torch.float64), torch.rand(5, 3) < 0.5, random_state(ours, 3)
    learned = like(hx, [torch.stack([getattr(ours, f"{name}_l{k}") for k in range(2)])[:, None] for name in names])
    by_row, by_step = random_state(ours, 3), random_state(ours, 5, 3)
    for given, starts in ((None, [learned] * 5), (by_row, [by_row] * 5), (by_step, [select(by_step, 1, t) for t in range(5)])):
        state, outputs = hx, []
        for t in range(5):
            state = like(hx, [torch.where(reset[t, :, None], s, h) for s, h in zip(parts(starts[t]), parts(state))])
            output, state = plain(x[t : t + 1], state)
            outputs.append(output)
        got, last = ours(x, hx, reset=reset, reset_state=given)
        torch.testing.assert_close(got, torch.cat(outputs))
        torch.testing.assert_close(last, state)
        leaves = [p for name, p in ours.named_parameters() if name.startswith("reset")] if given is None else []
        found, expected = (torch.autograd.grad(o.sin().sum(), leaves) if leaves else () for o in (got, torch.cat(outputs)))
        torch.testing.assert_close(found, expected)
    one_step, one = ours(x[:, 0], select(hx, 1, 0), reset=reset[:, 0], reset_state=select(by_step, 2, 0))
    torch.testing.assert_close(one_step, got[:, 0])
    torch.testing.assert_close(one, select(last, 1, 0))


@kinds
def test_a_packed_sequence_is_in_the_callers_order(kind):
    ours = make(kind, 5, 7, 2, batch_first=True)
    x, lengths = torch.randn(3, 6, 5, dtype=torch.float64), torch.tensor([2, 6, 4])
    reset = torch.rand(3, 6) < 0.4
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    for given in (None, random_state(ours, 3), random_state(ours, 6, 3)):
        output, state = ours(packed, reset=reset, reset_state=given)
        expected, expected_state = ours(x, reset=reset, lengths=lengths, reset_state=given)
        torch.testing.assert_close(pad_packed_sequence(output, batch_first=True)[0], expected)
        torch.testing.assert_close(state, expected_state)
    with pytest.raises(ValueError, match="lengths: expected None"):
        ours(packed, lengths=lengths)


@kinds
def test_heads_are_blocks(kind):
    ours, whole = make(kind, 5, 6, 2, num_heads=3, bidirectional=True), make(kind, 5, 6, 2, bidirectional=True)
    state = ours.state_dict()
    for name, weight in state.items():
        if name.startswith("weight_hh"):
            gates = weight.shape[0] // 6
            assert weight.shape[1] == 2
            state[name] = torch.cat([torch.block_diag(*gate.split(2)) for gate in weight.chunk(gates)])
    whole.load_state_dict(state)
    x = torch.randn(4, 2, 5, dtype=torch.float64)
    torch.testing.assert_close(ours(x), whole(x))
    assert "num_heads=3" in repr(ours)


@kinds
def test_dropout_between_layers(kind):
    theirs, ours = twins(kind, 5, 64, 2, dropout=0.5)
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    one = make(kind, 5, 64)
    one.load_state_dict({k: v for k, v in ours.state_dict().items() if k.endswith("l0")})
    first = one(x)[0]
    second = make(kind, 64, 64)
    second.load_state_dict({k.replace("l1", "l0"): v for k, v in ours.state_dict().items() if k.endswith("l1")})
    torch.manual_seed(3)
    dropped = torch.nn.functional.dropout(first, 0.5)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x)[0], second(dropped)[0])
    torch.testing.assert_close(ours.eval()(x)[0], theirs.eval()(x)[0])
    assert_same(theirs, ours, x)


@pytest.mark.parametrize("kwargs", [dict(), dict(num_layers=2, bidirectional=True), dict(bias=False, batch_first=True)])
@projected
def test_state_dict_both_ways_and_same_initialisation(kind, proj_size, kwargs):
    torch.manual_seed(5)
    theirs = make(kind, 5, 7, library=torch.nn, **kwargs, **projection(proj_size))
    torch.manual_seed(5)
    ours = make(kind, 5, 7, **kwargs, **projection(proj_size))
    assert list(theirs.state_dict()) == list(ours.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    buffer = io.BytesIO()
    torch.save(ours.state_dict(), buffer)
    buffer.seek(0)
    theirs.load_state_dict(torch.load(buffer, weights_only=True), strict=True)
    assert repr(ours) == repr(theirs)
    assert ours.flatten_parameters() is None
    assert isinstance(ours, torch.nn.RNNBase) and len(ours.all_weights) == len(theirs.all_weights)
    for module in (theirs, ours):
        torch.manual_seed(6)
        module.reset_parameters()
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))


@kinds
def test_positional_arguments(kind):
    name, extra = KINDS[kind]
    args = (5, 7, 2, *extra.values(), *(("tanh",) if kind == "RNN" else ()), False, True, 0.25, True)
    theirs, ours = getattr(torch.nn, name)(*args), getattr(nn, name)(*args)
    assert repr(ours) == repr(theirs) and list(ours.state_dict()) == list(theirs.state_dict())
    assert getattr(ours, "nonlinearity", None) == getattr(theirs, "nonlinearity", None) and ours.mode == theirs.mode


@kinds
def test_copies_and_functional_call(kind):
    ours = make(kind, 5, 7, 2, learned_reset=True)
    x, reset = torch.randn(4, 3, 5, dtype=torch.float64), torch.ones(4, 3, dtype=torch.bool)
    expected = ours(x, reset=reset)[0]
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert torch.equal(other(x, reset=reset)[0], expected)
    doubled = {k: 2 * v for k, v in ours.state_dict().items()}
    got = torch.func.functional_call(ours, doubled, (x,))[0]
    other = copy.deepcopy(ours)
    other.load_state_dict(doubled)
    assert torch.equal(got, other(x)[0]) and not torch.equal(got, expected)
    assert ours.float()(x.float())[0].dtype == torch.float32
    got = torch.func.functional_call(ours, {k: v.double() for k, v in ours.state_dict().items()}, (x,))[0]
    torch.testing.assert_close(got.float(), ours(x.float())[0])


@kinds
def test_tied_and_parametrised_weights(kind):
    ours = make(kind, 7, 7, 2)
    x = torch.randn(4, 3, 7, dtype=torch.float64)
    ours.weight_hh_l1 = ours.weight_hh_l0
    ours(x)[0].sum().backward()
    both = ours.weight_hh_l0.grad
    assert len(list(ours.parameters())) == 7
    untied = make(kind, 7, 7, 2)
    untied.load_state_dict(ours.state_dict())
    untied(x)[0].sum().backward()
    torch.testing.assert_close(both, untied.weight_hh_l0.grad + untied.weight_hh_l1.grad)
    torch.nn.utils.parametrizations.weight_norm(untied, "weight_hh_l0")
    torch.testing.assert_close(untied(x)[0], ours(x)[0])
    untied(x)[0].sum().backward()
    assert untied.parametrizations.weight_hh_l0.original1.grad is not None


@pytest.mark.parametrize("kwargs", [dict(), dict(num_layers=2, bidirectional=True, dropout=0.1, learned_reset=True, num_heads=3)])
@kinds
def test_compiles_into_one_graph(kind, kwargs):
    ours = make(kind, 5, 6, **kwargs, dtype=torch.float32).eval()
    x, reset = torch.randn(4, 3, 5, requires_grad=True), torch.rand(4, 3) < 0.5
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    results = []
    for module in (ours, compiled):
        found = flat(module(x, reset=reset))
        results.append((*found, *torch.autograd.grad(sum(t.square().sum() for t in found), [x, *ours.parameters()])))
    torch.testing.assert_close(results[1], results[0])


@kinds
def test_second_order_and_ensembles(kind):
    ours = make(kind, 2, 3)
    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: ours(x)[0], (x,))
    models = [make(kind, 2, 3) for _ in range(3)]
    params, buffers = torch.func.stack_module_state(models)
    got = torch.vmap(lambda p, b: torch.func.functional_call(models[0], (p, b), (x,))[0])(params, buffers)
    torch.testing.assert_close(got, torch.stack([m(x)[0] for m in models]))


@kinds
def test_autocast_runs_in_bfloat16(kind):
    ours = make(kind, 5, 7, 2, bidirectional=True, dtype=torch.float32)
    x, hx = torch.randn(4, 3, 5), like(random_state(ours, 3), [torch.zeros_like(t) for t in parts(random_state(ours, 3))])
    expected = ours(x)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, _ = ours(x, hx)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, atol=0.03, rtol=0.03)


@kinds
def test_empty_sizes(kind):
    ours = make(kind, 5, 7, 2, bidirectional=True)
    output, last = ours(torch.randn(4, 0, 5, dtype=torch.float64))
    assert output.shape == (4, 0, 14) and all(part.shape == (4, 0, 7) for part in parts(last))
    hx = random_state(ours, 2)
    output, last = ours(torch.randn(0, 2, 5, dtype=torch.float64), hx)
    assert output.shape == (0, 2, 14)
    torch.testing.assert_close(last, hx)


torch_has_types = pytest.mark.skipif(torch.__version__ < (2, 11), reason="torch 2.10 takes any truth value as a flag, and so has no error")
BAD_CALLS = [
    lambda m, s: m(4, 0),
    lambda m, s: m(4, 3, dropout=2.0),
    lambda m, s: m(4, 3, proj_size=3),
    pytest.param(lambda m, s: m(4, 3, bias=1), marks=torch_has_types),
    pytest.param(lambda m, s: m(4, 3, batch_first=0), marks=torch_has_types),
    lambda m, s: m(4, 3)(torch.randn(2)),
    lambda m, s: m(4, 3)(torch.randn(2, 2, 2, 4)),
    lambda m, s: m(4, 3)(torch.randn(2, 2, 5)),
    lambda m, s: m(4, 3)(torch.randn(2, 2, 4, dtype=torch.float64)),
    lambda m, s: m(4, 3)(torch.randn(2, 2, 4), s((1, 3, 3))),
    lambda m, s: m(4, 3)(torch.randn(2, 2, 4), s((2, 2, 3))),
    lambda m, s: m(4, 3)(torch.randn(2, 2, 4), s((2, 3))),
    lambda m, s: m(4, 3)(torch.randn(2, 4), s((1, 1, 3))),
]


@pytest.mark.parametrize("call", BAD_CALLS)
@pytest.mark.parametrize("name", ["LSTM", "GRU", "RNN"])
def test_errors_are_torchs(name, call):
    def state(shape):
        return (torch.randn(shape), torch.randn(shape)) if name == "LSTM" else torch.randn(shape)

    with pytest.raises((ValueError, RuntimeError, TypeError)) as caught:
        call(getattr(torch.nn, name), state)
    with pytest.raises(type(caught.value)) as ours:
        call(getattr(nn, name), state)
    assert str(ours.value) == str(caught.value)


@kinds
def test_errors_of_what_torch_lacks(kind):
    ours = make(kind, 4, 6)
    x, reset = torch.randn(2, 3, 4, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
        ours(pack_sequence([torch.randn(2, 5, dtype=torch.float64)]))
    with pytest.raises(ValueError, match="reset: expected shape"):
        ours(x, reset=reset.T)
    with pytest.raises(ValueError, match="reset_state: expected None without reset"):
        ours(x, reset_state=random_state(ours, 3))
    with pytest.raises(ValueError, match=r"reset_state.*: expected shape \(1, 3, 6\) as L\*D B H"):
        ours(x, reset=reset, reset_state=random_state(ours, 2))
    with pytest.raises(ValueError, match="num_heads: expected a divisor of hidden_size=6"):
        make(kind, 4, 6, num_heads=4)
    with pytest.raises(TypeError, match="learned_reset: expected True or False"):
        make(kind, 4, 6, learned_reset=1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'zone'"):
        make(kind, 4, 6, zone=1)
