"""Large buffers: fresh ones in huge pages, longer ones, and ones that are given up without a trace."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from memkernels._backends import kernel


def fresh(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Uninitialised; on the CPU in huge pages where the system has them: rows are met in any order, and each small page costs a TLB
    miss."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    fast = kernel("cpp", "store_keys")
    if device.type == "cpu" and tensor.numel() and not isinstance(fast, str):
        fast.prefer_huge_pages(tensor.view(-1).view(torch.uint8))
    return tensor


def wipe(tensor: torch.Tensor) -> None:
    """What a buffer held must not be found in memory after it was given up."""
    with torch.no_grad():
        tensor.zero_()


def grown(tensor: torch.Tensor, size: int) -> torch.Tensor:
    """A longer copy with zeros behind; the tensor itself is wiped."""
    longer = fresh((size, *tensor.shape[1:]), tensor.dtype, tensor.device)
    longer[: tensor.shape[0]] = tensor
    longer[tensor.shape[0] :] = 0
    wipe(tensor)
    return longer
