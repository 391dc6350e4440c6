"""Sparse access memory as a module: its steps against the formulas, windows, training, and arguments that do not fit."""

import pytest
import torch

from memkernels.nn import SAM


def model_of(dtype=torch.float64, **kwargs):
    torch.manual_seed(0)
    return SAM(3, hidden_size=5, output_size=2, slots=6, width=4, heads=2, rows_read=2, dtype=dtype, **kwargs)


def by_hand(model, x, slots):
    """The formulas of one sequence "T I", every step on a copy of the memory."""
    rows, heads = torch.zeros(slots, model.width, dtype=x.dtype), model.heads
    last = list(range(-slots, 0))
    h = c = torch.zeros(1, model.hidden_size, dtype=x.dtype)
    read, index, weights = torch.zeros(heads, model.width, dtype=x.dtype), [[0, 1]] * heads, torch.zeros(heads, 2, dtype=x.dtype)
    clock, outputs = 0, []
    for step in x:
        h, c = torch.nn.LSTMCell.forward(model.controller, torch.cat([step, read.flatten()])[None], (h, c))
        query, word, strength, gate, mix = model.interface(h[0]).split([heads * model.width] * 2 + [heads] * 3)
        gate, mix, strength = gate.sigmoid(), mix.sigmoid(), 1 + torch.nn.functional.softplus(strength)
        oldest = sorted(range(slots), key=lambda i: last[i])[:heads]
        rows = rows * torch.tensor([[float(i not in oldest)] for i in range(slots)])
        used = []
        for k in range(heads):
            amounts = [*(gate[k] * mix[k] * w for w in weights[k]), gate[k] * (1 - mix[k])]
            places = [*index[k], oldest[k]]
            for place, amount in zip(places, amounts):
                one = torch.zeros(slots, 1, dtype=x.dtype)
                one[place] = 1
                rows = rows + one * amount * word.view(heads, -1)[k]
            used += [p if a > model.threshold else places[int(torch.stack(amounts).argmax())] for p, a in zip(places, amounts)]
        index, new, words = [], [], []
        for k in range(heads):
            q = query.view(heads, -1)[k]
            cosine = rows @ q / ((rows**2).sum(-1) + 1e-6).sqrt() / (q @ q + 1e-6).sqrt()
            index.append(cosine.argsort(descending=True, stable=True)[:2].tolist())
            new.append(torch.softmax(strength[k] * cosine[index[k]], 0))
            words.append(new[k] @ rows[index[k]])
        weights, read = torch.stack(new), torch.stack(words)
        for k in range(heads):
            used += [p if w > model.threshold else index[k][int(weights[k].argmax())] for p, w in zip(index[k], weights[k])]
        for place in used:
            last[place], clock = clock, clock + 1
        outputs.append(model.output(torch.cat([h[0], read.flatten()])))
    return torch.stack(outputs)


def test_steps_are_the_formulas():
    model = model_of()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    output, _ = model(x)
    wanted = torch.stack([by_hand(model, one, 6) for one in x])
    torch.testing.assert_close(output, wanted)
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(output.square().sum(), parameters)
    for name, a, b in zip(names, found, torch.autograd.grad(wanted.square().sum(), parameters)):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("batch_first", (True, False))
def test_windows_are_the_whole(batch_first):
    model = model_of(batch_first=batch_first)
    x = torch.randn(2, 8, 3, dtype=torch.float64)
    time = 1 if batch_first else 0
    given = x if batch_first else x.transpose(0, 1)
    whole, _ = model(given)
    state, parts = None, []
    for window in given.split(3, time):
        output, state = model(window, state)
        output.sum().backward()
        state = state.detach_()
        parts.append(output.detach())
    torch.testing.assert_close(torch.cat(parts, time), whole)


def test_it_learns_what_it_was_told():
    """The first symbol of a sequence is asked for at its end."""
    torch.manual_seed(1)
    model = SAM(4, hidden_size=16, output_size=4, slots=20, width=8, rows_read=4)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    losses = []
    for _ in range(60):
        symbol = torch.randint(4, (16,))
        x = torch.zeros(16, 5, 4)
        x[torch.arange(16), 0, symbol] = 1
        output, _ = model(x)
        loss = torch.nn.functional.cross_entropy(output[:, -1], symbol)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


def test_autocast():
    """The controller in bfloat16, the memory as it is."""
    model = model_of().float()
    x = torch.randn(2, 5, 3)
    wanted, _ = model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output, state = model(x)
    assert state.memory.rows.dtype == torch.float32
    torch.testing.assert_close(output.float(), wanted, atol=3e-2, rtol=3e-2)
    output.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_arguments():
    model = model_of()
    x = torch.randn(2, 3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match="SAM: input: expected"):
        model(x[..., :2])
    with pytest.raises(TypeError, match="SAM: state: expected"):
        model(x, (1, 2))
    _, state = model(x)
    with pytest.raises(ValueError, match=r"SAM: state\.memory: expected"):
        model(x[:1], state.detach_())
    with pytest.raises(ValueError, match="SAM: slots: expected at least"):
        SAM(3, 4, 2, slots=3, width=4, rows_read=4)
    with pytest.raises(TypeError, match="SAM: threshold: expected a number"):
        SAM(3, 4, 2, slots=9, width=4, threshold="high")
    assert model(x[:, :0])[0].shape == (2, 0, 2)


@pytest.mark.parametrize("steps", [0, 5])
def test_trace(steps):
    torch.manual_seed(0)
    model = SAM(3, 8, 2, slots=12, width=4, heads=2, rows_read=3)
    x = torch.randn(2, steps, 3)
    plain, _ = model(x)
    output, state, trace = model(x, return_trace=True)
    assert torch.equal(output, plain)
    assert trace.read.shape == trace.rows.shape == (2, steps, 2, 3) and trace.write.shape == trace.write_rows.shape == (2, steps, 2, 4)
    assert trace.rows.dtype == trace.write_rows.dtype == torch.int64
    if steps:
        torch.testing.assert_close(trace.read.sum(-1), torch.ones(2, steps, 2))
        assert torch.equal(trace.rows[:, -1], state.places) and torch.equal(trace.read[:, -1], state.weights)
        # The rows a head read are those it writes a step later, and the least recently accessed one.
        assert torch.equal(trace.write_rows[:, 1:, :, :3], trace.rows[:, :-1])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_trains_over_ten_thousand_steps_and_a_million_rows():
    """A copy of the memory at each step would be 320 GB."""
    torch.manual_seed(0)
    model = SAM(4, hidden_size=8, output_size=4, slots=1_000_000, width=8, heads=1)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    output, _ = model(torch.randn(1, 10_000, 4))
    output.square().mean().backward()
    optimizer.step()
    assert output.isfinite().all() and all(p.isfinite().all() for p in model.parameters())
    assert any((p != old).any() for p, old in zip(model.parameters(), before))
