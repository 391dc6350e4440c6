"""Address a memory by location: from where a head was, by a step in a circle."""

from __future__ import annotations

import torch

from memkernels._checks import Signature
from memkernels._registry import Arg, Out, define_op, empty_like, new_empty


def location_address(
    content: torch.Tensor, previous: torch.Tensor, gate: torch.Tensor, shift: torch.Tensor, sharpen: torch.Tensor
) -> torch.Tensor:
    """Address a memory by location: interpolates content weights with the last ones, shifts them in a circle and sharpens.

    Formula:
        - ``w_g = gate * content + (1 - gate) * previous``
        - ``w_s[i] = sum_j shift[j] * w_g[(i - j) mod N]``, j = -S..S
        - ``weights = w_s^sharpen / sum(w_s^sharpen)``

    Args:
        content: "B R N", float64, float32, bfloat16 or float16; any strides; rows usually sum to 1.
        previous: "B R N", same dtype and device: the weights of the step before.
        gate: "B R", same dtype and device; in [0, 1].
        shift: "B R 2S+1", same dtype and device; non-negative, usually sums to 1. Element S + j moves weight
            j rows on. Any S, also beyond N.
        sharpen: "B R", same dtype and device; at least 1.

    Returns:
        weights: "B R N", same dtype, contiguous; sums to 1 over N, or is 0 where no w_s is positive.

    Gradients:
        To all five arguments, of any order; a row where w_s is not positive has weight exactly 0 and passes gradient 0.

    Numerics:
        float32 inside for float32, bfloat16 and float16, float64 for float64. Powers are taken of w_s over its largest element, through the
        logarithm: in float32 the sum stays within 1e-5 of 1 up to sharpen 1000, and nothing overflows. Where the largest w_s is below
        2^-100 (2^-900 in float64) the slope is the one at that value. Deterministic; a head does not depend on the others.

    Raises:
        ValueError: a size differs from what another argument says, or shift has an even number of taps.
        TypeError: a dtype or device differs or is not a floating one.

    Source:
        Graves, Wayne and Danihelka, Neural Turing Machines (2014), equations 7 to 9.

    Example:
        >>> import torch, memkernels as mk
        >>> content, previous = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]]), torch.tensor([[[0.0, 0.0, 1.0, 0.0]]])
        >>> zero, one, ahead = torch.zeros(1, 1), torch.ones(1, 1), torch.tensor([[[0.0, 0.0, 1.0]]])
        >>> mk.location_address(content, previous, zero, ahead, one)
        tensor([[[0., 0., 0., 1.]]])
    """
    SIGNATURE(content, previous, gate, shift, sharpen)
    weights, _ = OP(content, previous, gate, shift, sharpen)
    return weights


def _allocate(content, previous, gate, shift, sharpen):
    wide = torch.float64 if content.dtype == torch.float64 else torch.float32
    return empty_like(content), new_empty(content, (*content.shape[:2], 2), wide)


# `stats`: of each head the largest w_s (1 where none is positive), and the sum of (w_s / largest)^sharpen.
SIGNATURE = Signature("location_address", content="B R N", previous="B R N", gate="B R", shift="B R 2S+1", sharpen="B R")
OP = define_op(
    "location_address",
    inputs=(Arg("content"), Arg("previous"), Arg("gate"), Arg("shift"), Arg("sharpen")),
    outputs=(Out("weights", save=True), Out("stats", differentiable=False, save=True)),
    allocate=_allocate,
    autocast="float32",
)
