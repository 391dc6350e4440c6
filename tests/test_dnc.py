"""dnc_step, nn.DNC and the ops below them: the published packages' formulas, invariants, counts of calls, determinism over threads."""

import copy

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import memkernels as mk
from memkernels import nn

B, N, W, R, I, H, T = 2, 6, 4, 2, 5, 7, 5
D = torch.float64


def draw(*shape):
    return torch.randn(*shape, dtype=D)


# The formulas of the packages, written from their papers' and sources' mathematics, step by step.


def plain_cosine(memory, keys, strengths, kind):
    dot = torch.einsum("brw,bnw->brn", keys, memory)
    m2, k2 = (memory * memory).sum(-1)[:, None], (keys * keys).sum(-1)[..., None]
    if kind == "deepmind":
        denominator = (m2 + 1e-6) ** 0.5 * (k2 + 1e-6) ** 0.5 + 1e-6
    elif kind == "ixaxaar":
        denominator = m2**0.5 * k2**0.5 + 1e-6
    else:
        denominator = (m2 + 1e-6) ** 0.5 * (k2 + 1e-6) ** 0.5
    return torch.softmax(dot / denominator * strengths[..., None], -1)


def plain_allocation(usage):
    usage = 1e-6 + (1 - 1e-6) * usage
    rows = []
    for u in usage:
        values = u.tolist()
        order = sorted(range(len(u)), key=lambda i: (values[i], i))
        product, found = u.new_ones(()), {}
        for i in order:
            found[i] = (1 - u[i]) * product
            product = product * u[i]
        rows.append(torch.stack([found[i] for i in range(len(u))]))
    return torch.stack(rows)


def plain_step(state, ask, kind):
    memory, usage, link, last, write, read = state
    heads = write.shape[1]
    seen = write if kind == "ixaxaar" else write.detach()
    usage = (usage + (1 - usage) * (1 - (1 - seen).prod(1))) * (1 - ask["free_gate"][..., None] * read).prod(1)
    content = plain_cosine(memory, ask["write_keys"], ask["write_strengths"], kind)
    free, simulated = [], usage
    for h in range(heads):
        free.append(plain_allocation(simulated))
        gate = (ask["allocation_gate"] * ask["write_gate"])[:, h, None]
        simulated = simulated + (1 - simulated) * gate * free[-1]
    g = ask["allocation_gate"][..., None]
    write = ask["write_gate"][..., None] * (g * torch.stack(free, 1) + (1 - g) * content)
    kept = torch.ones_like(memory)
    for h in range(heads):
        kept = kept * (1 - write[:, h, :, None] * ask["erase"][:, h, None])
    memory = memory * kept + write.mT @ ask["add"]
    link = (1 - write[..., None] - write[..., None, :]) * link + write[..., None] * last[..., None, :]
    link = link * (1 - torch.eye(link.shape[-1], dtype=link.dtype))
    last = (1 - write.sum(-1, keepdim=True)) * last + write
    forward, backward = torch.einsum("bhij,brj->brhi", link, read), torch.einsum("bhij,bri->brhj", link, read)
    modes = ask["read_modes"][..., None]
    content = plain_cosine(memory, ask["read_keys"], ask["read_strengths"], kind)
    read = modes[:, :, -1] * content + (modes[:, :, :heads] * backward).sum(2) + (modes[:, :, heads:-1] * forward).sum(2)
    return read @ memory, (memory, usage, link, last, write, read)


def plain_interface(layer, xi, kind):
    """The parts of one interface vector, in the order of pytorch-dnc."""
    r, w, h = layer.layout.read_heads, layer.layout.width, layer.layout.write_heads
    sizes = dict(read_keys=r * w, read_strengths=r, write_keys=h * w, write_strengths=h, erase=h * w, add=h * w)
    sizes |= dict(free_gate=r, allocation_gate=h, write_gate=h, read_modes=r * (2 * h + 1))
    ask = dict(zip(sizes, xi.split(list(sizes.values()), -1)))
    for name in ("read_keys", "write_keys", "erase", "add"):
        ask[name] = ask[name].unflatten(-1, (-1, w))
    for name in ("free_gate", "allocation_gate", "write_gate", "erase"):
        ask[name] = ask[name].sigmoid()
    for name in ("read_strengths", "write_strengths"):
        ask[name] = F.softplus(ask[name]) + (1 if kind == "paper" else 0)
    if kind == "ixaxaar":
        ask |= {name: ask[name].tanh() for name in ("read_keys", "write_keys", "add")}
    ask["read_modes"] = ask["read_modes"].unflatten(-1, (r, -1)).softmax(-1)
    return ask


def plain_layer(layer, x, state, kind):
    """A whole sequence, "B T I"; the controller by torch's own LSTM."""
    controller = torch.nn.LSTM(layer.controller.input_size, H, layer.controller.num_layers, dtype=D)
    theirs = dict(layer.controller.named_parameters())
    memory, h, c, reads = tuple(state.memory), state.hidden, state.cell, state.reads
    first, outputs = reads, []

    def clip(t):
        return t if layer.clip is None else t.clamp(-layer.clip, layer.clip)

    for t in range(x.shape[1]):
        seen = torch.cat([x[:, t], (first if kind == "ixaxaar" else reads).flatten(1)], -1)
        out, (h, c) = torch.func.functional_call(controller, theirs, (seen[None], (h, c)))
        if kind == "deepmind":
            h, c = clip(h), clip(c)
        out = clip(out[0])
        reads, memory = plain_step(memory, plain_interface(layer, layer.interface(out), kind), kind)
        out = layer.output(torch.cat([out, reads.flatten(1)], -1))
        outputs.append(clip(out) if kind == "deepmind" else out)
    return torch.stack(outputs, 1), memory


def make(kind, write_heads=1, **kwargs):
    torch.manual_seed(0)
    sizes = dict(slots=N, width=W, read_heads=R, dtype=D)
    if kind == "deepmind":
        return nn.DNC.deepmind(I, H, 3, clip_value=0.2, write_heads=write_heads, **sizes)
    if kind == "ixaxaar":
        return nn.DNC.ixaxaar(I, H, clip=0.15, **sizes)
    return nn.DNC(I, H, write_heads=write_heads, **sizes, **kwargs)


def started(layer):
    """A state in the middle of a sequence: not all zero, within its bounds."""
    state = layer.initial_state(B)
    with torch.no_grad():
        _, state = layer(draw(B, 3, I), state._replace(memory=state.memory._replace(memory=draw(B, N, W))))
    return state


@pytest.mark.parametrize("kind, heads", [("paper", 1), ("paper", 2), ("deepmind", 1), ("deepmind", 2), ("ixaxaar", 1)])
def test_layer_is_the_packages_formula_with_gradients(kind, heads):
    layer = make(kind, heads)
    x, state = draw(B, T, I).requires_grad_(), started(layer)
    output, after = layer(x, state)
    expected, memory = plain_layer(layer, x, state, kind)
    torch.testing.assert_close(output, expected, atol=1e-9, rtol=1e-9)
    for name, got, wanted in zip(mk.DNCState._fields, after.memory, memory):
        torch.testing.assert_close(got, wanted, atol=1e-9, rtol=1e-9, msg=name)
    leaves = [x, *layer.parameters()]
    found = torch.autograd.grad(output.square().sum(), leaves)
    torch.testing.assert_close(found, torch.autograd.grad(expected.square().sum(), leaves), atol=1e-8, rtol=1e-6)


def test_from_zeros_with_one_row_too():
    layer = nn.DNC(I, H, slots=1, width=W, read_heads=R, dtype=D)
    x = draw(B, T, I)
    torch.testing.assert_close(layer(x)[0], plain_layer(layer, x, layer.initial_state(B), "paper")[0])


def ask_of(layer, seed=0):
    torch.manual_seed(seed)
    (ask,) = layer.layout.steps(3 * draw(1, B, layer.layout.features()))
    return ask


def masked_cosine(memory, keys, strengths, mask):
    rows = torch.stack(
        [
            plain_cosine(memory * m[:, None], k[:, None] * m[:, None], s[:, None], "paper")
            for m, k, s in zip(*(t.unbind(1) for t in (mask, keys, strengths)))
        ],
        1,
    )
    return rows[:, :, 0]


def test_options_of_csordas_and_schmidhuber():
    layer = make("paper", key_mask=True, deallocate=True, sharpen_links=True)
    state, ask = started(layer).memory, ask_of(layer)
    reads, new = mk.dnc_step(state, ask, deallocate=True)
    content = masked_cosine(state.memory, ask.write_keys, ask.write_strengths, ask.write_mask)
    usage = mk.usage(state.usage, state.write_weights, state.read_weights, ask.free_gate)
    write = ask.write_gate[..., None] * (
        ask.allocation_gate[..., None] * plain_allocation(usage)[:, None] + (1 - ask.allocation_gate[..., None]) * content
    )
    kept = (1 - ask.free_gate[..., None] * state.read_weights).prod(1)[..., None] * (1 - write.mT * ask.erase)
    memory = state.memory * kept + write.mT @ ask.add
    torch.testing.assert_close(new.memory, memory)
    follow = []
    for matrix, sharpness in zip((new.link[:, 0], new.link[:, 0].mT), ask.link_sharpness.unbind(-1)):
        d = torch.einsum("bij,brj->bri", matrix, state.read_weights) + 1e-6
        d = (d / d.amax(-1, keepdim=True)) ** sharpness[..., None]
        follow.append(d / d.sum(-1, keepdim=True))
    content = masked_cosine(memory, ask.read_keys, ask.read_strengths, ask.read_mask)
    modes = ask.read_modes[..., None]
    read = modes[:, :, 0] * follow[1] + modes[:, :, 1] * follow[0] + modes[:, :, 2] * content
    torch.testing.assert_close(new.read_weights, read)
    torch.testing.assert_close(reads, read @ memory)
    x = draw(B, T, I)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained(layer, x))


def trained(layer, x):
    layer(x)[0].square().sum().backward()
    return layer.parameters()


class Calls(TorchDispatchMode):
    """Counts calls of this package's ops."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "memkernels":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_a_step_is_six_ops_each_way():
    layer = make("paper")
    state, ask = started(layer).memory, ask_of(layer)
    state = mk.DNCState(*(t.requires_grad_() for t in state))
    with Calls() as forward:
        reads, new = mk.dnc_step(state, ask)
    assert sorted(forward.names) == [
        "allocation.default",
        "content_address.default",
        "content_address.default",
        "link_step.default",
        "memory_write.default",
        "usage.default",
    ]
    with Calls() as backward:
        torch.autograd.grad(reads.sum() + new.link.sum(), state, allow_unused=True)
    assert len(backward.names) <= 6, backward.names


def test_usage_stops_the_gradient_of_write_weights():
    args = [torch.rand(*shape, dtype=D, requires_grad=True) for shape in ((B, N), (B, 1, N), (B, R, N), (B, R))]
    out = mk.usage(*args)
    grads = torch.autograd.grad(out.sum(), args, allow_unused=True)
    assert [g is None for g in grads] == [False, True, False, False]
    torch.testing.assert_close(out, mk.usage(*args, write_gradient=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_allocation_ties_and_ends(dtype):
    usage = torch.tensor([[1, 0, 1, 0, 0.5, 0, 1]], dtype=dtype, requires_grad=True)
    found = mk.allocation(usage, eps=0.0)
    assert found.tolist() == [[0, 1, 0, 0, 0, 0, 0]]
    (grad,) = torch.autograd.grad(found.sum(), usage)
    assert grad.isfinite().all()
    nan = torch.tensor([[float("nan"), -0.0, 0.0]], dtype=dtype)
    assert mk.allocation(nan, eps=0.0)[0, 1:].tolist() == [1, 0]  # -0 equals 0 and comes before NaN


def test_allocation_of_long_rows_is_the_sort():
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        usage = (torch.rand(3, 700, dtype=D) ** 0.01).to(dtype)  # close to 1, so that many rows get a share; ties in bfloat16
        s, order = torch.sort(usage.double(), dim=1, stable=True)
        wanted = torch.zeros_like(s).scatter(1, order, (1 - s) * torch.cat([torch.ones(3, 1), s[:, :-1]], 1).cumprod(1))
        torch.testing.assert_close(
            mk.allocation(usage, eps=0.0).double(), wanted, atol=1e-6, rtol=1e-2 if dtype == torch.bfloat16 else 1e-4
        )


def test_invariants_over_a_long_run():
    torch.manual_seed(0)
    layer = nn.DNC(I, H, slots=N, width=W, read_heads=R, write_heads=2)
    with torch.no_grad():
        layer.interface.weight *= 20
        state = layer.initial_state(B)
        for _ in range(60):
            _, state = layer(torch.randn(B, 1, I), state)
            _, usage, link, precedence, write, read = state.memory
            assert 0 <= usage.min() and usage.max() <= 1 + 1e-6
            assert link.min() >= -1e-6 and link.sum(-1).max() <= 1 + 1e-5 and link.sum(-2).max() <= 1 + 1e-5
            assert (link.diagonal(dim1=-2, dim2=-1) == 0).all()
            assert precedence.sum(-1).max() <= 1 + 1e-5 and write.sum(-1).max() <= 1 + 1e-5 and read.sum(-1).max() <= 1 + 1e-5


def test_link_update_and_link_read_are_link_step():
    link, last = torch.rand(B, 2, N, N), torch.rand(B, 2, N)
    write, read = torch.rand(B, 2, N) / N, torch.rand(B, R, N)
    new, precedence, forward, backward = mk.link_step(link, last, write, read)
    assert all(map(torch.equal, mk.link_update(link, last, write), (new, precedence)))
    torch.testing.assert_close(mk.link_read(new, read), (forward, backward))
    assert mk.explain(mk.link_update, link, last, write)["reference"] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_links_are_the_same_for_any_threads_and_batch(dtype):
    """Several tasks a matrix, whose column sums are combined."""
    torch.manual_seed(0)
    args = [
        t.to(dtype).requires_grad_() for t in (torch.rand(3, 2, 300, 300) / 300, *torch.rand(2, 3, 2, 300) / 300, torch.rand(3, 5, 300))
    ]
    upstream, before, runs = None, torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = mk.link_step(*args)
            upstream = upstream or [torch.randn_like(t) for t in out]
            runs.append((*out, *torch.autograd.grad(out, args, upstream)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
    one = [t[1:2] for t in args]
    out = mk.link_step(*one)
    alone = (*out, *torch.autograd.grad(out, one, [g[1:2] for g in upstream]))
    assert all(torch.equal(a, b[1:2]) for a, b in zip(alone, runs[0]))


def test_state_carries_over_and_copies():
    layer = make("paper")
    x = draw(B, 8, I)
    whole, end = layer(x)
    first, state = layer(x[:, :3])
    second, state = copy.deepcopy(layer)(x[:, 3:], state.detach())
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state.memory.link, end.memory.link)
    nothing, state = layer(x[:, :0], end)
    assert nothing.shape == (B, 0, I) and state.hidden is end.hidden


def test_shapes_on_the_meta_device():
    layer = make("paper").to("meta")
    output, state = layer(draw(B, T, I).to("meta"))
    assert output.shape == (B, T, layer.output_size) and state.memory.link.is_meta


def test_learns_from_zeros_and_stays_finite():
    torch.manual_seed(0)
    layer = nn.DNC(4, 16, slots=8, width=6, read_heads=1)
    optimizer, losses = torch.optim.Adam(layer.parameters(), 2e-2), []
    for _ in range(40):
        x = (torch.rand(8, 3, 4) < 0.5).float()
        output, _ = layer(torch.cat([x, torch.zeros_like(x)], 1))
        loss = F.mse_loss(output[:, 3:], x)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


def test_errors():
    layer = make("paper")
    with pytest.raises(ValueError, match=r"DNC: input: expected \[B T I\] with I=5, got shape \(2, 3, 4\)"):
        layer(draw(2, 3, 4))
    with pytest.raises(ValueError, match="DNC: slots: expected a positive integer, got 0"):
        nn.DNC(I, H, slots=0, width=W, read_heads=R)
    with pytest.raises(ValueError, match="DNC: cosine: expected one of"):
        nn.DNC(I, H, slots=N, width=W, read_heads=R, cosine="none")
    with pytest.raises(TypeError, match="DNC: state: expected a DNCLayerState or None, got int"):
        layer(draw(B, T, I), 3)
    with pytest.raises(TypeError, match="DNC: state: expected a DNCLayerState or None, got tuple"):
        layer(draw(B, T, I), (1, 2, 3, 4))
    with pytest.raises(ValueError, match="DNC: clip: expected a positive number or None, got nan"):
        nn.DNC(I, H, slots=N, width=W, read_heads=R, clip=float("nan"))
    with pytest.raises(ValueError, match=r"DNC: state.memory: expected shape \(2, 6, 4\), got \(3, 6, 4\)"):
        layer(draw(B, T, I), layer.initial_state(3))
    state, ask = layer.initial_state(B).memory, ask_of(layer)
    with pytest.raises(ValueError, match=r"dnc_step: read_modes: expected .*2H\+1.*got .*4"):
        mk.dnc_step(state, ask._replace(read_modes=draw(B, R, 4)))
    with pytest.raises(ValueError, match="allocation: eps: expected a number in"):
        mk.dnc_step(state, ask, eps=2)


def test_external_memory_runs_the_step():
    torch.manual_seed(0)
    layer = nn.ExternalMemory(I, N, W, R, "dnc", write_heads=2, output_size=3, dtype=D)
    x, reads = draw(B, T, I), []
    output, end = layer(x)
    state = tuple(layer.initial_state(B))
    for t in range(T):
        layout = type("Layer", (), {"layout": layer._asks})
        read, state = plain_step(state, plain_interface(layout, layer.interface(x[:, t]), "paper"), "paper")
        reads.append(read.flatten(1))
    torch.testing.assert_close(output, layer.output(torch.cat([x, torch.stack(reads, 1)], -1)))
    torch.testing.assert_close(tuple(end), state)
    torch.testing.assert_close(layer(x[:, 2:], layer(x[:, :2])[1].detach())[0], output[:, 2:])
    with pytest.raises(TypeError, match="ExternalMemory: state: expected a DNCState or None, got int"):
        layer(x, 3)
    with pytest.raises(ValueError, match="similarity: expected 'cosine' in mode 'dnc', got 'dot'"):
        nn.ExternalMemory(I, N, W, R, "dnc", similarity="dot")


@pytest.mark.parametrize("options", [dict(), dict(num_layers=2), dict(feedback=False)])
@pytest.mark.parametrize("steps", [0, 4])
def test_trace(options, steps):
    torch.manual_seed(0)
    try:
        model = nn.DNC(3, 6, 2, slots=7, width=4, read_heads=2, write_heads=1, **options)
    except TypeError:
        raise AssertionError(f"DNC has no option {options}") from None
    x = torch.randn(2, steps, 3)
    output, state, trace = model(x, return_trace=True)
    torch.testing.assert_close(output, model(x)[0])
    assert trace.read.shape == (2, steps, 2, 7) and trace.write.shape == (2, steps, 1, 7) and trace.rows is None
    if steps:
        torch.testing.assert_close(trace.read[:, -1], state.memory.read_weights)
        torch.testing.assert_close(trace.write[:, -1], state.memory.write_weights)
