"""What every reference needs of dtypes."""

from __future__ import annotations

from typing import Any

import torch


def compute(tensor: Any) -> Any:
    """The tensor in its compute dtype: float32 for the half types, else as it is (None and non-floating pass)."""
    if tensor is not None and tensor.dtype in (torch.bfloat16, torch.float16):
        return tensor.float()
    return tensor
