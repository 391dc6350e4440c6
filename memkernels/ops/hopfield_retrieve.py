"""Retrieval from a modern Hopfield network: a query moves towards the stored patterns, step by step, then reads."""

from __future__ import annotations

import torch

from memkernels._checks import Signature, check_finite, check_flag, check_number, fail
from memkernels._registry import Arg, Out, Product, define_op, empty_like, new_empty
from memkernels.ops.content_address import content_address


def hopfield_retrieve(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    steps: int = 1,
    tolerance: float | None = None,
    value: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    return_weights: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Associate each query with the stored patterns `steps` times and read with the last weights.

    Formula:
        ``xi[0] = query``; ``weights[s] = softmax(beta * xi[s] key^T)``; ``xi[s + 1] = weights[s] key``;
        ``read = weights[steps - 1] value``.
        With a tolerance a row stays where it is once a step has moved it by less: ``|xi[s + 1] - xi[s]| < tolerance``.

    Args:
        query: "B Q D", the state patterns; float64, float32, bfloat16 or float16, any strides.
        key: "B N D", the stored patterns, same dtype and device; any strides, so that patterns expanded over the batch are not copied.
        beta: inverse temperature, a number, or a tensor with one element or "B Q" of the same dtype, which then has a gradient.
        steps: how many times weights are computed, at least 1; 1 is attention with the patterns.
        tolerance: see the formula; None or 0: all steps are taken. A row that has come to rest costs nothing more once all rows that
            are worked on together have. Nothing waits for the device.
        value: "B N V", what is read; None: the patterns themselves.
        mask: bool "B N", True = the pattern takes part; None: all do.
        return_weights: also return the last weights.

    Returns:
        read: "B Q V", same dtype, contiguous; 0 where no pattern takes part. With ``return_weights``: (read, weights "B Q N").

    Gradients:
        To ``query``, ``key``, ``value`` and a tensor ``beta``, exactly those of the unrolled steps, of any order; also through the
        weights. Whether a row has come to rest has no gradient.

    Numerics:
        Steps, softmax and sums in float32 (float64 for float64); the half types are rounded once, at the end. Memory beyond inputs and
        outputs is O(steps Q D): backward computes the weights of each step again from the states. The half types work on a float32
        copy of patterns and values. Deterministic; batch entries do not depend on each other. A pattern that is masked is not
        looked at: NaN there reaches nothing.

    Raises:
        ValueError: a size does not fit, steps below 1, a negative tolerance, a number beta that is not finite.
        TypeError: a dtype or device differs, a wrong type.

    Source:
        Ramsauer et al., Hopfield Networks is All You Need (2021), equations 3 and 10.

    Example:
        >>> import torch, memkernels as mk
        >>> patterns = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> mk.hopfield_retrieve(torch.tensor([[[0.6, 0.4]]]), patterns, beta=8.0, steps=4).round(decimals=2)
        tensor([[[1., 0.]]])
    """
    scale, factors = _beta(query, beta)
    dims = SIGNATURE(query, key, factors, value, mask)
    if isinstance(steps, bool) or not isinstance(steps, (int, torch.SymInt)):
        fail(NAME, "steps", "an integer", repr(steps), TypeError)
    if steps < 1:
        fail(NAME, "steps", "at least 1", steps)
    tolerance = 0.0 if tolerance is None else float(check_number(NAME, "tolerance", tolerance))
    if not tolerance >= 0:  # nor NaN
        fail(NAME, "tolerance", "a number from 0 on, or None", tolerance)
    if return_weights.__class__ is not bool:
        check_flag(NAME, "return_weights", return_weights)
    read, state, *_ = OP(query, key, factors, value, mask, scale, steps, tolerance, return_weights)
    if not return_weights:
        return read
    strength = query.new_full((), scale).expand(dims["B"], dims["Q"]) if factors is None else factors
    return read, content_address(key, state, strength, similarity="dot", mask=mask)


def _beta(query, beta):
    """(number, None), or (1, tensor "B Q")."""
    if not isinstance(beta, torch.Tensor) or not isinstance(query, torch.Tensor):
        return float(check_finite(NAME, "beta", beta)), None
    return 1.0, beta.reshape(()).expand(query.shape[:2]) if beta.numel() == 1 else beta


def _allocate(query, key, beta, value, mask, scale, steps, tolerance, return_state):
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    batch, queries, width = query.shape
    shape = (batch, queries, width if value is None else value.shape[2])
    return (
        new_empty(query, shape),
        empty_like(query) if return_state else None,
        new_empty(query, (steps - 1, batch, queries, width), wide),
        new_empty(query, (steps, batch, queries, 2), wide),
        new_empty(query, (batch, queries), torch.int64),
        None if query.dtype == wide else new_empty(query, shape, wide),
    )


def _products(query, key, beta, value, mask, scale, steps, tolerance, return_state):
    rows = query.shape[1] * key.numel()  # of a batch by a batch: "Q D" by "D N", and "Q N" by "N D"
    last, name = (key, "key") if value is None else (value, "value")
    return Product((2 * steps - 1) * rows, "query key beta", "key"), Product(query.shape[1] * last.numel(), "query key beta", name)


NAME = "hopfield_retrieve"
SIGNATURE = Signature(NAME, query="B Q D", key="B N D", beta="B Q | None", value="B N V | None", mask=("B N | None", torch.bool))
# `state`: xi[steps - 1], from which the weights that were asked for follow. `states`: xi[1] to xi[steps - 1]; `stats`: of each step the
# maximum m of the scores and the sum of exp(score - m); `moves`: in how many steps a row moved; `exact`: read before it is rounded.
OP = define_op(
    NAME,
    inputs=(
        Arg("query"), Arg("key"), Arg("beta", optional=True), Arg("value", optional=True),
        Arg("mask", differentiable=False, optional=True),
    ),
    outputs=(
        Out("read", save=True),
        Out("state"),
        Out("states", differentiable=False, save=True, batch=1),
        Out("stats", differentiable=False, save=True, batch=1),
        Out("moves", differentiable=False, save=True),
        Out("exact", differentiable=False, save=True),
    ),
    options="float scale, SymInt steps, float tolerance, bool return_state",
    allocate=_allocate,
    autocast="float32",
    products=_products,
)  # fmt: skip
