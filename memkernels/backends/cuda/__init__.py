"""CUDA C++ kernels: memkernels._C_cuda, handed torch's tensor exchange API at import. Raises ImportError when it was not built."""

from __future__ import annotations

from functools import cache

import torch

from memkernels import _C_cuda, _compat

_C_cuda.bind(_compat.dlpack_exchange_api())


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def refuse_device(device: torch.device) -> str | None:
    """The kernels are compiled for compute capability 8.0 and later."""
    major, minor = _capability(device.index or 0)
    return None if major >= 8 else f"needs compute capability 8.0, this device has {major}.{minor}"


def scratch(count: int, like: torch.Tensor) -> torch.Tensor:
    """`count` accumulators: float64 for float64, float32 for the others."""
    return like.new_empty(count, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)
