"""dnc_sequence: equal to the loop of dnc_step, long sequences, threads and batch, invariants; what nn.DNC runs by it."""

import math

import pytest
import torch
from torch.nn import functional as F

import memkernels as mk
from memkernels import nn
from memkernels.ops.dnc_sequence import interface_shapes

B, N, W, R, I, H = 3, 6, 4, 2, 5, 7
D = torch.float64
OPTIONS = (
    dict(),
    dict(key_mask=True, sharpen_links=True, deallocate=True),
    dict(strength="softplus", cosine="product", bounded=True, write_gradient=True),
    dict(cosine="product", key_mask=True),
    dict(strength="softplus", cosine="roots_and_product"),
)


def features(readers=R, writers=1, key_mask=False, sharpen_links=False, **_):
    return sum(map(math.prod, interface_shapes(readers, writers, W, key_mask, sharpen_links).values()))


def zeros(batch=B, readers=R, writers=1, dtype=D, rows=N):
    shapes = ((rows, W), (rows,), (writers, rows, rows), (writers, rows), (writers, rows), (readers, rows))
    return mk.DNCState(*(torch.zeros(batch, *shape, dtype=dtype) for shape in shapes))


def asked(vector, writers, key_mask=False, sharpen_links=False, strength="oneplus", bounded=False, **_):
    shapes, found = interface_shapes(R, writers, W, key_mask, sharpen_links), {}
    for (name, shape), x in zip(shapes.items(), vector.split([math.prod(s) for s in shapes.values()], -1)):
        if name in ("read_keys", "write_keys", "add"):
            x = x.tanh() if bounded else x
        elif name.endswith("strengths"):
            x = F.softplus(x) + (strength == "oneplus")
        elif name == "link_sharpness":
            x = 1 + F.softplus(x)
        elif name != "read_modes":
            x = x.sigmoid()
        found[name] = x.unflatten(-1, shape).softmax(-1) if name == "read_modes" else x.unflatten(-1, shape)
    return mk.DNCInterface(**found)


def by_steps(vectors, state, writers, options):
    reads, weights = [], []
    step = {k: v for k, v in options.items() if k in ("deallocate", "write_gradient", "cosine")}
    for vector in vectors:
        read, state = mk.dnc_step(state, asked(vector, writers, **options), **step)
        reads.append(read)
        weights.append(torch.cat([state.read_weights, state.write_weights], 1))
    return torch.stack(reads), state, torch.stack(weights)


@pytest.mark.parametrize("writers", [1, 2])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
def test_is_the_loop_of_steps(options, writers):
    torch.manual_seed(0)
    vectors = torch.randn(7, B, features(writers=writers, **options), dtype=D, requires_grad=True)
    _, start, _ = by_steps(
        torch.randn_like(vectors[:3]), zeros(writers=writers)._replace(memory=torch.randn(B, N, W, dtype=D)), writers, options
    )
    start = mk.DNCState(*(t.detach().requires_grad_() for t in start))
    reads, state, weights = mk.dnc_sequence(vectors, start, return_weights=True, **options)
    wanted = by_steps(vectors, start, writers, options)
    torch.testing.assert_close((reads, tuple(state), weights), (wanted[0], tuple(wanted[1]), wanted[2]), atol=1e-10, rtol=1e-9)
    upstream = [torch.randn_like(t) for t in (reads, *state, weights)]
    found = torch.autograd.grad((reads, *state, weights), (vectors, *start), upstream, materialize_grads=True)
    expected = torch.autograd.grad((wanted[0], *wanted[1], wanted[2]), (vectors, *start), upstream, materialize_grads=True)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


def test_many_steps_and_a_cut():
    """Several segments of checkpoints, the last one short; two calls with the state between are one."""
    torch.manual_seed(0)
    vectors = torch.randn(83, 2, features(), dtype=D, requires_grad=True)
    reads, state = mk.dnc_sequence(vectors, zeros(2))
    with mk.backend("reference"):
        wanted, end = mk.dnc_sequence(vectors, zeros(2))
        expected = torch.autograd.grad(wanted.square().sum() + end.link.sum(), vectors)
    torch.testing.assert_close(reads, wanted)
    torch.testing.assert_close(torch.autograd.grad(reads.square().sum() + state.link.sum(), vectors), expected)
    first, middle = mk.dnc_sequence(vectors[:50], zeros(2))
    second, last = mk.dnc_sequence(vectors[50:], middle)
    assert torch.equal(torch.cat([first, second]), reads) and all(map(torch.equal, last, state))


@pytest.mark.parametrize("rows, readers", [(20, 4), (37, 5)])
def test_same_bits_for_any_threads_and_batch(monkeypatch, rows, readers):
    """The op as nn.DNC calls it; the layer's other products are torch's, which depend on threads and batch where MKL's do."""
    torch.manual_seed(0)
    before, runs, calls = torch.get_num_threads(), [], []
    monkeypatch.setattr(
        "memkernels.nn.dnc.dnc_sequence", lambda *args, **options: calls.append((args, options)) or mk.dnc_sequence(*args, **options)
    )
    with torch.no_grad():
        nn.DNC(I, H, slots=rows, width=W, read_heads=readers)(torch.randn(9, 11, I))
    (((x, state, controller), options),) = calls
    carried = len(("reads", "hidden", "cell"))
    given = [*state, *controller[:carried]], controller[carried:]

    def run(rows=slice(None)):
        leaves = [t.detach().clone().requires_grad_() for t in (x[:, rows], *(t[rows] for t in given[0]), *given[1])]
        memory, control = type(state)(*leaves[1 : 1 + len(state)]), type(controller)(*leaves[1 + len(state) :])
        reads, after, hidden, cell, _ = mk.dnc_sequence(leaves[0], memory, control, **options)
        gradients = torch.autograd.grad(reads.square().sum() + hidden.square().sum(), leaves, allow_unused=True)
        return [reads, hidden], [cell, *after], [g for g in gradients if g is not None]

    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(run())
    finally:
        torch.set_num_threads(before)
    first, one = runs[0], run(slice(4, 5))
    assert len(first[2]) > len(given[1])
    assert all(torch.equal(a, b) for other in runs[1:] for mine, theirs in zip(other, first) for a, b in zip(mine, theirs))
    assert all(torch.equal(a, b[:, 4:5]) for a, b in zip(one[0], first[0])) and all(
        torch.equal(a, b[4:5]) for a, b in zip(one[1], first[1])
    )


def test_invariants():
    torch.manual_seed(0)
    state = zeros(dtype=torch.float32, writers=2)
    for _ in range(3):
        _, state = mk.dnc_sequence(5 * torch.randn(40, B, features(writers=2)), state)
        assert 0 <= state.usage.min() and state.usage.max() <= 1 + 1e-6
        assert state.link.min() >= -1e-6 and state.link.sum(-1).max() <= 1 + 1e-5 and state.link.sum(-2).max() <= 1 + 1e-5
        assert (state.link.diagonal(dim1=-2, dim2=-1) == 0).all()
        assert all(t.sum(-1).max() <= 1 + 1e-5 for t in (state.precedence, state.write_weights, state.read_weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_edges_stay_finite(dtype):
    """Zero rows and keys, strengths of 1e4, saturated gates, from a fresh memory."""
    vectors = torch.zeros(6, B, features(), dtype=dtype)
    vectors[1:3], vectors[3:] = 1e4, -1e4
    vectors = vectors.requires_grad_()
    for options in OPTIONS[::2]:
        reads, state = mk.dnc_sequence(vectors, zeros(dtype=dtype), **options)
        (grad,) = torch.autograd.grad(reads.float().mean(), vectors)
        assert all(t.isfinite().all() for t in (*state, grad))


def calls(function):
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as found:
        function()
    names = [e.name for e in found.events()]
    return names.count("memkernels::dnc_sequence"), names.count("memkernels::link_step")


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda **k: nn.DNC(I, H, **k), (1, 0)),
        (lambda **k: nn.DNC(I, H, key_mask=True, deallocate=True, sharpen_links=True, write_heads=2, **k), (1, 0)),
        (lambda **k: nn.DNC.deepmind(I, H, I, clip_value=20, **k), (1, 0)),
        (lambda **k: nn.DNC.ixaxaar(I, H, **k), (1, 0)),
        (lambda **k: nn.DNC.deepmind(I, H, I, clip_value=0.5, **k), (0, 4)),  # its clip reaches h
        (lambda **k: nn.DNC(I, H, num_layers=2, **k), (0, 4)),
    ],
    ids=["paper", "options", "deepmind", "ixaxaar", "clipped", "layers"],
)
def test_layers_run_it(make, found):
    torch.manual_seed(0)
    layer = make(slots=N, width=W, read_heads=R, dtype=D)
    x = torch.randn(2, 4, I, dtype=D)
    assert calls(lambda: layer(x)) == found
    output, state, trace = layer(x, return_trace=True)
    if not layer.feedback:
        return
    hidden, reads, last, weights = layer._by_steps(x.transpose(0, 1), layer.initial_state(2))
    torch.testing.assert_close(torch.cat([trace.read, trace.write], 2), weights.transpose(0, 1))
    wanted = layer.output(torch.cat([hidden, reads], -1)).transpose(0, 1)
    torch.testing.assert_close(output, layer._clipped(wanted) if layer.clip_all else wanted)
    torch.testing.assert_close((tuple(state.memory), *state[1:]), (tuple(last.memory), *last[1:]))


def test_cell_clip_is_the_step_path():
    torch.manual_seed(0)
    layer = nn.DNC.deepmind(I, H, I, clip_value=1.0, slots=N, width=W, read_heads=R, dtype=D)
    with torch.no_grad():
        layer.controller.bias_ih_l0[:] += 3.0  # cells grow past the clip
    x = torch.randn(2, 6, I, dtype=D)
    state = layer.initial_state(2)
    output, last = layer(x)
    hidden, reads, end, _ = layer._by_steps(x.transpose(0, 1), state)
    assert (last.cell == 1).any()
    torch.testing.assert_close((last.cell, last.hidden), (end.cell, end.hidden))
    wanted = layer._clipped(layer.output(torch.cat([hidden, reads], -1))).transpose(0, 1)
    parameters = tuple(layer.parameters())
    found = torch.autograd.grad(output.square().sum(), parameters)
    torch.testing.assert_close(found, torch.autograd.grad(wanted.square().sum(), parameters))


def test_errors():
    vectors = torch.zeros(2, B, features(), dtype=D)
    with pytest.raises(ValueError, match=r"dnc_sequence: input: expected \[T B I\] with I=45, the interface of this memory, got 33"):
        mk.dnc_sequence(vectors, zeros(), key_mask=True)
    with pytest.raises(ValueError, match="dnc_sequence: clip: expected a positive number or None, got 0"):
        mk.dnc_sequence(vectors, zeros(), clip=0)
    with pytest.raises(ValueError, match="dnc_sequence: clip: expected a positive number or None, got nan"):
        mk.dnc_sequence(vectors, zeros(), clip=float("nan"))
    with pytest.raises(TypeError, match="dnc_sequence: bounded: expected True or False, got 1"):
        mk.dnc_sequence(vectors, zeros(), bounded=1)
    with pytest.raises(TypeError, match="dnc_sequence: weight_ih: expected a tensor, got NoneType"):
        mk.dnc_sequence(vectors, zeros(), mk.DNCController(*torch.zeros(3, B, 2, dtype=D), *[None] * 6))
