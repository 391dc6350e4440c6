"""What the facilities of this package say to each other. Nothing here has a gradient."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from memkernels._checks import fail


def check_group(op: str, group: Any) -> None:
    """There is a process group, and this process is one of its members."""
    if not dist.is_available() or not dist.is_initialized():
        fail(op, "group", "an initialised process group (torch.distributed.init_process_group)", "none", RuntimeError)
    if dist.get_rank(group) < 0:
        fail(op, "group", "a group that this process is a member of", f"one without rank {dist.get_rank()}")


def tell(numbers: list[float], device: torch.device, group: Any) -> list[list[float]]:
    """What every rank says, in rank order."""
    own = torch.tensor(numbers, dtype=torch.float64, device=device)
    told = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(told, own, group=group)
    return [line.tolist() for line in told]


def gathered(tensor: torch.Tensor, sizes: list[int], group: Any) -> torch.Tensor:
    """The rows of all ranks in rank order; `sizes` of them."""
    most, own = max(sizes), tensor.detach().contiguous()
    padded = own.new_zeros(most, *own.shape[1:])
    padded[: own.shape[0]] = own
    parts = [torch.empty_like(padded) for _ in sizes]
    if padded.numel():
        dist.all_gather(parts, padded, group=group)
    return torch.cat([part[:n] for part, n in zip(parts, sizes, strict=True)])


def summed(tensor: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum over the ranks, in a dtype that sums well."""
    wide = tensor.dtype if not tensor.is_floating_point() or tensor.dtype == torch.float64 else torch.float32
    total = tensor.detach().to(wide, copy=True).contiguous()
    if total.numel():
        dist.all_reduce(total, group=group)
    return total
