"""How much each row of a memory is in use: what was written counts, what was read and freed does not."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, check_flag
from memkernels._registry import Arg, Out, define_op, empty_like


def usage(
    usage: torch.Tensor, write_weights: torch.Tensor, read_weights: torch.Tensor, free_gate: torch.Tensor, *, write_gradient: bool = False
) -> torch.Tensor:
    """Usage of memory rows after a step: rows that were written fill up, rows that were read and freed empty.

    Formula:
        ``out[n] = (usage[n] + (1 - usage[n]) * (1 - prod_h(1 - write_weights[h, n]))) * prod_r(1 - free_gate[r] * read_weights[r, n])``
        for every batch row.

    Args:
        usage: "B N", float64, float32, bfloat16 or float16; any strides; in [0, 1], the usage before the step.
        write_weights: "B H N", same dtype and device: the write weights of the step before; any number of write heads, 0 too.
        read_weights: "B R N", same dtype and device: the read weights of the step before; any number of read heads, 0 too.
        free_gate: "B R", same dtype and device; in [0, 1], 1 frees what its head has read.
        write_gradient: let the gradient through to write_weights. Graves et al.'s own code stops it, which is the default.

    Returns:
        usage: "B N", same dtype, contiguous, a new tensor; in [0, 1] for arguments in [0, 1].

    Gradients:
        To usage, read_weights and free_gate, to write_weights with `write_gradient`; of any order; exact where a factor is zero.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; rounded once, at the end. Heads are taken in order.
        Deterministic; a batch row does not depend on the other rows.

    Raises:
        ValueError: a size differs from what another argument says.
        TypeError: a dtype or device differs or is not a floating one; `write_gradient` is no bool.

    Source:
        Graves et al., Hybrid computing using a neural network with dynamic external memory (2016), Methods, dynamic memory allocation.

    Example:
        >>> import torch, memkernels as mk
        >>> written, read = torch.tensor([[[0.0, 1.0, 0.0]]]), torch.tensor([[[0.5, 0.0, 0.0]]])
        >>> mk.usage(torch.tensor([[1.0, 0.2, 0.0]]), written, read, torch.ones(1, 1))
        tensor([[0.5000, 1.0000, 0.0000]])
    """
    check_flag("usage", "write_gradient", write_gradient)
    SIGNATURE(usage, write_weights, read_weights, free_gate)
    (out,) = OP(usage, write_weights if write_gradient else write_weights.detach(), read_weights, free_gate)
    return out


def _allocate(usage, write_weights, read_weights, free_gate):
    return (empty_like(usage),)


SIGNATURE = Signature("usage", usage="B N", write_weights="B H N", read_weights="B R N", free_gate="B R")
OP = define_op(
    "usage",
    inputs=(Arg("usage"), Arg("write_weights"), Arg("read_weights"), Arg("free_gate")),
    outputs=(Out("out"),),
    allocate=_allocate,
    autocast="float32",
)
