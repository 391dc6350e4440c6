"""nn.LSTMCell against torch.nn.LSTMCell."""

import copy

import pytest
import torch

from memkernels import nn


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("with_state", [True, False])
def test_is_torchs(dtype, bias, batched, with_state):
    torch.manual_seed(0)
    theirs = torch.nn.LSTMCell(5, 7, bias=bias, dtype=dtype)
    torch.manual_seed(0)
    ours = nn.LSTMCell(5, 7, bias=bias, dtype=dtype)
    assert all(torch.equal(a, b) for a, b in zip(theirs.parameters(), ours.parameters(), strict=True))
    theirs.load_state_dict(ours.state_dict(), strict=True)
    batch = (3,) if batched else ()
    x = torch.randn(*batch, 5, dtype=dtype)
    hx = (torch.randn(*batch, 7, dtype=dtype), torch.randn(*batch, 7, dtype=dtype)) if with_state else None
    results = []
    for module in (theirs, ours):
        own = x.clone().requires_grad_()
        state = None if hx is None else tuple(t.clone().requires_grad_() for t in hx)
        h, c = module(own, state)
        (h.square().sum() + c.sin().sum()).backward()
        results.append([h, c, own.grad, *(t.grad for t in state or ()), *(p.grad for p in module.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4 if dtype == torch.float32 else 1e-10, atol=1e-6 if dtype == torch.float32 else 1e-12)


def test_is_an_lstm_cell_of_torch_and_copies():
    ours = nn.LSTMCell(5, 7)
    assert isinstance(ours, torch.nn.LSTMCell) and repr(ours) == "LSTMCell(5, 7)"
    x = torch.randn(2, 5)
    assert torch.equal(copy.deepcopy(ours)(x)[0], ours(x)[0])
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), ours(x))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h, _ = ours(x, (torch.zeros(2, 7), torch.zeros(2, 7)))
    torch.testing.assert_close(h.float(), ours(x)[0], atol=0.03, rtol=0.03)


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m(torch.randn(2, 2, 5)),
        lambda m: m(torch.randn(2, 4)),
        lambda m: m(torch.randn(2, 5), (torch.randn(2, 6), torch.randn(2, 7))),
        lambda m: m(torch.randn(2, 5), (torch.randn(2, 7), torch.randn(3, 7))),
        lambda m: m(torch.randn(2, 5), (torch.randn(2, 7), torch.randn(2, 7, 1))),
    ],
)
def test_errors_are_torchs(call):
    with pytest.raises((ValueError, RuntimeError)) as theirs:
        call(torch.nn.LSTMCell(5, 7))
    with pytest.raises(type(theirs.value)):
        call(nn.LSTMCell(5, 7))
