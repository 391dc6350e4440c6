"""nn.ExternalMemory(mode="store"): its steps against a dict, gradients, state, provenance, errors."""

import io

import pytest
import torch
from torch.nn import functional as F

from memkernels import nn
from memkernels.models import MemoryLM, Vocabulary

D = torch.float64
FAR = torch.tensor([-(2**63), -1, 0, 1, 2**63 - 1])  # no int64 is reserved


def make(slots=4, read_heads=3, write_heads=2, dtype=D, **kwargs):
    torch.manual_seed(0)
    return nn.ExternalMemory(6, slots, 4, read_heads, "store", write_heads=write_heads, dtype=dtype, **{"bits": 3, **kwargs})


def by_dict(layer, x, store, retrieve):
    """Every sequence has a dict, in which a key that is stored again becomes the youngest; past `slots` the oldest one leaves."""
    values, reads = layer.interface(x).unflatten(-1, (layer.write_heads, layer.width)), []
    for b in range(x.shape[0]):
        memory: dict[int, torch.Tensor] = {}
        for t in range(x.shape[1]):
            for h, key in enumerate(store[b, t].tolist()):
                if key is not None:
                    memory.pop(key, None)
                    memory[key] = values[b, t, h]
                    if len(memory) > layer.slots:
                        memory.pop(next(iter(memory)))
            nothing = values.new_zeros(layer.width)
            reads += [memory.get(key, nothing) for key in retrieve[b, t].tolist()]
    reads = torch.stack(reads).view(*x.shape[:2], -1)
    return layer.output(torch.cat([x, reads], -1))


@pytest.mark.parametrize("slots", [1, 2, 9])
def test_is_a_dict_with_gradients(slots):
    layer, x = make(slots), torch.randn(3, 12, 6, dtype=D, requires_grad=True)
    store, retrieve = FAR[torch.randint(5, (3, 12, 2))], FAR[torch.randint(5, (3, 12, 3))]
    output, state = layer(x, keys=(store, retrieve))
    expected = by_dict(layer, x, store, retrieve)
    torch.testing.assert_close(output, expected)
    leaves = [x, *layer.parameters()]
    got = torch.autograd.grad(output.square().sum(), leaves, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected.square().sum(), leaves))
    alive = (state.age > 0).sum(1)
    assert (alive <= slots).all() and all(len(set(k[a > 0].tolist())) == n for k, a, n in zip(state.keys, state.age, alive))
    if slots == 2:
        assert torch.autograd.gradcheck(lambda x: layer(x[:, :4])[0], x) and torch.autograd.gradgradcheck(lambda x: layer(x[:, :3])[0], x)


def test_state_carries_over_and_nothing_looks_ahead():
    layer, other = make(), make(batch_first=False)
    x = torch.randn(3, 9, 6, dtype=D)
    whole, last = layer(x)
    state, pieces = None, []
    for piece in x.split([0, 1, 3, 5], 1):
        output, state = layer(piece, state)
        pieces.append(output)
    torch.testing.assert_close((torch.cat(pieces, 1), tuple(state)), (whole, tuple(last)))
    assert last.memory.requires_grad and not last.detach().memory.requires_grad
    torch.testing.assert_close(other(x.transpose(0, 1))[0].transpose(0, 1), whole)
    changed = x.clone()
    changed[:, 5:] += 1
    again = layer(changed)[0]
    assert torch.equal(again[:, :5], whole[:, :5]) and not torch.equal(again[:, 5], whole[:, 5])
    changed = x.clone()
    changed[1] += 1
    assert torch.equal(layer(changed)[0][[0, 2]], whole[[0, 2]])
    assert layer(x[:0])[0].shape == (0, 9, 6)


def test_recalls_what_came_after_the_last_step_like_itself():
    """Of exactly equal steps; the second probe finds a step that differs where it is least certain."""
    layer = make(slots=16, read_heads=2, write_heads=1, output_size=8, bits=8)
    with torch.no_grad():  # the output is the reads alone
        layer.output.weight.copy_(torch.cat([torch.zeros(8, 6, dtype=D), torch.eye(8, dtype=D)], 1))
        layer.output.bias.zero_()
    a, b, c = torch.randn(3, 6, dtype=D)
    side = layer.planes[0] @ a
    least = side.abs().argmin()
    like_a = a - 1.001 * side[least] / layer.planes[0, least].square().sum() * layer.planes[0, least]  # over that plane
    assert ((layer.planes[0] @ like_a > 0) != (side > 0)).sum() == 1
    reads = layer(torch.stack([a, b, a, c, a, like_a])[None])[0][0].unflatten(-1, (2, 4))
    value = layer.interface(torch.stack([b, c]))
    torch.testing.assert_close(reads[2, 0], value[0])
    torch.testing.assert_close(reads[4, 0], value[1])
    torch.testing.assert_close(reads[5, 1], layer.interface(like_a[None])[0])  # under a, which came before
    assert not reads[:2].any() and not reads[3, 0].any()


def test_provenance_makes_the_reads():
    layer, x = make(), torch.randn(3, 7, 6, dtype=D)
    state = layer(x[:, :6])[1]
    output, state, (read, write, rows) = layer(x[:, 6:], state, return_trace=True)
    assert read.shape == rows.shape == (3, 1, 3, 1) and write.shape == (3, 1, 2, 4) and (write.sum(-1) == 1).all()
    assert torch.equal(read[..., 0] == 1, rows[..., 0] >= 0)
    found = state.memory.gather(1, rows[:, 0].clamp(min=0).expand(-1, -1, 4)) * read[:, 0]
    torch.testing.assert_close(output[:, 0], layer.output(torch.cat([x[:, 6], found.flatten(1)], -1)))
    empty = layer(x[:, :0], return_trace=True)[2]
    assert empty.read.shape == (3, 0, 3, 1) and empty.write.shape == (3, 0, 2, 4)


def test_associative_recall_is_learnt():
    """Pairs of a key and a value, then keys again: which value came after it. The keys of the store are those of the embedded symbols."""
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(24, 16)
    layer = nn.ExternalMemory(16, 16, 16, 1, "store", output_size=24, bits=20)
    optimizer = torch.optim.Adam([*embedding.parameters(), *layer.parameters()], lr=0.02)
    for _ in range(60):
        keys = torch.rand(16, 12).argsort(1)[:, :6]
        values = torch.randint(12, 24, (16, 6))
        order = torch.rand(16, 6).argsort(1)
        tokens = torch.cat([torch.stack([keys, values], 2).flatten(1), keys.gather(1, order)], 1)
        logits = layer(embedding(tokens))[0][:, 12:]
        loss = F.cross_entropy(logits.flatten(0, 1), values.gather(1, order).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits.argmax(-1) == values.gather(1, order)).float().mean() > 0.98


def test_in_a_model_compiled_exported_and_in_half_precision():
    model = MemoryLM(Vocabulary.of("abcdefgh\n"), mode="store", hidden=12, slots=5, width=4, read_heads=2)
    tokens = model.vocabulary.encode("abcdefgh\n" * 20)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for step in range(40):
        model.train_step(tokens.unfold(0, 17, 5)[step % 8 :: 8], optimizer)
    assert model.evaluate(tokens, window=16) < 0.6 and model.generate("abc", 6, temperature=0) == "defgh\n"
    layer = make(dtype=torch.float32)
    x = torch.randn(2, 3, 6)
    output, state = layer(x)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x)[0], output)
    file = io.BytesIO()
    torch.export.save(torch.export.export(layer, (x, state.detach())), file)
    file.seek(0)
    found = torch.export.load(file).module()(x, state.detach())
    assert isinstance(found[1], nn.StoreState)
    torch.testing.assert_close(found, layer(x, state.detach()))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low, low_state = layer(x)
    assert low_state.memory.dtype == torch.float32
    torch.testing.assert_close(low.float(), output, atol=0.05, rtol=0.05)
    other = make(dtype=torch.float32)
    with torch.no_grad():
        other.planes.zero_()
    other.load_state_dict(layer.state_dict(), strict=True)
    assert torch.equal(other(x)[0], output) and layer.bfloat16()(x.bfloat16())[0].dtype == torch.bfloat16


X = torch.zeros(2, 3, 6, dtype=D)
KEYS = torch.zeros(2, 3, 2, dtype=torch.int64), torch.zeros(2, 3, 3, dtype=torch.int64)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: make(bits=49), ValueError, "bits: expected 1 to 48, got 49"),
        (lambda: make(read_heads=9), ValueError, r"read_heads: expected at most write_heads \* \(bits \+ 1\) = 8 in mode 'store', got 9"),
        (lambda: make()(X, 3), TypeError, "state: expected a StoreState or None, got int"),
        (lambda: make()(X, make().initial_state(3)), ValueError, r"state: expected memory of shape \(2, 4, 4\), got \(3, 4, 4\)"),
        (lambda: make()(X, make().initial_state(2)._replace(age=X[..., 0])), ValueError, r"state: expected age of shape \(2, 4\)"),
        (lambda: make()(X, make().initial_state(2)._replace(keys=torch.zeros(2, 4))), TypeError, "state.keys: expected int64, got"),
        (lambda: make()(X, keys=KEYS[0]), TypeError, "keys: expected a pair of int64 tensors"),
        (lambda: make()(X, keys=KEYS[::-1]), ValueError, r"keys\[0\]: expected \[B T H\] of shape \(2, 3, 2\), got shape \(2, 3, 3\)"),
        (lambda: make()(X, keys=(KEYS[0], KEYS[1].int())), TypeError, r"keys\[1\]: expected int64, got int32"),
        (lambda: nn.ExternalMemory(6, 4, 4, 1, dtype=D)(X, keys=KEYS), ValueError, "keys: expected None in mode 'content', got tuple"),
    ],
)
def test_errors(call, error, message):
    with pytest.raises(error, match=rf"^ExternalMemory: {message}"):
        call()
