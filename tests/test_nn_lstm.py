"""The options of nn.LSTM against a loop over steps in plain torch, alone and combined; their parameters; their randomness."""

import itertools
import random

import pytest
import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from memkernels import nn
from tests.recurrent import make, random_state, twins, with_gradients

HIDDEN, INPUT, STEPS, BATCH = 6, 5, 4, 3
OPTIONS = {
    "peephole": True,
    "layer_norm": True,
    "output_gate": "cell",
    "zoneout": (0.3, 0.2),
    "num_heads": 2,
    "recompute": True,
    "learned_reset": True,
    "proj_size": 4,
    "bidirectional": True,
    "bias": False,
}
EACH = [{}, *({name: value} for name, value in OPTIONS.items())]
PAIRS = [dict(pair) for pair in itertools.combinations(OPTIONS.items(), 2)]
SEVERAL = [dict(random.Random(k).sample(list(OPTIONS.items()), 3 + k % 7)) for k in range(12)]


def normalised(x, weights, start, size):
    if "norm_weight" not in weights:
        return x
    return F.layer_norm(x, (x.shape[-1],), *(weights[name][start : start + size] for name in ("norm_weight", "norm_bias")))


def whole(weight, heads):
    """The recurrent weights of all heads as one matrix."""
    return torch.cat([torch.block_diag(*gate.chunk(heads)) for gate in weight.chunk(4)])


def step(module, weights, x, h, c):
    """One step of one row batch in eval mode: (h, c)."""
    hidden = module.hidden_size
    if module.output_gate == "cell":
        share = F.pad(normalised(F.linear(x, weights["weight_ih"][: 3 * hidden]), weights, 0, 3 * hidden), (0, hidden))
    else:
        share = normalised(F.linear(x, weights["weight_ih"]), weights, 0, 4 * hidden)
    gates = share + normalised(F.linear(h, whole(weights["weight_hh"], module.num_heads)), weights, 4 * hidden, 4 * hidden)
    if module.bias:
        gates = gates + weights["bias_ih"] + weights["bias_hh"]
    i, f, g, o = gates.chunk(4, -1)
    peephole = weights.get("weight_peephole", torch.zeros(3, hidden, dtype=x.dtype))
    c_new = torch.sigmoid(f + peephole[1] * c) * c + torch.sigmoid(i + peephole[0] * c) * torch.tanh(g)
    o = o + peephole[2] * c_new
    if module.output_gate == "cell":
        o = o + F.linear(c_new, weights["weight_co"])
    h_new = torch.sigmoid(o) * torch.tanh(normalised(c_new, weights, 8 * hidden, hidden))
    if module.proj_size:
        h_new = F.linear(h_new, weights["weight_hr"])
    keep_h, keep_c = module.zoneout
    return keep_h * h + (1 - keep_h) * h_new, keep_c * c + (1 - keep_c) * c_new


def loop(module, x, hx, reset=None, lengths=None):
    """nn.LSTM in eval mode, "T B I", step by step."""
    directions = 1 + module.bidirectional
    ends = torch.full(x.shape[1:2], x.shape[0]) if lengths is None else lengths
    last = []
    for index in range(module.num_layers * directions):
        suffix = f"_l{index // directions}" + ("_reverse" if index % directions else "")
        weights = {name.removesuffix(suffix): p for name, p in module.named_parameters() if name.endswith(suffix)}
        h, c = hx[0][index], hx[1][index]
        start = [weights.get(name, torch.zeros_like(s)) for name, s in (("reset_h", h), ("reset_c", c))]
        found = {}
        for t in reversed(range(len(x))) if index % directions else range(len(x)):
            alive = (t < ends)[:, None]
            begins = torch.zeros_like(alive) if reset is None else reset[t, :, None]
            h_new, c_new = step(module, weights, x[t], *(torch.where(begins, s, old) for s, old in zip(start, (h, c))))
            h, c = torch.where(alive, h_new, h), torch.where(alive, c_new, c)
            found[t] = torch.where(alive, h, 0), torch.where(alive, c, 0)
        last.append((h, c))
        both = [torch.stack(part) for part in zip(*(found[t] for t in range(len(x))))]
        outputs = both if index % directions == 0 else [torch.cat(pair, -1) for pair in zip(outputs, both)]  # noqa: F821
        if index % directions == directions - 1:
            x, cells = outputs
    return x, tuple(torch.stack(part) for part in zip(*last)), cells


def eval_module(**options):
    torch.manual_seed(0)
    module = make("LSTM", INPUT, HIDDEN, 2, **options).eval()
    for name, p in module.named_parameters():
        if name.startswith(("norm_", "reset_")):
            torch.nn.init.normal_(p, mean=0.5, std=0.5)
    return module


def gradients(module, call, x, hx):
    leaves = [x, *hx, *module.parameters()]
    results = call()
    flat = [results[0], *results[1], results[2]]
    torch.manual_seed(1)
    total = sum((t * torch.randn_like(t)).sum() for t in flat)
    return flat, torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


@pytest.mark.parametrize("options", EACH + PAIRS + SEVERAL, ids=lambda options: "-".join(options) or "none")
def test_options_against_a_loop(options):
    module = eval_module(**options)
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64, requires_grad=True)
    hx = tuple(s.requires_grad_() for s in random_state(module, BATCH))
    for given in ({}, {"reset": torch.rand(STEPS, BATCH) < 0.4, "lengths": torch.tensor([4, 1, 3])}):
        expected, expected_gradients = gradients(module, lambda: loop(module, x, hx, **given), x, hx)  # noqa: B023
        got, got_gradients = gradients(module, lambda: module(x, hx, **given, return_cells=True), x, hx)  # noqa: B023
        torch.testing.assert_close(got, expected)
        torch.testing.assert_close(got_gradients, expected_gradients)


def test_cells_are_laid_out_as_the_output():
    module = eval_module(bidirectional=True, proj_size=4)
    x, lengths = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64), torch.tensor([2, 4, 1])
    output, _, cells = module(x, lengths=lengths, return_cells=True)
    assert output.shape == (STEPS, BATCH, 8) and cells.shape == (STEPS, BATCH, 12)
    packed = pack_padded_sequence(x, lengths, enforce_sorted=False)
    torch.testing.assert_close(pad_packed_sequence(module(packed, return_cells=True)[2])[0], cells)
    torch.testing.assert_close(module(x[:, 1], return_cells=True)[2], cells[:, 1])
    module.batch_first = True
    torch.testing.assert_close(module(x.transpose(0, 1), lengths=lengths, return_cells=True)[2], cells.transpose(0, 1))
    assert len(module(x.transpose(0, 1))) == 2


def test_parameters_of_options():
    options = {"peephole": True, "layer_norm": True, "output_gate": "cell", "learned_reset": True}
    torch.manual_seed(3)
    theirs = torch.nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=4)
    torch.manual_seed(3)
    ours = nn.LSTM(INPUT, HIDDEN, 2, bidirectional=True, proj_size=4, **options)
    names, added = list(theirs.state_dict()), len(ours.state_dict()) - len(theirs.state_dict())
    assert list(ours.state_dict())[: len(names)] == names and added == 4 * 6
    assert all(torch.equal(p, ours.state_dict()[name]) for name, p in theirs.state_dict().items())
    missing = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert not missing.unexpected_keys and len(missing.missing_keys) == added
    shapes = {"weight_peephole": (3, 6), "norm_weight": (54,), "norm_bias": (54,), "weight_co": (6, 6), "reset_h": (4,), "reset_c": (6,)}
    for name, shape in shapes.items():
        assert all(getattr(ours, name + suffix).shape == shape for suffix in ("_l0", "_l0_reverse", "_l1", "_l1_reverse"))
    assert ours.norm_weight_l1.eq(1).all() and ours.norm_bias_l1.eq(0).all() and ours.reset_c_l0.eq(0).all()
    assert 0 < ours.weight_peephole_l0.abs().max() <= 6**-0.5 and 0 < ours.weight_co_l0.abs().max() <= 6**-0.5
    assert [len(weights) for weights in ours.all_weights] == [11] * 4
    assert repr(ours).endswith("bidirectional=True, peephole=True, layer_norm=True, output_gate='cell', learned_reset=True)")
    assert len(ours.double()._flat_weights) == len(list(ours.parameters()))


def test_options_at_their_defaults_change_nothing():
    theirs, ours = twins("LSTM", INPUT, HIDDEN, 2)
    options = dict(peephole=False, zoneout=(0, 0), recurrent_dropout=0, num_heads=1, recompute=False, learned_reset=False)
    again = nn.LSTM(INPUT, HIDDEN, 2, dtype=torch.float64, **options)
    again.load_state_dict(theirs.state_dict())
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    assert repr(again) == repr(theirs)
    torch.testing.assert_close(with_gradients(again, x), with_gradients(ours, x), rtol=0, atol=0)


def test_zoneout_and_recurrent_dropout_follow_the_mode():
    module = make("LSTM", INPUT, 64, 2, zoneout=0.5, recurrent_dropout=0.5)
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    assert module.zoneout == (0.5, 0.5)
    torch.manual_seed(1)
    first, _, cells = module(x, return_cells=True)
    torch.manual_seed(1)
    assert torch.equal(module(x)[0], first) and not torch.equal(module(x)[0], first)
    kept = (first[1:] == first[:-1]).double().mean(), (cells[1:] == cells[:-1]).double().mean()
    assert all(0.4 < share < 0.6 for share in kept)
    module.eval()
    assert torch.equal(module(x)[0], module(x)[0])
    without = make("LSTM", INPUT, 64, 2, zoneout=0.5)
    without.load_state_dict(module.state_dict())
    assert torch.equal(module(x)[0], without.eval()(x)[0])


def test_randomness_is_replayed_in_backward():
    module = make("LSTM", INPUT, 4, 2, zoneout=(0.4, 0.3), recurrent_dropout=0.3, recompute=True)
    x = torch.randn(3, 2, INPUT, dtype=torch.float64, requires_grad=True)

    def call(x):
        torch.manual_seed(7)
        return module(x)[0]

    assert torch.autograd.gradcheck(call, (x,))


def test_everything_at_once_to_the_second_order():
    module = make("LSTM", 2, 4, **{**OPTIONS, "proj_size": 2, "recurrent_dropout": 0.3})
    names, leaves = zip(*module.named_parameters())  # random below: layer norm of a state of zeros has no finite differences
    kwargs = {"reset": torch.tensor([[False, True], [True, False]]), "lengths": torch.tensor([2, 1]), "return_cells": True}

    def call(x, h, c, *weights):
        torch.manual_seed(3)
        output, state, cells = torch.func.functional_call(module, dict(zip(names, weights)), (x, (h, c)), kwargs)
        return output, *state, cells

    inputs = [torch.randn(2, 2, 2, dtype=torch.float64), *random_state(module, 2)]
    inputs = [t.requires_grad_() for t in inputs] + [torch.randn_like(p).requires_grad_() for p in leaves]
    assert torch.autograd.gradcheck(call, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, inputs, fast_mode=True)


def test_everything_at_once_compiles_into_one_graph():
    module = make("LSTM", INPUT, HIDDEN, 2, **OPTIONS)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    x = torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    kwargs = {"reset": torch.rand(STEPS, BATCH) < 0.4, "lengths": torch.tensor([4, 1, 3]), "return_cells": True}
    assert not torch.equal(compiled(x, **kwargs)[0], compiled(x, **kwargs)[0])
    module.eval()
    for found in zip(with_gradients(module, x, **kwargs), with_gradients(compiled, x, **kwargs), strict=True):
        torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"zoneout": 1.5}, ValueError, r"zoneout: expected a number in \[0, 1\]"),
        ({"zoneout": (0.1, 0.1, 0.1)}, TypeError, "zoneout: expected a pair"),
        ({"zoneout": "0.1"}, TypeError, "zoneout: expected a pair"),
        ({"recurrent_dropout": 1.0}, ValueError, r"recurrent_dropout: expected a number in \[0, 1\)"),
        ({"recurrent_dropout": "half"}, TypeError, "recurrent_dropout: expected a number"),
        ({"output_gate": "both"}, ValueError, "output_gate: expected one of 'standard', 'cell'"),
        ({"peephole": 1}, TypeError, "peephole: expected True or False"),
        ({"num_heads": 0}, ValueError, "num_heads: expected a positive integer"),
        ({"num_heads": 3, "proj_size": 4}, ValueError, "num_heads: expected a divisor of hidden_size=6"),
    ],
)
def test_errors(options, error, match):
    with pytest.raises(error, match=f"LSTM: {match}"):
        nn.LSTM(INPUT, HIDDEN, **options)


def test_errors_of_a_call():
    module, x = make("LSTM", INPUT, HIDDEN), torch.randn(STEPS, BATCH, INPUT, dtype=torch.float64)
    with pytest.raises(TypeError, match="LSTM: reset_state: expected a pair, got one tensor"):
        module(x, reset=torch.ones(STEPS, BATCH, dtype=torch.bool), reset_state=torch.zeros(1, BATCH, HIDDEN))
