"""torch.utils.flop_counter.FlopCounterMode on our ops: as on the eager formula, and as on torch's fused attention."""

import sys
import types

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

import memkernels as mk
from memkernels import _flops, _registry
from memkernels.testing import inputs, specs

# Of each op a sample whose eager formula does the same products: no einsum of a head of width 1, no product for a norm alone.
EXACT = {
    "content_address": "typical",
    "content_read": "odd",
    "dnc_sequence": "options",
    "gru": "heads",
    "hopfield_retrieve": "typical",
    "link_read": "odd",
    "link_step": "typical",
    "lstm": "output_gate",
    "memory_read": "typical",
    "memory_write": "heads",
    "ntm_sequence": "heads",
    "rnn": "typical",
}
FORWARD = {"product_key_search": "typical", "topk_read": "cosine"}  # their backward multiplies the chosen rows only


def count(function):
    with FlopCounterMode(display=False) as counter:
        found = function()
    return counter.get_total_flops(), found


def counts(spec, sample, function, needed=None):
    """Flops of forward and of backward to the inputs that are needed, by default all."""
    given = inputs.draw(spec, sample, torch.float64)
    for name, tensor in given.items():
        if tensor is not None and tensor.is_floating_point() and (needed is None or name in needed):
            given[name] = tensor.detach().requires_grad_()
    forward, outputs = count(lambda: spec.call(function, given, dict(sample.options)))
    total = sum(o.sum() for o in inputs.tensors_of(outputs) if o.requires_grad)
    return forward, count(total.backward)[0]


@pytest.mark.parametrize("name", [*EXACT, *FORWARD])
def test_as_the_eager_formula(name):
    spec = specs()[name]
    sample = spec.sample({**EXACT, **FORWARD}[name])
    found, wanted = (counts(spec, sample, f) for f in (spec.function, spec.peers["eager"]))
    assert found[0] == wanted[0] > 0
    assert found[1] == wanted[1] if name in EXACT else 0 < found[1] <= wanted[1]
    assert spec.flops(sample) == found


@pytest.mark.parametrize("needed", ["weight_ih", "input", "weight_hh h0"])
def test_gradients_that_nobody_needs(needed):
    """What eager leaves out of backward is not counted. (Of a state that needs none, eager leaves out the first step alone.)"""
    spec = specs()["rnn"]
    found, wanted = (counts(spec, spec.sample("typical"), f, needed.split()) for f in (spec.function, spec.peers["eager"]))
    assert found == (wanted[0], wanted[1] + 2 * 2 * 4 * 4 * ("h0" not in needed))


SHAPES = {
    "causal": ((2, 3, 5, 4), (2, 3, 5, 4), (2, 3, 5, 4)),
    "wide value": ((2, 3, 5, 4), (2, 3, 7, 4), (2, 3, 7, 6)),
    "groups": ((1, 6, 5, 4), (1, 2, 7, 4), (1, 2, 7, 4)),
    "one head": ((1, 1, 5, 4), (1, 1, 7, 4), (1, 1, 7, 4)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_attention_as_torch_counts_it(name):
    shapes = SHAPES[name]
    tensors = [torch.randn(s[2 * (name == "one head") :], requires_grad=True) for s in shapes]
    forward, out = count(lambda: mk.attention(*tensors, is_causal=name == "causal", enable_gqa=name == "groups"))
    shapes = [(s[0], shapes[0][1], *s[2:]) for s in shapes]  # a group's heads count one by one; torch 2.11 knows no groups
    assert forward == sdpa_flop_count(*shapes)
    wanted = sdpa_backward_flop_count((*shapes[0][:3], shapes[2][3]), *shapes)
    assert count(lambda: torch.autograd.grad(out.sum(), tensors, retain_graph=True))[0] == wanted
    assert count(lambda: torch.autograd.grad(out.sum(), tensors[0]))[0] == wanted  # torch counts all gradients of one kernel


def test_attention_of_sequences():
    """By the lengths of the sequences where they are known, of equal ones on a device without values."""
    tensors, ends = torch.randn(3, 20, 2, 16), torch.tensor([0, 5, 20])
    assert count(lambda: mk.attention_varlen(*tensors, ends, ends))[0] == 4 * 2 * 16 * (5 * 5 + 15 * 15)
    assert count(lambda: mk.attention_varlen(*tensors.to("meta"), ends.to("meta"), ends.to("meta")))[0] == 4 * 2 * 16 * 200
    pages, table, lengths = torch.randn(2, 6, 4, 1, 8), torch.zeros(2, 3, dtype=torch.long), torch.tensor([5, 9])
    assert count(lambda: mk.paged_attention(torch.randn(2, 2, 3, 8), *pages, table, lengths))[0] == 4 * 2 * 3 * 8 * (5 + 9)
    edges, ptr = torch.randint(6, (17,)), torch.tensor([0, 3, 17])
    assert count(lambda: mk.segment_attention(torch.randn(2, 2, 8), *torch.randn(2, 6, 2, 8), ptr, edges))[0] == 4 * 17 * 2 * 8


@pytest.mark.parametrize("name", ["attention", "attention_varlen", "retrieval_attention", "segment_attention", "topk_read", "lstm"])
def test_sizes_stay_symbols(name):
    """Counting in a trace with symbolic sizes, as the partitioner does, fixes none of them."""
    spec, mode = specs()[name], FakeTensorMode(shape_env=ShapeEnv())
    given = inputs.draw(spec, spec.samples[0], torch.float32)
    free = {key: StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * t.dim()) for key, t in given.items() if t is not None}
    given = {key: mode.from_tensor(t, symbolic_context=free[key]) for key, t in given.items() if t is not None}
    with mode:
        total = count(lambda: spec.call(spec.function, given, dict(spec.samples[0].options)))[0]
    fixed = {str(symbol): str(size) for symbol, size in mode.shape_env.replacements.items() if size.is_number}
    assert isinstance(total, torch.SymInt) and not fixed


def test_modules():
    """Per module, and the same compiled: torch.compile calls the ops by name."""
    layer, x = torch.nn.Sequential(mk.nn.GRU(6, 5)), torch.randn(7, 2, 6)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert counter.get_flop_counts()["Sequential.0"] == {torch.ops.memkernels.gru: 2 * 7 * 2 * 15 * (6 + 5)}
    compiled = torch.compile(lambda m, w: mk.memory_read(m, weights=w), backend="eager")
    given = torch.randn(1, 3, 4), torch.randn(1, 2, 3)
    assert count(lambda: compiled(*given))[0] == count(lambda: mk.memory_read(*given))[0] == 2 * 2 * 3 * 4
    by_name = torch.ops.memkernels.memory_read
    assert count(lambda: by_name(given[0], weights=given[1]))[0] == 48
    written = given[0], given[1], torch.rand(1, 2, 4), torch.rand(1, 2, 4)
    assert count(lambda: mk.memory_write_(*written))[0] == count(lambda: mk.memory_write(*written))[0] == 48


def test_every_op_with_products_is_counted():
    from torch.utils.flop_counter import flop_registry

    without = {"allocation", "gru_gates", "location_address", "lstm_gates", "merge_attention", "usage", "weighted_bag"}
    for name in _registry.OPS:
        for packet in (name, f"{name}_backward"):
            assert (getattr(torch.ops.memkernels, packet) in flop_registry) == (name not in without)


def test_formulas_wait_for_the_counter(monkeypatch, tmp_path):
    """`import memkernels` does not import torch's counter; a counter that is imported later has the formulas."""
    (tmp_path / "late_counter.py").write_text("found = []\ndef register_flop_formula(packet, get_raw):\n    return found.append\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(_flops, "COUNTER", "late_counter")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    packet = torch.ops.memkernels.memory_read
    for formula in (min, max):
        _flops.register(packet, formula)
        _flops.register(torch.ops.memkernels.memory_write, formula)
        import late_counter

        assert isinstance(late_counter, types.ModuleType)
    assert len(late_counter.found) == 4 and not _flops._formulas
    sys.modules.pop("late_counter")
