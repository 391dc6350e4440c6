"""What recurrent layers promise beyond one call of the specs: long sequences, drift, the cost of ragged rows, resets, memory."""

import functools

import checks
import pytest
import torch
from cases import DTYPES, INTERPRETED, Case, places

import memkernels as mk
from memkernels.bench.memory import saved_bytes
from memkernels.testing import compare, inputs, specs
from memkernels.testing.recurrent import BIAS, spread
from memkernels.testing.spec import Sample

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(INTERPRETED, reason="long sequences, and float64, which Triton does not take")]
OPS = ("lstm", "gru", "rnn")
KERNELS, BEST = ([label for label, device in places(levels) if device == "cpu" and label != "reference"] for levels in ("all", "best"))
STATES = {"lstm": ("h0", "c0"), "gru": ("h0",), "rnn": ("h0",)}
RESET_STATES = {"lstm": ("reset_h", "reset_c"), "gru": ("reset_state",), "rnn": ("reset_state",)}
LONG = 70_000  # more than 65,535, what 16 bits hold
ops = pytest.mark.parametrize("op", OPS)
kernels = pytest.mark.parametrize("backend", KERNELS)


def case_of(op, backend, dtype, dims, present=(), twist=None, **options):
    return Case(specs()[op], backend, dtype, Sample("one", dims, options, (*BIAS, *present), twist), "cpu")


def grads_of(given, names, outputs, upstream):
    return dict(zip(names, torch.autograd.grad(outputs, [given[n] for n in names], upstream)))


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("backend", BEST)
@ops
def test_more_steps_than_16_bits_count(op, backend, dtype):
    """One call of 70,000 steps equals seven that hand their state on, outputs and gradients."""
    case = case_of(op, backend, dtype, dict(T=LONG, B=1, I=3, H=4))
    given = {n: t if t is None else t.requires_grad_() for n, t in case.inputs().items()}
    names = case.differentiable(given)
    output, *final = case.call(given)
    upstream = inputs.upstream([output, *final], dtype)
    whole = grads_of(given, names, [output, *final], upstream)
    states, pieces = [given[n] for n in STATES[op]], []
    for part in given["input"].split(LONG // 7):
        piece, *states = case.call({**given, "input": part, **dict(zip(STATES[op], states))})
        pieces.append(piece)
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close([torch.cat(pieces), *states], [output, *final], **tolerance)
    chunked = grads_of(given, names, [torch.cat(pieces), *states], upstream)
    for name in names:
        torch.testing.assert_close(chunked[name], whole[name], rtol=tolerance["rtol"], atol=tolerance["atol"] * LONG**0.5)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES[1:3])
@kernels
@ops
def test_drift(op, backend, dtype):
    """Over 16,384 steps the root mean square error of any quarter is at most 1.2 times the reference's in the same dtype."""
    found, plain, exact = (
        _long_run(op, label, dtype, wide) for label, wide in ((backend, False), ("reference", False), ("reference", True))
    )
    for name in ("output 0", "d input"):
        for quarter in range(4):
            mine, theirs = ((run[name] - exact[name]).chunk(4)[quarter].square().mean().sqrt().item() for run in (found, plain))
            assert mine <= 1.2 * theirs, f"{name}, quarter {quarter}: {mine:.3g} against {theirs:.3g}"


@functools.cache
def _long_run(op, backend, dtype, wide):
    case = case_of(op, backend, dtype, dict(T=16_384, B=2, I=8, H=24))
    given = case.inputs()
    if wide:
        given = {n: t if t is None or not t.is_floating_point() else t.double() for n, t in given.items()}
    return {n: t.double() for n, t in case.evaluate(given).items()}


@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize("full", [1, 15, 16, 17, 18])
@kernels
@ops
def test_steps_that_leave_the_last_rows_of_a_tile_empty(op, backend, full, dtype):
    """Ragged rows have the bits of full ones, whichever rows of a kernel's tiles run out first."""
    batch = 48
    case = case_of(op, backend, dtype, dict(T=2, B=batch, I=5, H=200))
    if case.reason() is not None:
        pytest.skip(case.reason())
    given = case.inputs()
    lengths = torch.tensor([2] * full + [1] * (batch - full))
    ragged, whole = case.call({**given, "lengths": lengths})[0], case.call(given)[0]
    assert torch.equal(ragged[0], whole[0]) and torch.equal(ragged[1, :full], whole[1, :full])


@pytest.mark.parametrize("dtype", DTYPES[1:])
@kernels
def test_relu_finds_the_units_above_zero(backend, dtype):
    """Of many units some are nearly zero: one that a kernel takes for zero, or the other way round, is an error of a whole gradient."""
    sample = Sample("relu_wide", dict(T=20, B=16, I=33, H=130), dict(nonlinearity="relu"), BIAS)
    rows = compare.measure(specs()["rnn"], sample, dtype, backend)
    assert not [row.reason for row in rows if row.status != "ok"]


@pytest.mark.parametrize("backend", [*KERNELS, "reference"])
def test_relu_is_dead_where_torchs_is(backend):
    """A weight that is NaN makes gradients NaN, an infinite gradient at a unit that is 0 does not: as in torch.nn.RNN."""
    torch.manual_seed(0)
    for weight, upstream in ((torch.nan, 1.0), (-9.0, torch.inf)):
        theirs = torch.nn.RNN(3, 20, nonlinearity="relu")
        with torch.no_grad():
            theirs.weight_hh_l0[1, 1] = weight
            theirs.bias_ih_l0[2] = -99.0
        ours = mk.nn.RNN(3, 20, nonlinearity="relu")
        ours.load_state_dict(theirs.state_dict())
        x, up = torch.randn(5, 2, 3), torch.ones(5, 2, 20)
        up[:, :, 2] = upstream
        theirs(x)[0].backward(up)
        with compare.using(backend):
            ours(x)[0].backward(up)
        for (name, mine), other in zip(ours.named_parameters(), theirs.parameters()):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-4, equal_nan=True, msg=lambda m, name=name: f"{name}: {m}")


@kernels
def test_relu_is_dead_at_zero_where_denormal_numbers_are_flushed(backend):
    case = case_of("rnn", backend, torch.float32, dict(T=5, B=2, I=3, H=20), nonlinearity="relu")
    given = case.inputs()
    given["weight_ih"][3], given["weight_hh"][3] = 0, 0
    given["bias_ih"][3] = given["bias_hh"][3] = -1
    found = []
    try:
        for flush in (False, True):
            torch.set_flush_denormal(flush)
            found.append(case.evaluate(given))
    finally:
        torch.set_flush_denormal(False)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, msg=lambda m, name=name: f"{name}: {m}")
    assert not found[1]["d bias_ih"][3]


RAGGED = {
    "lstm": [((), {}), (("reset", "reset_h", "reset_c", "peephole", "norm_weight", "norm_bias"), dict(reverse=True, return_cells=True))],
    "gru": [((), {}), (("reset", "reset_state"), dict(reverse=True))],
    "rnn": [((), {}), (("reset", "reset_state"), dict(reverse=True, nonlinearity="relu"))],
}


@pytest.mark.parametrize("dtype", DTYPES[1:3])
@pytest.mark.parametrize(("op", "present", "options"), [(op, *variant) for op in OPS for variant in RAGGED[op]])
@pytest.mark.parametrize("backend", BEST)
def test_a_ragged_row_is_that_row_alone(backend, op, present, options, dtype):
    """To the last bit what the row gives by itself, as long as it is, without lengths: values and gradients, weights' summed."""
    case = case_of(op, backend, dtype, dict(T=40, B=9, I=20, H=48), (*present, "lengths"), spread, **options)
    given = {n: t if t is None or not t.is_floating_point() else t.requires_grad_() for n, t in case.inputs().items()}
    names = case.differentiable(given)
    by_row = [n for n in names if n.startswith(("input", "reset", *STATES[op]))]
    outputs = case.call(given)
    upstream = inputs.upstream(outputs, dtype)
    whole = grads_of(given, names, outputs, upstream)
    over_time = ("input", *RESET_STATES[op], "reset")
    for b, length in enumerate(given["lengths"].tolist()):
        row, steps = slice(b, b + 1), slice(0, length)
        own = {n: t.detach() if torch.is_tensor(t) else t for n, t in given.items()}
        own = {n: t if t is None else t[steps, row] if n in over_time else t[row] if n in STATES[op] else t for n, t in own.items()}
        own = {n: t.clone().requires_grad_() if n in names else t for n, t in own.items()} | {"lengths": None}
        alone = case.call(own)
        cut = [t[steps, row] if t.dim() == 3 else t[row] for t in outputs]
        assert all(checks.same_bits(a, c) for a, c in zip(alone, cut, strict=True)), f"values of row {b}, {length} steps"
        found = grads_of(own, by_row, alone, [g[steps, row] if g.dim() == 3 else g[row] for g in upstream])
        for name in by_row:
            expected = whole[name][steps, row] if name in over_time else whole[name][row]
            assert checks.same_bits(found[name], expected), f"d {name} of row {b}, {length} steps"
            assert name not in over_time or not whole[name][length:, row].any()


class Cells:
    """The loop of an agent: one call of our cell a step, the state replaced where an episode starts."""

    def __init__(self, op, weights, relu=False):
        name = {"lstm": "LSTMCell", "gru": "GRUCell", "rnn": "RNNCell"}[op]
        extra = {"nonlinearity": "relu"} if relu else {}
        self.cell = getattr(mk.nn, name)(5, 6, dtype=torch.float64, **extra)
        self.weights = weights

    def __call__(self, x, states, reset, starts):
        outputs = []
        for t in range(len(x)):
            states = [torch.where(reset[t, :, None], s[t] if s.dim() == 3 else s, old) for s, old in zip(starts, states)]
            given = tuple(states) if len(states) == 2 else states[0]
            new = torch.func.functional_call(self.cell, self.weights, (x[t], given))
            states = list(new) if isinstance(new, tuple) else [new]
            outputs.append(states[0])
        return [torch.stack(outputs), *states]


@pytest.mark.parametrize("shape", [(6,), (4, 6), (30, 4, 6)], ids=["learned", "by_row", "by_step"])
@ops
def test_resets_are_the_agents_loop(op, shape):
    """The whole sequence against one call of nn's cell a step: outputs, and gradients to the states of episodes and all else."""
    generator = inputs.generator("agent", op)
    draw = lambda *size: torch.randn(*size, dtype=torch.float64, generator=generator).requires_grad_()  # noqa: E731
    gates, n = {"lstm": 4, "gru": 3, "rnn": 1}[op], len(STATES[op])
    sizes = {"weight_ih": (gates * 6, 5), "weight_hh": (gates * 6, 6), "bias_ih": (gates * 6,), "bias_hh": (gates * 6,)}
    weights = {name: draw(*size) for name, size in sizes.items()}
    x, states, starts = draw(30, 4, 5), [draw(4, 6) for _ in range(n)], [draw(*shape) for _ in range(n)]
    reset = torch.rand(30, 4, generator=generator) < 0.2
    reset[0] = torch.tensor([True, True, False, False])
    one = lambda found: tuple(found) if n == 2 else found[0]  # noqa: E731
    output, last = getattr(mk, op)(x, one(states), *weights.values(), reset=reset, reset_state=one(starts))
    found, expected = [output, *(last if n == 2 else [last])], Cells(op, weights)(x, states, reset, starts)
    torch.testing.assert_close(found, expected)
    upstream, leaves = inputs.upstream(expected, torch.float64), [x, *states, *starts, *weights.values()]
    torch.testing.assert_close(torch.autograd.grad(found, leaves, upstream), torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_acting_step_by_step_is_the_sequence(kind):
    """What an agent did one step a call, training sees again in one call."""
    torch.manual_seed(0)
    module = getattr(mk.nn, kind)(20, 48, 2, learned_reset=True)
    for name, p in module.named_parameters():
        if name.startswith("reset"):
            torch.nn.init.normal_(p)
    x, reset, state, acted = torch.randn(25, 3, 20), torch.rand(25, 3) < 0.2, None, []
    for t in range(25):
        output, state = module(x[t : t + 1], state, reset=reset[t : t + 1])
        acted.append(output)
    output, last = module(x, reset=reset)
    torch.testing.assert_close(torch.cat(acted), output)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"num_layers": 2}, {"bidirectional": True}])
@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_recompute_saves_little(kind, options, dtype):
    """At most 30% of what torch's module keeps for backward."""
    theirs = getattr(torch.nn, kind)(48, 64, dtype=dtype, **options)
    ours = getattr(mk.nn, kind)(48, 64, dtype=dtype, recompute=True, **options)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(48, 8, 48, dtype=dtype, requires_grad=True)
    mine, needed = (saved_bytes(lambda m=m: m(x), [x, *m.parameters()]) for m in (ours, theirs))
    assert 0 < mine <= 0.3 * needed, f"{mine} of {needed}"


RECOMPUTED = {
    "lstm": ("reset", "reset_h", "reset_c", "lengths", "peephole", "norm_weight", "norm_bias", "seed"),
    "gru": ("reset", "reset_state", "lengths"),
}


def _recomputing():
    """The backends that take recompute, op by op."""
    for op in RECOMPUTED:
        for backend in ("reference", *KERNELS):
            if case_of(op, backend, torch.float64, dict(T=2, B=1, I=1, H=1), recompute=True).reason() is None:
                yield op, backend


@pytest.mark.parametrize("every", [False, True])
@pytest.mark.parametrize(("op", "backend"), list(_recomputing()))
def test_recompute_gives_the_same_gradients(op, backend, every):
    """Over more steps and units than one block of the kernels holds."""
    present, twist = (RECOMPUTED[op], spread) if every else ((), None)
    options = dict(zoneout=(0.2, 0.1), recurrent_dropout=0.1, return_cells=True) if every and op == "lstm" else {}
    found = []
    for recompute in (False, True):
        case = case_of(op, backend, torch.float64, dict(T=130, B=5, I=33, H=66), present, twist, recompute=recompute, **options)
        found.append(case.evaluate(case.inputs()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-9, atol=1e-9)
