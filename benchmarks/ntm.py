"""The speeds promised for Neural Turing Machines (read by targets.py), and the step loop they are held against."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from target import Target
from torch.nn import functional as F

from memkernels.bench.row import Row
from memkernels.bench.runner import Case
from memkernels.ops.ntm_sequence import NTMState
from memkernels.testing.spec import specs

PEERS = ("pytorch-ntm", "eager")


def _address(raw: torch.Tensor, width: int, memory: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
    """The weights of one head as loudinthecloud/pytorch-ntm computes them: the shift is a loop over the batch."""
    key, strength, gate, sharpen, taps = raw.split((width, 1, 1, 1, 3), -1)
    similar = F.cosine_similarity(memory + 1e-16, key[:, None] + 1e-16, dim=-1)
    content = torch.softmax(F.softplus(strength) * similar, 1)
    gated = torch.lerp(previous, content, torch.sigmoid(gate))
    taps = torch.softmax(taps, 1).flip(1)
    moved = torch.zeros_like(gated)
    for b in range(len(gated)):
        around = torch.cat([gated[b, -1:], gated[b], gated[b, :1]])
        moved[b] = F.conv1d(around.view(1, 1, -1), taps[b].view(1, 1, -1)).view(-1)
    powers = moved ** (1 + F.softplus(sharpen))
    return powers / (powers.sum(1, keepdim=True) + 1e-16)


def step_loop(
    input, state, weight_ih, weight_rh, weight_hh, bias, read_key, read_scalars, write_key, write_scalars, write_vectors, form
):  # fmt: skip
    """pytorch-ntm's way through a sequence, in its formulas: one read and one write head, a module call a part and step."""
    assert form == "pytorch-ntm" and len(read_key) == len(write_key) == 1
    width, into, no_bias = read_key.shape[1], torch.cat([weight_ih, weight_rh.flatten(1)], 1), torch.zeros_like(bias)
    reader = torch.cat([read_key[0], read_scalars[0]])
    writer = torch.cat([write_key[0], write_scalars[0], write_vectors.flatten(0, 2)])
    memory, read_weights, write_weights = state.memory, state.read_weights[:, 0], state.write_weights[:, 0]
    reads, h, c = state.reads[:, 0], state.hidden, state.cell
    hidden, found = [], []
    for x in input:
        h, c = torch.lstm_cell(torch.cat([x, reads], 1), (h, c), into, weight_hh, bias, no_bias)
        read_weights = _address(F.linear(h, reader[:, :-1], reader[:, -1]), width, memory, read_weights)
        reads = torch.matmul(read_weights[:, None], memory)[:, 0]
        raw = F.linear(h, writer[:, :-1], writer[:, -1])
        write_weights = _address(raw[:, : width + 6], width, memory, write_weights)
        erase, add = raw[:, width + 6 :].chunk(2, 1)
        memory = memory * (1 - write_weights[..., None] * torch.sigmoid(erase)[:, None]) + write_weights[..., None] * add[:, None]
        hidden.append(h)
        found.append(reads[:, None])
    return torch.stack(hidden), torch.stack(found), NTMState(memory, read_weights[:, None], write_weights[:, None], reads[:, None], h, c)


def _rows(case: Case, seconds: float) -> list[Row]:
    spec = dataclasses.replace(case.spec, peers={**case.spec.peers, "pytorch-ntm": step_loop})
    return list(Case(spec, case.sample, case.dtype).rows(["fwd+bwd"], PEERS, seconds))


def ntm_targets() -> Iterator[Target]:
    """Rows of location_address and ntm_sequence; "eager" is the same machine with every part vectorised over the batch."""
    yield Target("location_address", specs()["location_address"].sample("B32_R4_N1024"), "fwd+bwd", dict(eager=6))
    for name, ratio in (("copy20_B64", 25), ("copy20_B1", 15)):
        bars: dict[str, Any] = {"pytorch-ntm": ratio, "eager": 5}
        yield Target("ntm_sequence", specs()["ntm_sequence"].sample(name), "fwd+bwd", bars, rows=_rows)
