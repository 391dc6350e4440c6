"""lstm on the CPU with the options that need whole rows of a step or draw lots, at every level of the CPU's instructions."""

from __future__ import annotations

import pytest
import torch
from checks import threads

import memkernels as mk
from memkernels.backends.reference import _random

_C = pytest.importorskip("memkernels._C")
SEED = torch.tensor([0x1234_5678_9ABC_DEF1])
OPTIONS = {
    "layer_norm": dict(norm=True),
    "cell_gate": dict(co=True, peephole=True),
    "projection": dict(projected=12, num_heads=2, recurrent_dropout=0.3),
    "all": dict(norm=True, co=True, peephole=True, projected=24, num_heads=3, zoneout=(0.2, 0.4), recurrent_dropout=0.3),
}


@pytest.fixture(params=_C.supported_levels())
def level(request):
    _C.set_cpu_level(request.param)
    yield request.param
    _C.set_cpu_level("auto")


def inputs(steps, batch, hidden, norm=False, co=False, peephole=False, projected=None, num_heads=1, dtype=torch.float32, **rest):
    generator, width = torch.Generator().manual_seed(3), projected or hidden

    def draw(*shape):
        values = torch.rand(*shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (values / (shape[-1] ** 0.5 if len(shape) == 2 else 1)).to(dtype).requires_grad_()

    named = dict(
        input=draw(steps, batch, 5), h0=draw(batch, width), c0=draw(batch, hidden), weight_ih=draw(4 * hidden, 5),
        weight_hh=draw(4 * hidden, width // num_heads), bias_ih=draw(4 * hidden),
    )  # fmt: skip
    if norm:
        named |= dict(gamma=draw(9 * hidden), beta=draw(9 * hidden))
    if co:
        named["weight_co"] = draw(hidden, hidden)
    if peephole:
        named["peephole"] = draw(3, hidden)
    if projected:
        named["weight_hr"] = draw(projected, hidden)
    return named, dict(rest, num_heads=num_heads, output_gate="cell" if co else "standard")


def run(named, options, rows=slice(None), backend="cpp"):
    """Output, final state, cells and gradients of the rows."""
    named = dict(named)
    tensors = [named.pop(k) for k in ("input", "h0", "c0", "weight_ih", "weight_hh", "bias_ih")]
    norm = (named.pop("gamma"), named.pop("beta")) if "gamma" in named else None
    x, h0, c0 = tensors[0][:, rows], tensors[1][rows], tensors[2][rows]
    with mk.backend(backend):
        output, (h_n, c_n), cells = mk.lstm(x, (h0, c0), *tensors[3:], layer_norm=norm, seed=SEED, return_cells=True, **named, **options)
        leaves = [x, h0, c0, *tensors[3:], *(norm or ()), *named.values()]
        found = torch.autograd.grad(output.sum() + cells.sin().sum(), leaves)
    return (output, h_n, c_n, cells, *found)


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))  # in bfloat16 a new value may round to the old one
def test_zoneout_draws_the_numbers_of_the_reference(level, dtype):
    steps, batch, hidden, p = 5, 3, 37, 0.3
    named, options = inputs(steps, batch, hidden, zoneout=(p, p), dtype=dtype)
    output, _, _, cells = run(named, options)[:4]
    for states, first, stream in ((output, named["h0"], _random.ZONEOUT_H), (cells, named["c0"], _random.ZONEOUT_C)):
        kept = states == torch.cat([first[None], states[:-1]])
        assert torch.equal(kept, _random.events(SEED, stream, p, steps, batch, hidden))


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_bits_do_not_depend_on_threads(level, name, dtype):
    named, options = inputs(9, 5, 48, dtype=dtype, **OPTIONS[name])
    with threads(1):
        expected = run(named, options)
    for count in (2, 3):
        with threads(count):
            assert same(run(named, options), expected)


@pytest.mark.parametrize("name", OPTIONS)
def test_a_row_does_not_see_the_batch(level, name):
    named, options = inputs(7, 19, 48, **OPTIONS[name])
    whole, part = run(named, options), run(named, options, slice(0, 4))
    assert same(part[:4], [whole[0][:, :4], whole[1][:4], whole[2][:4], whole[3][:, :4]])
    assert same(part[4:7], [whole[4][:, :4], whole[5][:4], whole[6][:4]])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("rest", ({}, {"reverse": True}, {"lengths": True}, {"num_heads": 2}))
def test_recompute_rebuilds_the_same_bits(level, dtype, rest):
    named, options = inputs(70, 7, 48, dtype=dtype, num_heads=rest.get("num_heads", 1))
    options |= {k: torch.arange(70, 0, -10) if k == "lengths" else v for k, v in rest.items()}
    expected = run(named, options)
    found = run(named, options | {"recompute": True})
    if dtype == torch.float32 or level == "amx":  # elsewhere the hidden state enters the next step unrounded
        assert same(found, expected)
    else:
        assert all(torch.allclose(a, b, rtol=0.1, atol=0.05) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", OPTIONS)
def test_recompute_with_options(level, name):
    named, options = inputs(30, 4, 48, dtype=torch.float64, **OPTIONS[name])
    for a, b in zip(run(named, options | {"recompute": True}), run(named, options), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", OPTIONS)
def test_heads_wider_than_a_block_of_sums(level, name):
    """128 terms are summed at a time: where a head has more, the parts of its gates are joined block by block."""
    options = OPTIONS[name] | dict(num_heads=2) | (dict(projected=264) if "projected" in OPTIONS[name] else {})
    named, options = inputs(3, 2, 266, dtype=torch.float64, **options)
    for found, wanted in zip(run(named, options), run(named, options, backend="reference"), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


def test_a_steep_norm_of_the_cells_in_bfloat16(level):
    """It multiplies what the gates lost: they are computed as accurately as if nothing were rounded."""
    named, options = inputs(5, 17, 37, norm=True, dtype=torch.bfloat16)
    with torch.no_grad():
        named["gamma"].mul_(20)
    exact = run({k: t.detach().double().requires_grad_() for k, t in named.items()}, options, backend="reference")[0].detach()
    errors = [float((run(named, options, backend=b)[0].detach().double() - exact).abs().max()) for b in ("cpp", "reference")]
    assert errors[0] <= 2 * errors[1]
