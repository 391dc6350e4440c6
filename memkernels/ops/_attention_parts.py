"""Attention to one part of the keys, as whoever merges parts needs it: with its statistics, and a backward that can be called by hand."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from memkernels._registry import capture
from memkernels.ops.attention import attention


class Part(NamedTuple):
    """What one part gave: out and, of each query, the maximum of its scores and the sum of exp(score - maximum)."""

    out: torch.Tensor
    stats: torch.Tensor


def part_forward(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> Part:
    """The attention to these keys alone; options are those of `attention`."""
    op, flat = capture(attention, query, key, value, **options)
    out, _, stats = op(*flat)
    return Part(out, stats)


def part_backward(
    dout: torch.Tensor, dlse: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, part: Part, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to query, key and value from those of the part's out and log-sum-exp."""
    op, flat = capture(attention, query, key, value, **options)
    inputs, rest = flat[: op.n_inputs], flat[op.n_inputs :]
    needs = [op.inputs[i].name in ("query", "key", "value") for i in op.differentiable]
    found = op.backward_op(dout, dlse, *inputs, *part, *rest, needs)
    return found[0], found[1], found[2]
