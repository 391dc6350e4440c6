"""nn.ProductKeyMemory: its formula, shapes, provenance, training, bad arguments."""

import pytest
import torch
from torch.nn import functional as F

from memkernels import nn


def make(**kwargs):
    torch.manual_seed(0)
    return nn.ProductKeyMemory(6, 5, **{"heads": 2, "subkeys": 7, "k": 4, "key_size": 8, "dtype": torch.float64, **kwargs})


def plain(layer, x):
    """All S * S scores, head by head, in torch ops."""
    query = layer.norm(layer.query(x)).unflatten(-1, (layer.heads, 2, -1))
    halves = torch.einsum("bhpd,hpsd->bhps", query, layer.subkeys)
    scores, index = (halves[:, :, 0, :, None] + halves[:, :, 1, None]).flatten(2).topk(layer.k)
    return torch.einsum("bhk,bhkv->bv", scores.softmax(-1), F.embedding(index, layer.values))


@pytest.mark.parametrize("query_norm", ["batch", "layer", None])
def test_is_its_formula_with_gradients(query_norm):
    layer = make(query_norm=query_norm)
    x = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    leaves = [x, *layer.parameters()]
    output, expected = layer(x), plain(layer, x)
    torch.testing.assert_close(output, expected)
    found = torch.autograd.grad(output.sin().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.sin().sum(), leaves))


def test_shapes_and_provenance():
    layer = make().eval()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    output, weights, index = layer(x, return_weights=True)
    assert output.shape == (2, 3, 5) and weights.shape == index.shape == (2, 3, 2, 4) and index.dtype == torch.int64
    torch.testing.assert_close(output, (weights[..., None] * layer.values[index]).sum((2, 3)))
    torch.testing.assert_close(layer(x[0, 0]), output[0, 0])
    assert layer(x[:0]).shape == (0, 3, 5)
    assert "subkeys=7, k=4" in repr(layer)


def test_learns():
    layer = make(dtype=torch.float32)
    optimizer = torch.optim.Adam(layer.parameters(), 1e-2)
    x, y = torch.randn(64, 6), torch.randn(64, 5)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(layer(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(key_size=7), "key_size: expected an even number, got 7"),
        (lambda: make(k=50), "k: expected at most subkeys \\* subkeys = 49, got 50"),
        (lambda: make(heads=0), "heads: expected a positive integer, got 0"),
        (lambda: make(query_norm="group"), "query_norm: expected one of None, 'batch', 'layer', got 'group'"),
        (lambda: make()(torch.randn(2, 5, dtype=torch.float64)), r"input: expected \[... I\] with I=6, got shape \(2, 5\)"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=f"ProductKeyMemory: {message}"):
        call()
