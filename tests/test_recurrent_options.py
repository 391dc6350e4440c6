"""Options of recurrent layers drawn at random, their random masks, and layers of nn under torch.func and autocast."""

import itertools
import random
from dataclasses import replace

import pytest
import torch
from cases import DTYPES, INTERPRETED, Case, places
from checks import same_bits, threads
from flat import of_tensors
from torch.func import functional_call, grad, jvp, stack_module_state, vjp, vmap

import memkernels as mk
from memkernels.testing import compare, inputs, specs
from memkernels.testing.recurrent import BIAS, first_step, learned, ragged
from memkernels.testing.spec import Sample
from tests.recurrent import flat, random_state

pytestmark = [pytest.mark.timeout(300), pytest.mark.skipif(INTERPRETED, reason="needs float64, which Triton kernels do not take")]
BACKENDS = [label for label, device in places("best") if device == "cpu"]
backends = pytest.mark.parametrize("backend", BACKENDS)


def drawn_sample(op, seed):
    """Any options at once: each is there in half of the samples."""
    chance = random.Random(f"{op} {seed}")
    some = lambda: chance.random() < 0.5  # noqa: E731
    heads = chance.choice((1, 1, 2, 3))
    dims = dict(T=chance.choice((2, 3)), B=2, I=2, H=heads * chance.choice((1, 2)) if heads > 1 else 3)
    options, present = dict(reverse=some(), num_heads=heads), [n for n in (*BIAS, "lengths") if some()]
    states = ("reset_h", "reset_c") if op == "lstm" else ("reset_state",)
    twists = [ragged] if "lengths" in present else []
    present += ["norm_weight", "norm_bias"] if op == "lstm" and some() else []
    if some():  # layer norm of a state of zeros has no finite differences
        present += ["reset", *(states if some() or "norm_weight" in present else ())]
        if states[0] in present:
            twists += chance.choice(([], [first_step(*states)], [learned(*states)]))
    if op == "rnn":
        options["nonlinearity"] = chance.choice(("tanh", "relu"))
    else:
        options["recompute"] = some()
    width = dims["H"]
    if op == "lstm":
        options["return_cells"] = some()
        present += ["peephole"] if some() else []
        if some():
            present, options["output_gate"] = [*present, "weight_co"], "cell"
        if some():
            present.append("weight_hr")
            dims["HP"] = width = heads * chance.choice((1, 2))
        if some():
            options.update(zoneout=(chance.choice((0.0, 0.4)), 0.3), recurrent_dropout=chance.choice((0.0, 0.3)), training=some())
            present += ["seed"] if options["training"] else []
    dims["HPD" if op == "lstm" else "HD"] = width // heads
    twist = (lambda tensors: {k: v for change in twists for k, v in change(tensors).items()}) if twists else None
    return Sample(f"drawn_{seed}", dims, options, tuple(present), twist)


COUNTS = (("lstm", 16, 24), ("gru", 4, 6), ("rnn", 4, 6))  # in `make test`, and in all
DRAWN = [pytest.param(op, seed, marks=[pytest.mark.slow] if seed >= short else []) for op, short, count in COUNTS for seed in range(count)]


@backends
@pytest.mark.parametrize(("op", "seed"), DRAWN)
def test_any_options_together(op, seed, backend):
    """Values and gradients are the formula's, and the gradient of a gradient is right."""
    case = Case(specs()[op], backend, torch.float64, drawn_sample(op, seed))
    if case.reason() is not None:  # the call goes to the reference, as any user's does
        case = Case(case.spec, "reference", torch.float64, case.sample)
    given = case.inputs()
    upstream = lambda outputs: inputs.upstream(outputs, torch.float64)  # noqa: E731
    found = case.evaluate(given)
    wanted = compare.evaluate(replace(case.spec, function=case.spec.peers["eager"]), given, case.options, upstream)
    for name, t in wanted.items():
        torch.testing.assert_close(found[name], t, rtol=1e-7, atol=1e-9)
    function, tensors = of_tensors(case, given)
    assert torch.autograd.gradgradcheck(function, tuple(t.requires_grad_() for t in tensors), fast_mode=True)


SEED = torch.tensor([0x0FEDCBA9_87654321])
ZONED = (0.3, 0.15)


def zoned(steps, batch, units=40, **options):
    """Which units keep h, and which keep c, at every step: "steps batch units" twice."""
    generator = inputs.generator("zoneout")
    draw = lambda *size: torch.randn(*size, generator=generator)  # noqa: E731
    weights, h, c = (draw(4 * units, 3), 0.1 * draw(4 * units, units)), draw(1, units), draw(1, units)
    x, state = draw(1, 1, 3).expand(steps, batch, 3), (h.expand(batch, units), c.expand(batch, units))
    output, _, cells = mk.lstm(x, state, *weights, zoneout=ZONED, seed=SEED, return_cells=True, **options)
    before = [torch.cat([s[None], t[:-1]]) for s, t in zip(state, (output, cells))]
    if options.get("reverse"):
        before = [torch.cat([t[1:], s[None]]) for s, t in zip(state, (output, cells))]
    return torch.stack([output == before[0], cells == before[1]])


def dropped(steps, batch, p, units=40, **options):
    """Which units of h' the gates do not see: every state is one, and tanh(W h') is read off a diagonal W."""
    weight = torch.cat([torch.zeros(2 * units, units), torch.eye(units), torch.zeros(units, units)])
    one = torch.ones(batch, units), torch.zeros(batch, units)
    reset = torch.ones(steps, batch, dtype=torch.bool)
    output, _ = mk.lstm(
        torch.zeros(steps, batch, 1), None, torch.zeros(4 * units, 1), weight, reset=reset, reset_state=one, recurrent_dropout=p, **options
    )
    return output == 0


@backends
def test_masks_depend_on_nothing_but_the_seed(backend):
    with compare.using("reference"):
        zones, drops = zoned(12, 9), dropped(12, 9, 0.3, seed=SEED)
    assert zones.any() and drops.any() and torch.equal(drops, drops[:1].expand_as(drops)), "one dropout mask a sequence"
    with compare.using(backend):
        for n, steps, batch in itertools.product((1, 2, 3), (1, 5, 12), (1, 4, 9)):
            with threads(n):
                assert torch.equal(zoned(steps, batch), zones[:, :steps, :batch])
                assert torch.equal(dropped(steps, batch, 0.3, seed=SEED), drops[:steps, :batch])
        assert torch.equal(zoned(12, 9, reverse=True), zones), "a mask belongs to a step of time"
        lengths = torch.tensor([12, 0, 3, 7, 1, 12, 5, 2, 9])
        ragged_zones = zoned(12, 9, lengths=lengths)
        assert all(torch.equal(ragged_zones[:, :n, b], zones[:, :n, b]) for b, n in enumerate(lengths.tolist()))


@backends
def test_masks_follow_torchs_seed(backend):
    found = []
    for label in (backend, "reference"):
        with compare.using(label):
            torch.manual_seed(11)
            found.append([dropped(2, 3, 0.5) for _ in range(2)])
    assert all(torch.equal(*pair) for pair in zip(*found))
    assert not torch.equal(*found[0]), "every call draws anew"


def assert_share(events, p):
    """A share further off than five standard deviations is no draw of luck."""
    assert abs(events.double().mean() - p) < 5 * (p * (1 - p) / events.numel()) ** 0.5


@backends
def test_masks_have_their_rates_and_are_independent(backend):
    with compare.using(backend):
        masks = zoned(50, 20, 64)
        for p in (0.01, 0.3, 0.9):
            drops = dropped(1, 200, p, 64, seed=SEED)
            assert_share(drops, p)
            assert_share(drops[:, 1:] & drops[:, :-1], p * p)
    for mask, p in zip(masks, ZONED):
        assert_share(mask, p)
        for dim in range(3):  # neighbours in time, row and unit
            first, second = mask.narrow(dim, 0, mask.shape[dim] - 1), mask.narrow(dim, 1, mask.shape[dim] - 1)
            assert_share(first & second, p * p)
    assert_share(masks[0] & masks[1], ZONED[0] * ZONED[1])


MODULES = [
    ("LSTM", {}),
    ("LSTM", dict(num_layers=2, bidirectional=True, proj_size=2, peephole=True, layer_norm=True, output_gate="cell", learned_reset=True)),
    ("LSTM", dict(num_layers=2, zoneout=0.2, num_heads=2, recompute=True)),
    ("GRU", {}),
    ("GRU", dict(num_layers=2, bidirectional=True, num_heads=2, learned_reset=True, recompute=True)),
    ("RNN", {}),
    ("RNN", dict(num_layers=2, nonlinearity="relu", learned_reset=True)),
]
modules = pytest.mark.parametrize(("kind", "options"), MODULES, ids=lambda v: "-".join(v) or "plain" if isinstance(v, dict) else v)


def ensemble(kind, options, count, dtype=torch.float64):
    torch.manual_seed(0)
    models = [getattr(mk.nn, kind)(3, 4, dtype=dtype, **options).eval() for _ in range(count)]
    for model in models:
        for p in model.parameters():
            torch.nn.init.uniform_(p, -0.7, 0.7)
    return models


def call_on(model, x):
    """(function of (parameters, x), parameters): outputs of a call with resets and lengths."""
    reset, lengths = torch.rand(x.shape[:2], generator=inputs.generator("reset")) < 0.3, torch.tensor([5, 2, 4])
    return lambda p, x: tuple(flat(functional_call(model, p, (x,), dict(reset=reset, lengths=lengths))))


def dicts_close(found, wanted):
    assert found.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-9, atol=1e-9)


@modules
def test_ensembles_train_as_a_loop_over_models(kind, options):
    """Values and gradients of stacked weights, with one input for all and with one each."""
    models = ensemble(kind, options, 3)
    params, _ = stack_module_state(models)
    params = {name: p.detach() for name, p in params.items()}
    xs = torch.randn(3, 5, 3, 3, dtype=torch.float64)
    function = call_on(models[0], xs[0])
    loss = lambda p, x: sum(t.square().sum() for t in function(p, x))  # noqa: E731
    for dim, batch in ((None, xs[0]), (0, xs)):
        values, found = vmap(function, (0, dim))(params, batch), vmap(grad(loss), (0, dim))(params, batch)
        for i, model in enumerate(models):
            own, x = dict(model.named_parameters()), batch if dim is None else batch[i]
            expected = function(own, x)
            torch.testing.assert_close([v[i] for v in values], list(expected))
            wanted = torch.autograd.grad(loss(own, x), list(own.values()))
            dicts_close({k: v[i] for k, v in found.items()}, dict(zip(own, wanted)))


@modules
def test_forward_mode_is_the_transpose_of_backward(kind, options):
    """u . (J v) equals (J^T u) . v, for parameters and input at once."""
    (model,) = ensemble(kind, options, 1)
    x = torch.randn(5, 3, 3, dtype=torch.float64)
    function, params = call_on(model, x), {k: p.detach() for k, p in model.named_parameters()}
    like = lambda t: torch.randn(t.shape, dtype=t.dtype)  # noqa: E731
    tangents = {k: like(p) for k, p in params.items()}, like(x)
    outputs, pushed = jvp(function, (params, x), tangents)
    torch.testing.assert_close(outputs, function(params, x))
    upstream = tuple(like(t) for t in outputs)
    d_params, d_x = vjp(function, params, x)[1](upstream)
    left = sum((u * t).sum() for u, t in zip(upstream, pushed))
    right = sum((d_params[k] * tangents[0][k]).sum() for k in params) + (d_x * tangents[1]).sum()
    torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


def test_ensembles_draw_different_masks():
    """vmap's randomness="different" gives every model its own zoneout, "same" one for all."""
    model = mk.nn.LSTM(3, 40, zoneout=0.5, recurrent_dropout=0.3)
    x = torch.randn(4, 2, 3).expand(3, 4, 2, 3)
    for randomness in ("different", "same"):
        found = vmap(lambda x: model(x)[0], randomness=randomness)(x)
        assert torch.equal(found[0], found[1]) == (randomness == "same")


@modules
def test_autocast_of_modules_with_options(kind, options):
    """Outputs are bfloat16 and close to float32's; gradients arrive in the parameters' dtype, close as well."""
    (model,) = ensemble(kind, options, 1, torch.float32)
    x, state = torch.randn(5, 3, 3), random_state(model, 3)
    leaves = list(model.parameters())
    results = []
    for on in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=on):
            outputs = flat(model(x, state))
        assert {t.dtype for t in outputs} == {torch.bfloat16 if on else torch.float32}
        loss = sum(t.float().square().mean() for t in outputs)
        results.append([t.float() for t in outputs] + list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)))
    for a, b in zip(*results):
        assert a.dtype == b.dtype == torch.float32
        torch.testing.assert_close(b, a, atol=0.06, rtol=0.06)


@pytest.mark.parametrize("dtype", DTYPES[1:3])
def test_eval_and_training_share_their_bits_where_nothing_is_drawn(dtype):
    """Inference keeps nothing, and returns what training returns."""
    model = mk.nn.LSTM(20, 48, 2, bidirectional=True, peephole=True, layer_norm=True, dtype=dtype)
    x = torch.randn(9, 5, 20, dtype=dtype)
    trained = flat(model(x))
    with torch.no_grad():
        assert all(same_bits(a, b) for a, b in zip(trained, flat(model.eval()(x))))
