"""nn.HopfieldRetrieval: its formula, retrieval of stored patterns, layers of their own patterns, masks, bad arguments."""

import math

import pytest
import torch

import memkernels as mk


def plain(layer, x, stored, mask=None):
    query, key, value = (
        f(t).unflatten(-1, (layer.num_heads, -1)).transpose(1, 2)
        for f, t in zip((layer.query, layer.key, layer.value), (x, stored, stored))
    )
    hidden = None if mask is None else ~mask[:, None, None]
    for step in range(layer.steps):
        scores = layer.beta * query @ key.mT
        weights = torch.softmax(scores if hidden is None else scores.masked_fill(hidden, -torch.inf), -1)
        query = weights @ (value if step + 1 == layer.steps else key)
    return layer.output(query.transpose(1, 2).flatten(2)), weights


@pytest.mark.parametrize("own", [False, True])
def test_is_its_formula(own):
    torch.manual_seed(0)
    layer = mk.nn.HopfieldRetrieval(6, 4, patterns=7 if own else None, num_heads=2, output_size=5, steps=3, dtype=torch.float64)
    x, stored = torch.randn(3, 5, 6, dtype=torch.float64), torch.randn(3, 7, 4, dtype=torch.float64)
    mask = torch.tensor([True, True, False, True, True, True, False])
    found = layer(x, None if own else stored, mask if own else mask.expand(3, -1), return_weights=True)
    wanted = plain(layer, x, layer.patterns.expand(3, -1, -1) if own else stored, mask.expand(3, -1))
    for a, b in zip(found, wanted):
        torch.testing.assert_close(a, b)
    assert found[1].shape == (3, 2, 5, 7)
    ours = torch.autograd.grad(found[0].square().sum(), list(layer.parameters()))
    theirs = torch.autograd.grad(wanted[0].square().sum(), list(layer.parameters()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b)


def test_retrieves_what_was_stored():
    """From half of a pattern the rest comes back; a query at rest needs no more steps."""
    torch.manual_seed(0)
    patterns = torch.randn(1, 20, 64)
    cue = patterns.clone()
    cue[..., 32:] = 0
    found = mk.hopfield_retrieve(cue, patterns, beta=1.0, steps=5)
    assert (found - patterns).abs().max() < 1e-3
    early = mk.hopfield_retrieve(cue, patterns, beta=1.0, steps=50, tolerance=1e-2)
    torch.testing.assert_close(early, found, rtol=1e-3, atol=1e-3)


def test_beta_as_a_parameter():
    torch.manual_seed(0)
    query, key, beta = torch.randn(2, 3, 4), torch.randn(2, 5, 4), torch.tensor(0.7, requires_grad=True)
    mk.hopfield_retrieve(query, key, beta=beta, steps=3).square().sum().backward()
    each = torch.full((2, 3), 0.7, requires_grad=True)
    mk.hopfield_retrieve(query, key, beta=each, steps=3).square().sum().backward()
    torch.testing.assert_close(beta.grad, each.grad.sum())


def test_few_queries_over_many_patterns():
    """The patterns of each step are shared out among the threads."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 3, 16), torch.randn(2, 9000, 16), torch.randn(2, 9000, 8)
    args = dict(beta=0.5, steps=3, tolerance=1e-3)
    found = mk.hopfield_retrieve(query, key, value=value, **args)
    with mk.backend("reference"):
        wanted = mk.hopfield_retrieve(query.double(), key.double(), value=value.double(), **args)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-5)


def masked(batch, own):
    layer = mk.nn.HopfieldRetrieval(4, num_heads=2, patterns=3 if own else None)
    return layer(torch.ones(2, 2, 4), None if own else torch.ones(2, 3, 4), torch.ones(batch, 3, dtype=torch.bool))


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mk.nn.HopfieldRetrieval(4, num_heads=0), "HopfieldRetrieval: num_heads"),
        (lambda: mk.nn.HopfieldRetrieval(4)(torch.ones(1, 2, 4)), "HopfieldRetrieval: stored: expected patterns, got NoneType"),
        (lambda: mk.nn.HopfieldRetrieval(4, patterns=3)(torch.ones(1, 2, 4), torch.ones(1, 2, 4)), "stored: expected None"),
        (lambda: mk.nn.HopfieldRetrieval(4)(torch.ones(1, 2, 4), torch.ones(2, 2, 4)), r"stored: expected \[B N S\] with B=1, S=4"),
        (lambda: mk.nn.HopfieldRetrieval(4)(torch.ones(2, 4), None), r"input: expected \[B T I\] with I=4"),
        (lambda: mk.nn.HopfieldRetrieval(4, beta=math.inf), "HopfieldRetrieval: beta: expected a finite number, got inf"),
        (lambda: mk.nn.HopfieldRetrieval(4, tolerance=-1.0), "HopfieldRetrieval: tolerance: expected a number from 0 on"),
        (
            lambda: mk.hopfield_retrieve(torch.ones(1, 2, 4), torch.ones(1, 3, 4), beta=1.0, tolerance=float("nan")),
            "tolerance: expected .*nan",
        ),
        (lambda: masked(2, own=True), r"HopfieldRetrieval: mask: expected shape \(3,\), .* got shape \(2, 3\)"),  # as many heads as entries
        (lambda: masked(1, own=False), r"HopfieldRetrieval: mask: expected shape \(2, 3\), .* got shape \(1, 3\)"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
