"""nn.ExternalMemory: its steps against plain torch, state, causality, training, bad arguments."""

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from memkernels import nn

MODES = ("content", "ntm", "topk", "product")


def make(mode="content", dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return nn.ExternalMemory(6, 9 if mode == "product" else 5, 4, 2, mode, dtype=dtype, **{"k": 3, **kwargs})


def cosine_weights(memory, key, strength):
    dot = key @ memory.mT
    norms = (key.square().sum(-1, keepdim=True) + 1e-6).sqrt() * (memory.square().sum(-1) + 1e-6).sqrt()[:, None]
    return torch.softmax(strength[..., None] * dot / norms, -1)


def write(memory, weights, erase, add):
    for h in range(weights.shape[1]):
        memory = memory * (1 - weights[:, h, :, None] * erase[:, h, None, :])
    return memory + weights.mT @ add


def plain(layer, x, state):
    """The layer's formula, head by head and step by step, in torch ops."""
    reads_all, (memory, weights) = [], state
    r, h, w, k = layer.read_heads, layer.write_heads, layer.width, layer.k
    for t in range(x.shape[1]):
        keys, strength, erase, add, *rest = layer.interface(x[:, t]).split(layer._sizes, -1)
        keys, erase, add = (z.unflatten(-1, (-1, w)) for z in (keys, erase.sigmoid(), add.tanh()))
        strength = 1 + F.softplus(strength)
        if layer.mode in ("content", "topk"):
            gate = rest[0].sigmoid()[..., None]
            memory = write(memory, gate * cosine_weights(memory, keys[:, r:], strength[:, r:]), erase, add)
            read_weights = cosine_weights(memory, keys[:, :r], strength[:, :r])
            if layer.mode == "topk":  # the k largest weights, which sum to 1 again
                least = read_weights.detach().topk(k).values[..., -1:]
                read_weights = read_weights.masked_fill(read_weights.detach() < least, 0)
                read_weights = read_weights / read_weights.sum(-1, keepdim=True)
        elif layer.mode == "product":
            halves = torch.einsum("bhpd,hpsd->bhps", keys.unflatten(-1, (2, -1)), layer.subkeys)
            scores = strength[..., None] * (halves[:, :, 0, :, None] + halves[:, :, 1, None]).flatten(2)
            weights = scores.masked_fill(scores.detach() < scores.detach().topk(k).values[..., -1:], -torch.inf).softmax(-1)
            memory = write(memory, rest[0].sigmoid()[..., None] * weights[:, r:], erase, add)
            read_weights = weights[:, :r]
        else:
            content = cosine_weights(memory, keys, strength)
            gate, sharpen = rest[0].sigmoid()[..., None], 1 + F.softplus(rest[2])
            shift = rest[1].unflatten(-1, (r + h, -1)).softmax(-1)
            weights = location(gate * content + (1 - gate) * weights, shift, sharpen)
            memory = write(memory, weights[:, r:], erase, add)
            read_weights = weights[:, :r]
        reads_all.append((read_weights @ memory).flatten(1))
    return layer.output(torch.cat([x, torch.stack(reads_all, 1)], -1)), memory


def location(gated, shift, sharpen):
    n, s = gated.shape[-1], shift.shape[-1] // 2
    shifted = torch.stack([sum(shift[..., j + s] * gated[..., (i - j) % n] for j in range(-s, s + 1)) for i in range(n)], -1)
    powered = shifted ** sharpen[..., None]
    return powered / powered.sum(-1, keepdim=True)


@pytest.mark.parametrize("write_heads", [1, 2])
@pytest.mark.parametrize("mode", MODES)
def test_is_its_formula_with_gradients(mode, write_heads):
    layer = make(mode, write_heads=write_heads, shift=2, output_size=3)
    x = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    output, state = layer(x)
    expected, memory = plain(layer, x, layer.initial_state(3))
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(state.memory, memory)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(output.square().sum() + state.memory.sin().sum(), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum() + memory.sin().sum(), leaves))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mode", MODES)
def test_provenance_makes_the_reads(mode, batch_first):
    layer = make(mode, batch_first=batch_first)
    x = torch.randn(3, 1, 6, dtype=torch.float64)
    x = x if batch_first else x.transpose(0, 1)
    output, state, (weights, _, index) = layer(x, return_trace=True)
    torch.testing.assert_close(output, layer(x)[0])
    weights, index = (None if t is None else t[:, 0] if batch_first else t[0] for t in (weights, index))
    assert weights.shape == (3, 2, layer.k if index is not None else layer.slots) and (index is None) == (mode in ("content", "ntm"))
    if index is not None:
        weights = torch.zeros(3, 2, layer.slots, dtype=weights.dtype).scatter_add(-1, index, weights)
    reads = (weights @ state.memory).flatten(1)
    torch.testing.assert_close(output.reshape(3, -1), layer.output(torch.cat([x.reshape(3, 6), reads], -1)))
    empty = layer(x[:, :0] if batch_first else x[:0], return_trace=True)[2]
    assert empty.read.numel() == empty.write.numel() == 0


@pytest.mark.parametrize("mode", MODES)
def test_state_carries_over(mode):
    layer = make(mode)
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    whole, last = layer(x)
    state, pieces = None, []
    for piece in x.split(3, 1):
        output, state = layer(piece, state)
        pieces.append(output)
    torch.testing.assert_close(torch.cat(pieces, 1), whole)
    torch.testing.assert_close(state.memory, last.memory)
    assert last.memory.requires_grad and not last.detach().memory.requires_grad
    torch.testing.assert_close(layer(x, tuple(last.detach()))[0], layer(x, last)[0])


@pytest.mark.parametrize("mode", MODES)
def test_batch_first_both_ways_and_causal(mode):
    layer, other = make(mode), make(mode, batch_first=False)
    x = torch.randn(3, 8, 6, dtype=torch.float64)
    output = layer(x)[0]
    torch.testing.assert_close(other(x.transpose(0, 1))[0].transpose(0, 1), output)
    changed = x.clone()
    changed[:, 5:] += 1
    again = layer(changed)[0]
    assert torch.equal(again[:, :5], output[:, :5]) and not torch.equal(again[:, 5], output[:, 5])
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(layer(changed)[0][[0, 2]], output[[0, 2]])
    assert layer(x[:, :0])[0].shape == (3, 0, 6)


LONG = ("content", "ntm", *(pytest.param(mode, marks=pytest.mark.slow) for mode in ("topk", "product")))


@pytest.mark.parametrize("mode", LONG)
def test_trains_a_thousand_steps_without_nan(mode):
    torch.manual_seed(0)
    layer = nn.ExternalMemory(4, 9 if mode == "product" else 6, 4 if mode == "product" else 3, 1, mode, k=2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)  # far too high, on purpose
    state = None
    for _ in range(1000):
        x = torch.randn(2, 2, 4)
        output, state = layer(x, state)
        state = state.detach()
        loss = (output[:, 1] - x[:, 0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        assert loss.isfinite() and state.memory.isfinite().all()
    assert all(p.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("mode", LONG)
def test_learns_to_remember(mode):
    """The first of six symbols must be named at the end, which input and output layers alone cannot do."""
    torch.manual_seed(0)
    layer = nn.ExternalMemory(5, 9 if mode == "product" else 8, 6, 1, mode, output_size=4, k=4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
    losses = []
    for _ in range(300):
        symbol = torch.randint(4, (32,))
        x = torch.zeros(32, 4, 5)
        x[:, 0, :4] = F.one_hot(symbol, 4).float()
        x[:, -1, 4] = 1
        loss = F.cross_entropy(layer(x)[0][:, -1], symbol)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[0] > 1.2 and sum(losses[-20:]) / 20 < 0.3


@pytest.mark.parametrize("mode", MODES)
def test_copies_compile_and_half_precision(mode):
    layer = make(mode, torch.float32)
    x = torch.randn(2, 3, 6)
    output, _ = layer(x)
    assert torch.equal(copy.deepcopy(layer)(x)[0], output)
    other = make(mode, torch.float32)
    other.load_state_dict(layer.state_dict(), strict=True)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], output)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_state = layer(x)
    assert low_state.memory.dtype == torch.float32
    torch.testing.assert_close(low.float(), output, atol=0.05, rtol=0.05)
    half, _ = layer.to(torch.bfloat16)(x.bfloat16())
    torch.testing.assert_close(half.float(), output, atol=0.05, rtol=0.05)
    assert mode in repr(layer)


@pytest.mark.parametrize("mode", MODES)
def test_an_exported_layer_is_saved_with_its_state(mode):
    layer, x = make(mode), torch.randn(3, 2, 6, dtype=torch.float64)
    state = layer(x)[1]
    expected = layer(x, state)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x, state.detach())), file)
    file.seek(0)
    found = torch.export.load(file).module()(x, state.detach())
    assert isinstance(found[1], nn.external_memory.ExternalMemoryState)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: make("dream"), "mode: expected one of 'content', 'ntm', 'dnc', 'topk', 'product', 'store', got 'dream'"),
        (lambda: make("topk", similarity="l2"), "similarity: expected 'cosine' or 'dot' in mode 'topk', got 'l2'"),
        (lambda: nn.ExternalMemory(6, 8, 4, 1, "product"), "slots: expected a square number in mode 'product', got 8"),
        (lambda: nn.ExternalMemory(6, 9, 3, 1, "product"), "width: expected an even number in mode 'product', got 3"),
        (lambda: make(k=0), "k: expected a positive integer, got 0"),
        (lambda: make(similarity="euclid"), "similarity: expected one of"),
        (lambda: nn.ExternalMemory(4, 0, 3, 1), "slots: expected a positive integer, got 0"),
        (lambda: make(shift=-1), "shift: expected at least 0"),
        (lambda: make()(torch.randn(2, 6)), r"input: expected \[B T I\] with I=6, got shape \(2, 6\)"),
        (lambda: make()(torch.randn(2, 3, 5)), r"got shape \(2, 3, 5\)"),
        (lambda: make()(torch.randn(2, 3, 6).double(), make().initial_state(3)), r"state: expected memory of shape \(2, 5, 4\)"),
        (lambda: make("ntm")(torch.randn(2, 3, 6).double(), make().initial_state(2)), "state: expected weights in mode 'ntm'"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
