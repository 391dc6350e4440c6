"""Layout helpers shared by the backends."""

from __future__ import annotations

import torch


def inner_contiguous(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """The tensor, copied only when its last dimension is not a contiguous run of memory; None stays None."""
    if tensor is None or tensor.dim() == 0 or tensor.shape[-1] <= 1 or tensor.stride(-1) == 1:
        return tensor
    return tensor.contiguous()
