"""Read a memory by content, in one pass over it."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, check_choice, check_flag
from memkernels._registry import Arg, Out, Product, define_op, empty_like, new_empty

SIMILARITIES = ("cosine", "dot", "l2")


def content_read(
    memory: torch.Tensor,
    key: torch.Tensor,
    strength: torch.Tensor,
    *,
    value: torch.Tensor | None = None,
    similarity: str = "cosine",
    mask: torch.Tensor | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Read a memory by content: ``content_address`` and ``memory_read`` in one pass that keeps no weights.

    Formula:
        ``weights = softmax_i(strength * c(key, memory_i))``, ``read = sum_i weights_i * value_i``, where c is

        - ``"cosine"``: ``k . m / (sqrt(|k|^2 + 1e-6) * sqrt(|m|^2 + 1e-6))``
        - ``"dot"``: ``k . m``
        - ``"l2"``: ``-|k - m|^2``

    Args:
        memory: "B N W", float64, float32, bfloat16 or float16; any strides.
        key: "B R W", same dtype and device.
        strength: "B R", same dtype and device; any finite value, usually positive.
        value: "B N V", same dtype and device; what is read. Default: the memory itself.
        similarity: "cosine", "dot" or "l2".
        mask: bool "B N"; True = the row takes part. A row that does not has weight exactly 0, and what it holds (NaN too) reaches nothing.
        return_weights: also return the weights.

    Returns:
        read: "B R V" (V = W without value), same dtype, contiguous; 0 where no row takes part. With ``return_weights``:
        (read, weights "B R N").

    Gradients:
        To ``memory``, ``key``, ``strength`` and ``value``, of any order; zero where no row takes part, finite for zero rows and zero keys.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64; rounded once, at the end. Memory beyond inputs and outputs
        is O(B R V): backward recomputes the weights from the maximum and the sum of the softmax. Deterministic; a batch row does not
        depend on the other rows.

    Raises:
        ValueError: a size differs from what another argument says, or an unknown similarity.
        TypeError: a dtype differs, is not a floating one, the mask is not bool, or return_weights is not True or False.

    Source:
        Graves, Wayne and Danihelka, Neural Turing Machines (2014), equations 2, 5 and 6; with "dot" and a value, one step of a Hopfield
        retrieval (Ramsauer et al. 2020, equation 3).

    Example:
        >>> import torch, memkernels as mk
        >>> memory = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> key = torch.tensor([[[2.0, 0.0]]])
        >>> value = torch.tensor([[[5.0], [7.0]]])
        >>> mk.content_read(memory, key, torch.tensor([[20.0]]), value=value).round(decimals=3)
        tensor([[[5.]]])
    """
    SIGNATURE(memory, key, strength, value, mask)
    if similarity not in SIMILARITIES:
        check_choice("content_read", "similarity", similarity, SIMILARITIES)
    if return_weights.__class__ is not bool:
        check_flag("content_read", "return_weights", return_weights)
    read, weights, _, _ = OP(memory, key, strength, value, mask, similarity, return_weights)
    return (read, weights) if return_weights else read


def _allocate(memory, key, strength, value, mask, similarity, return_weights):
    wide = torch.float64 if memory.dtype == torch.float64 else torch.float32
    batch, heads, _ = key.shape
    read = empty_like(key) if value is None else new_empty(key, (batch, heads, value.shape[2]))
    weights = new_empty(memory, (batch, heads, memory.shape[1])) if return_weights else None
    total = empty_like(read) if wide == read.dtype else new_empty(read, read.shape, wide)
    return read, weights, new_empty(strength, (batch, heads, 2), wide), total


def _products(memory, key, strength, value, mask, similarity, return_weights):
    batch, heads, _ = key.shape
    rows, name = (memory, "memory") if value is None else (value, "value")
    read = Product(batch * heads * rows.shape[1] * rows.shape[2], "memory key strength", name)
    return Product(key.numel() * memory.shape[1], "key", "memory"), read


SIGNATURE = Signature(
    "content_read", memory="B N W", key="B R W", strength="B R", value="B N V | None", mask=("B N | None", torch.bool)
)  # fmt: skip
# `stats`: of each head the largest logit m and the sum of exp(logit - m); a rounded log-sum-exp would make weights whose sum is not 1.
# `total` is the read before it is rounded: backward needs read . dread to more digits than a bfloat16 read has.
OP = define_op(
    "content_read",
    inputs=(Arg("memory"), Arg("key"), Arg("strength"), Arg("value", optional=True), Arg("mask", differentiable=False, optional=True)),
    outputs=(
        Out("read"),
        Out("weights", save=True),
        Out("stats", differentiable=False, save=True),
        Out("total", differentiable=False, save=True),
    ),
    options="str similarity, bool return_weights",
    allocate=_allocate,
    autocast="float32",
    products=_products,
)
