"""Address a memory by content: how well each row matches a key."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, check_choice
from memkernels._registry import Arg, Out, Product, define_op, new_empty

SIMILARITIES = ("cosine", "dot", "l2")


def content_address(
    memory: torch.Tensor, key: torch.Tensor, strength: torch.Tensor, *, similarity: str = "cosine", mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Address a memory by content: a softmax over its rows of how similar each one is to a key.

    Formula:
        ``weights[b, r, i] = softmax_i(strength[b, r] * c(key[b, r], memory[b, i]))``, where c is

        - ``"cosine"``: ``k . m / (sqrt(|k|^2 + 1e-6) * sqrt(|m|^2 + 1e-6))``
        - ``"dot"``: ``k . m``
        - ``"l2"``: ``-|k - m|^2``

    Args:
        memory: "B N W", float64, float32, bfloat16 or float16; any strides.
        key: "B R W", same dtype and device.
        strength: "B R", same dtype and device; any finite value, usually positive.
        similarity: "cosine", "dot" or "l2".
        mask: bool "B N"; True = the row takes part. A row that does not has weight exactly 0, and what it holds (NaN too) reaches nothing.

    Returns:
        weights: "B R N", same dtype, contiguous; sums to 1 over N, or is 0 where no row takes part.

    Gradients:
        To ``memory``, ``key`` and ``strength``, of any order; zero where no row takes part, finite for zero rows and zero keys.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64. The epsilon stands inside both square roots, so the gradient
        into a zero row stays below ``1e3 * strength * |gradient|``. Deterministic; a batch row does not depend on the other rows.

    Raises:
        ValueError: a size differs from what another argument says, or an unknown similarity.
        TypeError: a dtype differs, is not a floating one, or the mask is not bool.

    Source:
        Graves, Wayne and Danihelka, Neural Turing Machines (2014), equations 5 and 6.

    Example:
        >>> import torch, memkernels as mk
        >>> memory = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> key = torch.tensor([[[2.0, 0.0]]])
        >>> mk.content_address(memory, key, torch.tensor([[10.0]])).round(decimals=3)
        tensor([[[1., 0.]]])
    """
    SIGNATURE(memory, key, strength, mask)
    if similarity not in SIMILARITIES:
        check_choice("content_address", "similarity", similarity, SIMILARITIES)
    weights, _ = OP(memory, key, strength, mask, similarity)
    return weights


def _allocate(memory, key, strength, mask, similarity):
    wide = torch.float64 if memory.dtype == torch.float64 else torch.float32
    batch, heads, _ = key.shape
    return new_empty(memory, (batch, heads, memory.shape[1])), new_empty(strength, (batch, heads, 2), wide)


def _products(memory, key, strength, mask, similarity):
    return (Product(key.numel() * memory.shape[1], "key", "memory"),)


# `stats`: of each head the largest logit m and the sum of exp(logit - m); a rounded log-sum-exp would make weights whose sum is not 1.
SIGNATURE = Signature("content_address", memory="B N W", key="B R W", strength="B R", mask=("B N | None", torch.bool))
OP = define_op(
    "content_address",
    inputs=(Arg("memory"), Arg("key"), Arg("strength"), Arg("mask", differentiable=False, optional=True)),
    outputs=(Out("weights", save=True), Out("stats", differentiable=False, save=True)),
    options="str similarity",
    allocate=_allocate,
    autocast="float32",
    products=_products,
)
