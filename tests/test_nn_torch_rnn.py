"""What PyTorch's test_nn.py (not installed with torch) checks of its recurrent modules, of ours; each test names those it stands for.

Left out: test_error_RNN_seq_len_zero, because an empty sequence is legal here and returns the state, and what needs two GPUs.
"""

import io
import itertools
import warnings

import pytest
import torch
from torch.nn.utils import rnn as rnn_utils

from memkernels import nn
from tests.recurrent import KINDS, assert_same, flat, like, make, parts, random_state, twins

kinds = pytest.mark.parametrize("kind", KINDS)


def spread(tensor):
    """The same values with a stride in every dimension."""
    return torch.stack([torch.zeros_like(tensor), tensor], -1)[..., 1]


@kinds
def test_initial_state_is_zero(kind):
    """test_rnn_initial_hidden_state, test_projections_lstm_initial_hidden_state"""
    for bidirectional, proj_size in itertools.product((False, True), (0, 10) if kind == "LSTM" else (0,)):
        module = make(kind, 30, 20, 2, bidirectional=bidirectional, **({"proj_size": proj_size} if proj_size else {}))
        x = torch.randn(10, 32, 30, dtype=torch.float64)
        zeros = like(random_state(module, 32), [torch.zeros_like(part) for part in parts(random_state(module, 32))])
        assert all(torch.equal(a, b) for a, b in zip(flat(module(x, zeros)), flat(module(x)), strict=True))


@pytest.mark.parametrize("name", ["GRU", "RNN"])
def test_projection_is_for_lstm_alone(name):
    """test_projections_errors_on_gru_and_rnn"""
    with pytest.raises(ValueError, match="proj_size argument is only supported for LSTM, not RNN or GRU"):
        getattr(nn, name)(30, 20, 2, proj_size=10)


def wrong_states(module, wrong=7):
    """A state of the right sizes with one dimension of one part, or of all, wrong."""
    right = parts(random_state(module, 4))
    for dimension, which in itertools.product(range(3), ({0}, {1}, {0, 1}) if len(right) == 2 else ({0},)):
        shapes = [list(part.shape) for part in right]
        for index in which:
            shapes[index][dimension] = wrong
        yield like(random_state(module, 4), [torch.randn(shape, dtype=torch.float64) for shape in shapes])


@pytest.mark.parametrize("batch_first", [True, False])
@kinds
def test_wrong_sizes(kind, batch_first):
    """test_rnn_args_check, test_projections_lstm_args_check, test_cudnn_forward_exception"""
    for projection in ({}, {"proj_size": 2}) if kind == "LSTM" else ({},):
        module = make(kind, 3, 5, 2, batch_first=batch_first, **projection)
        x = torch.randn(4, 4, 3, dtype=torch.float64)
        for state in wrong_states(module):
            with pytest.raises(RuntimeError, match=r"Expected hidden.*size.*got"):
                module(x, state)
        with pytest.raises(RuntimeError, match=r"input.size\(-1\) must be equal to input_size"):
            module(torch.randn(4, 4, 7, dtype=torch.float64), random_state(module, 4))
        with pytest.raises(RuntimeError, match="Expected hidden"):
            module(torch.randn(7, 7, 3, dtype=torch.float64), random_state(module, 4))


@pytest.mark.parametrize("shape", [(1, 20), (3, 1)])
@kinds
def test_cells_do_not_broadcast(kind, shape):
    """test_RNN_cell_no_broadcasting, test_LSTM_cell_forward_hidden_size, test_LSTM_cell_forward_input_size"""
    cell, x, good, bad = getattr(nn, KINDS[kind][0] + "Cell")(10, 20), torch.randn(3, 10), torch.randn(3, 20), torch.randn(shape)
    for state in ((bad, good), (good, bad)) if kind == "LSTM" else (bad,):
        with pytest.raises(RuntimeError):
            cell(x, state)
    with pytest.raises(RuntimeError, match="inconsistent input_size"):
        cell(torch.randn(3, 1), (good, good) if kind == "LSTM" else good)


@pytest.mark.parametrize("bias", [True, False])
@kinds
def test_cells_in_a_loop(kind, bias):
    """test_RNN_cell, test_GRU_cell, test_LSTM_cell, test_lstmcell_backward_only_one_output_grad"""
    cell = getattr(nn, KINDS[kind][0] + "Cell")(10, 20, bias, **KINDS[kind][1])
    state = (torch.randn(3, 20), torch.randn(3, 20)) if kind == "LSTM" else torch.randn(3, 20)
    for _ in range(6):
        state = cell(torch.randn(3, 10), state)
    for part in parts(state):
        found = torch.autograd.grad(part.sum(), list(cell.parameters()), retain_graph=True)
        assert all(g.isfinite().all() and g.abs().sum() > 0 for g in found)


@kinds
def test_no_rows(kind):
    """test_RNN_input_size_zero, and the same of a cell: test_RNN_cell_forward_zero_hidden_size is in test_nn_cells.py"""
    module = make(kind, 3, 4)
    output, _ = module(torch.zeros(5, 0, 3, dtype=torch.float64))
    assert output.shape == (5, 0, 4)
    output.sum().backward()
    assert all(torch.count_nonzero(p.grad) == 0 for p in module.parameters())


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("p", [0, 0.276, 0.731, 1])
def test_dropout_is_between_the_layers(p, train):
    """test_RNN_dropout: all weights 1, so that every output counts the units that were kept."""
    module = make("RNN_relu", 10, 1000, 2, bias=False, dropout=p).train(train)
    for weight in module.parameters():
        torch.nn.init.ones_(weight)
    output, state = module(torch.ones(1, 1, 10, dtype=torch.float64), torch.zeros(2, 1, 1000, dtype=torch.float64))
    assert output.min() == output.max() == state[1].min() == state[1].max() and state[0].eq(10).all()
    total = output[0, 0, 0].item()
    if p == 0 or not train:
        assert total == 10000
    elif p == 1:
        assert total == 0
    else:
        kept = total * (1 - p) / 10
        assert 8000 < total < 12000 and abs(kept - round(kept)) < 1e-3


@pytest.mark.parametrize("train", [True, False])
@kinds
def test_dropout_can_change(kind, train):
    """test_RNN_change_dropout, test_RNN_dropout_state: the probability of the moment, fresh units every call, also after a torch.save."""
    module, x = make(kind, 50, 50, 2).train(train), torch.rand(3, 2, 50, dtype=torch.float64)
    previous = None
    for p in (0, 0.5, 0, 0.7, 0.2, 1, 0.2, 0):
        module.dropout = p
        buffer = io.BytesIO()
        torch.save(module, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        again.flatten_parameters()
        first, second, third = module(x)[0], module(x)[0], again(x)[0]
        assert torch.equal(first, second) == torch.equal(first, third) == (p in (0, 1) or not train)
        if previous is not None:
            assert torch.equal(first, previous) != train
        previous = first


@pytest.mark.parametrize("options", [*itertools.product((True, False), repeat=4)])
@kinds
def test_strides_and_lengths(kind, options):
    """test_RNN_cpu_vs_cudnn: strided input and states, packed or not, lengths as list or tensor, dropout of everything."""
    bias, bidirectional, batch_first, packed = options
    theirs, ours = twins(kind, 10, 6, 2, bias=bias, bidirectional=bidirectional, batch_first=batch_first, dropout=1.0)
    x = spread(torch.randn(6, 6, 10, dtype=torch.float64))
    state = like(random_state(ours, 6), [spread(part) for part in parts(random_state(ours, 6))])
    if not packed:
        assert_same(theirs, ours, x, state)
        return
    for lengths in ([6, 5, 5, 2, 1, 1], torch.tensor([6, 5, 5, 2, 1, 1])):
        results = []
        for module in (theirs, ours):
            data = rnn_utils.pack_padded_sequence(x, lengths, batch_first=batch_first)
            leaf = data.data.clone().requires_grad_()
            found = flat(module(rnn_utils.PackedSequence(leaf, data.batch_sizes), state))
            torch.manual_seed(4)
            loss = sum((t * spread(torch.randn_like(t))).sum() for t in found)
            results.append([*found, *torch.autograd.grad(loss, [leaf, *module.parameters()])])
        torch.testing.assert_close(results[1], results[0])


@kinds
def test_variable_sequences(kind):
    """test_variable_sequence of test_nn.py: a packed batch is its rows, one by one, values and gradients."""
    lengths = [7, 7, 6, 2, 1, 1]
    module = make(kind, 5, 6, 2, bidirectional=True)
    x, state = torch.randn(7, 6, 5, dtype=torch.float64), random_state(module, 6)
    packed = rnn_utils.pack_padded_sequence(x.requires_grad_(), lengths)
    output, last = module(packed, state)
    padded, _ = rnn_utils.pad_packed_sequence(output)
    rows, ends = [], []
    for row, length in enumerate(lengths):
        one, end = module(x[:length, row : row + 1], like(state, [part[:, row : row + 1] for part in parts(state)]))
        rows.append(torch.nn.functional.pad(one, (0, 0, 0, 0, 0, 7 - length)))
        ends.append(parts(end))
    expected = [torch.cat(rows, 1), *(torch.cat(part, 1) for part in zip(*ends))]
    torch.testing.assert_close([padded, *parts(last)], expected)
    leaves, weights = [x, *module.parameters()], [torch.randn_like(t) for t in expected]
    gradients = [
        torch.autograd.grad(sum((t * w).sum() for t, w in zip(found, weights)), leaves) for found in ([padded, *parts(last)], expected)
    ]
    torch.testing.assert_close(*gradients)


@kinds
def test_packed_sequences_as_torch_makes_them(kind):
    """test_packed_sequence.py: dtype changes, pack_sequence, pinned order, total_length, and pack again."""
    module = make(kind, 5, 6, bidirectional=True, batch_first=True)
    rows = [torch.randn(n, 5, dtype=torch.float64) for n in (2, 5, 1)]
    packed = rnn_utils.pack_sequence(rows, enforce_sorted=False)
    output, _ = module(packed)
    assert torch.equal(output.sorted_indices, packed.sorted_indices) and torch.equal(output.unsorted_indices, packed.unsorted_indices)
    padded, lengths = rnn_utils.pad_packed_sequence(output, batch_first=True, total_length=8)
    assert padded.shape == (3, 8, 12) and lengths.tolist() == [2, 5, 1] and not padded[0, 2:].any()
    again, _ = module(rnn_utils.pack_padded_sequence(rnn_utils.pad_sequence(rows, True), lengths, True, enforce_sorted=False))
    assert torch.equal(again.data, output.data)
    for row, part in zip(rows, rnn_utils.unpack_sequence(output)):
        torch.testing.assert_close(module(row)[0], part)
    assert module.float()(packed.float())[0].data.dtype == torch.float32


@kinds
def test_retained_graphs(kind):
    """test_rnn_retain_variables: backward twice gives the same gradients."""
    module, x = make(kind, 10, 20, 2), torch.randn(5, 6, 10, dtype=torch.float64, requires_grad=True)
    output = module(x)[0].sum()
    leaves = [x, *module.parameters()]
    first = torch.autograd.grad(output, leaves, retain_graph=True)
    for keep in (True, False):
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(output, leaves, retain_graph=keep), first))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output, leaves)


@kinds
def test_second_order_of_packed_sequences(kind):
    """test_LSTM_grad_and_gradgrad, test_GRU_grad_and_gradgrad"""
    module, lengths = make(kind, 2, 2, 2, bidirectional=True), [3, 1]

    def call(x):
        output, state = module(rnn_utils.pack_padded_sequence(x, lengths))
        return output.data, *parts(state)

    x = torch.randn(3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(call, (x,)) and torch.autograd.gradgradcheck(call, (x,))


@kinds
def test_gradients_in_eval_mode(kind):
    """test_RNN_eval_backward: cuDNN refuses it, we do not."""
    module, x = make(kind, 4, 3, 2, dropout=0.5).eval(), torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    module(x)[0].sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is not None for p in module.parameters())


@kinds
def test_replaced_and_tied_weights(kind):
    """test_cudnn_weight_format, test_cudnn_weight_tying: new storage, one bias for both directions and a step of SGD, no warning."""
    module = make(kind, 10, 20, batch_first=True, bidirectional=True)
    module.bias_ih_l0_reverse = module.bias_ih_l0
    x = torch.randn(5, 4, 10, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        expected = module(x)[0]
        with torch.no_grad():
            module.weight_hh_l0.set_(module.weight_hh_l0.clone())
        output = module(x)[0]
        assert torch.equal(output, expected)
        optimiser = torch.optim.SGD(module.parameters(), 0.1)
        output.sum().backward()
        optimiser.step()
        assert torch.equal(module.bias_ih_l0, module.bias_ih_l0_reverse) and not torch.equal(module(x)[0], expected)
        assert torch.equal(module.double()(x)[0], module(x)[0])


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", ["weight_hh_l0", "weight_hr_l0"])
def test_weight_norm_by_hook(name):
    """test_rnn_weight_norm, test_RNN_cudnn_weight_norm: the old weight_norm, which replaces a parameter by a tensor."""
    for kind in KINDS if name == "weight_hh_l0" else ("LSTM",):
        module = make(kind, 10, 6, 2, **({"proj_size": 3} if name == "weight_hr_l0" else {}))
        x = torch.randn(7, 6, 10, dtype=torch.float64)
        expected = module(x)[0]
        module = torch.nn.utils.weight_norm(module, name)
        torch.testing.assert_close(module(x)[0], expected)
        torch.testing.assert_close(module.double()(x)[0], expected)
        module = torch.nn.utils.remove_weight_norm(module, name)
        torch.testing.assert_close(module(x)[0], expected)


@kinds
def test_partial_weights(kind):
    """test_partial_flat_weights: a module may be moved while one of its weights is missing."""
    module, x = make(kind, 10, 6, 2), torch.randn(3, 2, 10, dtype=torch.float64)
    expected, weight = module(x)[0], module.weight_hh_l0
    del module.weight_hh_l0
    module.float()
    module.double()
    module.weight_hh_l0 = weight
    torch.testing.assert_close(module(x)[0], expected, rtol=1e-5, atol=1e-6)


@kinds
def test_hooks_see_states(kind):
    """Forward hooks get and may replace (output, state), as torch's modules let them."""
    module, seen = make(kind, 3, 4), []
    module.register_forward_hook(lambda _, args, result: seen.append((len(args), len(result))))
    module(torch.randn(2, 2, 3, dtype=torch.float64))
    assert seen == [(1, 2)]


@kinds
def test_what_user_code_asks_a_module(kind):
    """Shapes of the states, the checks of them and another order of rows: torch.nn's public methods, which forward does not need."""
    theirs, ours = twins(kind, 5, 6, 2, bidirectional=True, **({"proj_size": 3} if kind == "LSTM" else {}))
    assert not [name for name in dir(theirs) if not hasattr(ours, name)]
    x, state = torch.randn(3, 4, 5, dtype=torch.float64), random_state(ours, 4)
    ours.check_forward_args(x, state, None)
    for name in ("get_expected_hidden_size", *(("get_expected_cell_size",) if kind == "LSTM" else ())):
        for sizes in (None, torch.tensor([4, 2])):
            assert getattr(ours, name)(x, sizes) == getattr(theirs, name)(x, sizes)
    for wrong in wrong_states(ours):
        with pytest.raises(RuntimeError, match="Expected hidden"):
            ours.check_forward_args(x, wrong, None)
    for order in (None, torch.tensor([2, 0, 3, 1])):
        assert all(map(torch.equal, parts(ours.permute_hidden(state, order)), parts(theirs.permute_hidden(state, order))))


SIZES = {
    **{name: {} for name in ("LSTM", "GRU", "RNN", "LSTMCell", "GRUCell", "RNNCell", "MultiheadAttention", "GraphAttention")},
    "NTM": dict(output_size=2, slots=4, width=3),
    "DNC": dict(slots=4, width=3, read_heads=1),
    "SAM": dict(output_size=2, slots=4, width=3),
    "ExternalMemory": dict(width=3, read_heads=1),
    "HopfieldRetrieval": {},
    "ProductKeyMemory": {},
}


@pytest.mark.parametrize("name", sorted(SIZES))
def test_script_is_refused_by_name(name):
    model = torch.nn.Sequential(getattr(nn, name)(4, 2, **SIZES[name]))
    with warnings.catch_warnings(), pytest.raises(NotImplementedError, match=rf"{name}: torch.jit.script: expected torch.jit.trace"):
        warnings.simplefilter("ignore")
        torch.jit.script(model)
    assert type(model[0]) is getattr(nn, name)


def test_unknown_nonlinearity():
    """test_RNN_nonlinearity, test_RNN_nonlinearity_passed_as_arg"""
    assert nn.RNN(2, 3, 1, "relu").nonlinearity == "relu" and nn.RNN(2, 3, nonlinearity="tanh").mode == "RNN_TANH"
    with pytest.raises(ValueError) as theirs:
        torch.nn.RNN(2, 3, 1, "sin")
    with pytest.raises(ValueError) as ours:
        nn.RNN(2, 3, 1, "sin")
    assert str(ours.value) == str(theirs.value)
