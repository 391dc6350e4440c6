"""Recurrent modules for tests: torch's and ours with the same weights, their states, and a comparison of values and gradients."""

import torch

from memkernels import nn

KINDS = {"LSTM": ("LSTM", {}), "GRU": ("GRU", {}), "RNN": ("RNN", {}), "RNN_relu": ("RNN", {"nonlinearity": "relu"})}
TOLERANCE = {torch.float64: dict(rtol=1e-9, atol=1e-11), torch.float32: dict(rtol=1e-4, atol=1e-5)}


def make(kind, *args, library=nn, **kwargs):
    name, extra = KINDS[kind]
    return getattr(library, name)(*args, **extra, **{"dtype": torch.float64, **kwargs})


def twins(kind, *args, **kwargs):
    """torch's module and ours with the same weights."""
    torch.manual_seed(0)
    theirs, ours = (make(kind, *args, library=library, **kwargs) for library in (torch.nn, nn))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, ours


def parts(state):
    """The tensors of a state, of any kind or None."""
    return () if state is None else (state,) if torch.is_tensor(state) else tuple(state)


def like(state, found):
    return None if state is None else found[0] if torch.is_tensor(state) else tuple(found)


def random_state(module, *batch):
    """A state for module, with other dimensions than layers and features between them."""
    count, dtype = module.num_layers * (1 + module.bidirectional), module.weight_ih_l0.dtype
    h = torch.randn(count, *batch, module.proj_size or module.hidden_size, dtype=dtype)
    return (h, torch.randn(count, *batch, module.hidden_size, dtype=dtype)) if module.mode == "LSTM" else h


def select(state, dim, index):
    return like(state, [part.select(dim, index) for part in parts(state)])


def flat(result):
    """All tensors of what a module returns."""
    output, state, *cells = result
    return [t.data if hasattr(t, "batch_sizes") else t for t in (output, *parts(state), *cells)]


def with_gradients(module, x, state=None, **kwargs):
    """Results, and gradients of a random projection of all of them to input, state and parameters."""
    own = x.detach().clone().requires_grad_()
    start = like(state, [t.detach().clone().requires_grad_() for t in parts(state)])
    results = flat(module(own, start, **kwargs))
    module.zero_grad()
    torch.manual_seed(1)
    sum((r * torch.randn_like(r)).sum() for r in results).backward()
    return [*results, own.grad, *(t.grad for t in parts(start)), *(p.grad for p in module.parameters())]


def assert_same(theirs, ours, x, state=None):
    for expected, got in zip(with_gradients(theirs, x, state), with_gradients(ours, x, state), strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE[x.dtype])
