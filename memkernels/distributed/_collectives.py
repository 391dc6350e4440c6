"""What the facilities of this package say to each other. Nothing here has a gradient."""

from __future__ import annotations

from collections.abc import Callable
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


def speaking(device: Any) -> torch.device:
    """Where to say things of this device: there, or on the CPU if it is none or holds no data. A wrong one must not keep a rank silent."""
    try:
        found = torch.device(device)
    except (TypeError, RuntimeError):
        return torch.device("cpu")
    return torch.device("cpu") if found.type == "meta" else found


def check_held(op: str, **tensors: torch.Tensor | None) -> None:
    """Tensors whose values can be sent."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.is_meta:
            fail(op, name, "a tensor on a device that holds data", "device meta")


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


def agree(
    op: str, argument: str, equal: tuple[str, ...], told: tuple[str, ...], plan: Any, device: Any, group: Any
) -> list[dict[str, float]]:
    """What all ranks plan to do; every one raises if a rank refuses its arguments, whatever it raises, or plans something else."""
    problem, own = None, dict.fromkeys((*equal, *told), 0.0)
    try:
        own = {name: float(v) for name, v in plan().items()}
    except Exception as error:
        problem = error
    lines = tell([float(problem is not None), *(own[name] for name in (*equal, *told))], device, group)
    if problem is not None:
        raise problem
    for rank, line in enumerate(lines):
        if line[0]:
            fail(op, f"rank {rank}", "arguments like here", "some that it refused", RuntimeError)
    plans = [dict(zip((*equal, *told), line[1:], strict=True)) for line in lines]
    for name in equal:
        values = [p[name] for p in plans]
        if len(set(values)) > 1:
            kind = TypeError if name == "dtype" else ValueError
            fail(op, argument, f"the same {name} on all ranks", ", ".join(f"{v:g}" for v in values), kind)
    return plans


def tell_text(text: str, device: torch.device, group: Any) -> list[str]:
    """What every rank says, in rank order."""
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    sizes = [int(line[0]) for line in tell([float(len(data))], device, group)]
    return [bytes(part.tolist()).decode() for part in gathered(data, sizes, group).split(sizes)]


def together(op: str, call: Callable[[], Any], device: torch.device, group: Any, undo: Callable[[Any], Any] | None = None) -> Any:
    """What `call` returns, if it raised on no rank; else all raise: the others say which rank it was, after `undo` of what they got."""
    problem, found = None, None
    try:
        found = call()
    except Exception as error:
        problem = error
    lines = tell([float(problem is not None)], device, group)
    if problem is not None:
        raise problem
    if failed := [rank for rank, line in enumerate(lines) if line[0]]:
        if undo is not None:
            undo(found)
        fail(op, f"rank {failed[0]}", "what succeeds here", "an error there", RuntimeError)
    return found
