"""The softmax of the attention family's references, over the scores that are seen."""

from __future__ import annotations

import torch


def masked_softmax(scores: torch.Tensor, seen: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights, the maximum of the scores, and the sum of exp(score - maximum): 0, -inf and 0 where nothing is seen.

    A weight that is not seen is 0 in a row of NaN too: backward sums the weights of a key over rows.
    """
    if scores.shape[-1] == 0:
        nothing = scores.sum(-1, keepdim=True)
        return scores, nothing - torch.inf, nothing
    top = scores.detach().amax(-1, keepdim=True)
    blind = top == -torch.inf
    powers = torch.exp(scores - top.masked_fill(blind, 0))
    total = powers.sum(-1, keepdim=True)
    return torch.where(seen, powers / total.masked_fill(blind, 1), 0), top, total


def log_sum_exp(top: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """-inf, with a tangent of 0, where nothing is seen."""
    blind = total == 0
    return torch.where(blind, -torch.inf, top + total.masked_fill(blind, 1).log())
