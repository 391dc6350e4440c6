"""Addressable memories at the edge: rows of zeros, equal rows, strengths of 1e4, sharpening of 1e3, denormals, in every dtype."""

import pytest
import torch

import memkernels as mk
from memkernels.testing import compare

BACKENDS = ["reference", "cpp"] if mk.backends()["cpp"] is None else ["reference"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
SLACK = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def evaluated(function, tensors):
    leaves = [t.detach().requires_grad_() for t in tensors]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    g = torch.Generator().manual_seed(0)
    upstream = [torch.randn(t.shape, generator=g).to(t.dtype) for t in outputs]
    return outputs, torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


def gradients(function, *tensors):
    """Outputs and gradients of sums with fixed weights: never NaN, and Inf only where float64 says that the dtype cannot hold the value."""
    outputs, found = evaluated(function, tensors)
    with compare.using("reference"):
        truth = evaluated(function, [t.double() for t in tensors])
    for t, true in zip((*outputs, *found), (*truth[0], *truth[1])):
        if t is not None:
            beyond = true.abs() > torch.finfo(t.dtype).max / 4
            assert not t.isnan().any() and (t.isfinite() | beyond).all(), t
    return outputs, found


def rows(kind, dtype):
    g = torch.Generator().manual_seed(1)
    memory = torch.randn(2, 9, 5, generator=g)
    if kind == "zero":
        memory[:, ::2] = 0
    elif kind == "all zero":
        memory.zero_()
    elif kind == "equal":
        memory[:] = memory[:, :1]
    else:
        memory[:, 1] = torch.finfo(dtype).smallest_normal / 4
    return memory.to(dtype)


@pytest.mark.parametrize("strength", (1.0, 1e4))
@pytest.mark.parametrize("kind", ("zero", "all zero", "equal", "denormal"))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_content(backend, dtype, kind, strength):
    memory, key = rows(kind, dtype), torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    key[0, 0] = 0
    strong = torch.full((2, 3), strength, dtype=dtype)
    with compare.using(backend):
        (weights,), (dmemory, *_) = gradients(mk.content_address, memory, key, strong)
        gradients(mk.content_read, memory, key, strong)
    assert (weights.double().sum(-1) - 1).abs().max() < 10 * SLACK[dtype]
    if strength == 1:
        zero = (memory == 0).all(-1)
        assert not zero.any() or dmemory[zero].abs().max() <= 1e3


@pytest.mark.parametrize("kind", ("uniform", "one-hot", "denormal", "zeros", "two"))
@pytest.mark.parametrize("sharpen", (1.0, 10.0, 1000.0))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_location(backend, dtype, sharpen, kind):
    count = 64
    weights = torch.full((1, 2, count), 1 / count)
    if kind != "uniform":
        weights = torch.zeros(1, 2, count)
        weights[..., 3] = torch.finfo(dtype).smallest_normal / 2 if kind == "denormal" else float(kind != "zeros")
        weights[..., 7] = weights[..., 3] if kind == "two" else 0
    shift = torch.tensor([0.0, 1.0, 0.0] if kind == "one-hot" else [0.2, 0.5, 0.3]).expand(1, 2, 3)
    given = [t.to(dtype) for t in (weights, weights.roll(1, -1), torch.full((1, 2), 0.5), shift, torch.full((1, 2), sharpen))]
    with compare.using(backend):
        (found,), _ = gradients(mk.location_address, *given)
    mass = found.double().sum(-1)
    assert ((mass - 1).abs() <= 10 * SLACK[dtype]).all() or (kind in ("zeros", "denormal") and (mass == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_allocation_and_links(backend, dtype):
    """Slots that are wholly free or wholly used, all alike, and written as if by one-hot weights."""
    for usage in (torch.zeros(2, 8), torch.ones(2, 8), torch.tensor([[0.0, 1.0] * 4, [0.5] * 8])):
        write, read = torch.zeros(2, 2, 8), torch.zeros(2, 3, 8)
        write[:, 0, 2], write[:, 1, 5], read[:, 1, 2] = 1, 1, 1
        write, read, used = (t.to(dtype) for t in (write, read, usage))
        with compare.using(backend):
            (now,), _ = gradients(
                lambda u, w, r, f: mk.usage(u, w, r, f, write_gradient=True), used, write, read, torch.ones(2, 3).to(dtype)
            )
            (free,), _ = gradients(mk.allocation, now)
            links = torch.zeros(2, 2, 8, 8, dtype=dtype)
            (link, precedence, *_), _ = gradients(mk.link_step, links, torch.zeros_like(write), write, read)
        assert ((now >= 0) & (now <= 1)).all() and (free.double().sum(-1) <= 1 + 10 * SLACK[dtype]).all()
        assert (link.diagonal(dim1=-2, dim2=-1) == 0).all() and (precedence.sum(-1) <= 1).all()
        for side in (-1, -2):
            assert (link.double().sum(side) <= 1 + 10 * SLACK[dtype]).all()


@pytest.mark.parametrize("cosine", ("roots", "roots_and_product", "product"))
def test_second_derivatives_of_a_fresh_memory_are_finite(cosine):
    zeros = lambda *shape: torch.zeros(1, *shape, dtype=torch.float64)  # noqa: E731
    state = [zeros(4, 3), zeros(4), zeros(1, 4, 4), zeros(1, 4), zeros(1, 4), zeros(2, 4)]
    one, write = zeros(1) + 1, zeros(1, 3)
    ask = [zeros(2, 3), zeros(2) + 1, write, one, write + 0.5, write + 1, zeros(2), one * 0.5, one + 0, zeros(2, 3)]
    leaves = [t.requires_grad_() for t in (*state, *ask)]
    reads, after = mk.dnc_step(leaves[:6], leaves[6:], cosine=cosine, write_gradient=True)
    first = torch.autograd.grad(sum(t.sum() for t in (reads, *after)), leaves, create_graph=True)
    second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves, allow_unused=True)
    assert all(g is None or g.isfinite().all() for g in (*first, *second))


def trained(layer, steps):
    """Losses of that many steps of training from a memory of zeros."""
    torch.manual_seed(0)
    if hasattr(layer, "initial_memory"):
        torch.nn.init.zeros_(layer.initial_memory)
    head = torch.nn.LazyLinear(2)
    x = torch.randn(3, 2, 4)
    target = x.roll(1, 1)[..., :2]
    head(layer(x)[0])
    optimizer = torch.optim.Adam([*layer.parameters(), *head.parameters()], 1e-2)
    for _ in range(steps):
        loss = (head(layer(x)[0]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert loss.isfinite()
        assert all(p.isfinite().all() and (p.grad is None or p.grad.isfinite().all()) for p in layer.parameters())


LAYERS = {
    "content": lambda: mk.nn.ExternalMemory(4, slots=6, width=3, read_heads=2),
    "ntm": lambda: mk.nn.ExternalMemory(4, slots=6, width=3, read_heads=2, mode="ntm"),
    "dnc": lambda: mk.nn.ExternalMemory(4, slots=6, width=3, read_heads=2, mode="dnc"),
    "NTM": lambda: mk.nn.NTM(4, 8, 4, slots=6, width=3, batch_first=True),
    "DNC": lambda: mk.nn.DNC(4, 8, slots=6, width=3, read_heads=2),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_training_from_zeros_stays_finite(layer):
    torch.manual_seed(1)
    trained(LAYERS[layer](), 30)


@pytest.mark.slow
@pytest.mark.parametrize("layer", LAYERS)
def test_a_thousand_steps_from_zeros_stay_finite(layer):
    torch.manual_seed(1)
    trained(LAYERS[layer](), 1000)
