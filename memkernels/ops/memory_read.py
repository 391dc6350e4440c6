"""Read rows of a memory with given weights."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
from memkernels._registry import Arg, Out, Product, define_op, new_empty


def memory_read(memory: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Read a memory: the weighted sum of its rows, for each read head.

    Formula:
        ``read[b, r] = sum_n weights[b, r, n] * memory[b, n]``

    Args:
        memory: "B N W", float64, float32, bfloat16 or float16; any strides.
        weights: "B R N", same dtype and device; usually non-negative with sum 1 over N, but any value is allowed.

    Returns:
        read: "B R W", same dtype, contiguous. Zeros if N = 0.

    Gradients:
        To ``memory`` and ``weights``, of any order.

    Numerics:
        Sums are float32 for float32, bfloat16 and float16, float64 for float64; bfloat16 and float16 are rounded once, at the end.
        Deterministic; a batch row does not depend on the other rows.

    Raises:
        ValueError: a size differs from what the other argument says.
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves, Wayne and Danihelka, Neural Turing Machines (2014), equation 2.

    Example:
        >>> import torch, memkernels as mk
        >>> memory = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> mk.memory_read(memory, torch.tensor([[[0.5, 0.5]]]))
        tensor([[[2., 3.]]])
    """
    SIGNATURE(memory, weights)
    (read,) = OP(memory, weights)
    return read


def _allocate(memory, weights):
    return (new_empty(memory, (memory.shape[0], weights.shape[1], memory.shape[2])),)


def _products(memory, weights):
    return (Product(weights.numel() * memory.shape[2], "weights", "memory"),)


SIGNATURE = Signature("memory_read", memory="B N W", weights="B R N")
OP = define_op(
    "memory_read",
    inputs=(Arg("memory"), Arg("weights")),
    outputs=(Out("read"),),
    allocate=_allocate,
    autocast="float32",
    products=_products,
)
