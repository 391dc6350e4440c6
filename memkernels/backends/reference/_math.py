"""What every reference needs of dtypes."""

from __future__ import annotations

from typing import Any

import torch


def compute(tensor: Any) -> Any:
    """The tensor in its compute dtype: float32 for the half types, else as it is (None and non-floating pass)."""
    if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.float()
    return tensor


def other_factors(factors: torch.Tensor) -> torch.Tensor:
    """Product over dimension 1 of all factors but each, by prefix and suffix products: exact where a factor is zero."""
    one = factors.new_ones(factors.shape[0], 1, *factors.shape[2:])
    before = torch.cat([one, factors], 1).cumprod(1)[:, :-1]
    after = torch.cat([factors, one], 1).flip(1).cumprod(1).flip(1)[:, 1:]
    return before * after
