"""The speeds promised for the DNC: its links, and a whole layer against the same formulas in torch ops (read by targets.py)."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator

import torch
from target import Target
from torch import Tensor
from torch.nn import functional as F

from memkernels import nn
from memkernels.bench.row import Row
from memkernels.bench.runner import Case, alternating
from memkernels.testing.spec import specs


def dnc_targets() -> Iterator[Target]:
    """Links; `dnc_sequence` with a controller against a loop of torch ops; nn.DNC against the loop of pytorch-dnc, in its formulas."""
    yield Target("link_step", specs()["link_step"].sample("B8_N512"), "fwd+bwd", dict(eager=6, compile=3))
    for name, bar in (("B32_N64_W32_R4_T40", 12), ("B8_N256_W64_R4_T40", 10)):
        sample = specs()["dnc_sequence"].sample(name)
        yield Target("dnc_sequence", sample, "fwd+bwd", dict(eager=bar))
        yield Target("dnc_sequence", dataclasses.replace(sample, name=f"layer_{name}"), "fwd+bwd", dict(eager=bar), rows=_layer)


def _layer(case: Case, seconds: float) -> Iterable[Row]:
    """nn.DNC with pytorch-dnc's formulas over 40 steps, against a loop of torch ops as that package writes them."""
    d = case.sample.dims
    dataclasses.replace(case, sample=case.spec.samples[0]).check()
    layer = nn.DNC.ixaxaar(16, 64, slots=d["N"], width=d["W"], read_heads=d["R"])
    controller = torch.nn.LSTM(layer.controller.input_size, 64, 2)
    controller.load_state_dict(layer.controller.state_dict())
    x = torch.randn(d["B"], 40, 16)
    ours, parameters = (lambda: layer(x)[0]), tuple(layer.parameters())
    theirs = lambda: _eager_layer(layer, controller, x)  # noqa: E731
    torch.testing.assert_close(ours(), theirs(), atol=1e-4, rtol=1e-3)

    def both(function, wanted):
        return lambda: lambda: torch.autograd.grad(function().square().sum(), wanted)

    rest = (*layer.interface.parameters(), *layer.output.parameters())
    mine, eager = alternating([both(ours, parameters), both(theirs, (*controller.parameters(), *rest))], seconds)
    row = case.row("fwd+bwd", mine, "eager", eager, "a whole layer, step by step")
    yield dataclasses.replace(row, gb_s=None, floor=None, checked="eager")


def _eager_layer(layer: nn.DNC, controller: torch.nn.LSTM, x: Tensor) -> Tensor:
    state, outputs = layer.initial_state(len(x)), []
    memory, hidden = tuple(state.memory), (state.hidden, state.cell)
    blind = 1 - torch.eye(memory[0].shape[1])
    for step in x.unbind(1):
        seen = torch.cat([step, state.reads.flatten(1)], -1)
        out, hidden = controller(seen[None], hidden)
        out = out[0].clamp(-20, 20)
        (ask,) = layer.layout.steps(layer.interface(out)[None])
        read, memory = _eager_step(memory, ask, blind)
        outputs.append(layer.output(torch.cat([out, read.flatten(1)], -1)))
    return torch.stack(outputs, 1)


def _eager_step(state, ask, blind):
    memory, usage, link, last, write, read = state
    usage = usage + (1 - usage) * (1 - torch.prod(1 - write, 1))
    usage = usage * torch.prod(1 - ask.free_gate.unsqueeze(2) * read, 1)
    content = _cosine(memory, ask.write_keys, ask.write_strengths)
    s, order = torch.sort(1e-6 + (1 - 1e-6) * usage, dim=1, stable=True)
    free = (1 - s) * torch.cumprod(torch.cat([torch.ones_like(s[:, :1]), s], 1), 1)[:, :-1]
    free = free.gather(1, order.argsort(1)).unsqueeze(1)
    gate = ask.allocation_gate.unsqueeze(-1)
    write = ask.write_gate.unsqueeze(-1) * (gate * free + (1 - gate) * content)
    memory = memory * torch.prod(1 - write.unsqueeze(3) * ask.erase.unsqueeze(2), 1) + torch.bmm(write.transpose(1, 2), ask.add)
    link = blind * ((1 - write.unsqueeze(3) - write.unsqueeze(2)) * link + write.unsqueeze(3) * last.unsqueeze(2))
    last = (1 - write.sum(2, keepdim=True)) * last + write
    rows = read.unsqueeze(1)
    forward, backward = torch.matmul(link, rows.transpose(2, 3)).permute(0, 3, 1, 2), torch.matmul(rows, link).transpose(1, 2)
    content, modes = _cosine(memory, ask.read_keys, ask.read_strengths), ask.read_modes.unsqueeze(3)
    read = modes[:, :, 2] * content + (modes[:, :, :1] * backward).sum(2) + (modes[:, :, 1:2] * forward).sum(2)
    return torch.bmm(read, memory), (memory, usage, link, last, write, read)


def _cosine(memory, keys, strengths):
    norms = memory.square().sum(2).clamp_min(1e-30).sqrt().unsqueeze(1) * keys.square().sum(2).sqrt().unsqueeze(2)
    return F.softmax(torch.bmm(keys, memory.transpose(1, 2)) / (norms + 1e-6) * strengths.unsqueeze(2), 2)
