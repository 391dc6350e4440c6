"""nn.NTM: loudinthecloud/pytorch-ntm's formulas written out from its weights, state, the ops of a step, bad arguments."""

import pytest
import torch
from torch.nn import functional as F

import memkernels as mk
from memkernels import nn


def theirs(batch, readers=1, scale=1.0, features=3, hidden=7, outputs=2, slots=6, width=4):
    """Weights under that package's names, and its machine written out, one row of the batch at a time where it does so."""
    torch.manual_seed(0)
    lstm = torch.nn.LSTMCell(features + readers * width, hidden)
    heads = [torch.nn.Linear(hidden, width + 6) for _ in range(readers)] + [torch.nn.Linear(hidden, 3 * width + 6)]
    with torch.no_grad():
        for parameter in (p for head in heads for p in head.parameters()):
            parameter.mul_(scale)
    fc, memory = torch.nn.Linear(hidden + readers * width, outputs), torch.rand(slots, width) - 0.5
    reads, h, c = torch.randn(readers, 1, width), torch.randn(1, 1, hidden), torch.randn(1, 1, hidden)
    named = {f"ntm.controller.lstm.{n}_l0": t for n, t in lstm.named_parameters()}
    for i, head in enumerate(heads):
        kind = "fc_read" if i < readers else "fc_write"
        named |= {f"ntm.heads.{i}.{kind}.{n}": t for n, t in head.named_parameters()}
    named |= {"ntm.fc.weight": fc.weight, "ntm.fc.bias": fc.bias, "ntm.memory.mem_bias": memory, "memory.mem_bias": memory}
    named |= {f"ntm.read{i}_bias": r for i, r in enumerate(reads)}
    named |= {"ntm.controller.lstm_h_bias": h, "ntm.controller.lstm_c_bias": c}
    named = {n: t.detach().double() for n, t in named.items()}
    modules = [m.double() for m in (lstm, *heads, fc)]

    def address(raw, memory, previous):
        key, strength, gate, shift, sharpen = (
            raw[:, :width],
            raw[:, width],
            raw[:, width + 1],
            raw[:, width + 2 : width + 5],
            raw[:, width + 5],
        )
        similar = F.cosine_similarity(memory + 1e-16, key[:, None] + 1e-16, dim=-1)
        content = torch.softmax(F.softplus(strength)[:, None] * similar, 1)
        gated = torch.sigmoid(gate)[:, None] * content + (1 - torch.sigmoid(gate)[:, None]) * previous
        taps, moved = torch.softmax(shift, 1), []
        for row, s in zip(gated, taps):
            around = torch.cat([row[-1:], row, row[:1]])
            moved.append(s[0] * around[:-2] + s[1] * around[1:-1] + s[2] * around[2:])
        powers = torch.stack(moved) ** (1 + F.softplus(sharpen))[:, None]
        return powers / (powers.sum(1, keepdim=True) + 1e-16)

    def run(x):
        memories = named["memory.mem_bias"].repeat(batch, 1, 1)
        last = [r.double().repeat(batch, 1) for r in reads]
        state = h[0].double().repeat(batch, 1), c[0].double().repeat(batch, 1)
        weights, outs = [torch.zeros(batch, slots).double()] * len(heads), []
        for step in x:
            state = modules[0](torch.cat([step, *last], 1), state)
            raws = [head(state[0]) for head in modules[1:-1]]
            weights = [address(raw, memories, w) for raw, w in zip(raws, weights)]
            last = [(w[:, None] @ memories)[:, 0] for w in weights[:-1]]
            erase, add = torch.sigmoid(raws[-1][:, width + 6 : 2 * width + 6]), raws[-1][:, 2 * width + 6 :]
            memories = memories * (1 - weights[-1][:, :, None] * erase[:, None]) + weights[-1][:, :, None] * add[:, None]
            outs.append(torch.sigmoid(modules[-1](torch.cat([state[0], *last], 1))))
        return torch.stack(outs), memories

    return named, run


@pytest.mark.parametrize("backend", ["cpp", "reference"])
@pytest.mark.parametrize("scale", [1.0, 60.0])  # sharpening of up to 100: the published 1e-16 is most of a sum of powers
@pytest.mark.parametrize("readers", [1, 2])
def test_is_pytorch_ntm(readers, scale, backend):
    named, run = theirs(3, readers, scale)
    model = nn.NTM.from_pytorch_ntm(named, batch_first=False)
    x = torch.randn(9, 3, 3, dtype=torch.float64, requires_grad=True)
    with mk.backend(backend):
        output, state = model(x)
    expected, memory = run(x)
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(state.memory, memory, rtol=1e-6, atol=1e-7)
    with mk.backend(backend):
        got, wanted = (torch.autograd.grad(out.square().sum(), x)[0] for out in (output, expected))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-8)


def make(**kwargs):
    torch.manual_seed(0)
    return nn.NTM(3, 7, 2, 6, 4, **{"dtype": torch.float64, "batch_first": False, **kwargs})


@pytest.mark.parametrize("form", ["graves", "pytorch-ntm"])
def test_state_carries_over(form):
    model, x = make(form=form, read_heads=2), torch.randn(8, 3, 3, dtype=torch.float64)
    whole, last = model(x)
    first, state = model(x[:5])
    second, state = model(x[5:], state)
    torch.testing.assert_close(torch.cat([first, second]), whole)
    torch.testing.assert_close(tuple(state), tuple(last))
    assert model(x[:0])[0].shape == (0, 3, 2)
    flipped = make(form=form, read_heads=2, batch_first=True)(x.transpose(0, 1))[0]
    torch.testing.assert_close(flipped.transpose(0, 1), whole)


def test_provenance_makes_the_reads():
    model, x = make(read_heads=2, write_heads=2, batch_first=True), torch.randn(3, 5, 3, dtype=torch.float64)
    plain, _ = model(x)
    output, state, trace = model(x, return_trace=True)
    assert torch.equal(output, plain) and trace.read.shape == (3, 5, 2, 6) and trace.write.shape == (3, 5, 2, 6) and trace.rows is None
    torch.testing.assert_close(trace.read[:, -1] @ state.memory, state.reads)
    assert torch.equal(trace.write[:, -1], state.write_weights)
    assert torch.autograd.grad(trace.read.square().sum(), model.read_key)[0].count_nonzero()
    assert model(x[:, :0], return_trace=True)[2].read.shape == (3, 0, 2, 6)


def test_the_ops_of_a_step_compute_the_same():
    model, x = make(read_heads=2, write_heads=2, shift=2), torch.randn(4, 3, 3, dtype=torch.float64)
    hidden, reads, state, weights = model._by_steps(x, model.initial_state(3))
    output, wanted, trace = model(x, return_trace=True)
    torch.testing.assert_close(model.output(torch.cat([hidden, reads.flatten(2)], -1)), output)
    torch.testing.assert_close(tuple(state), tuple(wanted))
    torch.testing.assert_close(weights, torch.cat(trace[:2], 2))


def test_training_from_a_memory_of_zeros_stays_finite():
    model = make(dtype=torch.float32)
    torch.nn.init.zeros_(model.initial_memory)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        output, _ = model(torch.randn(10, 2, 3))
        optimizer.zero_grad()
        output.square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())
        optimizer.step()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make(form="ntm"), "NTM: form: expected one of 'graves', 'pytorch-ntm', got 'ntm'"),
        (lambda: nn.NTM(3, 7, 2, 0, 4), "NTM: slots: expected a positive integer, got 0"),
        (lambda: make()(torch.randn(2, 3, 4).double()), r"NTM: input: expected \[T B I\] with I=3, got shape"),
        (lambda: make()(torch.randn(2, 3, 3).double(), make().initial_state(2)), "ntm_sequence: memory: expected .*B=3"),
        (lambda: make()(torch.randn(2, 3, 3).double(), nn.NTM(3, 7, 2, 9, 4).initial_state(3)), "NTM: state.memory: expected .* with N=6"),
        (lambda: nn.NTM.from_pytorch_ntm({"memory.mem_bias": torch.ones(2, 3)}), "NTM: weights: expected one LSTM layer.*got heads none"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()
